"""Jobs on two hosts, over torchrun and over mpirun with ssh."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import STEPS, losses
from tests.cluster.hosts import TwoHosts, missing_requirement
from tests.example.support import PROGRAM, finish
from tests.transports import ROOT

pytestmark = pytest.mark.timeout(240)
PLAIN = {"NPROC": 2, "PYTHON": sys.executable, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if reason := missing_requirement():
        pytest.skip(reason)
    hosts = TwoHosts(tmp_path_factory.mktemp("hosts"))
    yield hosts
    hosts.close()


def start_nodes(
    hosts: TwoHosts, folder: Path, *arguments: object, **variables: object
) -> list[subprocess.Popen[str]]:
    script = ROOT / "launch" / "torchrun.sh"
    nodes = {**PLAIN, "NNODES": 2, "MASTER_ADDR": "host0", **variables}
    return [
        hosts.start(node, [script, *arguments], {**nodes, "NODE_RANK": node}, folder)
        for node in range(2)
    ]


def test_torchrun_trains_as_one_host(
    hosts: TwoHosts, one_host: list[float], tmp_path: Path
) -> None:
    """Bit for bit; Gloo would bind to 127.0.1.1, the address of the host name."""
    program = [PROGRAM, *STEPS, "max_steps=20", f"run_dir={tmp_path}"]
    finish(*start_nodes(hosts, tmp_path, *program), limit=150)
    assert losses(tmp_path) == one_host


def test_mpirun_trains_as_one_host(hosts: TwoHosts, one_host: list[float], tmp_path: Path) -> None:
    """To rounding, as MPI adds in another order. Open MPI would try docker0, its own address."""
    ssh = hosts.start_sshd()
    variables = {**PLAIN, "HOSTS": "host0,host1", "PRTE_MCA_plm_ssh_agent": ssh}
    script = ROOT / "launch" / "mpirun.sh"
    program = [script, PROGRAM, *STEPS, "max_steps=20", f"run_dir={tmp_path}"]
    finish(hosts.start(0, program, variables, tmp_path), limit=150)
    assert losses(tmp_path) == pytest.approx(one_host, rel=1e-13)


def test_interface_without_a_route_is_an_error_on_every_rank(
    hosts: TwoHosts, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text("import syncbn; syncbn.init_process_group()")
    jobs = start_nodes(hosts, tmp_path, program, GLOO_SOCKET_IFNAME="docker0")
    # torchrun numbers the hosts in any order.
    message = r"docker0 on host[01] has the address 172\.17\.0\.1, as has host[01]"
    for output in [job.communicate(timeout=100)[0] for job in jobs]:
        assert len(re.findall(f"Gloo cannot connect the hosts: .*{message}", output)) >= 2, output
