"""Fusion of ReLUs and residual additions into the synchronized layers of a model."""

from __future__ import annotations

from torch import nn

from syncbn.fusion.fusion_pass import Fusion as Fusion
from syncbn.fusion.fusion_pass import FusionPass


def fuse(model: nn.Module) -> Fusion:
    """Move the residual addition and the ReLU after a synchronized layer into the layer, in place.

    ``relu(bn(x))`` and ``relu(bn(x) + residual)`` become one pass over the memory, forward and
    backward, and no input is saved for the ReLU. Matches are found in the forward of any module,
    also if the layer is the last one of a child (a ``Sequential``, a block). Only these modules
    get a new forward: they keep their identity, children, hooks and ``state_dict``.

    A forward is rewritten if it only calls children and functions of torch, and assigns local
    names; ``skipped`` gives the reason otherwise. Layers with hooks, and layers that are called or
    registered twice, are unchanged. All-reduces keep their order, so ranks may fuse different
    layers. Layers must not be called from outside the model's forwards. Fused ReLU modules are no
    longer called, nor are children added to a fused module later. A fused model cannot be pickled;
    copies made by ``deepcopy`` stay fused.

    Args:
        model: network converted by :func:`syncbn.convert_sync_batchnorm`.

    Returns:
        The changes; ``syncbn.fuse(model).undo()`` reverts them.
    """
    return FusionPass(model).run()
