"""The layers' all-reduces and DistributedDataParallel's, whose order may differ between ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

import syncbn
from syncbn.distributed import resolve_group
from syncbn.distributed.collectives import communicating_group
from syncbn.distributed.groups import create_layers_group
from tests import processes
from tests.ranks import Ranks
from tests.transports import ROOT, mpirun


class _OptionalBranch(nn.Module):
    """A network with an optional input, which only some ranks pass."""

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


def gradients_of_an_optional_branch(rank: int, group: Any) -> dict[str, Tensor]:
    # Buckets of a parameter or two: the branch has its bucket between the layer's all-reduces.
    net = syncbn.convert_sync_batchnorm(_OptionalBranch(), group)
    model = DistributedDataParallel(net, find_unused_parameters=True, bucket_cap_mb=768 / 2**20)
    x, metadata = _batch()
    loss = model(x.chunk(2)[rank], metadata if rank else None).pow(3).sum()
    loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def check_gradients(gradients: dict[str, Tensor]) -> None:
    """Compare with one float64 process, whose loss is twice the mean of the ranks' losses."""
    net, (x, metadata) = _OptionalBranch().double(), _batch()
    h = net.first(x.double())
    h = torch.cat([h[:4], h[4:] + net.metadata(metadata.double())])
    net.head(net.norm(h)).pow(3).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(2 * gradients[name], parameter.grad.float())


def test_an_optional_branch_with_a_group_of_the_layers_own(two_ranks: Ranks) -> None:
    for gradients in two_ranks.run(gradients_of_an_optional_branch, "own"):
        check_gradients(gradients)


PROGRAM = """
import os, sys, torch, torch.distributed as dist, syncbn
from tests.test_layers_group import gradients_of_an_optional_branch
threads = []
for attempt in range(2):
    rank = syncbn.init_process_group().rank
    torch.save(gradients_of_an_optional_branch(rank, None), f"{rank} {attempt}.pt")
    dist.barrier()
    dist.destroy_process_group()
    threads.append(len(os.listdir("/proc/self/task")))
assert threads[0] == threads[1], threads
"""


@pytest.mark.parametrize("transport", ["gloo", "openmpi"])
def test_an_optional_branch_needs_no_argument_after_our_init(
    transport: str, tmp_path: Path
) -> None:
    """A gradient bucket of one rank was added to the all-reduce of the other rank's layer.

    A second default group has a group for the layers, too, and the first one leaves no threads.
    """
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher = torchrun if transport == "gloo" else [*mpirun(transport, 2), sys.executable]
    done = processes.run([*launcher, program], tmp_path, {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        for attempt in range(2):
            check_gradients(torch.load(tmp_path / f"{rank} {attempt}.pt"))


def _meets_a_bucket(rank: int, zeros: bool) -> str:
    group = dist.new_group([0, 1])
    if rank == 1:  # as many bytes as the layer's 8 float64
        bucket = torch.zeros(16) if zeros else torch.linspace(0.1, 0.7, 16)
        dist.all_reduce(bucket, group=group)
        return ""
    layer = syncbn.SyncBatchNorm1d(3, process_group=group)
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(4, 3))
    assert torch.equal(layer.get_buffer("running_mean"), torch.zeros(3))
    return str(caught.value)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_sum_with_another_operation_names_the_layer(two_on_host: Ranks, zeros: bool) -> None:
    """256 float32 gradients, zeros where a branch is skipped, were added to 128 float64 sums."""
    message = two_on_host.run(_meets_a_bucket, zeros)[0]
    assert message.startswith("SyncBatchNorm1d(3) forward, torch.float32 input: this was all-red")
    assert "another operation of this group, such as a gradient bucket" in message
    assert "process_group='own'" in message


def _own_groups(rank: int) -> None:
    group = resolve_group("own")
    assert group is not None
    assert group is not dist.group.WORLD
    assert dist.get_process_group_ranks(group) == [0, 1]


def test_own_is_a_new_group_of_all_ranks(two_ranks: Ranks) -> None:
    two_ranks.run(_own_groups)


def test_compiled_code_follows_a_new_default_group() -> None:
    """It kept the group that was destroyed."""
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def double(x: Tensor) -> Tensor:
        return 2 * x if communicating_group(None) is None else x

    for number in range(2):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        create_layers_group(None)
        double(torch.ones(3))
        assert counter.frame_count == number + 1
        dist.destroy_process_group()
