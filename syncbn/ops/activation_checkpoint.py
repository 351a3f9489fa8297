"""Activation checkpointing: recomputed layers reuse the statistics of the forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]
#: Moments of a layer, and a description of its input.
SavedMoments = tuple[Tensor, str]


class CheckpointPhase(ABC):
    """The forward pass, or a recomputation, of a checkpointed region."""

    @abstractmethod
    def moments_for(
        self, compute: Callable[[], Tensor], x: Tensor, label: str
    ) -> tuple[Tensor, bool]:
        """Return the all-reduced moments of a layer, and whether they are new.

        Args:
            compute: function that computes and all-reduces the moments.
            x: input of the layer, shape ``[N, C, *]``.
            label: name of the layer in error messages.
        """


class _ForwardPhase(CheckpointPhase):
    """Saves the moments of the layers, in their order."""

    def __init__(self, saved: list[SavedMoments], outer: CheckpointPhase | None) -> None:
        self._saved, self._outer = saved, outer

    def moments_for(
        self, compute: Callable[[], Tensor], x: Tensor, label: str
    ) -> tuple[Tensor, bool]:
        if self._outer is None:
            result = compute(), True
        else:
            # Nested regions: the outer one may be recomputing.
            result = self._outer.moments_for(compute, x, label)
        self._saved.append((result[0], _describe(x)))
        return result


class _RecomputePhase(CheckpointPhase):
    """Returns the moments of the forward pass, in their order."""

    def __init__(self, saved: list[SavedMoments]) -> None:
        self._left = iter(saved)

    def moments_for(
        self, compute: Callable[[], Tensor], x: Tensor, label: str
    ) -> tuple[Tensor, bool]:
        moments, expected = next(self._left, (None, None))
        inputs = _describe(x)
        if moments is None or expected != inputs:
            there = "has ended" if expected is None else f"had one of {expected}"
            raise RuntimeError(
                f"{label}: got a synchronized layer of {inputs} in the recomputation of a "
                f"checkpointed region, where the forward pass {there}; expected the same layers in "
                "the same order: the region must not depend on state that changes in between"
            )
        return moments, False


def _describe(x: Tensor) -> str:
    """Return the channels and dtype of an input, which determine the format of its moments."""
    return f"{x.shape[1]} channels and {x.dtype} inputs"


_PHASE: ContextVar[CheckpointPhase | None] = ContextVar("syncbn_checkpoint_phase", default=None)


#: Returns the phase of this thread, or None outside of :func:`checkpoint_contexts`.
current = _PHASE.get


def checkpoint_contexts(context_fn: Callable[[], Contexts] | None = None) -> Contexts:
    """Make recomputed layers reuse the statistics of the forward pass.

    This is the ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint` with
    ``use_reentrant=False``. The recomputation then needs no all-reduce and does not update running
    statistics a second time; gradients are unchanged.

    In compiled code that calls ``checkpoint``, the recomputation repeats the all-reduce, without
    updating running statistics. A compiled module inside a checkpointed region runs eagerly.

    Args:
        context_fn: another ``context_fn`` to combine with, such as selective checkpointing.

    Returns:
        A context for the forward pass and a context for recomputations.

    Example::

        checkpoint(block, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)

        selective = partial(create_selective_checkpoint_contexts, policy)
        checkpoint(block, x, use_reentrant=False,
                   context_fn=partial(syncbn.checkpoint_contexts, selective))

    Reference:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    if torch.compiler.is_compiling():
        # The compiler accepts no contexts but modes.
        return _recompute_everything() if context_fn is None else context_fn()
    saved: list[SavedMoments] = []
    forward, recomputation = (None, None) if context_fn is None else context_fn()
    return (
        _PhaseContext(lambda: _ForwardPhase(saved, current()), forward),
        _PhaseContext(lambda: _RecomputePhase(saved), recomputation),
    )


def _recompute_everything() -> Contexts:
    recompute = CheckpointPolicy.PREFER_RECOMPUTE
    contexts: Contexts = create_selective_checkpoint_contexts(lambda *_, **__: recompute)
    return contexts


class _PhaseContext(AbstractContextManager[None]):
    """Sets the phase; reusable, since a retained graph is recomputed more than once."""

    def __init__(
        self, make: Callable[[], CheckpointPhase], other: AbstractContextManager[object] | None
    ) -> None:
        self._make, self._other = make, other
        self._exits: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            token = _PHASE.set(self._make())
            stack.callback(_PHASE.reset, token)
            # Compiled code cannot read the phase.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self._other is not None:
                stack.enter_context(self._other)
            self._exits.append(stack.pop_all())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._exits.pop().__exit__(kind, error, traceback)
