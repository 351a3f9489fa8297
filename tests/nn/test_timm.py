"""Conversion of timm's networks; the whole zoo by ``python -m tests.timm_sweep``."""

from __future__ import annotations

import subprocess
import sys

from tests.transports import ROOT

#: One of each kind of layer that has a batch norm and more.
NAMES = [
    *("test_resnet", "test_efficientnet", "test_byobnet", "test_mambaout", "test_vit"),
    *("efficientnet_b0", "skresnet18", "mobilevit_xxs", "resnetv2_50", "regnetx_002"),
    *("ghostnet_050", "repvgg_a0", "mobilenetv3_small_050"),
]


def test_networks_are_converted_and_unchanged() -> None:
    """A separate process, in which timm sees names of torchvision."""
    command = [sys.executable, "-m", "tests.timm_sweep", *NAMES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 models with batch norm, 0 failed" in done.stdout
