"""Completions of a shell: contexts, and objects of the API with a description.

The shell blocks on them: a read times out after about a second, and an error yields no completions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem

from scanfleet_cli.errors import ScanfleetError
from scanfleet_cli.output import printable

if TYPE_CHECKING:
    from scanfleet_cli.calls import ListCall
    from scanfleet_cli.output import Row
    from scanfleet_cli.session import Session

LATEST: Final = 30  # number of suggested jobs
OBJECTS: Final = 100  # subnets and policies: one page

Read = Callable[["Session", str], Iterator[list[CompletionItem]]]
"""Yields completions of the incomplete word: first those available quickly, then more detailed ones."""


def complete_context(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the name of a context with its URL."""
    session: Session = context.find_root().obj
    with suppress(ScanfleetError):
        contexts = session.config.contexts().values()
        return [CompletionItem(each.name, help=printable(each.url)) for each in contexts if each.name.startswith(begun)]
    return []


def complete_job(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the id of one of the latest jobs: `41  running 62 % 127.9.8.0/24`."""
    return _in_time(context, _jobs, begun)


def complete_subnet(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the name of a subnet with its network."""
    return _in_time(context, _subnets, begun)


def complete_policy(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the name of a policy with its ports."""
    return _in_time(context, _policies, begun)


def _in_time(context: click.Context, read: Read, begun: str) -> list[CompletionItem]:
    root = context.find_root()
    session: Session = root.obj
    session.url, session.context = root.params.get("url"), root.params.get("context")
    session.token_file = root.params.get("token_file")
    found: list[CompletionItem] = []

    def work() -> None:
        with suppress(ScanfleetError):
            for items in read(session, begun):
                found[:] = items

    # A daemon does not delay the end of the process, for example while a token command runs.
    thread = threading.Thread(target=work, name="completion", daemon=True)
    thread.start()
    thread.join(session.effects.completion_seconds)
    return list(found)


def _jobs(session: Session, begun: str) -> Iterator[list[CompletionItem]]:
    from scanfleet.contracts.messages import JobStatus  # noqa: PLC0415 # only when a shell asks
    from scanfleet_cli import calls  # noqa: PLC0415 # as above

    jobs = [row for row in _page(session, calls.list_tasks(), LATEST) if str(row["id"]).startswith(begun)]
    states = {job["id"]: str(job["status"]) for job in jobs}
    networks: dict[int, str] = {}

    def items() -> list[CompletionItem]:
        described = []
        for job in jobs:
            network = networks.get(job["subnet_id"], f"subnet {job['subnet_id']}")
            described.append(CompletionItem(str(job["id"]), help=printable(f"{states[job['id']]} {network}")))
        return described

    yield items()
    networks |= {row["id"]: row["cidr"] for row in _page(session, calls.list_subnets(), OBJECTS)}
    yield items()
    for job in jobs:
        if not JobStatus(job["status"]).final:
            status = session.client.ask(calls.read_task(job["id"]), timeout=0).json["status"]
            states[job["id"]] = f"{status['status']} {status['progress']} %"
            yield items()


def _subnets(session: Session, begun: str) -> Iterator[list[CompletionItem]]:
    from scanfleet_cli import calls  # noqa: PLC0415 # only when a shell asks

    yield _named(_page(session, calls.list_subnets(), OBJECTS), lambda row: str(row["cidr"]), begun)


def _policies(session: Session, begun: str) -> Iterator[list[CompletionItem]]:
    from scanfleet_cli import calls  # noqa: PLC0415 # only when a shell asks

    rows = _page(session, calls.list_policies(), OBJECTS)
    yield _named(rows, lambda row: f"{row['preset']}, ports {row['ports']}", begun)


def _named(rows: Sequence[Row], describe: Callable[[Row], str], begun: str) -> list[CompletionItem]:
    """Complete names; an object whose name a shell would split, or that is not the only one of its name, by its id."""
    names = [row["name"] for row in rows]
    found = []
    for row in rows:
        plain = names.count(row["name"]) == 1 and all(c.isalnum() or c in "-_./:" for c in row["name"])
        value, about = (row["name"], "") if plain else (str(row["id"]), f"{row['name']} ")
        found.append(CompletionItem(value, help=printable(about + describe(row))))
    return [item for item in found if item.value.startswith(begun)]


def _page(session: Session, call: ListCall[Any], size: int) -> list[Row]:
    from scanfleet_cli.client import page_of  # noqa: PLC0415 # only when a shell asks

    found: list[Row] = page_of(session.client.ask(call.page(1, size), timeout=0), call.items)[call.items]
    return found
