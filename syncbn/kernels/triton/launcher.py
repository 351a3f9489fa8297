"""Launches of the Triton kernels, compiled once per layout, dtype and pointer alignment.

``kernel[grid](...)`` inspects every argument of every launch: 15 us of CPU time. A
:class:`LaunchPlan` passes the arguments of later launches directly to Triton's launcher.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from syncbn.kernels.activations import Activation
from syncbn.kernels.layout import NCSLayout
from syncbn.kernels.triton import kernels
from syncbn.kernels.triton.tiling import tile_elementwise, tile_reduction

# Bytes: Triton compiles for pointers that are multiples, or for any.
_ALIGNMENT = 16
# Least compute capability and driver version for programmatic dependent launch in CUDA graphs.
_PDL_CAPABILITY, _PDL_DRIVER = (9, 0), 12030
# Handle of cudaStreamPerThread: one handle, but a stream per thread.
_STREAM_PER_THREAD = 2
# Options of Triton's compiler; other constants are arguments of a kernel.
_OPTIONS = {"num_warps", "maxnreg", "enable_fp_fusion", "launch_pdl"}
# Multiprocessors of the interpreter's device.
_INTERPRETED_MULTIPROCESSORS = 132


class LaunchPlan:
    """A kernel with its grid, its constant arguments and its compiled forms.

    Args:
        kernel: function of :mod:`syncbn.kernels.triton.kernels`.
        num_programs: size of the grid.
        device: device of the tensors.
        constants: values of arguments by name, and options of Triton. Names that the kernel does
            not have are ignored.
        workspace: sizes of partial sums and counters, or None.
    """

    def __init__(
        self,
        kernel: Any,
        num_programs: int,
        device: torch.device,
        constants: dict[str, Any],
        workspace: tuple[int, int] | None = None,
    ) -> None:
        constants = constants | _pdl_options(device)
        self._kernel, self._device, self._grid = kernel, device, (num_programs, 1, 1)
        # In the order of the kernel's arguments, which a union of dictionaries keeps.
        self._template: dict[str, Any] = {name: constants.get(name) for name in kernel.arg_names}
        self._options = {k: v for k, v in constants.items() if k in _OPTIONS}
        self._compiled: dict[tuple[bool, ...], Any] = {}
        self._workspace = workspace

    def new_workspace(self) -> dict[str, Tensor]:
        """Return partial sums, uninitialized, and counters, zero; nothing without a workspace."""
        if self._workspace is None:
            return {}
        num_partials, num_counters = self._workspace
        partials = torch.empty(num_partials, dtype=torch.float64, device=self._device)
        return {"partials_ptr": partials, "counters_ptr": _counters(num_counters, self._device)}

    def __call__(self, **values: Tensor | float | None) -> None:
        """Launch on the current stream of the device.

        Args:
            values: tensors, None or floats by the names of arguments. The calls of a plan pass
                the same names in the same order, with the same dtypes.
        """
        arguments = (self._template | values).values()
        if isinstance(self._kernel, InterpretedFunction):
            self._kernel[self._grid](*arguments, **self._options)
            return
        if self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                self(**values)
            return
        key = tuple(
            [t.data_ptr() % _ALIGNMENT == 0 for t in values.values() if isinstance(t, Tensor)]
        )
        if compiled := self._compiled.get(key):
            compiled[self._grid](*arguments)
        else:
            self._compiled[key] = self._kernel[self._grid](*arguments, **self._options)


# Layers see the same few shapes again and again.
@lru_cache(maxsize=4096)
def plan_launch(
    name: str,
    layout: NCSLayout,
    device: torch.device,
    dtypes: tuple[torch.dtype | None, ...],
    dy_stride: int | None = None,
    activation: Activation | None = None,
    cumulative: bool = False,
) -> LaunchPlan:
    """Return the plan of a kernel of :mod:`syncbn.kernels.triton.kernels`.

    Args:
        name: name of the kernel.
        layout: layout of x.
        device: device of the tensors.
        dtypes: dtypes of the tensors, x's first; None for an argument that is None.
        dy_stride: stride between the samples of dy; None for a kernel without dy.
        activation: activation that is computed, or recomputed from x, or whose mask is read.
        cumulative: True for running statistics with ``momentum=None``.
    """
    kernel, dtype = getattr(kernels, name), dtypes[0]
    assert dtype is not None
    strides = {"x_stride": layout.stride, "stride": layout.dense_stride}
    if dy_stride is not None:
        strides["dy_stride"] = dy_stride
    if "splits" in kernel.arg_names:
        itemsize = dtype.itemsize * (1 if dy_stride is None else 2)
        multiprocessors = _INTERPRETED_MULTIPROCESSORS
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        tiling = tile_reduction(layout, dtype, [*strides.values()], itemsize, multiprocessors)
    else:
        tiling = tile_elementwise(layout, dtype, [*strides.values()])
    name, slope = activation or ("identity", 0.0)
    flags = {"ACTIVATION": name, "NEGATIVE_SLOPE": slope, "CUMULATIVE": cumulative}
    flags["count"] = layout.batch * layout.space
    constants = tiling.constants | strides | flags
    return LaunchPlan(kernel, tiling.programs, device, constants, tiling.workspace)


def _counters(size: int, device: torch.device) -> Tensor:
    """Return counters, one per block of channels, that are zero when a kernel starts: int32.

    Kernels reset them, so that the launches of a stream share one tensor and none needs a memset.
    A CUDA graph may be replayed beside other work and gets its own.
    """
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    if stream == _STREAM_PER_THREAD or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    return _stream_counters(size, device, stream)


@lru_cache(maxsize=1024)
def _stream_counters(size: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


@cache
def _pdl_options(device: torch.device) -> dict[str, bool]:
    """Return the options of programmatic dependent launch, where GPU and driver support it."""
    is_cuda = device.type == "cuda"
    is_new = is_cuda and torch.cuda.get_device_capability(device) >= _PDL_CAPABILITY
    # CPU builds of torch lack the function.
    get_driver_version: Any = getattr(torch._C, "_cuda_getDriverVersion", None)
    if is_new and get_driver_version() >= _PDL_DRIVER:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
