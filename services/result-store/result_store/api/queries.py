"""Addresses and rights that the routes share."""

from __future__ import annotations

from scanfleet.errors import BadRequestError
from scanfleet.scanning.targets import Network, parse_network
from scanfleet.security.auth import Principal


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
