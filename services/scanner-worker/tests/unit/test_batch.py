"""Chunks that one nmap scans, with a scanner that goes as far as it is let, and the bus in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scanfleet.errors import DependencyError
from scanfleet.messages import (
    ChunkFailed,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    HostScanned,
    Message,
    ScanChunk,
)
from scanfleet.messages.topics import SCAN_PROGRESS, SCAN_RESULTS, Topic
from scanfleet.policy import Preset, fill_in
from scanfleet.ports import PortSet
from scanfleet.targets import TargetRules
from scanfleet.testing.bus import MemoryBus
from scanner_worker.domain import CannotStartError, Host, KilledByGuardError, ScanError, arguments, permit
from scanner_worker.handlers import batch
from scanner_worker.handlers.batch import Abilities, Batch, Found
from scanner_worker.handlers.chunk import ChunkScan

MakeChunk = Callable[..., ScanChunk]
Until = Callable[..., Awaitable[None]]

RULES = TargetRules((ip_network("127.0.0.0/8"), ip_network("::1/128")), (ip_network("127.9.9.9/32"),))
ABILITIES = Abilities(slots=1, raw=True, rules=RULES, attempt_seconds=60)


def addresses(argv: Sequence[str]) -> list[str]:
    """Every address that nmap is told to scan."""
    return [str(address) for target in argv[argv.index("--") + 1 :] for address in ip_network(target)]


class Stepping:
    """Yields its targets in their order, each when it is let, and then fails if it is to."""

    version = "7.95"

    def __init__(self) -> None:
        self.argvs: list[Sequence[str]] = []
        self.runs: list[list[str]] = []
        self.running = 0
        self.most = 0
        self.fault: Exception | None = None
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
        services: Mapping[str, int],  # noqa: ARG002 # the port's signature
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
                yield [(Host(address, True, False, 2, {b"reset"}, b""), ())]
        finally:
            await asyncio.sleep(0)  # to be killed takes a moment
            self.running -= 1

    async def ranked(self, ports: PortSet) -> PortSet:
        """As if the most common port were 1, the next 2 and so on."""
        return PortSet(tcp=((ports.above + 1, ports.top),))

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
        """How each chunk has ended, and its map."""
        return {m.chunk_id: (type(m), m.outcomes) for m in self.last_words()}

    def last_words(self) -> list[ChunkScanned | ChunkFailed | ChunkReleased]:
        said = self.bus.messages(SCAN_PROGRESS)
        return [m for m in said if isinstance(m, ChunkScanned | ChunkFailed | ChunkReleased)]

    def hosts(self) -> list[tuple[str, str]]:
        return [(m.chunk_id, m.address) for m in self.bus.messages(SCAN_RESULTS) if isinstance(m, HostScanned)]

    def hinder(self, fault: Callable[[Message], Exception | None]) -> None:
        """Let the bus raise what `fault` says of a message."""
        publish = self.bus.publish

        async def hindered(topic: Topic, messages: Iterable[Message]) -> None:
            for message in messages:
                if error := fault(message):
                    raise error
            await publish(topic, messages)

        self.bus.publish = hindered  # type: ignore[method-assign] # the broker's fault, not the worker's inside


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
    """Chunk `1-number` of two addresses, 127.9.1.number0 and the next."""

    def chunk(number: int, **fields: object) -> ScanChunk:
        return make_chunk(
            **{"chunk_id": f"1-{number}", "first_address": f"127.9.1.{number}0", "outcomes": ".."} | fields
        )

    return chunk


async def test_each_chunk_has_its_own_end(make: MakeChunk) -> None:
    """One nmap scans the blanks of all, and each chunk tells its own hosts and its own map."""
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


async def test_hosts_are_told_as_they_are_done(make: MakeChunk, until: Until) -> None:
    """What nmap has finished of one chunk is published while the same nmap scans the others."""
    async with scanning(make(1), make(2)) as rig:
        rig.scanner.let(1)
        await until(rig.hosts)
        assert rig.scanner.running == 1
        rig.scanner.let()


@pytest.mark.proves("G8")
async def test_one_that_is_stopped_takes_its_targets_along(make: MakeChunk, until: Until) -> None:
    """A stop ends nmap; the next one has what is left of the others, and no address that was done is scanned again."""
    async with scanning(make(1), make(2), make(3)) as rig:
        rig.scanner.let(3)
        await until(lambda: len(rig.hosts()) == 3)
        rig.scans[1].stop("cancelled")
        await until(rig.last_words)
        assert rig.ends() == {"1-2": (ChunkReleased, "a.")}
        rig.scanner.let()
    assert rig.scanner.asked[1:] == [["127.9.1.30", "127.9.1.31"]]
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkReleased, "a."), "1-3": (ChunkScanned, "aa")}
    assert sorted(set(rig.scanner.yielded)) == sorted(rig.scanner.yielded)
    assert rig.scanner.most == 1


async def test_one_that_is_done_disturbs_nobody(make: MakeChunk, until: Until) -> None:
    """A chunk that leaves when nmap has no more of its addresses does not end it."""
    async with scanning(make(1), make(2)) as rig:
        rig.scanner.let(2)
        await until(lambda: len(rig.hosts()) == 2)
        rig.scans[0].stop("cancelled")
        await until(rig.last_words)
        rig.scanner.let()
    assert len(rig.scanner.asked) == 1
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkScanned, "aa")}


async def test_all_that_are_stopped_at_once_start_nothing(make: MakeChunk, until: Until) -> None:
    """When all are stopped one nmap is killed and none is started; each tells its own map."""
    async with scanning(make(1), make(2), make(3)) as rig:
        rig.scanner.let(1)
        await until(rig.hosts)
        for scan in rig.scans:
            scan.stop("the worker is leaving")
            scan.stop("twice")
    assert len(rig.scanner.asked) == 1
    assert rig.ends() == {"1-1": (ChunkReleased, "a."), "1-2": (ChunkReleased, ".."), "1-3": (ChunkReleased, "..")}


async def test_one_that_is_stopped_before_it_began_is_not_waited_for(make: MakeChunk) -> None:
    """A chunk that was stopped before its turn came leaves the others to be scanned."""
    rig = Rig([make(1), make(2)])
    rig.scans[0].stop("cancelled")
    rig.scanner.let()
    async with asyncio.timeout(20):
        await rig.run()
    assert rig.scanner.asked == [["127.9.1.20", "127.9.1.21"]]
    assert rig.ends() == {"1-1": (ChunkReleased, ".."), "1-2": (ChunkScanned, "aa")}


@pytest.mark.proves("A3", "G12")
async def test_the_rules_are_asked_for_each(make: MakeChunk) -> None:
    """What is refused of one chunk never reaches nmap; a chunk of nothing else ends without it, and the others are scanned."""
    partly, wholly = make(2, first_address="127.9.9.8"), make(3, first_address="127.9.9.9", outcomes=".")
    async with scanning(make(1), partly, wholly) as rig:
        rig.scanner.let()
    assert rig.scanner.asked == [["127.9.1.10", "127.9.1.11", "127.9.9.8"]]
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkScanned, "ar"), "1-3": (ChunkScanned, "r")}


async def test_a_failed_nmap_fails_those_who_still_wait(make: MakeChunk, until: Until) -> None:
    """When nmap dies, a chunk whose every host it had written is scanned; the others fail with the reason, and no nmap follows."""
    async with scanning(make(1), make(2), make(3)) as rig:
        rig.scanner.let(3)
        await until(lambda: len(rig.hosts()) == 3)
        rig.scanner.fault = ScanError("nmap exited with 1")
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkFailed, "a."), "1-3": (ChunkFailed, "..")}
    assert {m.reason for m in rig.last_words() if isinstance(m, ChunkFailed)} == {"nmap exited with 1"}
    assert len(rig.scanner.asked) == 1


async def test_a_fault_of_one_is_its_own(make: MakeChunk) -> None:
    """An error in telling one chunk's hosts fails that chunk, and the others are scanned to their end."""
    async with scanning(make(1), make(2)) as rig:
        rig.hinder(lambda m: ValueError("oops") if isinstance(m, HostScanned) and m.chunk_id == "1-1" else None)
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkFailed, ".."), "1-2": (ChunkScanned, "aa")}


@pytest.mark.proves("F8", "G5")
async def test_each_has_a_fence_of_its_own(make: MakeChunk, until: Until) -> None:
    """A chunk whose heartbeats are not acknowledged leaves within its lease, and the others go on."""
    away = True
    async with scanning(make(1, lease_seconds=3.0), make(2)) as rig:
        rig.hinder(lambda m: DependencyError("away") if away and m.subject == "chunk/1-1" else None)
        await until(lambda: len(rig.scanner.asked) == 2, 3.0)
        assert rig.scanner.asked[1] == ["127.9.1.20", "127.9.1.21"]
        away = False
        await until(rig.last_words)
        assert rig.ends() == {"1-1": (ChunkReleased, "..")}
        rig.scanner.let()
    assert rig.ends()["1-2"] == (ChunkScanned, "aa")


async def test_each_has_its_own_heartbeats(make: MakeChunk, until: Until) -> None:
    """While one nmap scans several chunks, each of them tells its own map each second."""
    async with scanning(make(1), make(2)) as rig:
        rig.scanner.let(1)

        def beats() -> dict[str, str]:
            said = rig.bus.messages(SCAN_PROGRESS)
            return {m.chunk_id: m.outcomes for m in said if isinstance(m, ChunkProgressed)}

        await until(lambda: len(beats()) == 2)
        assert beats() == {"1-1": "a.", "1-2": ".."}
        rig.scanner.let()


async def test_nmap_gets_no_further_ahead_than_is_told(make: MakeChunk, until: Until) -> None:
    """While one chunk's hosts cannot be published no more are read, whosever they are."""
    away = True
    async with scanning(make(1, outcomes="....."), make(2)) as rig:
        rig.hinder(lambda m: DependencyError("away") if away and isinstance(m, HostScanned) else None)
        rig.scanner.let()
        await until(lambda: len([m for m in rig.bus.messages(SCAN_PROGRESS) if isinstance(m, ChunkProgressed)]) >= 2)
        assert len(rig.scanner.yielded) == 2
        away = False
    assert rig.ends() == {"1-1": (ChunkScanned, "aaaaa"), "1-2": (ChunkScanned, "aa")}


async def test_a_slot_is_charged_once(make: MakeChunk, until: Until) -> None:
    """What the chunks of one nmap report are parts of the time in their slot: together no more than it."""
    began = asyncio.get_running_loop().time()
    async with scanning(make(1), make(2), make(3)) as rig:
        rig.scanner.let(1)
        await until(rig.hosts)
        await asyncio.sleep(0.2)
        rig.scans[0].stop("cancelled")
        await until(rig.last_words)
        await asyncio.sleep(0.2)
        rig.scanner.let()
    whole = asyncio.get_running_loop().time() - began
    seconds = {m.chunk_id: m.slot_seconds for m in rig.last_words()}
    assert 0.4 <= sum(seconds.values()) <= whole
    assert seconds["1-1"] >= 0.2 / 3
    assert seconds["1-2"] >= 0.2 / 3 + 0.2 / 2


BRIEF = Abilities(slots=1, raw=True, rules=RULES, attempt_seconds=0.3)


async def test_scan_of_several_addresses_past_its_time_is_released_as_too_slow(make: MakeChunk) -> None:
    """nmap is stopped after the limit, once; what it had finished counts, and the rest is released with the limit as reason."""
    async with scanning(make(1), make(2), make(3), abilities=BRIEF) as rig:
        rig.scanner.let(3)
    assert rig.ends() == {"1-1": (ChunkScanned, "aa"), "1-2": (ChunkReleased, "a."), "1-3": (ChunkReleased, "..")}
    released = [m for m in rig.last_words() if isinstance(m, ChunkReleased)]
    assert all(m.too_slow and "0.3 s" in m.reason for m in released)
    assert (len(rig.scanner.asked), rig.scanner.running) == (1, 0)


async def test_scan_of_several_addresses_has_one_time_limit_for_all_its_nmaps(make: MakeChunk, until: Until) -> None:
    """A chunk that leaves starts another nmap for the rest, and the time of the first one counts."""
    began = asyncio.get_running_loop().time()
    async with scanning(make(1), make(2), abilities=replace(BRIEF, attempt_seconds=1.0)) as rig:
        await asyncio.sleep(0.7)
        rig.scans[0].stop("cancelled")
        await until(lambda: len(rig.scanner.asked) == 2)
    assert asyncio.get_running_loop().time() - began < 1.6
    assert [m.too_slow for m in rig.last_words() if isinstance(m, ChunkReleased)] == [False, True]


async def test_scan_of_a_single_address_past_its_host_timeout_is_timed_out(
    make: MakeChunk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What nmap itself does not end, because its host timeout leaves out host discovery, the worker ends as timed out."""
    monkeypatch.setattr(batch, "SLACK_S", 0.1)
    async with scanning(make(1, outcomes="a.", policy={"host_timeout": 1}), abilities=BRIEF) as rig:
        pass
    assert rig.ends() == {"1-1": (ChunkScanned, "at")}
    assert rig.hosts() == [("1-1", "127.9.1.11")]
    assert rig.scanner.running == 0


async def test_scan_of_a_part_of_the_top_ports_names_them(make: MakeChunk) -> None:
    """nmap cannot be asked for the 51st to the 100th most common port: the worker looks up which ports these are."""
    async with scanning(make(1, ports="top:51-100")) as rig:
        rig.scanner.fault = ScanError("two ports are not fifty")
        rig.scanner.let()
    (argv,) = rig.scanner.argvs
    assert argv[argv.index("-p") + 1] == "51-100"


async def test_scan_of_a_single_address_is_not_bound_by_the_limit_for_several(make: MakeChunk) -> None:
    """One address, blank or within the chunk's limit, is scanned for as long as nmap takes."""
    for chunk in (make(1, outcomes="a.d"), make(1, outcomes="...", limit=1)):
        async with scanning(chunk, abilities=BRIEF) as rig:
            await asyncio.sleep(1.0)
            assert rig.scanner.running == 1
            rig.scanner.let()
        assert len(rig.scanner.asked) == len(rig.scanner.yielded) == 1


async def test_chunk_with_a_limit_scans_that_many_blanks_and_is_released(make: MakeChunk) -> None:
    """Of the blanks only the first `limit` reach nmap; the chunk is released without a reason, and is no slower than others."""
    async with scanning(make(1, outcomes="a...d..", limit=3)) as rig:
        rig.scanner.let()
    assert rig.scanner.asked == [["127.9.1.11", "127.9.1.12", "127.9.1.13"]]
    (end,) = rig.last_words()
    assert isinstance(end, ChunkReleased)
    assert (end.outcomes, end.reason, end.too_slow) == ("aaaad..", "", False)


async def test_chunk_with_a_limit_that_leaves_no_blank_is_scanned(make: MakeChunk) -> None:
    """A limit that covers all the blanks changes nothing, and refused addresses do not count."""
    async with scanning(make(1, first_address="127.9.9.8", outcomes="....", limit=3)) as rig:
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkScanned, "araa")}


async def test_chunk_with_a_limit_fails_for_a_missing_address_within_it(make: MakeChunk) -> None:
    """An address within the limit that nmap leaves out fails the chunk; addresses beyond it do not."""

    class Silent(Stepping):
        async def scan(self, *_: object) -> AsyncGenerator[Found]:
            yield [(Host("127.9.1.10", True, False, 2, {b"reset"}, b""), ())]

    rig = Rig([make(1, outcomes="....", limit=2)])
    rig.batch = Batch([scan.chunk for scan in rig.scans], ABILITIES, Silent())
    async with asyncio.timeout(20):
        await rig.run()
    (end,) = rig.last_words()
    assert isinstance(end, ChunkFailed)
    assert (end.outcomes, end.reason) == ("a...", "1 addresses are missing from what nmap wrote")


@pytest.mark.parametrize("fault", [CannotStartError("no space left"), KilledByGuardError("stood still")])
async def test_failure_of_the_worker_releases_its_chunks(make: MakeChunk, fault: Exception) -> None:
    """What this machine is to blame for counts against no chunk, and the reason is reported."""
    async with scanning(make(1), make(2)) as rig:
        rig.scanner.fault = fault
        rig.scanner.let()
    assert rig.ends() == {"1-1": (ChunkReleased, ".."), "1-2": (ChunkReleased, "..")}
    assert {(m.reason, m.too_slow) for m in rig.last_words() if isinstance(m, ChunkReleased)} == {(str(fault), False)}


async def test_a_host_of_nobody_fails_them_all(make: MakeChunk) -> None:
    """What nmap says about an address that no chunk asked for makes its run one that does not count."""

    class Lying(Stepping):
        async def scan(self, *_: object) -> AsyncGenerator[Found]:
            yield [(Host("127.9.1.99", True, False, 2, {b"reset"}, b""), ())]

    rig = Rig([make(1), make(2)])
    rig.batch = Batch([scan.chunk for scan in rig.scans], ABILITIES, Lying())
    async with asyncio.timeout(20):
        await rig.run()
    assert rig.ends() == {"1-1": (ChunkFailed, ".."), "1-2": (ChunkFailed, "..")}
    assert all("127.9.1.99" in getattr(words, "reason", "") for words in rig.last_words())
    assert rig.hosts() == []


@pytest.mark.proves("G12")
@settings(deadline=None, max_examples=30)  # each is a loop of its own
@given(
    maps=st.lists(
        st.text(alphabet=".x", min_size=1, max_size=12).filter(lambda text: "." in text), min_size=1, max_size=8
    ),
    base=st.sampled_from(["127.9.9.0", "::1"]),
    leaver=st.integers(0, 7),
    steps=st.integers(0, 20),
)
def test_nmap_is_told_what_is_permitted_and_nothing_else(maps: list[str], base: str, leaver: int, steps: int) -> None:
    """Before and after one has left, the command line is that of the policy, with addresses of chunks that are here, permitted and not done."""
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
    plain = arguments(chunks[0], [ip_network(base)], raw=True)
    line, left = plain[: plain.index("--")], chunks[leaver % len(chunks)].chunk_id
    permitted: dict[str, set[str]] = {}
    for chunk in chunks:
        letters = permit(chunk, RULES, raw=True).outcomes
        begin = ip_address(chunk.first_address)
        permitted[chunk.chunk_id] = {str(begin + index) for index, letter in enumerate(letters) if letter == "."}
    wanted = set[str]().union(*permitted.values())
    for argv, yielded in zip(scanner.argvs, scanner.runs, strict=True):
        assert argv[: argv.index("--")] == line
        asked = addresses(argv)
        assert len(set(asked)) == len(asked)
        assert set(asked) <= wanted
        wanted -= permitted[left] | set(yielded)  # the first nmap alone may have those of the one who left
    assert len(scanner.argvs) <= 2


async def test_a_share_is_over_when_nmap_is(make: MakeChunk) -> None:
    """An nmap that ends well without a host lets the share end; whoever reads it sees what is missing."""

    class Silent(Stepping):
        async def scan(self, *_: object) -> AsyncGenerator[Found]:
            nothing: Sequence[Found] = ()
            for hosts in nothing:
                yield hosts

    batch = Batch([make(1)], ABILITIES, Silent())
    running = asyncio.create_task(batch.run())
    (share,) = batch.shares
    async with share, aclosing(share.scan("..")) as found:
        assert [hosts async for hosts in found] == []
    await running
