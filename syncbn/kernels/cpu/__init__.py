"""The kernels on CPU, in C++ (`cpu.cpp`): each reads its inputs and writes its output once.

They are called with ctypes. An extension module of torch would have to be built for each version of
torch, and one of nanobind for each version of Python; a plain C library serves them all and needs
neither to be built.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.kernels import reference
from syncbn.kernels.coefficients import Forward, Transform, Wanted
from syncbn.kernels.cpu import abi as call
from syncbn.kernels.cpu.source_hash import checksum_path, find_sources, hash_sources, is_intact
from syncbn.kernels.layout import alike, empty_like, readable
from syncbn.moments import Moments, get_packed_size

# Built by hatch_build.py.
PATH = Path(__file__).with_name("libsyncbn_cpu.so")
_REASON = PATH.with_suffix(".txt")
# The instruction sets of syncbn_level().
LEVELS = ("baseline", "AVX2", "AVX-512")

_FUNCTIONS = (
    *("moments", "normalize", "backward_reduce", "backward_elemt"),
    *("forward_local", "backward_local"),
)


@dataclass(frozen=True)
class CPU:
    """The functions of :mod:`syncbn.kernels.reference`, for tensors on CPU.

    Attributes:
        library: `cpu.cpp`, loaded.
        level: of the instructions to use: a position in :data:`LEVELS`.
    """

    library: ctypes.CDLL
    level: int

    def moments(self, x: Tensor) -> Tensor:
        """See :func:`syncbn.kernels.reference.moments`."""
        x, samples = readable(x)
        size = get_packed_size(samples.channels, x.dtype)
        message = x.new_empty(size, dtype=torch.float64)
        self._run(self.library.moments, x, samples, message.data_ptr())
        return message

    def normalize(
        self, x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`syncbn.kernels.reference.normalize`."""
        running = how.running
        averages = None if running is None else call.averages(running)
        found = self._output(self.library.normalize, x, message, how, residual, averages)
        if running is not None and averages is None:
            reference.move_running(Moments.unpack(message, x.shape[1]), running)
        return found

    def backward_reduce(
        self, dy: Tensor, x: Tensor, transform: Transform, wanted: Wanted = (None, None)
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See :func:`syncbn.kernels.reference.backward_reduce`."""
        sums = x.new_empty(2 * x.shape[1], dtype=torch.float64)
        function = self.library.backward_reduce
        _, dweight, dbias = self._backward(function, dy, x, transform, sums, wanted)
        return sums, dweight, dbias

    def backward_elemt(
        self,
        dy: Tensor,
        x: Tensor,
        transform: Transform,
        sums: Tensor,
        may_overwrite: bool = False,
    ) -> Tensor:
        """See :func:`syncbn.kernels.reference.backward_elemt`."""
        function = self.library.backward_elemt
        dx, _, _ = self._backward(function, dy, x, transform, sums, dx_over_dy=may_overwrite)
        assert dx is not None
        return dx

    def forward_alone(
        self, x: Tensor, how: Forward, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`syncbn.kernels.alone.forward`: what is read twice stays in the cache."""
        averages = None if how.running is None else call.averages(how.running)
        if how.running is not None and averages is None:
            return self.normalize(x, self.moments(x), how, residual)
        return self._output(self.library.forward_local, x, None, how, residual, averages)

    def backward_alone(
        self,
        dy: Tensor,
        x: Tensor,
        transform: Transform,
        wanted: Wanted,
        may_overwrite: bool = False,
        keep_sums: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """See :func:`syncbn.kernels.alone.backward`."""
        sums = x.new_empty(2 * x.shape[1], dtype=torch.float64)
        function = self.library.backward_local
        dx, dweight, dbias = self._backward(function, dy, x, transform, sums, wanted, may_overwrite)
        assert dx is not None
        return sums, dx, dweight, dbias

    def _output(
        self,
        function: Callable[[bytes], int],
        x: Tensor,
        message: Tensor | None,
        how: Forward,
        residual: Tensor | None,
        averages: call.Averages | None,
    ) -> tuple[Tensor, Tensor]:
        """Return y and statistics from a function that reads the message, or sums up itself."""
        x, samples = readable(x)
        statistics = x.new_empty(2 * samples.channels + 1, dtype=torch.float64)
        # Copies must live until they have been read.
        _owner, numbers = call.numbers(Transform(statistics, how.weight, how.bias, how.relu))
        y = empty_like(x, samples)
        added, stride = (None, 0) if residual is None else alike(residual, x, samples)
        pair, out = (call.address(added), stride), (y.data_ptr(), samples.dense_stride)
        packed = 0 if message is None else message.data_ptr()
        moved = averages or call.NO_AVERAGES
        self._run(function, x, samples, packed, numbers, call.NO_OPERAND, pair, out, moved, how.eps)
        if averages is not None and how.running is not None:
            # As a call of torch would: autograd must notice if it still needs what was there.
            increment_version([t for t in how.running[:3] if t is not None])
        return y, statistics

    def _backward(
        self,
        function: Callable[[bytes], int],
        dy: Tensor,
        x: Tensor,
        given: Transform,
        sums: Tensor,
        wanted: Wanted = (None, None),
        dx_over_dy: bool | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return dx, dweight and dbias from a function that reads the sums, or writes them first.

        Args:
            function: of the library.
            dy: gradient of the output, shape and dtype of x.
            x: shape ``[N, C, *]``.
            given: the transform of the forward pass.
            sums: float64, shape ``[2C]``.
            wanted: weight and bias; None for each whose gradient is not.
            dx_over_dy: whether dx may take dy's memory; None for no dx.
        """
        x, samples = readable(x)
        transform, numbers = call.numbers(given)
        dy, stride = alike(dy, x, samples)
        dx = None
        if dx_over_dy is not None:
            over = dx_over_dy and stride == samples.dense_stride
            dx = dy if over else empty_like(x, samples)
        # Of the dtype that is read: if that is another, they are converted below.
        writes = transform is given
        dweight, dbias = (None if t is None or not writes else torch.empty_like(t) for t in wanted)
        gradients = call.address(dweight), call.address(dbias)
        pair, out = (call.address(dy), stride), (call.address(dx), samples.dense_stride)
        self._run(function, x, samples, sums.data_ptr(), numbers, gradients, pair, out)
        if not writes:
            dweight, dbias = reference.parameter_gradients(sums, *wanted)
        return dx, dweight, dbias

    def _run(self, function: Callable[[bytes], int], x: Tensor, *arguments: Any) -> None:
        if function(call.pack(self.level, x, *arguments)):
            raise MemoryError("no memory for the sums of the C++ kernels")


@cache
def load() -> CPU | str:
    """Return the kernels for the best instructions of this processor, or why there are none."""
    if not PATH.exists():
        reason = _REASON.read_text().strip() if _REASON.exists() else "it has not been built"
        return f"there is no {PATH}: {reason}; see to it, and install syncbn again"
    try:
        # Before it is mapped: a page that is missing from the file ends the process by SIGBUS.
        if not is_intact(PATH):
            return f"{PATH} is damaged: not as in {checksum_path(PATH)}; install syncbn again"
        library = ctypes.CDLL(str(PATH))
        for name in _FUNCTIONS:
            function = getattr(library, f"syncbn_{name}")
            function.argtypes = (ctypes.c_char_p,)
            setattr(library, name, function)
        if find_sources(PATH.parent) and _mark(library) != hash_sources(PATH.parent):
            return f"{PATH} is of other sources than those beside it; install syncbn again"
        return CPU(library, library.syncbn_level())
    except (OSError, AttributeError, ValueError) as error:
        return f"{PATH} cannot be used: {error}; install syncbn again"


def _mark(library: ctypes.CDLL) -> str:
    mark = (ctypes.c_char * 256).in_dll(library, "syncbn_mark").value.decode()
    return mark.partition(",")[0]


def describe() -> str:
    """Return the instructions that the kernels use here, or why there are none."""
    found = load()
    return found if isinstance(found, str) else LEVELS[found.level]
