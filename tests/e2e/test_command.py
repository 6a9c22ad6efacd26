"""The `scanfleet` command against a real stack: output, exit codes, and an outage of the gateway."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from local import nmap
from local.nmap import OpenPorts
from local.paths import SCANFLEET
from local.stack import Stack
from local.wait import until
from tests.client import Client
from tests.faults.proxies import FaultProxies, FaultProxy

pytestmark = pytest.mark.e2e

SUBNET = "127.9.8.0/24"
FAST = ("--ports", "8020-8090", "--no-service-detection")
SLOW = ("--ports", "1-1000", "--discovery", "none", "--max-rate", "100", "--no-service-detection")
LIMIT_SECONDS = 120  # for a command; it takes about ten

Start = Callable[..., "subprocess.Popen[str]"]
Done = Callable[..., tuple[int, str]]


@pytest.fixture
def environment(stack: Stack, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "SCANFLEET_URL": stack.url,
        "SCANFLEET_TOKEN": stack.token(11),
        "XDG_CONFIG_HOME": str(tmp_path),
    }


@pytest.fixture(scope="module")
def owner(stack: Stack) -> Iterator[Client]:
    """The user of the command."""
    client = Client(stack.url, stack.token(11))
    yield client
    client.close()


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """Starts `scanfleet ARGUMENTS`; what still runs at the end of a test is killed."""
    running: list[subprocess.Popen[str]] = []

    def go(*arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        command = [SCANFLEET, *arguments]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True))
        return running[-1]

    yield go
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def done(start: Start) -> Done:
    """Returns the exit code and the output of `scanfleet ARGUMENTS`."""

    def run(*arguments: str) -> tuple[int, str]:
        process = start(*arguments)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
        return process.returncode, out + err

    return run


def test_scan_prints_the_ports_that_nmap_finds(start: Start, servers: OpenPorts) -> None:
    """Without a terminal the table is tab-separated, has no escape codes, and stderr ends with the coverage summary."""
    scan = start("scan", SUBNET, *FAST)
    out, err = scan.communicate(timeout=LIMIT_SECONDS)
    assert scan.returncode == 0, err
    rows = [line.split("\t") for line in out.splitlines()]
    assert sorted((address, int(port.removesuffix("/tcp"))) for address, port, *_ in rows) == sorted(servers)
    assert "accounted=true" in err
    assert "\x1b" not in out + err


@pytest.mark.proves("F2", "G3")
def test_scan_with_a_killed_worker_prints_the_same_table(stack: Stack, start: Start, servers: OpenPorts) -> None:
    """After kill -9 of a worker in mid-scan, the scan and a command that follows its results exit 0 and have every port once."""
    scan = start("scan", SUBNET, *FAST, "--max-rate", "1500")
    assert scan.stderr is not None
    job_id = scan.stderr.readline().split()[1]
    follower = start("job", "results", job_id, "--follow")
    until(
        lambda: bool(nmap.running_under([stack.pid("scanner-worker-1")])), 30, "the scan to run on the worker to kill"
    )
    stack.kill("scanner-worker-1")
    for command in (scan, follower):
        out, err = command.communicate(timeout=LIMIT_SECONDS)
        assert command.returncode == 0, err
        rows = [line.split("\t")[:2] for line in out.splitlines()]
        assert sorted((address, int(port.removesuffix("/tcp"))) for address, port in rows) == sorted(servers)
        if command is scan:
            assert "accounted=true" in err
    stack.wait_until_ready()


def test_closed_pipe_exits_0(environment: dict[str, str], servers: OpenPorts) -> None:
    """With a reader of one line the command exits 0 and prints no traceback."""
    assert servers
    scan = f'set -o pipefail; {SCANFLEET} -q scan {SUBNET} {" ".join(FAST)} | (read -r line; echo "$line")'
    done = subprocess.run(
        ["bash", "-c", scan], env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("127.9.8.")


def test_refused_target_exits_2_with_the_message_of_the_service(start: Start) -> None:
    """The error of a network that the target rules reject is the message of the service."""
    refused = start("scan", "192.0.2.0/24", "-o", "json")
    out, err = refused.communicate(timeout=LIMIT_SECONDS)
    assert (refused.returncode, out) == (2, "")
    assert "192.0.2.0/24" in err
    assert '"status": 400' in err


def test_watch_continues_after_an_outage_of_the_gateway(stack: Stack, start: Start, owner: Client) -> None:
    """An outage of some seconds is reported once, and the watch continues to the final state."""
    # Half a minute.
    job_id = owner.scan(SUBNET, ports="1-250", service_detection=False, discovery="none", max_rate=2_000)
    gateway = stack.services.names("api-gateway")[0]
    watch = start("job", "watch", str(job_id))
    assert watch.stderr is not None
    assert f"job {job_id} " in watch.stderr.readline()
    stack.stop(gateway)
    try:
        lines = []
        for line in watch.stderr:
            lines.append(line)
            if "connection lost" in line:
                break
    finally:
        stack.start(gateway)
        stack.wait_until_ready()
    _, err = watch.communicate(timeout=LIMIT_SECONDS)
    err = "".join([*lines, err])
    assert watch.returncode == 0, err
    assert err.count("reconnected") == 1, err
    assert err.count("connection lost") == 1, err
    assert "completed 100%" in err


@pytest.fixture
def proxy(stack: Stack) -> Iterator[FaultProxy]:
    """A proxy between the command and the gateway."""
    gateway = urlsplit(stack.url)
    proxies = FaultProxies()
    yield proxies.open(gateway.hostname or "", gateway.port or 0)
    proxies.close()


@pytest.mark.proves("G2")
@pytest.mark.parametrize("kind", ["subnet", "policy", "task"])
def test_post_that_is_cut_off_creates_one_object(
    environment: dict[str, str], start: Start, owner: Client, proxy: FaultProxy, kind: str
) -> None:
    """A command whose connection is cut between the request and its answer repeats the request, which creates nothing else."""
    commands = {
        "subnet": ("subnet", "create", "cut", "127.9.8.0/30"),
        "policy": ("policy", "create", "cut", "--preset", "quick"),
        "task": (
            "job",
            "submit",
            "--subnet",
            str(owner.subnet("127.9.8.0/30")),
            "--policy",
            str(owner.policy(ports="1")),
        ),
    }

    def total() -> int:
        found: int = owner.http.get(f"/api/v1/{kind}").raise_for_status().json()["total"]
        return found

    before = total()
    environment["SCANFLEET_URL"] = f"http://127.0.0.1:{proxy.port}"
    proxy.delay(3)  # leaves time between the creation and the arrival of the answer
    command = start(*commands[kind])
    until(lambda: total() > before, LIMIT_SECONDS, "the object to be created", 0.02)
    proxy.cut()
    proxy.heal()
    _, err = command.communicate(timeout=LIMIT_SECONDS)
    assert command.returncode == 0, err
    assert "repeating" in err
    assert total() == before + 1


def test_ctrl_c_leaves_the_job_running(environment: dict[str, str], owner: Client) -> None:
    """On a terminal a bar is drawn, and Ctrl-C ends the command with 130 and leaves the job as it is."""
    ours, theirs = pty.openpty()
    command = ["env", "--default-signal=INT", SCANFLEET, "scan", SUBNET, *SLOW]  # a shell's background jobs ignore it
    scan = subprocess.Popen(command, env=environment | {"TERM": "xterm"}, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while "░".encode() not in shown:
            shown += os.read(ours, 4096)
        scan.send_signal(signal.SIGINT)
        while b"continues: scanfleet" not in shown:
            shown += os.read(ours, 4096)
        assert scan.wait(LIMIT_SECONDS) == 130
    finally:
        scan.kill()
        os.close(ours)
    job_id = int(shown.decode().partition("scanfleet job watch ")[2].split(",")[0])
    assert owner.status(job_id) in {"pending", "running"}
    owner.cancel(job_id)


def test_several_jobs_are_watched_over_one_stream_and_deleted(done: Done) -> None:
    """A scan of two targets ends with both jobs, whose deletion removes them."""
    code, printed = done("scan", "127.9.8.0/30", "127.9.8.4/30", *FAST, "--found")
    assert code == 0, printed
    assert printed.count("completed 100%") == 2
    job_ids = re.findall(r"^job (\d+) ·", printed, re.MULTILINE)
    assert len(job_ids) == 2
    code, printed = done("job", "delete", *job_ids, "--yes")
    assert code == 0, printed
    assert done("job", "show", job_ids[0])[0] == 5


def test_import_creates_and_updates_subnets(done: Done, tmp_path: Path) -> None:
    """A repeated import creates no subnet, --update changes one, and a line that the target rules refuse exits 2."""
    file = tmp_path / "networks.csv"
    file.write_text("name,cidr,exclude\nimported,127.9.8.0/24,127.9.8.0/26;127.9.8.64/26\n")
    assert done("subnet", "import", str(file)) == (0, "1 created, 0 unchanged\n")
    assert done("subnet", "import", str(file)) == (0, "0 created, 1 unchanged\n")
    file.write_text("name,cidr,exclude\nimported,127.9.8.0/25,\noutside,192.0.2.0/24,\n")
    code, printed = done("subnet", "import", str(file), "--dry-run", "--update")
    assert code == 2
    assert printed.startswith("0 to create, 0 unchanged, 1 to update, 1 refused: line 3: ")
    assert done("subnet", "import", str(file), "--update")[1].startswith(
        "0 created, 0 unchanged, 1 updated, 1 refused: "
    )
    assert "127.9.8.0/25" in done("subnet", "show", "imported")[1]


def test_new_user_lists_addresses_that_were_not_probed(done: Done, owner: Client) -> None:
    """Commands create a subnet and a policy, scan, and list the addresses that a cancelled job did not probe."""
    assert done("subnet", "create", "lab", "127.9.8.0/28")[0] == 0
    assert done("policy", "create", "slow", *SLOW)[0] == 0
    code, printed = done("job", "submit", "--subnet", "lab", "--policy", "slow", "-o", "name")
    assert code == 0, printed
    job_id = printed.strip()
    until(lambda: owner.status(int(job_id)) == "running", 30, "the job to run")
    code, printed = done("job", "cancel", job_id, "--wait")
    assert code == 0, printed
    assert f"job {job_id} cancelled" in printed
    assert done("job", "wait", job_id)[0] == 7
    code, printed = done("job", "ledger", job_id, "--not-probed", "--networks")
    assert code == 0, printed
    assert "cancelled" in printed
    assert "127.9.8." in printed
