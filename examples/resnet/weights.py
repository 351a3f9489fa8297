"""Load weights into a network; report mismatched names and shapes."""

from pathlib import Path

from torch import Tensor, nn


def load_weights(net: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Copy parameters and buffers into a network, all or none.

    Args:
        net: changed in place.
        weights: state dict, for example a torchvision checkpoint.
        source: path of the checkpoint, shown in the message.

    Raises:
        ValueError: names or shapes differ; the first few of each kind are listed.
    """
    own = net.state_dict()
    shapes = [
        f"{key} is {tuple(weights[key].shape)} not {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    problems = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": shapes,
    }
    if any(problems.values()):
        text = "; ".join(f"{problem}: {_few(keys)}" for problem, keys in problems.items() if keys)
        raise ValueError(f"{source}: checkpoint of another architecture; {text}")
    net.load_state_dict(weights)


def _few(items: list[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more
