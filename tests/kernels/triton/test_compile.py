"""The Triton kernel, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from syncbn import kernels
from syncbn.kernels import select_kernel
from syncbn.kernels.layout import NCSLayout
from tests.kernel_cases import device_of
from tests.transports import ROOT

if TYPE_CHECKING:
    from syncbn.kernels.triton.launcher import LaunchPlan

KERNELS = {"moments", "normalize", "backward_reduce", "backward_elemt"}
# Scalar memory accesses.
SCALAR = {"ld.global.b16", "st.global.b16", "cp.async 4"}


def run_program(name: str, *arguments: str, cache: Path) -> dict[str, Any]:
    """Return the JSON that a program of this folder prints; there, nothing is interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.triton.{name}", *arguments],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    return results


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("architecture", "cases"),
    [("80", "ResNet-50 NCHW"), ("90", "representative"), ("100", "ResNet-50 NHWC")],
)
def test_kernels_compile_for_gpus(architecture: str, cases: str, tmp_path: Path) -> None:
    """16-byte accesses where rows allow them; registers for the resident programs of an SM."""
    results = run_program("compile_for_gpu", architecture, cases, cache=tmp_path)
    for case, compiled in results.items():
        assert {kernel["kernel"] for kernel in compiled} == KERNELS
        for kernel in compiled:
            description = f"{case}: {kernel}"
            assert kernel["spilled"] <= 32, description
            if case.startswith("ResNet-50"):
                assert kernel["registers"] <= 128, description
                assert {"ld.global.v4.b32", "cp.async 16"} & set(kernel["accesses"]), description
            if "bfloat16" in case and not case.startswith(("odd", "one")):
                # A scalar access is an eighth of a vector; per-channel values may have some.
                scalar = [n for access, n in kernel["accesses"].items() if access in SCALAR]
                assert sum(scalar) <= 4, description


@pytest.mark.timeout(120)
def test_launch_plans_reuse_compiled_kernels(tmp_path: Path) -> None:
    results = run_program("launch_for_gpu", cache=tmp_path)
    assert len(results) == 9
    assert all(results.values()), results


@pytest.mark.parametrize(
    "missing", ["triton is not installed", "a C compiler", "headers of Python"]
)
def test_a_missing_dependency_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first launch on a GPU would fail."""
    match missing:
        case "triton is not installed":
            monkeypatch.setattr(kernels, "find_spec", lambda _: None)
        case "a C compiler":
            monkeypatch.delenv("CC", raising=False)
            monkeypatch.setenv("PATH", "")
        case _:
            monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    kernels.triton_unavailable_reason.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=f"kernel 'triton': .*{missing}"):
            select_kernel("triton", torch.empty(1, 1, device=device_of("triton")))
    finally:
        kernels.triton_unavailable_reason.cache_clear()


def specialization(plan: LaunchPlan) -> tuple[object, ...]:
    """Return the properties of a plan that Triton compiles into a kernel."""
    arguments = plan._template
    constants = tuple(str(value) for name, value in arguments.items() if name.isupper())
    ones = tuple(name for name, value in arguments.items() if value == 1 and name.islower())
    return plan._kernel.__name__, constants, ones, tuple(plan._options.items())


@pytest.mark.parametrize(("channels_last", "limit"), [(False, 70), (True, 35)])
def test_images_of_many_sizes_share_compiled_kernels(channels_last: bool, limit: int) -> None:
    """Compiling a kernel takes a second."""
    from syncbn.kernels.triton.launcher import plan_launch

    sizes = torch.randint(12, 200, (100, 2), generator=torch.Generator().manual_seed(0))
    compiled = set()
    dtypes = (torch.bfloat16,)
    for space in sizes.prod(1).tolist():
        layout = NCSLayout.contiguous((4, 256, space))
        if channels_last:
            layout = NCSLayout(4 * space, 256, 1, 256, 256)
        for name in ("moments", "normalize", "backward_reduce", "backward_elemt"):
            dy_stride = layout.dense_stride if name.startswith("backward") else None
            plan = plan_launch(name, layout, device_of("triton"), dtypes, dy_stride)
            compiled.add(specialization(plan))
    assert len(compiled) <= limit
