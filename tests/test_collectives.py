"""Ranks that disagree, arrive late or not at all; groups by description."""

from __future__ import annotations

import copy
import os
import pickle
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrizations

import syncbn
from syncbn.distributed import resolve_group
from syncbn.nn.module import DetachedGroup
from tests.ranks import RankError, Ranks


def _disagree(rank: int, kind: str) -> str:
    model: Any = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(4))
    syncbn.convert_sync_batchnorm(model)
    layers = {
        "order": (model[0], model[1]),
        "channels": (model[0], model[2]),
        "dtype": (model[0], model[0]),
    }[kind]
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    layer = layers[rank]
    try:
        half = kind == "dtype" and rank == 1
        layer(torch.randn(2, layer.num_features, dtype=torch.float16 if half else None))
    except RuntimeError as error:
        return str(error)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        ("order", "8 numbers for 1 SyncBatchNorm1d(3)"),
        ("channels", "10 numbers for 2 SyncBatchNorm1d(4)"),
        ("dtype", "8 numbers for 0 SyncBatchNorm1d(3) forward, torch.float16 input"),
    ],
)
def test_disagreeing_ranks_are_named_at_debug_level(two_ranks: Ranks, kind: str, last: str) -> None:
    for message in two_ranks.run(_disagree, kind):
        assert "the ranks of a synchronized batch norm disagree" in message
        assert "rank 0: 8 numbers for 0 SyncBatchNorm1d(3) forward, torch.float32" in message
        assert f"rank 1: {last}" in message


def _agree(rank: int) -> torch.Tensor | None:
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    layer = syncbn.SyncBatchNorm1d(3)
    layer(torch.full((2, 3), float(rank), requires_grad=True)).sum().backward()
    dist.set_debug_level(dist.DebugLevel.OFF)
    return layer.running_mean


def test_agreeing_ranks_pass_at_debug_level(two_ranks: Ranks) -> None:
    for mean in two_ranks.run(_agree):
        torch.testing.assert_close(mean, torch.full((3,), 0.05))


def _absent(rank: int) -> str:
    hasty = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.BatchNorm1d(3))
    syncbn.convert_sync_batchnorm(model, hasty)
    if rank == 1:
        return ""
    try:
        model(torch.randn(2, 1, 4))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_rank_that_never_arrives_times_out_with_the_layers_name(two_on_host: Ranks) -> None:
    message = two_on_host.run(_absent)[0]
    assert message.startswith("1 SyncBatchNorm1d(3) forward, torch.float32 input: the all-reduce")
    assert "on rank 0 of 2" in message
    two_on_host.close()  # The group is broken.


def _dies(rank: int) -> None:
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    if rank == 1:
        os._exit(1)
    model(torch.randn(2, 3))


def test_a_rank_that_dies_is_an_error_with_the_layers_name(two_on_host: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        two_on_host.run(_dies)
    assert "RuntimeError: 0 SyncBatchNorm1d(3) forward" in str(caught.value)
    assert "rank 1 of 2: died" in str(caught.value)


def _groups(rank: int) -> list[list[int] | None]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    descriptions = (None, "world", 1, 2, mesh["dp"], dist.new_group([0, 1]))
    groups = [resolve_group(description) for description in descriptions]
    return [None if g is None else dist.get_process_group_ranks(g) for g in groups]


def test_groups_from_descriptions(two_ranks: Ranks) -> None:
    answers = two_ranks.run(_groups)
    assert answers[0] == [None, None, [0], None, [0, 1], [0, 1]]
    assert answers[1] == [None, None, [1], None, [0, 1], [0, 1]]


def _bad_groups(rank: int) -> list[str]:
    messages = []
    first = dist.new_group([0])
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    for description in (3, 0, True, mesh, first if rank == 1 else 0):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (messages are compared below)
            syncbn.SyncBatchNorm(3, process_group=description)
        messages.append(str(caught.value))
    return messages


def test_bad_groups_are_errors(two_ranks: Ranks) -> None:
    for rank, messages in enumerate(two_ranks.run(_bad_groups)):
        wanted = [
            "groups of 3 ranks; expected a divisor of the 2 ranks",
            "groups of 0 ranks",
            "got process group True",
            "device mesh of 2 dimensions ('a', 'b')",
            "this rank is not in the process group" if rank == 1 else "groups of 0 ranks",
        ]
        for message, part in zip(messages, wanted, strict=True):
            assert part in message


def _nodes(rank: int) -> list[list[int] | None]:
    answers = []
    for agents in ("001", "000"):
        os.environ["GROUP_RANK"] = agents[rank]
        group = resolve_group("node")
        answers.append(None if group is None else dist.get_process_group_ranks(group))
    del os.environ["GROUP_RANK"]
    return answers


def test_nodes_may_have_different_numbers_of_ranks(three_ranks: Ranks) -> None:
    assert three_ranks.run(_nodes) == [[[0, 1], None], [[0, 1], None], [[2], None]]


def _one_rank_needs_no_gradient(rank: int) -> torch.Tensor | None:
    layer = syncbn.SyncBatchNorm1d(3)
    x = torch.full((2, 3), float(rank), requires_grad=rank == 0)
    layer(x).square().sum().backward()
    return x.grad


def test_a_rank_whose_input_needs_no_gradient_still_takes_part(two_ranks: Ranks) -> None:
    gradients = two_ranks.run(_one_rank_needs_no_gradient)
    assert gradients[0] is not None
    assert gradients[1] is None


def _count_messages(rank: int) -> list[tuple[int, torch.dtype]]:
    sent = []
    original = dist.all_reduce

    def counted(vector: torch.Tensor, *args: Any, **options: Any) -> Any:
        sent.append((vector.numel(), vector.dtype))
        return original(vector, *args, **options)

    dist.all_reduce = counted  # type: ignore[assignment]
    try:
        layer = syncbn.SyncBatchNorm2d(5)
        layer(torch.randn(3 * rank, 5, 4, 4, requires_grad=True)).sum().backward()
        layer.eval()(torch.randn(2, 5, 4, 4))
    finally:
        dist.all_reduce = original
    return sent


def test_two_messages_a_step_on_any_number_of_ranks(ranks: Ranks) -> None:
    """One forward, one backward, none in evaluation; also from a rank without data."""
    for sent in ranks.run(_count_messages):
        on_gpu = ranks.transport == "nccl"  # no fingerprints there
        assert sent == [
            (11 if on_gpu else 12, torch.float64),
            (10 if on_gpu else 12, torch.float64),
        ]


def _not_a_member(rank: int) -> str:
    group = dist.new_group([0])
    x, zeros = torch.randn(2, 3), torch.zeros(3)
    if rank == 0:
        syncbn.sync_batch_norm(x, zeros, zeros, training=True, process_group=group)
        return ""
    with pytest.raises(ValueError, match="got process group 'world'; expected a torch"):
        syncbn.sync_batch_norm(x, zeros, zeros, training=True, process_group="world")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank 1 is not in the process group") as caught:
        syncbn.sync_batch_norm(x, zeros, zeros, training=True, process_group=group)
    return str(caught.value)


def test_functional_refuses_a_group_this_rank_is_not_in(two_ranks: Ranks) -> None:
    assert two_ranks.run(_not_a_member)[1]


def _copies(rank: int) -> None:
    group = dist.new_group([0, 1])
    layer = syncbn.SyncBatchNorm1d(3, process_group=group, momentum=1.0)
    x = torch.full((1, 3), float(rank))

    parametrized = parametrizations.weight_norm(nn.BatchNorm1d(3), dim=0)
    syncbn.convert_sync_batchnorm(parametrized, group)
    assert copy.deepcopy(parametrized).process_group is group

    copied = copy.deepcopy(layer)
    assert copied.process_group is group
    copied(x)
    torch.testing.assert_close(copied.running_mean, torch.full((3,), 0.5))

    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.process_group == DetachedGroup((0, 1))
    loaded.eval()(x)
    with pytest.raises(RuntimeError, match=r"lost its process group of the ranks \[0, 1\]"):
        loaded.train()(x)
    syncbn.convert_sync_batchnorm(loaded, "world")(x)
    torch.testing.assert_close(loaded.running_mean, torch.full((3,), 0.5))


def test_a_copy_shares_a_live_group_and_a_pickle_describes_it(two_ranks: Ranks) -> None:
    two_ranks.run(_copies)


def _pickle_after_destroy(rank: int) -> bool:
    group = dist.new_group([0, 1])
    layer = syncbn.SyncBatchNorm1d(3, process_group=group)
    # Gloo may still be connecting on the other rank.
    dist.barrier()
    dist.destroy_process_group(group)
    loaded = pickle.loads(pickle.dumps(layer))
    return bool(loaded.process_group == DetachedGroup(()))


def test_a_model_pickles_after_its_group_is_gone(two_ranks: Ranks) -> None:
    assert all(two_ranks.run(_pickle_after_destroy))


def _keeps_group(rank: int) -> bool:
    group = dist.new_group([0, 1])
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.BatchNorm1d(3))
    syncbn.convert_sync_batchnorm(model)
    return model[0].process_group is group and model[1].process_group is None


def test_conversion_keeps_the_group_of_torchs_layer(two_ranks: Ranks) -> None:
    assert all(two_ranks.run(_keeps_group))
