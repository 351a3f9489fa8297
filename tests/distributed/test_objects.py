"""`all_gather_objects` compared with torch's function, and commands without NumPy."""

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

# Expected in the layer: the mean of all samples in one process, in float64.
PROGRAM = """
import sys, torch, syncbn
import torch.distributed as dist
from syncbn.cli import doctor, recalibrate
from torch.nn.parallel import DistributedDataParallel
info = syncbn.init_process_group("gloo")
torch.manual_seed(0)
everyone = torch.randn(6, 3, 4, 4)
layer = syncbn.SyncBatchNorm2d(3, process_group="node", momentum=1.0)
model = DistributedDataParallel(layer)
model(everyone[info.rank :: info.world_size]).square().sum().backward()
torch.testing.assert_close(layer.running_mean, everyone.double().mean((0, 2, 3)).float())
assert bool(layer.weight.grad.isfinite().all())
try:
    torch.zeros(1).numpy()
except RuntimeError as error:
    print(f"{error}")
dist.destroy_process_group()
sys.argv = ["doctor", "json=report.json"]
doctor.main()
sys.argv = [
    "recalibrate", "checkpoint=in.pt", "output=out.pt", "evaluate=true",
    "+model._target_=tests.calibration.networks.network",
    "+data._target_=tests.calibration.networks.labelled", "+data.batch_size=5",
    "+data.rank=${rank}", "+data.world_size=${world_size}",
]
recalibrate.main()
"""


def _gather(rank: int, values: list[Any]) -> tuple[list[Any], list[Any]]:
    expected = [None] * len(values)
    dist.all_gather_object(expected, values[rank])
    group = dist.new_group([0, 1])
    gathered = all_gather_objects(values[rank])
    within = all_gather_objects(values[rank], group) if rank < 2 else values[:2]
    assert within == values[:2]
    return gathered, expected


@pytest.mark.parametrize("values", [[None] * 3, [{}, {"a": (1, "x" * 5000)}, [0.5, float("inf")]]])
def test_objects_of_all_ranks_are_gathered(values: list[Any], three_ranks: Ranks) -> None:
    for gathered, expected in three_ranks.run(_gather, values):
        assert gathered == expected == values


def test_layers_and_commands_without_numpy(tmp_path: Path) -> None:
    """NumPy is no dependency; without it all ranks of a command ended with a traceback."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "numpy.py").write_text("raise ModuleNotFoundError('there is no NumPy')")
    (tmp_path / "program.py").write_text(PROGRAM)
    torch.save(network().state_dict(), tmp_path / "in.pt")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py"]
    done = run([sys.executable, *torchrun], tmp_path, {"PYTHONPATH": f"{modules}:{ROOT}"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Numpy is not available") == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert (report["launcher"], report["backend"]) == ("torchrun", "gloo")
    assert "MPI library" not in report["installation"]
    for text in ("recalibration changes", "cross-entropy", "written: out.pt"):
        assert text in done.stdout
