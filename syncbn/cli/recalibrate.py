"""`syncbn-recalibrate`: replace the running statistics in a checkpoint, and nothing else in it.

Alone, or on every rank of a job: ``launch/torchrun.sh -m syncbn.cli.recalibrate ...``, or with
mpirun.sh. The settings are explained in ``configs/recalibrate.yaml``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hydra
import torch.distributed as dist
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import syncbn
from syncbn.calibration.checkpoint import Checkpoint, StateDict, read_checkpoint, require_output
from syncbn.cli import config_path

_WRONG_USE = 2


def load(config: DictConfig, place: syncbn.RankInfo) -> tuple[Checkpoint, StateDict, nn.Module]:
    """Return the checkpoint, the state dict in it that fits, and the network with its weights.

    Raises:
        ValueError: the checkpoint cannot be read or does not fit, or the output is refused.
    """
    source = Path(config.checkpoint)
    checkpoint = read_checkpoint(source)
    if config.output is not None:
        require_output(source, Path(config.output), config.overwrite)
    elif not config.dry_run:
        raise ValueError("got no output=; expected the file to write, or dry_run=true")
    model: Any = instantiate(config.model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got a {type(model).__name__}; expected a torch.nn.Module")
    state = checkpoint.find(model, config.state_dict)
    state.load_into(model)
    return checkpoint, state, model.to(place.device)


def run(config: DictConfig, place: syncbn.RankInfo) -> None:
    """Recalibrate; rank 0 prints the report and writes the files.

    Raises:
        ValueError: bad input, or a file that rank 0 cannot write; on every rank.
    """
    checkpoint, state, model = load(config, place)
    report = syncbn.recalibrate(
        model,
        instantiate(config.data),
        method=config.method,
        num_samples=config.num_samples,
        max_bytes=config.max_bytes,
    )
    problem = [""]
    if place.rank == 0:
        print(report.table())
        try:
            write(config, report, checkpoint, state, model)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            problem = [f"{config.output}: cannot be written: {error}"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise ValueError(problem[0])


def write(
    config: DictConfig,
    report: syncbn.CalibrationReport,
    checkpoint: Checkpoint,
    state: StateDict,
    model: nn.Module,
) -> None:
    """Write the files that the settings ask for, the checkpoint last."""
    if config.report is not None:
        report.save(config.report)
    if config.plot is not None:
        report.plot(config.plot)
    if not config.dry_run:
        state.take_statistics(model)
        checkpoint.write(Path(config.output), config.overwrite)
        print(f"written: {config.output}")


@hydra.main(version_base="1.3", config_path=config_path(), config_name="recalibrate")
def main(config: DictConfig) -> None:
    """Recalibrate the checkpoint that the command line names."""
    place = syncbn.init_process_group(config.backend)
    config.rank, config.world_size = place.rank, place.world_size
    try:
        run(config, place)
    except (ValueError, TypeError, ImportError, OSError, MemoryError, RuntimeError) as error:
        _exit(error)
    except (InstantiationException, OmegaConfBaseException) as error:
        _exit(error.__cause__ or error)
    dist.barrier()
    dist.destroy_process_group()


def _exit(error: BaseException) -> None:
    # Without a traceback: the message says what to do.
    sys.stderr.write(f"syncbn-recalibrate: {error}\n")
    sys.exit(_WRONG_USE)


if __name__ == "__main__":
    main()
