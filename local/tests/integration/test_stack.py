"""A whole stack of real processes, some of which fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from local import kafka
from local.paths import ROOT
from local.stack import LOCAL_REPLICAS, Stack, StackError
from local.wait import until
from tests.client import Client

pytestmark = pytest.mark.e2e

LIMIT_SECONDS = 60.0  # until any of this has happened
NAMES = (
    "kafka",
    "mongod",
    "result-store",
    "job-orchestrator",
    "scanner-worker-1",
    "scanner-worker-2",
    "api-gateway",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture
def stack(folder: Path) -> Stack:
    """The stack in `folder`, up; it stays up between the tests."""
    found = Stack(folder)
    found.up()
    return found


@pytest.fixture(scope="module", autouse=True)
def stopped(folder: Path) -> Iterator[None]:
    yield
    Stack(folder).down()


@pytest.fixture
def user(stack: Stack) -> Iterator[Client]:
    found = Client(stack.url, stack.token(7))
    yield found
    found.http.close()


def scans(user: Client) -> bool:
    """Whether a job runs to its end; until everything is back some of it may be unavailable."""
    try:
        job_id = user.scan("127.9.8.1/32", ports="8022", service_detection=False)
    except httpx2.HTTPStatusError as error:
        if error.response.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
            raise
        return False
    status: str = user.finished(job_id)["status"]["status"]
    return status == "completed"


def test_documented_examples_on_a_new_stack_succeed(stack: Stack, tmp_path: Path) -> None:
    """Every line of the examples in the README, then in docs/api.md, runs on a new stack without an error response."""
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/api.md"))
    blocks = re.findall(r"```sh\n(.*?)```", pages, re.DOTALL)
    (tmp_path / ".local").mkdir()
    (tmp_path / ".local" / "stack.env").symlink_to(stack.folder / "stack.env")
    # The targets act on the stack of this checkout, so another program named make replaces them.
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\ncase "$*" in up | cli) ;; *) echo {stack.token(7)} ;; esac\n')
    make.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    command = ["bash", "-euc", "\n".join(blocks)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert '{"error"' not in run.stdout
    assert run.stdout.count('"127.9.8.0/24"') == 1
    assert run.stdout.count("event: completed") == 1
    assert '"not_probed"' in run.stdout


def pids(stack: Stack) -> dict[str, int]:
    return {process.name: process.pid for process in stack.processes()}


def test_up_starts_all_processes(stack: Stack) -> None:
    """A stack is Kafka, mongod and the four services with two scanner-workers, all running."""
    assert sorted(pids(stack)) == sorted(NAMES)
    assert all(process.running for process in stack.processes())
    assert sum(LOCAL_REPLICAS.values()) == len(NAMES) - 2


def test_up_is_idempotent(stack: Stack, folder: Path) -> None:
    """Starting a running stack starts nothing and reports that."""
    before = pids(stack)
    assert not Stack(folder).up()
    assert pids(stack) == before


@pytest.mark.parametrize("name", NAMES)
def test_killed_process_is_restarted(stack: Stack, user: Client, name: str) -> None:
    """Every process that is killed with SIGKILL is restarted, and then the stack scans as before."""
    killed = stack.pid(name)
    stack.kill(name)
    until(lambda: pids(stack)[name] not in (0, killed), LIMIT_SECONDS, f"{name} to come back")
    if name == "kafka":
        kafka.wait_until_up(stack.servers.kafka)
    stack.wait_until_ready()
    until(lambda: scans(user), LIMIT_SECONDS, "a scan to complete")


def test_data_survives_restart(stack: Stack, user: Client, folder: Path) -> None:
    """Data stored before `down` is available after `up`, at the same address and with the same token."""
    subnet = user.subnet("127.9.8.0/24")
    assert stack.down()
    assert stack.processes() == []
    assert not stack.down()
    assert Stack(folder).up()
    assert user.http.get(f"/api/v1/subnet/{subnet}").is_success


def test_up_after_a_killed_supervisor_ends_its_processes(stack: Stack, folder: Path) -> None:
    """After supervisord was killed with SIGKILL, the next up ends the remaining processes and restarts the stack."""
    before = pids(stack)
    os.kill(int((folder / "supervisord.pid").read_text()), signal.SIGKILL)
    until(lambda: not stack.processes(), LIMIT_SECONDS, "supervisord to end")
    assert stack.up()
    assert set(pids(stack).values()).isdisjoint(before.values())
    assert not any(Path(f"/proc/{pid}").exists() for pid in before.values())


def test_stack_env_can_be_sourced_by_a_shell(stack: Stack, folder: Path) -> None:
    """A shell that sources `stack.env` has the addresses of the gateway, Kafka and MongoDB."""
    script = '. "$1"; echo "$SCANFLEET_URL"; echo "$SCANFLEET_KAFKA"; echo "$SCANFLEET_MONGODB"'
    run = subprocess.run(["sh", "-c", script, "-", folder / "stack.env"], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [stack.url, stack.servers.kafka, stack.servers.mongodb]


def test_wait_until_ready_timeout_names_the_unready_service(stack: Stack) -> None:
    """Waiting for a stack that does not become ready fails with the name and log of the unready service."""
    stack.stop("result-store")
    try:
        with pytest.raises(StackError, match=r"result-store does not answer(?s:.*)result-store\.log"):
            stack.wait_until_ready(limit_seconds=1)
    finally:
        stack.start("result-store")
    stack.wait_until_ready()
