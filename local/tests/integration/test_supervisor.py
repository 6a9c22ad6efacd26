"""Real servers under supervisord."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pymongo import MongoClient

from local import kafka, mongod, ports
from local.supervisor import Program, Supervisor
from local.wait import until

pytestmark = pytest.mark.integration

LIMIT_SECONDS = 60.0  # until any of this has happened


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    found = Supervisor(tmp_path)
    yield found
    if found.answers():
        found.shut_down()
    else:
        found.kill()


def pid(supervisor: Supervisor, name: str) -> int:
    return next(process.pid for process in supervisor.processes() if process.name == name)


def comes_back(supervisor: Supervisor, name: str) -> None:
    """Kill a process with -9 and wait for its successor."""
    killed = pid(supervisor, name)
    os.kill(killed, signal.SIGKILL)
    until(lambda: pid(supervisor, name) not in (0, killed), LIMIT_SECONDS, f"{name} to come back")


def is_gone(number: int) -> bool:
    try:
        return not Path(f"/proc/{number}/cmdline").read_bytes()  # empty once it has ended, even before it is reaped
    except OSError:
        return True


def sleeper(**environment: str) -> Program:
    return Program("sleeper", [sys.executable, "-c", "import signal; signal.pause()"], environment, autostart=True)


def test_killed_kafka_is_restarted_with_its_data(supervisor: Supervisor, tmp_path: Path) -> None:
    """A broker that was killed with SIGKILL is restarted on its data and answers clients."""
    port = ports.choose()
    supervisor.launch([Program("kafka", kafka.command(tmp_path / "kafka", port, ports.choose()), autostart=True)])
    kafka.wait_until_up(f"127.0.0.1:{port}")
    comes_back(supervisor, "kafka")
    kafka.wait_until_up(f"127.0.0.1:{port}")


def test_killed_mongod_is_restarted_with_its_data(supervisor: Supervisor, tmp_path: Path) -> None:
    """A mongod that was killed with SIGKILL is restarted with every acknowledged document."""
    address = f"127.0.0.1:{ports.choose()}"
    supervisor.launch([Program("mongod", mongod.command(tmp_path, int(address.split(":")[1])), autostart=True)])
    mongod.make_ready(address)
    with MongoClient[dict[str, int]](mongod.uri(address), w="majority", journal=True) as client:
        client.kept.documents.insert_one({"_id": 1})
        comes_back(supervisor, "mongod")
        mongod.make_ready(address)
        assert client.kept.documents.count_documents({}) == 1


def test_mongod_on_a_new_port_becomes_primary(supervisor: Supervisor, tmp_path: Path) -> None:
    """A mongod with a changed port becomes the primary of its previous replica set."""
    for _ in range(2):
        port = ports.choose()
        supervisor.launch([Program("mongod", mongod.command(tmp_path, port), autostart=True)])
        mongod.make_ready(f"127.0.0.1:{port}")
        supervisor.shut_down()


def test_process_that_always_exits_is_always_restarted(supervisor: Supervisor, tmp_path: Path) -> None:
    """A process that exits at once is restarted indefinitely, beyond supervisord's default number of attempts."""
    ran = tmp_path / "ran"
    supervisor.launch([Program("brief", ["sh", "-c", f"echo >> {ran}"], autostart=True)])
    until(lambda: ran.exists() and len(ran.read_text()) > 4, LIMIT_SECONDS, "the fifth start")


def test_launch_ends_orphans(supervisor: Supervisor, tmp_path: Path) -> None:
    """After supervisord was killed with SIGKILL, the next launch ends its remaining processes."""
    supervisor.launch([sleeper()])
    until(lambda: pid(supervisor, "sleeper") != 0, LIMIT_SECONDS, "the process to start")
    orphan = pid(supervisor, "sleeper")
    os.kill(int((tmp_path / "supervisord.pid").read_text()), signal.SIGKILL)
    until(lambda: not supervisor.answers(), LIMIT_SECONDS, "supervisord to end")
    assert not is_gone(orphan)
    supervisor.launch([])
    assert is_gone(orphan)


def test_launch_ends_a_child_before_exec(supervisor: Supervisor, tmp_path: Path) -> None:
    """A child that supervisord has forked and that has not yet called exec is ended as well."""
    mark = ["supervisor.supervisord", "--configuration", str(tmp_path / "supervisord.conf")]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *mark]) as child:
        supervisor.kill()
        assert child.wait(LIMIT_SECONDS) == -signal.SIGKILL


def test_launch_replaces_a_hung_supervisor(supervisor: Supervisor, tmp_path: Path) -> None:
    """A launch ends a supervisord of the same folder, and its processes, before it starts another."""
    supervisor.launch([sleeper()])
    first = pid(supervisor, "sleeper")
    (tmp_path / "supervisor.sock").unlink()
    supervisor.launch([sleeper()])
    assert is_gone(first)


def test_launch_ignores_a_stale_pid(supervisor: Supervisor, tmp_path: Path) -> None:
    """A process of another program whose pid is in the pid file keeps running."""
    (tmp_path / "supervisord.pid").write_text(str(os.getpid()))
    supervisor.kill()


def test_environment_arrives_unchanged(supervisor: Supervisor) -> None:
    """Values with quotes, spaces, commas and percent signs reach the process as they are."""
    value = """a 'quoted', "doubly" %(here)s & 100% = $HOME"""
    supervisor.launch([sleeper(SCANFLEET_ODD=value)])
    until(lambda: pid(supervisor, "sleeper") != 0, LIMIT_SECONDS, "the process to start")
    environment = Path(f"/proc/{pid(supervisor, 'sleeper')}/environ")
    until(
        lambda: f"SCANFLEET_ODD={value}".encode() in environment.read_bytes().split(b"\0"),
        LIMIT_SECONDS,
        "the variable",
    )


def test_launch_in_a_folder_with_a_long_name_succeeds(tmp_path: Path) -> None:
    """A folder whose name exceeds the limit of a Unix socket's path can hold a supervisord."""
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    supervisor = Supervisor(folder)
    supervisor.launch([sleeper()])
    assert supervisor.answers()
    supervisor.shut_down()
