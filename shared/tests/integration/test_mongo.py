from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import IndexModel, ReadPreference
from pymongo.errors import BulkWriteError
from pymongo.uri_parser import parse_uri

from scanfleet import mongo
from scanfleet.clock import utc_now
from scanfleet.errors import DependencyError
from scanfleet.mongo import TIMEOUT_MS, Database, Ids, insert_missing, make_indexes
from scanfleet.testing.proxy import Proxy, proxy

pytestmark = pytest.mark.integration


@pytest.fixture
async def database(mongodb: str) -> AsyncIterator[Database]:
    database = mongo.connect(mongodb, f"mongo-{uuid4().hex[:12]}")
    yield database
    await database.client.drop_database(database.name)
    database.client.close()


async def test_a_write_counts_when_a_majority_has_it(database: Database) -> None:
    """Writes wait for a majority's journal, reads see majority writes on the primary, and every collection inherits it."""
    collection = database["any"]
    assert collection.write_concern.document == {"w": "majority", "j": True}
    assert collection.read_concern.level == "majority"
    assert collection.read_preference == ReadPreference.PRIMARY


async def test_times_read_back_aware(database: Database) -> None:
    """A time that was stored comes back equal, with its zone."""
    now = utc_now()
    await database["times"].insert_one({"_id": 1, "at": now})
    found = await database["times"].find_one({"_id": 1})
    assert found is not None
    assert found["at"] == now


async def test_only_missing_documents_are_inserted(database: Database) -> None:
    """Documents whose keys are there already are named by index and stay as they were; the others are stored."""
    things = database["things"]
    assert await insert_missing(things, [{"_id": 1, "by": "first"}]) == set()
    batch = [{"_id": 0, "by": "second"}, {"_id": 1, "by": "second"}, {"_id": 2, "by": "second"}]
    assert await insert_missing(things, batch) == {1}
    assert [each["by"] for each in await things.find(sort=[("_id", 1)]).to_list(None)] == ["second", "first", "second"]


async def test_a_document_that_cannot_be_stored_is_no_duplicate(database: Database) -> None:
    """An error other than a taken key is raised, whatever else the batch holds."""
    with pytest.raises(BulkWriteError):
        await insert_missing(database["things"], [{"_id": 1}, {"_id": 1}, {"_id": [1]}])


async def indexes_of(database: Database) -> dict[str, Any]:
    return {name: dict(index) for name, index in (await database["things"].index_information()).items()}


async def test_an_index_whose_definition_changed_is_built_anew(database: Database) -> None:
    """Other options or other keys under the same name replace the index; what somebody else made stays as it is."""
    await database["things"].create_index("theirs")
    before = [IndexModel("at"), IndexModel("kind", name="named"), IndexModel("same")]
    await make_indexes(database, {"things": before})
    after = [
        IndexModel("at", expireAfterSeconds=60),
        IndexModel([("kind", 1), ("size", 1)], name="named", sparse=True),
        IndexModel("same"),
    ]
    await make_indexes(database, {"things": after})
    await make_indexes(database, {"things": after})
    found = await indexes_of(database)
    assert found.keys() == {"_id_", "theirs_1", "at_1", "named", "same_1"}
    assert found["at_1"]["expireAfterSeconds"] == 60
    assert (found["named"]["key"], found["named"]["sparse"]) == ([("kind", 1), ("size", 1)], True)


async def test_a_unique_index_is_never_away(database: Database) -> None:
    """A unique index that changed is refused, and the one that is there goes on to hold; so is a change to be unique."""
    await make_indexes(database, {"things": [IndexModel("key", unique=True), IndexModel("plain")]})
    for changed in (IndexModel("key", unique=True, sparse=True), IndexModel("plain", unique=True)):
        with pytest.raises(ValueError, match="not replaced"):
            await make_indexes(database, {"things": [changed]})
    found = await indexes_of(database)
    assert found["key_1"]["unique"]
    assert "plain_1" in found


async def test_replicas_that_start_together_agree_on_indexes(database: Database) -> None:
    """Five replicas that find an old definition at the same time all start, and leave the new one."""
    await make_indexes(database, {"things": [IndexModel("at")]})
    await database["things"].insert_many([{"at": number} for number in range(5_000)])
    changed = {"things": [IndexModel("at", sparse=True)]}
    await asyncio.gather(*(make_indexes(database, changed) for _ in range(5)))
    assert (await indexes_of(database))["at_1"]["sparse"]


async def test_an_index_may_take_longer_than_other_operations(mongodb: str, database: Database) -> None:
    """Building an index waits for as long as it takes, however short the limit of ordinary operations is."""
    hasty: AsyncIOMotorClient[mongo.Document] = AsyncIOMotorClient(mongodb, timeoutMS=1)
    try:
        await make_indexes(hasty[database.name], {"things": [IndexModel("at")]})
    finally:
        hasty.close()
    assert "at_1" in await indexes_of(database)


@pytest.mark.parametrize("block", [1, 7])
async def test_nobody_gets_an_id_twice(database: Database, block: int) -> None:
    """Replicas that take at the same time, and one that starts anew, get ids of their own, from 1 on."""
    replicas = [Ids(database, "jobs", block=block) for _ in range(3)]
    taken = await asyncio.gather(*(each.take(count) for each in replicas for count in (1, 2, 3, 10)))
    ids = [number for numbers in (*taken, await Ids(database, "jobs", block=block).take(4)) for number in numbers]
    assert len(ids) == len(set(ids)) == 52
    assert min(ids) == 1


async def test_ids_of_one_replica_grow(database: Database) -> None:
    """What one replica takes is consecutive within a call and grows from call to call."""
    ids = Ids(database, "jobs", block=10)
    taken = [await ids.take(count) for count in (3, 5, 4, 1, 30, 1)]
    assert [len(each) for each in taken] == [3, 5, 4, 1, 30, 1]
    numbers = [number for each in taken for number in each]
    assert numbers == sorted(set(numbers))


async def test_each_sequence_counts_for_itself(database: Database) -> None:
    """Two sequences both start at 1, in one document."""
    assert await Ids(database, "jobs").take() == range(1, 2)
    assert await Ids(database, "subnets").take(2) == range(1, 3)
    assert await database["counters"].find().to_list(None) == [{"_id": "ids", "jobs": 1, "subnets": 2}]


@asynccontextmanager
async def through_proxy(mongodb: str, database: Database) -> AsyncIterator[tuple[Proxy, Database]]:
    """The same database, by way of a proxy."""
    [(host, port)] = parse_uri(mongodb)["nodelist"]
    async with proxy(host, port) as between:
        detour = mongo.connect(f"mongodb://127.0.0.1:{between.port}/?directConnection=true", database.name)
        yield between, detour
        await asyncio.to_thread(detour.client.close)  # says goodbye through the proxy, which lives on this loop


@pytest.mark.parametrize("trouble", ["refuse", "swallow"])
async def test_nobody_there_is_a_bad_day(mongodb: str, database: Database, trouble: str) -> None:
    """With MongoDB gone or silent every call raises DependencyError in bounded time, and works again after it."""
    async with through_proxy(mongodb, database) as (between, detour):
        await mongo.ping(detour)
        if trouble == "refuse":
            await between.refuse()
        else:
            between.swallow()
        async with asyncio.timeout(4 * TIMEOUT_MS / 1000):
            with pytest.raises(DependencyError):
                await mongo.ping(detour)
            with pytest.raises(DependencyError):
                await insert_missing(detour["things"], [{"_id": 1}])
        await between.heal()
        await mongo.ping(detour)


@pytest.mark.proves("F7")
async def test_a_cut_connection_costs_nothing(mongodb: str, database: Database) -> None:
    """A write that finds its connection cut is done once all the same, by the driver's own retry."""
    async with through_proxy(mongodb, database) as (between, detour):
        ids = Ids(detour, "jobs")
        for expected in range(1, 6):
            assert await ids.take() == range(expected, expected + 1)
            await between.cut()
