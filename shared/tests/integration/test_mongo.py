from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import uuid4

import pytest
from bson import encode
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import IndexModel, ReadPreference
from pymongo.errors import BulkWriteError, OperationFailure
from pymongo.uri_parser import parse_uri

from scanfleet.clock import utc_now
from scanfleet.errors import DependencyError
from scanfleet.runtime import mongo
from scanfleet.runtime.mongo import TIMEOUT_MS, Database, Ids, insert_missing, make_indexes
from scanfleet_testing.proxy import Proxy, proxy

pytestmark = pytest.mark.integration

_APP = "fails"  # the only client that a failpoint affects
# A server that is made to answer with one of these ends: it needs details which a failpoint does not give.
_DETAILED = {
    65,
    121,
    150,
    169,
    227,
    236,
    249,
    271,
    283,
    284,
    330,
    343,
    346,
    348,
    351,
    356,
    359,
    361,
    381,
    382,
    409,
    413,
    435,
    446,
}


@pytest.fixture
async def database(mongodb: str) -> AsyncIterator[Database]:
    database = mongo.connect(mongodb, f"mongo-{uuid4().hex[:12]}")
    yield database
    await database.client.drop_database(database.name)
    database.client.close()


async def test_connect_uses_majority_concerns(database: Database) -> None:
    """Writes wait for a majority's journal, reads see majority writes on the primary, in every collection."""
    collection = database["any"]
    assert collection.write_concern.document == {"w": "majority", "j": True}
    assert collection.read_concern.level == "majority"
    assert collection.read_preference == ReadPreference.PRIMARY


async def test_undecodable_document_hides_no_other(database: Database) -> None:
    """Beside a document with a time beyond the year 9999 and text that is not UTF-8, a query returns the others."""
    raw = encode({"_id": 1, "at": DatetimeMS(2**61), "text": "not valid"}).replace(b"not valid", b"not \xff\xfe!!!")
    await database["any"].insert_one(cast(Any, RawBSONDocument(raw)))
    await database["any"].insert_one({"_id": 2})
    found = [each async for each in database["any"].find().sort("_id", 1)]
    assert [(each["_id"], each.get("text")) for each in found] == [(1, r"not \xff\xfe!!!"), (2, None)]


async def test_stored_time_round_trips_with_its_zone(database: Database) -> None:
    """A stored time is read equal, with its time zone."""
    now = utc_now()
    await database["times"].insert_one({"_id": 1, "at": now})
    found = await database["times"].find_one({"_id": 1})
    assert found is not None
    assert found["at"] == now


async def test_insert_missing_stores_only_new_documents(database: Database) -> None:
    """Documents with existing keys are returned by index and stay unchanged; the others are stored."""
    things = database["things"]
    assert await insert_missing(things, [{"_id": 1, "by": "first"}]) == set()
    batch = [{"_id": 0, "by": "second"}, {"_id": 1, "by": "second"}, {"_id": 2, "by": "second"}]
    assert await insert_missing(things, batch) == {1}
    assert [each["by"] for each in await things.find(sort=[("_id", 1)]).to_list(None)] == ["second", "first", "second"]


async def test_insert_missing_raises_errors_other_than_duplicates(database: Database) -> None:
    """An error other than a duplicate key is raised, whatever else the batch contains."""
    with pytest.raises(BulkWriteError):
        await insert_missing(database["things"], [{"_id": 1}, {"_id": 1}, {"_id": [1]}])


async def indexes_of(database: Database) -> dict[str, Any]:
    return {name: dict(index) for name, index in (await database["things"].index_information()).items()}


def thing_indexes(*models: IndexModel) -> dict[str, list[IndexModel]]:
    return {"things": list(models)}


async def test_make_indexes_with_a_higher_version_replaces_the_older_one(database: Database) -> None:
    """A higher version replaces its predecessors, with or without a version in their names, and leaves other indexes alone."""
    await database["things"].create_index("theirs")
    await make_indexes(
        database, thing_indexes(IndexModel("at"), IndexModel("kind", name="named_v1"), IndexModel("same"))
    )
    after = thing_indexes(
        IndexModel("at", name="at_1_v2", expireAfterSeconds=60),
        IndexModel([("kind", 1), ("size", 1)], name="named_v3", sparse=True),
        IndexModel("same"),
    )
    await make_indexes(database, after)
    await make_indexes(database, after)
    found = await indexes_of(database)
    assert found.keys() == {"_id_", "theirs_1", "at_1_v2", "named_v3", "same_1"}
    assert found["at_1_v2"]["expireAfterSeconds"] == 60
    assert (found["named_v3"]["key"], found["named_v3"]["sparse"]) == ([("kind", 1), ("size", 1)], True)


async def test_make_indexes_of_an_older_release_keeps_a_newer_version(database: Database) -> None:
    """An older replica that restarts neither builds its version again nor drops the newer one."""
    newer = thing_indexes(IndexModel("at", name="at_1_v10", sparse=True))
    await make_indexes(database, newer)
    before = await indexes_of(database)
    await make_indexes(database, thing_indexes(IndexModel("at", name="at_1_v9")))
    assert await indexes_of(database) == before


async def test_make_indexes_with_a_changed_definition_of_the_same_version_raises(database: Database) -> None:
    """A changed definition under an unchanged name is an error, since older replicas would change it back."""
    await make_indexes(database, thing_indexes(IndexModel("key", unique=True), IndexModel("plain")))
    for changed in (IndexModel("key", unique=True, sparse=True), IndexModel("plain", unique=True)):
        with pytest.raises(ValueError, match=r"index .*_1 of things"):
            await make_indexes(database, thing_indexes(changed))
    found = await indexes_of(database)
    assert found["key_1"]["unique"]
    assert "plain_1" in found


async def test_make_indexes_never_drops_a_unique_index_before_its_successor_is_built(database: Database) -> None:
    """A unique index is replaced where MongoDB can hold both versions, and else stays."""
    await make_indexes(database, thing_indexes(IndexModel("key", unique=True)))
    with pytest.raises(ValueError, match="key_1_v2"):
        await make_indexes(database, thing_indexes(IndexModel("key", name="key_1_v2", unique=True)))
    assert (await indexes_of(database)).keys() == {"_id_", "key_1"}
    longer = thing_indexes(IndexModel([("key", 1), ("more", 1)], name="key_1_v2", unique=True))
    await make_indexes(database, longer)
    assert (await indexes_of(database)).keys() == {"_id_", "key_1_v2"}


async def test_replicas_that_start_together_agree_on_indexes(database: Database) -> None:
    """Five replicas that find an old version at the same time all start, and leave the new one."""
    await make_indexes(database, thing_indexes(IndexModel("at")))
    await database["things"].insert_many([{"at": number} for number in range(5_000)])
    changed = thing_indexes(IndexModel("at", name="at_1_v2", expireAfterSeconds=60))
    await asyncio.gather(*(make_indexes(database, changed) for _ in range(5)))
    assert (await indexes_of(database)).keys() == {"_id_", "at_1_v2"}


async def test_make_indexes_is_not_limited_by_the_operation_timeout(mongodb: str, database: Database) -> None:
    """Building an index may take longer than the timeout of ordinary operations."""
    hasty: AsyncIOMotorClient[mongo.Document] = AsyncIOMotorClient(mongodb, timeoutMS=1)
    try:
        await make_indexes(hasty[database.name], {"things": [IndexModel("at")]})
    finally:
        hasty.close()
    assert "at_1" in await indexes_of(database)


async def test_ids_are_unique_across_replicas(database: Database) -> None:
    """Replicas that take ids at the same time, and one that restarts, get distinct ids, from 1 on."""
    replicas = [Ids(database, "jobs") for _ in range(3)]
    taken = await asyncio.gather(*(each.take(count) for each in replicas for count in (1, 2, 3, 10)))
    ids = [number for numbers in (*taken, await Ids(database, "jobs").take(4)) for number in numbers]
    assert sorted(ids) == list(range(1, 53))


async def test_ids_increase_across_replicas(database: Database) -> None:
    """The ids that replicas take in turn are consecutive."""
    replicas = [Ids(database, "jobs") for _ in range(3)]
    taken = [await replicas[turn % 3].take(count) for turn, count in enumerate((3, 5, 4, 1, 30, 1))]
    assert [len(each) for each in taken] == [3, 5, 4, 1, 30, 1]
    assert [number for each in taken for number in each] == list(range(1, 45))


async def test_ids_of_two_sequences_are_independent(database: Database) -> None:
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
        await asyncio.to_thread(detour.client.close)  # closes its sessions through the proxy, which runs on this loop


@pytest.mark.parametrize("trouble", ["refuse", "swallow"])
async def test_unreachable_server_raises_dependency_error(mongodb: str, database: Database, trouble: str) -> None:
    """While MongoDB is down or silent every call raises DependencyError in bounded time, and succeeds afterwards."""
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


@asynccontextmanager
async def failing(mongodb: str, code: int, **options: Any) -> AsyncIterator[None]:
    """Let the server answer every `find` and `insert` with this error."""
    client: AsyncIOMotorClient[mongo.Document] = AsyncIOMotorClient(mongodb)
    fail = {"failCommands": ["find", "insert"], "errorCode": code, "appName": _APP, **options}
    try:
        await client.admin.command({"configureFailPoint": "failCommand", "mode": "alwaysOn", "data": fail})
        yield
    finally:
        await client.admin.command({"configureFailPoint": "failCommand", "mode": "off"})
        client.close()


@pytest.fixture
def hurried(mongodb: str, database: Database) -> Iterator[mongo.Collection]:
    """The test's collection by a client that fails soon, and alone, with `failing`."""
    client: AsyncIOMotorClient[mongo.Document] = AsyncIOMotorClient(
        mongodb, appname=_APP, retryReads=False, retryWrites=False, heartbeatFrequencyMS=500
    )
    yield client[database.name]["things"]
    client.close()


@pytest.mark.proves("F33")
@pytest.mark.parametrize("code", [365, 8000, 371, 100, 112, 24, 211, 292, 13_388, 11_601, 10_107, 91])
async def test_server_error_raises_dependency_error(mongodb: str, hurried: mongo.Collection, code: int) -> None:
    """For reads and writes, an error of a full, blocked or busy server is a DependencyError."""
    async with failing(mongodb, code):
        with pytest.raises(DependencyError):
            await insert_missing(hurried, [{"_id": 1}])
        with pytest.raises(DependencyError):
            async with mongo.dependency_errors():
                await hurried.find_one({"_id": 1})
    assert await insert_missing(hurried, [{"_id": 1}]) == set()


@pytest.mark.proves("F33")
async def test_write_concern_error_raises_dependency_error(mongodb: str, hurried: mongo.Collection) -> None:
    """A write that no majority confirms raises DependencyError, although it may be stored."""
    concern = {"code": 100, "errmsg": "no majority"}
    async with failing(mongodb, 0, writeConcernError=concern):
        with pytest.raises(DependencyError):
            await insert_missing(hurried, [{"_id": 1}])


@pytest.mark.proves("F33")
async def test_errors_of_the_server_table_raise_dependency_error_unless_they_name_a_document(
    mongodb: str, hurried: mongo.Collection
) -> None:
    """Of all error codes that the server has a name for only those of the short list are passed through."""
    passed, named = set[int](), 0
    for code in [
        *(set(range(1, 500)) - _DETAILED),
        8000,
        9001,
        10_003,
        10_334,
        12_586,
        12_587,
        14_031,
        17_280,
        46_841,
        50_768,
    ]:
        async with failing(mongodb, code):
            try:
                async with mongo.dependency_errors():
                    await hurried.insert_one({"_id": code})
            except DependencyError as error:
                cause = error.__cause__
            except OperationFailure as error:
                passed.add(code)
                cause = error
        named += isinstance(cause, OperationFailure) and not str((cause.details or {})["codeName"]).startswith(
            "Location"
        )
    assert passed == {code for code in mongo.DOCUMENT_CODES if code < 500} | {10_334, 17_280}
    assert named > 300


@pytest.mark.proves("F7")
async def test_write_on_a_cut_connection_is_applied_once(mongodb: str, database: Database) -> None:
    """A write whose connection was cut is applied once, by the driver's retry."""
    async with through_proxy(mongodb, database) as (between, detour):
        ids = Ids(detour, "jobs")
        for expected in range(1, 6):
            assert await ids.take() == range(expected, expected + 1)
            await between.cut()


@pytest.mark.proves("F7")
async def test_count_on_a_cut_connection_is_repeated(mongodb: str, database: Database) -> None:
    """A count whose connection was cut is sent again, as the driver does it for other reads."""
    await database["jobs"].insert_many([{"_id": number} for number in range(3)])
    async with through_proxy(mongodb, database) as (between, detour):
        for _ in range(5):
            assert await mongo.count(detour["jobs"], {"_id": {"$gt": 0}}) == 2
            await between.cut()
