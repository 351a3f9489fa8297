"""Checkpoint files: find the state dict of a model and replace its running statistics only.

Files are read without running code from them, and written completely or not at all.
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
# If several state dicts fit, plain weights are preferred to averaged ones.
_AVERAGES = ("ema", "swa", "average")
_MAX_DEPTH = 3
# Files from before torch 0.4.1 have no such buffer, and calibration does not use it.
_COUNTER = "num_batches_tracked"
_STATISTICS = ("running_mean", "running_var")


@dataclass
class Checkpoint:
    """Content of a checkpoint file.

    Attributes:
        path: path of the file.
        content: complete content.
        metadata: metadata of a safetensors file.
    """

    path: Path
    content: MutableMapping[str, Any]
    metadata: dict[str, str] | None = None

    def find(self, model: nn.Module, where: str | None = None) -> StateDict:
        """Return the state dict that fits a model.

        Args:
            model: network with the expected names and shapes.
            where: keys of the state dict, separated by dots; None to search everywhere.

        Raises:
            ValueError: no state dict fits; the message has the mismatches of the nearest.
        """
        candidates = [
            StateDict(name, values, prefix)
            for name, values in _iterate_mappings(self.content, where)
            for prefix in _find_prefixes(values, model)
        ]
        if not candidates:
            place = "anywhere" if where is None else f"at {where!r}"
            raise ValueError(f"{self.path}: no state dict found {place}; expected tensors by name")
        # A generator: the mismatches of thousands of prefixes would take gigabytes.
        checked = ((state, state.mismatches(model)) for state in candidates)
        state, mismatches = min(checked, key=lambda pair: (len(pair[1]), pair[0].is_average))
        if not mismatches:
            return state
        more = f" and {len(mismatches) - 5} more" if len(mismatches) > 5 else ""
        raise ValueError(
            f"{self.path}: does not fit the model; {state.describe()}: "
            f"{', '.join(mismatches[:5])}{more}; expected the names and shapes of the model"
        )

    def write(self, path: Path, overwrite: bool = False) -> None:
        """Write the content to a file of the same kind, completely or not at all.

        The file grants its group and other users no more than the source file.

        Args:
            path: file to write.
            overwrite: permission to replace the source file.

        Raises:
            ValueError: :func:`require_output` fails.
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
    """State dict in a checkpoint.

    Attributes:
        where: keys of the state dict in the content, joined by dots; empty at the top.
        values: entries by name; changed in place.
        prefix: prefix of all names of the model.
    """

    where: str
    values: MutableMapping[str, Any]
    prefix: str

    @property
    def is_average(self) -> bool:
        """True if a key or the prefix suggests averaged weights."""
        return any(word in f"{self.where}.{self.prefix}".lower() for word in _AVERAGES)

    def describe(self) -> str:
        """Return a phrase for messages."""
        place = f"the state dict at {self.where!r}" if self.where else "its tensors"
        return f"{place}, from {self.prefix!r} on" if self.prefix else place

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the model's names."""
        return {
            name.removeprefix(self.prefix): value
            for name, value in self.values.items()
            if isinstance(value, Tensor) and name.startswith(self.prefix)
        }

    def mismatches(self, model: nn.Module) -> list[str]:
        """Return the mismatches with a model, a phrase for each tensor."""
        expected, ours = model.state_dict(), self.tensors()
        missing, shapes = [], []
        for name, value in expected.items():
            if not isinstance(value, Tensor):
                continue
            if name in ours and ours[name].shape != value.shape:
                shapes.append(f"{name} is {tuple(ours[name].shape)}, not {tuple(value.shape)}")
            elif name not in ours and not name.endswith(_COUNTER):
                missing.append(f"{name} is missing")
        extra = ours.keys() - expected.keys() - {"n_averaged"}
        unexpected = [f"{name} is unexpected" for name in ours if name in extra]
        integers = [
            f"{name} is {value.dtype}, which cannot hold a fraction"
            for name, value in ours.items()
            if name.endswith(_STATISTICS) and not value.is_floating_point()
        ]
        return missing + unexpected + shapes + integers

    def load_into(self, model: nn.Module) -> None:
        """Copy all tensors into a matching model."""
        # Not strict: num_batches_tracked may be missing, and extra state is not loaded.
        model.load_state_dict(self.tensors(), strict=False)

    def replace_running_stats(self, model: nn.Module) -> None:
        """Replace the running statistics by the running statistics of a model.

        The new entries are new tensors, since further entries of the file may share the memory of
        the old ones. Several names of one layer still share a tensor.

        Raises:
            ValueError: the statistics overflow the dtype of the entries.
        """
        replaced: dict[tuple[str, int], Tensor] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            for buffer in _STATISTICS if isinstance(module, _BatchNorm) else ():
                key = self.prefix + (f"{name}.{buffer}" if name else buffer)
                if (old := self.values.get(key)) is None:
                    continue
                if (new := replaced.get((buffer, id(module)))) is None:
                    new = getattr(module, buffer).detach().to(old, copy=True)
                if not bool(new.isfinite().all()):
                    raise ValueError(
                        f"{key}: the new statistics are beyond the range of {new.dtype}, the dtype "
                        "of the old ones in the checkpoint; save it in float32"
                    )
                self.values[key] = replaced[buffer, id(module)] = new


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of ``torch.save`` or safetensors to the CPU, without running code from it.

    Raises:
        ValueError: the file does not exist, is damaged, or holds objects other than data.
        ImportError: safetensors is needed and not installed.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint")
    if path.suffix == _SAFETENSORS:
        return _read_safetensors(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise any exception
        # torch's message is long and advises running the code in the file.
        reason = str(error) or repr(error)
        if (match := re.search(r"GLOBAL (\S+)", reason)) is not None:
            raise ValueError(
                f"{path}: holds an object of class {match[1]} beside its tensors, which is not "
                "loaded because that could run any code; save the state dict alone, or without "
                "such objects"
            ) from None
        raise ValueError(
            f"{path}: cannot be read as tensors and plain data ({reason.splitlines()[0]}); damaged?"
        ) from None
    if not isinstance(content, MutableMapping):
        raise ValueError(f"{path}: got a {type(content).__name__}; expected a dict")
    return Checkpoint(path, content)


def require_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raise unless a checkpoint may be written to a file.

    Raises:
        ValueError: the file is the source and ``overwrite`` is False, has another kind, or is not
            a regular file; its folder does not exist.
    """
    require_file(output)
    if (output.suffix == _SAFETENSORS) != (source.suffix == _SAFETENSORS):
        raise ValueError(f"{output}: expected a file of the kind of {source}")
    if output.exists() and output.samefile(source) and not overwrite:
        raise ValueError(
            f"{output}: is the checkpoint that is read; set another output, or overwrite=true"
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


def _iterate_mappings(
    content: MutableMapping[str, Any], where: str | None
) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """Yield the content and nested mappings, with their paths, if they have tensors by name.

    Each mapping is visited once, on its shortest path: a file of 25 KB can hold a mapping at
    millions of paths.

    Args:
        content: mapping to search.
        where: only path to yield, keys joined by dots; None for all.
    """
    level, visited = [("", content)], {id(content)}
    for _ in range(_MAX_DEPTH):
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


def _find_prefixes(values: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Return possible prefixes of all names of a model, such as ``module.``, shortest first."""
    first = next(iter(model.state_dict()), "")
    names = [name for name in values if isinstance(name, str)]
    prefixes = {n.removesuffix(first) for n in names if n.endswith(f".{first}")} if first else set()
    return ["", *sorted(prefixes, key=len)]
