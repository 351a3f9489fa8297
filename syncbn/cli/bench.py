"""`syncbn-bench NAME [KEY=VALUE ...]`: measure what this library costs on this machine.

Starts the ranks that a benchmark needs; under mpirun it is one of them:
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
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table

from syncbn.bench.mpirun import become_mpirun
from syncbn.bench.report import Benchmark, Report
from syncbn.cli import config_path
from syncbn.cli.signals import deferred_termination
from syncbn.distributed.launchers import is_multi_process
from syncbn.files import replacing

_CONFIGS = Path(config_path()) / "bench"
_USAGE = """\
syncbn-bench NAME [KEY=VALUE ...]  measure: starts the ranks, or under mpirun is one of them
syncbn-bench NAME --help           the settings
"""
_WRONG_USE = 2
# Of texts, and at most of tables.
_COLUMNS, _WIDEST = 100, 160


def benchmark_class(name: str) -> type[Benchmark]:
    """Return a benchmark by its name, which is also that of its config.

    Raises:
        ValueError: there is none of that name.
    """
    match name:
        case "collectives":
            from syncbn.bench.collectives import Collectives

            return Collectives
        case "calibration":
            from syncbn.bench.calibration import Calibration

            return Calibration
        case "compile":
            from syncbn.bench.compile_time import CompileTime

            return CompileTime
        case "layers":
            from syncbn.bench.layers import Layers

            return Layers
        case "model":
            from syncbn.bench.model import Model

            return Model
    raise ValueError(f"got benchmark {name!r}; expected one of\n{_list()}")


def settle(name: str, overrides: list[str]) -> Benchmark:
    """Return a benchmark with its settings.

    Args:
        name: of the benchmark.
        overrides: ``KEY=VALUE``, in hydra's grammar.

    Raises:
        ValueError: no such benchmark or key, or a value of the wrong type or range.
    """
    kind = benchmark_class(name)
    try:
        with initialize_config_dir(config_dir=str(_CONFIGS), version_base="1.3"):
            composed = compose(name, overrides=overrides)
        plain: Any = OmegaConf.to_container(composed, resolve=True)
        typed = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(plain))
        benchmark = OmegaConf.to_object(typed)
    except HydraException as error:
        raise ValueError(f"{_first_line(error)} (syncbn-bench {name} --help)") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(benchmark, Benchmark)
    return benchmark


def show(report: Report) -> None:
    """Print a report."""
    # Open MPI gives the ranks terminals of their own: theirs says nothing about the user's.
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


def write(found: dict[str, Any], path: Path) -> None:
    """Write JSON; the file is there whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(found, indent=2, default=asdict) + "\n").encode())


def run(name: str, benchmark: Benchmark) -> None:
    """Measure; print, and write where ``json=`` says, what rank 0 found."""
    report = benchmark.run()
    if not dist.is_initialized() or dist.get_rank() == 0:
        show(report)
        if benchmark.json is not None:
            about = {"benchmark": name, "settings": benchmark, "facts": report.facts}
            with deferred_termination():
                write({**about, "results": report.results}, Path(benchmark.json))
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Run the benchmark that the command line names."""
    match sys.argv[1:]:
        case [] | ["-h" | "--help"]:
            print(f"{_USAGE}\nBenchmarks:\n{_list()}")
        case [name, "-h" | "--help"]:
            with _errors_of_the_user():
                benchmark_class(name)
            print((_CONFIGS / f"{name}.yaml").read_text(), end="")
        case [name, *overrides]:
            with _errors_of_the_user():
                benchmark = settle(name, overrides)
                if benchmark.ranks > 1 and not is_multi_process(os.environ):
                    become_mpirun(benchmark.ranks)
            run(name, benchmark)


def _list() -> str:
    """Return a line for each benchmark: its name and the first line of its config."""
    lines = []
    for path in sorted(_CONFIGS.glob("*.yaml")):
        about = path.read_text().splitlines()[0].removeprefix("# ")
        lines.append(f"  {path.stem:<13}{about}")
    return "\n".join(lines)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def _errors_of_the_user() -> Iterator[None]:
    # Without a traceback: the message says what to do.
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        print(f"syncbn-bench: {error}", file=sys.stderr)
        sys.exit(_WRONG_USE)


if __name__ == "__main__":
    main()
