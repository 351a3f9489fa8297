"""Checkpoint files: the state dict in them found, its running statistics replaced, nothing else.

Files are read without running code from them, and written whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.files import atomic_write, require_file

_SAFETENSORS = ".safetensors"
# Of several state dicts that fit, the weights themselves come before averages of them.
_AVERAGES = ("ema", "swa", "average")
_DEEPEST = 3
# Of layers; files from before torch 0.4.1 have none, and calibration does not use it.
_COUNTER = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var")


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        path: of the file.
        content: everything in it.
        metadata: of a safetensors file.
    """

    path: Path
    content: MutableMapping[str, Any]
    metadata: dict[str, str] | None = None

    def find(self, model: nn.Module, where: str | None = None) -> StateDict:
        """Return the state dict that fits a model.

        Args:
            model: whose names and shapes are looked for.
            where: keys to it, separated by dots; None to look everywhere.

        Raises:
            ValueError: none fits; the message says what the nearest lacks.
        """
        found = [StateDict(name, values, prefix) for name, values in _nested(self.content, where)
                 for prefix in _prefixes(values, model)]  # fmt: skip
        if not found:
            place = "anywhere" if where is None else f"at {where!r}"
            raise ValueError(f"{self.path}: no state dict found {place}; expected tensors by name")
        # A generator: the problems of thousands of prefixes would take gigabytes.
        problems = ((state, state.problems(model)) for state in found)
        state, problem = min(problems, key=lambda pair: (len(pair[1]), pair[0].is_average))
        if not problem:
            return state
        raise ValueError(
            f"{self.path}: does not fit the model; {state.name()}: {_few(problem)}; expected the "
            "names and shapes of the model"
        )

    def write(self, path: Path, overwrite: bool = False) -> None:
        """Write everything to a file of the same kind, complete or not at all.

        The file grants its group and other users no more than the file that was read.

        Args:
            path: to write.
            overwrite: allow that it is the file that was read.

        Raises:
            ValueError: it is, and that is not allowed; the kind is another.
            OSError: the file cannot be written.
        """
        require_output(self.path, path, overwrite)
        with atomic_write(path, source=self.path) as file:
            if path.suffix == _SAFETENSORS:
                from safetensors.torch import save

                file.write(save(dict(self.content), self.metadata))
            else:
                torch.save(self.content, file)


@dataclass(frozen=True)
class StateDict:
    """A state dict in a checkpoint.

    Attributes:
        where: the keys that lead to it, joined by dots; empty at the top.
        values: tensors by name, in place.
        prefix: before every name.
    """

    where: str
    values: MutableMapping[str, Any]
    prefix: str

    @property
    def is_average(self) -> bool:
        """Whether it seems to hold averaged weights."""
        return any(word in f"{self.where}.{self.prefix}".lower() for word in _AVERAGES)

    def name(self) -> str:
        """Return what to call it in a message."""
        place = f"the state dict at {self.where!r}" if self.where else "its tensors"
        return f"{place}, from {self.prefix!r} on" if self.prefix else place

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the model's names."""
        return {
            name.removeprefix(self.prefix): value
            for name, value in self.values.items()
            if isinstance(value, Tensor) and name.startswith(self.prefix)
        }

    def problems(self, model: nn.Module) -> list[str]:
        """Return what keeps it from fitting a model, a line each."""
        own, ours = model.state_dict(), self.tensors()
        return [
            *(
                f"{name} is missing"
                for name, value in own.items()
                if isinstance(value, Tensor) and name not in ours and not name.endswith(_COUNTER)
            ),
            *(f"{name} is unexpected" for name in ours if name not in own and name != "n_averaged"),
            *(
                f"{name} is {tuple(ours[name].shape)}, not {tuple(value.shape)}"
                for name, value in own.items()
                if isinstance(value, Tensor) and name in ours and ours[name].shape != value.shape
            ),
            *(
                f"{name} is {value.dtype}, which cannot hold a fraction"
                for name, value in ours.items()
                if name.endswith(_STATISTICS) and not value.is_floating_point()
            ),
        ]

    def load_into(self, model: nn.Module) -> None:
        """Copy all tensors into a model that they fit."""
        # Not strict: counters of batches may be missing, and what is no tensor is not loaded.
        model.load_state_dict(
            {k: v for k, v in self.tensors().items() if k != "n_averaged"}, strict=False
        )

    def take_statistics(self, model: nn.Module) -> None:
        """Replace the running statistics by those of a model.

        By new tensors: other entries of the file may share the memory of the old ones. Names of one
        layer go on sharing theirs.

        Raises:
            ValueError: they are beyond the dtype of the entries.
        """
        replaced: dict[tuple[str, int], Tensor] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if not isinstance(module, _BatchNorm):
                continue
            for buffer in _STATISTICS:
                key = self.prefix + (f"{name}.{buffer}" if name else buffer)
                if key in self.values:
                    new = replaced.get((buffer, id(module)))
                    if new is None:
                        new = _in_dtype_of(self.values[key], getattr(module, buffer), key)
                    self.values[key] = replaced[buffer, id(module)] = new


def _in_dtype_of(old: Tensor, statistic: Tensor, key: str) -> Tensor:
    new = statistic.detach().to(old, copy=True)
    if not bool(new.isfinite().all()):
        raise ValueError(
            f"{key}: the new statistics are beyond the range of {new.dtype}, in which the "
            "checkpoint has the old ones; save it in float32"
        )
    return new


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of torch.save or of safetensors, to the CPU, without running code from it.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds more than data.
        ImportError: safetensors is needed and missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint")
    if path.suffix == _SAFETENSORS:
        return _read_safetensors(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        raise ValueError(_unreadable(path, str(error) or repr(error))) from None
    if not isinstance(content, MutableMapping):
        raise ValueError(f"{path}: got a {type(content).__name__}; expected a dict")
    return Checkpoint(path, content)


def _unreadable(path: Path, reason: str) -> str:
    # Of torch's long message, with its advice to run what is in the file, the one fact.
    if (found := re.search(r"GLOBAL (\S+)", reason)) is not None:
        return (
            f"{path}: holds an object of class {found[1]} beside its tensors, which is not loaded, "
            "because that could run any code; save its state dict alone, or without such objects"
        )
    return f"{path}: cannot be read as tensors and plain data ({reason.splitlines()[0]}); damaged?"


def require_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raise unless a checkpoint may be written to a file.

    Raises:
        ValueError: it is the source, of another kind, or no regular file; its folder does not
            exist.
    """
    require_file(output)
    if (output.suffix == _SAFETENSORS) != (source.suffix == _SAFETENSORS):
        raise ValueError(f"{output}: expected a file of the kind of {source}, which is kept")
    if output.exists() and output.samefile(source) and not overwrite:
        raise ValueError(
            f"{output}: is the checkpoint that is read; give another output, or overwrite=true"
        )


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path}: pip install safetensors to read it") from error
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Checkpoint(path, tensors, file.metadata())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from None


def _nested(
    content: MutableMapping[str, Any], where: str | None
) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """Yield the mappings in a mapping, itself included, that have tensors by name.

    Each mapping is visited once, on its shortest path: a file of 25 KB can hold a mapping at
    millions of paths.

    Args:
        content: mapping to search.
        where: the only path to yield, keys joined by dots; None for all.
    """
    level, visited = [("", content)], {id(content)}
    for _ in range(_DEEPEST):
        deeper: list[tuple[str, MutableMapping[str, Any]]] = []
        for path, values in level:
            if where in (None, path) and any(
                isinstance(v, Tensor) and isinstance(k, str) for k, v in values.items()
            ):
                yield path, values
            for key, value in values.items():
                if not isinstance(value, MutableMapping) or id(value) in visited:
                    continue
                below = f"{path}.{key}" if path else str(key)
                if where is None or f"{where}.".startswith(f"{below}."):
                    visited.add(id(value))
                    deeper.append((below, value))
        level = deeper


def _prefixes(values: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return what may stand before all names of a model, such as ``module.``, shortest first."""
    first = next(iter(model.state_dict()), "")
    names = [name for name in values if isinstance(name, str)]
    found = {n.removesuffix(first) for n in names if n.endswith(f".{first}")} if first else set()
    return ["", *sorted(found, key=len)]


def _few(lines: list[str]) -> str:
    return ", ".join(lines[:5]) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
