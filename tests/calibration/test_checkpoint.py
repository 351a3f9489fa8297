"""Checkpoints: any nesting, only running statistics change, files are never damaged."""

from __future__ import annotations

import collections
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

import syncbn
from syncbn.calibration.checkpoint import read_checkpoint
from tests.calibration.networks import distance, images, layers, network, statistics
from tests.disk import almost_full


def weights(prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in network().state_dict().items()}


NESTINGS: dict[str, Any] = {
    "alone": lambda: weights(),
    "ordered": lambda: collections.OrderedDict(weights()),
    "of a compiled DDP": lambda: {"state_dict": weights("module._orig_mod.")},
    "model": lambda: {"model": weights(), "step": 7, "args": {"lr": [0.1, None, "x"]}},
    "deep": lambda: {"state": {"net": weights()}},
    "an average": lambda: {"model_ema": {**weights("module."), "n_averaged": torch.tensor(4)}},
    "with an optimizer": lambda: {
        "model": weights(),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{}]},
    },
    "without counters": lambda: {
        name: value for name, value in weights().items() if not name.endswith("num_batches_tracked")
    },
}


def flat(content: Any) -> dict[str, Any]:
    """Return the structure of a checkpoint and all entries by path, tensors as lists."""
    entries, structure = tree_flatten_with_path(content)
    found = {"structure": structure}
    for path, value in entries:
        if isinstance(value, Tensor):
            value = value.dtype, tuple(value.shape), value.stride(), value.tolist()
        found[keystr(path)] = value
    return found


def is_statistic(path: str) -> bool:
    return path.endswith(("running_mean']", "running_var']"))


def recalibrate(folder: Path, suffix: str = ".pt", where: str | None = None) -> None:
    """Recalibrate in.* to out.*, a file with the statistics of the model and nothing else new."""
    source, output = folder / f"in{suffix}", folder / f"out{suffix}"
    checkpoint, net, before = read_checkpoint(source), network(), source.read_bytes()
    nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    state = checkpoint.find(net, where)
    state.load_into(net)
    syncbn.recalibrate(net, images().split(6))
    state.replace_running_stats(net)
    checkpoint.write(output)
    assert source.read_bytes() == before
    assert sorted(folder.iterdir()) == [source, output]
    again = network()
    read_checkpoint(output).find(again, where).load_into(again)
    assert distance(statistics(again), statistics(net)) == 0.0


@pytest.mark.parametrize("nesting", NESTINGS)
def test_only_running_statistics_change(nesting: str, tmp_path: Path) -> None:
    content = NESTINGS[nesting]()
    torch.save(content, tmp_path / "in.pt")
    recalibrate(tmp_path)
    old, new = flat(content), flat(torch.load(tmp_path / "out.pt", weights_only=True))
    assert old.keys() == new.keys()
    for path in old:
        assert (old[path] == new[path]) is not is_statistic(path), path
    assert sum(map(is_statistic, old)) == 10


def test_safetensors(tmp_path: Path) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(weights("module."), source, {"made by": "a test"})
    recalibrate(tmp_path, ".safetensors")
    with safe_open(source, "pt") as old, safe_open(output, "pt") as new:
        assert old.metadata() == new.metadata() == {"made by": "a test"}
        assert list(old.keys()) == list(new.keys())
        for name in list(old.keys()):
            same = torch.equal(old.get_tensor(name), new.get_tensor(name))
            assert same is not name.endswith(("running_mean", "running_var"))


def test_plain_weights_preferred_to_averages(tmp_path: Path) -> None:
    """The file holds one state dict under two keys."""
    shared = weights()
    content: dict[str, Any] = {"ema": weights(), "model": shared, "all": {"best": shared}}
    torch.save(content, tmp_path / "in.pt")
    checkpoint = read_checkpoint(tmp_path / "in.pt")
    assert checkpoint.content["model"] is checkpoint.content["all"]["best"]
    for where in (None, "model", "all.best", "ema"):
        assert checkpoint.find(network(), where).where == (where or "model")
    with pytest.raises(ValueError, match="no state dict found at 'optimizer'"):
        checkpoint.find(network(), "optimizer")
    recalibrate(tmp_path, where="ema")
    new = torch.load(tmp_path / "out.pt", weights_only=True)
    assert not torch.equal(new["ema"]["1.running_mean"], content["ema"]["1.running_mean"])
    assert torch.equal(new["model"]["1.running_mean"], content["model"]["1.running_mean"])


MILLION_PATHS: dict[str, Any] = {"step": 1}
for _ in range(4):
    MILLION_PATHS = {f"{number:03}": MILLION_PATHS for number in range(100)}
PREFIXES = {f"{number}.0.weight": torch.zeros(1) for number in range(300)}
SEARCHES: dict[str, tuple[dict[str, Any], str, int]] = {
    "paths": (MILLION_PATHS, "no state dict found anywhere", 1 << 20),
    "prefixes": (PREFIXES, "does not fit the model", 1 << 19),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_search_memory_is_bounded(case: str, tmp_path: Path) -> None:
    """Each path to a mapping, or all mismatches of each prefix, were stored."""
    content, message, limit = SEARCHES[case]
    torch.save(content, tmp_path / "in.pt")
    assert (tmp_path / "in.pt").stat().st_size < 100_000
    checkpoint, net = read_checkpoint(tmp_path / "in.pt"), network()
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        checkpoint.find(net)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < limit


def test_entries_sharing_memory(tmp_path: Path) -> None:
    """A layer under two names, with half-precision buffers in a slice of a larger tensor."""
    net: Any = nn.Module()
    net.first = nn.BatchNorm1d(2)
    net.second = net.first
    content = dict(net.state_dict())
    storage = torch.zeros(8, dtype=torch.float16)
    content["first.running_mean"] = storage[2:6:2]
    content["second.running_mean"] = content["first.running_mean"]
    torch.save({"model": content, "all": storage}, tmp_path / "in.pt")
    checkpoint = read_checkpoint(tmp_path / "in.pt")
    state = checkpoint.find(net)
    syncbn.recalibrate(net, [torch.randn(9, 2) + 3], forward=lambda m, x: net.first(x))
    state.replace_running_stats(net)
    checkpoint.write(tmp_path / "out.pt")
    new = torch.load(tmp_path / "out.pt", weights_only=True)
    mean = new["model"]["first.running_mean"]
    torch.testing.assert_close(mean, net.first.running_mean.half())
    assert new["all"].tolist() == [0] * 8
    assert new["model"]["second.running_mean"].data_ptr() == mean.data_ptr()


def test_statistics_overflow_checkpoint_dtype(tmp_path: Path) -> None:
    content = {k: v.half() if "running" in k else v for k, v in weights().items()}
    torch.save(content, tmp_path / "in.pt")
    net, state = network(), read_checkpoint(tmp_path / "in.pt").find(network())
    layers(net)["6"].running_var.fill_(1e6)
    with pytest.raises(ValueError, match=r"6\.running_var: .* beyond the range of torch\.float16"):
        state.replace_running_stats(net)


def test_submodule_checkpoint(tmp_path: Path) -> None:
    content = {**weights("student.net."), "head.weight": torch.ones(3), **weights("ema.")}
    torch.save({"state_dict": content}, tmp_path / "in.pt")
    assert read_checkpoint(tmp_path / "in.pt").find(network()).prefix == "student.net."
    recalibrate(tmp_path)
    new = torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"]
    changed = [name for name, value in content.items() if not torch.equal(value, new[name])]
    assert len(changed) == 10
    assert all(name.startswith("student.net.") for name in changed)


def test_extra_state_is_not_loaded(tmp_path: Path) -> None:
    class WithExtra(nn.BatchNorm2d):
        def get_extra_state(self) -> Any:
            return {"version": 3}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError("extra state was loaded")

    net = WithExtra(3).double()
    torch.save(net.state_dict(), tmp_path / "in.pt")
    read_checkpoint(tmp_path / "in.pt").find(net).load_into(net)


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("owned",))


UNREADABLE = {
    "evil.pt": r"holds an object of class posix\.mkdir beside",
    **dict.fromkeys(["empty.pt", "half.pt", "text.pt"], "cannot be read as tensors and plain data"),
    "half.safetensors": "cannot be read as safetensors",
    "list.pt": "got a list; expected a dict",
    "gone.pt": "no such file",
}


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": weights()}, "good.pt")
    content = Path("good.pt").read_bytes()
    torch.save({"model": weights(), "hook": Evil()}, "evil.pt")
    torch.save([1, 2], "list.pt")
    Path("empty.pt").write_bytes(b"")
    Path("half.pt").write_bytes(content[: len(content) // 2])
    Path("text.pt").write_text("no checkpoint")
    Path("half.safetensors").write_bytes(content[:100])
    for name, message in UNREADABLE.items():
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            read_checkpoint(Path(name))
    assert not Path("owned").exists()
    torch.save({"step": 3}, "no_tensors.pt")
    with pytest.raises(ValueError, match=r"no state dict found anywhere"):
        read_checkpoint(Path("no_tensors.pt")).find(network())


def test_mismatched_state_dict(tmp_path: Path) -> None:
    """Integer statistics would lose the fractions of the new ones."""
    content = weights()
    del content["1.running_mean"]
    content["7.running_mean"] = torch.zeros(3)
    content["12.bias"] = torch.zeros(9)
    content["6.running_var"] = content["6.running_var"].long()
    torch.save({"model": content}, tmp_path / "in.pt")
    message = (
        r"does not fit the model; the state dict at 'model': 1\.running_mean is missing, "
        r"7\.running_mean is unexpected, 12\.bias is \(9,\), not \(2,\), "
        r"6\.running_var is torch\.int64, which cannot hold a fraction"
    )
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "in.pt").find(network())


def test_invalid_outputs(tmp_path: Path) -> None:
    source = tmp_path / "in.pt"
    torch.save(weights(), source)
    (tmp_path / "link.pt").symlink_to(source)
    checkpoint = read_checkpoint(source)
    for output, message in (
        (source, r"is the checkpoint that is read; .*overwrite=true"),
        (tmp_path / "link.pt", r"is the checkpoint that is read"),
        (tmp_path / "no" / "out.pt", r"the folder .*no does not exist"),
        (tmp_path, r"is a folder"),
        (tmp_path / "out.safetensors", r"expected a file of the kind of"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.write(output)
    checkpoint.write(source, overwrite=True)
    assert read_checkpoint(source).content.keys() == checkpoint.content.keys()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_full_disk_preserves_files(suffix: str, tmp_path: Path) -> None:
    source = tmp_path / f"in{suffix}"
    torch.save(weights(), source) if suffix == ".pt" else save_file(weights(), source)
    checkpoint, before = read_checkpoint(source), source.read_bytes()
    for output, overwrite in ((source, True), (tmp_path / f"out{suffix}", False)):
        with almost_full(1000), pytest.raises((OSError, RuntimeError)):
            checkpoint.write(output, overwrite)
        assert source.read_bytes() == before
        assert list(tmp_path.iterdir()) == [source]
