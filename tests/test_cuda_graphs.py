"""Messages and CUDA graphs on a GPU."""

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
from tests.gpu import CUDA, MARKS, Layer, case, step, talking

pytestmark = MARKS
BACKENDS = ["nccl", "gloo"]


@pytest.fixture(params=BACKENDS)
def group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """Return a group of one that is talked to, which layers do not do."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(request.param, store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


# Gloo copies messages to the host.
@pytest.mark.parametrize("group", ["nccl"], indirect=True)
@pytest.mark.parametrize("residual", [False, True])
def test_no_message_waits_for_the_device(group: dist.ProcessGroup, residual: bool) -> None:
    layer, x, dy = case()
    run = step(layer, x, dy, residual, talking(layer, group))
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("residual", [False, True])
def test_messages_of_a_group_of_one_change_nothing(
    group: dist.ProcessGroup, residual: bool
) -> None:
    layer, x, dy = case()
    wanted = step(layer, x, dy, residual)()
    found = step(layer, x, dy, residual, talking(layer, group))()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("samples", [64, 0])
def test_a_graph_is_captured_and_replayed(samples: int, residual: bool) -> None:
    replay_and_compare(*case(samples), residual)


@pytest.mark.parametrize("group", ["nccl"], indirect=True)
def test_messages_are_captured_and_replayed(group: dist.ProcessGroup) -> None:
    """Those of a group of one move nothing over NCCL: what is captured is how streams meet."""
    layer, x, dy = case(64)
    replay_and_compare(layer, x, dy, True, talking(layer, group))


def replay_and_compare(
    layer: syncbn.SyncBatchNorm,
    x: Tensor,
    dy: Tensor,
    residual: bool,
    forward: Layer | None = None,
) -> None:
    """Capture a step, and replay it with other values."""
    run = step(layer, x, dy, residual, forward)
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
        averages = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.load_state_dict(before)
        for found, wanted in zip(replayed, run(), strict=True):
            assert torch.equal(found, wanted)
        for name, wanted in layer.state_dict().items():
            assert torch.equal(averages[name], wanted)


def test_training_steps_are_captured_and_replayed() -> None:
    """Of a whole network, fused: where the host is slower than the GPU, this is what to do."""
    torch.manual_seed(0)
    network = resnet20().to(CUDA, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(8, 3, 32, 32, device=CUDA)

    def trained(by: Callable[[Callable[[], None]], Callable[[], None]], steps: int) -> list[Tensor]:
        ours = syncbn.convert_sync_batchnorm(copy.deepcopy(network))
        syncbn.fuse(ours)
        step = by(training_step(ours, images))
        for _ in range(steps):
            step()
        return list(ours.state_dict().values())

    wanted = trained(lambda step: step, 5)
    # Two steps warm up, and what is captured does not run.
    for found, value in zip(trained(capture_graph, 3), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-3)
