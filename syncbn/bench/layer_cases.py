"""The inputs that layers and kernels are measured with."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: What follows a layer; ours does it in the same pass.
NOTHING, RELU, ADDITION = "", "ReLU", "addition and ReLU"


@dataclass(frozen=True)
class Case:
    """An input.

    Attributes:
        shape: "CxHxW".
        batch: samples.
        layout: a key of :data:`LAYOUTS`.
        dtype: a key of :data:`DTYPES`.
    """

    shape: str
    batch: int
    layout: str
    dtype: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", self.shape):
            raise ValueError(f"shapes: got {self.shape}; expected CxHxW, such as 64x56x56")

    @property
    def channels(self) -> int:
        """C."""
        return int(self.shape.split("x")[0])

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        _, height, width = map(int, self.shape.split("x"))
        numel = self.batch * self.channels * height * width
        return numel * DTYPES[self.dtype].itemsize

    @property
    def parameters(self) -> torch.dtype:
        """The dtype of weights and running averages: as precise as the arithmetic."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def tensor(self, device: torch.device) -> Tensor:
        """Return random values."""
        size = self.batch, *map(int, self.shape.split("x"))
        values = torch.randn(size, device=device).to(DTYPES[self.dtype])
        return values.contiguous(memory_format=LAYOUTS[self.layout])
