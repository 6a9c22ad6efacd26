"""`scanfleet doctor`: checks of the connection to the service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

import click
import httpx2

from scanfleet import VERSION
from scanfleet_cli import calls
from scanfleet_cli.client import Client, Reply
from scanfleet_cli.config import is_loopback
from scanfleet_cli.errors import ApiError, Exit, ScanfleetError
from scanfleet_cli.output import column, duration, printable
from scanfleet_cli.session import Session, formats, with_session
from scanfleet_cli.tokens import expiry

CLOCK_SECONDS: Final = 30.0  # maximum difference before the service rejects tokens

_FIELDS: Final = ("check", "ok", "detail")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    ok: bool
    detail: str


@click.command()
@formats(_FIELDS)
@with_session
def doctor(session: Session) -> int:
    """Check URL, TLS, clock, token and versions; exit 1 if a check fails."""
    rows = [{name: getattr(each, name) for name in _FIELDS} for each in _findings(session)]
    session.output.many(rows, [column("CHECK"), column("OK"), column("DETAIL")], "check")
    return Exit.DONE if all(row["ok"] for row in rows) else Exit.FAULT


def _findings(session: Session) -> Iterator[Finding]:
    try:
        place = session.endpoint
    except ScanfleetError as error:
        yield Finding("gateway", ok=False, detail=str(error))
        return
    yield Finding("gateway", ok=True, detail=f"{place.url}, from {place.source}")
    loopback = is_loopback(place.url)
    if place.url.startswith("https:"):
        yield Finding("tls", ok=True, detail="on")
    else:
        yield Finding(
            "tls",
            ok=loopback,
            detail="off: the token is sent unencrypted" if not loopback else "off, on this machine",
        )
    yield from _answers(session)


def _answers(session: Session) -> Iterator[Finding]:
    with Client(session.endpoint.url, transport=session.effects.transport) as anonymous:
        info = _try(lambda: anonymous.ask(calls.read_info(), timeout=0))
        if isinstance(info, ScanfleetError) and not isinstance(info, ApiError):
            yield Finding("service", ok=False, detail=str(info))
            return
        yield _versions(info)
    if isinstance(info, Reply):
        yield _clock(info)
    try:
        token = session.token()
    except ScanfleetError as error:
        yield Finding("token", ok=False, detail=str(error))
        return
    reply = _try(lambda: session.client.ask(calls.list_policies().page(1, 1), timeout=0))
    if isinstance(reply, Reply) and not isinstance(info, Reply):  # an older gateway
        yield _clock(reply)
    ends = _ends(token)
    detail = f"{ends}from {session.token_source}"
    yield Finding(
        "token", ok=isinstance(reply, Reply), detail=detail if isinstance(reply, Reply) else f"{detail}: {reply}"
    )


def _try(ask: Callable[[], Reply]) -> Reply | ScanfleetError:
    try:
        reply = ask()
        if not isinstance(reply.json, dict):
            return ApiError(reply.status, "the response is not an object: not a gateway")
    except ScanfleetError as error:
        return error
    return reply


def _versions(info: Reply | ScanfleetError) -> Finding:
    if isinstance(info, ApiError) and info.status == httpx2.codes.NOT_FOUND:
        return Finding(
            "service", ok=True, detail=f"available, without /api/v1/info: older than this command ({VERSION})"
        )
    if not isinstance(info, Reply):
        return Finding("service", ok=False, detail=str(info))
    version, api = printable(str(info.json.get("version"))), printable(str(info.json.get("api")))
    return Finding("service", ok=api == "v1", detail=f"version {version}, API {api}; this command is {VERSION}")


def _clock(reply: Reply) -> Finding:
    try:
        theirs = parsedate_to_datetime(reply.headers["date"])
    except (KeyError, ValueError):
        return Finding("clock", ok=True, detail="not compared: the response has no Date header")
    ahead = (datetime.now(UTC) - theirs).total_seconds()
    word = "ahead" if ahead > 0 else "behind"
    return Finding("clock", ok=abs(ahead) < CLOCK_SECONDS, detail=f"{duration(abs(ahead))} {word} of the service")


def _ends(token: str) -> str:
    """Format the expiry of a token, if it states one."""
    if (ends := expiry(token)) is None:
        return ""
    seconds = ends - time.time()
    return f"expires in {duration(seconds)}, " if seconds > 0 else f"expired {duration(-seconds)} ago, "
