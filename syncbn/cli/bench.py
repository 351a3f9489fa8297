"""`syncbn-bench NAME [KEY=VALUE ...]`: measure the cost of this library on this machine.

Starts the ranks of a benchmark, or runs as one of them under mpirun:
``mpirun -n 2 python -m syncbn.cli.bench collectives``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table

from syncbn.bench.ranks import exec_mpirun
from syncbn.bench.report import Benchmark, Report, machine_facts
from syncbn.cli import config_path
from syncbn.cli.signals import deferred_termination
from syncbn.distributed.launchers import is_multi_process
from syncbn.files import atomic_write

_CONFIGS = Path(config_path()) / "bench"
_USAGE = """\
syncbn-bench NAME [KEY=VALUE ...]  measure: starts the ranks, or under mpirun is one of them
syncbn-bench NAME --help           the settings
"""
_WRONG_USE = 2
# Width of texts, and largest width of tables.
_COLUMNS, _WIDEST = 100, 160


def names() -> list[str]:
    """Return the names of the benchmarks: a config in ``configs/bench`` is a benchmark."""
    return sorted(path.stem for path in _CONFIGS.glob("*.yaml"))


def compose_benchmark(name: str, overrides: list[str]) -> Benchmark:
    """Return a benchmark with its settings.

    Args:
        name: name of the benchmark.
        overrides: ``KEY=VALUE`` in the grammar of hydra.

    Raises:
        ValueError: unknown benchmark or key, or a value of the wrong type or range.
    """
    _check_name(name)
    try:
        with initialize_config_dir(config_dir=str(_CONFIGS), version_base="1.3"):
            composed = compose(name, overrides=overrides)
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        typed = OmegaConf.structured(get_class(plain.pop("_target_")))
        benchmark = OmegaConf.to_object(OmegaConf.merge(typed, OmegaConf.create(plain)))
    except HydraException as error:
        raise ValueError(f"{_first_line(error)} (syncbn-bench {name} --help)") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(benchmark, Benchmark)
    return benchmark


def show(report: Report) -> None:
    """Print a report."""
    # Open MPI gives each rank a terminal of a different width than the user's.
    columns = int(os.environ.get("COLUMNS", _WIDEST))
    console = Console(width=columns, color_system=None, highlight=False)
    text = min(columns, _COLUMNS)
    facts = Table(show_header=False, box=None)
    for name, value in report.facts.items():
        facts.add_row(name, value)
    console.print(facts)
    for table in report.tables:
        console.print()
        console.print(table.title, width=text)
        drawn = Table(box=box.SIMPLE_HEAD)
        for number, heading in enumerate(table.columns):
            drawn.add_column(heading, justify="right" if number else "left")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
        for note in table.notes:
            console.print(note, width=text)


def write(report: dict[str, Any], path: Path) -> None:
    """Write JSON atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(report, indent=2, default=asdict) + "\n").encode())


def run(name: str, benchmark: Benchmark) -> None:
    """Measure; print the report of rank 0, and write it to the file of ``json=``."""
    report = benchmark.run()
    report.facts = {**machine_facts(), **report.facts}
    if dist.is_initialized():
        # Gloo may abort a process that exits during its work for another rank.
        dist.barrier()
    if not dist.is_initialized() or dist.get_rank() == 0:
        show(report)
        if benchmark.json is not None:
            header = {"benchmark": name, "settings": benchmark, "facts": report.facts}
            with deferred_termination():
                write({**header, "results": report.results}, Path(benchmark.json))
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Run the benchmark that the command line names."""
    match sys.argv[1:]:
        case [] | ["-h" | "--help"]:
            print(f"{_USAGE}\nBenchmarks:\n{_list_benchmarks()}")
        case [name, "-h" | "--help"]:
            with _user_errors():
                _check_name(name)
            print((_CONFIGS / f"{name}.yaml").read_text(), end="")
        case [name, *overrides]:
            with _user_errors():
                benchmark = compose_benchmark(name, overrides)
                if benchmark.ranks > 1 and not is_multi_process(os.environ):
                    exec_mpirun(benchmark.ranks)
            run(name, benchmark)


def _check_name(name: str) -> None:
    if name not in names():
        raise ValueError(f"got benchmark {name!r}; expected one of\n{_list_benchmarks()}")


def _list_benchmarks() -> str:
    """Return a line per benchmark: its name and the first line of its config."""
    lines = ((name, (_CONFIGS / f"{name}.yaml").read_text().splitlines()[0]) for name in names())
    return "\n".join(f"  {name:<13}{line.removeprefix('# ')}" for name, line in lines)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def _user_errors() -> Iterator[None]:
    # Without a traceback: the message names the remedy.
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        print(f"syncbn-bench: {error}", file=sys.stderr)
        sys.exit(_WRONG_USE)


if __name__ == "__main__":
    main()
