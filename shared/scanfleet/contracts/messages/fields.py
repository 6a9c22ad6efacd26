"""The bounded field types of messages: every value is limited in size and validated in linear time."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Final

from pydantic import AfterValidator, Field

MAX_BYTES: Final = 1_000_000  # per value: below the broker's default limit of 1 MiB for a record with its headers
MAX_ID: Final = 2**53 - 1  # the largest exact integer of JavaScript
MAX_COUNT: Final = 2**63 - 1  # the largest integer of MongoDB
MAX_NUMBER: Final = 2**31 - 1
MAX_SECONDS: Final = 1e15  # above any possible plan: all ports of all addresses of a job at the slowest timing
MAX_REASON_CHARS: Final = 1_000
MAX_ERROR_CHARS: Final = 10_000  # of an error message for a caller
MAX_ADDRESS_CHARS: Final = 45  # an IPv6 address with an embedded IPv4 address
MAX_EVENT_ID_CHARS: Final = 200  # a chunk's id, a slash and an address are 110

_POSITIVE: Final = re.compile(r"[1-9][0-9]{0,15}")

Id = Annotated[int, Field(ge=0, le=MAX_ID)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
ChunkId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=64)]
"""Without a slash, which separates it from the address in the key of a host."""
WorkerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]
"""An instance of at most 64 characters, and the random digits of each process."""
Reason = Annotated[str, Field(max_length=MAX_REASON_CHARS)]
Word = Annotated[str, Field(max_length=100)]
"""A name assigned by the platform: a rule, an operation, a request id."""


def is_id(text: str) -> bool:
    """Return whether the text is a positive id in canonical form."""
    return _POSITIVE.fullmatch(text) is not None and int(text) <= MAX_ID


def _canonical(text: str) -> str:
    address = ip_address(text)
    if str(address) != text or "%" in text:  # two spellings of a host would count as two hosts; a zone may be any text
        raise ValueError("the address is not in its canonical form, or has a zone")
    return text


Address = Annotated[str, Field(max_length=MAX_ADDRESS_CHARS), AfterValidator(_canonical)]
"""Canonical and without a zone, so that equal addresses are equal strings."""
