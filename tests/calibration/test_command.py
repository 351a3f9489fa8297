"""syncbn-recalibrate, started from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file

import syncbn
from syncbn.calibration.checkpoint import read_checkpoint
from tests.calibration.networks import batches, distance, network, statistics
from tests.calibration.networks import labelled as labelled_images
from tests.disk import almost_full
from tests.processes import run, run_forked
from tests.ranks import Ranks
from tests.transports import ROOT, mpirun

NETWORKS = "tests.calibration.networks"
TARGETS = [f"+model._target_={NETWORKS}.network", f"+data._target_={NETWORKS}.batches"]
MPIRUN = [*mpirun("openmpi", 2), sys.executable]
DRY_RUN = ["+data.batch_size=4", "dry_run=true"]
SHARED = ["+data.rank=${rank}", "+data.world_size=${world_size}"]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    torch.save({"model": network().state_dict(), "step": 3}, tmp_path / "in.pt")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has no threads of its parent's OpenMP pool
    yield tmp_path / "in.pt"
    torch.set_num_threads(threads)


def command(
    source: Path, *arguments: str, launcher: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command under a launcher; without one, in a fork of this process."""
    settings = [f"checkpoint={source}", *TARGETS, *arguments]
    if launcher is None:
        return run_forked("syncbn.cli.recalibrate", settings, ROOT)
    return run([*launcher, "-m", "syncbn.cli.recalibrate", *settings], ROOT)


@pytest.mark.parametrize("launcher", [None, MPIRUN], ids=["alone", "mpirun"])
def test_recalibrates_checkpoint(launcher: list[str] | None, source: Path) -> None:
    output, report = source.with_name("out.pt"), source.with_name("report.json")
    picture, between = source.with_name("drift.png"), source.with_name("between.pt")
    done = command(
        source,
        *(f"output={output}", f"report={report}", f"plot={picture}", f"between={between}"),
        *(f"data._target_={NETWORKS}.labelled", "+data.batch_size=1", "evaluate=true"),
        *(SHARED if launcher else []),
        launcher=launcher,
    )
    assert done.returncode == 0, done.stderr
    assert "recalibration changes 11 by" in done.stdout
    assert done.stdout.count("layer ") == 1  # rank 0 only
    expected, net, metrics = network().eval(), network(), []
    (x, labels), *_ = labelled_images(24)
    between_samples = {}
    for _ in range(2):
        logits = expected(x)
        right = (logits.argmax(1) == labels).double().mean()
        metrics.append((F.cross_entropy(logits, labels).item(), right.item()))
        between_samples = syncbn.recalibrate(expected, [x]).between()
    losses, accuracies = zip(*metrics, strict=True)
    assert "cross-entropy   {:.4f}   {:.4f}".format(*losses) in done.stdout
    assert "accuracy        {:.4f}   {:.4f}".format(*accuracies) in done.stdout
    assert losses[0] != losses[1]
    for name, values in torch.load(between).items():
        torch.testing.assert_close(values, between_samples[name])
    read_checkpoint(output).find(net).load_into(net)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert [layer["samples"] for layer in json.loads(report.read_text())["layers"]] == [24] * 5
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("start", ["syncbn-recalibrate", "-m"])
def test_local_modules_do_not_shadow_packages(start: str, tmp_path: Path) -> None:
    """A safetensors.py in the folder of a downloaded checkpoint ran in place of the package."""
    save_file(network().state_dict(), tmp_path / "in.safetensors")
    evil = "from pathlib import Path; Path('owned').touch(); raise ImportError('evil')"
    # rich imports colorsys: with -m before the command begins, from the folder that Python prefers.
    for name in ("safetensors", "matplotlib", *(["colorsys"] if start != "-m" else [])):
        (tmp_path / f"{name}.py").write_text(evil)
    (tmp_path / "mine.py").write_text("from tests.calibration.networks import batches, network")
    script = Path(sys.executable).with_name("syncbn-recalibrate")
    program = [script] if start != "-m" else [sys.executable, "-m", "syncbn.cli.recalibrate"]
    settings = [
        *("checkpoint=in.safetensors", "output=out.safetensors", "plot=drift.png"),
        *("+model._target_=mine.network", "+data._target_=mine.batches", "+data.batch_size=4"),
    ]
    done = run([*program, *settings], tmp_path, {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").exists()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("setting", ["output", "report", "plot", "between"])
def test_special_files_rejected_before_work(setting: str, source: Path) -> None:
    """As root, output=/dev/null replaced the device of the whole machine by a file."""
    path = source.with_name("pipe.pt")
    os.mkfifo(path)
    other = [] if setting == "output" else ["dry_run=true"]
    done = command(source, "+data.batch_size=4", f"{setting}={path}", *other)
    assert done.returncode == 2, done.stderr
    assert f"{path}: is a device, a pipe or a socket" in done.stderr
    assert done.stdout == ""
    assert path.is_fifo()


def test_signal_during_write_leaves_no_temporary_file(source: Path) -> None:
    """Half a checkpoint remained after each job that a scheduler ended during the write."""
    content = {**torch.load(source), "rest": torch.zeros(60, 2**19)}  # 120 MB, for a slow write
    torch.save(content, source)
    output, expected = source.with_name("out.pt"), {"in.pt", "out.pt"}
    settings = [f"checkpoint={source}", f"output={output}", "+data.batch_size=4", *TARGETS]
    program = [sys.executable, "-m", "syncbn.cli.recalibrate", *settings]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE) as job:
        while job.poll() is None:
            if {path.name for path in source.parent.iterdir()} - expected:
                break
            time.sleep(0.001)
        job.terminate()
        job.communicate(timeout=100)
    assert job.returncode == -signal.SIGTERM
    assert {path.name for path in source.parent.iterdir()} == expected
    assert torch.load(output).keys() == content.keys()


def _run_on_rank(rank: int, settings: list[str]) -> str:
    from syncbn.cli import recalibrate  # not in this process, whose forks run it as a command

    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = hydra.compose("recalibrate", settings)
    size = dist.get_world_size()
    config.rank, config.world_size = rank, size
    with pytest.raises(Exception) as caught:  # noqa: PT011
        recalibrate.run(config, syncbn.RankInfo(rank, size, rank, torch.device("cpu")))
    return str(caught.value.__cause__ or caught.value)


@pytest.mark.parametrize(
    ("settings", "failed", "message"),
    [
        (["checkpoint={folder}/${{rank}}.pt"], 1, "1.pt: no such file"),
        (["+data.rank=0", "+data.world_size='${{rank}}'"], 0, "slice step cannot be zero"),
    ],
    ids=["the checkpoint", "the data"],
)
def test_missing_input_on_one_rank_ends_all(
    settings: list[str], failed: int, message: str, source: Path, pair: Ranks
) -> None:
    source.rename(source.with_name("0.pt"))
    common = [f"checkpoint={source.with_name('0.pt')}", *TARGETS, *DRY_RUN]
    added = [setting.format(folder=source.parent) for setting in settings]
    results = pair.run(_run_on_rank, [*common, *added])
    other = f"calibration was ended by an error on rank {failed}; see the output there"
    assert message in results[failed]
    assert results[1 - failed] == other


def test_dry_run_writes_nothing(source: Path) -> None:
    done = command(source, *DRY_RUN, "method=sequential")
    assert done.returncode == 0, done.stderr
    assert "recalibration changes" in done.stdout
    assert list(source.parent.iterdir()) == [source]


def test_select_layers_by_name(source: Path) -> None:
    """Integers, as in nn.Sequential, and the whole model in evaluation mode: none is frozen.

    The output of a private checkpoint was readable for all users.
    """
    source.chmod(0o600)
    output = source.with_name("out.pt")
    settings = ["+data.batch_size=4", f"output={output}", "layers=[1,3.first,11]", "skip=11"]
    done = command(source, *settings)
    assert done.returncode == 0, done.stderr
    assert "excluded by layers= or skip=): 3.second.1, 6, 11" in " ".join(done.stdout.split())
    assert output.stat().st_mode & 0o777 == 0o600
    expected, net = network(), network()
    syncbn.recalibrate(expected, batches(24), layers=["1", "3.first"])
    read_checkpoint(output).find(net).load_into(net)
    assert distance(statistics(net), statistics(expected)) < 1e-12


def test_escapes_checkpoint_names(source: Path) -> None:
    content = torch.load(source)
    content["\x1b]0;title\x07"] = {**content.pop("model"), "\x1b[2Jclear": torch.zeros(1)}
    torch.save(content, source)
    done = command(source, *DRY_RUN)
    assert done.returncode == 2
    assert r"\x1b[2Jclear is unexpected" in done.stderr
    assert all(c.isprintable() or c == "\n" for c in done.stderr)


INVALID = {
    "no output": (["+data.batch_size=4"], "got no output="),
    "output": (["+data.batch_size=4", "output={source}"], "is the checkpoint that is read"),
    "output folder": (["+data.batch_size=4", "output=/no/such/x.pt"], "/no/such does not exist"),
    "method": ([*DRY_RUN, "method=x"], "expected one of lockstep"),
    "argument": (["dry_run=true"], "missing 1 required positional argument: 'batch_size'"),
    "state_dict": ([*DRY_RUN, "state_dict=ema"], "found at 'ema'"),
    "metric": ([*DRY_RUN, "evaluate=true"], "got a batch of type Tensor without labels; expected"),
    "evaluate an iterator": (
        [f"data._target_={NETWORKS}.one_shot", "dry_run=true", "evaluate=true"],
        "evaluate: got a one-shot generator, which cannot be read before and after",
    ),
    "report": ([*DRY_RUN, "report={source}"], "which is the checkpoint; expected another file"),
    "same file twice": (
        [*DRY_RUN, "report={source}.x", "between={source}.x"],
        "which is the report; expected another file",
    ),
    "plot": ([*DRY_RUN, "plot=/no/such/x.png"], "the folder /no/such does not exist"),
    "backend": ([*DRY_RUN, "backend=foo"], "got backend 'foo'"),
    "num_samples": ([*DRY_RUN, "num_samples=many"], "got num_samples='many'; expected 1 or more"),
    "skip": (
        [*DRY_RUN, "skip=[6,3.10]"],
        "skip: got the number 3.1; expected names, in quotes if they look like numbers",
    ),
    "KeyError": ([f"data._target_={NETWORKS}.raise_key_error", DRY_RUN[1]], "KeyError: 'image'"),
    "model": ([*DRY_RUN, "model._target_=torch.nn.Identity"], "does not fit the model"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_settings(case: str, source: Path) -> None:
    arguments, message = INVALID[case]
    before = source.read_bytes()
    done = command(source, *(argument.format(source=source) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("syncbn-recalibrate: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]


def test_full_disk_preserves_checkpoint(source: Path) -> None:
    torch.save({**torch.load(source), "rest": torch.zeros(10_000)}, source)
    before = source.read_bytes()
    with almost_full(20_000):
        done = command(source, "+data.batch_size=4", f"output={source}", "overwrite=true")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]
