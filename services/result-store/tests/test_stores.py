"""One suite for both stores: in memory and in MongoDB."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from bson.raw_bson import RawBSONDocument

from result_store.domain.results import ClosedChunk, Erased, Host, Parts, Place, Removed, fold
from result_store.repository import PAGE, MongoStore
from result_store_testing import EPOCH, Log, MemoryStore, host
from scanfleet.contracts.messages import HostDetails, HostScanned, PortFound, ScriptOutput
from scanfleet.contracts.rest import Result
from scanfleet.errors import NotFoundError
from scanfleet.runtime import mongo
from scanfleet.scanning.outcomes import Outcome
from scanfleet.scanning.targets import parse_network

Store = MemoryStore | MongoStore


@pytest.fixture
async def database(mongodb: str) -> AsyncIterator[mongo.Database]:
    """A separate database on the real server."""
    database = mongo.connect(mongodb, f"results-{uuid4().hex[:12]}")
    yield database
    await database.client.drop_database(database.name)
    database.client.close()


@pytest.fixture
async def mongo_store(database: mongo.Database) -> MongoStore:
    store = MongoStore(database)
    await store.prepare()
    return store


@pytest.fixture(params=["memory", pytest.param("mongodb", marks=pytest.mark.integration)])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return MemoryStore()
    mongo_store: MongoStore = request.getfixturevalue("mongo_store")
    return mongo_store


def hosts(*messages: HostScanned) -> list[Host]:
    """Return these hosts with their places in a log, in order."""
    return list(fold(Log().append(*messages)).hosts.values())


async def listed(store: Store, job_id: int = 1, user_id: int | None = None) -> list[Result]:
    return [result async for results in store.results(job_id, user_id) for result in results]


def chunk(outcomes: str, chunk_id: str = "1-0") -> ClosedChunk:
    return ClosedChunk(1, chunk_id, "127.9.8.0", outcomes)


async def test_results_return_stored_fields(store: Store) -> None:
    """A host's results have every field as it was reported, and the broker's timestamp as their time."""
    port = PortFound(
        port=53,
        protocol="udp",
        status="open|filtered",
        service="domain",
        version="x 1",
        os_info="Linux",
        banner="<script>\x1b[2J\u202e\N{SNOWMAN}",
        raw_data='<port protocol="udp"/>',
    )
    [stored] = hosts(host("127.9.8.1", port))
    assert await store.add([stored]) == 1
    assert await listed(store) == list(stored.results(1))


async def test_add_existing_host_is_ignored(store: Store) -> None:
    """A host that is already stored is not counted as new and changes nothing."""
    [first] = hosts(host("127.9.8.1", 22))
    [second] = hosts(host("127.9.8.1", 80, attempt=2))
    assert await store.add([first]) == 1
    assert await store.add([second]) == 0
    assert [result.port for result in await listed(store)] == [22]


async def test_add_partly_stored_batch_adds_new_hosts(store: Store) -> None:
    """A batch that is partly stored adds its remaining hosts."""
    batch = hosts(*(host(f"127.9.8.{n}", 22) for n in range(6)))
    assert await store.add(batch[::2]) == 3
    assert await store.add(batch) == 3
    assert [result.ip_address for result in await listed(store)] == [f"127.9.8.{n}" for n in range(6)]


async def test_store_empty_batch_is_accepted(store: Store) -> None:
    """Every method accepts an empty batch."""
    assert await store.add([]) == 0
    assert await store.close([]) == {}
    assert await store.closed(set()) == {}
    assert await store.stored(set()) == {}


async def test_results_open_filtered_ranges_are_expanded_in_port_order(store: Store) -> None:
    """Silent UDP ports stored as ranges are listed as one result each, in port order, with consecutive ids."""
    ports = PortFound(port=53), PortFound(port=54, protocol="udp", service="xns-ch"), PortFound(port=9000)
    ranges, plain = hosts(host("127.9.8.1", *ports, open_filtered="52-53,9001"), host("127.9.8.2", 22))
    assert await store.add([ranges, plain]) == 2
    found = [(each.port, each.protocol, each.status, each.service) for each in await listed(store)]
    assert found == [
        (52, "udp", "open|filtered", ""),
        (53, "tcp", "open", ""),
        (53, "udp", "open|filtered", ""),
        (54, "udp", "open", "xns-ch"),
        (9000, "tcp", "open", ""),
        (9001, "udp", "open|filtered", ""),
        (22, "tcp", "open", ""),
    ]
    ids = [each.id for each in await listed(store)]
    assert ids == list(range(ids[0], ids[0] + 7))
    assert [each.id for each in await listed(store)] == ids


async def test_results_host_with_only_ranges_is_listed(store: Store) -> None:
    """A host with only silent UDP ports is listed too."""
    assert await store.add(hosts(host("127.9.8.1", open_filtered="1-3"))) == 1
    assert [each.port for each in await listed(store)] == [1, 2, 3]


async def test_results_ids_start_at_one_and_increase(store: Store) -> None:
    """Ids are unique and start at 1, and those of a later batch are higher."""
    await store.add(hosts(host("127.9.8.1", 22, 80), host("127.9.8.2"), host("127.9.8.3", 443)))
    before = [result.id for result in await listed(store)]
    await store.add(hosts(host("127.9.9.1", 22, chunk_id="2-0", job_id=2)))
    [later] = await listed(store, 2)
    assert before == [1, 2, 3]
    assert later.id > 3


async def test_results_are_ordered_by_creation(store: Store) -> None:
    """Results are ordered by broker timestamp, then log offset, then port, regardless of insertion order."""
    places = [Place(EPOCH.replace(minute=minute), offset) for minute, offset in [(2, 1), (1, 7), (1, 3)]]
    unordered = [Host(host(f"127.9.8.{n}", 80, 22), place) for n, place in enumerate(places)]
    await store.add(unordered)
    found = [(result.ip_address[-1], result.port) for result in await listed(store)]
    assert found == [("2", 22), ("2", 80), ("1", 22), ("1", 80), ("0", 22), ("0", 80)]


async def test_results_host_without_ports_is_not_listed(store: Store) -> None:
    """A host without ports counts towards its chunk and has no result."""
    await store.add(hosts(host("127.9.8.1", outcome="s")))
    assert await listed(store) == []
    [stored] = (await store.stored({"1-0"}))["1-0"]
    assert (stored.address, stored.outcome, stored.place) == ("127.9.8.1", Outcome.SILENT, Place(EPOCH, 0))


async def test_results_other_jobs_are_not_listed(store: Store) -> None:
    """Another job's results are not listed."""
    await store.add(hosts(host("127.9.8.1", 22), host("127.9.8.1", 80, chunk_id="2-0", job_id=2)))
    assert [result.port for result in await listed(store, 2)] == [80]


async def test_results_user_filter_limits_the_list(store: Store) -> None:
    """With a user id only that user's results are listed, without one all of them."""
    await store.add(hosts(host("127.9.8.1", 22, user_id=7), host("127.9.8.2", 80, user_id=8)))
    assert [result.port for result in await listed(store, user_id=7)] == [22]
    assert [result.port for result in await listed(store)] == [22, 80]


async def test_results_span_several_pages(store: Store) -> None:
    """A job with more hosts than a page is listed completely and in order."""
    count = 2 * PAGE + 1
    await store.add(hosts(*(host(f"127.9.8.{n}", 22) for n in range(count))))
    assert [result.ip_address for result in await listed(store)] == [f"127.9.8.{n}" for n in range(count)]


async def test_results_closed_chunk_lists_claimed_hosts(store: Store) -> None:
    """A host of a closed chunk is listed only if the final map claims it; all hosts of an open chunk are listed."""
    await store.add(hosts(host("127.9.8.0", 22), host("127.9.8.1", 80), host("127.9.8.2", 443, chunk_id="1-1")))
    assert [result.port for result in await listed(store)] == [22, 80, 443]
    await store.close([chunk("ad")])
    assert [result.port for result in await listed(store)] == [22, 443]


async def test_close_closed_chunk_returns_the_first_map(store: Store) -> None:
    """The first map that closes a chunk is kept, and a later `close` returns it."""
    assert await store.close([chunk("ad"), chunk("ss", "1-1")]) == {}
    assert await store.close([chunk("aa"), chunk("dd", "1-2")]) == {"1-0": chunk("ad")}
    assert await store.closed({"1-0", "1-1", "1-2", "1-3"}) == {
        "1-0": chunk("ad"),
        "1-1": chunk("ss", "1-1"),
        "1-2": chunk("dd", "1-2"),
    }


async def test_stored_matches_the_exact_chunk_id(store: Store) -> None:
    """Hosts are found by their exact chunk id, not by one with the same prefix or an adjacent sort key."""
    ids = ["1-1", "1-10", "1-1-0", "1-1.", "1-2"]
    await store.add(hosts(*(host(f"127.9.8.{n}", chunk_id=each) for n, each in enumerate(ids))))
    found = await store.stored({"1-1", "1-2", "1-3"})
    assert {key: [each.address for each in value] for key, value in found.items()} == {
        "1-1": ["127.9.8.0"],
        "1-2": ["127.9.8.4"],
        "1-3": [],
    }


async def test_add_host_with_all_ports_open_is_stored(store: Store) -> None:
    """A host with every port of its chunk open is stored and listed completely."""
    await store.add(hosts(host("127.9.8.1", *range(1, 8193))))
    assert [result.port for result in await listed(store)] == list(range(1, 8193))


async def test_results_after_an_id_are_in_order_of_ids(store: Store) -> None:
    """With `after`, hosts come in order of their ids, which need not be the order of the log; hosts before are skipped."""
    first, second, third = hosts(host("127.9.8.1", 22, 80), host("127.9.8.2", 22), host("127.9.8.3", 22, 443))
    for each in (second, first, third):  # as after a restart in the middle of a batch
        await store.add([each])
    assert [result.id for result in await listed(store)] == [2, 3, 1, 4, 5]

    async def after(id_: int) -> list[tuple[int, str]]:
        found = [each async for some in store.results(1, None, after=id_) for each in some]
        return [(each.id, each.ip_address) for each in found]

    assert await after(0) == [(1, "127.9.8.2"), (2, "127.9.8.1"), (3, "127.9.8.1"), (4, "127.9.8.3"), (5, "127.9.8.3")]
    assert await after(1) == await after(2) == [(id_, address) for id_, address in await after(0) if id_ > 1]
    assert await after(3) == [(4, "127.9.8.3"), (5, "127.9.8.3")]
    assert await after(5) == []


async def by_address(store: Store, user_id: int | None = None, **select: Any) -> list[tuple[str, str]]:
    found = store.hosts_by_address(1, user_id, Parts.SUMMARY, **select)
    return [(each.scanned.address, each.scanned.chunk_id) async for each in found]


async def test_hosts_are_sorted_by_address_and_chunk(store: Store) -> None:
    """Hosts with findings are listed in the order of their addresses, and those of one address in that of their chunks."""
    answered = [host(f"127.9.8.{n}", chunk_id=f"1-{chunk}") for n, chunk in [(10, 10), (9, 0), (10, 9)]]
    silent = host("127.9.8.1", outcome="s")
    await store.add(hosts(*answered, silent, host("127.9.8.2", outcome="s", open_filtered="1-3"), host("::1")))
    assert await by_address(store) == [
        ("127.9.8.2", "1-0"),
        ("127.9.8.9", "1-0"),
        ("127.9.8.10", "1-9"),
        ("127.9.8.10", "1-10"),
        ("::1", "1-0"),
    ]


async def test_hosts_of_a_range_are_those_within_it(store: Store) -> None:
    """A network and an address to begin after select hosts, alone and together."""
    await store.add(hosts(*(host(f"127.9.{n}.{m}") for n in (8, 9) for m in (0, 1, 255)), host("::1")))
    first = parse_network("127.9.8.0/24")
    assert [address for address, _ in await by_address(store, within=first)] == [f"127.9.8.{n}" for n in (0, 1, 255)]
    assert [address for address, _ in await by_address(store, after="127.9.9.0")] == ["127.9.9.1", "127.9.9.255", "::1"]
    assert [address for address, _ in await by_address(store, after="127.9.8.1", within=first)] == ["127.9.8.255"]
    assert await by_address(store, after="127.9.9.0", within=first) == []
    assert [address for address, _ in await by_address(store, within=parse_network("::/64"))] == ["::1"]


async def test_hosts_of_other_users_and_late_ones_are_not_listed(store: Store) -> None:
    """A host of another user or job, or one that a closed chunk does not claim, is not listed."""
    others = [host("127.9.8.2", user_id=8, chunk_id="1-1"), host("127.9.8.3", job_id=2, chunk_id="2-0")]
    await store.add(hosts(host("127.9.8.0", 22), host("127.9.8.1", 22), *others))
    await store.close([chunk("ad")])
    assert await by_address(store, 7) == [("127.9.8.0", "1-0")]
    assert await by_address(store) == [("127.9.8.0", "1-0"), ("127.9.8.2", "1-1")]


async def test_hosts_span_several_pages(store: Store) -> None:
    """A job with more hosts than a page is listed completely."""
    addresses = [f"127.9.{n}.{m}" for n in range(2) for m in range(PAGE + 1)]
    await store.add(hosts(*(host(address, 22) for address in addresses)))
    assert [address for address, _ in await by_address(store)] == addresses


async def test_hosts_have_the_parts_that_are_read(store: Store) -> None:
    """Ports without large texts, details without ports, or ports without details are read as they were stored."""
    details = HostDetails(
        reason="syn-ack", scripts=(ScriptOutput(id="x", output="y"),), closed=3, seconds=1.5, element="<os/>"
    )
    port = PortFound(port=22, service="ssh", banner="SSH", raw_data="<port/>")
    await store.add(hosts(host("127.9.8.1", port, details=details)))

    async def read(parts: Parts) -> HostScanned:
        [only] = [each async for each in store.hosts_by_address(1, 7, parts)]
        return only.scanned

    assert (await read(Parts.DETAILS)).details == details
    summary = (await read(Parts.SUMMARY)).details
    assert summary is not None
    assert summary.scripts == details.scripts
    of_ports = (await read(Parts.PORTS)).details
    assert of_ports is not None
    assert of_ports.element == "<os/>"
    assert [(each.port, each.service) for each in (await read(Parts.SUMMARY)).ports] == [(22, "ssh")]
    assert (await read(Parts.PORTS)).ports == (port,)


async def test_hosts_of_a_job_deleted_while_they_are_read_end_in_an_error(store: Store) -> None:
    """A reader of a job that is deleted meanwhile gets no list that looks complete."""
    await store.add(hosts(host("127.9.8.1", 22)))
    await store.begin_deletions([1])
    with pytest.raises(NotFoundError):
        await by_address(store)


async def test_closed_chunks_are_sorted_by_address(store: Store) -> None:
    """The closed chunks of a job are listed in order of their addresses, then of their numbers, as they were closed."""
    facts: Any = (7, "syn", "7.93", "22", "0" * 64, "sV7/O", "none", EPOCH)
    places = [("1-10", "127.9.8.4"), ("1-2", "127.9.8.4"), ("1-11", "127.9.8.0")]
    mine = [ClosedChunk(1, id_, first, "ad", *facts) for id_, first in places]
    await store.close([*mine, ClosedChunk(1, "1-3", "127.9.8.8", "a", 8), ClosedChunk(2, "2-0", "127.9.8.0", "a", 7)])
    found = [each async for each in store.chunks_by_address(1, 7)]
    assert found == [mine[2], mine[1], mine[0]]
    assert len([each async for each in store.chunks_by_address(1, None)]) == 4
    assert not await store.is_unsorted(1)


async def test_closed_chunks_have_their_ports(store: Store) -> None:
    """Long and short lists of ports are read as they were closed, for each job and chunk."""
    many, others = (",".join(map(str, range(first, 400, 2))) for first in (1, 2))
    ports = {"1-0": many, "1-1": many, "1-2": others, "1-3": "22,80", "1-4": "", "1-5": many}
    closed = [ClosedChunk(1, id_, "127.9.8.0", "ad", 7, "syn", "7.93", text) for id_, text in ports.items()]
    await store.close(closed[:3])
    await store.close(closed)
    await store.close([replace(closed[1], job_id=2, chunk_id="2-1")])
    assert [each async for each in store.chunks_by_address(1, 7)] == closed
    await store.begin_deletions([1])
    while sum(await store.erase(1, 2)):
        pass
    assert [each.ports async for each in store.chunks_by_address(2, 7)] == [many]


async def test_long_port_sets_are_stored_once_for_each_job_and_deleted_with_it(database: mongo.Database) -> None:
    """Chunks after the first of their job have the id of the set, in a document of a tenth of the size."""
    store = MongoStore(database)
    many = ",".join(map(str, range(1, 2_000, 2)))
    for job_id in (1, 10):
        closed = [ClosedChunk(job_id, f"{job_id}-{n}", "127.9.8.0", "ad", 7, "syn", "7.93", many) for n in range(20)]
        await store.close(closed[:10])
        await store.close(closed[10:])
    sizes = database["chunks"].aggregate(
        [{"$match": {"ports_id": {"$exists": True}}}, {"$set": {"size": {"$bsonSize": "$$ROOT"}}}]
    )
    assert [each["size"] < len(many) / 10 async for each in sizes] == [True] * 38
    assert await database["port_sets"].count_documents({"text": many}) == 2
    await store.begin_deletions([1])
    assert [await store.erase(1, 15) for _ in range(3)] == [(0, 15, 0), (0, 5, 1), (0, 0, 0)]
    assert [each["_id"].partition("-")[0] async for each in database["port_sets"].find()] == ["10"]


async def test_closed_chunks_of_a_job_deleted_while_they_are_read_end_in_an_error(store: Store) -> None:
    """A reader of a job that is deleted meanwhile gets no list that looks complete."""
    await store.close([chunk("d")])
    await store.begin_deletions([1])
    with pytest.raises(NotFoundError):
        _ = [each async for each in store.chunks_by_address(1, None)]


async def test_results_without_raw_data_leave_it_empty(store: Store) -> None:
    """Without `raw` every field but `raw_data` is as it was reported."""
    port = PortFound(port=22, service="ssh", raw_data='<port portid="22"/>')
    await store.add(hosts(host("127.9.8.1", port)))
    [result] = [each async for some in store.results(1, None, raw=False) for each in some]
    assert (result.port, result.service, result.raw_data) == (22, "ssh", "")


async def test_erase_deletes_only_the_job_in_slices(store: Store) -> None:
    """Hosts are deleted before closed chunks, in slices, and jobs whose ids have the same prefix keep theirs."""
    await store.add(hosts(*(host(f"127.9.8.{n}", 22) for n in range(4)), host("127.9.8.9")))
    await store.close([chunk("aaaa")])
    await store.add(hosts(host("127.9.8.1", 22, job_id=10, chunk_id="10-0")))
    await store.close([ClosedChunk(10, "10-0", "127.9.8.0", "aa")])
    await store.begin_deletions([1])
    assert sum(await store.erase(1, 5)) == 5
    assert await store.stored({"1-0"}) == {"1-0": []}
    assert (await store.closed({"1-0"})).keys() == {"1-0"}
    assert [sum(await store.erase(1, 5)) for _ in range(2)] == [1, 0]
    assert (await store.closed({"1-0", "10-0"})).keys() == {"10-0"}
    assert len(await listed(store, 10)) == 1


async def test_erased_documents_are_counted_once(store: Store) -> None:
    """Hosts and results are counted while they are deleted, each once, in several slices and after another beginning."""
    one = host("127.9.8.0", 22, 80)
    two = host("127.9.8.1", PortFound(port=53, protocol="udp"), open_filtered="67-69")
    await store.add(hosts(one, two, host("127.9.8.2"), host("127.9.8.3", 22, job_id=2, chunk_id="2-0")))
    await store.begin_deletions([1])
    assert await store.erased(1) == Erased()
    while sum(await store.erase(1, 1)):
        pass
    assert await store.erased(1) == Erased(hosts=3, rows=6)
    await store.begin_deletions([1])
    await store.add(hosts(host("127.9.8.4", 22)))
    await store.erase(1, 9)
    assert await store.erased(1) == Erased(hosts=4, rows=7)
    assert len(await listed(store, 2)) == 1


@pytest.mark.integration
async def test_interrupted_erasure_counts_no_host_twice(database: mongo.Database) -> None:
    """A process that ends between the count of a slice and its deletion, and two at once, leave exact counts."""
    stores = [MongoStore(database) for _ in range(2)]
    await stores[0].add(hosts(*(host(f"127.9.8.{n}", 22) for n in range(60))))
    await stores[0].begin_deletions([1])
    counted = {"slice": ["1-0/127.9.8.0", "1-0/127.9.8.19"], "hosts": 12, "rows": 12}  # 0, 1 and 10 to 19
    await database["deleted"].update_one({"_id": 1}, {"$set": counted})
    assert await stores[0].erase(1, 5) == Removed(5, 0, 0)

    async def erase(store: MongoStore) -> None:
        while erased := sum(await store.erase(1, 20)):
            assert erased <= 20, "the rest of a counted slice counts towards the limit"

    await asyncio.gather(*map(erase, stores))
    assert await stores[0].erased(1) == Erased(hosts=60, rows=60)
    assert await stores[0].stored(["1-0"]) == {"1-0": []}


@pytest.mark.integration
async def test_erasure_of_a_host_with_damaged_ports_counts_the_others(database: mongo.Database) -> None:
    """Ports and ranges that cannot be read must not stop the deletion: they are not counted."""
    store = MongoStore(database)
    damaged = ({"open_filtered": "foo"}, {"open_filtered": None}, {"open_filtered": 7}, {"ports": 7}, {"ports": None})
    await store.add(hosts(*(host(f"127.9.8.{n}", 22, 80, open_filtered="67-69") for n in range(len(damaged) + 1))))
    for number, fields in enumerate(damaged):
        await database["hosts"].update_one({"_id": f"1-0/127.9.8.{number}"}, {"$set": fields})
    await store.begin_deletions([1])
    assert await store.erase(1, 9) == (6, 0, 0)
    assert await store.erased(1) == Erased(hosts=6, rows=3 * 2 + 2 * 3 + 5)


async def test_postponed_deletion_is_left_out_for_its_time(store: Store) -> None:
    """A deletion that failed does not take the place of others; it stays open."""
    await store.begin_deletions([1, 2])
    await store.postpone_deletion(1, 60)
    assert await store.open_deletions(1) == {2: 1}
    await store.postpone_deletion(2, 0)
    assert await store.open_deletions(9) == {2: 1}
    assert await store.deleted([1]) == {1}


async def test_deletion_that_begins_again_is_not_ended(store: Store) -> None:
    """A job stays marked, and what arrives late opens its deletion again, also while it is being ended."""
    await store.begin_deletions([1, 2])
    assert await store.deleted([1, 3]) == {1}
    assert await store.open_deletions(9) == {1: 1, 2: 1}
    await store.begin_deletions([1])
    await store.end_deletion(1, 1)
    assert await store.open_deletions(9) == {1: 2, 2: 1}
    await store.end_deletion(1, 2)
    assert await store.open_deletions(9) == {2: 1}
    assert await store.deleted([1]) == {1}


async def test_results_of_a_job_deleted_while_they_are_read_end_in_an_error(store: Store) -> None:
    """A reader of a job that is deleted meanwhile gets no list that looks complete."""
    await store.add(hosts(*(host(f"127.9.8.{n}", 22) for n in range(PAGE))))
    reading = store.results(1, None)
    await anext(reading)
    await store.begin_deletions([1])
    with pytest.raises(NotFoundError):
        _ = [each async for each in reading]


async def test_page_of_a_job_whose_erasure_has_begun_is_not_yielded(store: Store) -> None:
    """Readers that take only a page fail too, while a part of the job's documents is erased: the page would look complete."""
    await store.add(hosts(*(host(f"127.9.8.{n}", 22) for n in range(4))))
    await store.close([chunk("aaaa")])
    await store.begin_deletions([1])
    await store.erase(1, 2)
    for reading in (store.results(1, None), store.results(1, None, after=0), store.chunks_by_address(1, None)):
        with pytest.raises(NotFoundError):
            await anext(reading)
    with pytest.raises(NotFoundError):
        await anext(store.hosts_by_address(1, None, Parts.SUMMARY))


class ErasedMeanwhile(MongoStore):
    """Erases job 1 between the query of a page and that of its closed chunks."""

    async def _closed_of(self, job_id: int, page: Iterable[RawBSONDocument]) -> dict[str, ClosedChunk]:
        await self.begin_deletions([1])
        await self.erase(1, 9)
        return await super()._closed_of(job_id, page)


@pytest.mark.integration
async def test_page_read_while_its_job_is_erased_is_complete_or_refused(database: mongo.Database) -> None:
    """A mark that is set after the query of a page, and before it is used, is noticed."""
    store = MongoStore(database)
    await store.prepare()
    await store.add(hosts(*(host(f"127.9.8.{n}", 22) for n in range(4))))
    await store.close([chunk("aaaa")])
    with pytest.raises(NotFoundError):
        await anext(ErasedMeanwhile(database).results(1, None, after=0))


@pytest.mark.integration
async def test_documents_have_their_zone(database: mongo.Database) -> None:
    """Hosts and closed chunks name the only zone, which distinguishes them from those of further zones."""
    store = MongoStore(database)
    await store.add(hosts(host("127.9.8.0", 22)))
    await store.close([chunk("a")])
    for name in ("hosts", "chunks"):
        assert [each["zone"] async for each in database[name].find()] == [""]
