"""Float64 inputs far from zero, where raw float64 sums lose the variance.

The values are a mean plus small multiples of 2^-20. Subtracting the mean is exact then, and batch
norm does not depend on it: torch.nn.functional.batch_norm of the values around zero is exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.inference import prior_mix
from syncbn.kernels import REFERENCE
from syncbn.kernels.base import Kernel, NormalizeArgs, RunningStats
from tests.kernel_cases import EPS, needs_cpp
from tests.ranks import Ranks

# Torch raises it while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")

C = 3
# Samples on each of three ranks; two ranks take the last two.
SAMPLES = (1, 7, 2)
# Half a unit in the last place of the mean is 9e-13 and 6e-11 standard deviations.
BOUNDS = {0.0: 1e-14, 1e4: 1e-12, 1e6: 1e-10}
offsets = pytest.mark.parametrize("offset", BOUNDS)


class Batch(NamedTuple):
    """An input around zero, and the gradient of the output."""

    noise: Tensor
    dy: Tensor


class Expected(NamedTuple):
    """The output, the input gradient, and running averages of momentum 1."""

    y: Tensor
    dx: Tensor
    mean: Tensor
    var: Tensor


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


def expected(batches: list[Batch], offset: float) -> list[Expected]:
    """Return the results of every rank, from one process and values around zero."""
    noise = torch.cat([part.noise for part in batches]).requires_grad_()
    mean, var = torch.zeros(C).double(), torch.ones(C).double()
    y = F.batch_norm(noise, mean, var, None, None, True, 1.0, EPS)
    y.backward(torch.cat([part.dy for part in batches]))
    assert noise.grad is not None
    sizes = [len(part.noise) for part in batches]
    parts = zip(y.detach().split(sizes), noise.grad.split(sizes), strict=True)
    return [Expected(*part, mean + offset, var) for part in parts]


def check(found: tuple[Any, ...], wanted: Expected, offset: float) -> None:
    """Compare in standard deviations, which are about one; variances by their relative error."""
    bound = BOUNDS[offset]
    for actual, value in zip(found, wanted, strict=True):
        assert ((actual - value).abs() <= bound * value.abs().clamp(min=1)).all()


def run_kernel(kernel: Kernel, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Return the results of a kernel's four steps."""
    mean, var = torch.zeros(C).double(), torch.ones(C).double()
    args = NormalizeArgs(EPS, running=RunningStats(mean, var, None, 1.0))
    y, saved = kernel.normalize(x, kernel.moments(x), args)
    reduced = kernel.backward_reduce(dy, saved, (True, False, False, False))
    return y, kernel.backward_elemt(saved, reduced, reduced.sums), mean, var


def run_local(kernel: Kernel, x: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the results of a kernel on a single rank."""
    mean, var = torch.zeros(C).double(), torch.ones(C).double()
    args = NormalizeArgs(EPS, running=RunningStats(mean, var, None, 1.0))
    y, saved = kernel.forward_local(x, args)
    dx = kernel.backward_local(dy, saved, (True, False, False, False))[0]
    return y, dx, mean, var


def check_kernel(kernel: Kernel, layout: str) -> None:
    """Compare a kernel, in the local and in the separate form."""
    for offset in BOUNDS:
        part = batch(0, 9, layout)
        x, [wanted] = far(part.noise, offset), expected([part], offset)
        check(run_kernel(kernel, x, part.dy), wanted, offset)
        check(run_local(kernel, x, part.dy), wanted, offset)


layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@layouts
def test_reference_kernel(layout: str) -> None:
    """The output was off by 2e-8 at mean/std = 1e4, by 2e-4 at 1e6."""
    check_kernel(REFERENCE, layout)


@needs_cpp
@layouts
def test_cpp_kernels(kernel: Kernel, layout: str) -> None:
    """Fused multiplications and additions may not change the error of a product."""
    check_kernel(kernel, layout)


def test_inductor_does_not_reassociate() -> None:
    """Two-part sums are lost if a compiler simplifies (a + b) - a."""
    part = batch(0, 9)
    for offset in BOUNDS:
        layer = syncbn.SyncBatchNorm2d(C, EPS, 1.0, affine=False, dtype=torch.float64)
        found = _step(torch.compile(layer, fullgraph=True), layer, far(part.noise, offset), part.dy)
        torch._dynamo.reset()
        check(found, expected([part], offset)[0], offset)


def _step(call: Any, layer: nn.Module, x: Tensor, dy: Tensor, **more: Any) -> tuple[Tensor, ...]:
    x = x.requires_grad_()
    y = call(x, **more)
    y.backward(dy)
    assert x.grad is not None
    buffers = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    return y.detach(), x.grad, *buffers


def _layer(way: str) -> tuple[Any, nn.Module]:
    layer = syncbn.SyncBatchNorm2d(C, EPS, 1.0, affine=False, dtype=torch.float64)
    match way:
        case "compiled":
            return torch.compile(layer, fullgraph=True), layer
        case "recomputed":
            contexts: Any = {"use_reentrant": False, "context_fn": syncbn.checkpoint_contexts}
            return lambda x: checkpoint(layer, x, **contexts), layer
        case _:
            layer.impl = way
    return layer, layer


def _on_a_rank(rank: int, size: int, way: str, offset: float) -> tuple[Tensor, ...]:
    part = batch(rank, SAMPLES[-size:][rank])
    call, layer = _layer(way)
    found = _step(call, layer, far(part.noise, offset), part.dy)
    torch._dynamo.reset()
    return found


@offsets
@pytest.mark.parametrize("way", ["auto", "reference", "compiled", "recomputed"])
def test_over_ranks(ranks: Ranks, way: str, offset: float) -> None:
    """The first step, with another mean on every rank: no pivot is known to all of them."""
    batches = [batch(rank, samples) for rank, samples in enumerate(SAMPLES[-ranks.size :])]
    found = ranks.run(_on_a_rank, ranks.size, way, offset)
    for results, wanted in zip(found, expected(batches, offset), strict=True):
        check(results, wanted, offset)


def _masked(rank: int, offset: float) -> tuple[Tensor, ...]:
    part, mask = batch(rank, 4), torch.ones(4, 5, 7, dtype=torch.bool)
    mask[0, :, rank:] = False
    call, layer = _layer("auto")
    x = far(part.noise, offset).where(mask.unsqueeze(1), torch.nan)
    return mask, *_step(call, layer, x, part.dy, mask=mask)


def _counted(t: Tensor, mask: Tensor) -> Tensor:
    return t.movedim(1, -1)[mask]


@offsets
def test_masks(two_ranks: Ranks, offset: float) -> None:
    """The moments of a masked input are around its filling before they are raw."""
    found = two_ranks.run(_masked, offset)
    parts = [
        Batch(*(_counted(t, mask) for t in batch(rank, 4))) for rank, (mask, *_) in enumerate(found)
    ]
    for (mask, y, dx, *averages), wanted in zip(found, expected(parts, offset), strict=True):
        check((_counted(y, mask), _counted(dx, mask), *averages), wanted, offset)


def _accumulated(rank: int, offset: float) -> tuple[Tensor, ...]:
    call, layer = _layer("auto")
    with syncbn.accumulate_statistics(layer):
        for samples in (3, 0, 5):
            call(far(batch(10 * rank + samples, samples).noise, offset))
    return layer.get_buffer("running_mean"), layer.get_buffer("running_var")


@offsets
def test_accumulated_statistics(two_ranks: Ranks, offset: float) -> None:
    batches = [batch(10 * rank + samples, samples) for rank in range(2) for samples in (3, 5)]
    wanted = expected(batches, offset)[0]
    for averages in two_ranks.run(_accumulated, offset):
        check((wanted.y, wanted.dx, *averages), wanted, offset)


@offsets
@pytest.mark.parametrize("method", ["lockstep", "sequential", "pooled"])
def test_recalibration(method: Any, offset: float) -> None:
    """The variance was off by 1e-16 (mean / std)^2, whatever the old running mean."""
    parts = [batch(rank, samples) for rank, samples in enumerate((1, 7, 2))]
    model = nn.Sequential(nn.BatchNorm2d(C, dtype=torch.float64))
    syncbn.recalibrate(model, [far(part.noise, offset) for part in parts], method=method)
    wanted = expected(parts, offset)[0]
    averages = model[0].get_buffer("running_mean"), model[0].get_buffer("running_var")
    check((wanted.y, wanted.dx, *averages), wanted, offset)


@offsets
def test_prior_mix(offset: float) -> None:
    """With pseudo_samples = 0 it is the normalization of training."""
    part = batch(0, 6)
    model = nn.Sequential(nn.BatchNorm2d(C, EPS, dtype=torch.float64)).eval()
    with prior_mix(model, pseudo_samples=0), torch.no_grad():
        y = model(far(part.noise, offset))
    wanted = expected([part], offset)[0]
    check((y, *wanted[1:]), wanted, offset)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@offsets
@pytest.mark.parametrize("derive", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_derivatives(derive: Any, offset: float) -> None:
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

    found, wanted = derive(loss)(far(noise, offset)), derive(plain)(noise)
    assert (found - wanted).abs().max() <= 10 * BOUNDS[offset] * wanted.abs().max()
