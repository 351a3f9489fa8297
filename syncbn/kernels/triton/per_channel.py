"""Arithmetic on the numbers of channels, in :mod:`syncbn.kernels.triton.device`."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl


@triton.jit
def numbers_of(ptr, here_c, ROWS: tl.constexpr):
    """Return the numbers of channels, read by the first of ROWS rows, which are summed.

    With a row's value for each thread, the compiler reads once, and does what follows once. Fewer
    it takes for cheap, and repeats all that in every thread that needs the result: where channels
    are dense, for eight channels in each thread, a thousand instructions before the first value.
    """
    if ROWS == 1:
        numbers = tl.load(ptr, here_c, 0.0)
    else:
        rows = tl.arange(0, ROWS)[:, None]
        once = (rows == 0) & here_c[None, :]
        numbers = tl.sum(tl.load(ptr[None, :] + 0 * rows, once, 0.0), 0)
    return numbers


@triton.jit
def statistics(statistics_ptr, channels, c, here_c, AGAIN: tl.constexpr = False):
    """Return mean and invstd, read by each thread for its channels; AGAIN, if they have been.

    In a loop that sums, the compiler would lay out a tile as the result of :func:`numbers_of` lies,
    and read it a value at a time.
    """
    mean = tl.load(statistics_ptr + c, here_c, 0.0, volatile=AGAIN)
    return mean, tl.load(statistics_ptr + channels + c, here_c, 0.0, volatile=AGAIN)


@triton.jit
def affine(mean, invstd, weight_ptr, bias_ptr, c, here_c, COMPUTE: tl.constexpr):
    """Return pivot, rest (float64), scale and shift: y = (x - pivot) * scale + shift."""
    pivot = mean.to(COMPUTE)
    rest = mean - pivot.to(tl.float64)
    scale = invstd
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + c, here_c, 0.0).to(tl.float64)
    shift = -rest * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, here_c, 0.0).to(tl.float64)
    return pivot, rest, scale.to(COMPUTE), shift.to(COMPUTE)


@triton.jit
def through_relu(dy, xmu, scale, shift):
    """Return dy where the output is positive or NaN, else zero."""
    return tl.where(xmu * scale[None, :] + shift[None, :] <= 0, 0.0, dy)


@triton.jit
def move_averages(
    running_mean_ptr, running_var_ptr, tracked_ptr, mean, unbiased, momentum, c, here_c,
    CUMULATIVE: tl.constexpr,
):
    """Move the running averages there are towards a batch's mean and unbiased variance.

    If they are CUMULATIVE, the batch has been counted, and the counter says what its share is.
    """
    share = tl.full((), momentum, tl.float64)
    if CUMULATIVE:
        share = 1.0 / tl.maximum(tl.load(tracked_ptr).to(tl.float64), 1.0)
    move(running_mean_ptr, mean, share, c, here_c)
    move(running_var_ptr, unbiased, share, c, here_c)
    if tracked_ptr is not None and not CUMULATIVE:
        count_a_batch(tracked_ptr)


@triton.jit
def move(running_ptr, batch, share, c, here_c):
    """Move a running average, if there is one, towards a batch."""
    if running_ptr is not None:
        old = tl.load(running_ptr + c, here_c, 0.0).to(tl.float64)
        new = old + (batch - old) * share
        store_rounded(running_ptr + c, new, here_c)


@triton.jit
def count_a_batch(tracked_ptr):
    """Count a batch, by one program of all: else every block of channels would."""
    if tl.program_id(0) == 0:
        tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit
def store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, channels, c, here_c):
    """Store two numbers a channel, and rounded as gradients of parameters."""
    tl.store(sums_ptr + c, first, here_c)
    tl.store(sums_ptr + channels + c, second, here_c)
    if dbias_ptr is not None:
        store_rounded(dbias_ptr + c, first, here_c)
    if dweight_ptr is not None:
        store_rounded(dweight_ptr + c, second, here_c)


@triton.jit
def store_rounded(ptr, values, here):
    """Store float64 values as torch rounds them: halves by way of float32."""
    if ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    tl.store(ptr, values.to(ptr.dtype.element_ty), here)


@triton.jit
def store_count(count, sums_ptr, channels):
    """Store how many values of a channel a message is of."""
    tl.store(sums_ptr + 2 * channels, tl.full((), count, tl.float64))
