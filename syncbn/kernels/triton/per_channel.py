"""Per-channel arithmetic of :mod:`syncbn.kernels.triton.kernels`, in float64."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# fmt: off

import triton
import triton.language as tl


@triton.jit
def load_per_channel(ptr, mask_c, REPLICAS: tl.constexpr):
    """Load per-channel values: the first of REPLICAS rows, summed with rows of zeros.

    With one value per thread, the compiler loads once and does the per-channel arithmetic once.
    With fewer it replicates both in every thread that needs the result: in channels_last, eight
    channels per thread, a thousand instructions before the first value.
    """
    if REPLICAS == 1:
        numbers = tl.load(ptr, mask_c, 0.0)
    else:
        rows = tl.arange(0, REPLICAS)[:, None]
        once = (rows == 0) & mask_c[None, :]
        numbers = tl.sum(tl.load(ptr[None, :] + 0 * rows, once, 0.0), 0)
    return numbers


@triton.jit
def load_statistics(statistics_ptr, channels, c, mask_c, AGAIN: tl.constexpr = False):
    """Load mean and invstd in each thread; AGAIN keeps the compiler from reusing an earlier load.

    In a reduction, the compiler would give tiles the layout of :func:`load_per_channel`'s result,
    and load them one value at a time.
    """
    mean = tl.load(statistics_ptr + c, mask_c, 0.0, volatile=AGAIN)
    return mean, tl.load(statistics_ptr + channels + c, mask_c, 0.0, volatile=AGAIN)


@triton.jit
def load_affine(mean, invstd, weight_ptr, bias_ptr, c, mask_c, COMPUTE: tl.constexpr):
    """Return pivot, rest (float64), scale and shift: y = (x - pivot) * scale + shift."""
    pivot = mean.to(COMPUTE)
    rest = mean - pivot.to(tl.float64)
    scale = invstd
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + c, mask_c, 0.0).to(tl.float64)
    shift = -rest * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask_c, 0.0).to(tl.float64)
    return pivot, rest, scale.to(COMPUTE), shift.to(COMPUTE)


@triton.jit
def update_running_stats(
    running_mean_ptr, running_var_ptr, num_batches_ptr, mean, unbiased, momentum, c, mask_c,
    CUMULATIVE: tl.constexpr,
):
    """Update the running statistics with a batch's mean and unbiased variance.

    For CUMULATIVE statistics the batch is already counted, and the counter gives its weight.
    """
    share = tl.full((), momentum, tl.float64)
    if CUMULATIVE:
        share = 1.0 / tl.maximum(tl.load(num_batches_ptr).to(tl.float64), 1.0)
    update_average(running_mean_ptr, mean, share, c, mask_c)
    update_average(running_var_ptr, unbiased, share, c, mask_c)
    if num_batches_ptr is not None and not CUMULATIVE:
        increment_counter(num_batches_ptr)


@triton.jit
def update_average(running_ptr, batch, share, c, mask_c):
    """Update a running average, unless it is None, with the batch's value."""
    if running_ptr is not None:
        old = tl.load(running_ptr + c, mask_c, 0.0).to(tl.float64)
        new = old + (batch - old) * share
        store_rounded(running_ptr + c, new, mask_c)


@triton.jit
def increment_counter(num_batches_ptr):
    """Add one to the batch counter, in a single program of the grid."""
    if tl.program_id(0) == 0:
        tl.store(num_batches_ptr, tl.load(num_batches_ptr) + 1)


@triton.jit
def store_sums(first, second, sums_ptr, dbias_ptr, dweight_ptr, channels, c, mask_c):
    """Store two sums per channel, and their rounded values as parameter gradients."""
    tl.store(sums_ptr + c, first, mask_c)
    tl.store(sums_ptr + channels + c, second, mask_c)
    if dbias_ptr is not None:
        store_rounded(dbias_ptr + c, first, mask_c)
    if dweight_ptr is not None:
        store_rounded(dweight_ptr + c, second, mask_c)


@triton.jit
def store_rounded(ptr, values, mask):
    """Store float64 values, rounded as torch does: half types by way of float32."""
    if ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)
    tl.store(ptr, values.to(ptr.dtype.element_ty), mask)


@triton.jit
def store_count(count, sums_ptr, channels):
    """Store the number of values per channel behind the sums."""
    tl.store(sums_ptr + 2 * channels, tl.full((), count, tl.float64))
