"""The header `Idempotency-Key` of requests that create objects."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Depends, Header, Request

from scanfleet.contracts import rest
from scanfleet.contracts.messages.commands import MAX_KEY_CHARS
from scanfleet.errors import BadRequestError

_KEY: Final = r"^[\x21-\x7e]+$"

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=MAX_KEY_CHARS,
        pattern=_KEY,
        description="Visible ASCII, sent once and compared character by character, quotation marks included. A request with "
        "the same key and the same body within 7 days gets the same response and creates nothing.",
    ),
    rest.worded(_KEY, "must be visible ASCII without spaces"),
]


async def sent_key(request: Request, idempotency_key: IdempotencyKey = None) -> str | None:
    """Return the key of the request, None without one.

    Raises:
        BadRequestError: there are several.
    """
    if len(request.headers.getlist("Idempotency-Key")) > 1:
        raise BadRequestError('the header "Idempotency-Key" must be sent once')
    return idempotency_key


SentKey = Annotated[str | None, Depends(sent_key)]
