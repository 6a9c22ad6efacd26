"""`scanfleet scan`: from targets to a table in one command."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, Final, TypeVar

import click

from scanfleet import rest
from scanfleet.policy import PolicyError, Preset, ScanPolicy, fill_in
from scanfleet.ports import PortSet
from scanfleet_cli import calls, changes, coverage, findings, follow, resolve, views
from scanfleet_cli.errors import ApiError, CommandError, Exit, UnavailableError
from scanfleet_cli.output import Format, Row, count, printable
from scanfleet_cli.session import Session, formats, with_session

T = TypeVar("T")

ATTEMPTS: Final = 3  # to make an object whose POST was cut, each after a look whether it is there


_Watched = Callable[[Row], bool]
"""Whether a result is one of those that `--fail-on` names."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One target, as it was named."""

    cidr: str
    name: str | None = None
    exclude: tuple[str, ...] = ()

    @property
    def scope(self) -> tuple[str, frozenset[str]]:
        """What is scanned: the network, and the exclusions that have an effect, merged."""
        return _scope(self.cidr, self.exclude)


@click.command()
@click.argument("targets", nargs=-1, metavar="TARGET…")
@click.option(
    "--targets",
    "file",
    type=click.File(),
    help="File of targets, one a line, or CSV with the columns cidr,name,exclude.",
)
@click.option("--policy", metavar="NAME|ID", help="Policy to scan by, instead of one of the following options.")
@resolve.policy_options
@click.option(
    "--exclude", multiple=True, metavar="CIDR", help="Network to leave out of each target; repeat for several."
)
@click.option("--name", help="Name of a subnet that is made.")
@click.option("--no-watch", is_flag=True, help="Submit and return.")
@follow.timeout_option
@click.option("--fail-on", metavar="open|PORTS", help="Exit 8 when a port is open, or one of these.")
@click.option("--key", help="Idempotency key: repeating the command with the same key creates nothing more.")
@follow.found_option
@follow.cancel_option
@formats
@with_session
def scan(
    session: Session,
    /,
    *,
    targets: Sequence[str],
    file: Any,
    policy: str | None,
    exclude: Sequence[str],
    name: str | None,
    no_watch: bool,
    timeout: str | None,
    fail_on: str | None,
    key: str | None,
    found: bool,
    cancel_on_interrupt: bool,
    **policy_options: Any,
) -> int:
    """Scan networks: register what is missing, submit, watch, print what was found.

    TARGET is a CIDR or an address, or - for a list on stdin. A subnet with the same CIDR and exclusions, and a policy with the
    same fields, are used as they are; others are made.
    """
    output = session.output
    if output.fields is not None and output.format.machine:
        raise CommandError(f"--json chooses fields of results and goes without -o {output.format}")
    printer = findings.Printer(output) if found else None
    limit, watched_ports = follow.seconds(timeout), _fail_ports(fail_on)
    wanted = list(_targets(targets, file, exclude, name))
    chosen, policy_word = _policy(session, policy, resolve.policy_fields(policy_options))
    known = list(resolve.subnets(session))
    subnets = [_subnet(session, each, known) for each in wanted]
    subnet_ids = [subnet.id for subnet, _ in subnets]
    reply = changes.create_jobs(session, subnet_ids, chosen.id, key)
    made = reply.read(calls.create_tasks(subnet_ids, chosen.id)).jobs
    for each, (subnet, word) in zip(made, subnets, strict=True):
        output.note(
            f"job {each.id} · {subnet.cidr} (subnet {subnet.id} {_quoted(subnet.name)}, {word}) · "
            f"{chosen.preset}, {_port_count(chosen)} (policy {chosen.id} {_quoted(chosen.name)}, {policy_word})"
        )
    if no_watch:
        output.many(
            [each.model_dump(mode="json") for each in made],
            changes.submitted_columns({s.id: s.cidr for s, _ in subnets}),
        )
        return Exit.DONE
    jobs = follow.to_the_end(
        session,
        [each.id for each in made],
        views.view_for(output),
        limit,
        cancel=cancel_on_interrupt,
        ended=lambda job: follow.print_end(session, job),
        found=printer.print if printer else None,
    )
    return _finish(session, jobs, watched_ports, printer)


def _finish(
    session: Session, jobs: Sequence[views.Followed], watched: _Watched | None, printer: findings.Printer | None
) -> int:
    """Print what the jobs found, except what was printed while they ran; the exit code by their ends and `watched`."""
    output = session.output
    documents, rows = [], []
    for each in jobs:
        found = list(findings.rows(session, each.job_id))
        rows += found
        ledger = each.ledger and each.ledger.model_dump(mode="json", exclude={"not_probed"})
        documents.append({"job": each.task and each.task.model_dump(mode="json"), "ledger": ledger, "results": found})
        if not found and each.ledger is not None:
            output.note(findings.nothing(each, each.ledger))
    _print(session, documents, rows, printer)
    code = follow.code_of(jobs)
    matched = watched is not None and any(map(watched, rows))
    return Exit.MATCHED if matched and code is Exit.DONE else code


def _print(session: Session, documents: Sequence[Row], rows: Sequence[Row], printer: findings.Printer | None) -> None:
    output = session.output
    match output.format:
        case _ if printer is not None:
            for row in rows:
                printer.print(row)
        case Format.JSON:
            output.say(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
        case Format.JSONL:
            for row in rows:
                output.line({"kind": "result"} | dict(row))
        case _:
            output.many(rows, findings.columns(), "ip_address")
    if rows:
        machines = len({row["ip_address"] for row in rows})
        output.note(f"{count(len(rows), 'open port')} on {count(machines, 'machine')}")


def _quoted(name: str) -> str:
    return f'"{printable(name)}"'


def _port_count(policy: ScanPolicy) -> str:
    return count(policy.port_set.count, "port")


def _fail_ports(text: str | None) -> _Watched | None:
    if text is None:
        return None
    if text == "open":
        return lambda row: row["status"] == "open"
    try:
        ports = PortSet.parse(text)
    except ValueError as error:
        raise CommandError(f"--fail-on: {error}", hint='"open", or ports such as 22,8000-8100') from error
    ranges = {"tcp": ports.tcp, "udp": ports.udp}
    return lambda row: any(first <= row["port"] <= last for first, last in ranges.get(row["protocol"], ()))


# Targets


def _targets(given: Sequence[str], file: Any, exclude: Sequence[str], name: str | None) -> Iterator[Wanted]:
    lines: list[str] = []
    if file is not None:
        lines += file
    if "-" in given:
        lines += sys.stdin
    wanted = [Wanted(each) for each in given if each != "-"] + list(_of_lines(lines))
    if not wanted:
        raise CommandError("no target", hint="scanfleet scan 192.0.2.0/24, or --targets FILE")
    named: set[tuple[str, frozenset[str]]] = set()
    for each in wanted:
        target = Wanted(resolve.canonical(each.cidr), each.name or name, (*each.exclude, *exclude))
        if target.scope in named:
            raise CommandError(f"target {printable(each.cidr)} is named twice")
        named.add(target.scope)
        yield target


def _of_lines(lines: Iterable[str]) -> Iterator[Wanted]:
    """Targets of a file: a CIDR or address a line, or CSV with a first line that names the columns."""
    rows = [line for text in lines if (line := text.partition("#")[0].strip())]
    if rows and "cidr" in rows[0].lower().split(","):
        for row in csv.DictReader(rows):
            cells = {
                (key or "").strip().lower(): (value or "").strip()
                for key, value in row.items()
                if isinstance(value, str)
            }
            yield Wanted(
                cells.get("cidr", ""),
                cells.get("name") or None,
                tuple(cells.get("exclude", "").replace(";", " ").split()),
            )
        return
    yield from map(Wanted, rows)


# What is reused and what is made


def _subnet(session: Session, wanted: Wanted, known: Sequence[rest.Subnet]) -> tuple[rest.Subnet, str]:
    name = wanted.name or resolve.own_name(wanted.cidr, sorted(wanted.exclude))
    body = resolve.body(rest.SubnetBody, {"name": name, "cidr": wanted.cidr, "exclude": list(wanted.exclude)})
    return find_or_make(
        session,
        known,
        lambda: resolve.subnets(session),
        lambda each: _scope(each.cidr, each.exclude) == wanted.scope,
        lambda: session.client.send(calls.create_subnet(body)),
    )


def _scope(cidr: str, exclude: Iterable[str]) -> tuple[str, frozenset[str]]:
    try:
        network = ip_network(cidr)
        within = [
            each for each in map(ip_network, exclude) if each.version == network.version and each.overlaps(network)
        ]
    except ValueError:
        return cidr, frozenset(exclude)
    return cidr, frozenset(map(str, coverage.merged(within)))


def _policy(session: Session, named: str | None, fields: dict[str, Any]) -> tuple[rest.Policy, str]:
    if named is not None:
        if fields:
            options = ", ".join(f"--{field.replace('_', '-')}" for field in fields)
            raise CommandError(f"--policy goes without {options}")
        return resolve.policy_named(session, named), "as it is"
    fields.setdefault("preset", str(Preset.STANDARD))
    expected: ScanPolicy | None = None
    with suppress(PolicyError, ValueError):  # this release does not know it; the service may, and makes it
        given = {name: value for name, value in fields.items() if name != "preset"}
        expected = fill_in(Preset(fields["preset"]), given)

    body = resolve.body(rest.PolicyBody, {"name": resolve.own_name(sorted(fields.items())), **fields})
    return find_or_make(
        session,
        list(resolve.policies(session)),
        lambda: resolve.policies(session),
        lambda each: expected is not None and _scan_of(each) == _scan_of(expected),
        lambda: session.client.send(calls.create_policy(body)),
    )


def _scan_of(policy: ScanPolicy) -> dict[str, Any]:
    return policy.model_dump(include=set(resolve.SCAN_FIELDS))


def find_or_make(
    session: Session,
    known: Iterable[T],
    read: Callable[[], Iterable[T]],
    is_wanted: Callable[[T], bool],
    make: Callable[[], T],
) -> tuple[T, str]:
    """The object that is there, else a new one, and which of the two in words.

    A POST whose outcome is unknown may have made it, so the objects are read again before the POST is repeated.

    Args:
        session: of the command.
        known: the objects that there are.
        read: reads them again.
        is_wanted: whether one will do.
        make: makes one.

    Raises:
        ApiError: the service refused it, or was busy.
        UnavailableError: the service did not answer.
    """
    for attempt in range(ATTEMPTS):
        if (found := next(filter(is_wanted, read() if attempt else known), None)) is not None:
            return found, "made now" if attempt else "as it is"
        try:
            return make(), "made now"
        except (ApiError, UnavailableError) as error:
            if not error.unsure or attempt == ATTEMPTS - 1:
                raise
        time.sleep(session.patience.pause(attempt + 1))
    raise AssertionError("unreachable")
