"""Access to MongoDB for all repositories; apart from them this is the only module that imports the driver.

Writes use journaled majority write concern; reads use majority read concern on the primary. An acknowledged write
survives the loss of any one machine, and no reader sees a write that may be rolled back.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any, Final

import pymongo
import structlog
from bson import MaxKey, MinKey
from bson.codec_options import DatetimeConversion
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection, AsyncIOMotorCursor, AsyncIOMotorDatabase
from pymongo import IndexModel, ReadPreference, ReturnDocument
from pymongo.errors import AutoReconnect, BulkWriteError, OperationFailure, PyMongoError

from scanfleet.errors import DependencyError

_log = structlog.stdlib.get_logger(__name__)

Document = dict[str, Any]
Database = AsyncIOMotorDatabase[Document]
Collection = AsyncIOMotorCollection[Document]
Cursor = AsyncIOMotorCursor[Document]

# For one operation with all retries, including the search for a primary: an HTTP caller gets its 503 before its own
# timeout, and a handler's batch is retried anyway.
TIMEOUT_MS: Final = 5_000

_BY_ID: Final = [("_id", 1)]
_PAGE: Final = 100  # documents, whose conversion does not block the event loop

BUILD_SECONDS: Final = 3_600  # timeout for building an index over a large collection; usually there is nothing to build

DUPLICATE_KEY: Final = 11_000
_NO_SUCH_COLLECTION: Final = 26
_NO_SUCH_INDEX: Final = 27
_DEFINED_OTHERWISE: Final = frozenset({85, 86})  # an index of that name has other options, or other keys
_BUILD_ABORTED: Final = 276
_VERSIONED: Final = re.compile(r"(.+)_v([1-9][0-9]*)")

# Errors caused by a document or a query: a retry cannot succeed, while other documents may. Every other code, including
# those of later versions, is a failure of the server.
DOCUMENT_CODES: Final = frozenset(
    {
        2,  # BadValue
        9,  # FailedToParse
        14,  # TypeMismatch
        22,  # InvalidBSON
        53,  # InvalidIdField
        DUPLICATE_KEY,
        10_334,  # BSONObjectTooLarge
        17_280,  # KeyTooLong, before version 4.2
        17_419,  # an update would make the document too large
        17_420,  # the same for a replacement
    },
)


def connect(uri: str, database: str) -> Database:
    """Return the database without network access yet; close it with `database.client.close()`.

    Raises:
        pymongo.errors.ConfigurationError: the URI is invalid.
    """
    client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(
        uri,
        w="majority",
        journal=True,
        readConcernLevel="majority",
        timeoutMS=TIMEOUT_MS,
        serverSelectionTimeoutMS=TIMEOUT_MS,  # for operations without another limit: closing
        retryWrites=True,
        retryReads=True,
        tz_aware=True,
        tzinfo=UTC,
    )
    # Every document can be decoded: a damaged one fails where it is read, instead of each query that finds it.
    decoding = client.codec_options.with_options(
        datetime_conversion=DatetimeConversion.DATETIME_AUTO,  # beyond the year 9999
        unicode_decode_error_handler="backslashreplace",  # surrogates could be read, but not written as JSON
    )
    return client.get_database(database, codec_options=decoding, read_preference=ReadPreference.PRIMARY)


@asynccontextmanager
async def dependency_errors() -> AsyncIterator[None]:
    """Raise MongoDB driver errors as `DependencyError`, except errors caused by a document or a query.

    Decorates a coroutine function (`@dependency_errors()`) or wraps a part of one (`async with dependency_errors():`).

    Raises:
        DependencyError: MongoDB is unavailable, slow or full, or rejects the client; the same call may succeed later.
        pymongo.errors.OperationFailure: the server rejects a document or a query (`DOCUMENT_CODES`).
    """
    try:
        yield
    except PyMongoError as error:
        if _names_document(error):
            raise
        raise DependencyError(f"MongoDB: {error}") from error


@dependency_errors()
async def ping(database: Database) -> None:
    """Check that the primary answers.

    Raises:
        DependencyError: it does not.
    """
    await database.command("ping")


@dependency_errors()
async def insert_missing(collection: Collection, documents: Sequence[Document]) -> set[int]:
    """Insert the documents whose unique keys do not exist yet; return the positions of the others.

    Raises:
        DependencyError: any of them may have been stored; the call is idempotent.
    """
    if not documents:
        return set()
    try:
        await collection.insert_many(documents, ordered=False)
    except BulkWriteError as error:
        failed = error.details["writeErrors"]
        if error.details["writeConcernErrors"] or any(each["code"] != DUPLICATE_KEY for each in failed):
            raise
        return {each["index"] for each in failed}
    return set()


async def count(collection: Collection, wanted: Document) -> int:
    """Return the number of documents that match.

    The command `count` costs MongoDB three quarters of the aggregation that the driver's `count_documents` sends. It is as exact:
    it differs only in sharded clusters, and for a whole collection after a crash. The driver does not retry commands, so this does.

    Raises:
        DependencyError: MongoDB is unavailable.
    """

    async def counted() -> int:
        answer = await collection.database.command(
            "count", collection.name, query=wanted, readConcern=collection.read_concern.document
        )
        number: int = answer["n"]
        return number

    async with dependency_errors():
        with pymongo.timeout(TIMEOUT_MS / 1_000):
            try:
                return await counted()
            except AutoReconnect:
                return await counted()


async def scan_by_id(collection: Collection, first: Any = MinKey(), end: Any = MaxKey()) -> AsyncIterator[Document]:  # noqa: B008 # constants
    """Yield all documents in the order of their ids, from the id `first` up to `end`, which is excluded.

    Each page has its own timeout: the server applies the time limit of a cursor to all its batches together. Callers filter the
    documents themselves, since a search for rare documents would exceed the timeout of a page.

    Raises:
        DependencyError: MongoDB is unavailable; some documents may have been yielded.
    """
    seen = object()
    count = _PAGE
    while count == _PAGE:
        count = 0
        page = collection.find().hint(_BY_ID).min([("_id", first)]).max([("_id", end)]).limit(_PAGE)
        async with dependency_errors():
            async for document in page:
                count += 1
                if document["_id"] != seen:  # the last one of the previous page
                    yield document
                first = seen = document["_id"]


@dependency_errors()
async def make_indexes(database: Database, indexes: Mapping[str, Sequence[IndexModel]]) -> None:
    """Create these indexes, given by collection.

    The end of an index's name is its version: `queue_v2` replaces `queue_v1`, and a name without one is version 1. A
    changed definition needs a higher version. If a newer release has created a higher version, an older release creates
    and drops nothing. Indexes with other names stay.

    A new version is built before the old one is dropped, except where MongoDB allows only one of the two (equal keys,
    another TTL): then queries temporarily run without it. A unique index is never missing.

    Raises:
        DependencyError: some of them may have been created; the call is idempotent.
        ValueError: an index of that name and version has another definition, or a unique index prevents the creation of
            its successor.
    """
    with pymongo.timeout(BUILD_SECONDS):
        for name, models in indexes.items():
            for model in models:
                await _make_index(database[name], model)


async def _make_index(collection: Collection, model: IndexModel) -> None:
    base, version = _versioned(model.document["name"])
    while True:
        present = [(*_versioned(name), name) for name in await _index_names(collection)]
        others = {number: name for its_base, number, name in present if its_base == base and number != version}
        if any(number > version for number in others):
            return
        try:
            await collection.create_indexes([model])
        except OperationFailure as error:
            if error.code == _BUILD_ABORTED:  # another replica is dropping the same old index
                continue
            if error.code not in _DEFINED_OTHERWISE:
                raise
            if not others or model.document.get("unique"):
                raise ValueError(f"index {model.document['name']} of {collection.name}: {error}") from error
            await _drop_indexes(collection, others.values())
        else:
            await _drop_indexes(collection, others.values())
            return


def _versioned(name: str) -> tuple[str, int]:
    match = _VERSIONED.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, 1)


async def _index_names(collection: Collection) -> list[str]:
    try:
        return [index["name"] async for index in collection.list_indexes()]
    except OperationFailure as error:
        if error.code != _NO_SUCH_COLLECTION:
            raise
        return []


async def _drop_indexes(collection: Collection, names: Iterable[str]) -> None:
    for name in names:
        _log.warning(
            "index_outdated",
            collection=collection.name,
            index=name,
            cause="a newer version replaces it",
            next_step="the service drops it",
        )
        try:
            await collection.drop_index(name)
        except OperationFailure as error:
            if error.code != _NO_SUCH_INDEX:  # another replica was first
                raise


class Ids:
    """Increasing integers from 1, allocated from the document `counters/ids` that all replicas share.

    Args:
        database: holds the counters.
        name: the sequence, for example `"jobs"`.
    """

    def __init__(self, database: Database, name: str) -> None:
        self._counters: Collection = database["counters"]
        self._name = name

    @dependency_errors()
    async def take(self, count: int = 1) -> range:
        """Allocate `count` consecutive ids.

        Raises:
            DependencyError: these ids may stay unused; call again.
        """
        counters = await self._counters.find_one_and_update(
            {"_id": "ids"}, {"$inc": {self._name: count}}, upsert=True, return_document=ReturnDocument.AFTER
        )
        last = counters[self._name]
        return range(last - count + 1, last + 1)


@dependency_errors()
async def advance_ids(database: Database, names: Iterable[str], above: int) -> None:
    """Raise these sequences to at least `above`. No `Ids` may be in use meanwhile."""
    await database["counters"].update_one({"_id": "ids"}, {"$max": dict.fromkeys(names, above)}, upsert=True)


def next_id_floor() -> int:
    """Return an id greater than any issued so far, for sequences that a restore has set back.

    It is derived from the time: no sequence averages 100,000 ids a second, and the value stays below 2**53, the largest
    exact integer of JavaScript, for the next two thousand years.
    """
    return int(time.time()) * 100_000


def _names_document(error: PyMongoError) -> bool:
    if isinstance(error, BulkWriteError):
        codes = {each["code"] for each in error.details["writeErrors"]}
        if codes & DOCUMENT_CODES - {DUPLICATE_KEY}:
            return True  # retried one by one, each of the other documents raises its own error
        return codes == {DUPLICATE_KEY} and not error.details["writeConcernErrors"]
    return isinstance(error, OperationFailure) and error.code in DOCUMENT_CODES
