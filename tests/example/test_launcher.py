"""launch/torchrun.sh: one node or many, the same numbers."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.example.support import PROGRAM, TINY, checkpoint, entries, finish, start, write_cifar

# Two samples a rank and five steps an epoch; the third and last step ends in evaluation.
STEPS = [*TINY, "data=cifar10", "data.batch_size=2", "data.workers=0", "dtype=float64"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_two_nodes_of_two_ranks_train_as_one_node_of_four(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data")
    train = [PROGRAM, *STEPS, f"data.root={tmp_path / 'data'}", "max_steps=3", "norm=sync"]
    one, two = tmp_path / "one", tmp_path / "two"
    single = start(*train, f"run_dir={one}", cwd=tmp_path, NPROC=4)
    output = finish(single)
    assert single.returncode == 0, output
    nodes = {"NPROC": 2, "NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    pair = [
        start(*train, f"run_dir={two}", cwd=tmp_path, NODE_RANK=node, **nodes) for node in (0, 1)
    ]
    output = finish(*pair)
    assert [job.returncode for job in pair] == [0, 0], output
    got, expected = ([entry["loss"] for entry in entries(run, "step")] for run in (two, one))
    assert len(got) == 3
    assert got == pytest.approx(expected, abs=1e-10)
    assert len(checkpoint(two)["ranks"]) == 4


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": 2}, "NODE_RANK: NNODES=2 needs the number of this node"),
        ({"NNODES": 2, "NODE_RANK": 0}, "MASTER_ADDR: NNODES=2 needs the address of node 0"),
    ],
)
def test_several_nodes_need_a_rank_and_an_address(
    variables: dict[str, int], message: str, tmp_path: Path
) -> None:
    job = start("program.py", cwd=tmp_path, NPROC=1, **variables)
    output = finish(job)
    assert job.returncode != 0
    assert message in output


def test_threads_are_shared_between_ranks_and_arguments_passed_on(tmp_path: Path) -> None:
    """A stand-in for the interpreter prints its arguments."""
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "threads $OMP_NUM_THREADS:" "$@"\n')
    fake.chmod(0o755)
    (tmp_path / "bin" / "nproc").write_text("#!/bin/sh\necho ${OMP_NUM_THREADS-12}\n")
    (tmp_path / "bin" / "nproc").chmod(0o755)
    path = f"{fake.parent}:/usr/bin:/bin"

    def printed(*arguments: str, **variables: object) -> str:
        job = start(*arguments, cwd=tmp_path, PATH=path, **variables)
        return finish(job).strip().replace("-m torch.distributed.run ", "")

    assert printed("a", "b c", NPROC=4, OMP_NUM_THREADS="") == (
        "threads 3: --standalone --nproc-per-node 4 a b c"
    )
    assert printed(NPROC=24, OMP_NUM_THREADS="") == "threads 1: --standalone --nproc-per-node 24"
    assert printed(NPROC=4, OMP_NUM_THREADS=5) == "threads 5: --standalone --nproc-per-node 4"
    several = printed("x", NPROC=1, NNODES=2, NODE_RANK=1, MASTER_ADDR="host0")
    assert several == (
        "threads 1: --nnodes 2 --node-rank 1 --master-addr host0 --master-port 29500 "
        "--nproc-per-node 1 x"
    )
