"""What torch asks of a process group that is written in Python, whatever its transport."""

from __future__ import annotations

import torch
import torch.distributed as dist


class PythonProcessGroup(dist.ProcessGroup):
    """A process group that knows who and where it is; subclasses add the collectives.

    Args:
        backend: its name in torch.distributed.
        store: of this group alone.
        rank: of this process in the group.
        size: of the group.
    """

    def __init__(self, backend: str, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the stub lacks it
        self._backend = backend
        self._store = store
        self._rank = rank
        self._size = size
        self._name = self._description = ""

    def rank(self) -> int:
        """Return the rank of this process in the group."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def name(self) -> str:
        """Return the name of the backend."""
        return self._backend

    def get_group_store(self) -> dist.Store:
        """Return the store of the group."""
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        gpus = [torch.device("cuda")] if torch.cuda.is_available() else []
        return [torch.device("cpu"), *gpus]

    def _get_backend(self, device: torch.device) -> PythonProcessGroup:
        return self  # one transport for all devices

    # What C++ calls. Without a group name no functional collective works.

    def getRank(self) -> int:  # noqa: N802
        """Return the rank."""
        return self._rank

    def getSize(self) -> int:  # noqa: N802
        """Return the number of ranks."""
        return self._size

    def getBackendName(self) -> str:  # noqa: N802
        """Return the name of the backend."""
        return self._backend

    def getGroupName(self) -> str:  # noqa: N802
        """Return the name by which functional collectives find the group."""
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """Set the name by which functional collectives find the group."""
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        """Return the description given to ``new_group``."""
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        """Set the description given to ``new_group``."""
        self._description = description
