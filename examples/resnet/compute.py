"""Device, precision and memory layout of a job."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from config import Amp, MemoryFormat, Precision, TrainConfig
from torch import Tensor, nn


@dataclass(frozen=True)
class Compute:
    """Device, types and memory layout of a job.

    Attributes:
        device: this rank's device.
        dtype: dtype of parameters and inputs.
        memory_format: layout of filters and images.
        autocast_dtype: type that `torch.autocast` computes in, None without autocast.
    """

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    autocast_dtype: torch.dtype | None

    def place(self, net: nn.Module) -> nn.Module:
        """Move a network to where it will run."""
        placed: nn.Module = net.to(  # type: ignore[call-overload]  # the stubs lack memory_format
            device=self.device, dtype=self.dtype, memory_format=self.memory_format
        )
        return placed

    def batches(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Move batches ``[B, C, H, W]``, ``[B]`` as they come.

        Images travel in the dtype of the network, labels stay int64. The copies from pinned memory
        do not wait for the device.
        """
        for images, labels in batches:
            yield (
                images.to(
                    self.device, self.dtype, non_blocking=True, memory_format=self.memory_format
                ),
                labels.to(self.device, non_blocking=True),
            )

    def autocast(self) -> torch.autocast:
        """Return the context in which to run the forward pass and the loss."""
        return torch.autocast(
            self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        )

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return the scaler of the loss; only float16 needs one, bfloat16 has float32's range."""
        return torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)


def build_compute(cfg: TrainConfig, device: torch.device) -> Compute:
    """Translate the configuration.

    Args:
        cfg: ``dtype``, ``amp`` and ``memory_format``, which may leave the choice to the device.
        device: this rank's device.
    """
    channels_last = cfg.memory_format is MemoryFormat.channels_last or (
        # Tensor cores take NHWC; on a CPU the default layout is the faster one for small images.
        cfg.memory_format is MemoryFormat.auto and device.type == "cuda"
    )
    return Compute(
        device,
        torch.float64 if cfg.dtype is Precision.float64 else torch.float32,
        torch.channels_last if channels_last else torch.contiguous_format,
        _autocast_dtype(cfg, device),
    )


def _autocast_dtype(cfg: TrainConfig, device: torch.device) -> torch.dtype | None:
    match cfg.amp:
        case Amp.off:
            return None
        case Amp.bfloat16:
            return torch.bfloat16
        case Amp.float16:
            return torch.float16
    fits = device.type == "cuda" and cfg.dtype is Precision.float32
    has_it = fits and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else None
