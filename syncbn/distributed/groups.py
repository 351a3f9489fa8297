"""Process groups of layers: the group to communicate in, and groups from descriptions."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeAlias
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from syncbn.distributed.descriptions import compare_descriptions, inherited_timeout
from syncbn.distributed.objects import all_gather_objects

#: Description of a process group; see :func:`resolve_group`. Types, not a string: a string would be
#: evaluated in the module whose annotation uses the alias, and that module has no ``DeviceMesh``.
GroupLike: TypeAlias = str | int | Sequence[Sequence[int]] | DeviceMesh | dist.ProcessGroup | None

# Maps the default group to the layers' group of all ranks. Torch owns both: a reference that
# outlives destroy_process_group would keep Gloo's threads alive, which may abort the process at
# exit.
_layers_groups: WeakKeyDictionary[dist.ProcessGroup, ref[dist.ProcessGroup]] = WeakKeyDictionary()


def create_layers_group(timeout: timedelta | None) -> None:
    """Create a group of all ranks for layers with ``process_group=None``; a collective.

    DistributedDataParallel sends gradient buckets over the default group. With
    ``find_unused_parameters`` their order among the layers' all-reduces differs between ranks.

    Args:
        timeout: timeout of a collective; None for torch's default.
    """
    default = dist.group.WORLD
    assert default is not None
    group = dist.new_group(timeout=timeout, group_desc="syncbn_layers")
    _layers_groups[default] = ref(group)


def _group_of_all_ranks() -> dist.ProcessGroup:
    """Return the layers' group of all ranks, or the default group if no such group was created."""
    default = dist.group.WORLD
    assert default is not None
    layers_group = _layers_groups.get(default)
    return default if layers_group is None else layers_group() or default


def active_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the group to communicate in, or None if its world size is 1.

    Args:
        process_group: group that contains this rank; None for all ranks.

    Raises:
        ValueError: this rank is not a member of the group, or it is not a process group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError(
                "got a process group, but torch.distributed is not initialized; "
                "call syncbn.init_process_group() first"
            )
        return None
    if process_group is None:
        process_group = _group_of_all_ranks()
    not_a_member: object = dist.GroupMember.NON_GROUP_MEMBER  # an int
    if process_group == not_a_member:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the process group that it passed; every rank must "
            "pass a group that it is a member of"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(
            f"got process group {process_group!r}; expected a torch.distributed.ProcessGroup or "
            "None (syncbn.distributed.resolve_group makes one from a description)"
        )
    return process_group if process_group.size() > 1 else None


def resolve_group(group: GroupLike) -> dist.ProcessGroup | None:
    """Return the process group for a description.

    "own", "node", integers and lists create groups, which is a collective: every rank must call
    this function, in the same order. The ranks first compare their descriptions. The new groups
    have the timeout of ``init_process_group``.

    Args:
        group: None or "world" (all ranks), "own" (all ranks in a new group: for layers under
            DistributedDataParallel with ``find_unused_parameters``, unless
            :func:`syncbn.init_process_group` created one), "node" (the ranks of one machine; with
            torchrun, the ranks of one agent), an integer n (n consecutive ranks: 0..n-1, n..2n-1,
            and so on), lists of global ranks that contain every rank once, a one-dimensional
            ``DeviceMesh``, or a process group, returned unchanged.

    Returns:
        A group that contains this rank; None for all ranks.

    Raises:
        ValueError: descriptions that differ between ranks, an unknown description, a size that does
            not divide the number of ranks, lists that do not contain every rank once, or a mesh of
            several dimensions.
        RuntimeError: torch.distributed is not initialized, or a rank has not called this function
            within the timeout.
    """
    match group:
        case None | "world":
            return None
        case dist.GroupMember.NON_GROUP_MEMBER:  # an int: new_group's result on other ranks
            raise ValueError(
                "this rank is not in the process group that it passed; every rank must pass a "
                "group that it is a member of"
            )
        case "own":
            _start_creation("'own'")
            return _own_group() if dist.get_world_size() > 1 else None
        case "node":
            return _node_ranks()
        case bool():
            pass
        case int():
            return _consecutive_ranks(group)
        case list() | tuple() if all(isinstance(ranks, list | tuple | range) for ranks in group):
            return _listed_ranks([list(ranks) for ranks in group])
        case DeviceMesh():
            if group.ndim != 1:
                raise ValueError(
                    f"got a device mesh of {group.ndim} dimensions {group.mesh_dim_names}; "
                    "expected one dimension, such as mesh['dp']"
                )
            return group.get_group()
        case dist.ProcessGroup():
            return group
    raise ValueError(
        f"got process group {group!r}; expected 'world', 'own', 'node', a number of ranks, "
        "lists of ranks, a DeviceMesh, a torch.distributed.ProcessGroup or None"
    )


def _own_group() -> dist.ProcessGroup:
    created: dist.ProcessGroup = dist.new_group(timeout=inherited_timeout())
    return created


def _consecutive_ranks(size: int) -> dist.ProcessGroup | None:
    _start_creation(f"groups of {size}")
    world = dist.get_world_size()
    if size < 1 or world % size:
        raise ValueError(f"got groups of {size} ranks; expected a divisor of the {world} ranks")
    return _local_subgroup([list(range(first, first + size)) for first in range(0, world, size)])


def _listed_ranks(partition: list[list[int]]) -> dist.ProcessGroup | None:
    _start_creation(f"{partition}")
    world = list(range(dist.get_world_size()))
    if sorted(rank for ranks in partition for rank in ranks) != world:
        raise ValueError(
            f"got groups {partition}; expected lists that contain each of the ranks {world} once"
        )
    return _local_subgroup(partition)


def _node_ranks() -> dist.ProcessGroup | None:
    _start_creation("'node'")
    # GROUP_RANK is the index of a torchrun agent: containers may share a host name.
    nodes = all_gather_objects((os.environ.get("GROUP_RANK", ""), socket.gethostname()))
    members = [[r for r, node in enumerate(nodes) if node == name] for name in sorted(set(nodes))]
    return _local_subgroup(members)


def _local_subgroup(partition: list[list[int]]) -> dist.ProcessGroup | None:
    if len(partition) == 1:
        return None
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(partition, timeout=inherited_timeout())
    return group


def _start_creation(description: str) -> None:
    """Check that every rank is about to create the same groups; a collective."""
    if not dist.is_initialized():
        raise RuntimeError(
            "a group of ranks needs torch.distributed; call syncbn.init_process_group() first"
        )
    compare_descriptions(description)
