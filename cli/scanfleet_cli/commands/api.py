"""`scanfleet api`: raw requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import parse_qs
from uuid import uuid4

import click

from scanfleet.contracts import rest
from scanfleet_cli.calls import PAGE_SIZE, Call, ListCall
from scanfleet_cli.errors import CommandError
from scanfleet_cli.session import Session, read_text, with_session

_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_REPEATABLE: Final = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_KEYED: Final = frozenset({"/api/v1/task", *(resource.path for resource in rest.RESOURCES)})


@click.command()
@click.argument(
    "method",
    metavar="METHOD",
    type=click.Choice(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"], case_sensitive=False),
)
@click.argument("path")
@click.option(
    "-f", "--field", "texts", multiple=True, metavar="NAME=TEXT", help="Field of the body, or query parameter of a GET."
)
@click.option("-F", "--typed-field", "typed", multiple=True, metavar="NAME=JSON", help="The same with a JSON value.")
@click.option("-H", "--header", "headers", multiple=True, metavar="NAME: VALUE", help="Request header.")
@click.option("--input", "file", type=click.File(encoding="utf-8"), help="File with the JSON body; - is stdin.")
@click.option("--all", "every", is_flag=True, help="Read all pages of a list, and print one array.")
@with_session
def api(
    session: Session,
    /,
    *,
    method: str,
    path: str,
    texts: Sequence[str],
    typed: Sequence[str],
    headers: Sequence[str],
    file: Any,
    every: bool,
) -> None:
    """Send a raw request to the API, with the token, and print the body of the response."""
    method = method.upper()
    fields: dict[str, Any] = dict(_split(each, "=") for each in texts)
    for name, text in (_split(each, "=") for each in typed):
        fields[name] = _json(text, f"-F {name}")
    given: Mapping[str, str] = dict(_split(each, ":") for each in headers)
    body = _json(read_text(file), "--input") if file is not None else None
    path, _, parameters = path.partition("?")
    query: dict[str, Any] = parse_qs(parameters, keep_blank_values=True)
    if method in _WITH_BODY and body is None:
        body = fields
    else:
        query |= fields
    if method == "POST":
        given = {"Idempotency-Key": uuid4().hex} | dict(given)
    path = path if path.startswith("/") else f"/api/v1/{path}"
    if every:
        _all(session, ListCall(method, path, object, query=query, headers=given))
        return
    # A POST is repeated only if the service reads its key.
    repeatable = method in _REPEATABLE or path.rstrip("/") in _KEYED
    call: Call[Any] = Call(method, path, object, query=query, body=body, headers=given, repeatable=repeatable)
    with session.client.stream(call) as response:
        for text in response.iter_text():
            session.output.stdout.write(text)
    if session.output.terminal:
        session.output.emit()
    session.output.stdout.flush()


def _all(session: Session, call: ListCall[Any]) -> None:
    rows: list[Any] = []
    for reply in session.client.replies(call, PAGE_SIZE):
        lists = [value for value in reply.json.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise CommandError(f"{call.path} does not return a list; omit --all")
        rows += lists[0]
    session.output.emit(json.dumps(rows, indent=2))


def _split(text: str, sign: str) -> tuple[str, str]:
    name, found, value = text.partition(sign)
    if not found or not name.strip():
        raise CommandError(f"{text} is not NAME{sign}VALUE")
    return name.strip(), value.strip() if sign == ":" else value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"{what} is not JSON: {error}") from error
