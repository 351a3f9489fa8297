"""Base class of benchmarks, and their reports: tables to print and results for JSON."""

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


@dataclass
class Table:
    """Table to print; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Result of a benchmark."""

    facts: dict[str, str]  # launcher, devices and libraries, by name
    tables: list[Table]
    results: dict[str, Any]  # the same figures for JSON, as dataclasses


@dataclass
class Benchmark(ABC):
    """Settings of a benchmark; its config in ``configs/bench`` explains them."""

    ranks: int
    threads: int
    json: str | None

    def __post_init__(self) -> None:
        self.check_at_least(1, ranks=self.ranks, threads=self.threads)
        self.check_writable("json", self.json)

    @abstractmethod
    def run(self) -> Report:
        """Measure, on every rank; the report of rank 0 counts."""

    @staticmethod
    def check_at_least(low: int, **settings: int | list[int]) -> None:
        """Raise ValueError if a setting, or a number in a list, is below its lowest value."""
        for name, setting in settings.items():
            for value in setting if isinstance(setting, list) else [setting]:
                if value < low:
                    raise ValueError(f"{name}: got {value}; expected at least {low}")

    @staticmethod
    def check_one_of(name: str, values: Iterable[object], known: Iterable[object]) -> None:
        """Raise ValueError unless each value of a setting is known."""
        known = list(known)
        for value in values:
            if value not in known:
                expected = ", ".join(map(str, known))
                raise ValueError(f"{name}: got {value}; expected one of {expected}")

    @staticmethod
    def check_writable(name: str, path: str | None) -> None:
        """Raise ValueError if a setting names a file that cannot be written."""
        try:
            if path is not None:
                require_file(Path(path))
        except ValueError as error:
            raise ValueError(f"{name}: got {error}") from error


def default_if_none(value: T | None, default: T) -> T:
    """Return a setting, or its default."""
    return default if value is None else value


def machine_facts() -> dict[str, str]:
    """Return the facts that all benchmarks report."""
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
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
