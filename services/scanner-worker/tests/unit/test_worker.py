"""A worker and its chunks, with a scripted scanner and an in-memory bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_network

import pytest

from scanfleet.contracts.messages import (
    Audited,
    ChunkClaimed,
    ChunkFailed,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    HostDetails,
    HostScanned,
    Message,
    PortFound,
    ScanChunk,
    StopChunk,
    WorkerReady,
)
from scanfleet.contracts.messages.topics import SCAN_AUDIT, SCAN_PROGRESS, SCAN_RESULTS, SCAN_TASKS, SCAN_WORKERS, Topic
from scanfleet.contracts.user_grants import UserGrants
from scanfleet.errors import DependencyError
from scanfleet.scanning.policy import ScanPolicy
from scanfleet.scanning.ports import PortSet
from scanfleet.scanning.targets import TargetRules
from scanfleet.security.audit import Refusals
from scanfleet.services import WORKER
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.tracing import ids, recording
from scanfleet_testing.waiting import until
from scanner_worker.domain.ports import Found
from scanner_worker.domain.scan import CannotStartError, Host, NoRouteError, ScanError
from scanner_worker.handlers.batch import Abilities
from scanner_worker.handlers.exclusion import FAILURES, SHORTEST_SECONDS
from scanner_worker.handlers.worker import LEAST_SECONDS, Worker
from scanner_worker.metrics import EXCLUSIONS

MakeChunk = Callable[..., ScanChunk]

FOREVER = "forever"
ASKED = "asked"


def host(address: str, *, up: bool = True, ports: int = 2, reason: bytes = b"reset") -> Host:
    return Host(address, up, False, ports, {reason}, b"")


def detailed(address: str, reason: bytes) -> Host:
    return host(address, reason=reason)._replace(details=HostDetails(reason=reason.decode(), closed=2))


class ScriptedScanner:
    """Follows a script: yields hosts, raises errors or waits indefinitely. Records its arguments and whether it was closed."""

    version = "7.95"

    def __init__(self, *script: Host | Exception | str) -> None:
        self.script = script
        self.asked: list[Sequence[str]] = []
        self.closed = 0
        self.running = 0
        self.most = 0
        self.gate = asyncio.Event()
        self.held: list[float] = []
        self.checks = 0
        self.broken = ""

    async def scan(
        self,
        arguments: Sequence[str],
        ports: PortSet,  # noqa: ARG002 # the port's signature
    ) -> AsyncGenerator[Found]:
        self.asked.append(arguments)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for step in self.script:
                if isinstance(step, Host):
                    yield [(step, () if step.reasons == {b"user-set"} else (PortFound(port=22),))]
                elif isinstance(step, Exception):
                    raise step
                elif step == ASKED:
                    for target in arguments[arguments.index("--") + 1 :]:
                        yield [(host(str(address)), ()) for address in ip_network(target)]
                else:
                    await self.gate.wait()
        finally:
            self.closed += 1
            self.running -= 1

    def source(self, address: str) -> str | None:
        return address if ":" in address else address.rpartition(".")[0] + ".250"

    async def ranked(self, ports: PortSet) -> PortSet:
        return ports

    def hold(self, seconds: float) -> None:
        self.held.append(seconds)

    async def check(self) -> None:
        self.checks += 1
        if self.broken:
            raise CannotStartError(self.broken)


class Rig:
    """A worker and its bus."""

    def __init__(self, scanner: ScriptedScanner, *, slots: int, raw: bool, grants: UserGrants | None = None) -> None:
        rules = TargetRules((ip_network("127.0.0.0/8"),), (ip_network("127.9.9.9/32"),))
        self.scanner = scanner
        self.bus = MemoryBus()
        self.refusals = Refusals("scanner-worker")
        abilities = Abilities(slots, raw, rules, attempt_seconds=60, grants=grants)
        self.worker = Worker("worker", abilities, scanner, self.bus, self.refusals.add_denied_chunk)
        self.tasks = self.bus.tail(SCAN_TASKS, self.worker)

    async def send(self, *tasks: Message) -> None:
        await self.bus.publish(SCAN_TASKS, tasks)

    def messages(self, topic: Topic, kind: type[Message]) -> list[Message]:
        return [message for message in self.bus.messages(topic) if isinstance(message, kind)]

    def progress(self) -> list[str]:
        """The kinds of messages on scan-progress."""
        return [type(message).__name__ for message in self.bus.messages(SCAN_PROGRESS)]

    def last(self) -> Message:
        return self.bus.messages(SCAN_PROGRESS)[-1]


@asynccontextmanager
async def rigged(
    *script: Host | Exception | str, slots: int = 2, raw: bool = True, grants: UserGrants | None = None
) -> AsyncIterator[Rig]:
    rig = Rig(ScriptedScanner(*script), slots=slots, raw=raw, grants=grants)
    async with started(rig):
        yield rig


@asynccontextmanager
async def started(rig: Rig) -> AsyncIterator[None]:
    await rig.tasks.start()
    await rig.worker.start()
    try:
        yield
    finally:
        await rig.worker.stop(0)
        await rig.tasks.stop()


def hosts(*lasts: int) -> Iterable[Host]:
    return [host(f"127.9.1.{last}") for last in lasts]


async def test_worker_announces_slots_and_capabilities() -> None:
    """At the start and every two seconds the worker announces its slots and capabilities."""
    async with rigged(slots=3, raw=False) as rig:
        await until(lambda: len(rig.messages(SCAN_WORKERS, WorkerReady)) >= 2)
        ready = rig.messages(SCAN_WORKERS, WorkerReady)[0]
        assert (ready.worker_id, ready.slots, ready.raw) == ("worker", 3, False)  # type: ignore[attr-defined] # another kind of message fails the test


async def test_worker_announcements_of_short_scans_are_bounded_per_second(make_chunk: MakeChunk) -> None:
    """Scans that end shortly after one another share an announcement."""
    async with rigged(*hosts(0, 1, 2, 3), slots=1) as rig:
        began = time.monotonic()
        for number in range(30):
            await rig.send(make_chunk(chunk_id=f"1-{number}"))
            await until(lambda n=number: rig.progress().count("ChunkScanned") == n + 1)  # type: ignore[misc] # mypy infers no type for a lambda with a default
        announced = len(rig.messages(SCAN_WORKERS, WorkerReady))
        assert announced <= (time.monotonic() - began) / LEAST_SECONDS + 2


async def test_worker_chunk_is_scanned_and_reported(make_chunk: MakeChunk) -> None:
    """Each host that is not down is published, the final report goes to results before progress, and a short scan has no claim."""
    script = [
        host("127.9.1.0"),
        host("127.9.1.1", up=False),
        host("127.9.1.2", reason=b"user-set"),
    ]
    async with rigged(*script) as rig:
        await rig.send(make_chunk(outcomes="..."))
        await until(lambda: isinstance(rig.last(), ChunkScanned) if rig.progress() else False)
        assert rig.progress() == ["ChunkScanned"]
        results = rig.bus.messages(SCAN_RESULTS)
        assert [(m.address, m.outcome) for m in results if isinstance(m, HostScanned)] == [
            ("127.9.1.0", "a"),
            ("127.9.1.2", "s"),
        ]
        scanned = results[-1]
        assert isinstance(scanned, ChunkScanned)
        assert (scanned.outcomes, scanned.first_address, scanned.technique) == ("ads", "127.9.1.0", "syn")
        assert (scanned.nmap, scanned.scripts) == ("7.95", ())
        assert isinstance(host_scanned := results[0], HostScanned)
        assert (host_scanned.user_id, host_scanned.attempt, host_scanned.ports) == (7, 1, (PortFound(port=22),))


async def test_worker_publishes_details_of_hosts(make_chunk: MakeChunk) -> None:
    """Details that the scanner has read are published; silent hosts have none."""
    script = [detailed("127.9.1.0", b"reset"), host("127.9.1.1", reason=b"user-set")]
    async with rigged(*script) as rig:
        await rig.send(make_chunk(outcomes="..dd"))
        await until(lambda: "ChunkScanned" in rig.progress())
        found = [m for m in rig.bus.messages(SCAN_RESULTS) if isinstance(m, HostScanned)]
        assert [(m.outcome, m.details and m.details.reason) for m in found] == [("a", "reset"), ("s", None)]


async def test_worker_retried_chunk_scans_only_blanks(make_chunk: MakeChunk) -> None:
    """A retried chunk keeps its outcomes and passes only blank addresses to nmap."""
    async with rigged(*hosts(1, 0, 3)) as rig:
        await rig.send(make_chunk(outcomes="a.d."))
        await until(lambda: "ChunkScanned" in rig.progress())
        argv = list(rig.scanner.asked[0])
        assert argv[argv.index("--") + 1 :] == ["127.9.1.1/32", "127.9.1.3/32"]
        assert [m.address for m in rig.bus.messages(SCAN_RESULTS) if isinstance(m, HostScanned)] == [
            "127.9.1.1",
            "127.9.1.3",
        ]
        assert rig.last().outcomes == "aada"  # type: ignore[attr-defined] # another kind of message fails the test


async def test_worker_task_of_another_worker_is_ignored(make_chunk: MakeChunk) -> None:
    """A worker ignores tasks for other worker ids."""
    async with rigged(*hosts(0, 1, 2, 3)) as rig:
        await rig.send(make_chunk(worker_id="other", chunk_id="1-1"), make_chunk())
        await until(lambda: "ChunkScanned" in rig.progress())
        assert {m.chunk_id for m in rig.bus.messages(SCAN_PROGRESS)} == {"1-0"}


async def test_worker_repeated_task_is_ignored(make_chunk: MakeChunk) -> None:
    """A repeated ScanChunk of the same attempt is ignored, during and after the scan."""
    async with rigged(*hosts(0, 1, 2, 3)) as rig:
        await rig.send(make_chunk(), make_chunk())
        await until(lambda: "ChunkScanned" in rig.progress())
        await rig.send(make_chunk(), make_chunk(chunk_id="1-1"))
        await until(lambda: rig.progress().count("ChunkScanned") == 2)
        assert len(rig.scanner.asked) == 2


async def test_worker_heartbeat_has_the_map(make_chunk: MakeChunk) -> None:
    """While a scan runs, a heartbeat every second has the map of finished addresses."""
    async with rigged(*hosts(0, 2), FOREVER) as rig:
        await rig.send(make_chunk())
        await until(lambda: len(rig.messages(SCAN_PROGRESS, ChunkProgressed)) >= 2)
        assert rig.last().outcomes == "a.a."  # type: ignore[attr-defined] # another kind of message fails the test


async def test_worker_outcome_is_set_after_acknowledgement(make_chunk: MakeChunk) -> None:
    """While scan-results cannot be written, the map stays blank; once it can, the host is published."""
    async with rigged(*hosts(0), FOREVER) as rig:
        publish, unavailable = rig.bus.publish, True

        async def without_results(topic: Topic, messages: Iterable[Message]) -> None:
            if unavailable and topic is SCAN_RESULTS:
                raise DependencyError("unavailable")
            await publish(topic, messages)

        rig.bus.publish = without_results  # type: ignore[method-assign] # simulates a failure of the broker
        await rig.send(make_chunk())
        await until(lambda: rig.messages(SCAN_PROGRESS, ChunkProgressed))
        assert rig.last().outcomes == "...."  # type: ignore[attr-defined] # another kind of message fails the test
        unavailable = False
        await until(lambda: rig.last().outcomes == "a...")  # type: ignore[attr-defined] # another kind of message fails the test
        assert len(rig.messages(SCAN_RESULTS, HostScanned)) == 1


@pytest.mark.proves("F33", "G17")
@pytest.mark.parametrize(
    ("script", "end"),
    [([ASKED], ChunkReleased), ([host(f"127.9.1.{last}", up=False) for last in range(4)], ChunkScanned)],
    ids=["hosts", "final report"],
)
async def test_worker_partition_without_leader_holds_no_slot(
    make_chunk: MakeChunk, script: list[Host | str], end: type[Message]
) -> None:
    """A job whose results cannot be published occupies a slot for less than a lease, and its attempt counts as no failure."""
    async with rigged(*script, slots=1) as rig:
        stuck = SCAN_RESULTS.name, SCAN_RESULTS.partition_of("1")
        assert stuck != (SCAN_RESULTS.name, SCAN_RESULTS.partition_of("2"))
        rig.bus.broker.leaderless.add(stuck)
        await rig.send(make_chunk(lease_seconds=3.0))
        await until(lambda: rig.scanner.asked)
        await until(lambda: rig.scanner.running == 0)
        await rig.send(make_chunk(job_id=2, chunk_id="2-0", lease_seconds=3.0))

        def ends(chunk_id: str) -> list[type[Message]]:
            kinds = (ChunkScanned, ChunkReleased, ChunkFailed)
            return [kind for kind in kinds for each in rig.messages(SCAN_PROGRESS, kind) if each.chunk_id == chunk_id]  # type: ignore[attr-defined] # another kind of message fails the test

        await until(lambda: ends("2-0") and ends("1-0"))
        assert (ends("2-0"), ends("1-0")) == ([ChunkScanned], [end])
        released = rig.messages(SCAN_PROGRESS, ChunkReleased)
        assert all(each.unacknowledged for each in released)  # type: ignore[attr-defined] # another kind of message fails the test
        rig.bus.broker.leaderless.clear()
        await rig.send(make_chunk(attempt=2))
        await until(lambda: len(rig.messages(SCAN_RESULTS, ChunkScanned)) >= 2)


async def test_worker_slots_limit_concurrent_chunks(make_chunk: MakeChunk) -> None:
    """At most as many chunks as slots run concurrently, and the rest start as slots become free."""
    async with rigged(FOREVER, *hosts(0, 1, 2, 3), slots=2) as rig:
        await rig.send(*(make_chunk(chunk_id=f"1-{number}") for number in range(6)))
        await until(lambda: rig.scanner.running == 2)
        rig.scanner.gate.set()
        await until(lambda: rig.progress().count("ChunkScanned") == 6)
        assert rig.scanner.most == 2


async def test_worker_waiting_compatible_chunks_share_a_slot(make_chunk: MakeChunk) -> None:
    """A slot that becomes free takes all waiting compatible chunks; a chunk that finds a free slot does not wait."""
    lasts = {"1-0": 0, "1-1": 4, "1-2": 8, "1-3": 12, "1-4": 16}
    chunks = [make_chunk(chunk_id=id_, first_address=f"127.9.1.{last}", outcomes=".") for id_, last in lasts.items()]
    chunks[3] = chunks[3].model_copy(update={"attempt": 2})  # released before, which is not a failure
    chunks[4] = chunks[4].model_copy(update={"attempt": 2, "failures": 1})
    async with rigged(FOREVER, ASKED, slots=1) as rig:
        await rig.send(chunks[0])
        await until(lambda: rig.scanner.asked)
        await rig.send(*chunks[1:])
        rig.scanner.gate.set()
        await until(lambda: rig.progress().count("ChunkScanned") == 5)
        assert [[each.removesuffix("/32") for each in argv[argv.index("--") + 1 :]] for argv in rig.scanner.asked] == [
            ["127.9.1.0"],
            ["127.9.1.4", "127.9.1.8", "127.9.1.12"],
            ["127.9.1.16"],
        ]
        assert {m.chunk_id for m in rig.messages(SCAN_PROGRESS, ChunkScanned)} == set(lasts)  # type: ignore[attr-defined] # another kind of message fails the test
        assert rig.scanner.most == 1


async def test_worker_compatible_chunks_are_split_over_free_slots(make_chunk: MakeChunk) -> None:
    """Compatible chunks that arrive together are split over the free slots, so that no slot is idle."""
    chunks = [make_chunk(chunk_id=f"1-{number}", first_address=f"127.9.{number}.0") for number in range(8)]
    async with rigged(FOREVER, slots=3) as rig:
        await rig.send(*chunks)
        await until(lambda: rig.scanner.running == 3)
        assert [len(argv) - argv.index("--") - 1 for argv in rig.scanner.asked] == [3, 3, 2]


async def test_worker_chunks_of_one_nmap_take_one_slot(make_chunk: MakeChunk) -> None:
    """While one slot scans several chunks, the other slot is free for other chunks."""
    chunks = [make_chunk(chunk_id=f"1-{number}", first_address=f"127.9.{number}.0") for number in range(4)]
    async with rigged(FOREVER, slots=2) as rig:
        await rig.send(chunks[0])
        await until(lambda: rig.scanner.running == 1)
        await rig.send(*chunks[1:])
        await until(lambda: rig.scanner.running == 2)
        await rig.send(StopChunk(job_id=1, chunk_id="1-0", attempt=1, worker_id="worker", reason="over"))
        await until(lambda: rig.scanner.closed == 1)
        await rig.send(make_chunk(chunk_id="2-0"))
        await until(lambda: rig.scanner.running == 2)
        assert [len(argv) - argv.index("--") - 1 for argv in rig.scanner.asked] == [1, 3, 1]


async def test_stop_without_grace_releases_all_chunks_of_a_slot(make_chunk: MakeChunk) -> None:
    """Without grace nmap is killed once for all its chunks, and each chunk is released."""
    chunks = [make_chunk(chunk_id=f"1-{number}", first_address=f"127.9.{number}.0") for number in range(3)]
    async with rigged(FOREVER, slots=1) as rig:
        await rig.send(*chunks)
        await until(lambda: rig.scanner.asked)
        await rig.send(StopChunk(job_id=1, chunk_id="1-0", attempt=1, worker_id="worker", reason="cancelled"))
        await until(lambda: len(rig.scanner.asked) == 2)
        await rig.worker.stop(0)
        assert {m.chunk_id for m in rig.messages(SCAN_PROGRESS, ChunkReleased)} == {"1-0", "1-1", "1-2"}  # type: ignore[attr-defined] # another kind of message fails the test
        assert len(rig.scanner.asked) == rig.scanner.closed == 2


async def test_worker_chunk_without_slot_is_released(make_chunk: MakeChunk) -> None:
    """A chunk that gets no slot within two seconds is released, unclaimed and at no cost."""
    async with rigged(FOREVER, slots=1) as rig:
        await rig.send(make_chunk(), make_chunk(chunk_id="1-1", outcomes="a..."))
        await until(lambda: "ChunkReleased" in rig.progress())
        released = rig.messages(SCAN_PROGRESS, ChunkReleased)[0]
        assert isinstance(released, ChunkReleased)
        assert (released.chunk_id, released.outcomes, released.slot_seconds) == ("1-1", "a...", 0)
        assert [m.chunk_id for m in rig.messages(SCAN_PROGRESS, ChunkClaimed)] == ["1-0"]  # type: ignore[attr-defined] # another kind of message fails the test


async def test_worker_stop_chunk_releases_with_the_map(make_chunk: MakeChunk) -> None:
    """StopChunk of this token closes the scanner and releases the chunk with its finished addresses."""
    async with rigged(*hosts(1), FOREVER) as rig:
        await rig.send(make_chunk())
        await until(lambda: rig.messages(SCAN_RESULTS, HostScanned))
        await rig.send(StopChunk(job_id=1, chunk_id="1-0", attempt=1, worker_id="worker", reason="cancelled"))
        await until(lambda: "ChunkReleased" in rig.progress())
        released = rig.last()
        assert isinstance(released, ChunkReleased)
        assert (released.outcomes, released.reason, rig.scanner.closed) == (".a..", "cancelled", 1)
        assert not released.unacknowledged


async def test_worker_unknown_stop_chunk_gets_no_reply(make_chunk: MakeChunk) -> None:
    """A StopChunk for an unknown attempt or chunk stops nothing and gets no reply, which would cause an endless loop."""
    async with rigged(FOREVER) as rig:
        await rig.send(make_chunk(attempt=2))
        await until(lambda: rig.scanner.asked)
        await rig.send(
            StopChunk(job_id=1, chunk_id="1-0", attempt=1, worker_id="worker", reason="old"),
            StopChunk(job_id=1, chunk_id="9-9", attempt=1, worker_id="worker", reason="unknown"),
        )
        await until(lambda: rig.progress().count("ChunkProgressed") >= 2)
        assert set(rig.progress()) == {"ChunkClaimed", "ChunkProgressed"}


async def test_worker_new_attempt_stops_the_old_one(make_chunk: MakeChunk) -> None:
    """If the same worker gets a chunk again, the earlier attempt stops."""
    async with rigged(FOREVER) as rig:
        await rig.send(make_chunk())
        await until(lambda: rig.scanner.asked)
        await rig.send(make_chunk(attempt=2))
        await until(lambda: "ChunkReleased" in rig.progress())
        assert [m.attempt for m in rig.messages(SCAN_PROGRESS, ChunkReleased)] == [1]  # type: ignore[attr-defined] # another kind of message fails the test
        await until(lambda: rig.scanner.running == 1)


@pytest.mark.parametrize("begun", [True, False], ids=["running", "ended"])
async def test_worker_late_older_attempt_is_ignored(make_chunk: MakeChunk, begun: bool) -> None:
    """A ScanChunk of a lower attempt neither stops a newer one nor starts, even after the newer one has ended."""
    async with rigged(*([FOREVER] if begun else hosts(0, 1, 2, 3))) as rig:
        await rig.send(make_chunk(attempt=3))
        await until(lambda: rig.scanner.running == 1 if begun else "ChunkScanned" in rig.progress())
        await rig.send(make_chunk(attempt=2), make_chunk(chunk_id="1-9", first_address="10.0.0.0"))
        await until(lambda: [m for m in rig.messages(SCAN_PROGRESS, ChunkScanned) if m.chunk_id == "1-9"])  # type: ignore[attr-defined] # another kind of message fails the test
        assert len(rig.scanner.asked) == 1
        assert rig.messages(SCAN_PROGRESS, ChunkReleased) == []
        assert rig.scanner.running == int(begun)


async def test_worker_guard_limit_follows_the_shortest_lease(make_chunk: MakeChunk) -> None:
    """The guard's limit is two thirds of the shortest lease, set before each scan starts and when one ends."""
    async with rigged(FOREVER, slots=2) as rig:
        await rig.send(make_chunk(lease_seconds=30.0, failures=1))
        await until(lambda: rig.scanner.running == 1)
        await rig.send(make_chunk(chunk_id="1-1", lease_seconds=6.0, failures=1))
        await until(lambda: rig.scanner.running == 2)
        await rig.send(StopChunk(job_id=1, chunk_id="1-1", attempt=1, worker_id="worker", reason="over"))
        await until(lambda: rig.scanner.closed == 1)
        await until(lambda: len(rig.scanner.held) == 3)
        assert rig.scanner.held == [20.0, 4.0, 20.0]


async def test_worker_failed_run_keeps_hosts_and_reason(make_chunk: MakeChunk) -> None:
    """Hosts before the failure count, and the reason of the failure is reported."""
    async with rigged(*hosts(0), ScanError("nmap exited with 1")) as rig:
        await rig.send(make_chunk())
        await until(lambda: "ChunkFailed" in rig.progress())
        failed = rig.last()
        assert isinstance(failed, ChunkFailed)
        assert (failed.outcomes, failed.reason) == ("a...", "nmap exited with 1")


async def test_worker_missing_host_fails_the_chunk(make_chunk: MakeChunk) -> None:
    """An address that nmap omits stays blank and fails the chunk although the run succeeded."""
    async with rigged(*hosts(0, 1, 3)) as rig:
        await rig.send(make_chunk())
        await until(lambda: "ChunkFailed" in rig.progress())
        failed = rig.last()
        assert isinstance(failed, ChunkFailed)
        assert (failed.outcomes, failed.reason) == ("aa.a", "1 addresses are missing from nmap's output")


async def test_worker_missing_ports_fail_the_chunk(make_chunk: MakeChunk) -> None:
    """A host that accounts for fewer ports than requested has no outcome, and the reason names the host."""
    async with rigged(*hosts(0, 1, 2), host("127.9.1.3", ports=1)) as rig:
        await rig.send(make_chunk())
        await until(lambda: "ChunkFailed" in rig.progress())
        assert "1 of 2 ports of 127.9.1.3" in rig.last().reason  # type: ignore[attr-defined] # another kind of message fails the test
        assert len(rig.messages(SCAN_RESULTS, HostScanned)) == 3


async def test_worker_unrequested_host_fails_the_chunk(make_chunk: MakeChunk) -> None:
    """A host that is not a target fails the chunk."""
    async with rigged(*hosts(9)) as rig:
        await rig.send(make_chunk())
        await until(lambda: "ChunkFailed" in rig.progress())
        assert "127.9.1.9" in rig.last().reason  # type: ignore[attr-defined] # another kind of message fails the test
        assert rig.bus.messages(SCAN_RESULTS) == []


async def test_worker_unexpected_error_fails_only_the_chunk(make_chunk: MakeChunk) -> None:
    """An unexpected error while scanning is reported as a failure, and the worker continues."""
    async with rigged(ValueError("oops")) as rig:
        await rig.send(make_chunk())
        await until(lambda: "ChunkFailed" in rig.progress())
        assert "ValueError" in rig.last().reason  # type: ignore[attr-defined] # another kind of message fails the test
        assert rig.worker.alive


async def test_worker_refused_targets_never_reach_nmap(make_chunk: MakeChunk) -> None:
    """Addresses that the rules forbid are refused with the reason, the others are scanned."""
    async with rigged(host("127.9.9.8")) as rig:
        await rig.send(make_chunk(first_address="127.9.9.8", outcomes=".."))
        await until(lambda: "ChunkScanned" in rig.progress())
        assert list(rig.scanner.asked[0])[-2:] == ["--", "127.9.9.8/32"]
        scanned = rig.last()
        assert isinstance(scanned, ChunkScanned)
        assert scanned.outcomes == "ar"
        assert "127.9.9.9/32" in scanned.reason


async def test_worker_refused_chunk_starts_no_nmap(make_chunk: MakeChunk) -> None:
    """If everything is refused, the chunk is finished immediately without nmap."""
    async with rigged() as rig:
        await rig.send(make_chunk(first_address="10.0.0.0"))
        await until(lambda: "ChunkScanned" in rig.progress())
        assert (rig.last().outcomes, rig.scanner.asked) == ("rrrr", [])  # type: ignore[attr-defined] # another kind of message fails the test


@pytest.mark.proves("A13", "G15")
@pytest.mark.parametrize("policy", [{}, {"os_detection": True}], ids=["able", "unable"])
async def test_worker_forbidden_chunk_is_audited(make_chunk: MakeChunk, policy: dict[str, object]) -> None:
    """A chunk with forbidden addresses has one audit entry, even if the worker cannot scan it for another reason."""
    async with rigged(host("127.9.9.8"), raw=False) as rig:
        await rig.send(make_chunk(policy, first_address="127.9.9.8", outcomes=".."))
        await until(lambda: "ChunkScanned" in rig.progress())
        await rig.refusals.flush(rig.bus)
        (entry,) = [each.entry for each in rig.bus.messages(SCAN_AUDIT[WORKER]) if isinstance(each, Audited)]
        assert (entry.service, entry.subject, entry.source) == ("scanner-worker", "7", "scan-tasks")
        assert (entry.action, entry.decision, entry.rule) == ("consume scan-tasks", "refused", "targets")
        assert "127.9.9.9/32" in entry.target


GRANTS = UserGrants.model_validate(
    {"grants": [{"name": "site", "users": [7], "networks": ["127.9.1.0/31"], "max_rate": 100, "max_timing": 4}]}
)


@pytest.mark.proves("A13", "G12", "G15")
@pytest.mark.parametrize(
    ("policy", "fields", "letters", "why"),
    [
        ({"max_rate": 100}, {}, "aarr", "127.9.1.2/32 is not within the networks of grant site"),
        ({"max_rate": 101}, {}, "rrrr", "max_rate 101 is above 100"),
        ({"max_rate": 1}, {"max_rate": 500}, "rrrr", "max_rate 500 is above 100"),
        ({}, {}, "rrrr", "max_rate without a limit is above 100"),
        ({"timing": 5, "max_rate": 1}, {}, "rrrr", "timing 5 is above 4"),
        ({"max_rate": 1}, {"granted_by": "other"}, "rrrr", "user 7 has no grant other"),
        ({"max_rate": 1}, {"user_id": 8}, "rrrr", "user 8 has no grant site"),
    ],
)
async def test_chunk_beyond_its_grant_is_refused_and_audited(
    *,
    make_chunk: MakeChunk,
    policy: dict[str, object],
    fields: dict[str, object],
    letters: str,
    why: str,
) -> None:
    """For any task nmap gets no address beyond the grants of this worker, and the audit log has the reason."""
    async with rigged(*hosts(0, 1), grants=GRANTS) as rig:
        await rig.send(make_chunk(policy, **({"granted_by": "site"} | fields)))
        await until(lambda: "ChunkScanned" in rig.progress())
        assert rig.last().outcomes == letters  # type: ignore[attr-defined] # another kind of message fails the test
        assert [line[line.index("--") + 1 :] for line in rig.scanner.asked] == [["127.9.1.0/31"]] * letters.count("aa")
        await rig.refusals.flush(rig.bus)
        (entry,) = [each.entry for each in rig.bus.messages(SCAN_AUDIT[WORKER]) if isinstance(each, Audited)]
        assert entry.rule == "grant"
        assert why in entry.target


@pytest.mark.parametrize(("seconds", "begun"), [(0.0, 0), (0.2, 1)])
async def test_chunk_is_released_when_the_hours_of_its_user_end(
    make_chunk: MakeChunk, seconds: float, begun: int
) -> None:
    """nmap is stopped at the end of the hours, and not started after it; what is left is released."""
    async with rigged(*hosts(0), FOREVER) as rig:
        await rig.send(make_chunk(stop_after_seconds=seconds))
        await until(lambda: "ChunkReleased" in rig.progress())
        released = rig.last()
        assert isinstance(released, ChunkReleased)
        assert (released.outcomes.count("a"), released.too_slow) == (begun, False)
        assert "hours" in released.reason
        assert (len(rig.scanner.asked), rig.scanner.closed) == (begun, begun)


async def test_worker_missing_raw_packets_are_not_audited(make_chunk: MakeChunk) -> None:
    """A chunk that needs raw packets on a worker without them violates no rule and is not audited."""
    async with rigged(raw=False) as rig:
        await rig.send(make_chunk({"os_detection": True}))
        await until(lambda: "ChunkScanned" in rig.progress())
        await rig.refusals.flush(rig.bus)
        assert rig.bus.messages(SCAN_AUDIT[WORKER]) == []


@pytest.mark.parametrize(("raw", "used", "option"), [(True, "syn", "-sS"), (False, "connect", "-sT")])
async def test_worker_results_have_the_used_technique(
    make_chunk: MakeChunk,
    raw: bool,
    used: str,
    option: str,
) -> None:
    """auto is SYN with raw packets, else connect, in the arguments and in every result."""
    async with rigged(*hosts(0, 1, 2, 3), raw=raw) as rig:
        await rig.send(make_chunk())
        await until(lambda: "ChunkScanned" in rig.progress())
        assert option in rig.scanner.asked[0]
        assert {message.technique for message in rig.bus.messages(SCAN_RESULTS)} == {used}


async def test_worker_unacknowledged_heartbeats_stop_the_scan(
    make_chunk: MakeChunk,
) -> None:
    """If the bus is unavailable for two thirds of the lease, nmap is stopped, and the chunk is released once it recovers."""
    async with rigged(*hosts(0), FOREVER) as rig:
        await rig.send(make_chunk(lease_seconds=3.0))
        await until(lambda: rig.messages(SCAN_RESULTS, HostScanned))
        began = asyncio.get_running_loop().time()
        rig.bus.broker.unavailable = True
        await until(lambda: rig.scanner.closed)
        assert asyncio.get_running_loop().time() - began < 3.0
        rig.bus.broker.unavailable = False
        await until(lambda: "ChunkReleased" in rig.progress())
        assert (rig.last().outcomes, rig.last().unacknowledged) == ("a...", True)  # type: ignore[attr-defined] # another kind of message fails the test


async def test_worker_acknowledged_heartbeats_keep_the_lease(make_chunk: MakeChunk) -> None:
    """Acknowledged heartbeats keep a scan running for longer than one lease."""
    async with rigged(FOREVER) as rig:
        await rig.send(make_chunk(lease_seconds=2.0))
        await until(lambda: rig.progress().count("ChunkProgressed") >= 4)
        assert rig.scanner.running == 1


def slots(rig: Rig) -> int:
    """Return the slots of the worker's latest announcement."""
    return rig.messages(SCAN_WORKERS, WorkerReady)[-1].slots  # type: ignore[attr-defined, no-any-return] # another kind of message fails the test


@pytest.mark.proves("F25", "G17")
async def test_worker_cannot_start_nmap_is_excluded_until_check_succeeds(make_chunk: MakeChunk) -> None:
    """The worker releases all chunks and announces no slots until a check succeeds."""
    async with rigged(CannotStartError("No space left on device"), slots=1) as rig:
        await until(lambda: rig.messages(SCAN_WORKERS, WorkerReady))
        rig.scanner.broken = "No space left on device"
        await rig.send(make_chunk(failures=1), make_chunk(chunk_id="1-1", failures=1))
        await until(lambda: len(rig.messages(SCAN_PROGRESS, ChunkReleased)) == 2)
        await until(lambda: slots(rig) == 0)
        with pytest.raises(DependencyError, match="No space left"):
            await rig.worker.exclusion.probe()
        await rig.send(make_chunk(chunk_id="1-2"))
        await until(lambda: len(rig.messages(SCAN_PROGRESS, ChunkReleased)) == 3)
        assert set(rig.progress()) == {"ChunkReleased"}
        assert all("No space left" in m.reason for m in rig.messages(SCAN_PROGRESS, ChunkReleased))  # type: ignore[attr-defined] # another kind of message fails the test
        assert (len(rig.scanner.asked), rig.worker.alive) == (1, True)
        rig.scanner.broken, rig.scanner.script = "", (ASKED,)
        await until(lambda: slots(rig) == 1)
        await rig.worker.exclusion.probe()
        await rig.send(make_chunk(chunk_id="1-3"))
        await until(lambda: "ChunkScanned" in rig.progress())


async def test_worker_excluded_by_several_runs_counts_one_exclusion(make_chunk: MakeChunk) -> None:
    """Runs in several slots that cannot start at the same time are one exclusion."""
    fault = CannotStartError("Resource temporarily unavailable")
    async with rigged("until the gate opens", fault, slots=2) as rig:
        before = EXCLUSIONS._value.get()
        await rig.send(make_chunk(), make_chunk(chunk_id="1-1", first_address="127.9.2.0"))
        await until(lambda: rig.scanner.running == 2)
        rig.scanner.broken = str(fault)
        rig.scanner.gate.set()
        await until(lambda: len(rig.messages(SCAN_PROGRESS, ChunkReleased)) == 2)
        assert EXCLUSIONS._value.get() - before == 1


@pytest.mark.proves("F25", "G17")
async def test_worker_excluded_finishes_running_scans(make_chunk: MakeChunk) -> None:
    """A scan that runs beside one that could not start is finished."""
    async with rigged(*hosts(0, 1), "until the gate opens", *hosts(2, 3)) as rig:
        await rig.send(make_chunk(failures=1))
        await until(lambda: rig.messages(SCAN_RESULTS, HostScanned))
        rig.scanner.broken = "Resource temporarily unavailable"
        rig.scanner.script = (CannotStartError(rig.scanner.broken),)
        await rig.send(make_chunk(chunk_id="1-1", failures=1))
        await until(lambda: slots(rig) == 0)
        assert rig.scanner.running == 1
        rig.scanner.gate.set()
        await until(lambda: "ChunkScanned" in rig.progress())
        assert slots(rig) == 0


@pytest.mark.proves("F25")
async def test_worker_without_nmap_at_start_announces_no_slots(make_chunk: MakeChunk) -> None:
    """With nmap missing or too old the worker is alive, announces 0 slots, and releases every chunk until a check succeeds."""
    rig = Rig(ScriptedScanner(ASKED), slots=2, raw=True)
    rig.scanner.broken = "nmap 7.80 is too old"
    async with started(rig):
        await until(lambda: rig.messages(SCAN_WORKERS, WorkerReady))
        assert (slots(rig), rig.worker.alive) == (0, True)
        await rig.send(make_chunk())
        await until(lambda: rig.progress() == ["ChunkReleased"])
        rig.scanner.broken = ""
        await until(lambda: slots(rig) == 2)


@pytest.mark.proves("F25", "G17")
async def test_worker_three_failed_chunks_exclude_it(make_chunk: MakeChunk) -> None:
    """Each of three failures counts against its chunk; the worker takes no fourth chunk before a check succeeds."""
    async with rigged(ScanError("nmap exited with 1"), slots=1) as rig:
        rig.scanner.broken = "nmap exited with 1"
        for number in range(3):
            await rig.send(make_chunk(chunk_id=f"1-{number}"))
            await until(lambda: rig.progress().count("ChunkFailed") == number + 1)  # noqa: B023 # called before the next turn
        await until(lambda: slots(rig) == 0)
        await rig.send(make_chunk(chunk_id="1-3"))
        await until(lambda: "ChunkReleased" in rig.progress())
        assert len(rig.scanner.asked) == 3


@pytest.mark.proves("F25", "G17")
async def test_worker_third_failed_chunk_excludes_it_before_the_next_starts(make_chunk: MakeChunk) -> None:
    """A chunk that waits for the slot of the third failed one is released without an nmap, although reports cannot be sent yet."""
    async with rigged(ScanError("nmap exited with 1"), slots=1) as rig:
        await until(lambda: rig.messages(SCAN_WORKERS, WorkerReady))
        rig.scanner.broken = "nmap exited with 1"
        rig.bus.broker.leaderless = {(SCAN_PROGRESS.name, partition) for partition in range(SCAN_PROGRESS.partitions)}
        await rig.send(*(make_chunk(chunk_id=f"1-{number}", failures=1) for number in range(4)))
        await until(lambda: slots(rig) == 0)
        rig.bus.broker.leaderless.clear()
        await until(lambda: "ChunkReleased" in rig.progress())
        assert len(rig.scanner.asked) == 3


@pytest.mark.proves("F25", "G17")
async def test_worker_failed_chunks_exclude_it_for_the_shortest_time(make_chunk: MakeChunk) -> None:
    """While trial runs succeed, further failed chunks do not exclude the worker for longer: their targets may be the cause."""
    async with rigged(ScanError("nmap crashed"), slots=1) as rig:
        pauses = []
        for number in range(9):
            await rig.send(make_chunk(chunk_id=f"1-{number}"))
            await until(lambda: rig.progress().count("ChunkFailed") == number + 1)  # noqa: B023 # called before the next turn
            if number % FAILURES == FAILURES - 1:
                await until(lambda: slots(rig) == 0)
                pauses.append(rig.worker.exclusion._pause)
                await until(lambda: slots(rig) == 1)
        assert pauses == [SHORTEST_SECONDS] * 3


@pytest.mark.parametrize("ends", ["one chunk", "a success between", "one nmap", "policy", "attempts", "no route"])
async def test_worker_target_failures_do_not_exclude_it(make_chunk: MakeChunk, ends: str) -> None:
    """Failures of one chunk, with a success in between, in one nmap, without an nmap or route, or on later attempts do not."""
    disallowed = ScanPolicy(scripts=("http-grep",), ports="22,80")
    async with rigged(ScanError("nmap exited with 1"), slots=1) as rig:
        if ends == "one nmap":
            await rig.send(*(make_chunk(chunk_id=f"1-{n}", first_address=f"127.9.{n}.0") for n in range(4)))
            await until(lambda: rig.progress().count("ChunkFailed") == 4)
        for number in range(0 if ends == "one nmap" else 4):
            succeeds = ends == "a success between" and number == 2
            kind = NoRouteError if ends == "no route" else ScanError
            rig.scanner.script = (ASKED,) if succeeds else (kind("nmap exited with 1"),)
            chunk_id = "1-0" if ends == "one chunk" else f"1-{number}"
            attempt = {"one chunk": number + 1, "attempts": 2}.get(ends, 1)
            chunk = make_chunk(chunk_id=chunk_id, attempt=attempt, limit=2)
            await rig.send(chunk.model_copy(update={"policy": disallowed} if ends == "policy" else {}))
            await until(lambda: len(rig.progress()) == number + 1)  # noqa: B023 # called before the next turn
        failed = rig.messages(SCAN_PROGRESS, ChunkFailed)
        assert {m.no_route for m in failed} == {ends == "no route"}  # type: ignore[attr-defined] # another kind of message fails the test
        announced = len(rig.messages(SCAN_WORKERS, WorkerReady))
        await until(lambda: len(rig.messages(SCAN_WORKERS, WorkerReady)) >= announced + 2)
        assert {m.slots for m in rig.messages(SCAN_WORKERS, WorkerReady)} == {1}  # type: ignore[attr-defined] # another kind of message fails the test


async def test_stop_with_grace_finishes_running_scans(make_chunk: MakeChunk) -> None:
    """A worker that shuts down announces no slots, accepts no tasks, and lets a scan finish within the grace period."""
    async with rigged(*hosts(0, 1), "until the gate opens", *hosts(2, 3)) as rig:
        await rig.send(make_chunk())
        await until(lambda: rig.messages(SCAN_RESULTS, HostScanned))
        leaving = asyncio.create_task(rig.worker.stop(20))
        await until(lambda: rig.bus.messages(SCAN_WORKERS)[-1].slots == 0)
        rig.scanner.gate.set()
        await leaving
        assert rig.last().outcomes == "aaaa"  # type: ignore[attr-defined] # another kind of message fails the test
        await rig.send(make_chunk(chunk_id="1-9"))
        await until(lambda: "ChunkReleased" in rig.progress())


async def test_stop_of_an_idle_worker_releases_a_late_task(make_chunk: MakeChunk) -> None:
    """A task that was dispatched before the worker's last announcement was handled does not wait for its lease."""
    async with rigged() as rig:
        await until(lambda: rig.messages(SCAN_WORKERS, WorkerReady))

        async def stop() -> None:
            await rig.worker.stop(20)
            await rig.tasks.stop()

        leaving = asyncio.create_task(stop())
        await until(lambda: slots(rig) == 0)
        await asyncio.sleep(0.2)
        await rig.send(make_chunk())
        await leaving
        assert rig.progress() == ["ChunkReleased"]


async def test_stop_without_grace_releases_chunks(make_chunk: MakeChunk) -> None:
    """Without grace every chunk, running or waiting, is released with its map."""
    async with rigged(*hosts(0), FOREVER, slots=1) as rig:
        await rig.send(make_chunk(), make_chunk(chunk_id="1-1"))
        await until(lambda: rig.messages(SCAN_RESULTS, HostScanned))
        await rig.worker.stop(0)
        released = {m.chunk_id: m.outcomes for m in rig.messages(SCAN_PROGRESS, ChunkReleased)}  # type: ignore[attr-defined] # another kind of message fails the test
        assert released == {"1-0": "a...", "1-1": "...."}
        assert rig.scanner.closed == 1


async def test_worker_spans_belong_to_the_tasks_trace(make_chunk: MakeChunk) -> None:
    """The scan of a chunk and its nmap are spans in the task's trace, and their messages carry it on."""
    trace = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    with recording() as exporter:
        async with rigged(*hosts(0, 1, 2, 3)) as rig:
            await rig.send(make_chunk().model_copy(update={"traceparent": trace}))
            await until(lambda: len(exporter.get_finished_spans()) == 2)
        nmap, scan = exporter.get_finished_spans()
        (scanned,) = rig.messages(SCAN_RESULTS, ChunkScanned)
    assert (nmap.name, scan.name, dict(scan.attributes or {})) == ("nmap", "scan chunk", {"scanfleet.chunk.id": "1-0"})
    assert scan.parent is not None
    assert nmap.parent is not None
    assert f"{scan.parent.trace_id:032x}-{scan.parent.span_id:016x}" == trace[3:-3]
    assert nmap.parent.span_id == ids(scan).span_id
    assert (scanned.traceparent or "")[36:52] == f"{ids(scan).span_id:016x}"


async def test_worker_messages_continue_the_trace(make_chunk: MakeChunk) -> None:
    """Every message about a chunk belongs to the trace of its task."""
    trace = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    async with rigged(*hosts(0, 1, 2, 3)) as rig:
        await rig.send(make_chunk().model_copy(update={"traceparent": trace}))
        await until(lambda: "ChunkScanned" in rig.progress())
        messages = rig.bus.messages(SCAN_PROGRESS) + rig.bus.messages(SCAN_RESULTS)
        assert {message.traceparent for message in messages} == {trace}
