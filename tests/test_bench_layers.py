"""syncbn-bench layers and model: what they measure, and what with."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from config import Arch, ModelConfig
from resnet import build_resnet
from torch import nn

from syncbn import SyncBatchNorm2d, convert_sync_batchnorm, fuse
from syncbn.bench.memory import peak_bytes
from syncbn.bench.resnet20 import resnet20
from syncbn.bench.resnet50 import resnet50
from tests.commands import run
from tests.kernel_cases import device_of, needs_cpp

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.mark.parametrize(
    ("launcher", "kernel"),
    [
        ("alone", "reference"),
        pytest.param("mpirun", "cpu", marks=needs_cpp),
        ("torchrun", "reference"),
    ],
)
def test_layers(launcher: str, kernel: str, tmp_path: Path) -> None:
    ranks = 1 if launcher == "alone" else 2
    dtypes = ["float32", "bfloat16"] if launcher == "alone" else ["float32"]
    settings = ["shapes=[3x9x9,40x2x2]", "batch=3", "rounds=2", f"kernels=[{kernel}]"]
    output, results = run(
        tmp_path,
        *(TORCHRUN if launcher == "torchrun" else []),
        "syncbn.cli.bench",
        "layers",
        *(["ranks=2"] if launcher == "mpirun" else []),
        *settings,
        f"dtypes=[{','.join(dtypes)}]",
        f"png={tmp_path / 'report.png'}",
    )
    inputs = [(case["case"]["shape"], case["case"]["layout"]) for case in results["layers"]]
    both = [("3x9x9", "contiguous"), ("40x2x2", "contiguous")]
    assert inputs[:4] == [*both, *((shape, "channels_last") for shape, _ in both)]
    assert [case["case"]["dtype"] for case in results["layers"]] == [
        d for d in dtypes for _ in range(4)
    ]
    for case in results["layers"]:
        sizes = {layer["ranks"] for layer in case["layers"]}
        assert sizes == {1, ranks}
        assert [layer["name"] for layer in case["layers"]][:2] == 2 * ["nn.BatchNorm2d"]
        for layer in case["layers"]:
            assert layer["step"]["median"] > 0
            # At least the output and the gradient.
            assert layer["peak_bytes"] >= 3 * 3 * 9 * 9 * 2
    ratios = [layer["ratio"]["median"] for layer in results["layers"][0]["layers"]]
    assert ratios[:2] == [1, 1]
    assert len(results["kernels"]) == 2 * len(inputs)
    for costs in results["kernels"]:
        assert set(costs["share"]) == {"moments", "normalize", "backward_reduce", "backward_elemt"}
    forward, step = results["overheads"]
    assert step["alone"]["median"] > forward["alone"]["median"] > 0
    for overhead in (forward, step):
        assert (overhead["all_reduce"]["median"] > 0) == (ranks > 1)
    assert f"{kernel}, {ranks} ranks" in output or ranks == 1
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_kernel_that_notes_what_came_through(tmp_path: Path) -> None:
    settings = ["shapes=[3x9x9]", "batch=3", "rounds=1", "kernels=[triton]"]
    settings += [f"device={device_of('triton')}", "dtypes=[float32]"]
    output, results = run(tmp_path, "syncbn.cli.bench", "layers", *settings)
    assert [costs["after"] for costs in results["kernels"][::2]] == [
        "",
        "ReLU",
        "addition and ReLU",
    ]
    assert "Kernel triton with addition and ReLU, channels_last, float32: share of" in output


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_threads_and_the_chosen_kernel(dtype: str, tmp_path: Path) -> None:
    output, results = run(
        tmp_path,
        *("syncbn.cli.bench", "layers", "shapes=[3x9x9]", "batch=3", "rounds=2", "kernels=[auto]"),
        *("threads=2", f"dtypes=[{dtype}]"),
    )
    for kernel in results["kernels"]:
        assert set(kernel["speedup"]) == set(kernel["share"])
    assert "Time with one thread over that with 2" in output


@pytest.mark.parametrize("ranks", [1, 2])
def test_model(ranks: int, tmp_path: Path) -> None:
    output, results = run(
        tmp_path,
        "syncbn.cli.bench",
        "model",
        f"ranks={ranks}",
        "network=resnet20",
        "batch=2",
        "size=32",
        "steps=2",
        "dtype=bfloat16",
        "layout=channels_last",
    )
    names = ["no batch norm", "nn.BatchNorm2d", "ours", "ours, fused"]
    wanted = names if ranks == 1 else [*names, "ours, 2 ranks", "ours, 2 ranks, fused"]
    assert [step["norm"] for step in results["steps"]] == wanted
    assert "Training step of resnet20, 2 images of 32x32" in output
    without, theirs = results["steps"][:2]
    assert theirs["ratio"]["median"] == 1
    assert 0 < without["peak_bytes"] < theirs["peak_bytes"]


@pytest.mark.timeout(120)
def test_compile(tmp_path: Path) -> None:
    output, results = run(
        tmp_path,
        *("syncbn.cli.bench", "compile", "backend=aot_eager", "batch=2", "size=8", "rounds=1"),
    )
    theirs, ours = results["costs"]
    assert [theirs["norm"], ours["norm"]] == ["nn.BatchNorm2d", "ours"]
    assert theirs["ratio"]["median"] == 1
    # What compiles takes far longer than what has been compiled.
    assert all(cost["first"]["median"] > 2 * cost["step"]["median"] for cost in (theirs, ours))
    assert "torch.compile of resnet20, aot_eager" in output


@needs_cpp
@pytest.mark.parametrize(("place", "channels"), [("4", 64), ("5", 256)])
def test_a_fused_block_needs_no_more_memory_than_torchs(place: str, channels: int) -> None:
    """Forward and backward of a bottleneck of ResNet-50, with and without a projection."""
    theirs = resnet50().get_submodule(place)
    x = torch.randn(2, channels, 28, 28, requires_grad=True)
    ours = convert_sync_batchnorm(copy.deepcopy(theirs))
    fused = copy.deepcopy(ours)
    assert len(fuse(fused).fused) == 3

    def peak(net: nn.Module) -> int:
        def step() -> None:
            # The gradient of the block is nobody else's, as in a network.
            (net(x) * 1.0).sum().backward()

        step()  # makes the gradients of parameters
        return peak_bytes(step, x.device)

    # Numbers by channel: statistics in float64, gradients of parameters.
    most = peak(theirs) + 2**14
    assert peak(ours) <= most
    assert peak(fused) <= most


def test_networks_have_the_parameters_that_the_paper_gives() -> None:
    parameters = [parameter.numel() for parameter in resnet50().parameters()]
    assert sum(parameters) == 25_557_032
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in resnet50().modules()) == 53
    assert resnet50()(torch.randn(2, 3, 64, 64)).shape == (2, 1000)


@needs_cpp
def test_peak_memory_is_that_of_the_kernel_in_use() -> None:
    x = torch.randn(4, 3, 50, 50, requires_grad=True)
    layer = SyncBatchNorm2d(3)

    def peak(kernel: str) -> float:
        layer.impl = kernel
        return peak_bytes(lambda: (layer(x) * 2).sum().backward(), x.device) / x.nbytes

    peak("cpu")  # makes the gradients
    # y and what is twice that; then the gradients of both, the first of which becomes dx.
    assert 1.9 < peak("cpu") < 2.5
    assert peak("reference") > 3


def test_peak_memory_counts_what_is_freed() -> None:
    def run() -> None:
        first = torch.empty(1000)
        del first
        assert torch.empty(3000) is not torch.empty(2000)

    assert peak_bytes(run, torch.device("cpu")) == 5000 * 4


def test_malloc_keeps_what_is_freed() -> None:
    """In a process of its own: there is no way back."""
    program = """
import resource, torch
from syncbn.bench.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(16 << 20).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults(), faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, can, _, after = done.stdout.split()
    assert (can == "True") == (platform.libc_ver()[0] == "glibc")
    if can == "True":
        assert int(after) < int(before) / 10


def test_the_network_is_that_of_the_example() -> None:
    ours = resnet20()
    model = ModelConfig(Arch.resnet20, width=16, zero_init_residual=False, weights=None)
    theirs = build_resnet(model, channels=3, num_classes=10, seed=0)
    for mine, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        mine.copy_(other)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in ours.modules()) == 19
    assert sum(parameter.numel() for parameter in ours.parameters()) == 269_722
