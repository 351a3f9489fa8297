"""Training metrics, one JSON object per line.

The key ``kind`` distinguishes three kinds of lines: "step" has the loss of one optimizer step,
"epoch" the means of an epoch (or of the part of it before ``max_steps``) and the test results,
"checkpoint" the step of a last.pt that was written within an epoch.
"""

import json
from pathlib import Path
from typing import Any, TypeAlias

from storage import writing

Entry: TypeAlias = dict[str, Any]


class MetricsFile:
    """Appends entries to a file.

    Args:
        path: the file, or None to write nothing (every rank but the first).
        step: step to continue from: later entries, which a run that crashed left after its last
            checkpoint, are dropped, as they will be written again. Zero starts a new file.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self._file = None
        if path is not None:
            kept = [entry for entry in read(path) if entry["step"] <= step] if step else []
            with writing(path) as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())
            # One line at a time reaches the disk, so the file can be followed while training.
            self._file = path.open("a", buffering=1)

    def write(self, kind: str, **values: float) -> None:
        """Append one entry."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **values}) + "\n")

    def close(self) -> None:
        """Close the file; entries are on disk already."""
        if self._file is not None:
            self._file.close()


def read(path: Path) -> list[Entry]:
    """Return the entries of a metrics file, none if it does not exist.

    An incomplete last line, left by a process that was killed while writing it, is ignored.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # Complete lines end in a newline, so the text after the last newline is the incomplete one.
    return [json.loads(line) for line in lines[:-1]]
