"""`all_gather_objects` against torch's function, and commands without NumPy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from syncbn.distributed.objects import all_gather_objects
from tests.calibration.networks import network
from tests.processes import run
from tests.ranks import Ranks
from tests.transports import ROOT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# Expected: the mean of all samples in one process, in float64.
PROGRAM = """
import sys, torch, syncbn
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
place = syncbn.init_process_group("gloo")
torch.manual_seed(0)
everyone = torch.randn(6, 3, 4, 4)
layer = syncbn.SyncBatchNorm2d(3, process_group="node", momentum=1.0)
model = DistributedDataParallel(layer)
model(everyone[place.rank :: place.world_size]).square().sum().backward()
torch.testing.assert_close(layer.running_mean, everyone.double().mean((0, 2, 3)).float())
assert bool(layer.weight.grad.isfinite().all())
try:
    torch.zeros(1).numpy()
except RuntimeError as error:
    print(f"{error}")
dist.destroy_process_group()
"""


def gathered(rank: int, values: list[Any]) -> tuple[list[Any], list[Any]]:
    theirs = [None] * len(values)
    dist.all_gather_object(theirs, values[rank])
    group = dist.new_group([0, 1])
    ours = all_gather_objects(values[rank])
    within = all_gather_objects(values[rank], group) if rank < 2 else values[:2]
    assert within == values[:2]
    return ours, theirs


@pytest.mark.parametrize("values", [[None] * 3, [{}, {"a": (1, "x" * 5000)}, [0.5, float("inf")]]])
def test_every_rank_gets_the_objects_of_all(values: list[Any], three_ranks: Ranks) -> None:
    for ours, theirs in three_ranks.run(gathered, values):
        assert ours == theirs == values


@pytest.fixture
def without_numpy(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which `import numpy` fails."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "numpy.py").write_text("raise ModuleNotFoundError('there is no NumPy')")
    return {"PYTHONPATH": f"{folder}:{ROOT}"}


def test_the_doctor_without_numpy(without_numpy: dict[str, str], tmp_path: Path) -> None:
    """NumPy is no dependency; its absence ended all ranks with a traceback."""
    doctor = [*TORCHRUN, "-m", "syncbn.cli.doctor", "json=report.json"]
    done = run([sys.executable, *doctor], tmp_path, without_numpy)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]


def test_a_calibration_without_numpy(without_numpy: dict[str, str], tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "in.pt")
    networks = "tests.calibration.networks"
    settings = [
        *("checkpoint=in.pt", "output=out.pt", "evaluate=true"),
        *(f"+model._target_={networks}.network", f"+data._target_={networks}.labelled"),
        *("+data.batch_size=5", "+data.rank=${rank}", "+data.world_size=${world_size}"),
    ]
    command = [sys.executable, *TORCHRUN, "-m", "syncbn.cli.recalibrate", *settings]
    done = run(command, tmp_path, without_numpy)
    assert done.returncode == 0, done.stderr
    assert "recalibration changes" in done.stdout
    assert "cross-entropy" in done.stdout
    assert "written: out.pt" in done.stdout


def test_a_group_of_a_node_without_numpy(without_numpy: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run([sys.executable, *TORCHRUN, "program.py"], tmp_path, without_numpy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Numpy is not available") == 2
