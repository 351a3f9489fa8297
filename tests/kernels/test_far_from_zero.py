"""Float64 inputs far from zero, where raw float64 sums lose the variance.

The values are a mean plus small multiples of 2^-20. Subtracting the mean is exact then, and batch
norm does not depend on it: torch.nn.functional.batch_norm of the values around zero is exact.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.inference import prior_mix
from syncbn.kernels.base import Kernel, NormalizeArgs, RunningStats
from tests.kernel_cases import EPS, dtypes_of
from tests.ranks import Pool

# Torch raises it while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

C = 3
# Samples on each of three ranks.
SAMPLES = (1, 7, 2)
# Half a unit in the last place of the mean is 9e-13 and 6e-11 standard deviations.
BOUNDS = {0.0: 1e-14, 1e4: 1e-12, 1e6: 1e-10}


offsets = pytest.mark.parametrize("offset", [1e4, 1e6])


class Batch(NamedTuple):
    """An input around zero, and the gradient of the output."""

    noise: Tensor
    dy: Tensor


def batch(rank: int, samples: int, layout: str = "contiguous") -> Batch:
    """Return the batch of a rank, ``[samples, C, 5, 7]``."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2, samples, C, 5, 7)
    noise, dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = noise.mul(2**20).round().div(2**20)
    dy = dy + 0.3
    if layout == "channels_last":
        noise, dy = (t.contiguous(memory_format=torch.channels_last) for t in (noise, dy))
    return Batch(noise, dy)


def far(noise: Tensor, offset: float) -> Tensor:
    """Return values around an offset, without rounding."""
    x = noise + offset
    assert torch.equal(x - offset, noise)
    return x


def expect(batches: list[Batch], offset: float) -> list[tuple[Tensor, ...]]:
    """Return output, input gradient and running averages of momentum 1 of every rank.

    One process computes them from values around zero.
    """
    noise = torch.cat([part.noise for part in batches]).requires_grad_()
    mean, var = torch.zeros(C).double(), torch.ones(C).double()
    y = F.batch_norm(noise, mean, var, None, None, True, 1.0, EPS)
    y.backward(torch.cat([part.dy for part in batches]))
    assert noise.grad is not None
    sizes = [len(part.noise) for part in batches]
    parts = zip(y.detach().split(sizes), noise.grad.split(sizes), strict=True)
    return [(*part, mean + offset, var) for part in parts]


def check(actual: tuple[Any, ...], expected: tuple[Tensor, ...], offset: float) -> None:
    """Compare in standard deviations, which are about one; variances by their relative error."""
    for value, limit in zip(actual, expected, strict=True):
        assert ((value - limit).abs() <= BOUNDS[offset] * limit.abs().clamp(min=1)).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernels(any_kernel: Kernel, layout: str) -> None:
    """The output was off by 2e-8 at mean/std = 1e4, by 2e-4 at 1e6.

    Fused multiplications and additions of C++ may not change the error of a product.
    """
    if torch.float64 not in dtypes_of(any_kernel):
        return
    for offset in BOUNDS:
        part = batch(0, 9, layout)
        x, [expected] = far(part.noise, offset), expect([part], offset)
        mask = True, False, False, False
        for is_local in (False, True):
            mean, var = torch.zeros(C).double(), torch.ones(C).double()
            args = NormalizeArgs(EPS, running=RunningStats(mean, var, None, 1.0))
            if is_local:
                y, saved = any_kernel.forward_local(x, args)
                dx = any_kernel.backward_local(part.dy, saved, mask)[0]
            else:
                y, saved = any_kernel.normalize(x, any_kernel.moments(x), args)
                reduced = any_kernel.backward_reduce(part.dy, saved, mask)
                dx = any_kernel.backward_elemt(saved, reduced, reduced.sums)
            check((y, dx, mean, var), expected, offset)


def _layer() -> Any:
    return syncbn.SyncBatchNorm2d(C, EPS, 1.0, affine=False, dtype=torch.float64)


def _step(call: Any, layer: nn.Module, x: Tensor, dy: Tensor, **more: Any) -> tuple[Tensor, ...]:
    x = x.requires_grad_()
    y = call(x, **more)
    y.backward(dy)
    assert x.grad is not None
    buffers = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    return y.detach(), x.grad, *(t.clone() for t in buffers)


def test_inductor_does_not_reassociate() -> None:
    """Two-part sums are lost if a compiler simplifies (a + b) - a."""
    part, layer = batch(0, 9), _layer()
    call = torch.compile(layer, fullgraph=True)
    for offset in BOUNDS:
        actual = _step(call, layer, far(part.noise, offset), part.dy)
        check(actual, expect([part], offset)[0], offset)
    torch._dynamo.reset()


def _make_calls() -> dict[str, tuple[Any, Any]]:
    """Return layers, and the functions that call them."""
    layers: dict[str, Any] = {name: _layer() for name in ("auto", "reference", "compiled", "again")}
    calls: dict[str, Any] = dict(layers)
    layers["reference"].impl = "reference"
    calls["compiled"] = torch.compile(layers["compiled"], fullgraph=True, backend="aot_eager")
    contexts: Any = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}
    calls["again"] = partial(checkpoint, layers["again"], **contexts)
    return {name: (calls[name], layers[name]) for name in layers}


def _over_ranks(rank: int) -> list[list[tuple[Tensor, ...]]]:
    part, calls = batch(rank, SAMPLES[rank]), _make_calls().values()
    results = [
        [_step(*pair, far(part.noise, offset), part.dy) for pair in calls] for offset in BOUNDS
    ]
    torch._dynamo.reset()
    return results


def test_over_ranks(pool: Pool) -> None:
    """The ranks have other means: no pivot is known to all of them."""
    batches = [batch(rank, samples) for rank, samples in enumerate(SAMPLES)]
    for of_rank, *expected in zip(
        pool(3, "gloo").run(_over_ranks), *(expect(batches, o) for o in BOUNDS), strict=True
    ):
        for offset, results, wanted in zip(BOUNDS, of_rank, expected, strict=True):
            for actual in results:
                check(actual, wanted, offset)


def _masked(rank: int, offset: float) -> tuple[Tensor, ...]:
    part, mask, layer = batch(rank, 4), torch.ones(4, 5, 7, dtype=torch.bool), _layer()
    mask[0, :, rank:] = False
    x = far(part.noise, offset).where(mask.unsqueeze(1), torch.nan)
    return mask, *_step(layer, layer, x, part.dy, mask=mask)


def _select(t: Tensor, mask: Tensor) -> Tensor:
    return t.movedim(1, -1)[mask]


@offsets
def test_masks(pool: Pool, offset: float) -> None:
    """The moments of a masked input are around its filling before they are raw."""
    answers = pool(2, "gloo").run(_masked, offset)
    parts = [Batch(*(_select(t, a[0]) for t in batch(i, 4))) for i, a in enumerate(answers)]
    for (mask, y, dx, *buffers), expected in zip(answers, expect(parts, offset), strict=True):
        check((_select(y, mask), _select(dx, mask), *buffers), expected, offset)


def _accumulated(rank: int, offset: float) -> tuple[Tensor, ...]:
    layer = _layer()
    with syncbn.accumulate_statistics(layer):
        for samples in (3, 0, 5):
            layer(far(batch(10 * rank + samples, samples).noise, offset))
    return layer.running_mean, layer.running_var


@offsets
def test_accumulated_statistics(pool: Pool, offset: float) -> None:
    batches = [batch(10 * rank + samples, samples) for rank in range(2) for samples in (3, 5)]
    for buffers in pool(2, "gloo").run(_accumulated, offset):
        check(buffers, expect(batches, offset)[0][2:], offset)


@pytest.mark.parametrize("method", ["lockstep", "sequential", "pooled"])
def test_recalibration(method: Any) -> None:
    """The variance was off by 1e-16 (mean / std)^2, whatever the old running mean."""
    parts = [batch(rank, samples) for rank, samples in enumerate(SAMPLES)]
    for offset in BOUNDS:
        model = nn.Sequential(nn.BatchNorm2d(C, dtype=torch.float64))
        syncbn.recalibrate(model, [far(part.noise, offset) for part in parts], method=method)
        buffers = model[0].get_buffer("running_mean"), model[0].get_buffer("running_var")
        check(buffers, expect(parts, offset)[0][2:], offset)


def test_prior_mix() -> None:
    """With pseudo_samples = 0 it is the normalization of training."""
    part = batch(0, 6)
    model = nn.Sequential(nn.BatchNorm2d(C, EPS, dtype=torch.float64)).eval()
    for offset in BOUNDS:
        with prior_mix(model, pseudo_samples=0), torch.no_grad():
            y = model(far(part.noise, offset))
        check((y,), expect([part], offset)[0][:1], offset)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("derive", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_derivatives(derive: Any) -> None:
    """Autograd differentiates through the rounding errors of sums and products."""
    noise = batch(0, 2).noise[..., 0, :2]
    layer = syncbn.SyncBatchNorm(C, affine=False, track_running_stats=False)

    def loss(x: Tensor) -> Tensor:
        y = layer(x)
        total: Tensor = (y.flatten() * torch.arange(y.numel()).cos()).sum()
        return total.square()

    def plain(x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2), keepdim=True)
        y = centred * (centred.square().mean((0, 2), keepdim=True) + EPS).rsqrt()
        return (y.flatten() * torch.arange(y.numel()).cos()).sum().square()

    expected = derive(plain)(noise)
    for offset, bound in BOUNDS.items():
        actual = derive(loss)(far(noise, offset))
        assert (actual - expected).abs().max() <= 10 * bound * expected.abs().max()
