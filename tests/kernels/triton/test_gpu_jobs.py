"""Jobs on a GPU: the layer tests again, and benchmarks over NCCL."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run
from tests.kernels.triton.gpu import MARKS
from tests.transports import ROOT

pytestmark = MARKS


@pytest.mark.timeout(1800)
def test_layers_on_the_gpu() -> None:
    """The layer tests with tensors on the GPU, which all ranks of a test share."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "4", "-m", "layers", "--impl", "triton"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.timeout(180)
def test_layers_are_measured(tmp_path: Path) -> None:
    """NCCL cannot reduce times in CPU tensors; torch's layer calls its own collectives."""
    settings = ["device=cuda", "shapes=[8x9x9]", "dtypes=[bfloat16]", "rounds=1"]
    output, results = run(tmp_path, "syncbn.cli.bench", "layers", *settings)
    assert "nn.SyncBatchNorm" in output
    assert all(layer["step"]["median"] > 0 for layer in results["tiny_layer"]["layers"])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("graph", ["false", "true"])
def test_networks_are_measured(graph: str, tmp_path: Path) -> None:
    settings = ["device=cuda", "network=resnet20", "size=32", "batch=4", "steps=2"]
    output, results = run(tmp_path, "syncbn.cli.bench", "model", *settings, f"graph={graph}")
    assert ("in a CUDA graph" in output) == (graph == "true")
    assert all(step["step"]["median"] > 0 for step in results["steps"])
