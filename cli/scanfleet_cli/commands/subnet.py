"""`scanfleet subnet`: networks to scan."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from typing import Any

import click

from scanfleet import rest
from scanfleet_cli import calls, coverage, resolve
from scanfleet_cli.commands.scan import canonical
from scanfleet_cli.errors import ApiError, CommandError, Exit, ScanfleetError, explain
from scanfleet_cli.output import Format, Row, ago, column, count, printable
from scanfleet_cli.session import Session, formats, lists, many_failed, with_session, yes

_TARGETS_HINT = "ask the operator who sets SCANFLEET_ALLOWED_NETWORKS"
_PRECONDITION_FAILED = 412


@click.group()
def subnet() -> None:
    """Networks to scan, and what to leave out of them."""


@subnet.command()
@click.argument("name")
@click.argument("cidr")
@click.option("--exclude", multiple=True, metavar="CIDR", help="Network to leave out; repeat for several.")
@formats
@with_session
def create(session: Session, /, *, name: str, cidr: str, exclude: Sequence[str]) -> None:
    """Register a network."""
    body = resolve.body(rest.SubnetBody, {"name": name, "cidr": canonical(cidr), "exclude": list(exclude)})
    made = _explained(session, calls.create_subnet(body))
    session.output.one(made, lambda: [line(made)])


def _explained(session: Session, call: calls.Call[Any]) -> Row:
    try:
        made: Row = session.ask(call)
    except ApiError as error:
        if "not allowed" in error.message or "target" in error.message:
            raise CommandError(error.message, hint=_TARGETS_HINT, status=error.status) from error
        raise
    return made


def line(subnet: Row) -> str:
    """`subnet 5 lab 127.9.8.0/24 (256 addresses, 128 excluded)`."""
    network = ip_network(subnet["cidr"])
    inside = [each for each in map(ip_network, subnet["exclude"]) if each.version == network.version]
    left_out = sum(each.num_addresses for each in coverage.merged(inside))
    excluded = f", {left_out:,} excluded" if left_out else ""
    addresses = count(network.num_addresses, "address", "addresses")
    return f"subnet {subnet['id']} {printable(subnet['name'])} {subnet['cidr']} ({addresses}{excluded})"


@subnet.command("list")
@lists
@with_session
def list_(session: Session) -> None:
    """List subnets, newest first."""
    columns = [
        column("ID"),
        column("NAME"),
        column("NETWORK", "cidr"),
        column("EXCLUDED", "exclude"),
        column("CREATED", "created_at", wide=True),
    ]
    session.show_list(
        session.rows(calls.list_subnets()), columns, "no subnets yet: scanfleet subnet create lab 192.0.2.0/24"
    )


@subnet.command()
@click.argument("which", metavar="NAME|ID")
@formats
@with_session
def show(session: Session, /, *, which: str) -> None:
    """Show a subnet."""
    found = session.ask(calls.read_subnet(resolve.subnet_named(session, which).id))
    session.output.one(found, lambda: _block(session, found))


def _block(session: Session, found: Row) -> Iterator[str]:
    yield line(found)
    for network in found["exclude"]:
        yield f"  without  {network}"
    yield f"  created  {ago(found['created_at'], session.output)}"
    yield f"  changed  {ago(found['updated_at'], session.output)}"


@subnet.command()
@click.argument("which", metavar="NAME|ID")
@click.option("--name", help="New name.")
@click.option("--cidr", help="New network.")
@click.option("--add-exclude", multiple=True, metavar="CIDR")
@click.option("--remove-exclude", multiple=True, metavar="CIDR")
@formats
@with_session
def edit(
    session: Session,
    /,
    *,
    which: str,
    name: str | None,
    cidr: str | None,
    add_exclude: Sequence[str],
    remove_exclude: Sequence[str],
) -> None:
    """Change a subnet; jobs that were made from it keep it as it was."""
    reply = session.client.ask(calls.read_subnet(resolve.subnet_named(session, which).id))
    before = reply.json
    exclude = [each for each in before["exclude"] if each not in map(canonical, remove_exclude)]
    if len(exclude) + len(set(remove_exclude)) != len(before["exclude"]):
        raise CommandError(f"--remove-exclude: not excluded; {', '.join(before['exclude']) or 'nothing'} is")
    fields = {
        "name": name or before["name"],
        "cidr": canonical(cidr or before["cidr"]),
        "exclude": [*exclude, *add_exclude],
    }
    body = resolve.body(rest.SubnetBody, fields)
    after = replaced(session, calls.replace_subnet(before["id"], body, reply.etag))
    session.output.note(f"was  {line(before)}")
    session.output.one(after, lambda: [f"is   {line(after)}"])


def replaced(session: Session, call: calls.Call[Any]) -> Row:
    """The answer to a PUT.

    Raises:
        CommandError: the object has changed since it was read.
    """
    try:
        after: Row = session.ask(call)
    except ApiError as error:
        if error.status == _PRECONDITION_FAILED:
            raise CommandError(
                "it was changed by another request in the meantime; nothing was changed",
                hint="repeat the command",
                status=error.status,
            ) from error
        raise
    return after


@subnet.command()
@click.argument("which", metavar="NAME|ID…", nargs=-1, required=True)
@yes
@with_session
def delete(session: Session, /, *, which: Sequence[str], yes: bool) -> None:
    """Delete subnets that no unfinished job scans; what was found stays."""
    found = [resolve.subnet_named(session, each) for each in which]
    names = ", ".join(printable(each.name) for each in found)
    session.confirm(f"delete {count(len(found), 'subnet')} ({names})?", yes=yes)
    delete_each(session, "subnet", [(each.id, calls.delete_subnet(each.id)) for each in found])


def delete_each(session: Session, noun: str, deletions: Sequence[tuple[int, calls.Call[Any]]]) -> None:
    """Delete objects one by one; one that cannot be deleted stops no other.

    Raises:
        CommandError: some could not be deleted.
    """
    errors = []
    for number, call in deletions:
        try:
            session.ask(call)
        except ScanfleetError as error:
            errors.append(explain(error))
            continue
        session.output.note(f"✓ {noun} {number} deleted")
    many_failed(errors, session.output)


@subnet.command("import")
@click.argument("file", type=click.File(encoding="utf-8-sig"))
@click.option("--dry-run", is_flag=True, help="Say what would be made; change nothing.")
@click.option("--update", is_flag=True, help="Change subnets of the same name whose network or exclusions differ.")
@formats
@with_session
def import_(session: Session, /, *, file: Any, dry_run: bool, update: bool) -> int:
    """Register the networks of a CSV file with the columns name,cidr,exclude."""
    there = {each.name: each for each in reversed(list(resolve.subnets(session)))}
    rows = [_imported(session, number, row, there, dry_run=dry_run, update=update) for number, row in _rows(file)]
    counts = {
        action: sum(row["action"] == action for row in rows) for action in ("made", "changed", "there", "refused")
    }
    words = {"made": "made", "changed": "changed", "there": "there already", "refused": "refused"}
    if session.output.format in {Format.TABLE, Format.WIDE} and session.output.fields is None:
        for row in rows:
            if row["error"]:
                session.output.note(f"line {row['line']}: {printable(row['error'])}")
        would = "would be: " if dry_run else ""
        session.output.say(
            would + ", ".join(f"{number} {words[action]}" for action, number in counts.items() if number)
        )
    else:
        session.output.many(rows, [])
    return Exit.REFUSED if counts["refused"] else Exit.DONE


def _rows(file: Any) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(file)
    columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    if not {"name", "cidr"} <= set(columns):
        raise CommandError(
            "the first line must name the columns name,cidr and may name exclude", hint="name,cidr,exclude"
        )
    reader.fieldnames = columns
    for row in reader:
        yield reader.line_num, {key: value.strip() for key, value in row.items() if key and isinstance(value, str)}


def _imported(
    session: Session, number: int, row: dict[str, str], there: dict[str, rest.Subnet], *, dry_run: bool, update: bool
) -> dict[str, Any]:
    name, cidr = row.get("name", ""), canonical(row.get("cidr", ""))
    exclude = row.get("exclude", "").replace(";", " ").split()
    done: dict[str, Any] = {"line": number, "action": "there", "id": None, "error": ""}
    known = there.get(name)
    if known is not None:
        done["id"] = known.id
        if (known.cidr, known.exclude) == (cidr, exclude):
            return done
        if not update:
            return done | {"action": "refused", "error": f"{name} is {known.cidr} already; --update changes it"}
    try:
        for network in (cidr, *exclude):
            ip_network(network)
    except ValueError as error:
        return done | {"action": "refused", "error": str(error)}
    body = resolve.body(rest.SubnetBody, {"name": name, "cidr": cidr, "exclude": exclude})
    done["action"] = "changed" if known else "made"
    if dry_run:
        return done
    try:
        call = calls.replace_subnet(known.id, body) if known else calls.create_subnet(body)
        made = session.ask(call)
    except ApiError as error:
        if explain(error).code is not Exit.REFUSED:
            raise
        return done | {"action": "refused", "error": error.message}
    there[name] = rest.Subnet.model_validate(made)
    return done | {"id": made["id"]}
