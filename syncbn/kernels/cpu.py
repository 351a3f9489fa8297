"""The kernels on CPU, in C++ (`cpu.cpp`): each reads its inputs and writes its output once.

They are called with ctypes. An extension module of torch would have to be built for each version of
torch, and one of nanobind for each version of Python; a plain C library serves them all and needs
neither to be built. A call costs about 2 us.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.kernels import reference
from syncbn.kernels.digest import digest, sources
from syncbn.kernels.samples import Samples
from syncbn.kernels.transform import Forward, Running, Transform

# Built by hatch_build.py.
PATH = Path(__file__).with_name("libsyncbn_cpu.so")
_REASON = PATH.with_suffix(".txt")
# The instruction sets of syncbn_level().
LEVELS = ("baseline", "AVX2", "AVX-512")

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_INT, _LONG, _DOUBLE, _POINTER = (
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_double,
    ctypes.c_void_p,
)
_OPERAND = (_POINTER, _LONG)
_INPUT = (_INT, _INT, _INT, _LONG, _LONG, _LONG, *_OPERAND)
_TRANSFORM = (_POINTER, _INT, _POINTER, _POINTER, ctypes.c_bool)
_RUNNING = (_DOUBLE, _INT, _POINTER, _POINTER, _POINTER)
_OUTPUT = (*_INPUT, *_TRANSFORM, _POINTER, _DOUBLE, *_OPERAND, *_OPERAND, *_RUNNING)
_NO_AVERAGES = (0.0, 0, 0, 0, 0)
_FUNCTIONS = {
    "moments": (*_INPUT, _POINTER),
    "normalize": _OUTPUT,
    "backward_reduce": (*_INPUT, *_TRANSFORM, *_OPERAND, _POINTER),
    "backward_elemt": (*_INPUT, *_TRANSFORM, *_OPERAND, _POINTER, *_OPERAND),
    "forward_alone": _OUTPUT,
    "backward_alone": (*_INPUT, *_TRANSFORM, *_OPERAND, _POINTER, *_OPERAND),
}


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
        x, samples = _readable(x)
        message = x.new_empty(2 * samples.channels + 1, dtype=torch.float64)
        _done(self.library.moments(*self._input(x, samples), message.data_ptr()))
        return message

    def normalize(
        self, x: Tensor, message: Tensor, how: Forward, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :func:`syncbn.kernels.reference.normalize`."""
        return self._output(self.library.normalize, x, message, how, residual)

    def backward_reduce(self, dy: Tensor, x: Tensor, transform: Transform) -> Tensor:
        """See :func:`syncbn.kernels.reference.backward_reduce`."""
        x, samples = _readable(x)
        transform, numbers = _numbers(transform)
        dy, stride = _alike(dy, x, samples)
        sums = x.new_empty(2 * samples.channels, dtype=torch.float64)
        head = *self._input(x, samples), *numbers
        _done(self.library.backward_reduce(*head, _address(dy), stride, sums.data_ptr()))
        return sums

    def backward_elemt(
        self,
        dy: Tensor,
        x: Tensor,
        transform: Transform,
        sums: Tensor,
        may_overwrite: bool = False,
    ) -> Tensor:
        """See :func:`syncbn.kernels.reference.backward_elemt`."""
        return self._gradient(self.library.backward_elemt, dy, x, transform, sums, may_overwrite)

    def forward_alone(
        self, x: Tensor, how: Forward, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`syncbn.kernels.alone.forward`: what is read twice stays in the cache."""
        message = x.new_empty(2 * x.shape[1] + 1, dtype=torch.float64)
        return message, *self._output(self.library.forward_alone, x, message, how, residual)

    def backward_alone(
        self, dy: Tensor, x: Tensor, transform: Transform, may_overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See :func:`syncbn.kernels.alone.backward`."""
        sums = x.new_empty(2 * x.shape[1], dtype=torch.float64)
        function = self.library.backward_alone
        return sums, self._gradient(function, dy, x, transform, sums, may_overwrite)

    def _output(
        self,
        function: Callable[..., int],
        x: Tensor,
        message: Tensor,
        how: Forward,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return y and statistics from a function that reads the message, or writes it first."""
        x, samples = _readable(x)
        statistics = torch.empty_like(message)
        # Copies must live until they have been read.
        _owner, numbers = _numbers(Transform(statistics, how.weight, how.bias, how.relu))
        y = _empty_like(x, samples)
        added, stride = (None, 0) if residual is None else _alike(residual, x, samples)
        operands = _address(added), stride, y.data_ptr(), samples.dense_stride
        head = *self._input(x, samples), *numbers, message.data_ptr(), how.eps
        running = how.running
        averages = None if running is None else _averages(running)
        _done(function(*head, *operands, *(averages or _NO_AVERAGES)))
        if running is not None and averages is None:
            reference.move_running(message, running)
        elif running is not None:
            # As a call of torch would: autograd must notice if it still needs what was there.
            increment_version([t for t in running[:3] if t is not None])
        return y, statistics

    def _gradient(
        self,
        function: Callable[..., int],
        dy: Tensor,
        x: Tensor,
        transform: Transform,
        sums: Tensor,
        may_overwrite: bool,
    ) -> Tensor:
        """Return dx from a function that reads the sums, or writes them first."""
        x, samples = _readable(x)
        transform, numbers = _numbers(transform)
        dy, stride = _alike(dy, x, samples)
        dx = dy if may_overwrite and stride == samples.dense_stride else _empty_like(x, samples)
        operands = _address(dy), stride, sums.data_ptr(), dx.data_ptr(), samples.dense_stride
        head = *self._input(x, samples), *numbers
        _done(function(*head, *operands))
        return dx

    def _input(self, x: Tensor, samples: Samples) -> tuple[int, ...]:
        head = self.level, torch.get_num_threads(), _DTYPES[x.dtype], *samples[:3]
        return *head, _address(x), samples.stride


@cache
def load() -> CPU | str:
    """Return the kernels for the best instructions of this processor, or why there are none."""
    if not PATH.exists():
        reason = _REASON.read_text().strip() if _REASON.exists() else "it has not been built"
        return f"there is no {PATH}: {reason}; see to it, and install syncbn again"
    try:
        library = ctypes.CDLL(str(PATH))
        for name, arguments in _FUNCTIONS.items():
            function = getattr(library, f"syncbn_{name}")
            function.argtypes = arguments
            setattr(library, name, function)
        if sources(PATH.parent) and _mark(library) != digest(PATH.parent):
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


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the sums of the C++ kernels")


def _address(t: Tensor | None) -> int:
    if t is None:
        return 0
    address = t.data_ptr()
    if address == 0 and t.numel() > 0:
        raise RuntimeError(
            f"got a {type(t).__name__} without memory of its own; the kernel 'cpu' takes plain "
            "tensors (kernel='reference' takes any)"
        )
    return address


def _readable(x: Tensor) -> tuple[Tensor, Samples]:
    """Return x, or a copy if it has to be, and what the kernels see in it."""
    x = x.resolve_neg() if x.is_neg() else x
    samples = Samples.of(x)
    if samples is None:
        x = x.contiguous()
        samples = Samples.dense(x.shape)
    return x, samples


def _alike(t: Tensor, x: Tensor, samples: Samples) -> tuple[Tensor, int]:
    """Return t, or a copy if it has to be, seen as x is, and its stride."""
    t = t.resolve_neg() if t.is_neg() else t
    if t._is_zerotensor():
        t = torch.zeros_like(x)
    found = Samples.of(t)
    if found == samples:
        return t, samples.stride
    if found is None or found[:3] != samples[:3]:
        return _empty_like(x, samples).copy_(t), samples.dense_stride
    return t, found.stride


def _empty_like(x: Tensor, samples: Samples) -> Tensor:
    """Return an uninitialized tensor of x's layout, without gaps."""
    if samples.stride == samples.dense_stride:
        return torch.empty_like(x)
    return samples.empty_like(x)


def _common_dtype(a: Tensor | None, b: Tensor | None) -> torch.dtype | None:
    """Return the dtype of C numbers that can be read in one call; None if they cannot."""
    some = b if a is None else a
    if some is None:
        return torch.float32
    for t in (a, b):
        if t is not None and not (t.dtype == some.dtype and t.is_contiguous() and not t.is_neg()):
            return None
    return some.dtype


def _numbers(t: Transform) -> tuple[Transform, tuple[int, ...]]:
    """Return t with a weight and a bias that can be read in one call, and what the call takes."""
    dtype = _common_dtype(t.weight, t.bias)
    if dtype is None:
        weight, bias = (
            None if v is None else v.resolve_neg().double().contiguous() for v in (t.weight, t.bias)
        )
        t, dtype = Transform(t.statistics, weight, bias, t.relu), torch.float64
    addresses = _address(t.weight), _address(t.bias)
    return t, (t.statistics.data_ptr(), _DTYPES[dtype], *addresses, t.relu)


def _averages(running: Running) -> tuple[float, int, int, int, int] | None:
    """Return what a call takes; None if it cannot take these averages."""
    mean, var, tracked, momentum = running
    dtype = _common_dtype(mean, var)
    counter = tracked is None or (tracked.dtype is torch.int64 and tracked.device.type == "cpu")
    if dtype is None or not counter or momentum != momentum:
        return None
    addresses = _address(mean), _address(var), _address(tracked)
    # To the library NaN is None; a momentum that is NaN was left to the reference above.
    return math.nan if momentum is None else momentum, _DTYPES[dtype], *addresses
