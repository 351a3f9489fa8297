"""Train a ResNet with DDP and a choice of batch normalization.

    launch/torchrun.sh examples/resnet/train.py               # digits, our layer, two CPU ranks
    launch/torchrun.sh examples/resnet/train.py norm=local    # the same with torch's BatchNorm2d
    launch/torchrun.sh examples/resnet/train.py experiment=cifar10_resnet20 data.root=FOLDER
    python examples/resnet/train.py                           # one process
    python examples/resnet/train.py --help                    # every option

Read next: `norm.py` (all that synchronizing BN takes: one line), `data.py`, `checkpoint.py`.
The options are explained in `configs/train.yaml`.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import data
import hydra
import storage
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoint import TrainState, capture, restore
from compute import Compute, build_compute
from config import TrainConfig, typed
from consistency import raise_on_all_ranks
from evaluate import evaluate
from images import Images
from meter import Meter, Totals
from norm import apply_norm, needs_broadcast
from omegaconf import DictConfig
from optimizer import build_sgd
from preemption import Preemption
from record import Recorder
from resnet import build_resnet
from rundir import CHECKPOINT, open_run_dir
from schedule import Schedule, build_schedule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from weights import load_weights

import syncbn
from syncbn.cli import config_path


@hydra.main(version_base="1.3", config_path=config_path(), config_name="train")
def main(raw: DictConfig) -> None:
    """Train with the composed configuration; this process is one rank of the job."""
    cfg = typed(raw)
    info = syncbn.init_process_group()
    preemption = Preemption()
    preemption.record_signals()
    fit(cfg, info, preemption)
    # Gloo may abort a process that leaves while it still works on DDP's last all-reduce.
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(preemption.exit_code)


def fit(cfg: TrainConfig, info: syncbn.RankInfo, preemption: Preemption | None = None) -> Path:
    """Train, and evaluate after every epoch; a collective.

    Args:
        cfg: the job; the same on every rank.
        info: this rank; `torch.distributed` is initialized.
        preemption: signals of a scheduler, after which the run saves and ends; None for none.

    Returns:
        The run directory, with config.yaml, metrics.jsonl, curves.png, last.pt and best.pt.

    Raises:
        ValueError: bad input; on every rank, with the same message.
        RuntimeError: an image cannot be decoded, or the loss is no longer finite.
    """
    train_images, test_images = data.load(cfg.data, cfg.seed)
    batches = data.TrainBatches(train_images, cfg.data, info, cfg.seed)
    test = data.eval_batches(test_images, cfg.data, info)

    compute = build_compute(cfg, info.device)
    net = compute.place(build_net(cfg, train_images, info.device))
    state = TrainState(
        net, build_sgd(net, cfg.optimizer), compute.grad_scaler(), Meter(info.device), len(batches)
    )
    schedule = build_schedule(
        cfg.optimizer,
        steps_per_epoch=len(batches),
        epochs=cfg.epochs,
        global_batch=cfg.data.batch_size * info.world_size,
    )
    # Before a resume: the constructor gives every rank the buffers of rank 0.
    model = distribute(net, cfg, info.device)
    # Weights are equal on all ranks by now; randomness in the network (dropout) must not be.
    torch.manual_seed(cfg.seed + info.rank)
    run = open_run_dir(cfg)
    if run.checkpoint is not None:
        restore(state, run.checkpoint)
    last_step = cfg.epochs * len(batches)
    if cfg.max_steps is not None:
        last_step = min(last_step, cfg.max_steps)

    preemption = preemption or Preemption()
    preemption.start_clock(cfg.checkpoint.every_minutes)
    with closing(Recorder(cfg, run.path, state, last_step)) as record:
        while not preemption.ends and not state.is_complete(last_step):
            model.train()
            began, first = time.perf_counter(), state.step
            for loss, lr in train_epoch(model, state, batches, schedule, compute, cfg, last_step):
                record.step(state, loss, lr)
                if preemption.agree(info.device) and not state.awaits_evaluation(last_step):
                    save(state, run.path)
                    record.checkpoint(state)
                    if preemption.ends:
                        break
            preemption.wait()
            if not state.awaits_evaluation(last_step):
                break
            trained = state.meter.totals()  # synchronizes with the device, so the work is timed
            seconds = time.perf_counter() - began
            save(state, run.path)  # an evaluation may outlast the time until SIGKILL
            if preemption.ends:
                record.checkpoint(state)
                break
            tested = evaluate(net, test, compute)
            record.epoch(state, trained, tested, seconds=seconds, steps=state.step - first)
            state.evaluated = state.step
            save(state, run.path, tested)
            preemption.restart_clock()
    return run.path


def build_net(cfg: TrainConfig, images: Images, device: torch.device) -> nn.Module:
    """Make the network: architecture, then weights, then normalization; a collective.

    Args:
        cfg: the job.
        images: training set, for the numbers of channels and classes.
        device: device that runs the network.

    Returns:
        The network on the CPU, float32.

    Raises:
        ValueError: ``model.weights`` does not fit, or the normalization cannot run here.
    """
    net: nn.Module = build_resnet(cfg.model, images.channels, images.num_classes, cfg.seed)
    if cfg.model.weights is not None:
        path = Path(cfg.model.weights)
        with raise_on_all_ranks():
            weights = storage.load(path)
            load_weights(net, weights.get("model", weights), path)
    return apply_norm(net, cfg.norm, device)


def distribute(net: nn.Module, cfg: TrainConfig, device: torch.device) -> DistributedDataParallel:
    """Return the network under DDP; a collective.

    Args:
        net: network on its device.
        cfg: the job.
        device: device of this rank.
    """
    return DistributedDataParallel(
        net,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=needs_broadcast(cfg.norm.kind),
    )


def train_epoch(
    model: DistributedDataParallel,
    state: TrainState,
    batches: data.TrainBatches,
    schedule: Schedule,
    compute: Compute,
    cfg: TrainConfig,
    last_step: int,
) -> Iterator[tuple[Tensor, float]]:
    """Do the steps that are left of an epoch, and yield loss and learning rate after each.

    Args:
        model: ``state.net`` under DDP.
        state: changed in place. If its epoch awaits the evaluation, no step is left.
        batches: this rank's batches.
        schedule: learning rate.
        compute: device, dtype and autocast.
        cfg: the job.
        last_step: step at which the run ends.
    """
    if state.awaits_evaluation(last_step):
        return
    epoch, done = divmod(state.step, len(batches))
    if done == 0:
        state.meter.reset()
    rest = islice(batches.epoch(epoch, done), last_step - state.step)
    for images, labels in compute.batches(rest):
        lr = schedule(state.step)
        clip_norm = cfg.optimizer.clip_norm
        yield train_step(model, state, images, labels, lr, compute, clip_norm), lr


def train_step(
    model: DistributedDataParallel,
    state: TrainState,
    images: Tensor,
    labels: Tensor,
    lr: float,
    compute: Compute,
    clip_norm: float | None,
) -> Tensor:
    """Do one optimizer step and count it in ``state``.

    Args:
        model: ``state.net`` under DDP.
        state: changed in place.
        images: ``[B, C, H, W]``.
        labels: ``[B]``, int64.
        lr: learning rate of this step.
        compute: device, dtype and autocast.
        clip_norm: largest norm of the gradient; None for no clipping.

    Returns:
        The mean loss over this rank's batch, a scalar on the device.
    """
    with compute.autocast():
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
    state.optimizer.zero_grad()
    state.scaler.scale(loss).backward()
    if clip_norm is not None:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    state.meter.add(logits, labels, loss)
    return loss.detach()


def save(state: TrainState, folder: Path, tested: Totals | None = None) -> None:
    """Write last.pt, and best.pt if the test accuracy is the highest so far; a collective."""
    better = tested is not None and tested.accuracy > state.best_accuracy
    if tested is not None:
        state.best_accuracy = max(state.best_accuracy, tested.accuracy)
    checkpoint = capture(state)
    if dist.get_rank() == 0:
        storage.save(checkpoint, folder / CHECKPOINT)
        if better:
            storage.save(checkpoint, folder / "best.pt")


if __name__ == "__main__":
    main()
