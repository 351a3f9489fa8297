"""RunningNorm over a stream on three uneven ranks, with a real kill and a resume in between.

``python -m tests.running_norm_stream 1000000 openmpi`` prints the error against the concatenated
stream. Over Gloo an update takes milliseconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn.files import atomic_write
from tests import transports

RANKS, FEATURES = 3, 2
# The checkpoints of a run; the ranks are killed after the second.
NUM_CHECKPOINTS = 4


def samples(rank: int, first: int, updates: int) -> list[Tensor]:
    """Return the batches of a rank: up to three samples, far from zero, often none."""
    generator = torch.Generator().manual_seed(1000 * first + rank)
    sizes = torch.randint(0, 4, (updates,), generator=generator)
    shape = int(sizes.sum()), FEATURES
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 100 * (rank + 1)
    return list(values.split(sizes.tolist()))


def run_rank(folder: Path, updates: int) -> None:
    """Create a group, and learn."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    if "RANK" in os.environ:
        rank = int(os.environ["RANK"])
        store = dist.FileStore(str(folder / f"store {os.environ['ATTEMPT']}"), RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
    else:
        rank = syncbn.init_process_group("mpi4py", timeout).rank
    learn(rank, folder, updates)
    dist.destroy_process_group()


def learn(rank: int, folder: Path, updates: int) -> None:
    """Learn from the last checkpoint on, and write one after each part of the stream."""
    norm = syncbn.RunningNorm(FEATURES)
    done = sorted(folder.glob("part*.pt"))
    if done:
        norm.load_state_dict(torch.load(done[-1]))
    for part in range(len(done), NUM_CHECKPOINTS):
        for batch in samples(rank, part, updates // NUM_CHECKPOINTS):
            norm.update(batch)
        if rank == 0:
            with atomic_write(folder / f"part{part}.pt") as file:
                torch.save(norm.state_dict(), file)


def run_stream(
    folder: Path, updates: int, timeout: float, transport: str = "gloo"
) -> dict[str, Tensor]:
    """Run the ranks, kill them once, and return the final state."""
    deadline = time.monotonic() + timeout
    for attempt in range(2):
        program = "-m", "tests.running_norm_stream", folder, str(updates)
        variables = {"ATTEMPT": str(attempt)}
        ranks = transports.start(transport, RANKS, program, variables=variables)
        try:
            while any(process.poll() is None for process in ranks):
                assert time.monotonic() < deadline, "the ranks take too long"
                if attempt == 0 and len([*folder.glob("part*.pt")]) >= 2:
                    break
                time.sleep(0.001)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.wait()
    (last,) = folder.glob(f"part{NUM_CHECKPOINTS - 1}.pt")
    state: dict[str, Tensor] = torch.load(last)
    return state


def largest_error(state: dict[str, Tensor], updates: int) -> float:
    """Return the error of mean and variance against the concatenated stream, relative."""
    parts = range(NUM_CHECKPOINTS)
    size = updates // NUM_CHECKPOINTS
    stream = torch.cat([b for part in parts for r in range(RANKS) for b in samples(r, part, size)])
    expected = stream.mean(0), stream.var(0, correction=0)
    actual = state["mean"], state["var"]
    pairs = zip(actual, expected, strict=True)
    return max(float(((a - b) / b).abs().max()) for a, b in pairs)


def main() -> None:
    if "ATTEMPT" in os.environ:
        run_rank(Path(sys.argv[1]), int(sys.argv[2]))
        return
    updates = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        transport = sys.argv[2] if len(sys.argv) > 2 else "gloo"
        state = run_stream(Path(folder), updates, 3600.0, transport)
        seconds = time.monotonic() - start
    print(f"{updates} updates, {seconds:.0f} s: error {largest_error(state, updates):.1e}")


if __name__ == "__main__":
    main()
