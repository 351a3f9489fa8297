"""Activation checkpointing: what a recomputation must not do again."""

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
#: The moments of a layer, and a description of its input.
Kept = tuple[Tensor, str]


class Pass(ABC):
    """A pass through a checkpointed region."""

    @abstractmethod
    def message(
        self, exchange: Callable[[], Tensor], inputs: str, label: str
    ) -> tuple[Tensor, bool]:
        """Return the moments of a layer's group, and whether they are new.

        Args:
            exchange: computes them, with the other ranks.
            inputs: channels and dtype of the layer's input, which determine the format of its
                moments.
            label: names the layer in error messages.
        """


class _Forward(Pass):
    """Keeps the moments of the layers it meets, in their order."""

    def __init__(self, kept: list[Kept], around: Pass | None) -> None:
        self._kept, self._around = kept, around

    def message(
        self, exchange: Callable[[], Tensor], inputs: str, label: str
    ) -> tuple[Tensor, bool]:
        if self._around is None:
            found = exchange(), True
        else:
            # A region within a region: the outer one may be recomputing.
            found = self._around.message(exchange, inputs, label)
        self._kept.append((found[0], inputs))
        return found


class _Recomputation(Pass):
    """Gives the moments of the forward pass, in their order."""

    def __init__(self, kept: list[Kept]) -> None:
        self._kept, self._left = kept, iter(kept)

    def message(
        self, exchange: Callable[[], Tensor], inputs: str, label: str
    ) -> tuple[Tensor, bool]:
        moments, kept = next(self._left, (None, None))
        if moments is None or kept != inputs:
            there = "has ended" if kept is None else f"had one of {kept}"
            raise RuntimeError(
                f"{label}: activations are recomputed, and here, at a synchronized layer of "
                f"{inputs}, the forward pass {there}; expected the same layers in the "
                "same order. If the region decides by something that has changed meanwhile, let "
                "it not"
            )
        return moments, False


_PASS: ContextVar[Pass | None] = ContextVar("syncbn_checkpoint_pass", default=None)


#: Returns the pass that this thread is in, or None if no region has our contexts.
current = _PASS.get


def checkpoint_contexts(context_fn: Callable[[], Contexts] | None = None) -> Contexts:
    """Let recomputed layers use the statistics of the forward pass.

    The ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`, which needs
    ``use_reentrant=False``. The recomputation then sends nothing and leaves the running averages
    alone; gradients are those without checkpointing. Without it, it would do both a second time.

    Where what calls ``checkpoint`` is compiled, the region is, too, and its recomputation sends its
    message again, but moves no averages. A compiled module within a region runs eagerly there.

    Args:
        context_fn: another one, to be used at the same time: that of selective checkpointing.

    Returns:
        A context for the forward pass, and one for each recomputation.

    Example::

        checkpoint(block, x, use_reentrant=False, context_fn=syncbn.checkpoint_contexts)

        selective = partial(create_selective_checkpoint_contexts, policy)
        checkpoint(block, x, use_reentrant=False,
                   context_fn=partial(syncbn.checkpoint_contexts, selective))

    Reference:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    if torch.compiler.is_compiling():
        # Modes are all that a compiler takes here.
        return _recompute_everything() if context_fn is None else context_fn()
    kept: list[Kept] = []
    forward, recomputation = (None, None) if context_fn is None else context_fn()
    return (
        _During(lambda: _Forward(kept, current()), forward),
        _During(lambda: _Recomputation(kept), recomputation),
    )


def _recompute_everything() -> Contexts:
    recompute = CheckpointPolicy.PREFER_RECOMPUTE
    found: Contexts = create_selective_checkpoint_contexts(lambda *_, **__: recompute)
    return found


class _During(AbstractContextManager[None]):
    """Sets the pass; may be entered again after it was left, as retained graphs ask for."""

    def __init__(
        self, make: Callable[[], Pass], other: AbstractContextManager[object] | None
    ) -> None:
        self._make, self._other = make, other
        self._exits: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            token = _PASS.set(self._make())
            stack.callback(_PASS.reset, token)
            # Compiled code would not see which pass it is in.
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
