"""The Triton kernels: compiled for GPUs that are not here, launched by a driver of no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn import kernels
from syncbn.kernels import choose
from tests.kernel_cases import device_of
from tests.transports import ROOT

SINGLE = {"ld.global.b16", "st.global.b16", "cp.async 4"}


def printed_by(program: str, *arguments: str, cache: Path) -> dict[str, Any]:
    """Return what a program of the tests prints, where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.{program}", *arguments],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(180)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_for_gpus(architecture: int, tmp_path: Path) -> None:
    """Needs none: accesses of 16 bytes where rows allow, registers for what runs at a time."""
    found = printed_by("triton_compile", str(architecture), cache=tmp_path)
    for name, launched in found.items():
        assert {k["kernel"] for k in launched} >= {
            "moments",
            "normalize",
            "backward_reduce",
            "backward_elemt",
        }
        # One reads dy, the other bits alone.
        gates = [k["accesses"] for k in launched if k["kernel"] == "through_gate"]
        if name.startswith("ResNet-50"):
            assert ["ld.global.v4.b32" in accesses for accesses in gates] == [False, True], name
        for kernel in launched:
            about = f"{name}: {kernel}"
            assert kernel["spilled"] <= 32, about
            if name.startswith("ResNet-50"):
                assert kernel["registers"] <= 128, about
                vectors = {"ld.global.v4.b32", "cp.async 16"} & set(kernel["accesses"])
                assert vectors or kernel["kernel"] == "through_gate", about
            if "bfloat16" in name and not name.startswith(("odd", "one")):
                # One value at a time is an eighth of what a thread can ask for; a gate has no more.
                single = [n for access, n in kernel["accesses"].items() if access in SINGLE]
                assert sum(single) <= 4, about


@pytest.mark.timeout(120)
def test_kept_launches_are_those_of_triton(tmp_path: Path) -> None:
    """The driver is told what Triton's launcher tells it; what it refuses, Triton is asked for."""
    found = printed_by("triton_launches", cache=tmp_path)
    assert len(found) == 10 * 9 + 11
    assert all(found.values()), found


@pytest.mark.parametrize("what", ["triton is not installed", "a C compiler", "headers of Python"])
def test_what_compiling_needs_is_said(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first launch on a GPU would be where it is missed."""
    match what:
        case "triton is not installed":
            monkeypatch.setattr(kernels, "find_spec", lambda _: None)
        case "a C compiler":
            monkeypatch.delenv("CC", raising=False)
            monkeypatch.setenv("PATH", "")
        case _:
            monkeypatch.setattr("sysconfig.get_path", lambda _: "/nowhere")
    kernels.missing_triton.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=f"kernel 'triton': .*{what}"):
            choose("triton", torch.empty(1, 1, device=device_of("triton")))
    finally:
        kernels.missing_triton.cache_clear()
