"""From a configuration to the batches of this rank."""

from collections.abc import Iterator
from itertools import islice

import torch
from config import DataConfig, Source
from consistency import raise_on_all_ranks, require_equal_on_ranks
from images import Images
from preemption import shield_loader_worker
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from syncbn import RankInfo


class ResumableSampler(DistributedSampler[int]):
    """A `DistributedSampler` that can leave out the beginning of one epoch."""

    skip = 0

    def __iter__(self) -> Iterator[int]:
        """Yield this rank's indices after the first ``skip``."""
        return islice(super().__iter__(), self.skip, None)


class TrainBatches:
    """Shuffled training batches of this rank.

    Every rank gets the same number of batches, of equal sizes: without ``drop_last`` the sampler
    repeats a few samples to make it so. The global batch of a step does not depend on how many
    ranks share it: ranks take turns in one permutation, the same for all.

    Args:
        images: the training set.
        cfg: ``batch_size`` is the size per rank.
        info: this rank.
        seed: seed of the order.

    Raises:
        ValueError: the set is too small for one batch.
    """

    def __init__(self, images: Images, cfg: DataConfig, info: RankInfo, seed: int) -> None:
        self._images = images
        self._batch_size = cfg.batch_size
        self._sampler = ResumableSampler(
            images, info.world_size, info.rank, seed=seed, drop_last=cfg.drop_last
        )
        self._loader = _loader(images, cfg, info, cfg.batch_size, self._sampler)
        if len(self) == 0:
            raise ValueError(
                f"training set: got {len(images)} images, expected at least "
                f"{cfg.batch_size * info.world_size} for one batch of {cfg.batch_size} on each of "
                f"{info.world_size} ranks (or data.drop_last=false)"
            )

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._loader)

    def epoch(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``[B, C, H, W]`` float32 and labels ``[B]`` int64.

        Args:
            epoch: decides order and augmentation.
            first: batches to leave out, because an earlier run has had them.
        """
        self._images.set_epoch(epoch)
        self._sampler.set_epoch(epoch)
        self._sampler.skip = first * self._batch_size
        yield from self._loader


def load(cfg: DataConfig, seed: int) -> tuple[Images, Images]:
    """Load the training and the test set on every rank; a collective.

    Args:
        cfg: which, and from where.
        seed: seed of the augmentation.

    Returns:
        ``(train, test)``.

    Raises:
        ValueError: a rank cannot read its data, or ranks found different amounts of it; on all
            ranks, with the same message.
    """
    with raise_on_all_ranks():
        train, test = _load(cfg, seed)
    require_equal_on_ranks(
        "(training images, test images, classes)", (len(train), len(test), train.num_classes)
    )
    return train, test


def _load(cfg: DataConfig, seed: int) -> tuple[Images, Images]:
    # Imported when needed: scikit-learn takes as long to import as torch, and only digits uses it.
    match cfg.source:
        case Source.digits:
            import digits

            return digits.load(cfg, seed)
        case Source.cifar10:
            import cifar10

            return cifar10.load(cfg, seed)
        case Source.imagefolder:
            import imagefolder

            return imagefolder.load(cfg, seed)


def eval_batches(
    images: Images, cfg: DataConfig, info: RankInfo
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of this rank's share of the test set.

    Shares are disjoint and cover the set exactly. A `DistributedSampler` would repeat samples to
    make them equally long and so count some twice; here a rank may have one batch fewer, or none.
    """
    share = Subset(images, range(info.rank, len(images), info.world_size))
    return _loader(share, cfg, info, cfg.eval_batch_size, None)


def _loader(
    images: Dataset[tuple[Tensor, int]],
    cfg: DataConfig,
    info: RankInfo,
    batch_size: int,
    sampler: ResumableSampler | None,
) -> DataLoader[tuple[Tensor, Tensor]]:
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        images,  # type: ignore[arg-type]  # a batch and a sample differ in type
        batch_size,
        sampler=sampler,
        num_workers=cfg.workers,
        pin_memory=info.device.type == "cuda",
        drop_last=sampler is not None and cfg.drop_last,
        worker_init_fn=shield_loader_worker,
        # A separate generator: iterating must not move the random numbers a checkpoint saves.
        generator=torch.Generator(),
    )
    return loader
