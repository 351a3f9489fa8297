"""Each benchmark, as a command under one of the launchers: its report and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import percentiles, run, run_here
from tests.kernel_cases import device_of, needs_cpp

BENCH = "syncbn.cli.bench"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def run_over(ranks: int, folder: Path, command: list[str]) -> tuple[str, dict[str, Any]]:
    """Run in this process's fork, or on two ranks of torchrun."""
    return run(folder, *TORCHRUN, BENCH, *command) if ranks > 1 else run_here(folder, *command)


@pytest.mark.parametrize(
    ("ranks", "kernel"), [(1, "reference"), pytest.param(2, "cpu", marks=needs_cpp)]
)
def test_layers(ranks: int, kernel: str, tmp_path: Path) -> None:
    dtypes, shapes = ["float32", "bfloat16"][: 3 - ranks], ["3x9x9", "40x2x2"][: 3 - ranks]
    activation = "relu" if ranks == 1 else "silu"
    command = [
        *("layers", "batch=3", "rounds=1", f"impls=[{kernel}]"),
        *(f"shapes=[{','.join(shapes)}]", f"dtypes=[{','.join(dtypes)}]"),
        *(f"activation={activation}", f"png={tmp_path / 'report.png'}"),
    ]
    output, results = run_over(ranks, tmp_path, command)
    cases = [costs["case"] for costs in results["layers"]]
    layouts = "contiguous", "channels_last"
    wanted = [(d, layout, shape) for d in dtypes for layout in layouts for shape in shapes]
    assert [(case["dtype"], case["layout"], case["shape"]) for case in cases] == wanted
    assert [costs["case"] for costs in results["kernels"]] == cases
    for costs in [*results["layers"], results["tiny_layer"]]:
        layers = [(layer["name"], layer["ranks"]) for layer in costs["layers"]]
        assert layers == [
            *[("nn.BatchNorm2d", 1)] * 3,
            *((kernel, size) for size in sorted({1, ranks}) for _ in range(3)),
        ]
        epilogues = ["", activation, f"addition and {activation}"]
        assert [layer["epilogue"] for layer in costs["layers"][:3]] == epilogues
        assert [layer["ratio"]["median"] for layer in costs["layers"][:3]] == [1, 1, 1]
        case = costs["case"]
        channels, height, width = map(int, case["shape"].split("x"))
        nbytes = case["batch"] * channels * height * width * (2 if "b" in case["dtype"] else 4)
        for layer in costs["layers"]:
            assert layer["step"]["median"] > 0
            assert layer["peak_bytes"] >= 2 * nbytes  # output and input gradient
    for costs in results["kernels"]:
        assert set(costs["share"]) == {"moments", "normalize", "backward_reduce", "backward_elemt"}
    assert f"{kernel}, {ranks} ranks" in output or ranks == 1
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("triton", "float32"), ("auto", "float64"), ("auto", "float16")]
)
def test_layers_for_kernels_and_dtypes(kernel: str, dtype: str, tmp_path: Path) -> None:
    settings = ["shapes=[3x9x9]", "batch=3", "rounds=1", f"dtypes=[{dtype}]"]
    device = f"device={device_of(kernel)}"
    output, results = run_here(tmp_path, "layers", *settings, f"impls=[{kernel}]", device)
    assert f"Kernel {kernel}, channels_last, {dtype}: % of" in output
    assert [costs["kernel"] for costs in results["kernels"]] == [kernel] * 2


@pytest.mark.parametrize(("ranks", "dtype"), [(1, "bfloat16"), (2, "float32")])
def test_model(ranks: int, dtype: str, tmp_path: Path) -> None:
    settings = ["batch=2", "size=32", "steps=1", f"dtype={dtype}", "layout=channels_last"]
    command = ["model", "network=resnet20", *settings, "threads=1"]
    output, results = run_over(ranks, tmp_path, command)
    names = ["no batch norm", "nn.BatchNorm2d", "ours", "ours, fused"]
    names += ["ours, 2 ranks", "ours, 2 ranks, fused"] if ranks == 2 else []
    assert [step["norm"] for step in results["steps"]] == names
    assert "Training step of resnet20, 2 images of 32x32" in output
    without, baseline = results["steps"][:2]
    assert baseline["ratio"]["median"] == 1
    assert 0 < without["peak_bytes"] < baseline["peak_bytes"]


def test_calibration(tmp_path: Path) -> None:
    settings = ["sizes=[8,16]", "samples=[4,2]", "batches=[1,4]", "repeats=1"]
    output, results = run_here(tmp_path, "calibration", *settings, "sequential_repeats=1")
    assert "8x8, lockstep, batch 4" in output
    assert results["layers"] == 19
    costs = results["costs"]
    assert [(cost["size"], cost["method"], cost["batch"]) for cost in costs] == [
        *((8, method, batch) for batch in (1, 4) for method in ("lockstep", "own forward")),
        (8, "sequential", 16),
        *((16, method, 1) for method in ("lockstep", "own forward")),
        (16, "sequential", 16),
    ]
    assert all(cost["plain"]["median"] > 0 and cost["ratio"]["median"] > 0 for cost in costs)
    # Input and output of a convolution with 16 channels, for one 8x8 image.
    plain, giant = costs[0]["plain_bytes"], results["giant_batch_bytes"]
    assert plain >= 2 * 4 * 16 * 8 * 8
    assert giant["8x8, one giant batch of 4"] >= 4 * 2 * 4 * 16 * 8 * 8
    assert plain < costs[0]["bytes"]
    assert plain < costs[4]["bytes"]


@pytest.mark.timeout(180)  # polling ranks are slow on busy cores
def test_collectives(tmp_path: Path) -> None:
    """The command starts its two ranks with mpirun."""
    settings = ["sizes=[1,129]", "repeats=3", "steps=1", "batch=2"]
    output, results = run(tmp_path, BENCH, "collectives", *settings, seconds=150)
    assert output.count("all_reduce of float64 values") == 1
    assert output.count("Training step of ResNet-20") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == "collectives"
    assert report["settings"]["repeats"] == 3
    assert "Open MPI" in report["facts"]["MPI"]
    assert report["facts"]["ranks"].startswith("2, ")

    assert [row["numel"] for row in results["all_reduce"]] == [1, 129]
    step = results["training_step"]
    assert [*step["seconds"]] == ["local", "mpi4py", "gloo"]
    for seconds in (step["seconds"], *(row["seconds"] for row in results["all_reduce"])):
        assert len(seconds) == 3
        assert all(time["median"] > 0 for time in seconds.values())
    assert len(percentiles(results)) == 2 * 5 + 3 + 2


def test_collectives_without_mpi(tmp_path: Path) -> None:
    settings = ["sizes=[129]", "repeats=3", "steps=1", "batch=2"]
    output, results = run_over(2, tmp_path, ["collectives", *settings])
    assert "mpi4py" not in output
    (row,) = results["all_reduce"]
    assert [*row["seconds"]] == [*results["training_step"]["synchronization"]] == ["gloo"]
    assert row["ratio"] is None
    assert len(percentiles(results)) == 1 + 2 + 1
