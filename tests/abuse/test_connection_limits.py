"""Attacks of one hostile client, with or without a token, on a running gateway: their cost and effect on other clients."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Final

import httpx2
import pytest

from local.stack import Stack
from local.wait import until
from tests.client import Client

pytestmark = pytest.mark.e2e

Callers = Callable[[int], Client]

HOSTILE: Final = "127.0.0.66"  # source address of the attacks
MB: Final = 1 << 20
GROWTH: Final = 48 * MB  # maximum growth of memory; the usual working set varies by half of it
HEAD: Final = b"GET /api/v1/task HTTP/1.1\r\nHost: x\r\n"


class Process:
    """The resource usage of a process, as the kernel counts it."""

    def __init__(self, pid: int) -> None:
        self._proc = Path(f"/proc/{pid}")

    @property
    def memory(self) -> int:
        return int((self._proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def descriptors(self) -> int:
        return len(list((self._proc / "fd").iterdir()))

    @property
    def cpu_seconds(self) -> float:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Measures the effect on other clients: the latency of `/healthz`, and the peak memory and descriptors.

    The latency is measured in CPU seconds that the process spends on other requests, because on a busy machine even an idle
    process answers late.
    """

    def __init__(self, url: str, process: Process) -> None:
        self.slowest = 0.0
        self.answers: set[int] = set()
        self.memory = 0
        self.descriptors = 0
        self._url = url
        self._process = process
        self._ended = Event()
        self._thread = Thread(target=self._look)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        with httpx2.Client(base_url=self._url, timeout=60, trust_env=False) as http:
            ended = False
            while not ended:  # at least once, however soon it ends
                started = self._process.cpu_seconds
                self.answers.add(http.get("/healthz").status_code)
                self.slowest = max(self.slowest, self._process.cpu_seconds - started)
                self.memory = max(self.memory, self._process.memory)
                self.descriptors = max(self.descriptors, self._process.descriptors)
                ended = self._ended.wait(0.02)


@pytest.fixture
def gateway(stack: Stack) -> Process:
    return Process(stack.pid("api-gateway"))


@contextmanager
def watched(stack: Stack, process: Process) -> Iterator[Watch]:
    watch = Watch(stack.ports.probes("api-gateway"), process)
    watch.start()
    try:
        yield watch
    finally:
        watch.end()
    assert watch.answers == {200}


def connect(stack: Stack, source: str = HOSTILE) -> socket.socket:
    host, port = stack.ports.address("api-gateway").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60, source_address=(source, 0))
    connection.settimeout(60)
    return connection


def flood(stack: Stack, begin: bytes, piece: bytes, most: int = 64 * MB) -> int:
    """Send an endless request; return the number of bytes accepted before the connection was closed."""
    sent = 0
    with connect(stack) as connection:
        try:
            connection.sendall(begin)
            while sent < most:
                connection.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
    return sent


@pytest.mark.proves("A19")
def test_long_path_has_bounded_cost(stack: Stack, gateway: Process) -> None:
    """Paths that resemble tokens, up to and beyond the maximum length, leave the latency of `/healthz` below half a second."""
    before = gateway.cpu_seconds
    with watched(stack, gateway) as watch, httpx2.Client(base_url=stack.url, timeout=60) as http:
        for length in (1_000, 4_000, 8_000):
            for _ in range(10):
                assert http.get("/" + "eyJ" * (length // 3)).status_code == 404
        for length in (64 * 1024, MB):
            assert flood(stack, b"GET /" + b"eyJ" * (length // 3) + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"", most=0) == 0
        with connect(stack) as connection:
            connection.sendall(b"GET /" + b"eyJ" * 22_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 414 ")
    assert watch.slowest < 0.5
    assert gateway.cpu_seconds - before < 2.0


@pytest.mark.proves("A19", "G11")
@pytest.mark.parametrize(
    ("begin", "piece"),
    [(b"GET /", b"x" * 65_536), (HEAD + b"X: ", b"x" * 65_536), (HEAD, b"X-Header: some value\r\n" * 3_000)],
    ids=["request line", "header", "list of headers"],
)
def test_endless_request_is_disconnected(stack: Stack, gateway: Process, begin: bytes, piece: bytes) -> None:
    """Sixteen clients with endless requests are disconnected, with bounded memory and CPU time, and others are not affected."""
    memory, cpu = gateway.memory, gateway.cpu_seconds
    with watched(stack, gateway) as watch, ThreadPoolExecutor(16) as clients:
        taken = list(clients.map(lambda _: flood(stack, begin, piece), range(16)))
    assert max(taken) < 32 * MB
    assert watch.memory - memory < GROWTH
    assert gateway.cpu_seconds - cpu < 5.0
    assert watch.slowest < 0.5


@pytest.mark.proves("A19", "G11")
def test_idle_and_slow_connections_are_closed(stack: Stack, gateway: Process) -> None:
    """2,000 idle or slowly sending connections of one client are bounded immediately and closed in time."""
    memory, descriptors = gateway.memory, gateway.descriptors
    with watched(stack, gateway) as watch, ExitStack() as opened:
        connections = [opened.enter_context(connect(stack)) for _ in range(2_000)]
        dripping = connections[-100:]
        for connection in dripping:
            connection.sendall(HEAD)
        for _ in range(24):  # for 12 s, longer than the timeout of a request
            for connection in dripping:
                try:
                    connection.sendall(b"X: y\r\n")
                except OSError:
                    continue
            time.sleep(0.5)
        until(lambda: gateway.descriptors < descriptors + 50, 30, "the connections to be closed")
    assert watch.descriptors < descriptors + 700
    assert watch.memory - memory < GROWTH
    assert watch.slowest < 0.5


@pytest.mark.proves("A19", "G11")
@pytest.mark.parametrize(
    ("path", "count", "growth"),
    [("/openapi.json", 3_000, GROWTH), ("/docs/assets/swagger-ui-bundle.js", 600, 80 * MB)],  # 40 threads read files
    ids=["document", "file"],
)
def test_unread_answers_do_not_affect_others(
    stack: Stack, gateway: Process, path: str, count: int, growth: int
) -> None:
    """Up to 3,000 connections of five clients that read nothing of four answers each take bounded memory, and others are served."""
    memory, descriptors = gateway.memory, gateway.descriptors
    with watched(stack, gateway) as watch, ExitStack() as opened:
        for number in range(count):
            connection = opened.enter_context(connect(stack, f"127.0.0.{70 + number % 5}"))
            with suppress(OSError):  # closed already
                connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 4)
        assert httpx2.get(f"{stack.url}/openapi.json", timeout=60).status_code == 200
        until(lambda: gateway.descriptors < descriptors + 400, 30, "most connections and their files to be closed")
    assert watch.memory - memory < growth


@pytest.mark.proves("A20", "G11")
@pytest.mark.parametrize("path", ["task", "subnet", "policy"])
@pytest.mark.parametrize("size", [30_000, MB])
def test_many_unknown_fields_do_not_affect_others(
    stack: Stack, gateway: Process, caller: Callers, path: str, size: int
) -> None:
    """80 bodies of unknown fields, 16 concurrently, are 400 or 413 in bounded CPU time, and others wait less than a second."""
    orchestrator = Process(stack.pid("job-orchestrator"))
    processes = (gateway, orchestrator)
    memory, cpu = [each.memory for each in processes], [each.cpu_seconds for each in processes]
    fields = b",".join(b'"%d":0' % number for number in range(size // 9))
    headers = {"Authorization": f"Bearer {stack.token(41)}", "Content-Type": "application/json"}

    def post(_: int) -> int:
        return httpx2.post(
            f"{stack.url}/api/v1/{path}", content=b"{" + fields + b"}", headers=headers, timeout=60
        ).status_code

    other = caller(42)
    other.http.get("/api/v1/subnet")
    slowest = 0.0
    with watched(stack, gateway) as watch, ThreadPoolExecutor(16) as clients:
        posted = [clients.submit(post, number) for number in range(80)]
        while not all(each.done() for each in posted):
            started = sum(each.cpu_seconds for each in processes)
            assert other.http.get("/api/v1/subnet").status_code == 200
            slowest = max(slowest, sum(each.cpu_seconds for each in processes) - started)
        statuses = {each.result() for each in posted}
    assert statuses <= {400, 413}
    assert slowest < 1.0
    assert watch.slowest < 0.5
    for each, before, spent in zip(processes, memory, cpu, strict=True):
        assert each.memory - before < GROWTH
        assert each.cpu_seconds - spent < 5.0


@pytest.mark.proves("A20")
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 30_000,
        b'{"subnet_ids": ' + b"[" * 15_000 + b"]" * 15_000 + b"}",
        b'{"subnet_ids": [' + b",".join([b'"x"'] * 7_000) + b'], "policy_id": 1}',
        b'{"subnet_ids": [' + b"9" * 30_000 + b'], "policy_id": 1}',
        b'{"policy_id": ' + b"9" * 30_000 + b"." + b"9" * 1_000 + b"}",
    ],
    ids=["deep", "deep within", "wide", "long number", "long fraction"],
)
def test_deep_and_wide_bodies_are_rejected_in_bounded_time(stack: Stack, gateway: Process, body: bytes) -> None:
    """100 bodies that are deep, wide or full of digits are 400, with a few milliseconds of CPU time each."""
    headers = {"Authorization": f"Bearer {stack.token(43)}", "Content-Type": "application/json"}
    before = gateway.cpu_seconds
    with watched(stack, gateway) as watch, httpx2.Client(base_url=stack.url, headers=headers, timeout=60) as http:
        statuses = {http.post("/api/v1/task", content=body).status_code for _ in range(100)}
    assert statuses == {400}
    assert gateway.cpu_seconds - before < 5.0
    assert watch.slowest < 0.5
