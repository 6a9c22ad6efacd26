"""`scanfleet subnet`: networks to scan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from typing import Any

import click

from scanfleet.contracts import rest
from scanfleet_cli import calls, changes, imports, resolve
from scanfleet_cli.completion import complete_subnet
from scanfleet_cli.errors import CommandError, Exit, hint_of_refusal
from scanfleet_cli.output import Format, Row, ago, column, count, printable
from scanfleet_cli.session import Session, formats, lists, read_text, supported, with_session, yes


@click.group()
def subnet() -> None:
    """Networks to scan, and their exclusions."""


@subnet.command()
@click.argument("name")
@click.argument("cidr")
@click.option("--exclude", multiple=True, metavar="CIDR", help="Network to exclude; repeat for several.")
@formats(rest.Subnet)
@with_session
def create(session: Session, /, *, name: str, cidr: str, exclude: Sequence[str]) -> None:
    """Create a subnet."""
    body = resolve.body(rest.SubnetBody, {"name": name, "cidr": resolve.canonical(cidr), "exclude": list(exclude)})
    made = session.ask(calls.create_subnet(body))
    session.output.one(made, lambda: [line(made)])


def line(subnet: Row) -> str:
    """Format a subnet: `subnet 5 lab 127.9.8.0/24 (256 addresses, 128 excluded)`."""
    network = ip_network(subnet["cidr"])
    left_out = sum(ip_network(each).num_addresses for each in subnet["exclude"])  # the service has merged them
    excluded = f", {left_out:,} excluded" if left_out else ""
    addresses = count(network.num_addresses, "address", "addresses")
    return f"subnet {subnet['id']} {printable(subnet['name'])} {subnet['cidr']} ({addresses}{excluded})"


@subnet.command("list")
@lists(rest.Subnet)
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
@click.argument("which", metavar="NAME|ID", shell_complete=complete_subnet)
@formats(rest.Subnet)
@with_session
def show(session: Session, /, *, which: str) -> None:
    """Show a subnet."""
    found = session.ask(calls.read_subnet(resolve.subnet_id(session, which)))
    session.output.one(found, lambda: _block(session, found))


def _block(session: Session, found: Row) -> Iterator[str]:
    yield line(found)
    for network in found["exclude"]:
        yield f"  without  {network}"
    yield f"  created  {ago(found['created_at'], session.output)}"
    yield f"  changed  {ago(found['updated_at'], session.output)}"


@subnet.command()
@click.argument("which", metavar="NAME|ID", shell_complete=complete_subnet)
@click.option("--name", help="New name.")
@click.option("--cidr", help="New network.")
@click.option("--add-exclude", multiple=True, metavar="CIDR")
@click.option("--remove-exclude", multiple=True, metavar="CIDR")
@formats(rest.Subnet)
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
    """Change a subnet; existing jobs keep the previous values."""
    reply = session.client.ask(calls.read_subnet(resolve.subnet_id(session, which)))
    before = reply.json
    removed = set(map(resolve.canonical, remove_exclude))
    if not removed <= set(before["exclude"]):
        raise CommandError(
            f"--remove-exclude: not an exclusion of this subnet, which has {', '.join(before['exclude']) or 'none'}"
        )
    fields = {
        "name": name or before["name"],
        "cidr": resolve.canonical(cidr or before["cidr"]),
        "exclude": [*(each for each in before["exclude"] if each not in removed), *add_exclude],
    }
    body = resolve.body(rest.SubnetBody, fields)
    after = changes.replaced(session, calls.replace_subnet(before["id"], body, reply.etag))
    session.output.note(f"was  {line(before)}")
    session.output.one(after, lambda: [f"is   {line(after)}"])


@subnet.command()
@click.argument("which", metavar="NAME|ID…", nargs=-1, required=True, shell_complete=complete_subnet)
@yes
@with_session
def delete(session: Session, /, *, which: Sequence[str], yes: bool) -> None:
    """Delete subnets without unfinished jobs; results are kept."""
    found = resolve.distinct(resolve.subnet_named(session, each) for each in which)
    names = ", ".join(printable(each.name) for each in found)
    session.confirm(f"delete {count(len(found), 'subnet')} ({names})?", yes=yes)
    changes.delete_each(session, "subnet", [(each.id, calls.delete_subnet(each.id)) for each in found])


@subnet.command()
@click.argument("which", metavar="NAME|ID", shell_complete=complete_subnet)
@click.option(
    "--set",
    "days",
    type=click.IntRange(1, 36_500),
    metavar="DAYS",
    help="Delete jobs this number of days after their end.",
)
@click.option("--unset", is_flag=True, help="Use the setting of the platform.")
@formats(rest.SubnetRetention)
@with_session
def retention(session: Session, /, *, which: str, days: int | None, unset: bool) -> None:
    """Show or change how long ended jobs of a subnet are kept."""
    if unset and days is not None:
        raise CommandError("--set and --unset exclude each other")
    subnet_id = resolve.subnet_id(session, which)
    call = calls.read_subnet_retention(subnet_id)
    if unset or days is not None:
        call = calls.replace_subnet_retention(subnet_id, days)
    with supported("retention times of subnets"):
        found = session.ask(call)
    session.output.one(found, lambda: [_kept(found)])


def _kept(found: Row) -> str:
    days = found["effective_days"]
    source = "of the platform" if found["keep_results_days"] is None else "of this subnet"
    if not days:
        return f"jobs are not deleted by age (setting {source})"
    return f"jobs are deleted {count(days, 'day')} after their end (setting {source}), except the two newest completed ones"


@subnet.command("import")
@click.argument("file", type=click.File(encoding="utf-8"))
@click.option("--dry-run", is_flag=True, help="Check each line, and change nothing.")
@click.option("--update", is_flag=True, help="Change subnets of the same name whose network or exclusions differ.")
@formats(imports.FIELDS)
@with_session
def import_(session: Session, /, *, file: Any, dry_run: bool, update: bool) -> int:
    """Create the subnets of a CSV file.

    The first line is name,cidr or name,cidr,exclude; exclusions are separated by semicolons. A line that the service refuses is
    reported, and the command exits 2. Existing subnets are not created again, so the command can be repeated. The JSON formats
    print line, action, id and error of each line; an action is create, update, exists or refused.
    """
    lines = imports.imported(session, read_text(file), dry_run=dry_run, update=update)
    output = session.output
    if output.format in {Format.TABLE, Format.WIDE} and output.fields is None:
        output.emit(imports.summary(lines, dry_run=dry_run))
    else:
        output.many([line.model_dump() for line in lines], [])
    refused = [line.error or "" for line in lines if line.action == "refused"]
    for hint in dict.fromkeys(filter(None, map(hint_of_refusal, refused))):
        output.note(hint)
    return Exit.REFUSED if refused else Exit.DONE
