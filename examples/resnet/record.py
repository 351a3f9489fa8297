"""Output of a run: metrics, picture and screen output, written by rank 0."""

import math
from pathlib import Path

import curves
import torch.distributed as dist
from checkpoint import TrainState
from config import TrainConfig
from meter import Totals
from metrics import MetricsFile
from progress import TrainProgress
from torch import Tensor


class Recorder:
    """Records steps and epochs; made and called on every rank, as it averages over ranks.

    Args:
        cfg: configuration with the title and the logging interval.
        folder: the run directory.
        state: training state; entries after its step are removed from the metrics file.
        last_step: step at which the run ends.
    """

    def __init__(self, cfg: TrainConfig, folder: Path, state: TrainState, last_step: int) -> None:
        first, self._world_size = dist.get_rank() == 0, dist.get_world_size()
        self._log_every = cfg.log_every
        self._global_batch = cfg.data.batch_size * self._world_size
        self._title = f"{cfg.name}, {self._world_size} x {cfg.data.batch_size} samples"
        self._picture = folder / "curves.png" if first else None
        self._metrics_path = folder / "metrics.jsonl"
        self._metrics = MetricsFile(self._metrics_path if first else None, state.step)
        self._progress = TrainProgress(show=first, steps=last_step, done=state.step)
        self._progress.line(f"{self._title}, {folder}")

    def close(self) -> None:
        """Finish the file and the progress bar."""
        self._metrics.close()
        self._progress.close()

    def step(self, state: TrainState, loss: Tensor, lr: float) -> None:
        """Record one step; a collective every ``log_every`` steps, when the loss is averaged.

        Args:
            state: training state after the step.
            loss: this rank's mean over its batch, a scalar.
            lr: learning rate of the step.

        Raises:
            RuntimeError: the loss is not finite; on all ranks, since they share the average.
        """
        if state.step % self._log_every:
            self._progress.step(None)
            return
        total = loss.detach().double()
        dist.all_reduce(total)
        # Batches are equally large on all ranks, so this is the mean over the global batch.
        mean = total.item() / self._world_size
        if not math.isfinite(mean):
            raise RuntimeError(
                f"step {state.step}: got loss {mean}, expected a finite number; lower "
                "optimizer.lr, warm up longer or set optimizer.clip_norm"
            )
        self._metrics.write("step", step=state.step, epoch=state.epoch, loss=mean, lr=lr)
        self._progress.step(mean)

    def checkpoint(self, state: TrainState) -> None:
        """Record that last.pt has the state after a step within an epoch."""
        self._metrics.write("checkpoint", step=state.step, epoch=state.epoch)
        self._progress.line(f"saved at step {state.step}")

    def epoch(
        self, state: TrainState, trained: Totals, tested: Totals, *, seconds: float, steps: int
    ) -> None:
        """Record the results of an epoch, or of the part of one before ``max_steps``.

        Args:
            state: training state after the epoch.
            trained: totals over the training samples, each taken at its own step.
            tested: totals over the test set.
            seconds: training time without evaluation, seconds.
            steps: optimizer steps in this time.
        """
        speed = steps * self._global_batch / seconds
        self._metrics.write(
            "epoch",
            step=state.step,
            epoch=state.epoch,
            train_loss=trained.loss,
            train_accuracy=trained.accuracy,
            test_loss=tested.loss,
            test_accuracy=tested.accuracy,
            test_correct=tested.correct,
            test_samples=tested.samples,
            seconds=seconds,
            samples_per_second=speed,
        )
        self._progress.line(
            f"epoch {state.epoch:6.2f}  train loss {trained.loss:.4f}  "
            f"test loss {tested.loss:.4f}  "
            f"test accuracy {100 * tested.accuracy:.2f} % ({tested.correct}/{tested.samples})  "
            f"{seconds:.1f} s  {speed:.0f} samples/s"
        )
        if self._picture is not None:
            curves.plot(self._metrics_path, self._picture, self._title)
