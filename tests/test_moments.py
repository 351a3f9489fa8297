from __future__ import annotations

import pytest
import torch

from syncbn.kernels import REFERENCE
from syncbn.moments import Moments, add_packed


def moments_of(x: torch.Tensor) -> Moments:
    return Moments.unpack(REFERENCE.moments(x), x.shape[1])


@pytest.mark.parametrize("sizes", [[24], [1, 2, 3, 4, 14], [0, 24], [23, 1, 0]])
def test_any_split_has_the_moments_of_the_values(sizes: list[int]) -> None:
    x = torch.randn(24, 4, 3, 2, dtype=torch.float64) * 3 + 1
    values = x.movedim(1, 0).reshape(4, -1)
    parts = [moments_of(part) for part in x.split(sizes)]
    total = sum(parts[1:], parts[0])
    assert total.count == 144
    torch.testing.assert_close(total.mean(), values.mean(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(total.variance(), values.var(1, correction=0), rtol=1e-13, atol=0)
    torch.testing.assert_close(total.variance(unbiased=True), values.var(1), rtol=1e-13, atol=0)


def test_many_ranks_with_a_large_mean() -> None:
    """Simulates 1024 ranks at mean/std = 1e4; the count, 2^30 + 1024, is not a float32."""
    count, mean = torch.tensor(2.0**20 + 1, dtype=torch.float64), 1e4
    one = Moments(count, (count * mean).reshape(1), (count * (mean**2 + 1)).reshape(1))
    total = one
    for _ in range(1023):
        total = total + one
    assert total.count.item() == 2**30 + 1024
    assert Moments.unpack(total.pack(), 1).count.item() == 2**30 + 1024
    assert total.variance().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("mean", [0.1, -1e4 - 0.1, 1e6 + 0.3, 3e9])
def test_a_constant_float64_channel_on_many_ranks_is_constant(mean: float) -> None:
    """The low parts round with every addition, by less than the threshold of a variance."""
    sizes = torch.randint(1, 1000, (1024,)).tolist()
    channel = torch.full((1,), mean, dtype=torch.float64)
    total = torch.zeros(5, dtype=torch.float64)
    for size in sizes:
        total += moments_of(channel.expand(size, 1)).pack()
    found = Moments.unpack(total, 1)
    assert torch.equal(found.mean(), channel)
    assert found.variance() == 0


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_messages_of_one_part_and_of_two_add(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Micro-batches of another dtype than the running averages."""
    x = torch.randn(20, 3) + 1
    total = REFERENCE.moments(x[:8].to(dtypes[0]))
    add_packed(total, REFERENCE.moments(x[8:].to(dtypes[1])), 3)
    found, values = Moments.unpack(total, 3), x.double()
    torch.testing.assert_close(found.mean(), values.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.variance(), values.var(0, correction=0), rtol=1e-6, atol=0)
