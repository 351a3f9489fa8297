"""PyTorch's model wrappers and transformations with synchronized layers inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import onnx.reference
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.inference import prior_mix
from tests.device import seeded
from tests.ranks import Pool, Ranks

STEPS, SAMPLES = 3, 12


class Net(nn.Module):
    """Linear layers with batch norm between them, and a layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None))
        self.unused: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


def batch(step: int) -> Tensor:
    """Return the whole batch of a step, which two and three ranks can share equally."""
    return torch.randn(SAMPLES, 5, generator=seeded(step)).double()


def train(model: nn.Module, micro_batches: int = 1) -> None:
    """Take some steps on this rank's share of each batch, or on the whole in one process."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dtype = next(model.parameters()).dtype
    for step in range(STEPS):
        optimizer.zero_grad()
        for part, x in enumerate(batch(step).to(dtype).chunk(micro_batches)):
            loss = model(x.chunk(size)[rank]).square().sum(1).mean()
            if part < micro_batches - 1 and isinstance(model, DistributedDataParallel):
                with model.no_sync():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()


def state(net: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers, without unused ones."""
    content = {name: t.detach() for name, t in net.state_dict().items() if "unused" not in name}
    return {
        name: t.full_tensor() if isinstance(t, DTensor) else t.clone()
        for name, t in content.items()
    }


# Options of DDP, and micro-batches per step.
DDP_OPTIONS: list[tuple[dict[str, Any], int]] = [
    *(({"broadcast_buffers": True}, 1), ({"static_graph": True}, 1)),
    *(({"find_unused_parameters": True}, 1), ({"broadcast_buffers": False}, 2)),
    ({"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-5}, 1),
]


def _data_parallel(rank: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    states = []
    for options, micro_batches in DDP_OPTIONS:
        net = syncbn.convert_sync_batchnorm(Net().to(dtype))
        if options.get("find_unused_parameters"):
            net.unused = nn.Linear(2, 2)
        # DDP leaves buffers unchanged only if no_sync() is around forward passes, too; it is not.
        train(DistributedDataParallel(net, **options), micro_batches)
        states.append(state(net))
    return states


@pytest.mark.layers
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_data_parallel(two_ranks: Ranks, dtype: torch.dtype, bound: float) -> None:
    answers = two_ranks.run(_data_parallel, dtype)
    for i, (_, micro_batches) in enumerate(DDP_OPTIONS):
        single = Net().to(dtype)
        train(single, micro_batches)
        for states in answers:
            torch.testing.assert_close(states[i], state(single), rtol=bound, atol=bound)


def _sharded(rank: int) -> dict[str, Tensor]:
    net = syncbn.convert_sync_batchnorm(Net().double())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (net.body, net.head, net):
        fully_shard(module, mesh=mesh)
    train(net)
    return state(net)


def test_fully_sharded(three_ranks: Ranks) -> None:
    single = Net().double()
    train(single)
    for actual in three_ranks.run(_sharded):
        torch.testing.assert_close(actual, state(single), rtol=1e-10, atol=1e-12)


def run_stages(net: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """Train; return the first output, in evaluation, with a rule, and after recalibration."""
    outputs = [net(x) for x in batches]
    torch.stack([y.square().mean() for y in outputs]).sum().backward()
    net.eval()
    with torch.no_grad(), prior_mix(net, 4):
        with_rule = net(batches[0])
    with torch.no_grad():
        evaluated = net(batches[0])
        syncbn.recalibrate(net, batches)
        return [outputs[0].detach(), evaluated, with_rule, net(batches[0])]


def _mixed_precision(
    rank: int, dtype: torch.dtype
) -> tuple[list[torch.dtype], dict[str, Tensor], list[Tensor]]:
    net = syncbn.convert_sync_batchnorm(Net())
    dtypes: list[torch.dtype] = []
    net.body[1].register_forward_pre_hook(
        lambda layer, args: dtypes.extend([args[0].dtype, layer.weight.dtype])
    )
    policy = MixedPrecisionPolicy(dtype, torch.float32, output_dtype=torch.float32)
    for module in (net.body, net.head, net) if dtype is torch.bfloat16 else (net,):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    outputs = run_stages(net, [batch(step).float().chunk(2)[rank] for step in range(STEPS)])
    return dtypes, state(net), outputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fully_sharded_in_mixed_precision(pool: Pool, dtype: torch.dtype) -> None:
    """The layers compute in the half type, with float32 running statistics of the whole batch.

    Regression: such layers trained, and raised in evaluation.
    """
    single = Net()
    expected = run_stages(single, [batch(step).float() for step in range(STEPS)])
    dtypes, states, outputs = zip(*pool(2, "gloo").run(_mixed_precision, dtype), strict=True)
    assert all({*seen} == {dtype} for seen in dtypes)
    actual = [torch.cat(parts) for parts in zip(*outputs, strict=True)]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.06)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    torch.testing.assert_close(states[0], state(single), rtol=0.02, atol=0.02)


def _distributed_tensors(rank: int) -> list[str]:
    layer, mesh = syncbn.SyncBatchNorm1d(5), init_device_mesh("cpu", (2,))
    x = torch.randn(4, 5)
    rows = distribute_tensor(x, mesh, [Shard(0)])
    replicated = distribute_module(copy.deepcopy(layer), mesh)
    assert isinstance(replicated.weight, DTensor)
    assert replicated.weight.placements == (Replicate(),)
    calls: list[Callable[[], Tensor]] = [
        partial(layer, rows),
        partial(layer.eval(), rows),
        partial(syncbn.sync_batch_norm, rows, None, None, training=True),
        partial(replicated, x),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError, match="got a DTensor") as caught:
            call()
        messages.append(str(caught.value))
    # The remedy in the message.
    y = layer.train()(rows.to_local())
    torch.testing.assert_close(y, nn.BatchNorm1d(5)(rows.full_tensor()).chunk(2)[rank])
    return messages


def test_distributed_tensors_are_refused(pool: Pool) -> None:
    for *inputs, weight in pool(2, "gloo").run(_distributed_tensors):
        assert all("pass x.to_local()" in message for message in inputs)
        assert "as running_mean; expected a plain tensor with all channels on every rank" in weight


@pytest.mark.parametrize("fused", [False, True])
def test_export_of_a_model_in_evaluation(fused: bool) -> None:
    net = syncbn.convert_sync_batchnorm(Net())
    net(torch.randn(8, 5))
    if fused:
        assert syncbn.fuse(net.eval()).fused == {"body.1": "relu"}
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(net.eval(), (torch.randn(3, 5),), dynamic_shapes=dynamic)
    x = torch.randn(7, 5)
    torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns about its own calls
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_of_a_reverted_model() -> None:
    net = syncbn.convert_sync_batchnorm(Net())
    net(torch.randn(8, 5))
    syncbn.revert_sync_batchnorm(net.eval())
    x = torch.randn(3, 5)
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    assert program is not None
    model = program.model_proto
    (y,) = onnx.reference.ReferenceEvaluator(model).run(
        None, {model.graph.input[0].name: x.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(y), net(x))
