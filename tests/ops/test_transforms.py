"""Forward-mode derivatives and the transforms of torch.func, on one rank and over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten

import syncbn
from tests.device import seeded
from tests.formula import Formula
from tests.ranks import Pool, Ranks

# Torch warns when it makes its formulas of forward mode.
pytestmark = [
    pytest.mark.layers,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]


def _net(norm: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), norm(3, track_running_stats=False), nn.Tanh()).double()


def _loss(net: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    y: Tensor = functional_call(net, parameters, (x,))
    return y.pow(3).sum()


def _measures(net: nn.Module, x: Tensor) -> dict[str, Any]:
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    tangents = {name: p.cos() for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return _loss(net, parameters, x)

    _, pull_back = vjp(lambda x: _loss(net, parameters, x), x)  # type: ignore[misc]
    return {
        "grad": grad(loss)(parameters),
        "jvp": jvp(loss, (parameters,), (tangents,))[1],
        "vjp": pull_back(torch.ones((), dtype=x.dtype))[0],
        "hessian": hessian(loss)(parameters),
        "jacrev twice": jacrev(jacrev(loss))(parameters),
    }


def _on_a_rank(rank: int) -> dict[str, Any]:
    return _measures(_net(syncbn.SyncBatchNorm1d), _batch().split([1, 2, 3])[rank])


def _batch() -> Tensor:
    return torch.randn(6, 2, dtype=torch.float64, generator=seeded(1))


def test_a_single_rank() -> None:
    x = _batch()
    actual = _measures(_net(syncbn.SyncBatchNorm1d), x)
    torch.testing.assert_close(actual, _measures(_net(Formula), x))


def test_over_ranks(three_ranks: Ranks) -> None:
    """A rank's derivatives are its share: over all ranks they sum to one process's derivatives."""
    answers = three_ranks.run(_on_a_rank)
    expected = _measures(_net(Formula), _batch())
    torch.testing.assert_close(torch.cat([of_rank["vjp"] for of_rank in answers]), expected["vjp"])
    for measure in ("grad", "jvp", "hessian", "jacrev twice"):
        shares = [tree_flatten(of_rank[measure])[0] for of_rank in answers]
        totals = [torch.stack(parts).sum(0) for parts in zip(*shares, strict=True)]
        torch.testing.assert_close(totals, tree_flatten(expected[measure])[0])


def test_each_sample_of_an_ensemble_is_a_batch() -> None:
    x = torch.randn(4, 6, 3).double()
    layer = syncbn.SyncBatchNorm1d(3, track_running_stats=False).double()
    expected = torch.stack([layer(part) for part in x])
    torch.testing.assert_close(vmap(layer)(x), expected)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_running_averages_under_a_transform_are_an_error(transform: str) -> None:
    net = nn.Sequential(syncbn.SyncBatchNorm1d(3))
    x = torch.randn(4, 5, 3)
    calls: dict[str, Any] = {
        "grad": lambda: grad(lambda x: net(x).sum())(x[0]),
        "jvp": lambda: jvp(net, (x[0],), (x[0],)),
        "vmap": lambda: vmap(net)(x),
    }
    with pytest.raises(RuntimeError, match="replace_all_batch_norm_modules_"):
        calls[transform]()
    assert net[0].num_batches_tracked == 0
    torch.func.replace_all_batch_norm_modules_(net)
    calls[transform]()


def _forward_mode(rank: int) -> tuple[Tensor, Tensor]:
    layer = syncbn.SyncBatchNorm1d(2).double()
    x = _batch().split([1, 2, 3])[rank]
    with fwad.dual_level():
        _, tangent = fwad.unpack_dual(layer(fwad.make_dual(x, x.cos())))
    assert tangent is not None
    return tangent, layer.get_buffer("running_mean")


def test_forward_mode(pool: Pool) -> None:
    x = _batch()
    mean, var = torch.zeros(2).double(), torch.ones(2).double()

    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, training=True)

    expected = torch.autograd.functional.jvp(norm, x, x.cos(), strict=True)[1]
    mean.zero_(), var.fill_(1)
    norm(x)
    answers = pool(3, "gloo").run(_forward_mode)
    torch.testing.assert_close(torch.cat([tangent for tangent, _ in answers]), expected)
    for _, running_mean in answers:
        torch.testing.assert_close(running_mean, mean)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_forward_mode_over_backward(impl: str) -> None:
    """The backward pass of the C++ kernel dropped the tangent of dy."""
    x, dy, tangent = torch.randn(3, 4, 2, 5).double()
    x.requires_grad_()
    y = syncbn.sync_batch_norm(x, None, None, training=True, impl=impl)
    with fwad.dual_level():
        dual = fwad.make_dual(dy, tangent)
        (dx,) = torch.autograd.grad(y, x, dual, retain_graph=True)
        actual = fwad.unpack_dual(dx).tangent
    (expected,) = torch.autograd.grad(y, x, tangent)
    torch.testing.assert_close(actual, expected)
