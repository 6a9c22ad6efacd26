"""MongoDB as every repository uses it; besides repositories this is the only module that knows the driver.

A write counts when a majority has it in its journal, and a read sees only such writes, on the primary: what a service has
acknowledged survives any one machine, and no reader sees what may yet be undone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any, Final

import pymongo
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection, AsyncIOMotorDatabase
from pymongo import IndexModel, ReadPreference, ReturnDocument
from pymongo.errors import (
    BulkWriteError,
    ConnectionFailure,
    OperationFailure,
    ProtocolError,
    PyMongoError,
)

from scanfleet.errors import DependencyError

log = logging.getLogger(__name__)

Document = dict[str, Any]
Database = AsyncIOMotorDatabase[Document]
Collection = AsyncIOMotorCollection[Document]

# For one operation with all its retries, the search for a primary among them: an HTTP caller gets its 503 while it still
# waits, and a handler's batch is tried again anyway.
TIMEOUT_MS: Final = 5_000

BUILD_SECONDS: Final = 3_600  # for an index over what a large platform has gathered; usually there is nothing to build

DUPLICATE_KEY: Final = 11_000
_NO_SUCH_INDEX: Final = 27
_DEFINED_OTHERWISE: Final = frozenset({85, 86})  # an index of that name has other options, or other keys
_BUILD_ABORTED: Final = 276

# What the server answers on a bad day of its own; every other code says that the request is wrong, which is our bug.
_BAD_DAY_CODES: Final = frozenset(
    {
        6,  # HostUnreachable
        7,  # HostNotFound
        13,  # Unauthorized: a configuration that an operator mends, no fault of the message in hand
        18,  # AuthenticationFailed: the same
        43,  # CursorNotFound: the server was restarted under a cursor
        50,  # MaxTimeMSExpired
        64,  # WriteConcernFailed
        89,  # NetworkTimeout
        91,  # ShutdownInProgress
        133,  # FailedToSatisfyReadPreference
        134,  # ReadConcernMajorityNotAvailableYet
        175,  # QueryPlanKilled: an index was dropped or the collection moved under the cursor
        189,  # PrimarySteppedDown
        202,  # NetworkInterfaceExceededTimeLimit
        239,  # SnapshotTooOld: the server was busy for so long that it forgot the moment we asked for
        246,  # SnapshotUnavailable: no majority yet
        262,  # ExceededTimeLimit
        9001,  # SocketException
        10_058,  # LegacyNotPrimary
        10_107,  # NotWritablePrimary
        11_600,  # InterruptedAtShutdown
        11_602,  # InterruptedDueToReplStateChange
        13_435,  # NotPrimaryNoSecondaryOk
        13_436,  # NotPrimaryOrSecondary
        14_031,  # OutOfDiskSpace
    },
)


def connect(uri: str, database: str) -> Database:
    """The database, without touching the network yet; close it with `database.client.close()`.

    Raises:
        pymongo.errors.ConfigurationError: the URI is not one.
    """
    client: AsyncIOMotorClient[Document] = AsyncIOMotorClient(
        uri,
        w="majority",
        journal=True,
        readConcernLevel="majority",
        timeoutMS=TIMEOUT_MS,
        serverSelectionTimeoutMS=TIMEOUT_MS,  # for what has no other limit: closing
        retryWrites=True,
        retryReads=True,
        tz_aware=True,
        tzinfo=UTC,
    )
    return client.get_database(database, read_preference=ReadPreference.PRIMARY)


@asynccontextmanager
async def bad_days() -> AsyncIterator[None]:
    """Turn a bad day of MongoDB into `DependencyError`; what is our own bug passes through.

    Decorates a coroutine function (`@bad_days()`) or wraps a part of one (`async with bad_days():`).

    Raises:
        DependencyError: MongoDB is away, slow, changing its primary, full or closed to us.
    """
    try:
        yield
    except PyMongoError as error:
        if _is_bad_day(error):
            raise DependencyError(f"MongoDB: {error}") from error
        raise


@bad_days()
async def ping(database: Database) -> None:
    """Return when the primary has answered.

    Raises:
        DependencyError: it did not.
    """
    await database.command("ping")


@bad_days()
async def insert_missing(collection: Collection, documents: Sequence[Document]) -> set[int]:
    """Insert the documents whose unique keys are not there yet; answer the indexes of the others.

    Raises:
        DependencyError: any of them may be stored; calling again is safe.
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


@bad_days()
async def make_indexes(database: Database, indexes: Mapping[str, Sequence[IndexModel]]) -> None:
    """Make these indexes, by collection; one that is there under another definition is dropped and built anew.

    Meanwhile queries do without it. Indexes of other names are not ours and stay. A unique index keeps a promise, which
    nothing would keep in between, so it is not replaced: a changed one needs another name.

    Raises:
        DependencyError: some of them may be made; call again.
        ValueError: a unique index is there under another definition.
    """
    with pymongo.timeout(BUILD_SECONDS):
        for name, models in indexes.items():
            for model in models:
                await _make_index(database[name], model)


async def _make_index(collection: Collection, model: IndexModel) -> None:
    while True:
        try:
            await collection.create_indexes([model])
        except OperationFailure as error:
            if error.code == _BUILD_ABORTED:  # by another replica that drops the same old one, a moment after we did
                continue
            if error.code not in _DEFINED_OTHERWISE:
                raise
            if model.document.get("unique"):
                raise ValueError(f"{collection.name}: a unique index is not replaced: {error}") from error
        else:
            return
        log.warning("index %s of %s has changed: it is built anew", model.document["name"], collection.name)
        await _drop_index(collection, model.document["name"])


async def _drop_index(collection: Collection, name: str) -> None:
    try:
        await collection.drop_index(name)
    except OperationFailure as error:
        if error.code != _NO_SUCH_INDEX:  # another replica was first
            raise


class Ids:
    """Integers that start at 1 and grow, from one document `counters/ids` that every replica shares.

    Args:
        database: where the counters live.
        name: which sequence, for example `"jobs"`.
        block: how many are fetched at once. What a stopped process had left of its block is never used. With 1 every
            `take` is a write, and ids grow across replicas; with more they grow within one replica only.
    """

    def __init__(self, database: Database, name: str, *, block: int = 1) -> None:
        self._counters: Collection = database["counters"]
        self._name = name
        self._block = block
        self._left = range(0)
        self._lock = asyncio.Lock()

    @bad_days()
    async def take(self, count: int = 1) -> range:
        """`count` consecutive ids that nobody else gets.

        Raises:
            DependencyError: none is lost but a block; call again.
        """
        async with self._lock:
            if len(self._left) < count:
                size = max(count, self._block)
                counters = await self._counters.find_one_and_update(
                    {"_id": "ids"},
                    {"$inc": {self._name: size}},
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
                last = counters[self._name]
                self._left = range(last - size + 1, last + 1)
            taken, self._left = self._left[:count], self._left[count:]
            return taken


@bad_days()
async def advance_ids(database: Database, names: Iterable[str], above: int) -> None:
    """Let these sequences go on above `above`, unless they are there already. No `Ids` may be in use."""
    await database["counters"].update_one({"_id": "ids"}, {"$max": dict.fromkeys(names, above)}, upsert=True)


def beyond() -> int:
    """A number above all that any sequence has reached by now, for one that was set back and does not know how far it was.

    It goes with the time: nothing counts on for as long as a hundred thousand a second on average, and no number reaches
    2**53, where JavaScript ends, in the next two thousand years.
    """
    return int(time.time()) * 100_000


def _is_bad_day(error: PyMongoError) -> bool:
    if error.timeout or isinstance(error, (ConnectionFailure, ProtocolError)):
        return True
    if isinstance(error, BulkWriteError):
        codes = {each["code"] for each in error.details["writeErrors"]}
        return codes <= _BAD_DAY_CODES | {DUPLICATE_KEY} and bool(
            error.details["writeConcernErrors"] or codes & _BAD_DAY_CODES,
        )
    return isinstance(error, OperationFailure) and error.code in _BAD_DAY_CODES
