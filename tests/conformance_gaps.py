"""What transports cannot do; an error is seen, or the gap would outlive its cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.conformance_cases import Call, Case


class Gap(NamedTuple):
    """Calls that fail on a transport.

    Attributes:
        what: is missing.
        collectives: where, a regular expression.
        error: a regular expression for what comes instead; empty where the call is not made, as it
            would end never, or by chance, or with the process.
        covers: whether a call made in a way is one of them; alike on all ranks of the group.
    """

    what: str
    collectives: str
    error: str
    covers: Callable[[Case, Call, str], bool]


_MESSAGES = "send and recv|tags|recv from anyone|batch_isend_irecv"
_COLLECTIVES = f"(?!{_MESSAGES}).*"
_STRANGE = (torch.int16, torch.uint32, torch.float8_e4m3fn)

_GLOO = (
    # Where it fails it has ended the process, once in some hundred runs: its heap was corrupt.
    Gap(
        "an all_gather_coalesced of anything unusual",
        "all_gather_coalesced",
        "",
        lambda case, call, way: (
            case.layout in ("()", "(0,)")
            or case.dtype in _STRANGE
            or case.dtype.is_complex
            or way in ("future", "then")
        ),
    ),
    Gap(
        "the end of a message, but by waiting",
        _MESSAGES,
        "",
        lambda case, call, way: way in ("polled", "future", "then"),
    ),
    Gap(
        "messages to oneself",
        _MESSAGES,
        "",
        lambda case, call, way: case.size == 1 or call.what == "to all",
    ),
    Gap("messages without elements", _MESSAGES, "", lambda case, *_: case.layout == "(0,)"),
    Gap(
        "messages that are not contiguous",
        _MESSAGES,
        "has to be contiguous",
        lambda case, *_: case.layout in ("transposed", "sliced", "channels_last"),
    ),
    Gap(
        "a stack to reduce",
        "reduce_scatter_.*",
        "",
        lambda case, call, way: call.what == "stacked" or case.layout == "()",
    ),
    Gap(
        "a stack to gather in",
        "all_gather_single",
        "invalid tensor size",
        lambda case, call, way: "stacked" in call.what or case.layout == "()",
    ),
    Gap(
        "waiting for a reduce_scatter by asking whether it is done",
        "reduce_scatter.*",
        "",
        lambda case, call, way: way == "polled",
    ),
    Gap(
        "a reduce_scatter that says that it is done",
        "reduce_scatter.*",
        "waited for, but not completed",
        lambda case, call, way: way == "waited for",
    ),
    Gap(
        "the future of a reduce_scatter",
        "reduce_scatter.*",
        "getFuture not implemented",
        lambda case, call, way: way in ("future", "then"),
    ),
    Gap(
        "sizes that differ, found out on one rank",
        "gather|scatter",
        "",
        lambda case, *_: case.layout == "uneven",
    ),
    Gap(
        "sizes that differ",
        "all_gather|all_to_all",
        "invalid tensor size",
        lambda case, *_: case.layout == "uneven",
    ),
    Gap(
        "channels_last",
        "all_to_all_single",
        "must be contiguous",
        lambda case, *_: case.layout == "channels_last",
    ),
    Gap(
        "PREMUL_SUM",
        ".*reduce.*",
        "Cannot use ReduceOp.PREMUL_SUM with Gloo",
        lambda case, call, way: call.operation == "PREMUL_SUM",
    ),
    Gap(
        "int16, uint32 and float8",
        _COLLECTIVES,
        "Invalid scalar type",
        lambda case, *_: case.dtype in _STRANGE,
    ),
    Gap(
        "complex numbers",
        "gather",
        "Invalid scalar type",
        lambda case, *_: case.dtype.is_complex,
    ),
    Gap(
        "products of complex numbers",
        "reduce|reduce_scatter.*",
        "does not support.*on complex",
        lambda case, call, way: case.dtype.is_complex and call.operation == "PRODUCT",
    ),
    Gap(
        "averages of integers",
        ".*reduce.*",
        "result type Float can't be cast",
        lambda case, call, way: (
            call.operation == "AVG" and not (case.dtype.is_floating_point or case.dtype.is_complex)
        ),
    ),
    Gap(
        "averages of complex numbers, correctly rounded",
        "reduce|reduce_scatter.*",
        "got",
        lambda case, call, way: (
            case.dtype.is_complex and call.operation == "AVG" and case.size == 3
        ),
    ),
    Gap(
        "a reduction that leaves the others' tensors alone",
        "reduce",
        "got",
        lambda case, call, way: "alone" in call.what,
    ),
    Gap(
        "sums of truth values that are 0 or 1, whether the loop was vectorized or not",
        "all_reduce|reduce|reduce_scatter",
        "",
        lambda case, call, way: case.dtype is torch.bool and call.operation == "SUM",
    ),
    Gap(
        "slices",
        "all_reduce|reduce|reduce_scatter|broadcast|scatter",
        "got",
        lambda case, *_: case.layout == "sliced",
    ),
    Gap(
        "the future of an all_gather_single",
        "all_gather_single",
        "the future has something else",
        lambda case, call, way: way in ("future", "then"),
    ),
)
GAPS = {"gloo": _GLOO}
