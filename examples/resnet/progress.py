"""Progress of training: a bar in a terminal, one line per epoch elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainProgress:
    """Shows the progress of a run.

    Args:
        show: print at all; true on rank 0 only, or every line would appear once a rank.
        steps: steps of the whole run.
        done: steps an earlier run has done.
    """

    def __init__(self, *, show: bool, steps: int, done: int) -> None:
        self._show = show
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            # A bar in a log file is a thousand lines of escape sequences.
            disable=not (show and Console().is_interactive),
        )
        self._task = self._bar.add_task("training", total=steps, completed=done)
        self._bar.start()

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._bar.stop()

    def step(self, loss: float | None) -> None:
        """Advance by one step; the loss is shown when it is known."""
        if loss is None:
            self._bar.advance(self._task)
        else:
            self._bar.update(self._task, advance=1, description=f"loss {loss:.4f}")

    def line(self, text: str) -> None:
        """Print a line, above the bar if the bar is shown."""
        if self._bar.disable:
            if self._show:
                print(text, flush=True)
        else:
            self._bar.console.print(text, highlight=False)
