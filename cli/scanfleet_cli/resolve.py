"""Resolve arguments to objects of the API: names to ids, options to policies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from ipaddress import ip_network
from typing import Any, Final, Protocol, TypeVar

import click
from pydantic import BaseModel

from scanfleet.contracts import rest
from scanfleet_cli import calls, coverage
from scanfleet_cli.errors import CommandError, Exit
from scanfleet_cli.session import Command, Session

Body = TypeVar("Body", bound=BaseModel)

Scope = tuple[str, frozenset[str]]
"""A network, and the fewest networks that are excluded from it."""


class _Numbered(Protocol):
    @property
    def id(self) -> int: ...


Thing = TypeVar("Thing", bound=_Numbered)

HASH: Final = 8  # characters of the hash in the name of a generated object

_POLICY_OPTIONS: Final[tuple[tuple[tuple[str, ...], dict[str, Any]], ...]] = (
    (("--preset",), {"metavar": "NAME", "help": "quick, standard, full or sweep: the values of omitted options."}),
    (("--ports",), {"metavar": "SPEC", "help": '"22,80,8000-8100", "T:80,U:53" or "top:100".'}),
    (("--technique",), {"metavar": "NAME", "help": "auto, connect or syn."}),
    (("--discovery",), {"metavar": "NAME", "help": "default, or none to treat every address as up."}),
    (("--service-detection/--no-service-detection",), {"default": None, "help": "Detect the services on open ports."}),
    (("--version-intensity",), {"type": int, "help": "0 to 9."}),
    (
        ("--os-detection/--no-os-detection",),
        {"default": None, "help": "Detect operating systems; needs a worker with raw packets."},
    ),
    (("--scripts",), {"metavar": "NAME,…", "help": "NSE scripts that the platform allows, separated by commas."}),
    (
        ("--timing",),
        {
            "type": int,
            "help": "Timing template of nmap, 0 to 5; 4 and 5 can miss open ports of hosts and networks that limit their packets.",
        },
    ),
    (("--max-rate",), {"type": int, "help": "Maximum probes per second of the whole job."}),
    (("--min-rate",), {"type": int, "help": "Minimum probes per second, also while hosts do not respond."}),
    (("--max-rtt-timeout",), {"type": int, "help": "Maximum timeout of a probe in milliseconds."}),
    (("--max-retries",), {"type": int, "help": "0 to 10."}),
    (("--host-timeout",), {"type": int, "help": "Timeout of a host in seconds."}),
)


def policy_options(command: Command) -> Command:
    """Add an option for each field of a policy; an omitted option is None."""
    for names, how in reversed(_POLICY_OPTIONS):
        command = click.option(*names, **how)(command)
    return command


def policy_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a policy that the options set."""
    given = {name: value for name, value in options.items() if value is not None}
    if "scripts" in given:
        given["scripts"] = [name.strip() for name in given["scripts"].split(",") if name.strip()]
    return given


def body(model: type[Body], fields: dict[str, Any]) -> Body:
    """Return a request body without validation: the service validates it, with its own message, and may be newer."""
    return model.model_construct(**fields)


def subnet_named(session: Session, text: str) -> rest.Subnet:
    """Return the subnet of this id, name or CIDR.

    Raises:
        CommandError: none or several match.
    """
    if _is_id(text):
        return session.client.send(calls.read_subnet(int(text)))
    found = [each for each in subnets(session) if text in {each.name, each.cidr}]
    return _only(found, text, "subnet")


def subnet_or_network(session: Session, text: str) -> rest.Subnet | str:
    """Return the subnet of this id, name or CIDR, else the CIDR in the notation of the service.

    Raises:
        CommandError: several match, or none does and the text is not a CIDR.
    """
    if _is_id(text):
        return subnet_named(session, text)
    network = canonical(text)
    found = [each for each in subnets(session) if text == each.name or network == each.cidr]
    if not found and is_network(network):
        return network
    return _only(found, text, "subnet")


def subnet_id(session: Session, text: str) -> int:
    """Return the id of the subnet of this id, name or CIDR; an id is not looked up.

    Raises:
        CommandError: none or several match.
    """
    return int(text) if _is_id(text) else subnet_named(session, text).id


def policy_id(session: Session, text: str) -> int:
    """Return the id of the policy of this id or name; an id is not looked up.

    Raises:
        CommandError: none or several match.
    """
    return int(text) if _is_id(text) else policy_named(session, text).id


def policy_named(session: Session, text: str) -> rest.Policy:
    """Return the policy of this id or name.

    Raises:
        CommandError: none or several match.
    """
    if _is_id(text):
        return session.client.send(calls.read_policy(int(text)))
    return _only([each for each in policies(session) if each.name == text], text, "policy")


def distinct(found: Iterable[Thing]) -> list[Thing]:
    """Return objects without duplicates."""
    return list({each.id: each for each in found}.values())


def subnets(session: Session) -> Iterator[rest.Subnet]:
    return (each for page in session.client.pages(calls.list_subnets()) for each in page.subnets)


def policies(session: Session) -> Iterator[rest.Policy]:
    return (each for page in session.client.pages(calls.list_policies()) for each in page.policies)


def canonical(cidr: str) -> str:
    """Return a CIDR in the notation of the service; other text is unchanged, and the service rejects it."""
    try:
        return str(ip_network(cidr))
    except ValueError:
        return cidr


def scope(cidr: str, exclude: Iterable[str]) -> Scope:
    """Return what a subnet scans, in a form that is equal for equal addresses; invalid text is unchanged."""
    try:
        network = ip_network(cidr)
        within = [
            each for each in map(ip_network, exclude) if each.version == network.version and each.overlaps(network)
        ]
    except ValueError:
        return cidr, frozenset(exclude)
    return str(network), frozenset(map(str, coverage.merged(within)))


def is_network(text: str, *, strict: bool = True) -> bool:
    """Return whether the text is a CIDR or an address; unless `strict`, host bits may be set."""
    try:
        ip_network(text, strict=strict)
    except ValueError:
        return False
    return True


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _only(every: Iterable[Thing], text: str, noun: str) -> Thing:
    found = distinct(every)  # one is on two pages if another is created in between
    if not found:
        raise CommandError(
            f"{noun} {text} does not exist, or is not yours", Exit.NOT_FOUND, hint=f"scanfleet {noun} list"
        )
    if len(found) > 1:
        ids = ", ".join(str(each.id) for each in found)
        raise CommandError(f"{noun} {text} is ambiguous: {len(found)} match", hint=f"use an id: {ids}")
    return found[0]


def own_name(*parts: Iterable[Any] | object) -> str:
    """Return the name of a generated object with these parts."""
    return f"cli-{sha256(repr(parts).encode()).hexdigest()[:HASH]}"
