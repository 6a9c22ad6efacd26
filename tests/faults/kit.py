"""A platform of real processes, two of every service, for fault injection.

It has its own Kafka and mongod, and each service reaches them through its own proxies. The invariants of `invariants.py`
hold after every fault.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Final

import httpx2

from local import nmap
from local.stack import Stack
from local.supervisor import Supervisor
from local.wait import until
from scanfleet.contracts.messages import HostScanned
from scanfleet.contracts.messages.topics import SCAN_RESULTS
from scanfleet.services import SERVICES, WORKER
from scanfleet_testing.tokens import Issuer
from tests.client import Client
from tests.faults.documents import Document, Documents
from tests.faults.releases import write_next_release
from tests.faults.servers import Servers
from tests.faults.topics import Topics

LEASE_SECONDS: Final = 5  # longer than a busy machine delays a heartbeat, and short to wait for
REQUEUE_SECONDS: Final = LEASE_SECONDS + 5  # as the local stack promises 15 seconds with a lease of 10
COOLDOWN_SECONDS: Final = 1  # of the gateways, between two fetches of the issuer's keys
MAX_AGE_SECONDS: Final = 2  # of the keys that the second gateway knows
MAX_STALE_SECONDS: Final = 6  # while it cannot fetch them
SLOTS: Final = 3
REPLICAS: Final = dict.fromkeys(SERVICES, 2)
CLOCK_ERROR_SECONDS: Final = 7_200  # by which some clocks are wrong
LIMIT_SECONDS: Final = 90.0  # for steps that usually take a few, on a loaded machine

PORTS: Final = "8020-8039"
TINY: Final[Mapping[str, Any]] = {"ports": PORTS, "service_detection": False}
"""A few addresses with this policy are finished immediately."""
STEADY: Final[Mapping[str, Any]] = {**TINY, "max_rate": 550}
"""A /25 with this policy is one chunk of five seconds whose hosts are reported in two groups."""
ENDLESS: Final[Mapping[str, Any]] = {"ports": "1-1000", "service_detection": False, "max_rate": 50}
"""A /24 with this policy would take almost two hours."""

FULL: Final = ("mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=2", "tmpfs")
"""A folder in which a single entry can be created."""

NMAP: Final = """\
#!/bin/sh
case "$*" in *--stats-every*) [ -x {other} ] && exec {other} "$@" ;; esac
exec nmap "$@"
"""
"""An nmap whose scans another program can replace; a worker's trial runs always succeed."""
FAILING: Final = "#!/bin/sh\nexit 1\n"
"""A program that fails in place of nmap."""

WITHOUT_RAW: Final = """\
import ctypes
assert ctypes.CDLL(None).prctl(24, 13) == 0  # drops CAP_NET_RAW from what programs may get
"""


class Caller(Client):
    """A user of the platform that records acknowledged jobs."""

    def __init__(self, url: str, token: str, acknowledged: set[int]) -> None:
        super().__init__(url, token)

        def remember(answer: httpx2.Response) -> None:
            if answer.request.method == "POST" and answer.request.url.path == "/api/v1/task" and answer.is_success:
                acknowledged.update(job["id"] for job in json.loads(answer.read())["jobs"])

        self.http.event_hooks["response"] = [remember]


class Keys:
    """An issuer of tokens whose key set is fetched over HTTP.

    Attributes:
        issuer: signs; may be replaced.
        unavailable: whether the endpoint is unavailable and answers 500.
        asked: number of requests to it.
    """

    def __init__(self) -> None:
        self.issuer = Issuer()
        self.unavailable = False
        self.asked = 0
        keys = self

        class Endpoint(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                keys.asked += 1
                body = json.dumps(keys.issuer.jwks).encode()
                self.send_response(500 if keys.unavailable else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, name="keys", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def shifted(seconds: int) -> dict[str, str | None]:
    """Return the settings of a process whose clock is wrong by `seconds`; its monotonic clock is correct."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{seconds:+d}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",  # its name in older versions
    }


class Platform:
    """The platform, with methods to inject faults and to observe it.

    The clock of the first worker is two hours fast and that of the second gateway two hours slow, and the second process of each
    service is of a later release, which adds a field to documents and messages: without effect on any test.

    Attributes:
        replicas: number of processes per service.
        stack: the services.
        servers: Kafka and mongod.
        topics: what the services publish.
        documents: what they store.
        net: prefix of all addresses that are scanned by these tests, and by no other process on this machine: `127.n`.
        acknowledged: the ids of all jobs for which a caller got a 201.
        forgotten: jobs whose events were in a log that was lost.
        keys: the accepted issuer of tokens.
        temporary: the second worker's temporary folder.
    """

    replicas: ClassVar[Mapping[str, int]] = REPLICAS

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.servers = Servers(folder / "servers")
        self.topics = Topics(self.servers.kafka)
        self.documents = Documents(self.servers.mongodb)
        self._users = iter(range(100, 1_000_000))
        # Each worker of a run has its own network; process ids of two workers may be equal modulo 64.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        self.net = f"127.{64 + (os.getppid() + worker) % 64}"
        self.acknowledged: set[int] = set()
        self.forgotten: set[int] = set()
        self.keys = Keys()
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True)
        workers = [f"{WORKER}-{number}" for number in range(1, self.replicas[WORKER] + 1)]
        self._nmaps = {name: folder / f"nmap-of-{name}" for name in workers}
        for path in self._nmaps.values():
            path.write_text(NMAP.format(other=path.with_suffix(".other")))
            path.chmod(0o755)
        self._releases = folder / "releases"
        write_next_release(self._releases / "next")
        self.stack = Stack(
            folder / "stack",
            replicas=self.replicas,
            kafka_at=self.servers.kafka,
            mongodb_at=self.servers.mongodb,
            settings={
                "SCANFLEET_LEASE_SECONDS": str(LEASE_SECONDS),
                "SCANFLEET_STORED_SECONDS": "5",
                "SCANFLEET_DELETES_PER_SECOND": "100",
                "SCANFLEET_SLOTS": str(SLOTS),
                "SCANFLEET_MAX_HOST_BYTES": str(1 << 20),
                "SCANFLEET_DENIED_NETWORKS": f"{self.net}.66.0/24",
                "SCANFLEET_JWT_JWKS_URL": self.keys.url,
                "SCANFLEET_JWT_JWKS_COOLDOWN_SECONDS": str(COOLDOWN_SECONDS),
            },
            settings_of=self._settings_of(),
        )

    def up(self) -> None:
        self.servers.up()
        self.stack.up()

    def down(self) -> None:
        self.documents.client.close()  # while the server runs: otherwise the client searches for it for half a minute
        self.stack.down()
        self.servers.down()
        self.keys.close()

    def discard(self) -> None:
        """Kill all processes, whatever their state."""
        self.documents.client.close()
        Supervisor(self.stack.folder).kill()
        self.servers.kill()
        self.keys.close()

    # Users

    def caller(self, user: int | None = None, gateway: str = "api-gateway-1", *, token: str | None = None) -> Caller:
        """Return a client of a new user, or of the given one."""
        token = token or self.token(user or next(self._users))
        return Caller(f"http://{self.stack.ports.address(gateway)}", token, self.acknowledged)

    def token(self, user: int, **changed: Any) -> str:
        """Return a token that is valid by both clocks."""
        now = int(time.time())
        return self.keys.issuer.token(
            user, **({"iat": now - CLOCK_ERROR_SECONDS - 60, "exp": now + CLOCK_ERROR_SECONDS} | changed)
        )

    def network(self, bits: int) -> str:
        """Return a network to scan; tests may share it."""
        return f"{self.net}.8.0/{bits}"

    @contextmanager
    def listeners(self, hosts: Collection[int] = (1, 7, 70, 100), port: int = 8022) -> Iterator[nmap.OpenPorts]:
        """Open listening sockets in `network`; yield their addresses and ports."""
        places = {(f"{self.net}.8.{host}", port) for host in hosts}
        with ExitStack() as stack:
            for place in places:
                listener = stack.enter_context(socket.socket())
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(place)
                listener.listen(1024)  # no accept needed: the kernel completes the handshakes
            yield places

    # Faults

    def pid(self, name: str) -> int:
        """Return the pid of a service's process or of a server once it runs."""
        until(lambda: self.running(name) != 0, LIMIT_SECONDS, f"{name} to run")
        return self.running(name)

    def running(self, name: str) -> int:
        """Return the pid of a process; 0 if it does not run."""
        processes = [*self.servers.processes(), *self.stack.processes()]
        return next(process.pid for process in processes if process.name == name)

    def names(self, service: str) -> list[str]:
        return self.stack.services.names(service)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; a supervisor restarts a process that ends."""
        os.kill(self.pid(name), number)

    def lose_the_log(self) -> None:
        self.forgotten |= {job["_id"] for job in self.documents.jobs()}
        self.servers.lose_the_log()

    @contextmanager
    def no_disk(self, *, full: bool) -> Iterator[None]:
        """Fill or remove the second worker's temporary folder for the duration of the block."""
        if full and subprocess.run([*FULL, self.temporary], capture_output=True, check=False).returncode == 0:
            try:
                (self.temporary / "last").mkdir()
                yield
            finally:
                subprocess.run(["umount", self.temporary], check=True)
            return
        self.temporary.rename(self.temporary.with_name("removed"))  # the only way without the right to mount
        try:
            yield
        finally:
            self.temporary.with_name("removed").rename(self.temporary)

    @contextmanager
    def scans_by(self, program: str, *workers: str) -> Iterator[None]:
        """Have `program`, the text of a script, replace nmap in the scans of these workers for the duration of the block."""
        paths = [self._nmaps[name].with_suffix(".other") for name in workers]
        for path in paths:
            path.write_text(program)
            path.chmod(0o755)
        try:
            yield
        finally:
            for path in paths:
                path.unlink()

    @contextmanager
    def without_raw_packets(self) -> Iterator[None]:
        """Have the second worker, started again, be one that may not send raw packets for the duration of the block."""
        customized = self._releases / "next" / "sitecustomize.py"
        customized.write_text(WITHOUT_RAW)
        try:
            self.stack.stop("scanner-worker-2")
            self.stack.start("scanner-worker-2")
            self.stack.wait_until_ready()
            yield
        finally:
            customized.unlink()
            self.stack.stop("scanner-worker-2")
            self.stack.start("scanner-worker-2")
            self.stack.wait_until_ready()

    @staticmethod
    def wait(seconds: float) -> None:
        """Let a fault last; no other code may wait for time."""
        time.sleep(seconds)

    # Observation

    def nmaps(self) -> dict[int, str]:
        """Return the command lines of all nmap processes that scan addresses of this platform, by pid."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # the process has just ended
                if (folder / "comm").read_text().strip() == "nmap":
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if f" {self.net}." in line:
                        found[int(folder.name)] = line
        return found

    def exits(self, name: str) -> list[int]:
        """Return the exit codes of a process of the stack, in order."""
        log = (self.stack.folder / "logs" / "supervisord.log").read_text()
        return [int(code) for code in re.findall(rf"exited: {name} \(exit status (\d+);", log)]

    def log(self, name: str, event: str) -> list[dict[str, Any]]:
        """Return these events in the log of a process of the stack."""
        lines = (self.stack.folder / "logs" / f"{name}.log").read_text().splitlines()
        return [found for line in lines if line.startswith("{") and (found := json.loads(line))["event"] == event]

    def nmaps_of(self, name: str) -> list[int]:
        return nmap.running_under([self.running(name)])

    def metric(self, service: str, name: str) -> float:
        """Return the sum of a metric's series over the processes of a service."""
        total = 0.0
        for process in self.names(service):
            text = httpx2.get(f"{self.stack.ports.probes(process)}/metrics", timeout=LIMIT_SECONDS).text
            total += sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
        return total

    def ready(self, name: str) -> bool:
        """Return whether /readyz succeeds; False without an answer."""
        try:
            return httpx2.get(f"{self.stack.ports.probes(name)}/readyz", timeout=LIMIT_SECONDS).is_success
        except httpx2.HTTPError:
            return False

    def memory(self) -> dict[str, tuple[int, int]]:
        """Resident kilobytes and open descriptors of every process of the services."""
        found = {}
        for process in self.stack.processes():
            folder = Path(f"/proc/{process.pid}")
            with suppress(OSError, AttributeError):  # the process is being restarted
                resident = re.search(r"VmRSS:\s+(\d+)", (folder / "status").read_text())
                found[process.name] = int(resident[1]), len(list((folder / "fd").iterdir()))  # type: ignore[index] # suppressed
        return found

    def _settings_of(self) -> dict[str, dict[str, str | None]]:
        found: dict[str, dict[str, str | None]] = {
            "scanner-worker-1": {
                **shifted(CLOCK_ERROR_SECONDS),
                "SCANFLEET_STOP_GRACE_SECONDS": "20",
            },
            "scanner-worker-2": {
                "TMPDIR": str(self.temporary),
                "SCANFLEET_STOP_GRACE_SECONDS": "0",
            },
            "api-gateway-2": {
                **shifted(-CLOCK_ERROR_SECONDS),
                "SCANFLEET_JWT_JWKS_MAX_AGE_SECONDS": str(MAX_AGE_SECONDS),
                "SCANFLEET_JWT_JWKS_MAX_STALE_SECONDS": str(MAX_STALE_SECONDS),
            },
        }
        for name, path in self._nmaps.items():
            found.setdefault(name, {})["SCANFLEET_NMAP"] = str(path)
        for service in SERVICES:
            found.setdefault(f"{service}-2", {})["PYTHONPATH"] = str(self._releases / "next")
            found[service] = {
                **self.servers.settings_of(service),
                "SCANFLEET_JWT_PUBLIC_KEY_FILE": None,
                "SCANFLEET_JWT_ISSUER": self.keys.issuer.settings.jwt_issuer,
            }
        return found


def scanned(user: Client, job_id: int, limit_seconds: float = 120.0) -> tuple[dict[str, int], set[tuple[str, ...]]]:
    """Wait for a job to complete; return the counts of its ledger and its results without ids, so that jobs can be compared."""
    task = user.finished(job_id, limit_seconds)
    assert task["status"]["status"] == "completed", task["status"]["error"]
    results = user.results(job_id)
    names = ("ip_address", "protocol", "port", "status", "service")
    found = {tuple(str(each[name]) for name in names) for each in results}
    assert len(found) == len(results)
    return user.ledger(job_id)["counts"], found


def assert_scanned_once(platform: Platform, jobs: Collection[int]) -> None:
    """Check that no address of these jobs was reported twice."""
    hosts = [each.message for each in platform.topics.messages(SCAN_RESULTS, HostScanned)]
    reports = Counter(
        (host.chunk_id, host.address) for host in hosts if isinstance(host, HostScanned) and host.job_id in jobs
    )
    assert set(reports.values()) == {1}, reports.most_common(5)


def requeued(platform: Platform, chunk: Document) -> bool:
    """Return whether the chunk is no longer held by the worker that held it, because its lease has expired."""
    (now,) = [each for each in platform.documents.chunks(chunk["job_id"]) if each["_id"] == chunk["_id"]]
    return bool(now["failures"] > chunk["failures"])


def caught(condition: Callable[[], Document | None], limit_seconds: float, what: str) -> Document:
    """Return what `condition` returns as soon as it is not None."""
    found: list[Document] = []

    def look() -> bool:
        if (seen := condition()) is not None:
            found.append(seen)
        return bool(found)

    until(look, limit_seconds, what, pause_seconds=0.02)
    return found[0]
