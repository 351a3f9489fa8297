"""``syncbn.recalibrate``: population statistics of a trained network, exact at any batch size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.calibration.batches import Batches, Forward, default_forward
from syncbn.calibration.context import CalibrationContext, Results
from syncbn.calibration.display import progress_bar
from syncbn.calibration.model import Modules, preserved_model_state, select_layers
from syncbn.calibration.ranks import Ranks, defer_sigint
from syncbn.calibration.report import CalibrationReport, LayerReport
from syncbn.calibration.sequential import calibrate_sequential
from syncbn.calibration.single_pass import calibrate_average, calibrate_ema, calibrate_pooled
from syncbn.distributed import resolve_group
from syncbn.distributed.groups import active_group
from syncbn.nn.bn_layers import BNLayer, SavedStatistics, clone_running_stats, restore_running_stats

#: Methods whose result does not depend on the batch size.
ExactMethod = Literal["lockstep", "sequential"]
Method = Literal[ExactMethod, "pooled", "average", "ema"]

_Calibrate = Callable[[CalibrationContext], Results]


def _get_method(name: str) -> _Calibrate:
    match name:
        case "lockstep":
            from syncbn.calibration.lockstep import calibrate_lockstep  # needs greenlet

            return calibrate_lockstep
        case "sequential":
            return calibrate_sequential
        case "pooled":
            return calibrate_pooled
        case "average":
            return calibrate_average
        case "ema":
            return calibrate_ema
    raise ValueError(f"got method {name!r}; expected one of {', '.join(get_args(Method))}")


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
    """Replace a model's running statistics by the statistics of a calibration set.

    The population statistics of a layer are the statistics of its input in inference, with
    population statistics in all earlier layers. The exact methods compute them in float64,
    weighted by element counts, over all batches of all ranks, with the unbiased variance. The
    result depends neither on the batch size nor on the distribution of the data over ranks.

    ============== ===== ======================================= ===================================
    method         exact passes over the data                    memory
    ============== ===== ======================================= ===================================
    ``lockstep``   yes   one                                     one layer's input, of all the data
    ``sequential`` yes   one per layer, up to the layer; data    one batch
                         must be re-iterable
    ``pooled``     no    one                                     one batch
    ``average``    no    one                                     one batch
    ``ema``        no    one                                     one batch
    ============== ===== ======================================= ===================================

    The last three normalize each batch with its own statistics, as in training: ``pooled`` pools
    these exactly, ``average`` averages means and variances (Ioffe and Szegedy, 2015), ``ema``
    updates the old statistics with the layers' momentum.

    A layer that a forward calls several times gets the statistics of all its calls, found by
    repeated passes. A layer that no batch reaches keeps its statistics. If the old statistics of
    ranks differ, all start from the statistics of rank 0. Nothing else of the model changes:
    training flags, hooks, ``num_batches_tracked`` and random generators are preserved. On any
    error, including Ctrl-C, the statistics are restored.

    If some batch-norm layers are in training mode, the layers in evaluation mode are frozen and
    left alone. If all are in the same mode, all are calibrated. ``layers`` replaces this rule.
    Layers that are left alone normalize with their running statistics, which must be the same on
    every rank. The exception is a layer without running statistics, or with an inference rule: if
    ``layers`` or ``skip`` excludes it, it normalizes as in inference, and results depend on the
    batches if its outputs do.

    If one rank fails, every rank fails. The ranks compare arguments and layers at the start and
    confirm the end: a rank keeps new statistics only if every rank has computed them. The exception
    is a rank that dies during this last exchange: the remaining ranks may end with or without an
    error. After the exchange, Ctrl-C is raised, and the new statistics of several ranks remain.

    ``lockstep`` interleaves the forwards of all batches. It then compares the layer inputs of two
    batches with single passes. If they differ, because the model keeps state between layers,
    or if the forward holds a lock at a layer, ``sequential`` with whole forwards replaces it, with
    a warning on rank 0. ``report.verification`` describes the comparison.

    A sample is an entry of the first dimension of the first tensor in a batch.

    Args:
        model: network with ``nn.BatchNorm*``, ``nn.SyncBatchNorm`` or layers of this library; may
            be wrapped by DDP, FSDP2 or ``torch.compile``. It runs in inference mode.
        batches: this rank's part of the calibration set; may be empty on some ranks. Tensors are
            moved to the device of the first layer.
        method: a row of the table above.
        layers: modules to calibrate, as modules of the model, as dotted names in the plain model
            (as in the report), or a list of both; every batch-norm layer in them is calibrated.
            None for the rule above.
        skip: modules to leave alone, in the same form.
        num_samples: number of samples to use, over all ranks, an equal share each; None for all.
        forward: function called as ``forward(model, batch)``. The default calls ``model(batch)``,
            ``model(batch[0])`` for a sequence that begins with a tensor, or ``model(**batch)`` for
            a mapping; a model that takes a list of tensors needs another. With the default, and if
            the model's forward reads no values, ``lockstep`` coalesces small batches of equal
            shapes, up to 32 samples and 256 KiB of input, if this changes no layer input
            of two batches; another function gets the batches unchanged. It must not call layers
            within ``torch.inference_mode()`` for ``lockstep``.
        process_group: ranks that calibrate together, in the form accepted by
            :class:`~syncbn.SyncBatchNorm`; None for all.
        progress: True for a progress bar on rank 0; None for a bar if it has a terminal.
        max_bytes: memory limit for ``lockstep`` on this rank, in bytes; None for the free memory.

    Returns:
        Changes of each layer with their standard errors; ``.undo()`` restores the old statistics.

    Raises:
        ValueError: no batch norm in the model; no or too little data; NaN or infinite activations;
            an unknown method; ``layers`` or ``skip`` without a batch-norm layer; integer statistics
            or shared buffers; one-shot batches for ``sequential``; batches that reach different
            layers, for ``lockstep``; an unsupported wrapper; ranks with different arguments or
            layers.
        TypeError: a batch that the default forward does not support; ``layers`` or ``skip`` of
            another type.
        MemoryError: ``lockstep`` would exceed ``max_bytes``.
        RuntimeError: another rank has failed or cannot be reached.

    Reference:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3.
    """
    backup: SavedStatistics = []
    with defer_sigint(undo=lambda: restore_running_stats(backup)) as sigint:
        group = active_group(resolve_group(process_group))
        device = _find_device(model)
        ranks = Ranks(group, device, sigint)
        calibrate, chosen, left_alone = ranks.run_on_all_ranks(
            lambda: _check_arguments(model, method, layers, skip, num_samples)
        )
        backup += clone_running_stats(chosen)
        undo = list(backup)
        ranks.require_same(_describe(method, num_samples, chosen, left_alone))
        with preserved_model_state(model, backup):
            old = _broadcast_running_stats(chosen, ranks)
            checks: list[str] = []
            with progress_bar(
                progress if ranks.rank == 0 else False, f"recalibrating ({method})"
            ) as report_progress:
                results = calibrate(
                    CalibrationContext(
                        model=model,
                        layers=chosen,
                        pivots=[mean.double().nan_to_num(0.0, 0.0, 0.0) for _, mean, _ in old],
                        batches=Batches(batches, _share(num_samples, ranks), device),
                        forward=forward or default_forward,
                        ranks=ranks,
                        max_bytes=max_bytes,
                        report_progress=report_progress,
                        report_check=checks.append,
                    )
                )
            names, verification = list(left_alone), "".join(checks[-1:])
            report = ranks.run_on_all_ranks(
                lambda: _make_report(results, old, undo, names, verification), "the last exchange"
            )
            if ranks.size > 1:
                backup.clear()  # the other ranks keep the new statistics after this exchange
        return report


def _check_arguments(
    model: nn.Module,
    method: str,
    layers: Modules | None,
    skip: Modules | None,
    num_samples: object,
) -> tuple[_Calibrate, list[BNLayer], dict[str, _BatchNorm]]:
    """Return the function of a method, the layers to calibrate, and the layers left alone."""
    if num_samples is not None and not (isinstance(num_samples, int) and num_samples > 0):
        raise ValueError(f"got num_samples={num_samples!r}; expected 1 or more, or None for all")
    chosen, left_alone = select_layers(model, layers, skip)
    return _get_method(method), chosen, left_alone


def _make_report(
    results: Results,
    old: SavedStatistics,
    undo: SavedStatistics,
    left_alone: list[str],
    verification: str,
) -> CalibrationReport:
    """Return the report of a calibration.

    Args:
        results: input statistics of the layers that batches reached.
        old: statistics before the calibration, the same on every rank, of all chosen layers.
        undo: statistics of this rank before the calibration.
        left_alone: names of layers that were not chosen.
        verification: result of the check of the method, or "".

    Raises:
        ValueError: no layer got samples.
    """
    chosen = [layer for layer, *_ in old]
    reached = [layer for layer, stats in results.items() if stats.samples > 0]
    if not reached:
        raise ValueError(
            "no sample reached any of the batch-norm layers "
            f"({', '.join(layer.name for layer in chosen)}); expected batches with samples and a "
            "forward that calls these layers"
        )
    return CalibrationReport(
        [LayerReport.from_stats(x, results[x], *old[x.index][1:]) for x in reached],
        [layer.name for layer in chosen if layer not in reached],
        left_alone,
        verification,
        undo,
    )


def _find_device(model: nn.Module) -> torch.device:
    """Return the device of the first batch-norm layer, or of a model without one."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    tensors = (t for module in (*norms, model) for t in (*module.buffers(), *module.parameters()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _describe(
    method: str, num_samples: int | None, layers: list[BNLayer], left_alone: dict[str, _BatchNorm]
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


def _broadcast_running_stats(layers: list[BNLayer], ranks: Ranks) -> SavedStatistics:
    """Set and return the old statistics of rank 0; local batch norm differs between ranks."""
    old = [part.double() for _, *parts in clone_running_stats(layers) for part in parts]
    parts = iter(ranks.broadcast_first(torch.cat(old)).split([len(part) for part in old]))
    for layer, mean, var in zip(layers, parts, parts, strict=True):
        layer.set_running_stats(mean, var)
    return clone_running_stats(layers)


def _share(num_samples: int | None, ranks: Ranks) -> int | None:
    if num_samples is None:
        return None
    return num_samples // ranks.size + (ranks.rank < num_samples % ranks.size)
