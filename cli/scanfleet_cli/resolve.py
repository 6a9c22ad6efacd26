"""From what a person types to the API's objects: names to ids, fields to policies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256
from ipaddress import ip_network
from typing import Any, Final, Protocol, TypeVar

import click
from pydantic import BaseModel

from scanfleet import rest
from scanfleet.policy import ScanPolicy
from scanfleet_cli import calls
from scanfleet_cli.errors import CommandError, Exit
from scanfleet_cli.session import Command, Session

Body = TypeVar("Body", bound=BaseModel)


class _Numbered(Protocol):
    @property
    def id(self) -> int: ...


Thing = TypeVar("Thing", bound=_Numbered)

HASH: Final = 8  # characters in the name of an object that the command makes

_POLICY_OPTIONS: Final[tuple[tuple[tuple[str, ...], dict[str, Any]], ...]] = (
    (("--preset",), {"metavar": "NAME", "help": "quick, standard, full or sweep; fills in what is left out."}),
    (("--ports",), {"metavar": "SPEC", "help": '"22,80,8000-8100", "T:80,U:53" or "top:100".'}),
    (("--technique",), {"metavar": "NAME", "help": "auto, connect or syn."}),
    (("--discovery",), {"metavar": "NAME", "help": "default, or none: take every address as up."}),
    (("--service-detection/--no-service-detection",), {"default": None, "help": "Ask open ports what runs on them."}),
    (("--version-intensity",), {"type": int, "help": "0 to 9."}),
    (("--os-detection/--no-os-detection",), {"default": None, "help": "Needs a worker that may send raw packets."}),
    (("--scripts",), {"metavar": "NAME,…", "help": "NSE scripts of the platform's list, separated by commas."}),
    (("--timing",), {"type": int, "help": "nmap's timing template, 0 to 5."}),
    (("--max-rate",), {"type": int, "help": "Probes a second of the whole job at most."}),
    (("--min-rate",), {"type": int, "help": "Probes a second below which silence cannot slow the job."}),
    (("--max-rtt-timeout",), {"type": int, "help": "Milliseconds to wait for an answer at most."}),
    (("--max-retries",), {"type": int, "help": "0 to 10."}),
    (("--host-timeout",), {"type": int, "help": "Seconds after which a host is given up."}),
)


def policy_options(command: Command) -> Command:
    """An option for each field of a policy; those that are not given are None."""
    for names, how in reversed(_POLICY_OPTIONS):
        command = click.option(*names, **how)(command)
    return command


def policy_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a policy that the options give."""
    given = {name: value for name, value in options.items() if value is not None}
    if "scripts" in given:
        given["scripts"] = [name.strip() for name in given["scripts"].split(",") if name.strip()]
    return given


def body(model: type[Body], fields: dict[str, Any]) -> Body:
    """A request's body, not validated: the service does that, so that its own sentence is shown, and it may be newer."""
    return model.model_construct(**fields)


def subnet_named(session: Session, text: str) -> rest.Subnet:
    """The subnet of this id, name or CIDR.

    Raises:
        CommandError: there is none, or several of that name.
    """
    if text.isascii() and text.isdigit():
        return session.client.send(calls.read_subnet(int(text)))
    found = [each for each in subnets(session) if text in {each.name, each.cidr}]
    return _only(found, text, "subnet")


def policy_named(session: Session, text: str) -> rest.Policy:
    """The policy of this id or name.

    Raises:
        CommandError: there is none, or several of that name.
    """
    if text.isascii() and text.isdigit():
        return session.client.send(calls.read_policy(int(text)))
    return _only([each for each in policies(session) if each.name == text], text, "policy")


def subnets(session: Session) -> Iterator[rest.Subnet]:
    return (each for page in session.client.pages(calls.list_subnets()) for each in page.subnets)


def policies(session: Session) -> Iterator[rest.Policy]:
    return (each for page in session.client.pages(calls.list_policies()) for each in page.policies)


def canonical(cidr: str) -> str:
    """A CIDR in the service's notation; other text stays as it is, for the service to refuse."""
    try:
        return str(ip_network(cidr))
    except ValueError:
        return cidr


def _only(found: list[Thing], text: str, noun: str) -> Thing:
    if not found:
        raise CommandError(f"no {noun} {text}, or it is not yours", Exit.NOT_FOUND, hint=f"scanfleet {noun} list")
    if len(found) > 1:
        ids = ", ".join(str(each.id) for each in found)
        raise CommandError(f"{len(found)} of your {noun} objects are named {text}", hint=f"use an id: {ids}")
    return found[0]


def own_name(*parts: Iterable[Any] | object) -> str:
    """The name of an object that the command makes from these parts."""
    return f"cli-{sha256(repr(parts).encode()).hexdigest()[:HASH]}"


SCAN_FIELDS: Final = frozenset(ScanPolicy.model_fields)
