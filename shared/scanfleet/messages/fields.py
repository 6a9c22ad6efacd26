"""The bounded types that messages are made of: no value takes more than a message has bytes, or costs more than linear time."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Final

from pydantic import AfterValidator, Field

MAX_BYTES: Final = 1_000_000  # of one value, below the broker's default limit of 1 MiB for a record with its headers
MAX_ID: Final = 2**53 - 1  # the largest integer that JavaScript keeps exact
MAX_COUNT: Final = 2**63 - 1  # the largest integer that MongoDB keeps
MAX_NUMBER: Final = 2**31 - 1
MAX_SECONDS: Final = 1e15  # beyond what any plan can take: all ports of all addresses of a job at the slowest timing
MAX_REASON_CHARS: Final = 1_000  # of a text that says why, for a person
MAX_ERROR_CHARS: Final = 10_000  # of the answer to a caller
MAX_ADDRESS_CHARS: Final = 45  # an IPv6 address with an embedded IPv4 address

Id = Annotated[int, Field(ge=0, le=MAX_ID)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
ChunkId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=64)]
"""Without a slash, which separates it from an address in the key of a host."""
WorkerId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=100)]
"""An instance of at most 64 characters, and the digits that each process adds."""
Reason = Annotated[str, Field(max_length=MAX_REASON_CHARS)]
Word = Annotated[str, Field(max_length=100)]
"""A name that the platform itself gives: a rule, an operation, a request's id."""


def _canonical(text: str) -> str:
    address = ip_address(text)
    if str(address) != text or "%" in text:  # a host written in two ways would be two; a zone may be any text
        raise ValueError("the address is not in its canonical form, or has a zone")
    return text


Address = Annotated[str, Field(max_length=MAX_ADDRESS_CHARS), AfterValidator(_canonical)]
"""Canonical and without a zone, so that equal addresses are equal texts."""
