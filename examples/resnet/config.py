"""The typed form of `configs/train.yaml`.

Hydra composes the YAML files; `typed` turns the result into these dataclasses once, at the edge, so
that a wrong key, type or choice is an error before anything starts and the rest of the code is
checked by the type checker.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class Arch(str, Enum):
    """Networks; `resnet20` is the CIFAR network, the rest are ImageNet networks."""

    resnet18 = "resnet18"
    resnet34 = "resnet34"
    resnet50 = "resnet50"
    resnet20 = "resnet20"


class Source(str, Enum):
    """Data sets."""

    digits = "digits"
    cifar10 = "cifar10"
    imagefolder = "imagefolder"


class NormKind(str, Enum):
    """Replacement of every batch-norm layer; see `norm.py`."""

    local = "local"
    sync = "sync"
    torch_sync = "torch_sync"
    frozen = "frozen"
    group = "group"


class Amp(str, Enum):
    """Type of `torch.autocast`; `auto` is bfloat16 on GPUs that have it, off elsewhere."""

    auto = "auto"
    off = "off"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Precision(str, Enum):
    """Type of parameters and inputs."""

    float32 = "float32"
    float64 = "float64"


class MemoryFormat(str, Enum):
    """Layout of activations and filters; `auto` is channels_last on CUDA, contiguous elsewhere."""

    auto = "auto"
    contiguous = "contiguous"
    channels_last = "channels_last"


@dataclass
class ModelConfig:
    """Group `model/`; `width` is the number of channels of the first stage."""

    name: Arch
    width: int
    zero_init_residual: bool
    weights: str | None

    def __post_init__(self) -> None:
        _check_at_least(self, "model.", width=1)


@dataclass
class DataConfig:
    """Group `data/`; batch sizes are PER RANK, the optional fields belong to some sources only."""

    source: Source
    batch_size: int
    eval_batch_size: int
    drop_last: bool
    augment: bool
    workers: int
    root: str | None = None
    image_size: int = 224
    split_seed: int = 0
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        _check_at_least(self, "data.", batch_size=1, eval_batch_size=1, workers=0)
        _check_at_least(self, "data.", image_size=1, split_seed=0)
        if not 0 < self.test_fraction < 1:
            raise ValueError(
                f"data.test_fraction: got {self.test_fraction}, expected within (0, 1)"
            )


@dataclass
class NormConfig:
    """Group `norm/`: the kind and its options.

    `group`, "node" or a number of ranks, belongs to kind `group` only; `fused` to `sync` and
    `group`.
    """

    kind: NormKind
    group: int | str | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        if self.fused and self.kind not in (NormKind.sync, NormKind.group):
            raise ValueError(
                f"norm.fused: got true with norm.kind={self.kind.value}; expected kind=sync or "
                "group, whose layers can add residuals and apply ReLUs"
            )
        if (self.kind is NormKind.group) != (self.group is not None):
            raise ValueError(
                f"norm.group: got {self.group!r} with norm.kind={self.kind.value}; expected 'node' "
                "or a number of ranks with kind=group, and null with any other kind"
            )
        if isinstance(self.group, int):
            _check_at_least(self, "norm.", group=1)
        elif self.group not in (None, "node"):
            raise ValueError(
                f"norm.group: got {self.group!r}, expected 'node' or a number of ranks"
            )


@dataclass
class OptimizerConfig:
    """Group `optimizer/`: SGD, and the schedule of its learning rate."""

    lr: float
    lr_batch: int | None
    warmup_epochs: float
    momentum: float
    nesterov: bool
    weight_decay: float
    decay_norm_and_bias: bool
    clip_norm: float | None

    def __post_init__(self) -> None:
        _check_at_least(self, "optimizer.", lr=0, lr_batch=1, warmup_epochs=0)
        _check_at_least(self, "optimizer.", momentum=0, weight_decay=0)
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(
                f"optimizer.clip_norm: got {self.clip_norm}, expected a positive number, or null "
                "to leave gradients alone"
            )


@dataclass
class CheckpointConfig:
    """Group `checkpoint`: minutes between checkpoints within an epoch; None for none."""

    every_minutes: float | None

    def __post_init__(self) -> None:
        _check_at_least(self, "checkpoint.", every_minutes=0)


@dataclass
class TrainConfig:
    """The whole job; `configs/train.yaml` documents each field."""

    name: str
    seed: int
    epochs: int
    max_steps: int | None
    dtype: Precision
    amp: Amp
    memory_format: MemoryFormat
    log_every: int
    run_dir: str | None
    resume: str | None
    checkpoint: CheckpointConfig
    model: ModelConfig
    data: DataConfig
    norm: NormConfig
    optimizer: OptimizerConfig

    def __post_init__(self) -> None:
        _check_at_least(self, "", seed=0, epochs=1, max_steps=1, log_every=1)
        chosen = self.amp not in (Amp.auto, Amp.off)
        if chosen and self.dtype is not Precision.float32:
            raise ValueError(
                f"amp={self.amp.value} with dtype={self.dtype.value}: expected dtype=float32, "
                "autocast leaves float64 tensors as they are"
            )


def typed(raw: DictConfig) -> TrainConfig:
    """Check a composed configuration against the dataclasses above.

    Args:
        raw: configuration composed by hydra.

    Returns:
        The same values as typed objects, with interpolations resolved.

    Raises:
        ValueError: a key is unknown or missing, or a value has the wrong type or range. The message
            names the key.
    """
    try:
        plain: Any = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.create(plain))
        cfg = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ValueError(f"configuration key '{error.full_key}': {message}") from None
    assert isinstance(cfg, TrainConfig)
    return cfg


def _check_at_least(config: object, prefix: str, /, **lows: float) -> None:
    for name, low in lows.items():
        value = getattr(config, name)
        # `not >=` rather than `<`, so that NaN is rejected, too.
        if value is not None and not value >= low:
            raise ValueError(f"{prefix}{name}: got {value}, expected at least {low}")
