"""What runs on a GPU as a job of its own: benchmarks over NCCL, and every test of layers again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import run
from tests.transports import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def layer_tests() -> list[str]:
    """Return the files that `make test-triton` runs."""
    text = (ROOT / "Makefile").read_text()
    found = re.search(r"^LAYERS := .*?%\.py,(.*?)\)$", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].replace("\\", " ").split()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", layer_tests())
def test_layers_on_the_gpu(name: str) -> None:
    """Tensors are made there, and all ranks of a test share it."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"tests/test_{name}.py"]
    environment = {**os.environ, "SYNCBN_TEST_TRITON": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.timeout(180)
def test_layers_are_measured(tmp_path: Path) -> None:
    """NCCL takes no times in tensors of the CPU; torch's layer calls collectives in its own way."""
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
