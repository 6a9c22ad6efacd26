from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymongo import errors
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

from scanfleet.errors import DependencyError
from scanfleet.runtime.mongo import DOCUMENT_CODES, DUPLICATE_KEY, dependency_errors


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
        errors.ServerSelectionTimeoutError("no server found"),
        errors.WaitQueueTimeoutError("all connections busy"),
        errors.ExecutionTimeout("too slow", 50),
        errors.WTimeoutError("no majority", 64),
        errors.CursorNotFound("restarted", 43),
        errors.ProtocolError("half an answer"),
        errors.InvalidOperation("closed client"),
        OperationFailure("an error without a code", None),
        bulk(11_000, concern=True),
        bulk(concern=True),
        bulk(11_000, 91),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_dependency_errors_with_any_error_of_the_server_raises_dependency_error(error: PyMongoError) -> None:
    """An error of MongoDB, or of the way to it, becomes a DependencyError with its cause."""
    with pytest.raises(DependencyError) as caught:
        async with dependency_errors():
            raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        OperationFailure("bad value", 2),
        errors.DuplicateKeyError("taken", 11_000),
        errors.DocumentTooLarge("over 16 MB"),
        OverflowError("an integer of more than 8 bytes"),
        bulk(11_000),
        bulk(2, 91),
        bulk(2, concern=True),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_dependency_errors_with_an_error_of_the_document_passes_it_through(error: Exception) -> None:
    """An error that repeating cannot cure passes through unchanged, so that its message is dead-lettered."""
    with pytest.raises(type(error)) as caught:
        async with dependency_errors():
            raise error
    assert caught.value is error


@pytest.mark.proves("F33")
@given(code=st.one_of(st.sampled_from(sorted(DOCUMENT_CODES)), st.integers(1, 20_000_000)))
async def test_dependency_errors_with_any_code_passes_through_only_those_of_documents(code: int) -> None:
    """Of all error codes of any server version, only those of the short list are attributed to the document."""
    blames = code in DOCUMENT_CODES
    for error in (OperationFailure("of a command", code), bulk(code), bulk(DUPLICATE_KEY, code)):
        with pytest.raises(OperationFailure if blames else DependencyError):
            async with dependency_errors():
                raise error


async def test_dependency_errors_decorates_a_method() -> None:
    """`dependency_errors` decorates a coroutine function, which then answers and raises as a block would."""

    @dependency_errors()
    async def ask(*, unavailable: bool) -> int:
        if unavailable:
            raise errors.AutoReconnect("cut")
        return 42

    assert await ask(unavailable=False) == 42
    with pytest.raises(DependencyError):
        await ask(unavailable=True)
