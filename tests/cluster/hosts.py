"""Two hosts on this machine: network and UTS namespaces, joined by a pair of veth interfaces.

Each has the files that cause trouble on real clusters: its name resolves to 127.0.1.1, as on
Debian, and the bridge of Docker has the same address on both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESSES = "10.77.0.1", "10.77.0.2"


def missing_requirement() -> str | None:
    """Return the reason why no namespaces can be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "unshare", "sshd") if shutil.which(name) is None]
    return (
        f"not installed: {', '.join(absent)} (apt-get install iproute2 openssh-server)"
        if absent
        else None
    )


class TwoHosts:
    """Hosts host0 and host1.

    Args:
        folder: folder for the files of sshd.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spaces = [f"syncbn{os.getpid()}-{i}" for i in range(2)]
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for i, space in enumerate(self._spaces):
                self._add_space(i, space)
            first, second = self._spaces
            _ip("link", "add", "veth0", "netns", first, "type", "veth", "peer", "name", "veth0",
                "netns", second)  # fmt: skip
            for address, space in zip(ADDRESSES, self._spaces, strict=True):
                _add_address(space, "veth0", f"{address}/24")
        except BaseException:
            self.close()
            raise

    def start(
        self, host: int, command: Sequence[object], variables: Mapping[str, object], cwd: Path
    ) -> subprocess.Popen[str]:
        """Start a command on a host."""
        return subprocess.Popen(
            self._command(host, command),
            cwd=cwd,
            env={**os.environ, **{name: str(value) for name, value in variables.items()}},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_sshd(self) -> str:
        """Start sshd on host1; return the ssh command that reaches it from host0."""
        key, configuration = self._folder / "key", self._folder / "sshd_config"
        generate = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
        subprocess.run(generate, check=True)
        configuration.write_text(
            f"Port 22\nHostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\n"
            f"PidFile none\nPermitRootLogin prohibit-password\n"
        )
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        sshd = [str(shutil.which("sshd")), "-D", "-f", str(configuration)]
        self._processes.append(subprocess.Popen(self._command(1, sshd), stderr=subprocess.DEVNULL))
        return f"ssh -i {key} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -q"

    def close(self) -> None:
        """End sshd and remove the namespaces."""
        for process in self._processes:
            process.terminate()
            process.wait()
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(f"/etc/netns/{space}", ignore_errors=True)

    def _command(self, host: int, command: Sequence[object]) -> list[str]:
        enter = ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts", "sh", "-c"]
        return [*enter, 'hostname "$0"; exec "$@"', f"host{host}", *map(str, command)]

    def _add_space(self, host: int, space: str) -> None:
        files = Path("/etc/netns") / space  # ip mounts these files over /etc
        files.mkdir(parents=True)
        other = f"{ADDRESSES[1 - host]} host{1 - host}"
        (files / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 host{host}\n{other}\n")
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "add", "docker0", "type", "bridge")
        _add_address(space, "docker0", "172.17.0.1/16")


def _add_address(space: str, interface: str, address: str) -> None:
    _ip("-n", space, "addr", "add", address, "dev", interface)
    _ip("-n", space, "link", "set", interface, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
