"""`syncbn-recalibrate`: replace the running statistics in a checkpoint, and only these.

For one process, or for every rank of a job: ``launch/torchrun.sh -m syncbn.cli.recalibrate ...``,
or mpirun.sh. ``configs/recalibrate.yaml`` explains the settings.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import syncbn
from syncbn.calibration.checkpoint import Checkpoint, StateDict, read_checkpoint, require_output
from syncbn.calibration.display import escape_controls, render_metrics
from syncbn.calibration.evaluate import evaluate
from syncbn.calibration.ranks import Ranks
from syncbn.cli import config_path
from syncbn.cli.signals import deferred_termination
from syncbn.distributed.groups import active_group
from syncbn.files import atomic_write, require_file

_EXIT_CODE = 2
# Settings with names of further output files.
_REPORTS = ("report", "plot", "between")


def run(config: DictConfig, info: syncbn.RankInfo) -> None:
    """Recalibrate; rank 0 prints the report and writes the files.

    Every step ends on all ranks before the next begins, so an error on one rank ends all.

    Raises:
        ValueError: bad input on this rank.
        RuntimeError: another rank has failed.
    """
    ranks = Ranks(active_group(None), info.device)
    checkpoint = ranks.run_on_all_ranks(lambda: _open_checkpoint(config))
    model = ranks.run_on_all_ranks(lambda: _make_model(config))
    state = ranks.run_on_all_ranks(lambda: _load_weights(checkpoint, model, config))
    model.to(info.device)
    batches = ranks.run_on_all_ranks(lambda: instantiate(config.data))
    measure = ranks.run_on_all_ranks(
        lambda: _make_measurement(config, model, batches, ranks, info.device)
    )
    layers, skip = ranks.run_on_all_ranks(
        lambda: (_get_names(config, "layers"), _get_names(config, "skip"))
    )
    before = measure()
    report = syncbn.recalibrate(
        model,
        batches,
        method=config.method,
        layers=layers,
        skip=skip,
        num_samples=config.num_samples,
        max_bytes=config.max_bytes,
    )
    after = measure()
    if info.rank == 0:
        print(report.table())
        if config.evaluate:
            print(render_metrics(before, after))

    def finish() -> None:
        if info.rank == 0:
            with deferred_termination():
                _write_files(config, report, checkpoint, state, model)

    ranks.run_on_all_ranks(finish, "the output")


def _open_checkpoint(config: DictConfig) -> Checkpoint:
    """Read the checkpoint and check the names of all output files."""
    source = Path(config.checkpoint)
    checkpoint = read_checkpoint(source)
    taken = {source.resolve(): "checkpoint"}
    if config.output is not None:
        require_output(source, Path(config.output), config.overwrite)
        taken[Path(config.output).resolve()] = "output"
    elif not config.dry_run:
        raise ValueError("got no output=; expected the file to write, or dry_run=true")
    for name in _REPORTS:
        if config[name] is None:
            continue
        path = Path(config[name])
        require_file(path)
        if (other := taken.setdefault(path.resolve(), name)) != name:
            raise ValueError(f"{name}: got {path}, which is the {other}; expected another file")
    if config.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("plot: needs matplotlib: pip install matplotlib")
    return checkpoint


def _make_model(config: DictConfig) -> nn.Module:
    """Return the network of the setting ``model``, in evaluation mode."""
    model: Any = instantiate(config.model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got a {type(model).__name__}; expected a torch.nn.Module")
    return model.eval()


def _load_weights(checkpoint: Checkpoint, model: nn.Module, config: DictConfig) -> StateDict:
    state = checkpoint.find(model, config.state_dict)
    state.load_into(model)
    return state


def _get_names(config: DictConfig, setting: str) -> list[str] | None:
    """Return the names in a setting: None, one name or a list."""
    value = config[setting]
    if value is None:
        return None
    names = list(value) if isinstance(value, ListConfig) else [value]
    for name in names:
        if isinstance(name, float):  # YAML has lost digits, such as of 3.10
            raise ValueError(
                f"{setting}: got the number {name}; expected names, in quotes if they look like "
                f"numbers: '{setting}=[\"3.10\"]'"
            )
    return [str(name) for name in names]  # the children of nn.Sequential are integers


def _make_measurement(
    config: DictConfig, model: nn.Module, batches: Any, ranks: Ranks, device: torch.device
) -> Callable[[], dict[str, float]]:
    """Return a function that evaluates ``metric``; an empty result if ``evaluate`` is false."""
    if not config.evaluate:
        return dict
    metric = instantiate(config.metric)
    chosen = batches if config.evaluation is None else instantiate(config.evaluation)
    if isinstance(chosen, Iterator):
        raise ValueError(
            f"evaluate: got a one-shot {type(chosen).__name__}, which cannot be read before and "
            "after; expected a list, a DataLoader or another iterable that can be read again"
        )
    return lambda: evaluate(model, chosen, metric, ranks, device)


def _write_files(
    config: DictConfig,
    report: syncbn.CalibrationReport,
    checkpoint: Checkpoint,
    state: StateDict,
    model: nn.Module,
) -> None:
    """Write all output files of the settings, the checkpoint last."""

    def save_between(path: Path) -> None:
        with atomic_write(path) as file:
            torch.save(report.between(), file)

    writers = {"report": report.save, "plot": report.plot, "between": save_between}
    if not config.dry_run:
        state.replace_running_stats(model)
        writers["output"] = partial(checkpoint.write, overwrite=config.overwrite)
    for name, write in writers.items():
        if (path := config[name]) is not None:
            try:
                write(Path(path))
            except (OSError, RuntimeError, ImportError) as error:  # torch raises RuntimeError
                raise ValueError(f"{path}: cannot be written: {error}") from error
    if not config.dry_run:
        print(escape_controls(f"written: {config.output} ({state.describe()})"))


def add_to_path(folder: Path) -> None:
    """Append a folder to the module path, after the standard library and the packages.

    A downloaded checkpoint may lie beside a ``safetensors.py``, which must not run in place of the
    package. ``python -m`` puts the current folder first, so this entry is removed, after the
    imports of this module; an entry of PYTHONPATH remains.
    """
    here = str(Path.cwd())
    if sys.path[0] in ("", here) and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.path.append(str(folder.absolute()))


@hydra.main(version_base="1.3", config_path=config_path(), config_name="recalibrate")
def main(config: DictConfig) -> None:
    """Recalibrate the checkpoint of the command line."""
    try:
        info = syncbn.init_process_group(config.backend)
    except (ValueError, RuntimeError, ImportError) as error:
        _exit(error)
    config.rank, config.world_size = info.rank, info.world_size
    add_to_path(Path(config.path))
    try:
        run(config, info)
    except (InstantiationException, OmegaConfBaseException) as error:
        _exit(error.__cause__ or error)
    except (
        *(ValueError, TypeError, LookupError, ImportError),
        *(OSError, MemoryError, RuntimeError),
    ) as error:
        _exit(error)
    dist.barrier()
    dist.destroy_process_group()


def _exit(error: BaseException) -> NoReturn:
    # No traceback: the message is enough. The message of a KeyError is only the key.
    kind = f"{type(error).__name__}: " if isinstance(error, LookupError) else ""
    message = escape_controls(f"{kind}{error}", keep="\n\t")
    sys.stderr.write(f"syncbn-recalibrate: {message}\n")
    sys.exit(_EXIT_CODE)


if __name__ == "__main__":
    main()
