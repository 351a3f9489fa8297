"""Calibration batches of a rank: iteration, sample counts, slices and the default forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
from torch import Tensor, nn

# With 32 samples, Python overhead is 10 % of a small ResNet's forward.
_MAX_COALESCED_SAMPLES = 32
# Activations of larger inputs exceed the caches and the blocks that malloc retains: both are slow.
_MAX_COALESCED_BYTES = 1 << 18

Forward = Callable[[nn.Module, Any], object]


def default_forward(model: nn.Module, batch: Any) -> object:
    """Call ``model(batch)``, ``model(batch[0])`` for a sequence, ``model(**batch)`` for a mapping.

    Most loaders yield sequences of inputs and labels. A list of several inputs cannot be
    distinguished from them, so a model that takes such a list needs a ``forward`` argument.

    Raises:
        TypeError: the batch is neither a tensor, a mapping, nor a sequence that begins with a
            tensor.
    """
    match batch:
        case Tensor():
            return model(batch)
        case Mapping():
            return model(**batch)
        case Sequence() if len(batch) and isinstance(batch[0], Tensor):
            return model(batch[0])
    kind = f"a batch of type {type(batch).__name__}"
    if isinstance(batch, Sequence) and len(batch) and not isinstance(batch, str | bytes):
        kind += f" that begins with a {type(batch[0]).__name__}"
    raise TypeError(
        f"got {kind}; expected a tensor, a sequence that begins with the input tensor, or a "
        "mapping of arguments; for other batches pass forward=, called as forward(model, batch)"
    )


@dataclass
class Batches:
    """Batches of this rank, moved to a device and limited to a number of samples.

    Attributes:
        source: user's iterable; an iterator is one-shot.
        limit: maximum number of samples; the last batch is cut. None for all.
        device: device of the tensors in the yielded batches.
        size: number of samples in the first batch, 0 before its arrival.
    """

    source: Iterable[Any]
    limit: int | None
    device: torch.device
    size: int = 0

    @property
    def is_one_shot(self) -> bool:
        """True if the batches can be read only once."""
        return isinstance(self.source, Iterator)

    def __len__(self) -> int:
        """Return the number of batches that the source promises; zero if unknown."""
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:  # also a DataLoader over a stream, though its class has a length
            return 0

    def cached(self) -> Batches:
        """Return re-iterable batches: a one-shot source is cached while it is read."""
        if not self.is_one_shot:
            return self
        return Batches(_CachedIterator(iter(self.source)), self.limit, self.device)

    def expected_samples(self) -> int:
        """Return the number of samples to expect after the first batch; zero if unknown."""
        promised = self.size * len(self)
        if self.limit is None:
            return promised
        return min(promised, self.limit) if promised else self.limit

    def __iter__(self) -> Iterator[Any]:
        """Yield copies of the batches on the device, since a forward may write to its input.

        Raises:
            ValueError: the source ends before the expected number of samples or batches.
        """
        left, number = self.limit, 0
        if left == 0:
            return
        for batch in self.source:
            number += 1
            samples = count_samples(batch)
            self.size = self.size or samples or 1
            if left is not None:
                if samples is None:
                    raise ValueError(
                        f"num_samples={self.limit} needs to know the samples of a batch, but got a "
                        f"{type(batch).__name__} without a tensor in it; pass batches of tensors, "
                        "or no num_samples"
                    )
                if samples > left:
                    batch = slice_batch(batch, left, samples)
                left -= min(samples, left)
            yield copy_batch(batch, self.device)
            if left == 0:
                return
        if left:
            raise ValueError(
                f"the batches ended after {(self.limit or 0) - left} samples; expected "
                f"{self.limit} on this rank (num_samples is shared by all ranks)"
            )
        if number < len(self):
            raise ValueError(
                f"the batches ended early: got {number}, expected the {len(self)} that their "
                "len() promises"
            )


class _CachedIterator(Iterable[Any]):
    def __init__(self, source: Iterator[Any]) -> None:
        (self._start,) = tee(source, 1)

    def __iter__(self) -> Iterator[Any]:
        return copy(self._start)  # shares the cache


def coalesce_batches(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield lists of small input tensors that one pass can compute together.

    For :func:`default_forward` only. A pass over one image takes less time than the switch between
    two passes. A batch without a tensor, or with an input of another shape, is a list of one.
    """
    group: list[Tensor] = []
    for batch in batches:
        x = _small_input(batch)
        if group and (x is None or not _fits(x, group)):
            yield group
            group = []
        if x is None:
            yield [batch]
        else:
            group.append(x)
    if group:
        yield group


def _small_input(batch: Any) -> Tensor | None:
    if isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    small = isinstance(batch, Tensor) and batch.dim() and len(batch) < _MAX_COALESCED_SAMPLES
    return batch if small else None


def _fits(x: Tensor, group: list[Tensor]) -> bool:
    if x.shape[1:] != group[0].shape[1:] or x.dtype != group[0].dtype:
        return False
    samples, nbytes = sum(map(len, [x, *group])), sum(t.nbytes for t in [x, *group])
    return samples <= _MAX_COALESCED_SAMPLES and nbytes <= _MAX_COALESCED_BYTES


def count_samples(batch: Any) -> int | None:
    """Return the size of the first dimension of the first tensor in a batch; None without one."""
    match batch:
        case Tensor():
            return len(batch) if batch.dim() else None
        case Mapping():
            parts: Iterable[Any] = batch.values()
        case list() | tuple():
            parts = batch
        case _:
            return None
    return next((size for size in map(count_samples, parts) if size is not None), None)


def slice_batch(batch: Any, number: int, samples: int) -> Any:
    """Return the first samples of a batch.

    Args:
        batch: tensors, nested in sequences and mappings. Tensors and lists with one entry per
            sample are sliced.
        number: samples in the slice.
        samples: samples in the batch.
    """
    match batch:
        case Tensor():
            return batch[:number] if batch.dim() and len(batch) == samples else batch
        case list() if len(batch) == samples and not any(isinstance(x, Tensor) for x in batch):
            return batch[:number]
        case _:
            return _map_parts(batch, lambda part: slice_batch(part, number, samples))


def copy_batch(batch: Any, device: torch.device | None = None) -> Any:
    """Return a batch with copies of its tensors, on another device if one is passed."""
    if isinstance(batch, Tensor):
        return batch.clone() if device is None else batch.to(device, non_blocking=True, copy=True)
    return _map_parts(batch, lambda part: copy_batch(part, device))


def _map_parts(batch: Any, change: Callable[[Any], Any]) -> Any:
    match batch:
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(change(part) for part in batch))
        case list() | tuple():
            return type(batch)(change(part) for part in batch)
        case dict():
            return {key: change(part) for key, part in batch.items()}
        case Mapping():  # UserDict and its subclasses, such as the encodings of transformers
            return type(batch)({key: change(part) for key, part in batch.items()})  # type: ignore[call-arg]
    return batch
