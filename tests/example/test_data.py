"""Batches of each loader, their split over ranks, and errors of bad folders."""

from __future__ import annotations

from pathlib import Path

import cifar10
import data
import digits
import imagefolder
import numpy as np
import pytest
import torch
from augment import flip, shift
from config import DataConfig
from images import Pixels
from PIL import Image

import syncbn
from tests.example.support import composed, write_cifar, write_folder


def config(source: str, *overrides: str, root: Path | None = None) -> DataConfig:
    folder = [] if root is None else [f"data.root={root}"]
    return composed(f"data={source}", *folder, "data.workers=0", *overrides).data


def rank(index: int, size: int) -> syncbn.RankInfo:
    return syncbn.RankInfo(index, size, index, torch.device("cpu"))


def test_digits_split_is_stratified_fixed_and_complete() -> None:
    train, test = digits.load(config("digits"), seed=1)
    again, _ = digits.load(config("digits", "data.augment=false"), seed=2)
    assert (len(train), len(test)) == (1437, 360)
    counts = np.bincount([test[i][1] for i in range(len(test))], minlength=10)
    assert {35, 36, 37} >= set(counts)
    # The split does not depend on the seed of the run.
    assert [train[i][1] for i in range(50)] == [again[i][1] for i in range(50)]
    pixels = torch.stack([again[i][0] for i in range(len(again))])
    assert (pixels.shape, pixels.dtype) == ((1437, 1, 8, 8), torch.float32)
    assert abs(pixels.mean()) < 1e-5
    assert abs(pixels.std() - 1) < 1e-3


def test_cifar10_reads_labels_and_planes(tmp_path: Path) -> None:
    write_cifar(root := tmp_path / "c")
    train, test = cifar10.load(config("cifar10", "data.augment=false", root=root), seed=0)
    assert (len(train), len(test), train.num_classes) == (40, 8, 10)
    raw = (root / "data_batch_2.bin").read_bytes()[3 * 3073 : 4 * 3073]
    image, label = train[8 + 3]
    assert label == raw[0] == 3
    for channel, (mean, std) in enumerate([(0.4914, 0.2470), (0.4822, 0.2435), (0.4465, 0.2616)]):
        for row, column in ((0, 0), (5, 31)):
            byte = raw[1 + 1024 * channel + 32 * row + column]
            expected = (byte / 255 - mean) / std
            assert image[channel, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_imagefolder_labels_classes_alphabetically(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    cfg = config("imagefolder", "data.image_size=16", root=tmp_path)
    train, val = imagefolder.load(cfg, seed=0)
    assert [train[i][1] for i in range(len(train))] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [val[i][1] for i in range(len(val))] == [0, 0, 0, 1, 1, 1]
    image, _ = val[2]
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.float32)


def test_imagefolder_evaluates_the_centre() -> None:
    """A black image with a white centre: scaled to 1/0.875 of the size, then cut."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 255
    cut = imagefolder.resize_and_crop(Image.fromarray(pixels), 28)
    assert cut.size == (28, 28)
    assert np.asarray(cut).min() == 255


def test_random_resized_crop_covers_the_promised_areas() -> None:
    """Each pixel's colour is its place, so the crop shows which part it came from."""
    y, x = np.mgrid[0:200, 0:100]
    picture = Image.fromarray(np.stack([y, x, 0 * x], axis=2).astype(np.uint8))
    areas, mirrored = [], 0
    for seed in range(200):
        cut = imagefolder.random_resized_crop(picture, 32, np.random.default_rng(seed))
        part = np.asarray(cut, float)
        height, width, _ = np.ptp(part, axis=(0, 1)) * 32 / 31
        areas.append(width * height / 20000)
        mirrored += part[0, 0, 1] > part[0, -1, 1]
    assert 0.06 < min(areas) < 0.15
    assert max(areas) <= 1.03
    assert 70 < mirrored < 130
    line = Image.fromarray(np.zeros((2, 300, 3), np.uint8))
    assert imagefolder.random_resized_crop(line, 8, np.random.default_rng(0)).size == (8, 8)


def test_shift_moves_and_fills_with_zeros() -> None:
    image: Pixels = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    windows = {padded[:, i : i + 3, j : j + 3].tobytes() for i in range(3) for j in range(3)}
    shifted = {shift(image, 1, np.random.default_rng(seed)).tobytes() for seed in range(100)}
    assert shifted == windows
    flipped = [flip(image, np.random.default_rng(seed))[0, 0, 0] for seed in range(50)]
    assert set(flipped) == {1, 3}


@pytest.mark.parametrize("source", ["digits", "cifar10", "imagefolder"])
def test_augmentation_depends_on_seed_epoch_and_sample_alone(source: str, tmp_path: Path) -> None:
    """A resumed run, and a run on other ranks, must see the same images."""
    root = tmp_path / "root"
    if source == "cifar10":
        write_cifar(root)
    if source == "imagefolder":
        write_folder(root)
    cfg = config(source, root=None if source == "digits" else root)

    def images(seed: int, epoch: int, order: list[int]) -> torch.Tensor:
        train, _ = data._load(cfg, seed)
        train.set_epoch(epoch)
        return torch.stack([train[i][0] for i in order])[np.argsort(order).tolist()]

    first = images(5, 2, [0, 1, 2, 3, 4])
    assert torch.equal(first, images(5, 2, [3, 0, 4, 2, 1]))
    assert not torch.equal(first, images(5, 3, [0, 1, 2, 3, 4]))
    assert not torch.equal(first, images(6, 2, [0, 1, 2, 3, 4]))
    train, _ = data._load(cfg, 5)
    assert train.generator(0).random() != train.generator(1).random()


def batches(
    info: syncbn.RankInfo, *overrides: str, epoch: int = 0, first: int = 0
) -> list[torch.Tensor]:
    cfg = composed(*overrides)
    train, _ = digits.load(cfg.data, cfg.seed)
    loader = data.TrainBatches(train, cfg.data, info, cfg.seed)
    return [images for images, _ in loader.epoch(epoch, first)]


def rows(tensors: list[torch.Tensor]) -> list[bytes]:
    return sorted(image.numpy().tobytes() for tensor in tensors for image in tensor)


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    """Otherwise runs with and without synchronization could not be compared step by step."""
    one = batches(rank(0, 1), "data.batch_size=90", epoch=1)
    three = [batches(rank(r, 3), "data.batch_size=30", epoch=1) for r in range(3)]
    assert len(one) == len(three[0]) == 15
    for step in (0, 7, 14):
        assert rows([one[step]]) == rows([share[step] for share in three])


@pytest.mark.parametrize("augment", [False, True])
def test_epochs_differ_in_order_and_in_augmentation(augment: bool) -> None:
    """Three batches of 479 are the whole training set, so only the order can differ without."""
    settings = ["data.batch_size=479", f"data.augment={augment}"]
    first, second = (batches(rank(0, 1), *settings, epoch=epoch) for epoch in (1, 2))
    assert rows(first[:1]) != rows(second[:1])
    assert (rows(first) != rows(second)) == augment


def test_worker_processes_change_nothing_and_an_epoch_can_begin_in_the_middle() -> None:
    plain = batches(rank(1, 2), "data.batch_size=60", epoch=3)
    rest = batches(rank(1, 2), "data.batch_size=60", "data.workers=1", epoch=3, first=8)
    assert (len(plain), len(rest)) == (11, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain[8:], rest, strict=True))


def test_skip_holds_for_one_epoch_only() -> None:
    cfg = composed("data.batch_size=300")
    loader = data.TrainBatches(digits.load(cfg.data, 0)[0], cfg.data, rank(0, 1), 0)
    assert [len(list(loader.epoch(0, first))) for first in (3, 0)] == [1, 4]


@pytest.mark.parametrize("size", [1, 2, 7, 400])
def test_evaluation_shares_cover_the_test_set_once(size: int) -> None:
    """400 ranks on 360 images: some have nothing to do, none counts a sample twice."""
    cfg = config("digits", "data.eval_batch_size=50")
    _, test = digits.load(cfg, 0)
    shares = [list(data.eval_batches(test, cfg, rank(r, size))) for r in range(size)]
    assert rows([images for share in shares for images, _ in share]) == rows(
        [test[i][0][None] for i in range(len(test))]
    )


def test_too_few_images_for_one_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got 1437 images, expected at least 1500 for one batch"):
        batches(rank(0, 2), "data.batch_size=750")
    (kept,) = batches(rank(0, 2), "data.batch_size=750", "data.drop_last=false")
    assert len(kept) == 719


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data_batch_3.bin: no such file"),
        (b"\0" * 3074, r"data_batch_3.bin: got 3074 bytes, expected a positive multiple of 3073"),
        (b"\x0b" * 3073, r"data_batch_3.bin: got label 11, expected 0 to"),
    ],
    ids=["missing", "size", "label"],
)
def test_bad_cifar10_is_an_error_that_names_the_file(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    write_cifar(root := tmp_path / "c")
    path = root / "data_batch_3.bin"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cifar10.load(config("cifar10", root=root), 0)


def test_missing_and_empty_folders_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent is not a folder, expected the one that holds"):
        cifar10.load(config("cifar10", root=tmp_path / "absent"), 0)

    def check(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            imagefolder.load(config("imagefolder", root=tmp_path), 0)

    train, val = tmp_path / "train", tmp_path / "val"
    check(f"{train}: no such folder")
    train.mkdir()
    check(f"{train}: got no folders in it")
    (train / "cat").mkdir()
    check(f"{train / 'cat'}: got no image in it")
    for folder in (train / "cat", val / "cat", val / "dog"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "1.JPEG").touch()
    check("'train' has 1 classes and 'val' 2, expected the same ones.*dog")


@pytest.mark.parametrize("content", ["empty", "text", "cut.jpg", "cut.png"])
def test_unreadable_image_is_an_error_that_names_it(content: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "val" / "dog" / "1.jpg"
    if content == "cut.png":
        Image.open(path).save(path, "png")
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello"}.get(content, whole[: len(whole) // 2]))
    cfg = config("imagefolder", root=tmp_path)
    _, val = imagefolder.load(cfg, 0)
    with pytest.raises(RuntimeError, match=r"dog/1.jpg: got .*, expected an image that Pillow"):
        list(data.eval_batches(val, cfg, rank(0, 1)))
