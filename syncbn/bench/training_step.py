"""A training step of a synchronized network with DDP: on mpi4py, on Gloo, and with no one else.

The difference to the last is the time that synchronization takes: batch norm's messages, DDP's, and
waiting for the slower rank.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn.bench.mpirun import meeting, slowest
from syncbn.bench.report import Table
from syncbn.bench.resnet20 import CLASSES, resnet20
from syncbn.bench.sgd import training_step
from syncbn.bench.timing import Spread, Times, take_turns
from syncbn.distributed.groups import resolve_group
from syncbn.nn.conversion import convert_sync_batchnorm

_MILLISECOND = 1e-3
# Of a core. A round whose local step had less was disturbed by other programs, and differences to
# it say nothing; which rounds count does not depend on the transports.
_UNDISTURBED = 0.95


@dataclass(frozen=True)
class TrainingStep:
    """What was found; times in seconds, on the slowest rank.

    Attributes:
        messages: a step, by collective.
        rounds: how many were measured.
        undisturbed: how many of them count, if there are any; else all do.
        cpu_share: of a core, that the local step had in each round.
        local: the step without communication.
        mpi4py: the step on mpi4py.
        gloo: the step on Gloo.
        synchronization: by transport, how much longer its step took than the local one.
        ratio: of the medians of synchronization, mpi4py / gloo.
    """

    messages: dict[str, int]
    rounds: int
    undisturbed: int
    cpu_share: Spread
    local: Spread
    mpi4py: Spread
    gloo: Spread
    synchronization: dict[str, Spread]
    ratio: float


def measure(batch: int, steps: int, gloo: dist.ProcessGroup) -> TrainingStep:
    """Time training steps of ResNet-20; every rank must call this.

    Args:
        batch: random images of 32x32 pixels a rank.
        steps: steps on each transport.
        gloo: all ranks; the default group is mpi4py's.
    """
    torch.manual_seed(0)
    network = resnet20()
    torch.manual_seed(1 + dist.get_rank())
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(CLASSES, (batch,))
    alone = resolve_group(1)
    calls = {
        "local": training_step(_synchronized(network, alone), images, labels),
        "mpi4py": training_step(_parallel(network, dist.group.WORLD), images, labels),
        "gloo": training_step(_parallel(network, gloo), images, labels),
    }
    times = take_turns(calls, steps, meet=meeting())
    return _compared(times, _messages(calls["gloo"]))


def table(found: TrainingStep, batch: int) -> Table:
    """Return what :func:`measure` found as a table."""
    rows = [["none", found.local.text(_MILLISECOND), ""]]
    for name, step in (("mpi4py", found.mpi4py), ("gloo", found.gloo)):
        wait = found.synchronization[name]
        rows.append([name, step.text(_MILLISECOND), wait.text(_MILLISECOND)])
    messages = ", ".join(f"{count} {name}" for name, count in found.messages.items())
    return Table(
        f"Training step of ResNet-20 with DDP, {batch} images a rank, milliseconds: median "
        "(10th..90th percentile)",
        ["transport", "step", "synchronization"],
        rows,
        [
            "Synchronization: step minus the step without communication of the same round. "
            f"mpi4py / gloo: {found.ratio:.2f}.",
            f"Messages a step: {messages}. Each batch-norm layer sends two, DDP the others.",
            _which_rounds_count(found),
        ],
    )


def _compared(times: Mapping[str, Times], messages: dict[str, int]) -> TrainingStep:
    share = times["local"].cpu / times["local"].wall
    dist.all_reduce(share, dist.ReduceOp.MIN)
    undisturbed = share >= _UNDISTURBED
    counted = undisturbed if undisturbed.any() else torch.ones_like(undisturbed)
    local, mpi4py, gloo = (
        slowest(times[name].wall)[counted] for name in ("local", "mpi4py", "gloo")
    )
    waits = {"mpi4py": Spread.of(mpi4py - local), "gloo": Spread.of(gloo - local)}
    return TrainingStep(
        messages,
        rounds=len(share),
        undisturbed=int(undisturbed.sum()),
        cpu_share=Spread.of(share),
        local=Spread.of(local),
        mpi4py=Spread.of(mpi4py),
        gloo=Spread.of(gloo),
        synchronization=waits,
        ratio=waits["mpi4py"].median / waits["gloo"].median,
    )


def _which_rounds_count(found: TrainingStep) -> str:
    undisturbed, rounds = found.undisturbed, found.rounds
    quiet = f"the step without communication had at least {_UNDISTURBED:.0%} of a core"
    text = f"{undisturbed} of {rounds} rounds count: in them {quiet}."
    if not undisturbed:
        text = f"All {rounds} rounds count, as there is none in which {quiet}."
    if 2 * undisturbed < rounds:
        text += " OTHERS USE THIS MACHINE: the differences say little."
    return text


def _synchronized(network: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    return convert_sync_batchnorm(copy.deepcopy(network), group)


def _parallel(network: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    return DistributedDataParallel(_synchronized(network, group), process_group=group)


def _messages(step: Callable[[], None]) -> dict[str, int]:
    with _Collectives() as seen:
        step()
    return dict(seen.counts.most_common())


class _Collectives(TorchDispatchMode):
    """Counts the collectives of torch's own process groups; those in Python do not come by here."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__.strip("_")] += 1
        return func(*args, **(kwargs or {}))
