"""torchrun for jobs that a scheduler may end: passes signals on, and ends with a rank's exit code.

torchrun itself ends with 1 after SIGTERM, also if every rank has saved and ended with 0. SIGUSR1
kills it, and after a failure its exit code is always 1.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

#: Linux lists the processes that this thread has started; elsewhere torchrun is unchanged.
_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")
#: Seconds from SIGTERM until the ranks are killed.
_GRACE = float(os.environ.get("GRACE", "30"))


def forward(number: int, frame: FrameType | None) -> None:
    """Send a signal to the ranks and wait for their end; then end, unless all have succeeded.

    To return at once would let torchrun restart ranks (``--max-restarts``) that end on purpose.
    """
    ranks = [int(pid) for pid in _CHILDREN.read_text().split()]
    if not ranks:
        sys.exit(128 + number)
    for rank in ranks:
        os.kill(rank, number)
    deadline = time.monotonic() + _GRACE
    codes = [exit_code(rank) for rank in ranks]
    while None in codes and time.monotonic() < deadline:
        time.sleep(0.1)
        codes = [exit_code(rank) for rank in ranks]
    if number == signal.SIGTERM:
        for rank, code in zip(ranks, codes, strict=True):
            if code is None:
                os.killpg(rank, signal.SIGKILL)  # torchrun gives each rank a process group
        codes = [128 + signal.SIGKILL if code is None else code for code in codes]
    if None not in codes and any(codes):
        sys.exit(next(code for code in codes if code))


def exit_code(rank: int) -> int | None:
    """Return the exit code of a rank, 128 + n after signal n; None while it runs."""
    # Without WNOWAIT, torchrun would miss the end.
    ended = os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128)


if __name__ == "__main__":
    handled = []
    if _CHILDREN.exists():
        signal.signal(signal.SIGTERM, forward)
        signal.signal(signal.SIGUSR1, forward)
        handled = ["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"]
    try:
        main([*handled, *sys.argv[1:]])
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)
