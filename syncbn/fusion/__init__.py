"""ReLUs and residuals of whole models, moved into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from syncbn.fusion.rewrite import Rewriting
from syncbn.nn.module import SyncBatchNorm


@dataclass
class Fusion:
    """What :func:`fuse` has done to a model.

    Attributes:
        fused: by the name of a layer: "relu", or "residual, relu".
        skipped: by the name of a module whose forward could not be read: why.
    """

    fused: dict[str, str]
    skipped: dict[str, str]
    _layers: list[SyncBatchNorm] = field(repr=False)
    # Each with its class before, and since.
    _modules: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = field(repr=False)

    def undo(self) -> None:
        """Give layers and modules back what they were; a second time does nothing.

        Raises:
            RuntimeError: a module has become of another class since (``fully_shard``, a
                parametrization), which has to be undone first; nothing is changed.
        """
        for module, _, since in self._modules:
            if type(module) is not since:
                raise RuntimeError(
                    f"got a {type(module).__name__} to undo; expected a {since.__name__}, as "
                    "syncbn.fuse() has left it: first undo what has changed its class since"
                )
        for module, before, _ in self._modules:
            module.__class__ = before
        for layer in self._layers:
            layer._syncbn_activation = None
        self._modules.clear()
        self._layers.clear()
        self.fused.clear()


def fuse(model: nn.Module) -> Fusion:
    """Let synchronized layers add the residual and apply the ReLU that follow them, in place.

    ``relu(bn(x))`` and ``relu(bn(x) + residual)`` become one pass over the memory, forward and
    backward, and nothing is kept for the ReLU. Such places are found in the forward of any module,
    also where the layer is the last one of a child (a ``Sequential``, a block). Only these modules
    get another forward: they keep their identity, children and hooks, and a ``state_dict`` stays
    as it is.

    Rewritten are forwards that call children and functions of torch, and assign; ``skipped`` says
    what others do besides. Left alone are layers that are called or registered twice, or have
    hooks. Messages stay in their order: ranks may fuse what others do not.

    Layers must not be called from elsewhere than the forwards of the model. ReLUs that are fused
    are not called any more, nor are children that are added to a fused module later. Whole models
    cannot be pickled while they are fused; copies by ``deepcopy`` stay fused.

    Args:
        model: with layers that :func:`syncbn.convert_sync_batchnorm` has made.

    Returns:
        What was done, and the way back: ``syncbn.fuse(model).undo()``.
    """
    rewriting = Rewriting(model)
    rewriting.run()
    return Fusion(rewriting.fused, rewriting.skipped, rewriting.layers, rewriting.modules)
