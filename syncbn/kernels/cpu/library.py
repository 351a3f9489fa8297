"""The C++ library: its files, hash of the sources, checksum, and loading.

hatch_build.py runs this file without torch.
"""

from __future__ import annotations

import ctypes
import hashlib
from pathlib import Path

#: Built by hatch_build.py.
PATH = Path(__file__).with_name("libsyncbn_cpu.so")
_REASON = PATH.with_suffix(".txt")
_FUNCTIONS = (
    *("moments", "normalize", "backward_reduce", "backward_elemt"),
    *("forward_local", "backward_local"),
)


def load_library() -> ctypes.CDLL | str:
    """Return the library, or the reason why it cannot be used."""
    if not PATH.exists():
        reason = _REASON.read_text().strip() if _REASON.exists() else "it has not been built"
        return f"there is no {PATH}: {reason}; fix this and install syncbn again"
    try:
        # Before it is mapped: a page that is missing from the file ends the process by SIGBUS.
        if not is_intact(PATH):
            return f"{PATH} is damaged: not as in {checksum_path(PATH)}; install syncbn again"
        library = ctypes.CDLL(str(PATH))
        for name in _FUNCTIONS:
            function = getattr(library, f"syncbn_{name}")
            function.argtypes = (ctypes.c_char_p,)
            setattr(library, name, function)
        if find_sources(PATH.parent) and _read_mark(library) != hash_sources(PATH.parent):
            return f"{PATH} was built from other sources than those beside it; install syncbn again"
        return library
    except (OSError, AttributeError, ValueError) as error:
        return f"{PATH} cannot be used: {error}; install syncbn again"


def _read_mark(library: ctypes.CDLL) -> str:
    mark = (ctypes.c_char * 256).in_dll(library, "syncbn_mark").value.decode()
    return mark.partition(",")[0]


def find_sources(folder: Path) -> list[Path]:
    """Return the C++ files below the kernels' folder; an installed wheel has none."""
    return sorted(folder.glob("csrc/*"))


def hash_sources(folder: Path) -> str:
    """Return a text with the SHA-256 of the C++ files."""
    digest = hashlib.sha256()
    for path in find_sources(folder):
        digest.update(path.read_bytes())
    return f"syncbn sources {digest.hexdigest()}"


def checksum_path(library: Path) -> Path:
    """Return the path of a library's checksum file."""
    return library.with_suffix(".sha256")


def checksum(library: Path) -> str:
    """Return the SHA-256 of a library as a line of `sha256sum`."""
    return f"{hashlib.sha256(library.read_bytes()).hexdigest()}  {library.name}\n"


def is_intact(library: Path) -> bool:
    """Return whether a library has the checksum that the build wrote.

    Raises:
        OSError: the library or its checksum is missing.
    """
    return checksum_path(library).read_text() == checksum(library)
