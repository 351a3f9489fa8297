"""Reference results: one process in float64 on the concatenated batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Compared tensors by name: y and dx of one rank; this rank's share of dweight and dbias; the
#: running statistics after one step.
Result = dict[str, Tensor]

MOMENTUM = 0.1
EPS = 1e-5
# The reference's rounding: 1e-12 of a mean of 1e4, times 1/sqrt(eps), summed over a channel.
_NOISE = 1e-6


@dataclass(frozen=True)
class Case:
    """A batch spread over ranks.

    Attributes:
        shapes: input shape on each rank, ``[N_r, C, *]``.
        dtype: dtype of input and gradient; parameters are float64 for float64, or float32.
        layout: "contiguous", "channels_last" or "strided" (neither).
        offset: mean of the values, in standard deviations.
        scale: standard deviation of the values.
        affine: True if the layer has weight and bias.
        seed: seed of the random values.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    offset: float = 0.0
    scale: float = 1.0
    affine: bool = True
    seed: int = field(default=0, kw_only=True)

    @property
    def channels(self) -> int:
        """C."""
        return self.shapes[0][1]

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Return the dtype of weight, bias and running statistics."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def batch(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """Return the input and the output gradient of a rank, in the dtype and layout of the case."""
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    shape = case.shapes[rank]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Channels differ in mean by a few standard deviations, as in a trained network.
    spread = torch.linspace(-1, 1, case.channels, dtype=torch.float64) if case.offset == 0 else 0
    centre = (torch.zeros(case.channels, dtype=torch.float64) + spread + case.offset) * case.scale
    x = noise * case.scale + centre.view(-1, *(1,) * (len(shape) - 2))
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    return _lay_out(x.to(case.dtype), case.layout), _lay_out(dy.to(case.dtype), case.layout)


def parameters(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias, the same on every rank."""
    if not case.affine:
        return None, None
    generator = torch.Generator().manual_seed(1000 * case.seed + 999)
    weight = torch.rand(case.channels, generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(case.channels, generator=generator, dtype=torch.float64)
    return weight.to(case.parameter_dtype), bias.to(case.parameter_dtype)


def expected(case: Case) -> list[Result]:
    """Return each rank's results, float64, by torch's batch norm on the concatenated batch.

    The offset is subtracted first, which is exact near it and changes the running mean alone:
    ``torch.nn.functional.batch_norm`` is off by 1e-11 at mean/std = 1e4 itself.
    """
    batches = [batch(case, rank) for rank in range(len(case.shapes))]
    offset = case.offset * case.scale
    x = (_concatenate([x for x, _ in batches]) - offset).requires_grad_()
    dy = _concatenate([dy for _, dy in batches])
    weight, bias = (None if p is None else p.double() for p in parameters(case))
    running_mean = torch.zeros(case.channels, dtype=torch.float64)
    running_var = torch.ones(case.channels, dtype=torch.float64)
    y = torch.nn.functional.batch_norm(
        x, running_mean, running_var, weight, bias, True, MOMENTUM, EPS
    )
    y.backward(dy)
    assert x.grad is not None
    xhat = torch.nn.functional.batch_norm(x.detach(), None, None, None, None, True, 0.0, EPS)
    results = []
    start = 0
    for shape in case.shapes:
        rows = slice(start, start := start + torch.Size(shape).numel() // case.channels)
        result = {
            "y": _restore(y.detach()[rows], shape),
            "dx": _restore(x.grad[rows], shape),
            "dweight": (dy[rows] * xhat[rows]).sum(0),
            "dbias": dy[rows].sum(0),
            "running_mean": running_mean + MOMENTUM * offset,
            "running_var": running_var,
        }
        results.append({name: value for name, value in result.items() if _has(case, name)})
    return results


def relative_errors(actual: Result, wanted: Result) -> dict[str, float]:
    """Return, for each quantity, the largest error over the largest value; zero without values.

    Where every true value is zero (the weight gradient of a constant channel) the reference itself
    holds only rounding noise, and the error is taken as it is.
    """
    errors = {}
    for name, value in wanted.items():
        if not value.numel():
            errors[name] = 0.0
            continue
        largest = value.abs().max().item()
        error = (actual[name].double() - value).abs().max().item()
        errors[name] = error / largest if largest > _NOISE else error
    return errors


def _has(case: Case, name: str) -> bool:
    return case.affine or name not in ("dweight", "dbias")


def _concatenate(parts: list[Tensor]) -> Tensor:
    """Return all values by channel, float64, shape ``[n, C]``."""
    return torch.cat([p.double().movedim(1, -1).reshape(-1, p.shape[1]) for p in parts])


def _restore(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo :func:`_concatenate` for one rank."""
    return values.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _lay_out(x: Tensor, layout: str) -> Tensor:
    match layout:
        case "contiguous":
            return x.contiguous()
        case "channels_last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        case "strided":
            wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
            return wide[..., ::2].copy_(x)
    raise ValueError(f"got layout {layout!r}; expected contiguous, channels_last or strided")
