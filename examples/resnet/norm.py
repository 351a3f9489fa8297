"""The five ways to normalize that the example compares, applied to a network with plain BN."""

import warnings

import torch
import torch.distributed as dist
from config import NormConfig, NormKind
from group_statistics import has_groups
from torch import nn

import syncbn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics and never learns.

    A separate class rather than a call of ``eval()``, because ``model.train()`` at the start of
    the next epoch would silently undo that call.
    """

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__(num_features, eps)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in evaluation mode whatever ``mode`` says."""
        super().train(False)
        return self


def apply_norm(net: nn.Module, cfg: NormConfig, device: torch.device) -> nn.Module:
    """Replace every `nn.BatchNorm2d` of a network as configured.

    * ``local``: unchanged; each rank normalizes with the statistics of its samples.
    * ``sync``: `syncbn.SyncBatchNorm`; the statistics of all ranks.
    * ``group``: `syncbn.SyncBatchNorm`; the statistics of a node or ``cfg.group`` ranks in a row.
    * ``torch_sync``: `torch.nn.SyncBatchNorm`, for comparison.
    * ``frozen``: stored statistics, nothing learned; for fine-tuning from ``model.weights``.

    With ``cfg.fused``, the layers of `sync` and `group` also add the residuals and apply the ReLUs
    that come after them.

    Parameters and buffers keep their names and values, so checkpoints move between all five.

    Args:
        net: network with `nn.BatchNorm2d` layers; changed in place.
        cfg: the choice.
        device: device that runs the network.

    Returns:
        The network to use (the same object unless it is a batch-norm layer itself).

    Raises:
        ValueError: ``torch_sync`` on a CPU, or a group that the ranks cannot be divided into.
    """
    match cfg.kind:
        case NormKind.local:
            return net
        case NormKind.sync | NormKind.group:
            syncbn.convert_sync_batchnorm(net, cfg.group)
            if has_groups(net) and dist.get_rank() == 0:
                warnings.warn(
                    f"norm.group={cfg.group}: each group of ranks has its own running statistics. "
                    "Evaluations and checkpoints merge them (syncbn.merge_over_ranks), and "
                    "DistributedDataParallel does not broadcast them.",
                    stacklevel=2,
                )
            if cfg.fused:
                syncbn.fuse(net)
            return net
        case NormKind.torch_sync:
            if device.type == "cpu":
                raise ValueError(
                    "norm=torch_sync on device cpu: torch.nn.SyncBatchNorm refuses CPU tensors; "
                    "use norm=sync, which takes them, or run on GPUs"
                )
            converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(net)
            return converted
        case NormKind.frozen:
            return _freeze(net)


def needs_broadcast(kind: NormKind) -> bool:
    """Return whether DistributedDataParallel must broadcast buffers before each forward.

    World-wide statistics are equal on every rank already, and the broadcast costs a round trip per
    step. The statistics of groups would be replaced by rank 0's, and frozen ones never change.
    """
    return kind is NormKind.local


def _freeze(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        module.add_module(name, _freeze(child))
    return module
