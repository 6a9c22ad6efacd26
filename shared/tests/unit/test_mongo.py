from __future__ import annotations

import pytest
from pymongo import errors
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

from scanfleet.errors import DependencyError
from scanfleet.mongo import bad_days


def bulk(*codes: int, concern: bool = False) -> BulkWriteError:
    return BulkWriteError(
        {
            "writeErrors": [{"index": index, "code": code} for index, code in enumerate(codes)],
            "writeConcernErrors": [{"code": 64}] if concern else [],
        },
    )


@pytest.mark.parametrize(
    "error",
    [
        errors.AutoReconnect("cut"),
        errors.NetworkTimeout("slow"),
        errors.NotPrimaryError("stepped down"),
        errors.ServerSelectionTimeoutError("nobody there"),
        errors.WaitQueueTimeoutError("all connections busy"),
        errors.ExecutionTimeout("too slow", 50),
        errors.WTimeoutError("no majority", 64),
        errors.CursorNotFound("restarted", 43),
        errors.ProtocolError("half an answer"),
        OperationFailure("not authorized", 13),
        OperationFailure("disk full", 14_031),
        bulk(11_000, concern=True),
        bulk(11_000, 91),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_bad_day_is_a_dependencys(error: PyMongoError) -> None:
    """What MongoDB or the way to it brings upon us becomes a DependencyError, with its cause."""
    with pytest.raises(DependencyError) as caught:
        async with bad_days():
            raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        OperationFailure("bad value", 2),
        OperationFailure("unknown operator", None),
        errors.DuplicateKeyError("taken", 11_000),
        errors.DocumentTooLarge("over 16 MB"),
        errors.InvalidOperation("closed client"),
        errors.ConfigurationError("no such option"),
        bulk(11_000),
        bulk(2, 91),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_our_own_bug_stays_what_it_is(error: PyMongoError) -> None:
    """An error that repeating cannot mend passes through unchanged, so that it is not retried for ever."""
    with pytest.raises(type(error)) as caught:
        async with bad_days():
            raise error
    assert caught.value is error


async def test_a_decorated_method_translates_too() -> None:
    """`bad_days` decorates a coroutine function, which then answers and raises as a block would."""

    @bad_days()
    async def ask(*, away: bool) -> int:
        if away:
            raise errors.AutoReconnect("cut")
        return 42

    assert await ask(away=False) == 42
    with pytest.raises(DependencyError):
        await ask(away=True)
