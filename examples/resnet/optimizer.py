"""SGD over two parameter groups: with and without weight decay."""

import torch
from config import OptimizerConfig
from torch import nn


def build_sgd(net: nn.Module, cfg: OptimizerConfig) -> torch.optim.SGD:
    """Make the optimizer; its learning rate is set before every step (see `schedule.py`).

    Args:
        net: network; parameters without ``requires_grad`` are left out.
        cfg: hyper-parameters. Unless ``decay_norm_and_bias``, parameters with fewer than two
            dimensions (scales and shifts of normalization layers, biases) do not decay: pulling a
            BN scale to zero only changes the effective learning rate of the layer before it.

    Returns:
        The optimizer, with the decaying parameters in its first group.

    Raises:
        ValueError: ``nesterov`` without momentum.
    """
    if cfg.nesterov and cfg.momentum == 0:
        raise ValueError("optimizer.nesterov=true: got momentum 0, expected a positive momentum")
    params = [p for p in net.parameters() if p.requires_grad]
    decay = [p for p in params if p.ndim >= 2 or cfg.decay_norm_and_bias]
    rest = [p for p in params if p.ndim < 2 and not cfg.decay_norm_and_bias]
    groups = [
        {"params": decay, "weight_decay": cfg.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.nesterov)
