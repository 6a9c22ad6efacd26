"""From what a person types to the API's objects: names to ids, fields to policies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, Final, Protocol, TypeVar
from uuid import uuid4

import click
from pydantic import BaseModel

from scanfleet import rest
from scanfleet.policy import ScanPolicy
from scanfleet_cli import calls
from scanfleet_cli.client import Reply
from scanfleet_cli.errors import ApiError, CommandError, Exit, UnavailableError, explain
from scanfleet_cli.output import Column, column
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


def create_jobs(session: Session, subnet_ids: Sequence[int], policy_id: int, key: str | None) -> Reply:
    """The answer to the request for a job for each subnet.

    Args:
        session: of the command.
        subnet_ids: of the subnets.
        policy_id: of the policy.
        key: of the user; otherwise the command makes one.

    Raises:
        CommandError: the jobs may have been created under a key that the user does not have yet.
    """
    sent = key or uuid4().hex
    try:
        return session.client.ask(calls.create_tasks(subnet_ids, policy_id, sent))
    except (ApiError, UnavailableError) as error:
        if key is not None or not error.unsure:
            raise
        end = explain(error)
        raise CommandError(
            end.message,
            Exit.FAULT,
            hint=f"the jobs may have been created; to repeat the command safely, add --key {sent}",
            status=end.status,
            request_id=end.request_id,
        ) from error


def submitted_columns(networks: Mapping[int, str]) -> list[Column]:
    """Of jobs that were just created; `networks` are those of subnets, by id."""
    return [
        Column("JOB", lambda row: f"job {row['id']}"),
        Column("NETWORK", lambda row: networks.get(row["subnet_id"], "")),
        column("STATUS"),
    ]


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
