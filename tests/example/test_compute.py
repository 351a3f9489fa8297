"""Default device, precision and memory layout of a job."""

from __future__ import annotations

import pytest
import torch
from compute import build_compute

from tests.example.support import composed


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "overrides", "dtype", "layout"),
    [
        ("cpu", True, [], None, torch.contiguous_format),
        ("cuda", True, [], torch.bfloat16, torch.channels_last),
        ("cuda", False, [], None, torch.channels_last),
        ("cuda", True, ["dtype=float64"], None, torch.channels_last),
        ("cuda", True, ["amp=off"], None, torch.channels_last),
        ("cpu", True, ["amp=float16"], torch.float16, torch.contiguous_format),
        ("cuda", True, ["memory_format=contiguous"], torch.bfloat16, torch.contiguous_format),
    ],
)
def test_defaults_follow_the_device(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    has_bfloat16: bool,
    overrides: list[str],
    dtype: torch.dtype | None,
    layout: torch.memory_format,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bfloat16)
    found = build_compute(composed(*overrides), torch.device(device))
    assert found.autocast_dtype is dtype
    assert found.memory_format is layout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_pinned_and_moved() -> None:
    compute = build_compute(composed(), torch.device("cuda"))
    batch = torch.randn(4, 3, 8, 8).pin_memory(), torch.arange(4).pin_memory()
    images, labels = next(compute.batches([batch]))
    assert images.is_cuda
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images.cpu(), batch[0])
    assert torch.equal(labels.cpu(), batch[1])
