"""Test loss and accuracy, on all ranks and exact."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from compute import Compute
from group_statistics import merged_statistics
from meter import Meter, Totals
from torch import Tensor, nn


def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], compute: Compute) -> Totals:
    """Evaluate a network; a collective.

    Args:
        net: the network, not wrapped in DDP, whose forward would wait for ranks that have fewer
            batches. It is left in evaluation mode.
        batches: this rank's share of the test set, possibly empty.
        compute: device, dtype and autocast.

    Returns:
        Loss and accuracy over the samples of all ranks, each counted once.
    """
    net.eval()
    meter = Meter(compute.device)
    with torch.no_grad(), merged_statistics(net) as own:
        if not own:
            broadcast_buffers(net)
        for images, labels in compute.batches(batches):
            with compute.autocast():
                logits = net(images)
                loss = F.cross_entropy(logits, labels)
            meter.add(logits, labels, loss)
    return meter.totals()


def broadcast_buffers(net: nn.Module) -> None:
    """Give every rank the buffers of rank 0; a collective.

    For local batch norm DDP does so before every forward of training, but the last step of an epoch
    leaves each rank with different running statistics: ranks would evaluate different networks, and
    only the network of rank 0 is saved.
    """
    for buffer in net.buffers():
        dist.broadcast(buffer, src=0)
