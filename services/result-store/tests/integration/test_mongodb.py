"""Properties that need a real MongoDB: index usage and failures in mid-operation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import uuid4

import pytest
from bson import Int64
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.monitoring import CommandFailedEvent, CommandListener, CommandStartedEvent, CommandSucceededEvent
from pymongo.uri_parser import parse_uri

from result_store.domain.results import ClosedChunk, Parts, fold
from result_store.repository import PAGE, MongoStore
from result_store_testing import FIRST, Log, handler, host, scanned
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import HostDetails, PortFound
from scanfleet.contracts.messages.topics import SCAN_RESULTS, SCAN_STORED
from scanfleet.errors import DependencyError
from scanfleet.runtime import mongo
from scanfleet.runtime.mongo import Database, Document
from scanfleet.scanning.outcomes import address_at
from scanfleet.scanning.targets import parse_network
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.proxy import proxy
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration


@pytest.fixture
async def database(mongodb: str) -> AsyncIterator[Database]:
    database = mongo.connect(mongodb, f"results-{uuid4().hex[:12]}")
    await MongoStore(database).prepare()
    yield database
    await database.client.drop_database(database.name)
    database.client.close()


class Commands(CommandListener):
    """Names and read concerns of the commands that a client sends, in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str | None]] = []

    def started(self, event: CommandStartedEvent) -> None:
        self.sent.append((event.command_name, event.command.get("readConcern", {}).get("level")))

    def succeeded(self, event: CommandSucceededEvent) -> None: ...

    def failed(self, event: CommandFailedEvent) -> None: ...


async def fill(store: MongoStore, count: int) -> None:
    await store.add(
        list(fold(Log().append(*(host(str(address_at(FIRST, n)), 22) for n in range(count)))).hosts.values())
    )


async def test_queries_use_an_index(database: Database) -> None:
    """Reading results, closing a chunk and querying closed chunks use an index, without an in-memory sort."""
    store = MongoStore(database)
    await fill(store, 5)
    await store.close([ClosedChunk(1, "1-0", FIRST, "aaaaa")])
    await database.command("profile", 2)
    async for _ in store.results(1, 7):
        pass
    async for _ in store.results(1, 7, after=2):
        pass
    async for _ in store.hosts_by_address(1, 7, Parts.SUMMARY, after="127.9.8.1"):
        pass
    async for _ in store.chunks_by_address(1, 7):
        pass
    assert not await store.is_unsorted(1)
    await store.stored({"1-0", "1-1"})
    await store.closed({"1-0"})
    await database.command("profile", 0)
    profiled = await database["system.profile"].find({"planSummary": {"$exists": True}}).to_list(None)
    assert {each["planSummary"] for each in profiled} == {
        "IXSCAN { job_id: 1, created_at: 1, offset: 1 }",
        "IXSCAN { job_id: 1, first_id: 1 }",
        "IXSCAN { job_id: 1, key: 1 }",
        "IXSCAN { _id: 1 }, IXSCAN { _id: 1 }",
        "IXSCAN { _id: 1 }",
    }
    assert not any(each.get("hasSortStage") for each in profiled)


async def test_mark_that_an_operator_inserts_deletes_the_results(database: Database) -> None:
    """The document in operations.md deletes the results of a job that a restore has lost, which no request can name."""
    store = MongoStore(database)
    await fill(store, 3)
    mark = {"_id": Int64(1), "open": True, "begun": Int64(1), "forget_at": utc_now() + timedelta(days=30)}
    await database["deleted"].insert_one(mark)
    assert await store.open_deletions(9) == {1: 1}
    assert sum(await store.erase(1, 9)) == 3
    await store.end_deletion(1, 1)
    assert (await store.open_deletions(9), await store.deleted([1])) == ({}, {1})


@pytest.mark.parametrize("listed", ["results", "hosts"])
async def test_list_of_n_pages_needs_two_round_trips_a_page(mongodb: str, database: Database, listed: str) -> None:
    """A page is one operation, its closed chunks and the mark of a deletion are another; the last page ends the list."""
    await fill(MongoStore(database), 2 * PAGE + 1)
    monitor = Commands()
    client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(mongodb, event_listeners=[monitor], directConnection=True)
    store = MongoStore(client.get_database(database.name))
    reading = store.results(1, 7) if listed == "results" else store.hosts_by_address(1, 7, Parts.SUMMARY)
    assert len([each async for each in reading]) == 2 * PAGE + 1
    assert monitor.sent == [("aggregate", None), ("aggregate", "snapshot")] * 3
    await asyncio.to_thread(client.close)


@pytest.mark.parametrize("after", [None, 0])
async def test_results_of_few_addresses_are_found_by_address(database: Database, after: int | None) -> None:
    """A search for a network of up to 256 addresses reads its hosts alone; a job without keys is read whole."""
    store = MongoStore(database)
    await fill(store, 2 * PAGE)
    within = parse_network("127.9.8.8/30")

    async def read() -> tuple[list[str], int]:
        await database["system.profile"].drop()
        await database.command("profile", 2)
        found = store.results(1, 7, after=after, within=within)
        addresses = [result.ip_address async for results in found for result in results]
        await database.command("profile", 0)
        reads = database["system.profile"].find({"ns": f"{database.name}.hosts", "docsExamined": {"$exists": True}})
        return addresses, sum([each["docsExamined"] async for each in reads])

    addresses, documents = await read()
    assert addresses == [f"127.9.8.{number}" for number in range(8, 12)]
    assert documents <= 10
    await database["hosts"].update_many({}, {"$unset": {"key": ""}})
    assert (await read())[0][8:12] == addresses


@pytest.mark.proves("G20", "A22")
async def test_page_of_large_hosts_is_small(database: Database) -> None:
    """Whatever the hosts of a job contain, a page has at most 1.6 MB; large hosts are fetched one by one, all in order."""
    store = MongoStore(database)
    ports = [PortFound(port=port, raw_data="x" * 100) for port in range(1, 4_097)]
    hosts = [host(str(address_at(FIRST, n)), *(ports if n % 2 else ports[:1])) for n in range(20)]
    await store.add(list(fold(Log().append(*hosts)).hosts.values()))
    await database.command("profile", 2)
    results = [result async for some in store.results(1, 7) for result in some]
    listed = [len(each.scanned.ports) async for each in store.hosts_by_address(1, 7, Parts.PORTS)]
    await database.command("profile", 0)
    assert [result.id for result in results] == list(range(1, 10 * 4_097 + 1))
    assert listed == [1, 4_096] * 10
    reads = database["system.profile"].find({"ns": f"{database.name}.hosts", "docsExamined": {"$exists": True}})
    lengths = [(each["docsExamined"], each["responseLength"]) async for each in reads]
    assert max(length for documents, length in lengths if documents > 1) <= PAGE * 16_384
    assert max(length for documents, length in lengths if documents <= 1) <= 1 << 20


async def test_summaries_of_hosts_are_read_without_large_texts(database: Database) -> None:
    """A list of hosts reads neither nmap's elements nor the banners of ports."""
    store = MongoStore(database)
    port = PortFound(port=22, banner="SSH", raw_data="<port/>")
    details = HostDetails(reason="syn-ack", element="<os/>")
    await store.add(list(fold(Log().append(host("127.9.8.1", port, details=details))).hosts.values()))
    [found] = [each.scanned async for each in store.hosts_by_address(1, 7, Parts.SUMMARY)]
    assert (found.ports, found.details) == ((PortFound(port=22),), HostDetails(reason="syn-ack"))


async def test_prepare_existing_index_is_kept(database: Database) -> None:
    """A second start finds the indexes and does not rebuild them."""
    before = await database["hosts"].index_information()
    await MongoStore(database).prepare()
    assert await database["hosts"].index_information() == before
    assert set(before) == {"_id_", "job_id_1_created_at_1_offset_1", "job_id_1_first_id_1", "job_id_1_key_1"}
    assert set(await database["chunks"].index_information()) == {"_id_", "job_id_1_key_1"}


async def test_job_of_the_first_release_is_not_sorted(database: Database) -> None:
    """A job with a host or a closed chunk of a release without keys is known as such, also if others have keys."""
    store = MongoStore(database)
    await fill(store, 2)
    await store.close(
        [ClosedChunk(1, "1-0", FIRST, "aa"), ClosedChunk(2, "2-0", FIRST, "d"), ClosedChunk(2, "2-5", FIRST, "d")]
    )
    assert not await store.is_unsorted(1)
    assert not await store.is_unsorted(2)
    await database["hosts"].update_one({"_id": f"1-0/{FIRST}"}, {"$unset": {"key": ""}})
    await database["chunks"].update_one({"_id": "2-5"}, {"$unset": {"key": ""}})
    assert await store.is_unsorted(1)
    assert await store.is_unsorted(2)


async def test_results_mongodb_failure_in_mid_read_raises(mongodb: str, database: Database) -> None:
    """If MongoDB stops while results are read, the reader gets a DependencyError instead of the end of the stream."""
    await fill(MongoStore(database), 3 * PAGE)
    [(address, port)] = parse_uri(mongodb)["nodelist"]
    async with proxy(address, port) as between:
        detour = mongo.connect(f"mongodb://127.0.0.1:{between.port}/?directConnection=true", database.name)
        reading = MongoStore(detour).results(1, None)
        await anext(reading)
        await between.refuse()
        for _ in range(PAGE - 1):
            await anext(reading)
        with pytest.raises(DependencyError):
            await anext(reading)
        await asyncio.to_thread(detour.client.close)


@pytest.mark.proves("G20")
async def test_results_pages_cost_the_same_from_first_to_last(database: Database) -> None:
    """Each page is one cursor that reads as many documents as it returns, also after a pause above its timeout."""
    pages = 30
    store = MongoStore(database)
    await fill(store, pages * PAGE)
    await database.command("profile", 2)
    ids: list[int] = []
    async for results in store.results(1, 7):
        ids += [result.id for result in results]
        if len(ids) == PAGE:
            await asyncio.sleep(mongo.TIMEOUT_MS / 1_000 + 0.5)  # the pause itself is under test
    rest = [result.id async for results in store.results(1, 7, after=ids[-11]) for result in results]
    await database.command("profile", 0)
    assert len(ids) == pages * PAGE
    assert rest == ids[-10:]
    reads = database["system.profile"].find({"ns": f"{database.name}.hosts"}).sort("ts", 1)
    read = [(each["op"], each["keysExamined"], each["docsExamined"]) async for each in reads]
    assert {op for op, _, _ in read} == {"command", "query"}  # no "getmore": each page is one operation
    assert max(documents for _, _, documents in read) <= PAGE + 1  # the last one of the page before
    assert max(keys for _, keys, _ in read) <= PAGE + 2
    assert sum(documents for _, _, documents in read) <= pages * (PAGE + 1) + PAGE


@pytest.mark.proves("F6")
async def test_consumer_recovers_after_mongodb_outage(mongodb: str, database: Database) -> None:
    """Messages that arrive while MongoDB is unavailable are stored and answered exactly once after it recovers."""
    [(address, port)] = parse_uri(mongodb)["nodelist"]
    async with proxy(address, port) as between:
        detour = mongo.connect(f"mongodb://127.0.0.1:{between.port}/?directConnection=true", database.name)
        bus = MemoryBus()
        consumer = bus.consume(SCAN_RESULTS, "result-store", handler(MongoStore(detour), bus))
        await consumer.start()

        async def chunk(number: int) -> None:
            hosts = (host(str(address_at(FIRST, n)), 22, chunk_id=f"1-{number}") for n in range(10))
            await bus.publish(SCAN_RESULTS, [*hosts, scanned("a" * 10, chunk_id=f"1-{number}")])

        await chunk(0)
        await until(lambda: len(bus.messages(SCAN_STORED)) == 1)
        await between.refuse()
        for number in range(1, 4):
            await chunk(number)
        await until(lambda: not consumer.ready)
        assert consumer.alive
        await between.heal()
        await until(lambda: len(bus.messages(SCAN_STORED)) == 4)
        await until(lambda: consumer.ready)
        await consumer.stop()
        await asyncio.to_thread(detour.client.close)
    assert await database["hosts"].count_documents({}) == 40
    assert await database["chunks"].distinct("_id") == ["1-0", "1-1", "1-2", "1-3"]
    ids = [result.id async for results in MongoStore(database).results(1, None) for result in results]
    assert len(set(ids)) == 40
