"""Training with uneven data: ranks with different numbers of batches or samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join, Joinable, JoinHook
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from syncbn.distributed.collectives import all_reduce
from syncbn.distributed.groups import active_group
from syncbn.kernels.coefficients import compute_dtype

B = TypeVar("B")


def even_batches(
    loader: Iterable[B], process_group: dist.ProcessGroup | None = None
) -> Iterator[B]:
    """Yield the batches of a loader, then empty batches until every rank has run out.

    For training loops under DistributedDataParallel whose ranks have different numbers of batches:
    synchronized layers and DDP need every rank in every step. An empty batch is a slice of this
    rank's last batch without samples; it counts nothing in the statistics and has zero gradients
    with the loss of :func:`global_mean`. Each step costs one all-reduce of two elements.

    Args:
        loader: batches of this rank: tensors, or containers of tensors, with the samples in the
            first dimension.
        process_group: ranks that train together; None for all ranks. A collective at every step.

    Raises:
        ValueError: a rank has no batch at all, a loader yields more or fewer batches than its
            ``len()``, or batches without tensors; raised on every rank.

    Example::

        for images, labels in syncbn.even_batches(loader):
            loss = syncbn.global_mean(F.cross_entropy(model(images), labels, reduction="none"))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    """
    group = active_group(process_group)
    try:
        expected = len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a DataLoader over an iterable dataset
        expected = None
    batches, last, number = iter(loader), None, 0
    while True:
        batch = next(batches, _END)
        has_batch = batch is not _END
        number += has_batch
        is_wrong = expected is not None and (number > expected if has_batch else number < expected)
        values = [float(has_batch), float(is_wrong or number == 0)]
        flags = torch.tensor(values, dtype=torch.float64, device=_communication_device(group))
        num_batches, num_wrong = all_reduce(flags, group, "even_batches").tolist()
        if num_wrong:
            got = f"this rank got {number} batches from a loader of len() {expected}"
            raise ValueError(
                f"{int(num_wrong)} ranks have no batch, or another number of batches than the "
                f"len() of their loader ({got}); expected at least one, and as many as len()"
            )
        if not num_batches:
            return
        if has_batch:
            last = batch
            _take_no_samples(batch)  # an error here is one on every rank
            yield batch  # type: ignore[misc]
        else:
            yield _take_no_samples(last)


_END = object()


def global_mean(losses: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Return a loss whose gradient, averaged over ranks, equals the gradient of the global mean.

    DistributedDataParallel averages the gradients of R ranks. With n_r losses l_ri on rank r and
    N = sum_r n_r, this returns ``L_r = R / N sum_i l_ri``, so that::

        1/R sum_r dL_r = 1/N sum_r sum_i dl_ri = d(mean of all losses)

    The mean of each rank's own losses would weight samples of small batches more. A rank without
    samples returns zero, with a graph.

    Args:
        losses: loss of each sample of this rank (``reduction="none"``), any shape.
        process_group: ranks whose gradients are averaged; None for all ranks. A collective.

    Raises:
        ValueError: no rank has a loss (on CPU; on CUDA the result is zero).
    """
    group = active_group(process_group)
    ranks = 1 if group is None else group.size()
    count = torch.tensor(float(losses.numel()), dtype=torch.float64, device=losses.device)
    total = all_reduce(count.reshape(1), group, "global_mean")
    if total.is_cpu and not total:
        raise ValueError("got no losses on any rank; expected at least one")
    # Half types would overflow: the sum is larger than the mean.
    return losses.sum(dtype=compute_dtype(losses.dtype)) * (ranks / total.clamp(min=1)).squeeze()


class JoinableModel(Joinable):
    """A model with synchronized layers for ``torch.distributed.algorithms.Join``.

    A rank that has run out of data continues with empty batches, forward and backward, until the
    last rank has finished: so it takes part in the all-reduces of the layers and of
    DistributedDataParallel alike. The ``join()`` of DDP itself repeats only DDP's collectives, and
    the layers of the other ranks would wait for ever. At the end, parameters and buffers of the
    last rank are broadcast, as DDP does. A rank needs at least one batch.

    Args:
        model: module called once per step, such as a ``DistributedDataParallel``; its first
            argument is a tensor, or a container of tensors, with the samples in the first
            dimension.

    Raises:
        RuntimeError: this rank had no batch; raised at the end of the context.

    Example::

        with Join([syncbn.JoinableModel(ddp)]):
            for images, labels in loader:
                optimizer.zero_grad()
                F.cross_entropy(ddp(images), labels).backward()
                optimizer.step()
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._arguments: tuple[Any, dict[str, Any]] | None = None
        self._is_shadowing = False
        self._hook: RemovableHandle | None = None

    @property
    def join_device(self) -> torch.device:
        """Device of the communication of ``Join``."""
        return next(self._model.parameters()).device

    @property
    def join_process_group(self) -> dist.ProcessGroup:
        """Group of the communication of ``Join``: DDP's, or all ranks."""
        group: Any = getattr(self._model, "process_group", None) or dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        return group

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return the steps of a rank without data; called at the start of the context."""
        self.close()
        self._hook = self._model.register_forward_pre_hook(
            self._notify, prepend=True, with_kwargs=True
        )
        return _EmptySteps(self)

    def close(self) -> None:
        """End the notifications of ``Join``; the end of the context calls this."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._arguments = None

    def _notify(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A forward without gradients, such as a validation step, has no step of the other ranks.
        if torch.is_grad_enabled() and not self._is_shadowing:
            self._arguments = args, kwargs
            Join.notify_join_context(self)

    def run_empty_step(self) -> None:
        """Run forward and backward of a batch without samples.

        Raises:
            RuntimeError: there was no batch whose arguments could be emptied.
        """
        if self._arguments is None:
            raise RuntimeError("JoinableModel: got a rank without a batch; expected at least one")
        args, kwargs = _take_no_samples(self._arguments)
        # DDP would add gradients of the last step to the other ranks'.
        self._model.zero_grad()
        self._is_shadowing = True
        try:
            outputs = self._model(*args, **kwargs)
        finally:
            self._is_shadowing = False
        leaves = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
        if not leaves:
            raise RuntimeError("JoinableModel: got outputs without gradients; expected some")
        torch.stack([leaf.sum() for leaf in leaves]).sum().backward()

    def copy_from(self, rank: int) -> None:
        """Receive the parameters and buffers of a rank."""
        group = self.join_process_group
        with torch.no_grad():
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                dist.broadcast(tensor, rank, group=group)


class _EmptySteps(JoinHook):
    def __init__(self, joinable: JoinableModel) -> None:
        self._joinable = joinable

    def main_hook(self) -> None:
        self._joinable.run_empty_step()

    def post_hook(self, is_last_joiner: bool) -> None:
        joinable = self._joinable
        group = joinable.join_process_group
        rank = dist.get_rank()
        last = torch.tensor(rank if is_last_joiner else -1, device=joinable.join_device)
        dist.all_reduce(last, dist.ReduceOp.MAX, group=group)
        joinable.copy_from(int(last))
        joinable.close()


def _take_no_samples(batch: Any) -> Any:
    """Return a batch whose tensors are slices without samples.

    Raises:
        ValueError: no tensor was found; torch's pytree does not know the container.
    """
    if not any(isinstance(leaf, Tensor) and leaf.ndim for leaf in tree_leaves(batch)):
        raise ValueError(
            f"got a batch of type {type(batch).__name__} without tensors; expected a tensor, or "
            "lists, tuples and dictionaries of tensors"
        )
    return tree_map(
        lambda leaf: leaf[:0] if isinstance(leaf, Tensor) and leaf.ndim else leaf, batch
    )


def _communication_device(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device of tensors that a group can send."""
    if group is not None and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
