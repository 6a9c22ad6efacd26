"""A stack of real processes for abuse tests, with an nmap that records its arguments."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from local.stack import Stack
from local.wait import until
from scanfleet.services import SERVICES
from tests.client import Client


@pytest.fixture(scope="package")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the arguments of each call of nmap as a line of JSON."""
    return tmp_path_factory.mktemp("nmap") / "calls"


@pytest.fixture(scope="package")
def recording_nmap(calls: Path) -> Path:
    """An nmap that records its arguments."""
    program = calls.parent / "nmap"
    program.write_text(
        "#!/usr/bin/env python3\n"
        "import json, os, sys\n"
        f"with open({str(calls)!r}, 'a') as file:\n"
        "    file.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"os.execv({shutil.which('nmap')!r}, ['nmap', *sys.argv[1:]])\n",
    )
    program.chmod(0o755)
    return program


@pytest.fixture(scope="package")
def stack(kafka: str, mongodb: str, recording_nmap: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(
        tmp_path_factory.mktemp("stack"),
        replicas=dict.fromkeys(SERVICES, 1),
        kafka_at=kafka,
        mongodb_at=mongodb,
        topic_prefix="abuse-",
        database_prefix="abuse",
        settings={"SCANFLEET_NMAP": str(recording_nmap)},
    )
    stack.up()
    yield stack
    stack.down()


@pytest.fixture(scope="package")
def caller(stack: Stack) -> Iterator[Callable[[int], Client]]:
    """Return a factory of clients; each test uses separate users, and therefore separate limits and audit entries."""
    clients: dict[int, Client] = {}

    def of(user: int) -> Client:
        if user not in clients:
            clients[user] = Client(stack.url, stack.token(user))
        return clients[user]

    yield of
    for client in clients.values():
        client.close()


@pytest.fixture(scope="package")
def audited(stack: Stack) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Return a function that waits for the one audit entry of a request."""
    client = Client(stack.url, stack.token(99, admin=True))

    def find(request_id: str) -> dict[str, Any]:
        entries: list[dict[str, Any]] = []

        def there() -> bool:
            answer = client.http.get("/api/v1/audit", params={"request_id": request_id})
            entries[:] = answer.json()["entries"]
            return bool(entries)

        until(there, 30, f"request {request_id} to be in the audit log")
        (entry,) = entries
        return entry

    yield find
    client.close()


@pytest.fixture
def nmap_calls(calls: Path) -> Callable[[], list[list[str]]]:
    """Return a function that reads the arguments of every call of nmap so far."""

    def read() -> list[list[str]]:
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return read
