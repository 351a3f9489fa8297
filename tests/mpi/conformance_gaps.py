"""Unsupported calls of transports, with their errors: a gap without its error is a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.mpi.conformance_cases import Call, Case


class Gap(NamedTuple):
    """Calls that fail on a transport.

    Attributes:
        feature: unsupported feature.
        collectives: names of the collectives, a regular expression.
        error: regular expression for the error; empty if the call is skipped, since it would hang,
            fail at random or end the process.
        covers: predicate of case, call and way; equal on all ranks of the group.
    """

    feature: str
    collectives: str
    error: str
    covers: Callable[[Case, Call, str], bool]


_MESSAGES = "send and recv|tags|recv from any rank|batch_isend_irecv"
_COLLECTIVES = f"(?!{_MESSAGES}).*"
_STRANGE = (torch.int16, torch.uint32, torch.float8_e4m3fn)

_GLOO = (
    # Its failure ended the process once in some hundred runs: the heap was corrupt.
    Gap(
        "all_gather_coalesced of unusual dtypes and shapes",
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
        "completion of a message without wait",
        _MESSAGES,
        "",
        lambda case, call, way: way in ("polled", "future", "then"),
    ),
    Gap(
        "messages to the own rank",
        _MESSAGES,
        "",
        lambda case, call, way: case.size == 1 or call.detail == "to all",
    ),
    Gap("messages without elements", _MESSAGES, "", lambda case, *_: case.layout == "(0,)"),
    Gap(
        "messages that are not contiguous",
        _MESSAGES,
        "has to be contiguous",
        lambda case, *_: case.layout in ("transposed", "sliced", "channels_last"),
    ),
    Gap(
        "reduction of a stacked input",
        "reduce_scatter_.*",
        "",
        lambda case, call, way: call.detail == "stacked" or case.layout == "()",
    ),
    Gap(
        "gather into a stacked output",
        "all_gather_single",
        "invalid tensor size",
        lambda case, call, way: "stacked" in call.detail or case.layout == "()",
    ),
    Gap(
        "polling of a reduce_scatter",
        "reduce_scatter.*",
        "",
        lambda case, call, way: way == "polled",
    ),
    Gap(
        "completion status of a reduce_scatter",
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
        "different sizes, detected on one rank",
        "gather|scatter",
        "",
        lambda case, *_: case.layout == "uneven",
    ),
    Gap(
        "different sizes",
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
        "correctly rounded averages of complex numbers",
        "reduce|reduce_scatter.*",
        "got",
        lambda case, call, way: (
            case.dtype.is_complex and call.operation == "AVG" and case.size == 3
        ),
    ),
    Gap(
        "reduce that preserves the tensors of other ranks",
        "reduce",
        "got",
        lambda case, call, way: "only" in call.detail,
    ),
    Gap(
        "sums of booleans as 0 or 1, independent of vectorization",
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
        "the future has other values",
        lambda case, call, way: way in ("future", "then"),
    ),
)
GAPS = {"gloo": _GLOO}
