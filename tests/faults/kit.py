"""A platform of real processes, two of every service, for fault injection.

It has its own Kafka and mongod, and each service reaches them through its own proxies. The invariants of `invariants.py`
hold after every fault.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx2
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from pymongo import MongoClient

from local import kafka, mongod, nmap, ports
from local.stack import Stack
from local.supervisor import Program, Supervisor
from local.wait import until
from scanfleet.contracts.messages import HostScanned, Message
from scanfleet.contracts.messages.envelope import RawRecord, decode
from scanfleet.contracts.messages.topics import SCAN_EVENTS, SCAN_REPLIES, SCAN_RESULTS, TOPICS, Topic
from scanfleet.errors import MessageError
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.services import SERVICES, WITH_DATABASE
from scanfleet_testing.kafka import behind, read
from scanfleet_testing.tokens import Issuer
from tests.client import Client
from tests.faults.proxies import FaultProxies, FaultProxy
from tests.faults.releases import write_next_release

LEASE: Final = 5  # seconds: longer than a busy machine delays a heartbeat, and short to wait for
REQUEUE_SECONDS: Final = LEASE + 1 + 1  # the promise: a lease and a sweep; one more for a busy machine
REBALANCE_SECONDS: Final = LEASE * 20 / 45  # between two rebalances: as one every 20 seconds with a lease of 45
COOLDOWN_SECONDS: Final = 1  # of the gateways, between two fetches of the issuer's keys
MAX_AGE_SECONDS: Final = 2  # of the keys that the second gateway knows
MAX_STALE_SECONDS: Final = 6  # while it cannot fetch them
SLOTS: Final = 3
REPLICAS: Final = dict.fromkeys(SERVICES, 2)
OFF: Final = 7_200  # seconds by which some clocks are wrong
LIMIT: Final = 90.0  # timeout in seconds for steps that usually take a few, on a loaded machine

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

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Published:
    """A message and its position in its topic."""

    message: Message
    record: RawRecord

    @property
    def headers(self) -> dict[str, str]:
        return {name: (value or b"").decode() for name, value in self.record.headers}


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
        away: whether the endpoint is unavailable and answers 500.
        asked: number of requests to it.
    """

    def __init__(self) -> None:
        self.issuer = Issuer()
        self.away = False
        self.asked = 0
        keys = self

        class Endpoint(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                keys.asked += 1
                body = json.dumps(keys.issuer.jwks).encode()
                self.send_response(500 if keys.away else 200)
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
        stack: the eight services.
        net: prefix of all addresses that are scanned by these tests, and by no other process on this machine: `127.n`.
        acknowledged: the ids of all jobs for which a caller got a 201.
        forgotten: jobs whose events were in a log that was lost.
        keys: the accepted issuer of tokens.
        temporary: the second worker's temporary folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._supervisor = Supervisor(folder / "servers")
        self._proxies = FaultProxies()
        self._numbers = {name: ports.choose() for name in ("kafka", "controller", "mongod", *SERVICES)}
        self._to_kafka = {name: self._proxies.open("127.0.0.1", self._numbers[name]) for name in SERVICES}
        self._to_mongod = {name: self._proxies.open("127.0.0.1", self._numbers["mongod"]) for name in WITH_DATABASE}
        self._users = iter(range(100, 1_000_000))
        self.kafka = f"127.0.0.1:{self._numbers['kafka']}"
        # Each worker of a run has its own network; process ids of two workers may be equal modulo 64.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        self.net = f"127.{64 + (os.getppid() + worker) % 64}"
        self.acknowledged: set[int] = set()
        self.forgotten: set[int] = set()
        self.keys = Keys()
        self.temporary = folder / "temporary"
        self.temporary.mkdir(parents=True)
        self._nmaps = {name: folder / f"nmap-of-{name}" for name in ("scanner-worker-1", "scanner-worker-2")}
        for path in self._nmaps.values():
            path.write_text(NMAP.format(other=path.with_suffix(".other")))
            path.chmod(0o755)
        self._releases = folder / "releases"
        write_next_release(self._releases / "next")
        self.stack = Stack(
            folder / "stack",
            replicas=REPLICAS,
            kafka_at=self.kafka,
            mongodb_at=mongod.uri(f"127.0.0.1:{self._numbers['mongod']}"),
            settings={
                "SCANFLEET_LEASE_SECONDS": str(LEASE),
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
        self.mongodb: MongoClient[Document] = MongoClient(self.stack.servers.mongodb, tz_aware=True)

    def up(self) -> None:
        (self._folder / "servers").mkdir(parents=True, exist_ok=True)
        self._supervisor.launch(
            [
                Program("kafka", self._kafka_command(), autostart=True),
                Program("mongod", self._mongod_command(), autostart=True),
            ],
        )
        mongod.make_ready(f"127.0.0.1:{self._numbers['mongod']}")
        kafka.wait_until_up(self.kafka)
        self.stack.up()

    def down(self) -> None:
        self.mongodb.close()  # while the server runs: otherwise the client searches for it for half a minute
        self.stack.down()
        self._supervisor.shut_down()
        self._close()

    def discard(self) -> None:
        """Kill all processes, whatever their state."""
        self.mongodb.close()
        Supervisor(self.stack.folder).kill()
        self._supervisor.kill()
        self._close()

    def _close(self) -> None:
        self._proxies.close()
        self.keys.close()

    # Users

    def caller(self, user: int | None = None, gateway: str = "api-gateway-1", *, token: str | None = None) -> Caller:
        """Return a client of a new user, or of the given one."""
        token = token or self.token(user or next(self._users))
        return Caller(f"http://{self.stack.ports.address(gateway)}", token, self.acknowledged)

    def token(self, user: int, **changed: Any) -> str:
        """Return a token that is valid by both clocks."""
        now = int(time.time())
        return self.keys.issuer.token(user, **({"iat": now - OFF - 60, "exp": now + OFF} | changed))

    def network(self, bits: int) -> str:
        """Return a network to scan; tests may share it."""
        return f"{self.net}.8.0/{bits}"

    @contextmanager
    def servers(self, hosts: Collection[int] = (1, 7, 70, 100), port: int = 8022) -> Iterator[nmap.OpenPorts]:
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

    def proxy(self, service: str, to: str) -> FaultProxy:
        """Return the proxy between every process of `service` and `kafka` or `mongod`."""
        return (self._to_kafka if to == "kafka" else self._to_mongod)[service]

    def proxies(self, to: str) -> list[FaultProxy]:
        """Return the proxies of all services."""
        return list((self._to_kafka if to == "kafka" else self._to_mongod).values())

    def pid(self, name: str) -> int:
        """Return the pid of a service's process or of a server once it runs."""
        until(lambda: self.running(name) != 0, LIMIT, f"{name} to run")
        return self.running(name)

    def running(self, name: str) -> int:
        """Return the pid of a process; 0 if it does not run."""
        processes = [*self._supervisor.processes(), *self.stack.processes()]
        return next(process.pid for process in processes if process.name == name)

    def names(self, service: str) -> list[str]:
        return self.stack.services.names(service)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal; a supervisor restarts a process that ends."""
        os.kill(self.pid(name), number)

    def stop_server(self, name: str) -> None:
        self._supervisor.stop([name])

    def start_servers(self, *names: str) -> None:
        self._supervisor.start(list(names))
        self.wait_for_servers()

    def wait_for_servers(self) -> None:
        """Wait until Kafka and mongod answer."""
        mongod.make_ready(f"127.0.0.1:{self._numbers['mongod']}")
        kafka.wait_until_up(self.kafka)

    def lose_the_log(self) -> None:
        """Restart the broker without its data; its topics are created again."""
        self.stop_server("kafka")
        self.forgotten |= {job["_id"] for job in self.jobs()}
        shutil.rmtree(self._folder / "servers" / "kafka" / "data")
        self._kafka_command()  # it formats the folder
        self.start_servers("kafka")
        asyncio.run(create_topics(TopicSettings(kafka=self.kafka)))

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
        self.temporary.rename(self.temporary.with_name("away"))  # the only way without the right to mount
        try:
            yield
        finally:
            self.temporary.with_name("away").rename(self.temporary)

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

    @contextmanager
    def failing(self, **data: Any) -> Iterator[None]:
        """Activate mongod's failCommand for the duration of the block."""
        mode = data.pop("mode", "alwaysOn")
        self.mongodb.admin.command({"configureFailPoint": "failCommand", "mode": mode, "data": data})
        try:
            yield
        finally:
            self.mongodb.admin.command({"configureFailPoint": "failCommand", "mode": "off"})

    @contextmanager
    def rebalances(self, group: str) -> Iterator[None]:
        """Rebalance a group more often than a lease for the duration of the block; its members keep their partitions."""
        over = threading.Event()

        def repeat() -> None:
            while not over.wait(REBALANCE_SECONDS):
                asyncio.run(self._join(group))

        with ThreadPoolExecutor(1) as threads:
            repeated = threads.submit(repeat)
            try:
                yield
            finally:
                over.set()
                repeated.result()

    @contextmanager
    def stalled(self, group: str, seconds: float) -> Iterator[Future[None]]:
        """Have no member of a group read for `seconds`: a rebalance waits for a member that is frozen, until its session ends.

        Yields:
            the rebalance, which is done when the group reads again.
        """
        with asyncio.Runner() as frozen, ThreadPoolExecutor(1) as threads:
            member = frozen.run(self._member(group, session_timeout_ms=int(1_000 * seconds)))
            try:
                stall = threads.submit(lambda: asyncio.run(self._join(group)))
                yield stall
                stall.result()
            finally:
                frozen.run(member.stop())

    async def _join(self, group: str) -> None:
        member = await self._member(group)
        await member.stop()

    async def _member(self, group: str, **settings: Any) -> AIOKafkaConsumer:
        """Join a group for a topic that its other members do not read."""
        member = AIOKafkaConsumer(
            SCAN_REPLIES.name,
            bootstrap_servers=self.kafka,
            group_id=group,
            enable_auto_commit=False,
            partition_assignment_strategy=(RangePartitionAssignor,),
            **settings,
        )
        await member.start()
        return member

    # Observation

    def jobs(self, **query: Any) -> list[Document]:
        return list(self.mongodb["scanfleet_job_orchestrator"]["jobs"].find({"deletion": {"$exists": False}} | query))

    def deletions(self, **query: Any) -> list[Document]:
        """Return the receipts of deleted jobs."""
        return self.jobs(**{"deletion": {"$exists": True}} | query)

    def chunks(self, job_id: int) -> list[Document]:
        found = self.mongodb["scanfleet_job_orchestrator"]["chunks"].find({"job_id": job_id})
        return sorted(found, key=lambda chunk: chunk["index"])

    def commands(self, **query: Any) -> list[Document]:
        return list(self.mongodb["scanfleet_job_orchestrator"]["commands"].find(query))

    def hosts(self, **query: Any) -> list[Document]:
        return list(self.mongodb["scanfleet_result_store"]["hosts"].find(query))

    def closed(self, **query: Any) -> list[Document]:
        return list(self.mongodb["scanfleet_result_store"]["chunks"].find(query))

    def holder(self, chunk: Document) -> str:
        """Return the name of the process that holds a running chunk."""
        return str(chunk["worker_id"]).rpartition("-")[0]

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

    def nmaps_of(self, name: str) -> list[int]:
        return nmap.running_under([self.running(name)])

    def metric(self, service: str, name: str) -> float:
        """Return the sum of a metric's series over the processes of a service."""
        total = 0.0
        for process in self.names(service):
            text = httpx2.get(f"{self.stack.ports.probes(process)}/metrics", timeout=LIMIT).text
            total += sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
        return total

    def ready(self, name: str) -> bool:
        """Return whether /readyz succeeds; False without an answer."""
        try:
            return httpx2.get(f"{self.stack.ports.probes(name)}/readyz", timeout=LIMIT).is_success
        except httpx2.HTTPError:
            return False

    def records(self, topic: Topic, *, letters: bool = False) -> list[RawRecord]:
        """Return all records of a topic, or of its dead-letter topic, partition by partition."""
        return asyncio.run(read(self.kafka, topic, dead_letters=letters))

    def messages(self, topic: Topic, *kinds: type[Message]) -> list[Published]:
        """Return the valid messages of a topic."""
        found = []
        for record in self.records(topic):
            with suppress(MessageError):
                message = decode(topic, record)
                if isinstance(message, kinds or Message):
                    found.append(Published(message, record))
        return found

    def send(self, records: Sequence[tuple[str, int | None, bytes | None, bytes | None, Any]]) -> None:
        """Write raw records: topic, partition or None, key, value, headers."""
        asyncio.run(_write(self.kafka, records))

    def behind(self, group: str, topic: Topic) -> int:
        """Return the number of records of the topic that the group has not committed."""
        return asyncio.run(behind(self.kafka, group, topic))

    def until_read(self) -> None:
        """Wait until the services have committed all records of the topics."""
        for topic in TOPICS:
            for service in topic.consumers:
                # The orchestrator reads its own topics only after a restore.
                if service in WITH_DATABASE and topic is not SCAN_EVENTS:
                    group = service if topic is SCAN_RESULTS else f"{service}-{topic.name}"
                    until(lambda g=group, t=topic: self.behind(g, t) == 0, LIMIT, f"{group} to have read all", 0.2)  # type: ignore[misc] # mypy infers no type for a lambda with a default

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
                **shifted(OFF),
                "SCANFLEET_NMAP": str(self._nmaps["scanner-worker-1"]),
                "SCANFLEET_STOP_GRACE_SECONDS": "20",
            },
            "scanner-worker-2": {
                "TMPDIR": str(self.temporary),
                "SCANFLEET_NMAP": str(self._nmaps["scanner-worker-2"]),
                "SCANFLEET_STOP_GRACE_SECONDS": "0",
            },
            "api-gateway-2": {
                **shifted(-OFF),
                "SCANFLEET_JWT_JWKS_MAX_AGE_SECONDS": str(MAX_AGE_SECONDS),
                "SCANFLEET_JWT_JWKS_MAX_STALE_SECONDS": str(MAX_STALE_SECONDS),
            },
        }
        for service in SERVICES:
            found.setdefault(f"{service}-2", {})["PYTHONPATH"] = str(self._releases / "next")
        for name, proxy in self._to_kafka.items():
            found[name] = {"SCANFLEET_KAFKA": f"127.0.0.1:{proxy.port}", "SCANFLEET_JWT_PUBLIC_KEY_FILE": None}
            found[name]["SCANFLEET_JWT_ISSUER"] = self.keys.issuer.settings.jwt_issuer
        for name, proxy in self._to_mongod.items():
            found[name]["SCANFLEET_MONGODB"] = mongod.uri(f"127.0.0.1:{proxy.port}")
        return found

    def _kafka_command(self) -> list[str]:
        folder = self._folder / "servers" / "kafka"
        command = kafka.command(folder, self._numbers["kafka"], self._numbers["controller"])
        # Each service connects to the broker by the address of its proxy; the last value in the file wins.
        names = {service: service.replace("-", "").upper() for service in SERVICES}
        plain = f"PLAINTEXT://127.0.0.1:{self._numbers['kafka']}"
        own = [f"{names[service]}://127.0.0.1:{self._numbers[service]}" for service in SERVICES]
        advertised = [f"{names[service]}://127.0.0.1:{self._to_kafka[service].port}" for service in SERVICES]
        controller = f"CONTROLLER://127.0.0.1:{self._numbers['controller']}"
        protocols = ",".join(f"{name}:PLAINTEXT" for name in ("CONTROLLER", "PLAINTEXT", *names.values()))
        with (folder / "server.properties").open("a") as properties:
            properties.write(f"listeners={','.join([plain, *own, controller])}\n")
            properties.write(f"advertised.listeners={','.join([plain, *advertised])}\n")
            properties.write(f"listener.security.protocol.map={protocols}\n")
            properties.write("inter.broker.listener.name=PLAINTEXT\n")
        return command

    def _mongod_command(self) -> list[str]:
        command = mongod.command(self._folder / "servers" / "mongod", self._numbers["mongod"])
        return [*command, "--setParameter", "enableTestCommands=1"]  # required by failCommand


def scanned(user: Client, job_id: int, limit: float = 120.0) -> tuple[dict[str, int], set[tuple[str, ...]]]:
    """Wait for a job to complete; return the counts of its ledger and its results without ids, so that jobs can be compared."""
    task = user.finished(job_id, limit)
    assert task["status"]["status"] == "completed", task["status"]["error"]
    results = user.results(job_id)
    names = ("ip_address", "protocol", "port", "status", "service")
    found = {tuple(str(each[name]) for name in names) for each in results}
    assert len(found) == len(results)
    return user.ledger(job_id)["counts"], found


def assert_scanned_once(platform: Platform, jobs: Collection[int]) -> None:
    """Check that no address of these jobs was reported twice."""
    hosts = [each.message for each in platform.messages(SCAN_RESULTS, HostScanned)]
    reports = Counter(
        (host.chunk_id, host.address) for host in hosts if isinstance(host, HostScanned) and host.job_id in jobs
    )
    assert set(reports.values()) == {1}


def requeued(platform: Platform, chunk: Document) -> bool:
    """Return whether the chunk is no longer held by the worker that held it, because its lease has expired."""
    (now,) = [each for each in platform.chunks(chunk["job_id"]) if each["_id"] == chunk["_id"]]
    return bool(now["failures"] > chunk["failures"])


async def _write(
    bootstrap: str,
    records: Sequence[tuple[str, int | None, bytes | None, bytes | None, Any]],
) -> None:
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap,
        max_request_size=1 << 24,
    )
    await producer.start()
    try:
        acks = [
            await producer.send(topic, value=value, key=key, partition=partition, headers=list(headers))
            for topic, partition, key, value, headers in records
        ]
        await asyncio.gather(*acks)
    finally:
        await producer.stop()


def caught(condition: Callable[[], Document | None], limit: float, what: str) -> Document:
    """Return what `condition` returns as soon as it is not None."""
    found: list[Document] = []

    def look() -> bool:
        if (seen := condition()) is not None:
            found.append(seen)
        return bool(found)

    until(look, limit, what, pause=0.02)
    return found[0]
