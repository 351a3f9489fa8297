"""Save and restore the state of a training run, so that a resumed run continues exactly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from consistency import raise_on_all_ranks
from group_statistics import load_buffers, merged_statistics
from meter import Meter
from storage import load
from torch import nn
from weights import load_weights

_KEYS = {"model", "optimizer", "scaler", "step", "steps_per_epoch", "best_accuracy", "ranks"}


@dataclass
class TrainState:
    """All that changes while training.

    ``step`` is the whole position: the epoch, the place in it, the order of samples and their
    augmentation, and the learning rate are functions of it. Python's and numpy's global random
    numbers are used nowhere in the example; torch's are saved for each rank.

    Attributes:
        net: the network, not wrapped in DDP.
        meter: this rank's training loss and accuracy in the epoch so far.
        step: optimizer steps done.
        evaluated: step of the last evaluation.
        steps_per_epoch: optimizer steps in an epoch; a checkpoint fits only equal numbers.
        best_accuracy: highest test accuracy so far, -1 before the first.
    """

    net: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    meter: Meter
    steps_per_epoch: int
    step: int = 0
    evaluated: int = 0
    best_accuracy: float = -1.0

    @property
    def epoch(self) -> float:
        """Epochs done, as a fraction in the middle of one."""
        return self.step / self.steps_per_epoch

    def awaits_evaluation(self, last_step: int) -> bool:
        """Return whether an epoch or the run has its last step, but not its evaluation."""
        at_end = self.step % self.steps_per_epoch == 0 or self.step >= last_step
        return at_end and self.evaluated < self.step

    def is_complete(self, last_step: int) -> bool:
        """Return whether the run has its last step and evaluation."""
        return self.step >= last_step and not self.awaits_evaluation(last_step)


def capture(state: TrainState) -> dict[str, Any]:
    """Collect a checkpoint from all ranks; a collective.

    Returns:
        Dicts and lists of tensors, numbers and strings, for `torch.load(weights_only=True)`.
    """
    ranks: list[Any] = [None] * dist.get_world_size()
    device = state.meter.sums.device
    mine: dict[str, Any] = {"rng": torch.get_rng_state(), "meter": state.meter.sums.cpu()}
    if device.type == "cuda":
        mine["cuda_rng"] = torch.cuda.get_rng_state(device)
    model = state.net.state_dict()
    with merged_statistics(state.net) as own:
        if own:
            # The state dict shares the buffers, which are this rank's own again after the body.
            model.update({name: buffer.clone() for name, buffer in state.net.named_buffers()})
            mine["buffers"] = {name: buffer.cpu() for name, buffer in own.items()}
    dist.all_gather_object(ranks, mine)
    return {
        "model": model,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "step": state.step,
        "evaluated": state.evaluated,
        "steps_per_epoch": state.steps_per_epoch,
        "best_accuracy": state.best_accuracy,
        "ranks": ranks,
    }


def restore(state: TrainState, path: Path) -> None:
    """Continue from a checkpoint; a collective.

    Hyper-parameters of the optimizer are not restored: the configuration takes precedence, so that
    changing one for the rest of a run has an effect.

    Args:
        state: changed in place.
        path: file with the result of `capture`, readable on every rank.

    Raises:
        ValueError: the file is unreadable, has another architecture, or another number of ranks
            or steps per epoch. Every rank raises if one does.
    """
    with raise_on_all_ranks():
        saved = load(path)
        missing = sorted(_KEYS - saved.keys())
        if missing:
            raise ValueError(f"{path}: has no {', '.join(missing)}; expected a training checkpoint")
        rank, world_size = dist.get_rank(), dist.get_world_size()
        got = (len(saved["ranks"]), saved["steps_per_epoch"])
        if got != (world_size, state.steps_per_epoch):
            raise ValueError(
                f"{path}: got a run of {got[0]} ranks and {got[1]} steps an epoch, expected "
                f"{world_size} and {state.steps_per_epoch}: an exact resume needs the same ranks, "
                "batch size and data (use model.weights to start a new run from these weights)"
            )
        load_weights(state.net, saved["model"], path)
        load_buffers(state.net, saved["ranks"][rank].get("buffers", {}))
        _load_optimizer(state.optimizer, saved["optimizer"], path)
        state.scaler.load_state_dict(saved["scaler"])
        state.step, state.best_accuracy = saved["step"], saved["best_accuracy"]
        # Older checkpoints were written after evaluations only.
        state.evaluated = saved.get("evaluated", state.step)
        mine = saved["ranks"][rank]
        state.meter.sums.copy_(mine["meter"])
        torch.set_rng_state(mine["rng"])
        if "cuda_rng" in mine and state.meter.sums.is_cuda:
            torch.cuda.set_rng_state(mine["cuda_rng"], state.meter.sums.device)


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: Path) -> None:
    """Load the momenta, and leave the hyper-parameters as they are."""
    groups = optimizer.state_dict()["param_groups"]
    got, expected = ([len(g["params"]) for g in gs] for gs in (saved["param_groups"], groups))
    # Parameters are numbered, not named: with other groups momenta would reach other parameters.
    if got != expected:
        raise ValueError(
            f"{path}: got an optimizer with groups of {got} parameters, expected {expected}; "
            "resume with the norm and optimizer.decay_norm_and_bias that the run began with"
        )
    optimizer.load_state_dict({**saved, "param_groups": groups})
