"""Gain from calibrating a network trained with two samples per rank, also on corrupted images.

    make calibration                                      # or, with a virtual environment at hand,
    python examples/resnet/calibration_study.py --seeds 3

Trains ResNet-20 on the digits (local batch norm, two ranks with two samples each), recomputes its
running statistics with several tools and calibration batch sizes, and tests it; then with noisy and
flat test images, with and without `syncbn.inference.prior_mix`, and with
`syncbn.inference.example_weighted`. Writes tables and a picture.
"""

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import digits
import torch
import torch.nn.functional as F
from calibration_picture import draw
from calibration_table import Finding, Robustness, tables
from config import Arch, DataConfig, ModelConfig, Source
from corruptions import Corruption, low_contrast, noise
from images import Images
from resnet import build_resnet
from rich.progress import track
from storage import writing
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import syncbn
from syncbn.inference import example_weighted, prior_mix

HERE = Path(__file__).resolve().parent
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 300)
NOISE = (0.0, 0.5, 1.0, 1.5, 2.0)
CONTRAST_LOSS = (0.0, 0.25, 0.5, 0.75, 0.9)
TEST_BATCH = 32
PSEUDO_SAMPLES = 16
TRAINING_BATCHES = (2, 4, 8, 16, 64, 256)
MODEL = ModelConfig(Arch.resnet20, width=16, zero_init_residual=False, weights=None)
DATA = DataConfig(Source.digits, 2, 256, drop_last=True, augment=False, workers=0)


@dataclass(frozen=True)
class Labelled:
    """A set of images in memory: ``[N, 1, 8, 8]`` and ``[N]``."""

    images: Tensor
    labels: Tensor

    @staticmethod
    def from_images(images: Images) -> "Labelled":
        """Load a data set, in an order that mixes the classes."""
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
        pairs = [images[index] for index in order]
        return Labelled(
            torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
        )


def train(seed: int, folder: Path) -> nn.Module:
    """Train on two ranks and return the network.

    Raises:
        SystemExit: the job failed; its output has been printed.
    """
    command = [
        *(str(HERE.parent.parent / "launch" / "torchrun.sh"), str(HERE / "train.py")),
        *("experiment=digits_resnet20", "norm=local", f"seed={seed}", f"run_dir={folder}"),
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    net: nn.Module = build_resnet(MODEL, channels=1, num_classes=10, seed=0)
    net.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    return net.eval()


@torch.no_grad()
def test(net: nn.Module, data: Labelled, batch_size: int) -> tuple[float, float]:
    """Return the cross-entropy in nats and the accuracy."""
    net.eval()
    logits = torch.cat([net(images) for images in data.images.split(batch_size)])
    right = (logits.argmax(1) == data.labels).double().mean()
    return F.cross_entropy(logits, data.labels).item(), right.item()


def calibrations() -> dict[str, Callable[[nn.Module, tuple[Tensor, ...]], object]]:
    """Return the ways to recompute running statistics, by name."""
    return {
        "update_bn": lambda net, batches: update_bn(batches, net),
        "pooled, as PreciseBN": partial(syncbn.recalibrate, method="pooled", progress=False),
        "lockstep": partial(syncbn.recalibrate, method="lockstep", progress=False),
    }


def compare_calibrations(net: nn.Module, train_set: Labelled, test_set: Labelled) -> list[Finding]:
    """Calibrate with every tool and batch size, and test.

    Returns:
        The network as trained, then each tool by batch size.
    """
    exact = copy.deepcopy(net)
    syncbn.recalibrate(exact, train_set.images.split(64), progress=False)
    found = [Finding("as trained", 0, *test(net, test_set, 360), distance(net, exact))]
    for batch_size in BATCH_SIZES:
        for name, calibrate in calibrations().items():
            calibrated = copy.deepcopy(net)
            calibrate(calibrated, train_set.images.split(batch_size))
            tested = test(calibrated, test_set, 360)
            found.append(Finding(name, batch_size, *tested, distance(calibrated, exact)))
    return found


def distance(net: nn.Module, exact: nn.Module) -> float:
    """Return KL(exact || net) of the Gaussians with the running statistics, nats a channel."""
    total, channels = 0.0, 0
    for layer, other in zip(net.modules(), exact.modules(), strict=True):
        if isinstance(layer, nn.BatchNorm2d) and isinstance(other, nn.BatchNorm2d):
            mean, var, exact_mean, exact_var = (
                statistic.double()
                for module in (layer, other)
                for statistic in (module.running_mean, module.running_var)
                if statistic is not None
            )
            ratio = (exact_var + other.eps) / (var + layer.eps)
            shift = (mean - exact_mean).square() / (var + layer.eps)
            total += float((ratio - 1 - ratio.log() + shift).sum() / 2)
            channels += len(mean)
    return total / channels


def compare_on_corrupted(
    net: nn.Module, test_set: Labelled, corrupt: Corruption, strengths: tuple[float, ...]
) -> list[Robustness]:
    """Test on images of growing corruption, with and without their own statistics mixed in."""
    found = []
    for strength in strengths:
        bad = Labelled(corrupt(test_set.images, strength), test_set.labels)
        _, plain = test(net, bad, TEST_BATCH)
        with prior_mix(net, PSEUDO_SAMPLES):
            _, mixed = test(net, bad, TEST_BATCH)
        found.append(Robustness(strength, plain, mixed))
    return found


def compare_weights(
    net: nn.Module, test_set: Labelled, report: syncbn.CalibrationReport
) -> list[Finding]:
    """Test with samples that have a share in the statistics that normalize them, by batch size."""
    found = []
    for batch_size in TRAINING_BATCHES:
        with example_weighted(net, batch_size, report):
            found.append(Finding("example_weighted", batch_size, *test(net, test_set, 360), 0.0))
    return found


def main() -> None:
    """Train, calibrate, test; print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="networks to train (default 3)")
    seeds = parser.parse_args().seeds
    home = Path("runs") / "calibration" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    train_set, test_set = (Labelled.from_images(images) for images in digits.load(DATA, seed=0))
    findings: list[list[Finding]] = []
    noisy: list[list[Robustness]] = []
    flat: list[list[Robustness]] = []
    weighted: list[list[Finding]] = []
    for seed in track(range(seeds), "train, calibrate, test"):
        net = train(seed, home / f"seed_{seed}")
        findings.append(compare_calibrations(net, train_set, test_set))
        report = syncbn.recalibrate(net, train_set.images.split(64), progress=False)
        weighted.append(compare_weights(net, test_set, report))
        noisy.append(compare_on_corrupted(net, test_set, noise, NOISE))
        flat.append(compare_on_corrupted(net, test_set, low_contrast, CONTRAST_LOSS))
    text = tables(findings, weighted, noisy, flat)
    with writing(home / "calibration.md") as file:
        file.write(text.encode())
    draw(findings, noisy, flat, home / "calibration.png")
    print(f"{text}\npicture: {home / 'calibration.png'}")


if __name__ == "__main__":
    main()
