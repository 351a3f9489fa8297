"""Network interfaces of this host, and the one by which it reaches another host."""

from __future__ import annotations

import ipaddress
import socket
import struct

# Request for the IPv4 address of an interface, on Linux.
_SIOCGIFADDR = 0x8915


def find_source_address(host: str) -> str:
    """Return the IPv4 address from which this host sends to another one; empty without a route.

    No packet is sent: a UDP socket only looks up the route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return ""
        address: str = probe.getsockname()[0]
    return address


def interface_address(name: str) -> str:
    """Return the IPv4 address of an interface; empty if it has none."""
    try:
        from fcntl import ioctl  # not on Windows
    except ImportError:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def find_interface(address: str) -> str:
    """Return the name of the interface with an IPv4 address; empty without one."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if interface_address(name) == address), "")


def list_container_bridges() -> list[str]:
    """Return the names of bridges that container engines and libvirt create."""
    prefixes = "docker", "podman", "cni", "br-", "virbr", "lxcbr"
    return [name for _, name in socket.if_nameindex() if name.startswith(prefixes)]


def is_loopback(address: str) -> bool:
    """Return whether an address is a loopback address, or empty."""
    return not address or ipaddress.ip_address(address).is_loopback
