"""Administer the bus: `python -m scanfleet.kafka …`; settings come from the environment."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Iterable

from scanfleet.contracts.messages import OperatorActed
from scanfleet.contracts.messages.audit import MAX_TARGET_CHARS
from scanfleet.contracts.messages.topics import OPERATOR, SCAN_AUDIT_OPERATOR, TOPICS, Topic
from scanfleet.errors import DependencyError
from scanfleet.kafka.acls import create_acls
from scanfleet.kafka.bus import KafkaBus
from scanfleet.kafka.dead_letters import CannotReplayError, DeadLetter, check, dead_letter, dead_letters, replay
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.runtime.operator_command import command_entry, log_to_stderr

_NAME = "administrator"


def main() -> int:
    asked = _parser().parse_args()
    log_to_stderr()
    try:
        return asyncio.run(_do(asked))
    except (DependencyError, LookupError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    names = [topic.name for topic in TOPICS]
    parser = argparse.ArgumentParser(prog="python -m scanfleet.kafka", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    commands.add_parser("create-topics", help="create missing topics and apply their settings; idempotent")
    commands.add_parser("create-acls", help="grant the ACLs of each service's user; idempotent")
    list_ = commands.add_parser("list", help="print one line per dead letter")
    list_.add_argument("topic", nargs="?", choices=names, metavar="TOPIC", help="only dead letters of this topic")
    show = commands.add_parser("show", help="print a dead letter completely")
    show.add_argument("letter", metavar="LETTER", help="id as printed by `list`")
    again = commands.add_parser(
        "replay",
        help="resend dead letters to their original topic, if it still holds the same record; they are not removed",
    )
    which = again.add_mutually_exclusive_group(required=True)
    which.add_argument("letters", nargs="*", default=[], metavar="LETTER")
    which.add_argument("--all", choices=names, metavar="TOPIC", help="all present dead letters of this topic")
    which.add_argument(
        "--unverified",
        action="append",
        metavar="LETTER",
        help="resend this dead letter although its origin cannot be verified; inspect it first",
    )
    return parser


async def _do(asked: argparse.Namespace) -> int:
    settings = TopicSettings()
    if asked.command == "create-topics":
        await create_topics(settings, [SCAN_AUDIT_OPERATOR])  # the command is recorded there before it does the rest
    bus = KafkaBus(settings, source=_NAME, instance=_NAME)
    await bus.start()
    try:
        return await _on_bus(bus, settings, asked)
    finally:
        await bus.stop()


async def _on_bus(bus: KafkaBus, settings: TopicSettings, asked: argparse.Namespace) -> int:
    match asked.command:
        case "create-topics":
            await _record(bus, "create_topics", f"topics of the services, prefix '{settings.topic_prefix}'")
            await create_topics(settings)
        case "create-acls":
            await _record(bus, "create_acls", f"users of the services, prefix '{settings.topic_prefix}'")
            await create_acls(settings)
        case "list":
            await _record(bus, "list_dead_letters", asked.topic or "all topics")
            await _list(bus, [topic for topic in TOPICS if asked.topic in (topic.name, None)])
        case "show":
            await _record(bus, "show_dead_letter", asked.letter[:MAX_TARGET_CHARS])
            _print((await dead_letter(bus, asked.letter)).lines())
        case "replay":
            chosen = _all(bus, asked.all) if asked.all else _these(bus, asked.letters or asked.unverified)
            return await _replay(bus, chosen, verify=not asked.unverified)
    return 0


async def _list(bus: KafkaBus, topics: Iterable[Topic]) -> None:
    for topic in topics:
        async for each in dead_letters(bus, topic):
            _print([each.line()])


async def _these(bus: KafkaBus, ids: Iterable[str]) -> AsyncIterator[DeadLetter]:
    for id_ in ids:
        yield await dead_letter(bus, id_)


def _all(bus: KafkaBus, name: str) -> AsyncIterator[DeadLetter]:
    (topic,) = (topic for topic in TOPICS if topic.name == name)
    return dead_letters(bus, topic)


async def _replay(bus: KafkaBus, chosen: AsyncIterator[DeadLetter], *, verify: bool) -> int:
    refused = 0
    action = "replay_dead_letter" if verify else "replay_unverified_dead_letter"
    async for each in chosen:
        try:
            await check(bus, each, verify=verify)
            await _record(bus, action, each.id)
            await replay(bus, each)
        except CannotReplayError as error:
            refused += 1
            await _record(bus, action, each.id, refused=str(error))
            _print([f"{each.id} was not sent: {error}"])
        else:
            _print([f"{each.id} was sent to {each.topic.name}"])
    return min(refused, 1)


async def _record(bus: KafkaBus, action: str, target: str, *, refused: str = "") -> None:
    """Publish the audit entry of the next step, and wait for its acknowledgement."""
    entry = command_entry(OPERATOR, action, target, refused=refused)
    await bus.publish(SCAN_AUDIT_OPERATOR, [OperatorActed(entry=entry)])


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
