"""``syncbn.recalibrate``: exact population statistics, whatever batch size fits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import nn

from syncbn.calibration.batches import Batches, Forward, default_forward
from syncbn.calibration.budget import free_bytes
from syncbn.calibration.guard import untouched
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Layer, find_layers, old_statistics
from syncbn.calibration.progress import progress_bar
from syncbn.calibration.ranks import Ranks
from syncbn.calibration.report import CalibrationReport
from syncbn.calibration.sums import Sums
from syncbn.distributed import resolve_group
from syncbn.distributed.collectives import communicating_group

Method = Literal["lockstep", "sequential", "pooled", "average", "ema"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "lockstep",
    num_samples: int | None = None,
    forward: Forward | None = None,
    process_group: Any = None,
    progress: bool | None = None,
    max_bytes: int | None = None,
) -> CalibrationReport:
    """Replace a model's running statistics by those of a calibration set.

    The population statistics of a layer are those of its input in inference, when the layers before
    it use their population statistics already. The exact methods compute just that, in float64,
    weighted by element counts, over all batches of all ranks, with the unbiased variance; the
    result depends neither on the batch size nor on how the data is shared out.

    ============== ===== ======================================= ===================================
    method         exact reads the data                          memory
    ============== ===== ======================================= ===================================
    ``lockstep``   yes   once                                    one layer's input, of all the data
    ``sequential`` yes   once a layer, up to it; must be         one batch
                         re-iterable
    ``pooled``     no    once                                    one batch
    ``average``    no    once                                    one batch
    ``ema``        no    once                                    one batch
    ============== ===== ======================================= ===================================

    The last three normalize every batch with its own statistics, as in training: ``pooled`` puts
    those together exactly, ``average`` averages means and variances (Ioffe and Szegedy, 2015),
    ``ema`` moves the old ones with the layers' momentum.

    A layer that a forward calls several times takes the statistics of all its calls, found by
    repeated passes; a layer that is not reached keeps its own. Nothing else of the model changes:
    not training flags, hooks, counters of batches, or the state of random generators. On any error,
    Ctrl-C included, the statistics are put back.

    Args:
        model: with ``nn.BatchNorm*``, ``nn.SyncBatchNorm`` or layers of this library; may be
            wrapped by DDP, FSDP2 or ``torch.compile``. Runs in inference mode.
        batches: this rank's part of the calibration set; may be empty on some ranks. Tensors are
            moved to the device of the first layer.
        method: see above.
        num_samples: how many samples to use, of all ranks together, each an equal share; None for
            all.
        forward: called as ``forward(model, batch)``; by default ``model(batch)``,
            ``model(batch[0])`` for a sequence, or ``model(**batch)`` for a mapping. By default,
            ``lockstep`` computes small batches of equal shapes together, up to 32 samples and 256
            KiB of input; a forward of your own gets the batches as they are.
        process_group: the ranks that calibrate together, described as for
            :class:`~syncbn.SyncBatchNorm`; None for all.
        progress: show a progress bar on rank 0; None: if it has a terminal.
        max_bytes: that ``lockstep`` may hold on this rank; None for what is free.

    Returns:
        What changed, layer by layer, and how well the new statistics are known; ``.undo()`` puts
        the old ones back.

    Raises:
        ValueError: no batch norm in the model; no or too little data; NaN or infinite activations;
            an unknown method; one-shot batches for ``sequential``; batches that come to different
            layers, for ``lockstep``; a wrapper that cannot be served.
        MemoryError: ``lockstep`` would take more than ``max_bytes``.
        RuntimeError: another rank has failed.

    Reference:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3.
    """
    run = _method(method)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"got num_samples={num_samples}; expected 1 or more, or None for all")
    layers = find_layers(model)
    device = layers[0].running_mean.device
    ranks = Ranks(communicating_group(resolve_group(process_group)), device)
    old = old_statistics(layers)
    with progress_bar(ranks.rank == 0, progress, f"recalibrating ({method})") as report_progress:
        job = Job(
            model=model,
            layers=layers,
            pivots=[mean.double().nan_to_num(0.0, 0.0, 0.0) for mean, _ in old],
            batches=Batches(batches, _share(num_samples, ranks), device),
            forward=forward or default_forward,
            ranks=ranks,
            max_bytes=_room(max_bytes, ranks, device),
            report_progress=report_progress,
        )
        with untouched(model, layers):
            totals = {layer: s for layer, s in run(job).items() if s.spread.samples > 0}
            if not totals:
                raise ValueError(
                    "no sample came to any of the batch-norm layers "
                    f"({', '.join(layer.name for layer in layers)}); expected batches with samples "
                    "and a forward that calls these layers"
                )
    return CalibrationReport.of(layers, old, totals)


def _method(name: str) -> Callable[[Job], dict[Layer, Sums]]:
    match name:
        case "lockstep":
            from syncbn.calibration.lockstep import lockstep

            return lockstep
        case "sequential":
            from syncbn.calibration.sequential import sequential

            return sequential
        case "pooled":
            from syncbn.calibration.pooled import pooled

            return pooled
        case "average":
            from syncbn.calibration.average import average

            return average
        case "ema":
            from syncbn.calibration.ema import ema

            return ema
    raise ValueError(f"got method {name!r}; expected one of {', '.join(get_args(Method))}")


def _share(num_samples: int | None, ranks: Ranks) -> int | None:
    if num_samples is None:
        return None
    return num_samples // ranks.size + (ranks.rank < num_samples % ranks.size)


def _room(max_bytes: int | None, ranks: Ranks, device: torch.device) -> int | None:
    sharing = ranks.on_this_machine()  # on every rank, whatever this one was given
    free = free_bytes(device) if max_bytes is None else None
    return max_bytes if free is None else free // sharing
