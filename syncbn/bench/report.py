"""What a benchmark is, and what it finds: tables for people, numbers for programs."""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from syncbn.files import require_file
from syncbn.kernels import cpu

T = TypeVar("T")
_MODEL_NAME = "model name"


@dataclass
class Table:
    """A table to print.

    Attributes:
        title: above it.
        columns: headings; the first column names the row.
        rows: cells, as many as headings.
        notes: sentences to print below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        facts: the machine and the libraries, by name.
        tables: for people.
        results: for programs; what JSON can hold, and dataclasses.
    """

    facts: dict[str, str]
    tables: list[Table]
    results: dict[str, Any]


@dataclass
class Benchmark(ABC):
    """A benchmark's settings, and what it does with them; one subclass a file.

    Attributes:
        ranks: processes that `syncbn-bench` starts, with mpirun if there are several.
        threads: of torch, a rank.
        json: file to write the report to as well; None for none.
    """

    ranks: int
    threads: int
    json: str | None

    def __post_init__(self) -> None:
        at_least("ranks", self.ranks, 1)
        at_least("threads", self.threads, 1)
        in_a_folder("json", self.json)

    @abstractmethod
    def run(self) -> Report:
        """Measure; every rank calls this, and rank 0's report counts."""


def at_least(name: str, value: int, low: int) -> None:
    """Check a setting.

    Raises:
        ValueError: the value is below ``low``.
    """
    if value < low:
        raise ValueError(f"{name}: got {value}; expected at least {low}")


def one_of(name: str, values: Iterable[object], known: Iterable[object]) -> None:
    """Check the values of a setting.

    Raises:
        ValueError: one is not among those that are known.
    """
    known = list(known)
    for value in values:
        if value not in known:
            raise ValueError(f"{name}: got {value}; expected one of {', '.join(map(str, known))}")


def given(value: T | None, default: T) -> T:
    """Return a setting, or what stands for none."""
    return default if value is None else value


def in_a_folder(name: str, path: str | None) -> None:
    """Check the name of a file to write, if there is one.

    Raises:
        ValueError: the folder does not exist or is not writable, or the file is not a regular one.
    """
    if path is not None:
        try:
            require_file(Path(path))
        except ValueError as error:
            raise ValueError(f"{name}: got {error}") from error


def machine_facts() -> dict[str, str]:
    """Return what every benchmark says about where it ran."""
    system = f"{platform.system()} {platform.release()}"
    return {
        "machine": f"{os.cpu_count()} CPUs, {_cpu_name()}, {system}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} thread(s) a rank",
        "C++ kernels": cpu.describe(),
    }


def _cpu_name() -> str:
    # platform.processor() is empty or "x86_64" on Linux.
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(_MODEL_NAME)]
    return names[0] if names else platform.machine()
