"""``syncbn.recalibrate``: exact population statistics, whatever batch size fits in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.calibration.batches import Batches, Forward, default_forward
from syncbn.calibration.budget import free_bytes
from syncbn.calibration.guard import untouched
from syncbn.calibration.interrupts import uninterrupted
from syncbn.calibration.job import Job
from syncbn.calibration.layers import Backup, Layer, back_up, old_statistics, put_back
from syncbn.calibration.progress import progress_bar
from syncbn.calibration.ranks import Ranks
from syncbn.calibration.report import CalibrationReport
from syncbn.calibration.selection import Modules, Selection, select_layers
from syncbn.calibration.sums import Sums
from syncbn.distributed import resolve_group
from syncbn.distributed.collectives import active_group

Method = Literal["lockstep", "sequential", "pooled", "average", "ema"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: Method = "lockstep",
    layers: Modules | None = None,
    skip: Modules | None = None,
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
    repeated passes; a layer that is not reached keeps its own. Ranks whose old statistics differ
    start from those of the first. Nothing else of the model changes: not training flags, hooks,
    counters of batches, or the state of random generators. On any error, Ctrl-C included, the
    statistics are put back.

    If some batch-norm layers are in training mode, the layers in evaluation mode are frozen and
    left alone. If all are in the same mode, all are calibrated. ``layers`` replaces this rule.
    Layers that are left alone normalize with their running statistics, which must be the same on
    every rank. The exception is a layer without running statistics, or with an inference rule: if
    ``layers`` or ``skip`` excludes it, it normalizes as in inference, and results depend on the
    batches if its outputs do.

    Every rank fails if one rank fails. The ranks compare arguments and layers at the start, and
    confirm the end: a rank keeps new statistics only if every rank has computed them. The exception
    is a rank that dies during this last exchange: the rest may end with or without an error. Ctrl-C
    after it is raised, and leaves the new statistics in place if other ranks have them, too.

    ``lockstep`` interleaves the forwards of all batches. It then compares the layer inputs of the
    first batches with single passes. If they differ, because the model keeps state between layers,
    or if the forward holds a lock at a layer, ``sequential`` with whole forwards replaces it, with
    a warning on rank 0. ``report.verification`` describes the comparison.

    A sample is an entry of the first dimension of the first tensor in a batch.

    Args:
        model: with ``nn.BatchNorm*``, ``nn.SyncBatchNorm`` or layers of this library; may be
            wrapped by DDP, FSDP2 or ``torch.compile``. Runs in inference mode.
        batches: this rank's part of the calibration set; may be empty on some ranks. Tensors are
            moved to the device of the first layer.
        method: see above.
        layers: modules to calibrate, as modules of the model, as dotted names in the plain model
            (as in the report), or a list of both; every batch-norm layer in them is calibrated.
            None for the rule above.
        skip: modules to leave alone, in the same form.
        num_samples: how many samples to use, of all ranks together, each an equal share; None for
            all.
        forward: called as ``forward(model, batch)``; by default ``model(batch)``,
            ``model(batch[0])`` for a sequence that begins with a tensor, or ``model(**batch)`` for
            a mapping. A model that takes a list of tensors needs a forward of yours. By default,
            and if the model's forward reads no values, ``lockstep`` computes small batches of equal
            shapes together, up to 32 samples and 256 KiB of input, if this changes no layer input
            of two batches; a forward of your own gets the batches as they are. Not within
            ``torch.inference_mode()``, for ``lockstep``.
        process_group: the ranks that calibrate together, described as for
            :class:`~syncbn.SyncBatchNorm`; None for all.
        progress: show a progress bar on rank 0; None: if it has a terminal.
        max_bytes: that ``lockstep`` may hold on this rank; None for what is free.

    Returns:
        What changed, layer by layer, and how well the new statistics are known; ``.undo()`` puts
        the old ones back.

    Raises:
        ValueError: no batch norm in the model; no or too little data; NaN or infinite activations;
            an unknown method; ``layers`` or ``skip`` without a batch-norm layer; integer statistics
            or shared buffers; one-shot batches for ``sequential``; batches that come to different
            layers, for ``lockstep``; a wrapper that cannot be served; ranks with different
            arguments or layers.
        TypeError: a batch that the default forward cannot pass on; ``layers`` or ``skip`` of
            another type.
        MemoryError: ``lockstep`` would take more than ``max_bytes``.
        RuntimeError: another rank has failed or cannot be reached.

    Reference:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3.
    """
    backup: Backup = []
    with uninterrupted(undo=lambda: put_back(backup)) as interrupts:
        group = active_group(resolve_group(process_group))
        device = _device(model)
        ranks = Ranks(group, device, interrupts)

        def prepare() -> tuple[Callable[[Job], dict[Layer, Sums]], Selection]:
            _check_number(num_samples)
            return _method(method), select_layers(model, layers, skip)

        run, (chosen, left_alone) = ranks.agreed(prepare)
        backup += back_up(chosen)
        own = [(mean, var) for _, mean, var in backup]
        ranks.require_same(_describe(method, num_samples, chosen, left_alone))
        with untouched(model, backup):
            _start_alike(chosen, ranks)
            old = old_statistics(chosen)
            checks: list[str] = []
            title = f"recalibrating ({method})"
            with progress_bar(ranks.rank == 0, progress, title) as report_progress:
                totals = run(
                    Job(
                        model=model,
                        layers=chosen,
                        pivots=[mean.double().nan_to_num(0.0, 0.0, 0.0) for mean, _ in old],
                        batches=Batches(batches, _share(num_samples, ranks), device),
                        forward=forward or default_forward,
                        ranks=ranks,
                        max_bytes=_room(max_bytes, ranks, device),
                        report_progress=report_progress,
                        report_check=checks.append,
                    )
                )
            report = ranks.agreed(
                lambda: _report(chosen, list(left_alone), old, own, totals, "".join(checks[-1:])),
                "the last exchange",
            )
            if ranks.size > 1:
                backup.clear()  # the other ranks keep the new statistics from here on
        return report


def _device(model: nn.Module) -> torch.device:
    """Return the device of the first batch-norm layer, or of a model without one."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    tensors = (t for module in (*norms, model) for t in (*module.buffers(), *module.parameters()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _describe(
    method: str, num_samples: int | None, layers: list[Layer], left_alone: dict[str, _BatchNorm]
) -> list[str]:
    """Return a line for every argument and layer that must be the same on all ranks."""
    return [
        f"method {method!r}",
        f"num_samples {num_samples}",
        *(
            f"layer {layer.name!r} with {layer.channels} channels, {layer.running_mean.dtype} and "
            f"{layer.running_var.dtype}, eps {layer.module.eps}, momentum {layer.module.momentum}"
            for layer in layers
        ),
        *(
            f"{name!r} left alone with statistics {_digest(module.running_mean)} "
            f"{_digest(module.running_var)}"
            for name, module in left_alone.items()
        ),
    ]


def _digest(buffer: Tensor | None) -> str:
    if buffer is None:
        return "None"
    content = bytes(buffer.detach().cpu().contiguous().view(torch.uint8).tolist())
    return hashlib.blake2b(content, digest_size=4).hexdigest()


def _report(
    layers: list[Layer],
    left_alone: list[str],
    old: list[tuple[Tensor, Tensor]],
    own: list[tuple[Tensor, Tensor]],
    totals: dict[Layer, Sums],
    verification: str,
) -> CalibrationReport:
    totals = {layer: sums for layer, sums in totals.items() if sums.spread.samples > 0}
    if not totals:
        raise ValueError(
            "no sample came to any of the batch-norm layers "
            f"({', '.join(layer.name for layer in layers)}); expected batches with samples "
            "and a forward that calls these layers"
        )
    return CalibrationReport.of(layers, left_alone, old, own, totals, verification)


def _start_alike(layers: list[Layer], ranks: Ranks) -> None:
    """Take the old statistics of the first rank: without synchronization, each has its own."""
    old = [part.double() for pair in old_statistics(layers) for part in pair]
    parts = iter(ranks.first(torch.cat(old)).split([len(part) for part in old]))
    for layer, mean, var in zip(layers, parts, parts, strict=True):
        layer.use(mean, var)


def _check_number(num_samples: object) -> None:
    if num_samples is not None and not (isinstance(num_samples, int) and num_samples >= 1):
        raise ValueError(f"got num_samples={num_samples!r}; expected 1 or more, or None for all")


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
    sharing = ranks.sharing_memory()  # on every rank, whatever this one was given
    free = free_bytes(device) if max_bytes is None else None
    return max_bytes if free is None else free // sharing
