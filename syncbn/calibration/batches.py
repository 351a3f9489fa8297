"""A calibration set, batch by batch: what a sample is, how a batch gets into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Where the time for Python is a tenth of that for a small ResNet.
_SAMPLES_TOGETHER = 32
# Larger inputs have activations beyond the caches, and beyond what malloc keeps: each is slower.
_BYTES_TOGETHER = 1 << 18

Forward = Callable[[nn.Module, Any], object]


def default_forward(model: nn.Module, batch: Any) -> object:
    """Call ``model(batch)``, ``model(batch[0])`` for a sequence, ``model(**batch)`` for a mapping.

    Most loaders yield sequences of inputs and labels. A list of several inputs looks the same, so
    a model that takes such a list needs a ``forward`` of the user.

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
        "mapping of arguments; else pass forward=, called as forward(model, batch)"
    )


@dataclass
class Batches:
    """The batches of this rank.

    Attributes:
        source: what the user gave: re-iterable, or an iterator that gives its batches once.
        limit: samples to stop after; the last batch is cut. None for all.
        device: tensors in batches are moved there.
        size: samples of the first batch, once it has come.
    """

    source: Iterable[Any]
    limit: int | None
    device: torch.device
    size: int = 0

    @property
    def is_one_shot(self) -> bool:
        """Whether the batches come only once."""
        return isinstance(self.source, Iterator)

    def __len__(self) -> int:
        """Return how many batches the source promises; zero if it does not say."""
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:  # also of a DataLoader, whose class has a length, over a stream
            return 0

    def kept(self) -> Batches:
        """Return the same batches, which can be read again even if the source gives them once."""
        if not self.is_one_shot:
            return self
        return Batches(_Kept(iter(self.source)), self.limit, self.device)

    def expected_samples(self) -> int:
        """Return how many samples to expect once the first batch has come; zero if unknown."""
        promised = self.size * len(self)
        if self.limit is None:
            return promised
        return min(promised, self.limit) if promised else self.limit

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches on the device, as copies: a forward may write to its input.

        Raises:
            ValueError: there are fewer samples, or batches, than expected.
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
                    batch = first_samples(batch, left, samples)
                left -= min(samples, left)
            yield move(batch, self.device)
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


class _Kept(Iterable[Any]):
    """What an iterator gives, as often as it is asked for.

    Args:
        source: read once.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._seen: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        yield from self._seen
        for batch in self._source:
            self._seen.append(batch)
            yield batch


def group_batches(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield lists of small input tensors that one pass may compute, and other batches alone.

    Only for :func:`default_forward`. A pass over one image takes less time than a switch between
    two passes. A batch without a tensor, or of another shape, is alone in its list.
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
    match batch:
        case list() | tuple() if len(batch) and isinstance(batch[0], Tensor):
            batch = batch[0]
    small = isinstance(batch, Tensor) and batch.dim() and len(batch) < _SAMPLES_TOGETHER
    return batch if small else None


def _fits(x: Tensor, group: list[Tensor]) -> bool:
    together = [x, *group]
    alike = x.shape[1:] == group[0].shape[1:] and x.dtype == group[0].dtype
    few = sum(len(part) for part in together) <= _SAMPLES_TOGETHER
    return alike and few and sum(part.nbytes for part in together) <= _BYTES_TOGETHER


def count_samples(batch: Any) -> int | None:
    """Return the size of the first dimension of the first tensor in a batch; None without one."""
    tensor = next(_tensors(batch), None)
    return None if tensor is None else len(tensor)


def first_samples(batch: Any, number: int, samples: int) -> Any:
    """Return the first samples of a batch: of every tensor and list with one entry a sample.

    Args:
        batch: tensors, nested in sequences and mappings.
        number: samples to keep.
        samples: in the batch.
    """
    match batch:
        case Tensor():
            return batch[:number] if batch.dim() and len(batch) == samples else batch
        case list() if len(batch) == samples and not any(isinstance(x, Tensor) for x in batch):
            return batch[:number]
        case _:
            return _rebuilt(batch, lambda part: first_samples(part, number, samples))


def move(batch: Any, device: torch.device) -> Any:
    """Return the batch with copies of its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True, copy=True)
    return _rebuilt(batch, lambda part: move(part, device))


def copy(batch: Any) -> Any:
    """Return the batch with copies of its tensors."""
    if isinstance(batch, Tensor):
        return batch.clone()
    return _rebuilt(batch, copy)


def _rebuilt(batch: Any, change: Callable[[Any], Any]) -> Any:
    match batch:
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(change(part) for part in batch))
        case list() | tuple():
            return type(batch)(change(part) for part in batch)
        case dict():
            return {key: change(part) for key, part in batch.items()}
        case Mapping():
            return type(batch)({key: change(part) for key, part in batch.items()})  # type: ignore[call-arg]  # UserDict's, and so those of transformers
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    match batch:
        case Tensor():
            if batch.dim():
                yield batch
        case Mapping():
            for part in batch.values():
                yield from _tensors(part)
        case list() | tuple():
            for part in batch:
                yield from _tensors(part)
