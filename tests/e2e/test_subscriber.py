"""The example of a subscriber, as a process beside the platform."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import IO, Any

import pytest

from local.nmap import OpenPorts
from local.stack import Stack
from tests.client import Client

EXAMPLE = Path(__file__).parents[2] / "docs/examples/subscriber.py"
TIMEOUT_SECONDS = 120  # of the test, which takes a few seconds


@pytest.fixture
def output(stack: Stack) -> Iterator[IO[str]]:
    """The standard output of the running example."""
    options = ("--bootstrap", stack.servers.kafka, "--topic", "e2e-scan-results", "--group", "e2e-example")
    command = ("setpriv", "--pdeathsig", "KILL", sys.executable, EXAMPLE, *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        limit = Timer(TIMEOUT_SECONDS, process.kill)  # which ends its output, and thereby the test
        limit.start()
        yield process.stdout
        limit.cancel()
        process.kill()


def test_subscriber_prints_a_row_for_each_result(user: Client, servers: OpenPorts, output: IO[str]) -> None:
    """The rows of a job have the ports of its results, each under an id of its own."""
    job_id = user.scan("127.9.8.0/24", ports="8020-8090", service_detection=False)
    user.finished(job_id)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < len(servers):
        row = json.loads(output.readline())
        if row["job_id"] == job_id:
            found[row["id"]] = row
    assert {(row["address"], row["port"]) for row in found.values()} == servers
    fields = ("port", "protocol", "status", "service", "version", "job_id")
    for result in user.results(job_id):
        (row,) = (
            row for row in found.values() if (row["address"], row["port"]) == (result["ip_address"], result["port"])
        )
        assert {name: row[name] for name in fields} == {name: result[name] for name in fields}
