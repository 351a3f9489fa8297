"""Checkpoint files: the state dict in them found, its running statistics replaced, nothing else.

Files are read without running code from them, and written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.files import replacing

_SAFETENSORS = ".safetensors"
# What wrappers put before the names of their parameters: DDP, torch.compile, torch's AveragedModel,
# Lightning.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Of several state dicts that fit, the weights themselves come before averages of them.
_AVERAGES = ("ema", "swa", "average")
_DEEPEST = 3


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
        found = [StateDict(name, values, prefix) for name, values in _nested(self.content)
                 for prefix in _prefixes(values)]  # fmt: skip
        if where is not None:
            found = [state for state in found if state.where == where]
        if not found:
            place = "anywhere" if where is None else f"at {where!r}"
            raise ValueError(f"{self.path}: no state dict found {place}; expected tensors by name")
        problems = [(state, state.problems(model)) for state in found]
        fitting = [state for state, problem in problems if not problem]
        if fitting:
            return min(fitting, key=lambda state: state.is_average)
        state, problem = min(problems, key=lambda pair: len(pair[1]))
        raise ValueError(
            f"{self.path}: does not fit the model; {state.name()}: {_few(problem)}; expected the "
            "names and shapes of the model"
        )

    def write(self, path: Path, overwrite: bool = False) -> None:
        """Write everything to a file of the same kind; it is there whole or not at all.

        Args:
            path: to write.
            overwrite: allow that it is the file that was read.

        Raises:
            ValueError: it is, and that is not allowed; the kind is another.
            OSError: the file cannot be written.
        """
        require_output(self.path, path, overwrite)
        with replacing(path) as file:
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
        return any(word in self.where.lower() for word in _AVERAGES)

    def name(self) -> str:
        """Return what to call it in a message."""
        return f"the state dict at {self.where!r}" if self.where else "its tensors"

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
            *(f"{name} is missing" for name in own if name not in ours),
            *(f"{name} is unexpected" for name in ours if name not in own and name != "n_averaged"),
            *(
                f"{name} is {tuple(ours[name].shape)}, not {tuple(value.shape)}"
                for name, value in own.items()
                if name in ours and ours[name].shape != value.shape
            ),
        ]

    def load_into(self, model: nn.Module) -> None:
        """Copy everything into a model that it fits."""
        model.load_state_dict({k: v for k, v in self.tensors().items() if k != "n_averaged"})

    def take_statistics(self, model: nn.Module) -> None:
        """Replace the running statistics by those of a model, in the memory where they are."""
        with torch.no_grad():
            for name, module in model.named_modules(remove_duplicate=False):
                if isinstance(module, _BatchNorm):
                    for buffer in ("running_mean", "running_var"):
                        key = self.prefix + (f"{name}.{buffer}" if name else buffer)
                        if key in self.values:
                            self.values[key].copy_(getattr(module, buffer))


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
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(
            f"{path}: cannot be read as tensors and plain data ({reason}); damaged, or saved with "
            "objects of other classes, which are not loaded, because that could run any code: save "
            "its state dict alone"
        ) from None
    if not isinstance(content, MutableMapping):
        raise ValueError(f"{path}: got a {type(content).__name__}; expected a dict")
    return Checkpoint(path, content)


def require_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raise unless a result may be written to a file.

    Raises:
        ValueError: it is the source, or of another kind; its folder does not exist.
    """
    if not output.parent.is_dir():
        raise ValueError(f"{output}: the folder {output.parent} does not exist; make it first")
    if output.is_dir():
        raise ValueError(f"{output}: is a folder; expected the name of a file")
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


def _nested(content: MutableMapping[str, Any]) -> Iterator[tuple[str, MutableMapping[str, Any]]]:
    """Yield the mappings in a mapping, itself included, that have tensors by name."""
    level = [("", content)]
    for _ in range(_DEEPEST):
        deeper: list[tuple[str, MutableMapping[str, Any]]] = []
        for where, values in level:
            if any(isinstance(v, Tensor) and isinstance(k, str) for k, v in values.items()):
                yield where, values
            deeper += [
                (f"{where}.{key}" if where else str(key), value)
                for key, value in values.items()
                if isinstance(value, MutableMapping)
            ]
        level = deeper


def _prefixes(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what may stand before all names: nothing, and what wrappers put there."""
    prefix, rest = "", [name for name, value in values.items() if isinstance(value, Tensor)]
    while True:
        yield prefix
        added = next((p for p in _PREFIXES if any(name.startswith(p) for name in rest)), None)
        if added is None:
            return
        rest = [name.removeprefix(added) for name in rest if name.startswith(added)]
        prefix += added


def _few(lines: list[str]) -> str:
    return ", ".join(lines[:5]) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
