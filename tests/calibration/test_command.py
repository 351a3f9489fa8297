"""syncbn-recalibrate, started as people start it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import syncbn
from syncbn.calibration.checkpoint import read_checkpoint
from tests.calibration.networks import batches, distance, network, statistics

ROOT = Path(__file__).resolve().parent.parent.parent
NETWORKS = "tests.calibration.networks"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHARED = ["+data.rank=${rank}", "+data.world_size=${world_size}"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save({"model": network().state_dict(), "step": 3}, tmp_path / "in.pt")
    return tmp_path / "in.pt"


def command(
    source: Path, *arguments: str, launcher: list[str] | None = None, largest_file: int = -1
) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, *(launcher or []), "-m", "syncbn.cli.recalibrate"]
    settings = [
        f"checkpoint={source}",
        f"+model._target_={NETWORKS}.network",
        f"+data._target_={NETWORKS}.batches",
        *arguments,
    ]
    return subprocess.run(
        [*program, *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=55,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2),
    )


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["alone", "torchrun"])
def test_a_checkpoint_is_recalibrated(launcher: list[str], source: Path) -> None:
    output, report = source.with_name("out.pt"), source.with_name("report.json")
    picture = source.with_name("drift.png")
    files = [f"output={output}", f"report={report}", f"plot={picture}"]
    shared = SHARED if launcher else []
    done = command(source, "+data.batch_size=1", *files, *shared, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "recalibration changes 11 by" in done.stdout
    assert done.stdout.count("layer ") == 1  # rank 0 alone
    expected, net = network(), network()
    syncbn.recalibrate(expected, batches(24))
    read_checkpoint(output).find(net).load_into(net)
    assert distance(statistics(net), statistics(expected)) < 1e-12
    assert [layer["samples"] for layer in json.loads(report.read_text())["layers"]] == [24] * 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_writes_nothing(source: Path) -> None:
    done = command(source, "+data.batch_size=4", "dry_run=true", "method=pooled")
    assert done.returncode == 0, done.stderr
    assert "recalibration changes" in done.stdout
    assert list(source.parent.iterdir()) == [source]


BAD = {
    "no output": (["+data.batch_size=4"], "got no output="),
    "the input": (["+data.batch_size=4", "output={source}"], "is the checkpoint that is read"),
    "a method": (["+data.batch_size=4", "dry_run=true", "method=x"], "expected one of lockstep"),
    "an argument": (["dry_run=true"], "missing 1 required positional argument: 'batch_size'"),
    "no data": (["+data.batch_size=4", "+data.rank=24", "dry_run=true"], "no sample came to"),
    "a place": (["+data.batch_size=4", "dry_run=true", "state_dict=ema"], "found at 'ema'"),
    "a model": (
        ["+data.batch_size=4", "dry_run=true", "model._target_=torch.nn.Identity"],
        "does not fit the model",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, source: Path) -> None:
    arguments, message = BAD[what]
    before = source.read_bytes()
    done = command(source, *(argument.format(source=source) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("syncbn-recalibrate: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]


def test_a_full_disk_leaves_the_checkpoint(source: Path) -> None:
    before = source.read_bytes()
    done = command(
        source,
        *("+data.batch_size=4", f"output={source}", "overwrite=true", *SHARED),
        launcher=TORCHRUN,
        largest_file=2000,
    )
    assert done.returncode != 0
    assert "cannot be written" in done.stderr
    assert source.read_bytes() == before
    assert list(source.parent.iterdir()) == [source]
