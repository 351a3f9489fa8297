"""Checkpoints within an epoch: signals of a scheduler, and the clock, agreed on by all ranks.

A scheduler may signal one rank only, or ranks at different steps, but every rank must save after
the same step. So a handler only records its signal, and one all-reduce per step spreads it. To save
in the handler, as some trainers do, would start collectives within another collective.
"""

import math
import os
import signal
import threading
import time
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist


class Request(IntEnum):
    """Reason for a checkpoint; among several, the highest one applies."""

    NONE = 0
    SAVE = 1
    END = 2
    REQUEUE = 3


_SIGNALS = {signal.SIGTERM: Request.END, signal.SIGUSR1: Request.REQUEUE}
#: Exit code after SIGUSR1, EX_TEMPFAIL of sysexits.h: the job should run again.
REQUEUE_CODE = 75


class Preemption:
    """Requests to save and to end the run.

    Attributes:
        agreed: highest request so far that all ranks have received.
    """

    def __init__(self) -> None:
        self.agreed = Request.NONE
        self._received = Request.NONE
        self._seconds = math.inf
        self._saved_at = time.monotonic()
        self._in_flight: tuple[dist.Work | None, torch.Tensor] | None = None

    def record_signals(self) -> None:
        """Record SIGTERM and SIGUSR1 of this process from now on, instead of ending it."""
        for number in _SIGNALS:
            signal.signal(number, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received = max(self._received, _SIGNALS[signal.Signals(number)])

    def start_clock(self, every_minutes: float | None) -> None:
        """Request a checkpoint whenever so many minutes have passed; None for never."""
        self._seconds = math.inf if every_minutes is None else 60 * every_minutes
        self.restart_clock()

    def agree(self, device: torch.device) -> Request:
        """Return the highest request of any rank one step ago; a collective, once per step.

        The all-reduce runs during the next step: its result would otherwise be a wait for the GPU.

        Args:
            device: device of the model.
        """
        previous = self.wait()
        request = self._received
        # One clock decides, or every rank would request a checkpoint at another step.
        if dist.get_rank() == 0 and time.monotonic() - self._saved_at >= self._seconds:
            request = max(request, Request.SAVE)
            self.restart_clock()
        flag = torch.tensor(int(request), device=device)
        self._in_flight = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True), flag
        return previous

    def wait(self) -> Request:
        """Return the result of the all-reduce in flight, on all ranks."""
        if self._in_flight is None:
            return Request.NONE
        work, flag = self._in_flight
        if work is not None:
            work.wait()
        self._in_flight = None
        request = Request(int(flag.item()))
        self.agreed = max(self.agreed, request)
        return request

    def restart_clock(self) -> None:
        """Count the time until the next checkpoint from now."""
        self._saved_at = time.monotonic()

    @property
    def ends(self) -> bool:
        """Whether the run ends before its last step."""
        return self.agreed >= Request.END

    @property
    def exit_code(self) -> int:
        """Exit code of the program: 0, or `REQUEUE_CODE` after SIGUSR1."""
        return REQUEUE_CODE if self.agreed is Request.REQUEUE else 0


def shield_loader_worker(_: int) -> None:
    """Ignore the scheduler's signals in a worker of a data loader; its argument `worker_init_fn`.

    SLURM signals every process of a job, and a rank whose loader has lost a worker cannot finish
    its step. SIGTERM from the rank itself still ends the worker: Python sends it at exit, then
    waits.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Threads that start later inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_rank, args=(os.getppid(),), daemon=True).start()


def _end_with_rank(rank: int) -> None:
    while True:
        # A handler would not learn the sender.
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == rank:
            os._exit(0)
