"""Groups by description, in copies and pickles; the layers' group under DistributedDataParallel."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import syncbn
from syncbn.distributed import resolve_group
from syncbn.distributed.groups import active_group, create_layers_group
from tests import processes
from tests.ranks import Pool, Ranks
from tests.transports import ROOT, mpirun


def _resolve_all(rank: int) -> list[list[int] | None]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    descriptions = (None, "world", 1, 2, mesh["dp"], dist.new_group([0, 1]), "own")
    groups = [resolve_group(description) for description in descriptions]
    assert groups[-1] is not dist.group.WORLD
    return [None if g is None else dist.get_process_group_ranks(g) for g in groups]


def test_groups_from_descriptions(two_ranks: Ranks) -> None:
    for rank, answer in enumerate(two_ranks.run(_resolve_all)):
        assert answer == [None, None, [rank], None, [0, 1], [0, 1], [0, 1]]


def _resolve_invalid(rank: int) -> None:
    mesh, first = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")), dist.new_group([0])
    invalid = {
        r"groups of 3 ranks; expected a divisor of the 2 ranks": 3,
        r"groups of 0 ranks": 0,
        r"got process group True": True,
        r"device mesh of 2 dimensions \('a', 'b'\)": mesh,
        **({"this rank is not in the process group": first} if rank == 1 else {}),
    }
    for message, description in invalid.items():
        with pytest.raises(ValueError, match=message):
            syncbn.SyncBatchNorm(3, process_group=description)


def test_invalid_descriptions_raise(two_ranks: Ranks) -> None:
    two_ranks.run(_resolve_invalid)


def _resolve_node(rank: int) -> list[list[int] | None]:
    answers = []
    for agents in ("001", "000"):
        os.environ["GROUP_RANK"] = agents[rank]
        group = resolve_group("node")
        answers.append(None if group is None else dist.get_process_group_ranks(group))
    del os.environ["GROUP_RANK"]
    return answers


def test_nodes_with_different_numbers_of_ranks(three_ranks: Ranks) -> None:
    assert three_ranks.run(_resolve_node) == [[[0, 1], None], [[0, 1], None], [[2], None]]


def _convert_torch_layer(rank: int) -> bool:
    group = dist.new_group([0, 1])
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.BatchNorm1d(3))
    syncbn.convert_sync_batchnorm(model)
    return model[0].process_group is group and model[1].process_group is None


def test_conversion_keeps_group_of_torch_layer(two_ranks: Ranks) -> None:
    assert all(two_ranks.run(_convert_torch_layer))


class _OptionalBranch(nn.Module):
    """A network with an optional input, used on some ranks only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64)
        self.metadata, self.head = nn.Linear(1, 64), nn.Linear(64, 2, bias=False)

    def forward(self, x: Tensor, metadata: Tensor | None) -> Tensor:
        h = self.first(x)
        y: Tensor = self.head(self.norm(h if metadata is None else h + self.metadata(metadata)))
        return y


def _batch() -> tuple[Tensor, Tensor]:
    data = torch.Generator().manual_seed(1)
    return torch.randn(8, 8, generator=data), torch.randn(4, 1, generator=data)


def optional_branch_gradients(rank: int, group: Any) -> dict[str, Tensor]:
    # One or two parameters per bucket: the branch's bucket comes between the layer's all-reduces.
    net = syncbn.convert_sync_batchnorm(_OptionalBranch(), group)
    model = DistributedDataParallel(net, find_unused_parameters=True, bucket_cap_mb=768 / 2**20)
    x, metadata = _batch()
    loss = model(x.chunk(2)[rank], metadata if rank else None).pow(3).sum()
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def check_gradients(gradients: dict[str, Tensor]) -> None:
    """Compare with one float64 process; its loss is twice the mean of the ranks' losses."""
    net, (x, metadata) = _OptionalBranch().double(), _batch()
    h = net.first(x.double())
    h = torch.cat([h[:4], h[4:] + net.metadata(metadata.double())])
    net.head(net.norm(h)).pow(3).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(2 * gradients[name], parameter.grad.float())


def test_optional_branch_with_own_group(two_ranks: Ranks) -> None:
    for gradients in two_ranks.run(optional_branch_gradients, "own"):
        check_gradients(gradients)


PROGRAM = """
import os, sys, time, torch, torch.distributed as dist, syncbn
from tests.distributed.test_groups import optional_branch_gradients
for backend in ("gloo", "mpi4py"):
    threads = []
    for attempt in range(2):
        rank = syncbn.init_process_group(backend).rank
        torch.save(optional_branch_gradients(rank, None), f"{rank} {backend} {attempt}.pt")
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(0.5)  # a joined thread remains in /proc for a moment
        threads.append(len(os.listdir("/proc/self/task")))
    assert threads[0] == threads[1], threads
"""


def test_optional_branch_after_init_process_group(tmp_path: Path) -> None:
    """A gradient bucket of one rank was added to the all-reduce of the layer on the other rank.

    A second default group also has a layers' group, and the first one leaves no threads.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [*mpirun("openmpi", 2), sys.executable]
    done = processes.run([*launcher, program], tmp_path, {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    gradients = list(tmp_path.glob("*.pt"))
    assert len(gradients) == 8
    for path in gradients:
        check_gradients(torch.load(path))


def _all_reduce_with_bucket(rank: int) -> list[str]:
    group, messages = dist.new_group([0, 1]), []
    for bucket in (torch.zeros(16), torch.linspace(0.1, 0.7, 16)):
        if rank == 1:  # as many bytes as the layer's 8 float64
            dist.all_reduce(bucket, group=group)
            continue
        layer = syncbn.SyncBatchNorm1d(3, process_group=group)
        with pytest.raises(RuntimeError) as caught:
            layer(torch.randn(4, 3))
        assert torch.equal(layer.get_buffer("running_mean"), torch.zeros(3))
        messages.append(str(caught.value))
    return messages


def test_all_reduce_with_other_operation_names_layer(pool: Pool) -> None:
    """256 float32 gradients, zeros where a branch is skipped, were added to 128 float64 sums."""
    for message in pool(2, "gloo").run(_all_reduce_with_bucket)[0]:
        assert message.startswith("SyncBatchNorm1d(3) forward, torch.float32 input: this was all-")
        assert "another operation of this group, such as a gradient bucket" in message
        assert "process_group='own'" in message


def test_compiled_code_follows_new_default_group() -> None:
    """Compiled code kept a destroyed group."""
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def double(x: Tensor) -> Tensor:
        return 2 * x if active_group(None) is None else x

    for number in range(2):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        create_layers_group(None)
        double(torch.ones(3))
        assert counter.frame_count == number + 1
        dist.destroy_process_group()
