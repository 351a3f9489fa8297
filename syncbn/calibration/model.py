"""Model of a calibration: its layers to calibrate, and the state that is restored at the end."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from syncbn.calibration.ranks import defer_sigint
from syncbn.nn.bn_layers import (
    BNLayer,
    SavedStatistics,
    named_batch_norms,
    plain_name,
    require_running_stats,
    restore_running_stats,
)

#: Module, dotted name in the plain model, or a list of both. Each includes the layers within it.
Modules: TypeAlias = str | nn.Module | Iterable[str | nn.Module]

_MAX_NAMES = 8


def select_layers(
    model: nn.Module, layers: Modules | None = None, skip: Modules | None = None
) -> tuple[list[BNLayer], dict[str, _BatchNorm]]:
    """Return the layers to calibrate, and the remaining batch-norm layers by name.

    If some batch-norm layers are in training mode, the layers in evaluation mode are frozen and
    left alone. If all are in the same mode, all are calibrated. ``layers`` replaces this rule;
    ``skip`` excludes layers from either choice.

    Args:
        model: network, wrapped or not.
        layers: modules to calibrate; None for the rule.
        skip: modules to leave alone.

    Raises:
        TypeError: an entry is neither a name nor a module.
        ValueError: an entry contains no batch-norm layer of the model; no layer remains; a layer
            to calibrate has no usable statistics or shares a buffer with another layer.
    """
    norms = named_batch_norms(model)
    included = None if layers is None else _find_norms("layers", layers, model)
    skipped = set() if skip is None else _find_norms("skip", skip, model)
    partly_frozen = len({module.training for _, module in norms}) > 1
    chosen: list[BNLayer] = []
    left_alone: dict[str, _BatchNorm] = {}
    for name, module in norms:
        excluded = module in skipped or (included is not None and module not in included)
        # A forward would initialize an excluded lazy layer, and so change the model.
        if not excluded or isinstance(module.running_mean, nn.UninitializedBuffer):
            require_running_stats(name, module)
        if excluded or (included is None and partly_frozen and not module.training):
            left_alone[name] = module
        else:
            chosen.append(BNLayer(len(chosen), name, module))
    if not chosen:
        raise ValueError(
            f"all {len(norms)} batch-norm layers are left alone; expected one to calibrate: name "
            "it in layers=, skip fewer, or put it into training mode"
        )
    _require_separate_buffers(chosen, left_alone)
    return chosen, left_alone


def _find_norms(argument: str, entries: Modules, model: nn.Module) -> set[_BatchNorm]:
    if isinstance(entries, str | nn.Module) or not isinstance(entries, Iterable):
        entries = [entries]
    by_name: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_name.setdefault(plain_name(name, model), module)
    inside = set(model.modules())
    result: set[_BatchNorm] = set()
    for entry in entries:
        if not isinstance(entry, str | nn.Module):
            raise TypeError(
                f"{argument}: got {entry!r} of type {type(entry).__name__}; expected the name of a "
                "module, a module, or several of them"
            )
        module = by_name.get(entry, nn.Module()) if isinstance(entry, str) else entry
        below = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        if not below or not inside.issuperset(below):
            shown = repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"
            names = [repr(name) for name, _ in named_batch_norms(model)]
            more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
            raise ValueError(
                f"{argument}: got {shown}, which is no module of the model with a batch-norm layer "
                "in it; expected layers, or modules above them: "
                f"{', '.join(names[:_MAX_NAMES])}{more}"
            )
        result.update(below)
    return result


def _require_separate_buffers(chosen: list[BNLayer], left_alone: dict[str, _BatchNorm]) -> None:
    """Raise if a buffer of a layer to calibrate shares memory with another buffer.

    Elements are compared, not storages: buffers may be columns of one tensor.
    """
    named = [(layer.name, layer.module) for layer in chosen] + list(left_alone.items())
    owners: dict[int, str] = {}
    for index, (name, module) in enumerate(named):
        for kind in ("running_mean", "running_var"):
            if (buffer := getattr(module, kind)) is None:
                continue
            path = f"{name}.{kind}".lstrip(".")
            step = max(buffer.stride(0) * buffer.element_size(), 1)
            addresses = range(buffer.data_ptr(), buffer.data_ptr() + step * buffer.numel(), step)
            for address in addresses:
                if address in owners:
                    raise ValueError(
                        f"{owners[address]} and {path} share memory, so the statistics of one "
                        "would overwrite the other; expected separate buffers (such as "
                        "buffer.clone())"
                    )
            if index < len(chosen):
                owners.update(dict.fromkeys(addresses, path))


@contextmanager
def preserved_model_state(model: nn.Module, stats: SavedStatistics) -> Iterator[None]:
    """Put a model into inference mode without communication for the body, then restore it.

    Training flags and random generators are restored, and on an exception the running statistics.
    Compiled parts run eagerly, so that their hooks are called.

    Args:
        model: network, wrapped or not.
        stats: running statistics to restore on an exception.
    """
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(preserve_rng_state())
        stack.enter_context(_without_communication(model))
        if "torch._dynamo" in sys.modules:  # its import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        try:
            # Not model.eval(), which classes override, for example to leave parts in training mode.
            for module, _ in flags:
                module.training = False
            yield
        except BaseException:
            with defer_sigint():
                restore_running_stats(stats)
            raise
        finally:
            with defer_sigint():
                for module, flag in flags:
                    module.training = flag


@contextmanager
def _without_communication(model: nn.Module) -> Iterator[None]:
    """Turn off the communication of a model's forward; a collective for FSDP2.

    DDP broadcasts buffers and FSDP gathers parameters in a forward, so ranks that call it a
    different number of times would deadlock. FSDP2's parameters are gathered once, here.

    Raises:
        ValueError: the model has a wrapper that does not support this.
    """
    for name, module in model.named_modules():
        place = f" at {name}" if name else ""
        if isinstance(module, DataParallel):
            raise ValueError(
                f"got nn.DataParallel{place}, which copies the model in every forward; expected a "
                "model on one device per process: pass its .module"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"got FSDP1{place}, whose forward needs all ranks; expected FSDP2 (fully_shard), "
                "DDP or a plain model with the full state dict"
            )
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    flags = [wrapper.require_forward_param_sync for wrapper in wrappers]
    sharded: list[Any] = [module for module in model.modules() if is_fully_sharded(module)]
    groups = [g for module in sharded for g in module._get_fsdp_state()._fsdp_param_groups]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        for module in sharded:
            module.unshard()
        for group in groups:
            # set_reshard_after_forward is not enough: with several forwards suspended in a module,
            # it only stops the first of them from resharding the parameters.
            group.reshard = lambda: None
        yield
    except BaseException:
        inner = {part for module in sharded for part in module.modules() if part is not module}
        for module in sharded:
            # A forward was abandoned half-way.
            if module not in inner:
                module.reset_iter_state()
        raise
    finally:
        for wrapper, flag in zip(wrappers, flags, strict=True):
            wrapper.require_forward_param_sync = flag
        for group in groups:
            vars(group).pop("reshard", None)
        for module in sharded:
            module.reshard()


def is_fully_sharded(module: nn.Module) -> bool:
    """Return True if FSDP2's ``fully_shard`` was applied to a module."""
    if not dist.is_available():
        return False
    from torch.distributed import fsdp

    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


@contextmanager
def preserve_rng_state(loader: object = None) -> Iterator[None]:
    """Restore the random generators of torch, Python and NumPy at the end of the body.

    Args:
        loader: DataLoader whose generators are also restored; None for the global ones only.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    generators = (getattr(owner, "generator", None) for owner in owners)
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy_state is not None:
                numpy.random.set_state(numpy_state)
            for generator, state in states:
                generator.set_state(state)


def get_rng_states() -> list[Any]:
    """Return the states of the global generators of torch, Python and NumPy, comparable by ==."""
    numpy: Any = sys.modules.get("numpy")
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    comparable: list[Any] = [random.getstate(), *(state.tolist() for state in states)]
    if numpy is not None:
        _, words, *rest = numpy.random.get_state()
        comparable += [words.tolist(), rest]
    return comparable


def seed_generators(*numbers: int) -> None:
    """Seed the global generators of torch, Python and NumPy with a hash of integers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    seed = int.from_bytes(digest, "big")
    torch.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)
