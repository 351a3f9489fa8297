"""Model and process state that calibration changes temporarily and restores."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from syncbn.calibration.sigint import defer_sigint
from syncbn.nn.bn_layers import RunningStats, restore_running_stats


@contextmanager
def preserved_model_state(model: nn.Module, stats: RunningStats) -> Iterator[None]:
    """Put a model into inference mode without communication for the body, then restore it.

    Training flags and random generators are restored, and on an exception the running statistics.
    Communication is off because ranks may call the model a different number of times. Compiled
    parts run eagerly, so that their hooks are called.

    Args:
        model: network, wrapped or not.
        stats: running statistics to restore on an exception.
    """
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(preserve_rng_state())
        stack.enter_context(without_communication(model))
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


@contextmanager
def without_communication(model: nn.Module) -> Iterator[None]:
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
    with _without_ddp_sync(model), _gathered_fsdp(model):
        yield


def is_fully_sharded(module: nn.Module) -> bool:
    """Return True if FSDP2's ``fully_shard`` was applied to a module."""
    if not dist.is_available():
        return False
    from torch.distributed import fsdp

    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


@contextmanager
def _without_ddp_sync(model: nn.Module) -> Iterator[None]:
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    flags = [wrapper.require_forward_param_sync for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, flag in zip(wrappers, flags, strict=True):
            wrapper.require_forward_param_sync = flag


@contextmanager
def _gathered_fsdp(model: nn.Module) -> Iterator[None]:
    sharded: list[Any] = [m for m in model.modules() if is_fully_sharded(m)]
    groups = [group for module in sharded for group in _parameter_groups(module)]
    try:
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
        for group in groups:
            vars(group).pop("reshard", None)
        for module in sharded:
            module.reshard()


def _parameter_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    return list(state._fsdp_param_groups)
