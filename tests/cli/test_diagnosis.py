"""Problems of jobs that are not here, from the facts of their ranks."""

from __future__ import annotations

from typing import Any

import pytest

from syncbn.cli.diagnosis import RankFacts, explain_backend, find_problems

CACHED = {"MALLOC_MMAP_MAX_": "0"}


def job(*ranks: dict[str, Any]) -> list[RankFacts]:
    plain: dict[str, Any] = {
        "host": "a",
        "pid": 1,
        "device": "cpu",
        "gpus": 0,
        "threads": 1,
        "cores": "0,1",
        "interface": "",
        "versions": "torch 2",
        "variables": CACHED,
    }
    return [RankFacts(rank, **{**plain, **facts}) for rank, facts in enumerate(ranks)]


def test_good_settings_have_no_problems() -> None:
    assert find_problems("gloo", job({}, {}, {"host": "b"}, {"host": "b"})) == []
    pinned = {"device": "cuda:0", "gpus": 1, "threads": 8}
    assert find_problems("nccl", job(pinned, pinned)) == []


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ([{"gpus": 2}, {}], "GPUs, but the backend is gloo"),
        ([{}, {"versions": "torch 3"}], "rank 1 has torch 3, rank 0 has torch 2: install the same"),
        (
            [{"threads": 2}, {"threads": 2}],
            "ranks 0, 1 on a: 4 threads on 2 core(s); set OMP",
        ),
        (
            [{"cores": "3"}, {"cores": "3"}, {}],
            "ranks 0, 1 on a: 2 threads on 1 core(s); start",
        ),
        ([{"variables": {**CACHED, "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}}], "unset it for speed"),
        ([{"variables": {}}, {}], "MALLOC_MMAP_MAX_ is not 0"),
    ],
)
def test_problem_is_found(ranks: list[dict[str, Any]], problem: str) -> None:
    (found,) = find_problems("gloo", job(*ranks))
    assert problem in found


@pytest.mark.parametrize(
    ("requested", "backend", "gpus", "reason"),
    [
        ("gloo", "gloo", 0, "requested"),
        (None, "nccl", 1, "every rank has a GPU of its own"),
        (
            None,
            "gloo",
            1,
            "not every rank has a GPU of its own; launcher srun: no MPI",
        ),
        (None, "mpi4py", 0, "no GPUs; launcher srun: mpi4py connects the ranks"),
    ],
)
def test_reason_for_the_backend(
    requested: str | None, backend: str, gpus: int, reason: str
) -> None:
    assert explain_backend(requested, backend, "srun", job({"gpus": gpus})).startswith(reason)
