"""What the benchmark of layers found, as tables."""

from __future__ import annotations

from dataclasses import astuple
from itertools import groupby

import torch

from syncbn.bench import host_overhead
from syncbn.bench.host_overhead import Overhead
from syncbn.bench.kernel_times import TRAFFIC, KernelCost
from syncbn.bench.layer_cases import ADDITION, NOTHING, RELU
from syncbn.bench.layer_times import BASELINE, SYNCHRONIZED, CaseCosts, LayerCost
from syncbn.bench.report import Table
from syncbn.bench.timing import Spread

_MILLISECOND, _MICROSECOND, _MIB = 1e-3, 1e-6, 1 << 20
_SPREAD = "median (10th..90th percentile)"


def ratios(found: list[CaseCosts]) -> list[Table]:
    """Return, for each layout and dtype, steps beside those of nn.BatchNorm2d."""
    by_kind = groupby(found, lambda c: (c.case.layout, c.case.dtype))
    kinds = [(layout, dtype, list(group)) for (layout, dtype), group in by_kind]
    return [
        _ratios(f"{layout}, {dtype}", cases, after)
        for layout, dtype, cases in kinds
        for after in (NOTHING, RELU, ADDITION)
    ]


def _ratios(kind: str, cases: list[CaseCosts], after: str) -> Table:
    with_it = f" + {after}" if after else ""
    costs = [[layer for layer in case.layers if layer.after == after] for case in cases]
    others = [layer for layer in costs[0] if layer.name != BASELINE]
    rows = [
        [
            case.case.shape,
            f"{case.copy.median / _MILLISECOND:.2f}",
            layers[0].step.text(_MILLISECOND),
            *(layer.ratio.text(digits=2) for layer in layers[1:]),
        ]
        for case, layers in zip(cases, costs, strict=True)
    ]
    means = [geometric_mean([layers[i + 1] for layers in costs]) for i in range(len(others))]
    rows.append(["geometric mean", "", "", *(f"{mean:.2f}" for mean in means)])
    if SYNCHRONIZED in (names := [layer.name for layer in others]):
        torchs = means[names.index(SYNCHRONIZED)]
        rows.append([f"of {SYNCHRONIZED}'s", "", "", *(f"{mean / torchs:.2f}" for mean in means)])
    return Table(
        f"Forward and backward{with_it}, {kind}: {_SPREAD}",
        ["", "copy, ms", f"{BASELINE}{with_it}, ms", *map(title, others)],
        rows,
        [f"Others: time over that of {BASELINE}{with_it} in the same round."],
    )


def title(layer: LayerCost) -> str:
    """Return what a layer is called in tables and pictures."""
    if layer.name == BASELINE:
        return BASELINE
    return layer.name if layer.ranks == 1 else f"{layer.name}, {layer.ranks} ranks"


def geometric_mean(layers: list[LayerCost]) -> float:
    """Return that of the median ratios."""
    medians = torch.tensor([layer.ratio.median for layer in layers], dtype=torch.float64)
    return float(medians.log().mean().exp())


def bandwidth(found: list[KernelCost], reused: bool) -> list[Table]:
    """Return, for each kernel, layout and dtype, what its functions reach of a copy's bandwidth."""
    notes = ["Each byte that must be read or written counts once."]
    if not reused:
        notes.append("malloc gives memory back here: page faults are in the last columns.")
    tables = []
    by_kernel = groupby(found, lambda c: (c.kernel, c.case.layout, c.case.dtype, c.after))
    for (kernel, layout, dtype, after), group in by_kernel:
        rows = [
            [
                cost.case.shape,
                f"{cost.case.nbytes / _MIB:.1f}",
                f"{2 * cost.case.nbytes / cost.seconds['copy'].median / 1e9:.1f}",
                *(percent(cost.share[name]) for name in TRAFFIC),
            ]
            for cost in group
        ]
        with_it = f" with {after}" if after else ""
        tables.append(
            Table(
                f"Kernel {kernel}{with_it}, {layout}, {dtype}: share of a copy's bandwidth",
                ["", "MiB", "copy, GB/s", *TRAFFIC],
                rows,
                notes,
            )
        )
    return tables


def speedup(found: list[KernelCost], threads: int) -> list[Table]:
    """Return what threads are worth; no table, if there is one only."""
    rows = [
        [
            f"{cost.case.shape} {cost.case.layout} {cost.case.dtype}",
            f"{cost.case.nbytes / _MIB:.1f}",
            *(cost.speedup[name].text(digits=2) for name in TRAFFIC),
        ]
        for cost in found
        if cost.speedup and cost.after == NOTHING
    ]
    title = f"Time with one thread over that with {threads}: {_SPREAD}"
    return [Table(title, ["", "MiB", *TRAFFIC], rows)] if rows else []


def percent(spread: Spread) -> str:
    """Return a share as text."""
    median, low, high = (round(100 * share) for share in astuple(spread))
    return f"{median}% ({low}..{high})"


def memory(found: list[CaseCosts]) -> Table:
    """Return the memory that a step takes."""
    plain = [layer for layer in found[0].layers if layer.after == NOTHING]
    rows = [
        [
            f"{case.case.shape} {case.case.layout} {case.case.dtype}",
            *(" / ".join(_sizes(case, layer)) for layer in plain),
        ]
        for case in found
    ]
    return Table(
        "Most memory of a step at once, in sizes of the input, without inputs and output gradient: "
        f"alone / with {RELU} / with {ADDITION}",
        ["", *map(title, plain)],
        rows,
    )


def _sizes(case: CaseCosts, plain: LayerCost) -> list[str]:
    """Return the memory of a layer by itself, and with what follows it."""
    kind = plain.name, plain.ranks
    same = [layer.peak_bytes for layer in case.layers if (layer.name, layer.ranks) == kind]
    return [f"{size / case.case.nbytes:.2f}" for size in same]


def overhead(found: list[Overhead], ranks: int) -> Table:
    """Return what passes of a tiny input cost."""
    rows = [
        [BASELINE, *(one.theirs.text(_MICROSECOND) for one in found)],
        ["ours, alone", *(one.alone.text(_MICROSECOND) for one in found)],
        [f"of {BASELINE}'s", *(one.ratio.text(digits=2) for one in found)],
    ]
    if torchs := [one.torchs.text(_MICROSECOND) for one in found if one.torchs is not None]:
        rows.insert(1, [SYNCHRONIZED, *torchs])
    if ranks > 1:
        rows += [
            [f"ours, {ranks} ranks", *(one.together.text(_MICROSECOND) for one in found)],
            ["in the all-reduces", *(one.all_reduce.text(_MICROSECOND) for one in found)],
            ["beyond the all-reduces", *(one.beyond.text(_MICROSECOND) for one in found)],
        ]
    size = "x".join(map(str, host_overhead.SHAPE))
    passes = ["forward and backward" if one.backward else "forward" for one in found]
    return Table(
        f"Host time of a pass in training, input {size}, microseconds: {_SPREAD}",
        ["", *passes],
        rows,
    )
