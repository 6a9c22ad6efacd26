"""`scanfleet scan`: scan targets in one command."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

from scanfleet.contracts import rest
from scanfleet.contracts.messages import Job
from scanfleet.contracts.messages.commands import MAX_SUBNETS
from scanfleet.scanning.policy import PolicyError, Preset, ScanPolicy, fill_in
from scanfleet.scanning.ports import PortSet
from scanfleet_cli import calls, changes, findings, follow, resolve, views
from scanfleet_cli.completion import complete_policy
from scanfleet_cli.errors import ApiError, CommandError, Exit, UnavailableError
from scanfleet_cli.output import Format, Row, count, printable
from scanfleet_cli.session import Session, formats, read_text, with_session

T = TypeVar("T")

ATTEMPTS: Final = 3  # attempts to create an object; after an unknown outcome the objects are read first


_Watched = Callable[[Row], bool]
"""Whether a result matches `--fail-on`."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One target of the command line or of a file."""

    cidr: str
    name: str | None = None
    exclude: tuple[str, ...] = ()

    @property
    def scope(self) -> resolve.Scope:
        return resolve.scope(self.cidr, self.exclude)


@click.command()
@click.argument("targets", nargs=-1, metavar="TARGET…")
@click.option(
    "--targets",
    "file",
    type=click.File(encoding="utf-8"),
    help="File of targets, one per line, or CSV with the columns cidr,name,exclude.",
)
@click.option(
    "--policy",
    metavar="NAME|ID",
    shell_complete=complete_policy,
    help="Existing policy, instead of the following options.",
)
@resolve.policy_options
@click.option(
    "--exclude", multiple=True, metavar="CIDR", help="Network to exclude from each target; repeat for several."
)
@click.option("--name", help="Name of a created subnet.")
@click.option("--no-watch", is_flag=True, help="Submit the jobs without watching them.")
@follow.timeout_option
@click.option("--fail-on", metavar="open|PORTS", help="Exit 8 if any port, or one of these ports, is open.")
@click.option("--key", help="Idempotency key: the same command with the same key creates no other jobs, for 7 days.")
@follow.found_option
@follow.cancel_option
@formats(rest.Result, Job)
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
    """Scan networks: register, submit, watch, and print the results.

    TARGET is a CIDR or an address, or - for a list on stdin. An existing subnet with the same CIDR and exclusions and an
    existing policy with the same fields are reused; otherwise the command creates them.
    """
    output = session.output
    if output.fields is not None and output.format.machine:
        raise CommandError(f"--json selects fields of results and cannot be combined with -o {output.format}")
    output.check_fields(Job if no_watch else rest.Result)
    of_watch = {"--fail-on": fail_on, "--found": found, "--timeout": timeout}
    if no_watch and (given := [option for option, value in of_watch.items() if value]):
        raise CommandError(f"--no-watch cannot be combined with {', '.join(given)}")
    printer = findings.Printer(output) if found else None
    limit, watched_ports = follow.seconds(timeout), _fail_ports(fail_on)
    wanted = list(_targets(targets, file, exclude, name))
    chosen, policy_word = _policy(session, policy, resolve.policy_fields(policy_options))
    known = {resolve.scope(each.cidr, each.exclude): each for each in reversed(list(resolve.subnets(session)))}
    subnets = [_subnet(session, each, known) for each in wanted]
    subnet_ids = [subnet.id for subnet, _ in subnets]
    with changes.submitted(session, subnet_ids, chosen.id, key, cancel=cancel_on_interrupt) as reply:
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
        view = views.view_for(output)
    jobs = follow.to_the_end(
        session,
        [each.id for each in made],
        view,
        limit,
        cancel=cancel_on_interrupt,
        ended=lambda job: follow.print_end(session, job),
        found=printer.print if printer else None,
        query=findings.query(output),
        owner=made[0].user_id,
    )
    return _finish(session, jobs, watched_ports, printer)


def _finish(
    session: Session, jobs: Sequence[views.Followed], watched: _Watched | None, printer: findings.Printer | None
) -> int:
    """Print the remaining results; the exit code depends on the final states and `watched`."""
    output = session.output
    documents, rows = [], []
    for each in jobs:
        found = list(findings.rows(session, each.job_id, **findings.query(output)))
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
            printer.print_all(rows)
        case Format.JSON:
            output.emit(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
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
    return lambda row: (
        row["status"] == "open" and any(first <= row["port"] <= last for first, last in ranges.get(row["protocol"], ()))
    )


# Targets


def _targets(given: Sequence[str], file: Any, exclude: Sequence[str], name: str | None) -> Iterator[Wanted]:
    files = [*([file] if file is not None else []), *([sys.stdin] if "-" in given else [])]
    lines = [line for each in files for line in read_text(each).split("\n")]
    wanted = [Wanted(each) for each in given if each != "-"] + list(_of_lines(lines))
    if not wanted:
        raise CommandError("no targets", hint="scanfleet scan 192.0.2.0/24, or --targets FILE")
    if len(wanted) > MAX_SUBNETS:
        raise CommandError(
            f"{len(wanted):,} targets: one command scans up to {MAX_SUBNETS:,}",
            hint="split the list, or replace neighbouring targets by a larger network",
        )
    named: set[resolve.Scope] = set()
    for each in wanted:
        if not resolve.is_network(each.cidr, strict=False):
            raise CommandError(
                f"target {printable(each.cidr)} is not a network or an address",
                hint="to scan a subnet by its name: scanfleet job submit --subnet NAME --policy NAME --watch",
            )
        target = Wanted(resolve.canonical(each.cidr), each.name or name, (*each.exclude, *exclude))
        if target.scope in named:
            raise CommandError(f"target {printable(each.cidr)} is given twice")
        named.add(target.scope)
        yield target


def _of_lines(lines: Iterable[str]) -> Iterator[Wanted]:
    """Parse targets: a CIDR or address per line, or CSV with a header."""
    rows = [line for text in lines if (line := text.strip()) and not line.startswith("#")]
    if rows and "cidr" in [cell.strip() for cell in rows[0].lower().split(",")]:
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
    yield from (Wanted(line.partition("#")[0].strip()) for line in rows)


# Subnets and policies


def _subnet(session: Session, wanted: Wanted, known: Mapping[resolve.Scope, rest.Subnet]) -> tuple[rest.Subnet, str]:
    scope = wanted.scope
    name = wanted.name or resolve.own_name(wanted.cidr, sorted(wanted.exclude))
    body = resolve.body(rest.SubnetBody, {"name": name, "cidr": wanted.cidr, "exclude": list(wanted.exclude)})
    return find_or_create(
        session,
        [known[scope]] if scope in known else [],
        lambda: resolve.subnets(session),
        lambda each: resolve.scope(each.cidr, each.exclude) == scope,
        lambda: session.client.send(calls.create_subnet(body)),
    )


def _policy(session: Session, named: str | None, fields: dict[str, Any]) -> tuple[rest.Policy, str]:
    if named is not None:
        if fields:
            options = ", ".join(f"--{field.replace('_', '-')}" for field in fields)
            raise CommandError(f"--policy cannot be combined with {options}")
        return resolve.policy_named(session, named), "reused"
    fields.setdefault("preset", str(Preset.STANDARD))
    expected: ScanPolicy | None = None
    with suppress(PolicyError, ValueError):  # unknown to this release; a newer service may accept it
        given = {name: value for name, value in fields.items() if name != "preset"}
        expected = fill_in(Preset(fields["preset"]), given)

    body = resolve.body(rest.PolicyBody, {"name": resolve.own_name(sorted(fields.items())), **fields})
    return find_or_create(
        session,
        list(resolve.policies(session)),
        lambda: resolve.policies(session),
        lambda each: expected is not None and _scan_of(each) == _scan_of(expected),
        lambda: session.client.send(calls.create_policy(body)),
    )


def _scan_of(policy: ScanPolicy) -> dict[str, Any]:
    return policy.model_dump(include=set(ScanPolicy.model_fields))


def find_or_create(
    session: Session,
    known: Iterable[T],
    read: Callable[[], Iterable[T]],
    is_wanted: Callable[[T], bool],
    make: Callable[[], T],
) -> tuple[T, str]:
    """Return an existing or a new object, and the word "reused" or "created".

    A POST with an unknown outcome may have created the object, so the objects are read again before the POST is repeated.

    Args:
        session: of the command.
        known: existing objects.
        read: reads the existing objects again.
        is_wanted: whether an object can be reused.
        make: creates an object.

    Raises:
        ApiError: the service returned an error.
        UnavailableError: the service is unavailable.
    """
    for attempt in range(ATTEMPTS):
        if (found := next(filter(is_wanted, read() if attempt else known), None)) is not None:
            return found, "created" if attempt else "reused"
        try:
            return make(), "created"
        except (ApiError, UnavailableError) as error:
            if not error.unsure or attempt == ATTEMPTS - 1:
                raise
        time.sleep(session.patience.pause(attempt + 1))
    raise AssertionError("unreachable")
