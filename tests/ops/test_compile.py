"""torch.compile without a graph break, against the same layers in eager mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import syncbn
from tests.ranks import Pool

# Torch warns when it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    counters.clear()


class Block(nn.Module):
    """A layer with every option set."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.add, self.masked = options.pop("add", False), options.pop("masked", False)
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = syncbn.SyncBatchNorm2d(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, :1] > -1 if self.masked else None
        y = self.norm(
            self.conv(x), residual=x[:, :1].expand(-1, 3, -1, -1) if self.add else None, mask=mask
        )
        return torch.tanh(y)


OPTIONS: dict[str, dict[str, Any]] = {
    "without affine": {"affine": False, "activation": "hardswish", "add": True},
    "without averages": {
        "track_running_stats": False,
        "activation": "leaky_relu",
        "negative_slope": 0.2,
    },
    "masked": {"masked": True, "activation": "relu"},
    "cumulative": {"momentum": None},
    "relu of a residual": {"activation": "relu", "add": True},
}


def compare(
    make: Callable[[], nn.Module],
    batches: list[Tensor],
    backend: str = "aot_eager",
    modes: tuple[bool, ...] = (True, False),
    dynamic: bool | None = None,
) -> int:
    """Train and evaluate eagerly and compiled; return the number of compiled graphs."""
    eager, compiled = make(), make()
    call = torch.compile(compiled, fullgraph=True, backend=backend, dynamic=dynamic)
    counters.clear()
    for training, x in itertools.product(modes, batches):
        eager.train(training)
        compiled.train(training)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [eager(leaves[0]), call(leaves[1])]
        for y in outputs:
            (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)
    actual, expected = ([p.grad for p in net.parameters()] for net in (compiled, eager))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    return int(counters["stats"]["unique_graphs"])


def _batches(rank: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n + rank, 2, 6, 5, generator=generator) for n in (3, 4, 5)]


@pytest.mark.parametrize("options", list(OPTIONS)[:3])
def test_a_single_rank(options: str) -> None:
    """Batches of any size: one graph for the first, one for the rest, in each mode."""
    assert compare(lambda: Block(**OPTIONS[options]), _batches()) <= 4


def test_inductor() -> None:
    batches = _batches()[:2]
    assert compare(lambda: Block(activation="relu"), batches, "inductor", (True,), True) <= 2


def _over_ranks(rank: int, options: dict[str, Any]) -> int:
    graphs = compare(lambda: Block(**options), _batches(rank)[:2])
    torch._dynamo.reset()
    return graphs


@pytest.mark.parametrize(
    ("transport", "options"), [("gloo", "cumulative"), ("openmpi", "relu of a residual")]
)
def test_over_ranks(pool: Pool, transport: str, options: str) -> None:
    assert max(pool(2, transport).run(_over_ranks, OPTIONS[options])) <= 4


def _in_a_group(rank: int) -> int:
    group, _ = dist.new_subgroups_by_enumeration([[0, 2], [1]])
    graphs = compare(lambda: Block(process_group=group), _batches(rank)[:1], modes=(True,))
    torch._dynamo.reset()
    dist.barrier()
    return graphs


def test_in_a_group_of_some_ranks(pool: Pool) -> None:
    assert pool(3, "gloo").run(_in_a_group) == [1, 1, 1]


# Torch warns where inputs are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_layers_of_one_shape_share_a_graph(kernel: str) -> None:
    """As repeated blocks do that are compiled one by one; their names differ."""
    blocks = syncbn.convert_sync_batchnorm(nn.Sequential(*(_ConvNorm() for _ in range(4))))
    counters.clear()
    for block in blocks:
        (norm,) = (m for m in block.modules() if isinstance(m, syncbn.SyncBatchNorm))
        norm.impl = kernel
        block.compile(fullgraph=True, backend="aot_eager")
    blocks(torch.randn(2, 3, 4, 4)).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2


class _ConvNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.conv(x)))


def test_accumulated_statistics() -> None:
    eager, compiled = Block(), Block()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for net, run in ((eager, eager), (compiled, call)):
            with syncbn.accumulate_statistics(net):
                for x in _batches():
                    run(x)
    assert compiled.norm.num_batches_tracked == 3
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    assert counters["stats"]["unique_graphs"] <= 2


class Checkpointed(nn.Module):
    """A region that is recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.region: Any = Block()

    def forward(self, x: Tensor) -> Tensor:
        contexts: Any = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}
        y: Tensor = checkpoint(self.region, x, **contexts)
        return y.square()


def _recomputed(rank: int) -> None:
    """Compile the caller and the callee of checkpoint()."""
    for compiles_region in (False, True):
        eager, other = Checkpointed(), Checkpointed()
        compiled = other.region if compiles_region else other
        compiled.compile(fullgraph=True, backend="aot_eager")
        for x in _batches(rank)[:2]:
            for net in (eager, other):
                net(x).sum().backward()
        assert other.region.norm.num_batches_tracked == 2
        torch.testing.assert_close(other.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)
        actual, expected = ([p.grad for p in net.parameters()] for net in (other, eager))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()


def test_recomputed_activations(pool: Pool) -> None:
    pool(2, "gloo").run(_recomputed)


def test_a_kernel_that_cannot_be_compiled_is_refused() -> None:
    layer = syncbn.SyncBatchNorm2d(2)
    layer.impl = "cpu"
    call = torch.compile(layer, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="which cannot follow it; 'auto' selects"):
        call(torch.randn(2, 2, 3, 3))
