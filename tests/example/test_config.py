"""Every config file composes to a valid job; mistakes are errors that name the key."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import pytest
import torch
from compute import build_compute
from config import Amp, Arch, NormKind, Source
from hydra.errors import HydraException
from omegaconf import OmegaConf

from syncbn.cli import config_path
from tests.example.support import composed
from tests.processes import run_forked

CONFIGS = Path(config_path())
GROUPS = ["model", "data", "norm", "optimizer", "experiment"]
CHOICES = {group: sorted(file.stem for file in (CONFIGS / group).iterdir()) for group in GROUPS}


@pytest.mark.parametrize(
    "choice", [f"{group}={name}" for group, names in CHOICES.items() for name in names]
)
def test_every_choice_composes(choice: str) -> None:
    needs_folder = any(word in choice for word in ("cifar10", "image"))
    cfg = composed(choice, *(["data.root=FOLDER"] if needs_folder else []))
    group, name = choice.split("=")
    if group == "experiment":
        # A reader copies the command in the head of the file.
        first, command, *_ = (CONFIGS / group / f"{name}.yaml").read_text().splitlines()
        assert first == "# @package _global_"
        assert f"examples/resnet/train.py {choice}" in command
    elif group != "optimizer":
        chosen = {"model": cfg.model.name, "data": cfg.data.source, "norm": cfg.norm.kind}
        assert name == chosen[group]


def test_every_choice_of_the_schema_has_a_file() -> None:
    kinds: dict[str, type[Enum]] = {"model": Arch, "data": Source, "norm": NormKind}
    for group, kind in kinds.items():
        assert CHOICES[group] == sorted(choice.value for choice in kind)


def test_defaults_and_overrides_of_an_experiment() -> None:
    cfg = composed()
    assert cfg.name == "digits_resnet20_sync"
    assert (cfg.model.name, cfg.norm.kind, cfg.amp) == (Arch.resnet20, NormKind.sync, Amp.auto)
    cfg = composed("experiment=digits_resnet20", "norm=local", "data.batch_size=7", "amp=bfloat16")
    assert (cfg.norm.kind, cfg.data.batch_size, cfg.amp) == (NormKind.local, 7, Amp.bfloat16)
    assert cfg.name == "digits_resnet20_local"


def test_saved_configuration_reads_back_as_the_same_job(tmp_path: Path) -> None:
    cfg = composed("norm=group", "norm.group=2", "optimizer.clip_norm=1", "amp=off")
    OmegaConf.save(OmegaConf.structured(cfg), tmp_path / "config.yaml")
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(type(cfg)), loaded)) == cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("amp=foo", r"'amp': Invalid value 'foo', expected one of \[auto, off, bfloat16, float16"),
        ("dtype=int8", r"'dtype': Invalid value 'int8', expected one of \[float32, float64\]"),
        ("norm.kind=foo", r"'norm.kind': Invalid value 'foo', expected one of \[local, sync"),
        ("epochs=many", r"'epochs': Value 'many' .* could not be converted to Integer"),
        ("+data.batchsize=4", r"'data.batchsize': Key 'batchsize' not in 'DataConfig'"),
        ("data=cifar10", r"'data.root': Missing mandatory value"),
        ("~data.workers", r"'data.workers': .* missing mandatory value"),
        ("epochs=0", r"epochs: got 0, expected at least 1"),
        ("seed=-1", r"seed: got -1, expected at least 0"),
        ("data.batch_size=0", r"data.batch_size: got 0, expected at least 1"),
        ("data.test_fraction=1.0", r"data.test_fraction: got 1.0, expected within \(0, 1\)"),
        ("optimizer.lr=nan", r"optimizer.lr: got nan, expected at least 0"),
        ("optimizer.clip_norm=0", r"optimizer.clip_norm: got 0.0, expected a positive number"),
        ("norm=group norm.group=nodes", r"norm.group: got 'nodes', expected 'node' or"),
        ("norm=group norm.group=0", r"norm.group: got 0, expected at least 1"),
        ("norm=group norm.group=null", r"norm.group: got None with norm.kind=group"),
        ("+norm.group=2", r"norm.group: got 2 with norm.kind=sync"),
        ("norm=local +norm.fused=true", r"norm.fused: got true with norm.kind=local"),
        ("dtype=float64 amp=bfloat16", r"amp=bfloat16 with dtype=float64"),
    ],
)
def test_bad_value_is_an_error_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed(*override.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("norm=foo", r"(?s)Could not find 'norm/foo'.*frozen\n.*group\n.*local\n.*sync"),
        ("data.image_size=32", r"Could not override 'data.image_size'"),
        ("zzz=1", r"Could not override 'zzz'"),
    ],
    ids=["group", "key of another data set", "key"],
)
def test_unknown_group_or_key_is_an_error_of_the_command_line(override: str, message: str) -> None:
    """An option of another data set must not be accepted and ignored."""
    with pytest.raises(HydraException, match=message):
        composed(override)


def test_command_line_ends_with_a_message_and_a_code(tmp_path: Path) -> None:
    done = run_forked("train", ["amp=foo"], tmp_path)
    assert done.returncode != 0
    assert "ValueError: configuration key 'amp': Invalid value 'foo'" in done.stderr
    assert list(tmp_path.iterdir()) == []


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
