"""Launch plans: the number of kernels that layers of many sizes compile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from syncbn.kernels.layout import NCSLayout
from tests.kernel_cases import device_of

if TYPE_CHECKING:
    from syncbn.kernels.triton.launcher import LaunchPlan

DEVICE = device_of("triton")


def specialization(plan: LaunchPlan) -> tuple[object, ...]:
    """Return the properties of a plan that Triton compiles into a kernel."""
    arguments = plan._template
    constants = tuple(str(value) for name, value in arguments.items() if name.isupper())
    ones = tuple(name for name, value in arguments.items() if value == 1 and name.islower())
    return plan._kernel.__name__, constants, ones, tuple(plan._options.items())


@pytest.mark.parametrize(("channels_last", "limit"), [(False, 70), (True, 35)])
def test_images_of_many_sizes_share_compiled_kernels(channels_last: bool, limit: int) -> None:
    """Compiling a kernel takes a second."""
    from syncbn.kernels.triton.launcher import plan_launch

    sizes = torch.randint(12, 200, (100, 2), generator=torch.Generator().manual_seed(0))
    compiled = set()
    dtypes = (torch.bfloat16,)
    for space in sizes.prod(1).tolist():
        layout = NCSLayout.contiguous((4, 256, space))
        if channels_last:
            layout = NCSLayout(4 * space, 256, 1, 256, 256)
        for name in ("moments", "normalize", "backward_reduce", "backward_elemt"):
            dy_stride = layout.dense_stride if name.startswith("backward") else None
            plan = plan_launch(name, layout, DEVICE, dtypes, dy_stride)
            compiled.add(specialization(plan))
    assert len(compiled) <= limit
