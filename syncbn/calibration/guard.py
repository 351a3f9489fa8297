"""Everything about a model that calibration must leave as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from syncbn.calibration.interrupts import uninterrupted
from syncbn.calibration.layers import Backup, put_back
from syncbn.calibration.randomness import same_randomness
from syncbn.calibration.wrappers import without_communication


@contextmanager
def untouched(model: nn.Module, backup: Backup) -> Iterator[None]:
    """Put a model into inference mode for the body, alone on its rank, and everything back after.

    Back come training flags and the state of random generators, and on any exception the running
    statistics. The model's own communication is off in the body: ranks may call it a different
    number of times. Compiled parts run uncompiled, so that hooks are called.

    Args:
        model: wrapped or not.
        backup: statistics to restore on an exception.
    """
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(same_randomness())
        stack.enter_context(without_communication(model))
        if "torch._dynamo" in sys.modules:  # it takes a second to import
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        try:
            # Not model.eval(), which classes override, for example to keep parts as they are.
            for module, _ in flags:
                module.training = False
            yield
        except BaseException:
            with uninterrupted():
                put_back(backup)
            raise
        finally:
            with uninterrupted():
                for module, flag in flags:
                    module.training = flag
