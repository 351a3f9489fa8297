"""Rows of a Jacobian in one backward pass: ``torch.autograd.grad(is_grads_batched=True)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]

#: Returns whether a tensor holds the rows of ``is_grads_batched=True``, which torch batches by an
#: older vmap than `torch.func`'s.
is_batched = torch._C._functorch.is_legacy_batchedtensor


def over_rows(function: Callable[..., Gradients], *gradients: Tensor | None) -> Gradients:
    """Return the results of a function for all rows of batched gradients.

    ``torch.func.vmap`` replaces the older vmap, which has no rule for a sum over ranks: that would
    take an all-reduce a row.

    Args:
        function: takes the gradients of one row; its results may be None.
        gradients: arriving gradients, batched or the same for all rows; or None.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = tuple(0 if g is not None and is_batched(g) else None for g in gradients)
    plain = [
        g if g is None or dim is None else torch._remove_batch_dim(g, level, 0, dim)
        for g, dim in zip(gradients, dims, strict=True)
    ]
    present: list[bool] = []

    def without_none(*gradients: Tensor | None) -> Gradients:
        results = function(*gradients)
        present[:] = [result is not None for result in results]
        return tuple(result for result in results if result is not None)

    batched: Any = torch.func.vmap(without_none, in_dims=dims)(*plain)
    rows = iter(batched)
    return tuple(torch._add_batch_dim(next(rows), 0, level) if p else None for p in present)
