"""Checks that all ranks of a group run the same collective.

Each payload ends with a hash of its label. If all ranks send the same label, the sum of the hashes
is the number of ranks times the local hash. On a mismatch, the rank with the largest hash always
detects it, any other rank misses it once in 2^32. Integers below 2^53 add up exactly. In debug mode
the ranks compare the labels themselves.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import zlib
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import modes

#: Length of an encoded label; a longer label is cut and ends with a digest of the whole.
LABEL_BYTES = 256
_DIGEST_BYTES = 8

# Checked all-reduces per group. The counts are equal on all ranks while the members of a group stay
# the same: all ranks pass a check or none does. Counters in the layers would differ after copies
# and reloads.
_checked: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def count_checked(group: dist.ProcessGroup | None) -> int:
    """Return the number of all-reduces of a group that passed the check; 0 under compilation."""
    if group is None or torch.compiler.is_compiling():
        return 0
    return _checked.get(group, 0)


def fingerprint(label: str, vector: Tensor) -> float | None:
    """Return the value to append to a payload; None for no value.

    A check on an accelerator waits for the device. There, payloads carry a value only if
    ``TORCH_DISTRIBUTED_DEBUG`` is INFO or DETAIL.

    Args:
        label: layer, direction, call and dtype; empty if unknown.
        vector: summed vector; its device decides.

    Returns:
        An integer from 1 to 2^32; NaN without a label, under compilation and while a CUDA graph is
        captured: a graph cannot raise an error that depends on data, but its payload needs the
        eager size.
    """
    if torch.compiler.is_compiling():
        # The compiler cannot trace the query of the debug level.
        return math.nan if vector.is_cpu else None
    if not vector.is_cpu and not _is_debugging():
        return None
    if not label or is_capturing(vector):
        return math.nan
    return zlib.crc32(label.encode()) + 1.0


def append(vector: Tensor, value: float | None) -> Tensor:
    """Return a payload: each row of a vector, shape ``[*, n]``, followed by the value.

    The value is repeated if a row would get an odd length. So forward and backward payloads both
    have 2C + 2 elements, and a rank that skips a backward pass causes an error here instead of an
    abort in Gloo. Float64 inputs are the exception: their forward payloads have 4C + 2.
    """
    if value is None:
        return vector
    size = vector.shape[-1]
    if not _is_plain(vector):
        return torch.constant_pad_nd(vector, (0, 2 - size % 2), value)
    payload = vector.new_empty(size + 2 - size % 2)
    ctypes.memmove(payload.data_ptr(), vector.data_ptr(), size * vector.element_size())
    for i in range(size, payload.shape[0]):
        _element(payload, i).value = value
    return payload


def strip(payload: Tensor, value: float | None, size: int) -> Tensor:
    """Return the vector in a payload, shape ``[*, size]``."""
    if value is None:
        return payload
    if payload.dim() > 1 or torch.compiler.is_compiling() or modes.num_dispatch_modes():
        return payload[..., :size]
    return payload.resize_(size)  # in half the time of a slice


def check(payload: Tensor, value: float | None, group: dist.ProcessGroup, label: str) -> None:
    """Check that all ranks sent this rank's fingerprint, and count the all-reduce.

    Args:
        payload: return value of :func:`append`, summed over the group.
        value: fingerprint of this rank.
        group: group of the sum.
        label: label of the all-reduce, for the error message.

    Raises:
        RuntimeError: another rank sent another label, or took part in another operation.
    """
    if value is None or math.isnan(value):
        return
    if modes.num_dispatch_modes():
        # Tracers have no value to compare, but the other ranks count a real all-reduce.
        if type(payload) is Tensor:
            _checked[group] = count_checked(group) + 1
        return
    if payload.is_cpu and payload.dtype is torch.float64 and payload.dim() == 1:
        total = _element(payload, payload.shape[0] - 1).value
    else:
        total = float(payload.flatten()[-1].item())
    if total == group.size() * value:
        _checked[group] = count_checked(group) + 1
        return
    # NaN comes from a compiled rank. Torch's "fake" backend, for dry runs, sums nothing.
    if math.isnan(total) or dist.get_backend(group) == "fake":
        return
    raise RuntimeError(
        f"{label}: this was all-reduce {count_checked(group) + 1} of the layers in their group on "
        f"rank {dist.get_rank()} of {dist.get_world_size()}, but at least one other rank was in "
        "another layer, direction, call or input dtype, or in another operation of this group, "
        "such as a gradient bucket of DistributedDataParallel. The sum is discarded. Run the same "
        "layers in the same order on every rank, forward and backward "
        "(TORCH_DISTRIBUTED_DEBUG=DETAIL names the layer of every rank), or give the layers a "
        "separate group (process_group='own')."
    )


def _is_plain(vector: Tensor) -> bool:
    """Return whether the values of a vector may be read and written at their address.

    After a kernel has emptied the caches, each operation of torch takes tens of microseconds: with
    operations instead of addresses a layer of a ResNet-50 takes 5 % longer over two ranks.
    """
    if torch.compiler.is_compiling() or modes.num_dispatch_modes():
        return False
    is_row = type(vector) is Tensor and vector.dim() == 1 and vector.is_contiguous()
    has_values = vector.dtype is torch.float64 and vector.is_cpu and not vector.is_neg()
    return is_row and has_values and not vector._is_zerotensor()


def _element(vector: Tensor, index: int) -> ctypes.c_double:
    return ctypes.c_double.from_address(vector.data_ptr() + index * vector.element_size())


def encode_label(label: str) -> Tensor:
    """Return a label as uint8 [LABEL_BYTES], to be gathered from all ranks."""
    encoded = label.encode()
    if len(encoded) > LABEL_BYTES:
        digest = hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).hexdigest().encode()
        encoded = encoded[: LABEL_BYTES - len(digest) - 4] + b"... " + digest
    return torch.frombuffer(bytearray(encoded.ljust(LABEL_BYTES, b"\0")), dtype=torch.uint8)


def describe_mismatch(labels: Tensor, ranks: Sequence[int]) -> str:
    """Return one line per rank with its label; empty if all labels are equal.

    Args:
        labels: encoded labels of W ranks, uint8 [W, LABEL_BYTES].
        ranks: global ranks, in the order of the labels.
    """
    if bool((labels == labels[0]).all()):
        return ""
    texts = (bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in labels.cpu())
    return "\n".join(f"  rank {rank}: {text}" for rank, text in zip(ranks, texts, strict=True))


def _is_debugging() -> bool:
    return bool(dist.get_debug_level().value >= dist.DebugLevel.INFO.value)


def is_capturing(vector: Tensor) -> bool:
    """Return whether the current stream of a CUDA tensor is captured in a graph."""
    return vector.is_cuda and torch.cuda.is_current_stream_capturing()
