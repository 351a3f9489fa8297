"""Wrappers that communicate in a forward: DDP, FSDP2 and what cannot be served."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


@contextmanager
def without_communication(model: nn.Module) -> Iterator[None]:
    """Let a model's forward communicate with nobody in the body.

    DDP broadcasts buffers in a forward and FSDP gathers parameters; ranks that call it a different
    number of times would wait for each other forever. FSDP2's parameters are gathered once, here:
    every rank must come.

    Raises:
        ValueError: the model has a wrapper that this cannot be done with.
    """
    _refuse(model)
    with _silent_ddp(model), _gathered_fsdp(model):
        yield


def is_fully_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2's ``fully_shard`` was applied to a module."""
    if not dist.is_available():
        return False
    from torch.distributed import fsdp

    kind = getattr(fsdp, "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, DataParallel):
            raise ValueError(
                f"got nn.DataParallel{f' at {name}' if name else ''}, which copies the model in "
                "every forward; expected a model on one device a process: pass its .module"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"got FSDP1{f' at {name}' if name else ''}, whose forward needs all ranks; "
                "expected FSDP2 (fully_shard), DDP or a plain model with the full state dict"
            )


@contextmanager
def _silent_ddp(model: nn.Module) -> Iterator[None]:
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
            # Not set_reshard_after_forward: of several forwards side by side in a module, it would
            # keep the first from taking the parameters away from the others, and no more.
            group.reshard = lambda: None
        yield
    except BaseException:
        inner = {part for module in sharded for part in module.modules() if part is not module}
        for module in sharded:
            # A forward was left half way. Before torch 2.13 it cannot be told.
            if module not in inner and hasattr(module, "reset_iter_state"):
                module.reset_iter_state()
        raise
    finally:
        for group in groups:
            vars(group).pop("reshard", None)
        for module in sharded:
            module.reshard()


def _parameter_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []  # before torch 2.13
