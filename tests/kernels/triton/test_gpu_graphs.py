"""All-reduces and CUDA graphs on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn.bench.networks import resnet20, training_step
from syncbn.bench.timing import capture_graph
from tests.kernels.triton.gpu import (
    CUDA,
    MARKS,
    Layer,
    check_synchronization,
    communicate,
    make_layer,
    make_step,
)

pytestmark = MARKS
BACKENDS = ["nccl", "gloo"]


@pytest.fixture(params=BACKENDS)
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """Return a group of one rank; layers skip the all-reduces of such a group."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(request.param, store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


# Gloo copies payloads to the host.
@pytest.mark.parametrize("group", ["nccl"], indirect=True)
@pytest.mark.parametrize("residual", [False, True])
def test_all_reduces_do_not_synchronize(group: dist.ProcessGroup, residual: bool) -> None:
    layer, x, dy = make_layer()
    check_synchronization(make_step(layer, x, dy, residual, communicate(layer, group)))


@pytest.mark.parametrize("residual", [False, True])
def test_all_reduces_over_one_rank_change_nothing(group: dist.ProcessGroup, residual: bool) -> None:
    layer, x, dy = make_layer()
    expected = make_step(layer, x, dy, residual)()
    actual = make_step(layer, x, dy, residual, communicate(layer, group))()
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("samples", [64, 0])
def test_a_graph_is_captured_and_replayed(samples: int, residual: bool) -> None:
    replay_and_compare(*make_layer(samples), residual)


@pytest.mark.parametrize("group", ["nccl"], indirect=True)
def test_all_reduces_are_captured_and_replayed(group: dist.ProcessGroup) -> None:
    """NCCL moves nothing for one rank: the graph captures the synchronization of streams."""
    layer, x, dy = make_layer(64)
    replay_and_compare(layer, x, dy, True, communicate(layer, group))


def replay_and_compare(
    layer: syncbn.SyncBatchNorm,
    x: Tensor,
    dy: Tensor,
    residual: bool,
    forward: Layer | None = None,
) -> None:
    """Capture a step, and replay it with other values."""
    run = make_step(layer, x, dy, residual, forward)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        layer.load_state_dict(before)
        graph.replay()
        replayed = [t.clone() for t in outputs]
        statistics = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.load_state_dict(before)
        for actual, expected in zip(replayed, run(), strict=True):
            assert torch.equal(actual, expected)
        for name, expected in layer.state_dict().items():
            assert torch.equal(statistics[name], expected)


def test_training_steps_are_captured_and_replayed() -> None:
    """Of a fused network: graphs help where launch overhead dominates."""
    torch.manual_seed(0)
    network = resnet20().to(CUDA, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(8, 3, 32, 32, device=CUDA)

    def train(wrap: Callable[[Callable[[], None]], Callable[[], None]], steps: int) -> list[Tensor]:
        model = syncbn.convert_sync_batchnorm(copy.deepcopy(network))
        syncbn.fuse(model)
        run = wrap(training_step(model, images))
        for _ in range(steps):
            run()
        return list(model.state_dict().values())

    expected = train(lambda step: step, 5)
    # Capturing runs two warm-up steps, and does not run the captured one.
    for actual, value in zip(train(capture_graph, 3), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-3)
