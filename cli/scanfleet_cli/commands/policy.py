"""`scanfleet policy`: scan policies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final

import click

from scanfleet.contracts import rest
from scanfleet.scanning.policy import PRESETS, Preset, ScanPolicy
from scanfleet_cli import calls, changes, resolve
from scanfleet_cli.completion import complete_policy, complete_subnet
from scanfleet_cli.errors import CommandError
from scanfleet_cli.output import Row, column, count, duration, printable, text_of
from scanfleet_cli.session import Session, formats, lists, supported, with_session, yes

_NAMED: Final = 5  # excluded networks in a line; JSON has all
_OF_POLICY: Final = ("tcp_ports", "udp_ports", "needs_raw_packets")  # known without a subnet
_EXPLAINED: Final = (
    "policy_id",
    *_OF_POLICY,
    "subnet_id",
    *(name for name in rest.Estimate.model_fields if name not in _OF_POLICY),
)


@click.group()
def policy() -> None:
    """Scan policies: ports, technique, detection, speed."""


@policy.command()
@click.argument("name")
@resolve.policy_options
@formats(rest.Policy)
@with_session
def create(session: Session, /, *, name: str, **options: Any) -> None:
    """Create a policy; omitted options have the values of the preset."""
    body = resolve.body(rest.PolicyBody, {"name": name, **resolve.policy_fields(options)})
    made = session.ask(calls.create_policy(body))
    session.output.one(made, lambda: block(session, made))


def block(session: Session, policy: Row) -> Iterator[str]:
    """Yield every field of a policy; the values of its preset are dimmed on a terminal."""
    yield f"policy {policy['id']} {printable(policy['name'])}"
    preset: dict[str, Any] = PRESETS[Preset(policy["preset"])] if policy["preset"] in list(Preset) else {}
    for name in ScanPolicy.model_fields:
        line = f"  {name:<18} {printable(text_of(policy[name]))}"
        usual = json.loads(json.dumps(preset.get(name, object), default=str)) == policy[name]
        yield click.style(line, dim=True) if usual and session.output.coloured else line


@policy.command("list")
@lists(rest.Policy)
@with_session
def list_(session: Session) -> None:
    """List policies, newest first."""
    columns = [
        column("ID"),
        column("NAME"),
        column("PRESET"),
        column("PORTS"),
        column("TECHNIQUE"),
        column("SERVICES", "service_detection"),
        column("TIMING", wide=True),
        column("MAX_RATE", wide=True),
        column("SCRIPTS", wide=True),
    ]
    session.show_list(
        session.rows(calls.list_policies()), columns, "no policies yet: scanfleet policy create web --preset quick"
    )


@policy.command()
@click.argument("which", metavar="NAME|ID", shell_complete=complete_policy)
@formats(rest.Policy)
@with_session
def show(session: Session, /, *, which: str) -> None:
    """Show every field of a policy."""
    found = session.ask(calls.read_policy(resolve.policy_id(session, which)))
    session.output.one(found, lambda: block(session, found))


@policy.command()
@click.argument("which", metavar="NAME|ID", shell_complete=complete_policy)
@click.option("--name", help="New name.")
@resolve.policy_options
@formats(rest.Policy)
@with_session
def edit(session: Session, /, *, which: str, name: str | None, **options: Any) -> None:
    """Change a policy; existing jobs keep the previous values."""
    given = resolve.policy_fields(options)
    if not given and name is None:
        raise CommandError("nothing to change", hint="scanfleet policy edit --help")
    reply = session.client.ask(calls.read_policy(resolve.policy_id(session, which)))
    before = reply.json
    # A new preset sets the omitted fields; otherwise they are unchanged.
    kept = {} if "preset" in given else {field: before[field] for field in ScanPolicy.model_fields}
    body = resolve.body(rest.PolicyBody, {"name": name or before["name"], **kept, **given})
    after = changes.replaced(session, calls.replace_policy(before["id"], body, reply.etag))
    for field in ("name", *ScanPolicy.model_fields):
        if before[field] != after[field]:
            session.output.note(f"{field}: {printable(text_of(before[field]))} → {printable(text_of(after[field]))}")
    session.output.one(after, lambda: block(session, after))


@policy.command()
@click.argument("which", metavar="NAME|ID…", nargs=-1, required=True, shell_complete=complete_policy)
@yes
@with_session
def delete(session: Session, /, *, which: Sequence[str], yes: bool) -> None:
    """Delete policies; existing jobs keep their values."""
    found = resolve.distinct(resolve.policy_named(session, each) for each in which)
    names = ", ".join(printable(each.name) for each in found)
    session.confirm(f"delete {count(len(found), 'policy', 'policies')} ({names})?", yes=yes)
    changes.delete_each(session, "policy", [(each.id, calls.delete_policy(each.id)) for each in found])


@policy.command()
@click.argument("which", metavar="NAME|ID", shell_complete=complete_policy)
@click.option(
    "--subnet", metavar="NAME|ID|CIDR", shell_complete=complete_subnet, help="Estimate a scan of this network."
)
@formats(_EXPLAINED)
@with_session
def explain(session: Session, /, *, which: str, subnet: str | None) -> None:
    """Show the ports of a policy, and whether it needs raw packets.

    With --subnet, also show what a scan of it would be, without requesting it: excluded networks, probes, chunks, expected time,
    options of nmap, and every reason to refuse it.
    """
    policy = resolve.policy_named(session, which)
    ports = policy.port_set
    found: dict[str, Any] = {"policy_id": policy.id}
    found |= zip(_OF_POLICY, (ports.tcp_count, ports.udp_count, policy.needs_raw), strict=True)
    lines = [f"policy {policy.id} {printable(policy.name)}"]
    if subnet is not None:
        scanned = resolve.subnet_or_network(session, subnet)
        if isinstance(scanned, str):
            wanted = rest.EstimateBody(policy_id=policy.id, cidr=scanned)
            lines.append(f"network {scanned}")
        else:
            wanted = rest.EstimateBody(policy_id=policy.id, subnet_id=scanned.id)
            lines.append(f"subnet {scanned.id} {printable(scanned.name)} {scanned.cidr}")
        with supported("estimates of scans"):
            found |= {"subnet_id": wanted.subnet_id} | session.ask(calls.estimate_task(wanted))
    session.output.one(found, lambda: [*lines, *_explained(found)], "policy_id")


def _explained(found: Row) -> Iterator[str]:
    yield f"  ports             {found['tcp_ports']:,} TCP, {found['udp_ports']:,} UDP"
    yield f"  needs raw packets {text_of(found['needs_raw_packets'])}"
    if "probes" not in found:
        return
    named = found["exclude"][:_NAMED] + (["…"] if len(found["exclude"]) > _NAMED else [])
    exclude = f": {printable(', '.join(named))}" if named else ""
    yield f"  addresses         {found['addresses']:,} ({found['excluded']:,} excluded{exclude})"
    yield f"  probes            {found['probes']:,}"
    yield f"  chunks            {found['chunks']:,}"
    yield f"  estimate          {duration(found['estimate_seconds'])} of one slot"
    if found["nmap_options"]:
        yield f"  nmap options      {printable(' '.join(found['nmap_options']))}"
    for refusal in found["refusals"]:
        yield f"  refused           {printable(refusal['rule'])}: {printable(refusal['error'])}"
