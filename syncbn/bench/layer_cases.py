"""Inputs of the benchmark of layers and kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def name_epilogues(activation: str) -> tuple[str, str, str]:
    """Return the operations after a layer, which our layers fuse; the first is none."""
    return "", activation, f"addition and {activation}"


@dataclass(frozen=True)
class Case:
    """Input of a layer."""

    shape: str  # CxHxW
    batch: int
    layout: str  # key of LAYOUTS
    dtype: str  # key of DTYPES

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", self.shape):
            raise ValueError(f"shapes: got {self.shape}; expected CxHxW, such as 64x56x56")

    @property
    def channels(self) -> int:
        """C."""
        return int(self.shape.split("x")[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        _, height, width = map(int, self.shape.split("x"))
        return self.batch * self.channels * height * width * DTYPES[self.dtype].itemsize

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Dtype of weights and running statistics, as precise as the arithmetic."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def tensor(self, device: torch.device) -> Tensor:
        """Return random values."""
        size = self.batch, *map(int, self.shape.split("x"))
        values = torch.randn(size, device=device).to(DTYPES[self.dtype])
        return values.contiguous(memory_format=LAYOUTS[self.layout])
