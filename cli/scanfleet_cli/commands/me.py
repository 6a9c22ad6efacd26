"""`scanfleet whoami` and `scanfleet limits`: the caller as the service identifies it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import click

from scanfleet.contracts import rest
from scanfleet_cli import calls
from scanfleet_cli.output import Row
from scanfleet_cli.session import Session, formats, supported, with_session

_WHO: Final = ("url", "url_source", "token_source", "user_id", "admin", "expires_at")


@click.command()
@formats(_WHO)
@with_session
def whoami(session: Session) -> None:
    """Show the gateway, the user, and the source of the token."""
    me = _me(session)
    found = {
        "url": session.endpoint.url,
        "url_source": session.endpoint.source,
        "token_source": session.token_source,
        "user_id": me["user_id"],
        "admin": me["admin"],
        "expires_at": me["expires_at"],
    }
    session.output.one(found, lambda: _who(found), "user_id")


def _who(found: Row) -> Iterator[str]:
    yield f"user {found['user_id']}{' (administrator)' if found['admin'] else ''}"
    yield f"  gateway  {found['url']} ({found['url_source']})"
    yield f"  token    from {found['token_source']}, expires {found['expires_at']}"


def _me(session: Session) -> Any:
    with supported("reads of the caller"):
        return session.ask(calls.read_me())


@click.command()
@formats(rest.Limits)
@with_session
def limits(session: Session) -> None:
    """Show the rate limits and their current use."""
    found: dict[str, dict[str, int]] = _me(session)["limits"]
    session.output.one(found, lambda: [" · ".join(_limit(name, each) for name, each in found.items())], "writes.left")


def _limit(name: str, limit: dict[str, int]) -> str:
    used = limit["limit"] - limit["left"]
    word = name.replace("_", " ")
    return f"{word} {used} of {limit['limit']}{' a minute' if 'reset' in limit else ''}"
