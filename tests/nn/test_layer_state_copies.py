"""Copies of a layer with a live process group, by every mechanism of Python and torch."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import syncbn
from tests.ranks import Ranks


class Subclass(nn.BatchNorm1d):
    pass


def _attributes(layer: nn.Module) -> Any:
    clone: Any = syncbn.SyncBatchNorm1d(4).double()
    for name, value in vars(layer).items():
        setattr(clone, name, value)
    return clone


def _save(layer: nn.Module) -> bytes:
    torch.save(layer, file := io.BytesIO())
    return file.getvalue()


def _load(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


#: Copy functions, and whether the copy keeps the live group; another process may load a pickle.
COPIES: dict[str, tuple[Callable[[nn.Module], Any], bool]] = {
    "copy": (copy.copy, True),
    "deepcopy": (copy.deepcopy, True),
    "deepcopy of a copy": (lambda layer: copy.deepcopy(copy.copy(layer)), True),
    "attributes": (_attributes, True),
    "average": (lambda layer: AveragedModel(layer).module, True),
    "share_memory": (lambda layer: copy.deepcopy(layer).share_memory(), True),
    "to": (lambda layer: copy.deepcopy(layer).to(torch.float64), True),
    "pickle": (lambda layer: pickle.loads(pickle.dumps(layer)), False),
    "torch.save": (lambda layer: _load(_save(layer)), False),
}


def _whole() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


def _own_group(rank: int) -> Any:
    """Return a group other than the default group, which a copy without a group would use."""
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    return single if rank == 2 else pair


def _check_copies(rank: int) -> tuple[list[str], bytes]:
    # Another batch on rank 2: with the same one, all ranks together would have equal statistics.
    group, x, names = _own_group(rank), _whole()[: 3 if rank == 2 else 6], []
    lost = "lost its process group of the ranks {}".format
    for kind, parametrized in ((nn.BatchNorm1d, False), (Subclass, True)):
        layer: Any = kind(4).double()
        if parametrized:
            parametrizations.weight_norm(layer, dim=0)
        syncbn.convert_sync_batchnorm(layer, group)
        expected = nn.BatchNorm1d(4).double()(x)
        part, expected = (x, expected) if rank == 2 else (t.chunk(2)[rank] for t in (x, expected))
        for name, (make_copy, is_live) in COPIES.items():
            if parametrized and (not is_live or name == "attributes"):
                continue  # torch refuses the pickle
            clone = make_copy(layer)
            if not is_live:
                ranks = re.escape(str(dist.get_process_group_ranks(group)))
                with pytest.raises(RuntimeError, match=lost(ranks)):
                    clone(part)
                clone.eval()(part)
                syncbn.convert_sync_batchnorm(clone, group).train()
            torch.testing.assert_close(clone(part), expected, rtol=1e-10, atol=1e-12)
            names.append(name)
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(4), group)
    content = _save(nn.Sequential(layer))
    # Gloo may still be connecting on another rank.
    dist.barrier()
    dist.destroy_process_group(group)
    with pytest.raises(RuntimeError, match=lost(r"\[\]")):
        _load(_save(layer))(x)
    return names, content


def test_copies_synchronize_with_the_same_ranks(three_ranks: Ranks) -> None:
    """Regression: a shallow copy lost its group, like a pickle from another process."""
    for names, content in three_ranks.run(_check_copies):
        assert len(names) == 2 * len(COPIES) - 3
        loaded, x = _load(content), torch.randn(2, 4)
        assert isinstance(loaded[0], syncbn.SyncBatchNorm1d)
        torch.testing.assert_close(loaded.eval()(x), nn.BatchNorm1d(4).eval()(x))


def test_a_shallow_copy_shares_tensors_as_in_torch() -> None:
    layer = syncbn.SyncBatchNorm1d(4)
    clone = copy.copy(layer)
    assert type(clone) is type(layer)
    assert clone.weight is layer.weight
    layer(torch.randn(5, 4))
    assert clone.num_batches_tracked == 1
