"""Chunks that share one nmap, with a scanner that is advanced step by step and an in-memory bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanfleet.contracts.messages import (
    ChunkClaimed,
    ChunkFailed,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    HostScanned,
    Message,
    Run,
    ScanChunk,
)
from scanfleet.contracts.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, Topic
from scanfleet.errors import DependencyError
from scanfleet.scanning.policy import Preset, fill_in
from scanfleet.scanning.ports import MAX_TEXT, PortSet
from scanfleet.scanning.targets import TargetRules
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.waiting import until
from scanner_worker.domain.ports import Found
from scanner_worker.domain.scan import (
    CannotStartError,
    Host,
    KilledByGuardError,
    NoRouteError,
    ScanError,
    arguments,
    detection_of,
    permit,
)
from scanner_worker.handlers import batch
from scanner_worker.handlers.batch import Abilities, Batch
from scanner_worker.handlers.chunk import CLAIM_SECONDS, ChunkScan

MakeChunk = Callable[..., ScanChunk]

RULES = TargetRules((ip_network("127.0.0.0/8"), ip_network("::1/128")), (ip_network("127.9.9.9/32"),))
ABILITIES = Abilities(slots=1, raw=True, rules=RULES, attempt_seconds=60)


def addresses(argv: Sequence[str]) -> list[str]:
    """Return every address on nmap's command line."""
    return [str(address) for target in argv[argv.index("--") + 1 :] for address in ip_network(target)]


class Stepping:
    """Yields its targets in order, one per permitted step, and then raises `fault` if it is set.

    Attributes:
        late: addresses that it reports as timed out.
        down: addresses that it reports as down.
        silent: addresses that it reports as up, with ports that do not answer.
        routed: whether this machine has a route.
    """

    version = "7.95"

    def __init__(self) -> None:
        self.argvs: list[Sequence[str]] = []
        self.runs: list[list[str]] = []
        self.running = 0
        self.most = 0
        self.fault: Exception | None = None
        self.late: set[str] = set()
        self.down: set[str] = set()
        self.silent: set[str] = set()
        self.routed = True
        self._steps = asyncio.Semaphore(0)

    @property
    def asked(self) -> list[list[str]]:
        return [addresses(argv) for argv in self.argvs]

    @property
    def yielded(self) -> list[str]:
        return [address for run in self.runs for address in run]

    def let(self, steps: int = 1_000) -> None:
        for _ in range(steps):
            self._steps.release()

    async def scan(
        self,
        arguments: Sequence[str],
        ports: PortSet,  # noqa: ARG002 # the port's signature
    ) -> AsyncGenerator[Found]:
        self.argvs.append(arguments)
        self.runs.append(yielded := [])
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for address in addresses(arguments):
                await self._steps.acquire()
                if self.fault:
                    raise self.fault
                yielded.append(address)
                reason = b"no-response" if address in self.down | self.silent else b"reset"
                yield [(Host(address, address not in self.down, address in self.late, 2, {reason}, b""), ())]
        finally:
            await asyncio.sleep(0)  # killing is not immediate
            self.running -= 1

    def source(self, address: str) -> str | None:
        if not self.routed:
            return None
        return address if ":" in address else address.rpartition(".")[0] + ".250"

    async def ranked(self, ports: PortSet) -> PortSet:
        """Return ports as if the most common port were 1, the next 2 and so on; above rank 4,096 every eighth port."""
        if ports.above < 4_096:
            return PortSet(tcp=((ports.above + 1, ports.top),))
        return PortSet(tcp=tuple((8 * rank, 8 * rank) for rank in range(ports.above - 4_095, ports.top - 4_095)))

    def hold(self, seconds: float) -> None: ...

    async def check(self) -> None: ...


class Rig:
    """Chunks in one slot."""

    def __init__(self, chunks: Sequence[ScanChunk], abilities: Abilities = ABILITIES) -> None:
        self.scanner = Stepping()
        self.bus = MemoryBus()
        self.batch = Batch(chunks, abilities, self.scanner)
        self.scans = [ChunkScan(chunk, abilities, self.bus, lambda *_: None) for chunk in chunks]

    async def run(self) -> None:
        members = (scan.run(share) for scan, share in zip(self.scans, self.batch.shares, strict=True))
        await asyncio.gather(self.batch.run(), *members)

    def ends(self) -> dict[str, tuple[type[Message], str]]:
        """The kind of each chunk's final report, and its map, by chunk id."""
        return {m.chunk_id: (type(m), m.outcomes) for m in self.final_reports()}

    def final_reports(self) -> list[ChunkScanned | ChunkFailed | ChunkReleased]:
        progress = self.bus.messages(SCAN_PROGRESS)
        return [m for m in progress if isinstance(m, ChunkScanned | ChunkFailed | ChunkReleased)]

    def hosts(self) -> list[tuple[str, str]]:
        return [(m.chunk_id, m.address) for m in self.bus.messages(SCAN_RESULTS) if isinstance(m, HostScanned)]

    def fail_publish(self, fault: Callable[[Message], Exception | None]) -> None:
        """Let the bus raise the exception that `fault` returns for a message."""
        publish = self.bus.publish

        async def failing(topic: Topic, messages: Iterable[Message]) -> None:
            for message in messages:
                if error := fault(message):
                    raise error
            await publish(topic, messages)

        self.bus.publish = failing  # type: ignore[method-assign] # simulates a failure of the broker


@asynccontextmanager
async def scanning(*chunks: ScanChunk, abilities: Abilities = ABILITIES) -> AsyncIterator[Rig]:
    rig = Rig(chunks, abilities)
    running = asyncio.create_task(rig.run())
    try:
        yield rig
        async with asyncio.timeout(20):
            await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def make(make_chunk: MakeChunk) -> MakeChunk:
    """Return a factory of chunks `1-number` with two addresses, 127.9.1.number0 and the next."""

    def chunk(number: int, **fields: object) -> ScanChunk:
        return make_chunk(
            **{"chunk_id": f"1-{number}", "first_address": f"127.9.1.{number}0", "outcomes": ".."} | fields
        )

    return chunk


async def test_batch_chunks_have_separate_reports(make: MakeChunk) -> None:
    """One nmap scans the blanks of all chunks, and each chunk reports its own hosts and map."""
    async with scanning(make(1), make(2, outcomes="x."), make(3)) as rig:
        rig.scanner.let()
    assert rig.scanner.asked == [["127.9.1.10", "127.9.1.11", "127.9.1.21", "127.9.1.30", "127.9.1.31"]]
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkScanned, "xa"), "1-3": (ChunkScanned, "aa")}
    assert sorted(rig.hosts()) == [
        ("1-1", "127.9.1.10"),
        ("1-1", "127.9.1.11"),
        ("1-2", "127.9.1.21"),
        ("1-3", "127.9.1.30"),
        ("1-3", "127.9.1.31"),
    ]


async def test_batch_finished_hosts_are_published_immediately(make: MakeChunk) -> None:
    """Finished hosts of one chunk are published while the same nmap scans the others."""
    async with scanning(make(1), make(2)) as rig:
        rig.scanner.let(1)
        await until(rig.hosts)
        assert rig.scanner.running == 1
        rig.scanner.let()


@pytest.mark.proves("G8")
async def test_batch_stopped_chunk_removes_its_targets(make: MakeChunk) -> None:
    """Stopping a chunk ends nmap; the next nmap gets the remaining addresses of the others, and none twice."""
    async with scanning(make(1), make(2), make(3)) as rig:
        rig.scanner.let(3)
        await until(lambda: len(rig.hosts()) == 3)
        rig.scans[1].stop("cancelled")
        await until(rig.final_reports)
        assert rig.ends() == {"1-2": (ChunkReleased, "a.")}
        rig.scanner.let()
    assert rig.scanner.asked[1:] == [["127.9.1.30", "127.9.1.31"]]
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkReleased, "a."), "1-3": (ChunkScanned, "aa")}
    assert sorted(set(rig.scanner.yielded)) == sorted(rig.scanner.yielded)
    assert rig.scanner.most == 1


async def test_batch_finished_chunk_does_not_stop_nmap(make: MakeChunk) -> None:
    """A chunk that leaves after all of its addresses are finished does not stop nmap."""
    async with scanning(make(1), make(2)) as rig:
        rig.scanner.let(2)
        await until(lambda: len(rig.hosts()) == 2)
        rig.scans[0].stop("cancelled")
        await until(rig.final_reports)
        rig.scanner.let()
    assert len(rig.scanner.asked) == 1
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkScanned, "aa")}


async def test_batch_all_stopped_starts_no_nmap(make: MakeChunk) -> None:
    """If all chunks are stopped, nmap is killed and not restarted; each chunk reports its own map."""
    async with scanning(make(1), make(2), make(3)) as rig:
        rig.scanner.let(1)
        await until(rig.hosts)
        for scan in rig.scans:
            scan.stop("the worker is shutting down")
            scan.stop("twice")
    assert len(rig.scanner.asked) == 1
    assert rig.ends() == {"1-1": (ChunkReleased, "a."), "1-2": (ChunkReleased, ".."), "1-3": (ChunkReleased, "..")}


async def test_batch_chunk_stopped_before_start_is_skipped(make: MakeChunk) -> None:
    """A chunk that is stopped before it starts does not keep the others from being scanned."""
    rig = Rig([make(1), make(2)])
    rig.scans[0].stop("cancelled")
    rig.scanner.let()
    async with asyncio.timeout(20):
        await rig.run()
    assert rig.scanner.asked == [["127.9.1.20", "127.9.1.21"]]
    assert rig.ends() == {"1-1": (ChunkReleased, ".."), "1-2": (ChunkScanned, "aa")}


@pytest.mark.proves("A3", "G12")
async def test_batch_rules_apply_to_each_chunk(make: MakeChunk) -> None:
    """Refused addresses never reach nmap; a chunk with only refused addresses ends without it, and the others are scanned."""
    partly, wholly = make(2, first_address="127.9.9.8"), make(3, first_address="127.9.9.9", outcomes=".")
    async with scanning(make(1), partly, wholly) as rig:
        rig.scanner.let()
    assert rig.scanner.asked == [["127.9.1.10", "127.9.1.11", "127.9.9.8"]]
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkScanned, "ar"), "1-3": (ChunkScanned, "r")}


async def test_batch_failed_nmap_fails_unfinished_chunks(make: MakeChunk) -> None:
    """If nmap crashes, chunks whose hosts are complete are scanned; the others fail with the reason, and nmap is not restarted."""
    async with scanning(make(1), make(2), make(3)) as rig:
        rig.scanner.let(3)
        await until(lambda: len(rig.hosts()) == 3)
        rig.scanner.fault = ScanError("nmap exited with 1")
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkFailed, "a."), "1-3": (ChunkFailed, "..")}
    assert {m.reason for m in rig.final_reports() if isinstance(m, ChunkFailed)} == {"nmap exited with 1"}
    assert len(rig.scanner.asked) == 1
    assert not rig.batch.failed


async def test_batch_error_of_one_chunk_is_isolated(make: MakeChunk) -> None:
    """An error while publishing one chunk's hosts fails that chunk, and the others are finished."""
    async with scanning(make(1), make(2)) as rig:
        rig.fail_publish(lambda m: ValueError("oops") if isinstance(m, HostScanned) and m.chunk_id == "1-1" else None)
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkFailed, ".."), "1-2": (ChunkScanned, "aa")}


@pytest.mark.proves("F8", "G5")
async def test_batch_unacknowledged_chunk_leaves_within_its_lease(make: MakeChunk) -> None:
    """A chunk whose heartbeats are not acknowledged leaves within its lease, and the others continue."""
    unavailable = True
    async with scanning(make(1, lease_seconds=3.0), make(2)) as rig:
        rig.fail_publish(lambda m: DependencyError("unavailable") if unavailable and m.subject == "chunk/1-1" else None)
        await until(lambda: len(rig.scanner.asked) == 2, 3.0)
        assert rig.scanner.asked[1] == ["127.9.1.20", "127.9.1.21"]
        unavailable = False
        await until(rig.final_reports)
        assert rig.ends() == {"1-1": (ChunkReleased, "..")}
        rig.scanner.let()
    assert rig.ends()["1-2"] == (ChunkScanned, "aa")


async def test_batch_chunks_have_separate_heartbeats(make: MakeChunk) -> None:
    """While one nmap scans several chunks, each of them reports its own map every second."""
    async with scanning(make(1), make(2)) as rig:
        rig.scanner.let(1)

        def beats() -> dict[str, str]:
            progress = rig.bus.messages(SCAN_PROGRESS)
            return {m.chunk_id: m.outcomes for m in progress if isinstance(m, ChunkProgressed)}

        await until(lambda: len(beats()) == 2)
        assert beats() == {"1-1": "a.", "1-2": ".."}
        rig.scanner.let()


async def test_batch_unpublished_hosts_apply_backpressure(make: MakeChunk) -> None:
    """While one chunk's hosts cannot be published, no further output of nmap is read for any chunk."""
    unavailable = True
    async with scanning(make(1, outcomes="....."), make(2)) as rig:
        rig.fail_publish(
            lambda m: DependencyError("unavailable") if unavailable and isinstance(m, HostScanned) else None
        )
        rig.scanner.let()
        await until(lambda: len([m for m in rig.bus.messages(SCAN_PROGRESS) if isinstance(m, ChunkProgressed)]) >= 2)
        assert len(rig.scanner.yielded) == 2
        unavailable = False
    assert rig.ends() == {"1-1": (ChunkScanned, "aaaaa"), "1-2": (ChunkScanned, "aa")}


async def test_batch_slot_seconds_add_up(make: MakeChunk) -> None:
    """The slot seconds that the chunks of one nmap report add up to the time in the slot."""
    began = asyncio.get_running_loop().time()
    async with scanning(make(1), make(2), make(3)) as rig:
        rig.scanner.let(1)
        await until(rig.hosts)
        await asyncio.sleep(0.2)
        rig.scans[0].stop("cancelled")
        await until(rig.final_reports)
        await asyncio.sleep(0.2)
        rig.scanner.let()
    whole = asyncio.get_running_loop().time() - began
    seconds = {m.chunk_id: m.slot_seconds for m in rig.final_reports()}
    assert 0.4 <= sum(seconds.values()) <= whole
    assert seconds["1-1"] >= 0.2 / 3
    assert seconds["1-2"] >= 0.2 / 3 + 0.2 / 2


BRIEF = Abilities(slots=1, raw=True, rules=RULES, attempt_seconds=0.3)


async def test_scan_of_several_addresses_past_its_time_is_released_as_too_slow(make: MakeChunk) -> None:
    """nmap is stopped once after the timeout; finished hosts count, and the rest is released with the timeout as reason."""
    async with scanning(make(1), make(2), make(3), abilities=replace(BRIEF, attempt_seconds=2)) as rig:
        rig.scanner.let(3)
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkReleased, "a."), "1-3": (ChunkReleased, "..")}
    released = [m for m in rig.final_reports() if isinstance(m, ChunkReleased)]
    assert all(m.too_slow and "after 2 s" in m.reason for m in released)
    assert (len(rig.scanner.asked), rig.scanner.running) == (1, 0)


async def test_scan_of_several_addresses_has_one_time_limit_for_all_its_nmaps(make: MakeChunk) -> None:
    """A chunk that leaves causes another nmap for the rest, and both share one timeout."""
    began = asyncio.get_running_loop().time()
    async with scanning(make(1), make(2), abilities=replace(BRIEF, attempt_seconds=3)) as rig:
        await asyncio.sleep(2)
        rig.scans[0].stop("cancelled")
        await until(lambda: len(rig.scanner.asked) == 2)
    assert asyncio.get_running_loop().time() - began < 4.8  # a limit of its own would end after 5 seconds
    assert [m.too_slow for m in rig.final_reports() if isinstance(m, ChunkReleased)] == [False, True]


async def test_scan_of_a_single_address_past_its_host_timeout_is_timed_out(
    make: MakeChunk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker ends a single address as timed out if nmap does not, since its host timeout excludes host discovery."""
    monkeypatch.setattr(batch, "SLACK_SECONDS", 0.1)
    async with scanning(make(1, outcomes="a.", policy={"host_timeout": 1}), abilities=BRIEF) as rig:
        pass
    assert rig.ends() == {"1-1": (ChunkScanned, "at")}
    assert rig.hosts() == [("1-1", "127.9.1.11")]
    assert rig.scanner.running == 0


@pytest.mark.proves("F19")
@pytest.mark.parametrize(("host_timeout", "ends"), [(60, (ChunkReleased, "a.a")), (1, (ChunkScanned, "ata"))])
async def test_scan_of_hosts_that_time_out_early_leaves_them_blank(
    make: MakeChunk, host_timeout: int, ends: tuple[type[Message], str]
) -> None:
    """After a forward step of the clock nmap ends hosts before their host timeout: these are not done, all others are."""
    now = asyncio.get_running_loop().time
    async with scanning(make(1, outcomes="...", policy={"host_timeout": host_timeout})) as rig:
        rig.scanner.late = {"127.9.1.11"}
        rig.scanner.let(1)
        await until(rig.hosts)
        passed = now() + 1
        await until(lambda: now() >= passed)
        rig.scanner.let()
    assert rig.ends() == {"1-1": ends}
    (end,) = rig.final_reports()
    if isinstance(end, ChunkReleased):
        assert not end.too_slow
        assert end.reason == "nmap ended hosts before their timeout of 60 s: the clock was set forward"


@pytest.mark.parametrize(("routed", "ends"), [(False, (ChunkFailed, "a..")), (True, (ChunkScanned, "ads"))])
async def test_scan_of_hosts_without_an_answer_leaves_them_blank_without_a_route(
    make: MakeChunk, *, routed: bool, ends: tuple[type[Message], str]
) -> None:
    """A connect scan reports addresses as down or silent to which the worker has no route: another worker may have one."""
    async with scanning(make(1, outcomes="...")) as rig:
        rig.scanner.down, rig.scanner.silent, rig.scanner.routed = {"127.9.1.11"}, {"127.9.1.12"}, routed
        rig.scanner.let()
    assert rig.ends() == {"1-1": ends}
    (end,) = rig.final_reports()
    if isinstance(end, ChunkFailed):
        assert end.no_route
        assert end.reason == "nmap got no answer from 127.9.1.11, and the worker has no route to it"


@pytest.mark.parametrize("skips", [True, False])
async def test_scan_with_a_clock_step_and_without_a_route_is_released(make: MakeChunk, *, skips: bool) -> None:
    """Hosts that nmap ended early are scanned again at no cost, also if it skips or does not reach others."""
    async with scanning(make(1, outcomes="...", policy={"host_timeout": 60})) as rig:
        rig.scanner.late, rig.scanner.routed = {"127.9.1.10"}, False
        if not skips:
            rig.scanner.down = {"127.9.1.11"}
        rig.scanner.let(1)
        await until(lambda: rig.scanner.yielded)
        rig.scanner.fault = NoRouteError("failed to determine route") if skips else None
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkReleased, "..." if skips else "..a")}


async def test_scan_of_a_part_of_the_top_ports_names_them(make: MakeChunk) -> None:
    """The worker looks up the 51st to the 100th most common ports, which nmap has no option for."""
    async with scanning(make(1, ports="top:51-100")) as rig:
        rig.scanner.fault = ScanError("two ports are not fifty")
        rig.scanner.let()
    (argv,) = rig.scanner.argvs
    assert argv[argv.index("-p") + 1] == "51-100"


async def test_scan_of_a_long_part_of_the_top_ports_names_them(make: MakeChunk) -> None:
    """The list of the 4,097th to the 8,192nd most common ports may be longer than the ports of a policy."""
    async with scanning(make(1, ports="top:4097-8192")) as rig:
        rig.scanner.fault = ScanError("two ports are not four thousand")
        rig.scanner.let()
    (argv,) = rig.scanner.argvs
    assert len(argv[argv.index("-p") + 1]) > MAX_TEXT


async def test_report_lists_the_common_ports_by_number(make: MakeChunk) -> None:
    """The final report of a chunk of the most common ports has their numbers; that of other ports has none."""
    reported = []
    for ports in ("top:2", "top:51-52", "22,80"):
        async with scanning(make(1, outcomes="a.", ports=ports)) as rig:
            rig.scanner.let()
        reported += [each.common_ports for each in rig.bus.messages(SCAN_PROGRESS) if isinstance(each, ChunkScanned)]
    assert reported == ["1-2", "51-52", ""]


async def test_report_has_the_digest_of_the_arguments_without_targets(make: MakeChunk) -> None:
    """Chunks of different networks have the same digest of nmap's arguments; a chunk without blanks has none."""
    reported, started = [], []
    for number, outcomes in ((1, "a."), (2, "a."), (3, "ad")):
        async with scanning(make(number, outcomes=outcomes)) as rig:
            rig.scanner.let()
        reported += [each.arguments for each in rig.bus.messages(SCAN_PROGRESS) if isinstance(each, ChunkScanned)]
        started += [argv[: argv.index("--")] for argv in rig.scanner.argvs]
    digests = [sha256("\0".join(options).encode()).hexdigest() for options in started]
    assert reported == [*digests, ""]
    assert digests[0] == digests[1]


async def test_reports_have_how_nmap_ran(make: MakeChunk) -> None:
    """The claim and the final report have nmap's version and arguments, source address, rules and time since its start."""
    abilities = replace(ABILITIES, egress="192.0.2.1")
    async with scanning(make(1, outcomes="a."), abilities=abilities) as rig:
        await until(lambda: rig.bus.messages(SCAN_PROGRESS))
        rig.scanner.let()
    claimed, *_, ended = rig.bus.messages(SCAN_PROGRESS)
    assert isinstance(claimed, ChunkClaimed)
    assert isinstance(ended, ChunkScanned)
    source = f"{make(1).first_address.rpartition('.')[0]}.250"
    run = Run(nmap="7.95", arguments=ended.arguments, source=source, egress="192.0.2.1", rules=RULES.digest)
    began = []
    for reported in (claimed.run, ended.run):
        assert reported is not None
        assert reported.model_copy(update={"began": None}) == run
        began.append(reported.began or 0.0)
    assert CLAIM_SECONDS / 2 < began[0] < began[1]


@pytest.mark.parametrize(
    ("fault", "kind", "started"),
    [
        (ScanError("nmap crashed"), ChunkFailed, True),
        (KilledByGuardError("the event loop was blocked"), ChunkReleased, True),
        (CannotStartError("no process"), ChunkReleased, False),
    ],
)
async def test_report_of_a_failed_nmap_has_what_it_probed_only_if_it_was_started(
    make: MakeChunk, fault: Exception, kind: type[Message], *, started: bool
) -> None:
    """An nmap that may have sent packets is reported; one that could not be started is not."""
    async with scanning(make(1)) as rig:
        rig.scanner.fault = fault
        rig.scanner.let()
    [ended] = rig.final_reports()
    assert (type(ended), ended.run is not None) == (kind, started)
    probes = ("syn", detection_of(make(1).policy), "default") if started else (None, "", "")
    assert (ended.technique, ended.detection, ended.discovery) == probes


async def test_report_after_a_later_nmap_cannot_start_has_what_the_first_one_probed(make: MakeChunk) -> None:
    """The nmap that ran before another chunk left may have sent packets; the report is still a release."""
    async with scanning(make(1), make(2)) as rig:
        await until(lambda: rig.scanner.running)
        rig.scanner.fault = CannotStartError("no process")
        rig.scans[0].stop("the job was cancelled")
        await until(lambda: len(rig.scanner.argvs) == 2)
        rig.scanner.let()
    ended = rig.final_reports()
    assert [type(each) for each in ended] == [ChunkReleased, ChunkReleased]
    for each in ended:
        assert each.run is not None
        assert (each.run.nmap, each.technique, each.discovery) == ("7.95", "syn", "default")


async def test_claim_has_what_is_probed(make: MakeChunk) -> None:
    """A worker that is lost after its claim has reported its probes."""
    async with scanning(make(1)) as rig:
        await until(lambda: rig.bus.messages(SCAN_PROGRESS))
        rig.scanner.let()
    claimed, *_, ended = rig.bus.messages(SCAN_PROGRESS)
    assert isinstance(claimed, ChunkClaimed)
    assert isinstance(ended, ChunkScanned)
    facts = {"technique", "scripts", "common_ports", "detection", "discovery"}
    assert claimed.model_dump(include=facts) == ended.model_dump(include=facts)


async def test_scan_of_a_single_address_is_not_bound_by_the_limit_for_several(make: MakeChunk) -> None:
    """A single address, blank or within the chunk's limit, is scanned without the timeout for several."""
    for chunk in (make(1, outcomes="a.d"), make(1, outcomes="...", limit=1)):
        async with scanning(chunk, abilities=BRIEF) as rig:
            await asyncio.sleep(1.0)
            assert rig.scanner.running == 1
            rig.scanner.let()
        assert len(rig.scanner.asked) == len(rig.scanner.yielded) == 1


async def test_chunk_with_a_limit_scans_that_many_blanks_and_is_released(make: MakeChunk) -> None:
    """Only the first `limit` blanks reach nmap; the chunk is released without a reason and is not marked as too slow."""
    async with scanning(make(1, outcomes="a...d..", limit=3)) as rig:
        rig.scanner.let()
    assert rig.scanner.asked == [["127.9.1.11", "127.9.1.12", "127.9.1.13"]]
    (end,) = rig.final_reports()
    assert isinstance(end, ChunkReleased)
    assert (end.outcomes, end.reason, end.too_slow) == ("aaaad..", "", False)


async def test_chunk_with_a_limit_that_leaves_no_blank_is_scanned(make: MakeChunk) -> None:
    """A limit that covers all blanks has no effect, and refused addresses do not count."""
    async with scanning(make(1, first_address="127.9.9.8", outcomes="....", limit=3)) as rig:
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkScanned, "araa")}


async def test_chunk_with_a_limit_fails_for_a_missing_address_within_it(make: MakeChunk) -> None:
    """An address within the limit that nmap omits fails the chunk; addresses beyond it do not."""

    class Silent(Stepping):
        async def scan(self, *_: object) -> AsyncGenerator[Found]:
            yield [(Host("127.9.1.10", True, False, 2, {b"reset"}, b""), ())]

    rig = Rig([make(1, outcomes="....", limit=2)])
    rig.batch = Batch([scan.chunk for scan in rig.scans], ABILITIES, Silent())
    async with asyncio.timeout(20):
        await rig.run()
    (end,) = rig.final_reports()
    assert isinstance(end, ChunkFailed)
    assert (end.outcomes, end.reason) == ("a...", "1 addresses are missing from nmap's output")


@pytest.mark.parametrize("fault", [CannotStartError("no space left"), KilledByGuardError("stood still")])
async def test_failure_of_the_worker_releases_its_chunks(make: MakeChunk, fault: Exception) -> None:
    """A failure of the worker counts against no chunk, and the reason is reported."""
    async with scanning(make(1), make(2)) as rig:
        rig.scanner.fault = fault
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkReleased, ".."), "1-2": (ChunkReleased, "..")}
    assert {(m.reason, m.too_slow) for m in rig.final_reports() if isinstance(m, ChunkReleased)} == {
        (str(fault), False)
    }


async def test_batch_unrequested_host_fails_all_chunks(make: MakeChunk) -> None:
    """A host that is not a target of any chunk fails the run."""

    class Lying(Stepping):
        async def scan(self, *_: object) -> AsyncGenerator[Found]:
            yield [(Host("127.9.1.99", True, False, 2, {b"reset"}, b""), ())]

    rig = Rig([make(1), make(2)])
    rig.batch = Batch([scan.chunk for scan in rig.scans], ABILITIES, Lying())
    async with asyncio.timeout(20):
        await rig.run()
    assert rig.ends() == {"1-1": (ChunkFailed, ".."), "1-2": (ChunkFailed, "..")}
    assert all("127.9.1.99" in getattr(words, "reason", "") for words in rig.final_reports())
    assert rig.hosts() == []


@pytest.mark.proves("G12")
@settings(deadline=None, max_examples=30)  # each example runs an event loop
@given(
    maps=st.lists(
        st.text(alphabet=".x", min_size=1, max_size=12).filter(lambda text: "." in text), min_size=1, max_size=8
    ),
    base=st.sampled_from(["127.9.9.0", "::1"]),
    leaver=st.integers(0, 7),
    steps=st.integers(0, 20),
)
def test_batch_command_line_has_only_permitted_targets(maps: list[str], base: str, leaver: int, steps: int) -> None:
    """Before and after a chunk leaves, the command line has the policy's arguments and only the permitted unfinished addresses."""
    policy = fill_in(Preset.QUICK, {"ports": "22,80"})
    chunks = []
    first = ip_address(base)
    for number, outcomes in enumerate(maps):
        own = {"chunk_id": f"1-{number}", "first_address": str(first), "outcomes": outcomes}
        fixed = {
            "job_id": 1,
            "attempt": 1,
            "worker_id": "w",
            "user_id": 7,
            "lease_seconds": 10,
            "estimate_seconds": 0.2,
        }
        chunks.append(ScanChunk.model_validate(own | fixed | {"policy": policy, "ports": policy.ports}))
        first += len(outcomes)

    async def run() -> Stepping:
        rig = Rig(chunks)
        running = asyncio.create_task(rig.run())
        rig.scanner.let(steps)
        for _ in range(60):
            await asyncio.sleep(0)
        rig.scans[leaver % len(chunks)].stop("cancelled")
        for _ in range(30):
            await asyncio.sleep(0)
        rig.scanner.let()
        await running
        return rig.scanner

    scanner = asyncio.run(run())
    plain = arguments(chunks[0], chunks[0].policy.port_set, [ip_network(base)], raw=True)
    line, left = plain[: plain.index("--")], chunks[leaver % len(chunks)].chunk_id
    permitted: dict[str, set[str]] = {}
    for chunk in chunks:
        codes = permit(chunk, RULES, raw=True).outcomes
        begin = ip_address(chunk.first_address)
        permitted[chunk.chunk_id] = {str(begin + index) for index, code in enumerate(codes) if code == "."}
    wanted = set[str]().union(*permitted.values())
    for argv, yielded in zip(scanner.argvs, scanner.runs, strict=True):
        assert argv[: argv.index("--")] == line
        asked = addresses(argv)
        assert len(set(asked)) == len(asked)
        assert set(asked) <= wanted
        wanted -= permitted[left] | set(yielded)  # only the first nmap may have the addresses of the chunk that left
    assert len(scanner.argvs) <= 2


async def test_share_missing_host_fails_with_nmap(make: MakeChunk) -> None:
    """A share fails when nmap ends successfully without its host, and so does the run."""

    class Silent(Stepping):
        async def scan(self, *_: object) -> AsyncGenerator[Found]:
            nothing: Sequence[Found] = ()
            for hosts in nothing:
                yield hosts

    batch = Batch([make(1)], ABILITIES, Silent())
    running = asyncio.create_task(batch.run())
    (share,) = batch.shares
    with pytest.raises(ScanError, match="2 addresses are missing"):
        async with share, aclosing(share.scan("..")) as found:
            assert [hosts async for hosts in found] == []
    await running
    assert (batch.finished, batch.failed) == (False, True)
