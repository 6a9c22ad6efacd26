"""Query parameters and rights that the routes share."""

from __future__ import annotations

import re
from typing import Annotated, Final

from fastapi import Query, Request

from scanfleet.errors import BadRequestError
from scanfleet.runtime.service import words
from scanfleet.scanning.targets import Network, parse_network
from scanfleet.security.auth import Principal

_PORT: Final = re.compile(r"[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]")

ServiceName = Annotated[str | None, Query(max_length=200)]
AddressText = Annotated[str | None, Query(max_length=50)]


def ports_in(request: Request) -> frozenset[int]:
    """Return the ports of the query; none selects every port.

    Raises:
        BadRequestError: one is not a port.
    """
    ports = words(request, "port")
    if not all(_PORT.fullmatch(port) for port in ports):
        raise BadRequestError("port must be a number from 0 to 65535")
    return frozenset(map(int, ports))


def network_in(address: str | None) -> Network | None:
    """Return the addresses of the query; None selects every address.

    Raises:
        BadRequestError: the text is not an address or a network.
    """
    try:
        return None if address is None else parse_network(address)
    except ValueError as error:
        raise BadRequestError(f"address: {error}") from error


def owner(caller: Principal) -> int | None:
    """Return the user whose objects the caller may read, None for every user's."""
    return None if caller.admin else caller.user_id
