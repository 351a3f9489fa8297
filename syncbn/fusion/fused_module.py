"""Modules with a rewritten forward, and the record that restores them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import nn

from syncbn.nn.module import SyncBatchNorm


class FusedModule(nn.Module):
    """Base of modules with a rewritten forward."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"got a {type(self).__name__} to pickle; expected a module that is not fused: call "
            "undo() of the result of syncbn.fuse(), or save the state_dict(), which is equal"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        base: Any = super()
        if hasattr(base, "__deepcopy__"):
            return base.__deepcopy__(memo)
        make, arguments, state, *_ = base.__reduce_ex__(4)
        clone = memo[id(self)] = make(*arguments)
        clone.__setstate__(copy.deepcopy(state, memo))
        return clone


@dataclass
class Fusion:
    """Result of :func:`syncbn.fuse`.

    Attributes:
        fused: operations moved into a layer, "relu" or "residual, relu", by name of the layer.
        skipped: reason why a forward cannot be rewritten, by name of the module.
    """

    fused: dict[str, str]
    skipped: dict[str, str]
    _layers: list[SyncBatchNorm] = field(repr=False)
    # Original class and fused class of each module.
    _classes: dict[nn.Module, tuple[type[nn.Module], type[nn.Module]]] = field(repr=False)

    def undo(self) -> None:
        """Restore the layers and classes of the model; a second call has no effect.

        Raises:
            RuntimeError: the class of a module changed after the fusion (``fully_shard``, a
                parametrization). Undo that change first; the model is unmodified.
        """
        for module, (_, fused) in self._classes.items():
            if type(module) is not fused:
                raise RuntimeError(
                    f"got a {type(module).__name__} to undo; expected a {fused.__name__}, the "
                    "class set by syncbn.fuse(): first undo the later change of the class"
                )
        for module, (original, _) in self._classes.items():
            module.__class__ = original
        for layer in self._layers:
            layer._syncbn_activation = None
        self._classes.clear()
        self._layers.clear()
        self.fused.clear()
