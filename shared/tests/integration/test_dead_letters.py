"""Operators' commands for dead letters, on a real broker, including forged dead letters."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final, cast
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaProducer

from scanfleet.contracts.messages import Message, OperatorActed, WorkerReady
from scanfleet.contracts.messages.envelope import Headers, RawRecord, decode
from scanfleet.contracts.messages.topics import SCAN_AUDIT_OPERATOR, SCAN_COMMANDS, SCAN_WORKERS, Topic
from scanfleet.errors import DependencyError
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.__main__ import _on_bus, _parser
from scanfleet.kafka.dead_letters import REPLAY, DeadLetter, dead_letter, dead_letters
from scanfleet.kafka.topics import DEAD_LETTER_BYTES, TopicSettings, create_topics
from scanfleet.runtime.bus import Record
from scanfleet_testing.batches import unreadable
from scanfleet_testing.consumers import Recorder, Running
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

GROUP: Final = "test"
HERE: Final = (SCAN_WORKERS, SCAN_COMMANDS)
HOSTILE: Final = "\x1b]0;mine\x07 \u202eevil\u2028\n\r\t\x9b31m".encode() + b"\xff\x00"


class Operator:
    """An operator at the command line, and other users who write arbitrary dead letters."""

    def __init__(self, settings: TopicSettings, bus: KafkaBus) -> None:
        self.settings = settings
        self.bus = bus

    async def runs(self, *words: str) -> tuple[int, list[str]]:
        """The exit code of `python -m scanfleet.kafka` with these words, and its lines, on standard error if on no other."""
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "scanfleet.kafka", *words],
            env=os.environ
            | {"SCANFLEET_KAFKA": self.settings.kafka, "SCANFLEET_TOPIC_PREFIX": self.settings.topic_prefix},
            capture_output=True,
            check=False,
        )
        for text in (done.stdout, done.stderr):
            assert text.decode().replace("\n", "").replace("\t", "").isprintable()
        return done.returncode, (done.stdout or done.stderr).decode().splitlines()

    async def put(self, topic: str, value: bytes | None, headers: Headers = (), key: bytes = b"k") -> None:
        async with self._producer() as producer:
            await producer.send_and_wait(self.settings.topic_prefix + topic, value, key, 0, headers=list(headers))

    async def put_unreadable(self, topic: str) -> None:
        """A record of which the client cannot take the header apart."""
        async with self._producer() as producer:
            batch = producer.create_batch()
            batch.append(key=b"k", value=b"v", timestamp=None)
            batch._build()
            batch._buffer = unreadable((b"k", b"v", ()))
            await (await producer.send_batch(batch, self.settings.topic_prefix + topic, partition=0))

    @asynccontextmanager
    async def _producer(self) -> AsyncIterator[AIOKafkaProducer]:
        size = 2 * DEAD_LETTER_BYTES
        async with AIOKafkaProducer(
            bootstrap_servers=self.settings.kafka,
            max_request_size=size,
            max_batch_size=size,
        ) as producer:
            yield producer

    async def recorded(self) -> list[tuple[str, str, str, str]]:
        """Action, target, decision and reason of each entry that the audit log gets from operators."""
        records = [record async for record in self.bus.past(SCAN_AUDIT_OPERATOR)]
        acted = [cast(OperatorActed, decode(SCAN_AUDIT_OPERATOR, record)).entry for record in records]
        return [(each.action, each.target, each.decision, each.reason) for each in acted]

    async def letters(self) -> list[DeadLetter]:
        return [each async for each in dead_letters(self.bus, SCAN_WORKERS)]

    async def written(self, count: int) -> bool:
        """Return whether there are so many dead letters."""
        return len(await self.letters()) >= count

    async def records(self) -> list[RawRecord]:
        """Return the records of the topics that services read."""
        return [record for topic in HERE async for record in self.bus.past(topic)]


@pytest.fixture
async def operator(kafka: str) -> AsyncIterator[Operator]:
    settings = TopicSettings(kafka=kafka, topic_prefix=f"{uuid4().hex}-")
    await create_topics(settings, (*HERE, SCAN_AUDIT_OPERATOR))
    bus = KafkaBus(settings, source="test", instance="test")
    await bus.start()
    yield Operator(settings, bus)
    await bus.stop()


def refuse(_: Sequence[Record]) -> None:
    raise ValueError("not today")


async def test_replay_after_a_fix_is_handled(operator: Operator) -> None:
    """A message that a faulty reader refused is listed with its origin, replayed unchanged, handled, and still kept."""
    message, reader = WorkerReady(worker_id="w-1", slots=3, raw=False), Recorder(refuse)
    async with Running(operator.bus.consume(SCAN_WORKERS, GROUP, reader)):
        await operator.bus.publish(SCAN_WORKERS, [message])
        await until(lambda: len(reader.tries) == 2)  # with its batch, and alone
        reader._does = lambda _: None
        await until(lambda: operator.written(1))
        (only,) = await operator.letters()
        (origin,) = [record for record in await operator.records() if record.topic == SCAN_WORKERS.name]

        await create_topics(operator.settings)
        code, (line,) = await operator.runs("list")
        assert code == 0
        assert line.split("\t") == [
            "scan-workers-dlq/0/0",
            f"scan-workers/{origin.partition}/{origin.offset}",
            GROUP,
            line.split("\t")[3],
            str(len(origin.value or b"")),
            "-",
            "ValueError('not today')",
        ]
        assert await operator.runs("list", "scan-commands") == (0, [])

        code, printed = await operator.runs("replay", only.id)
        assert (code, printed) == (0, ["scan-workers-dlq/0/0 was sent to scan-workers"])
        await until(lambda: reader.handled)
    assert reader.messages == [message]
    first, again = [record for record in await operator.records() if record.topic == SCAN_WORKERS.name]
    assert (again.partition, again.key, again.value) == (first.partition, first.key, first.value)
    assert again.headers == (*first.headers, (REPLAY, only.id.encode()))
    assert len(await operator.letters()) == 1


async def test_replay_refused_again_names_its_dead_letter(operator: Operator) -> None:
    """A replayed message that is refused again becomes a dead letter that names only the previous one."""
    async with Running(operator.bus.consume(SCAN_WORKERS, GROUP, Recorder())):
        await operator.put(SCAN_WORKERS.name, b"poison", [("theirs", b"1"), ("dlq_topic", b"scan-commands")])
        await until(lambda: operator.written(1))
        assert (await operator.runs("replay", "--all", "scan-workers"))[0] == 0
        await until(lambda: operator.written(2))
        assert (await operator.runs("replay", "scan-workers-dlq/0/1"))[0] == 0
        await until(lambda: operator.written(3))
    _, lines = await operator.runs("list", "scan-workers")
    assert [line.split("\t")[5] for line in lines] == ["-", "scan-workers-dlq/0/0", "scan-workers-dlq/0/1"]
    names = [name for name, _ in (await operator.letters())[2].record.headers]
    assert names[:3] == ["theirs", "dlq_topic", REPLAY]
    assert names.count(REPLAY) == 1


def refused_by_a_reader(topic: str, partition: bytes = b"0", offset: bytes = b"0") -> list[tuple[str, bytes | None]]:
    names = ("topic", "partition", "offset", "timestamp", "group", "reason")
    known = {"topic": topic.encode(), "partition": partition, "offset": offset}
    return [(f"dlq_{name}", known.get(name, HOSTILE)) for name in names]


@pytest.mark.proves("A27")
async def test_replay_of_forged_dead_letters_sends_only_verified_copies(operator: Operator) -> None:
    """Dead letters are shown as text; only a copy of the record at its origin is sent."""
    here, topic = refused_by_a_reader("scan-workers"), SCAN_WORKERS.dead_letter
    own: list[tuple[str, bytes | None]] = [("own", b"1")]
    await operator.put(SCAN_WORKERS.name, b"good", own)
    forged: list[tuple[bytes | None, list[tuple[str, bytes | None]], str]] = [
        (HOSTILE, [], "not dead-lettered by a reader of scan-workers"),
        (b"x", refused_by_a_reader("scan-commands"), "not dead-lettered by a reader of scan-workers"),
        (b"x", refused_by_a_reader("__consumer_offsets"), "not dead-lettered by a reader of scan-workers"),
        (b"x", refused_by_a_reader("scan-workers-dlq"), "not dead-lettered by a reader of scan-workers"),
        (b"x", here[1:], "not dead-lettered by a reader of scan-workers"),
        (b"x", [*here, (HOSTILE.decode(errors="replace"), HOSTILE)], "not dead-lettered by a reader of scan-workers"),
        (None, here, "has no value"),
        (b"x" * 8_000_000, here, "exceeds the maximum size"),
        (b"x", [("big", b"x" * 1_100_000), *here], "exceeds the maximum size"),
        (b"bad", [*own, *here], "scan-workers/0/0 holds another record"),
        (b"good", here, "scan-workers/0/0 holds another record"),
        (b"good", [("own", b"2"), *here], "scan-workers/0/0 holds another record"),
        (b"good", [*own, *refused_by_a_reader("scan-workers", b"1")], "scan-workers/1/0 no longer exists"),
        (b"good", [*own, *refused_by_a_reader("scan-workers", b"0", b"7")], "scan-workers/0/7 no longer exists"),
        (b"good", [*own, *refused_by_a_reader("scan-workers", b"12")], "no partition and offset"),
        (b"good", [*own, *refused_by_a_reader("scan-workers", b"0", b"-1")], "no partition and offset"),
        (b"good", [*own, *refused_by_a_reader("scan-workers", b"0", b"9" * 30)], "no partition and offset"),
    ]
    for value, headers, _ in forged:
        await operator.put(topic, value, headers)
    await operator.put_unreadable(topic)
    await operator.put(topic, b"good", [*own, *here], key=b"another")
    await operator.put(topic, b"good", [*own, *here])
    before = await operator.records()

    code, lines = await operator.runs("list", "scan-workers")
    assert code == 0
    assert [line.split("\t")[0] for line in lines] == [f"{topic}/0/{n}" for n in range(len(forged) + 3)]
    for number in (0, 5, len(forged)):
        code, lines = await operator.runs("show", f"{topic}/0/{number}")
        assert code == 0
        assert all(line.isprintable() for line in lines)
    code, printed = await operator.runs("replay", "--all", "scan-workers")
    assert code == 1
    for (_, _, reason), line in zip(forged, printed, strict=False):
        assert "was not sent" in line
        assert reason in line
    assert "not dead-lettered by a reader of scan-workers" in printed[-3]
    assert "holds another record" in printed[-2]
    assert printed[-1].endswith("was sent to scan-workers")
    (sent,) = [record for record in await operator.records() if record not in before]
    assert (sent.topic, sent.key, sent.value, sent.headers[0]) == ("scan-workers", b"k", b"good", ("own", b"1"))


@pytest.mark.proves("A27")
async def test_replay_unverified_sends_only_the_named_dead_letter(operator: Operator) -> None:
    """A dead letter whose record is gone is sent only by its id; no option sends all of them unverified."""
    topic = SCAN_WORKERS.dead_letter
    for value in (b"one", b"two"):
        await operator.put(topic, value, refused_by_a_reader("scan-workers"))
    before = await operator.records()
    assert (await operator.runs("replay", f"{topic}/0/0", f"{topic}/0/1"))[0] == 1
    assert (await operator.runs("replay", "--all", "scan-workers", "--unverified", f"{topic}/0/0"))[0] == 2
    assert (await operator.runs("replay", "--unverified", "scan-workers"))[0] == 1
    assert await operator.records() == before
    assert (await operator.runs("replay", "--unverified", f"{topic}/0/1"))[0] == 0
    (sent,) = [record for record in await operator.records() if record not in before]
    assert sent.value == b"two"
    assert [(*entry[:3], bool(entry[3])) for entry in await operator.recorded()] == [
        ("replay_dead_letter", f"{topic}/0/0", "refused", True),
        ("replay_dead_letter", f"{topic}/0/1", "refused", True),
        ("replay_unverified_dead_letter", f"{topic}/0/1", "allowed", False),
    ]


@pytest.mark.proves("G15")
async def test_create_acls_that_fails_is_recorded(operator: Operator) -> None:
    """A command that fails halfway is in the audit log too."""
    assert (await operator.runs("create-acls"))[0] == 1  # this broker has no authorizer
    prefix = operator.settings.topic_prefix
    assert await operator.recorded() == [("create_acls", f"users of the services, prefix '{prefix}'", "allowed", "")]


@pytest.mark.proves("G15")
async def test_create_topics_without_topics_is_recorded(kafka: str) -> None:
    """The first command on a new cluster is in the audit log too."""
    settings = TopicSettings(kafka=kafka, topic_prefix=f"{uuid4().hex}-")
    bus = KafkaBus(settings, source="test", instance="test")
    await bus.start()
    try:
        operator = Operator(settings, bus)
        assert await operator.runs("create-topics") == (0, [])
        target = f"topics of the services, prefix '{settings.topic_prefix}'"
        assert await operator.recorded() == [("create_topics", target, "allowed", "")]
    finally:
        await bus.stop()


class Unrecorded(KafkaBus):
    """A bus that cannot publish to the audit log."""

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:
        if topic is SCAN_AUDIT_OPERATOR:
            raise DependencyError("not recorded")
        await super().publish(topic, messages)


@pytest.mark.proves("G15")
@pytest.mark.parametrize(
    "words",
    [
        ["create-acls"],
        ["list"],
        ["show", f"{SCAN_WORKERS.dead_letter}/0/0"],
        ["replay", "--unverified", f"{SCAN_WORKERS.dead_letter}/0/0"],
    ],
)
async def test_command_without_its_audit_entry_does_nothing(
    operator: Operator, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an entry in the audit log no ACL is created and no dead letter is printed or sent."""
    await operator.put(SCAN_WORKERS.dead_letter, b"x", refused_by_a_reader("scan-workers"))
    before = await operator.records()
    bus = Unrecorded(operator.settings, source="test", instance="test")
    await bus.start()
    try:
        with pytest.raises(DependencyError, match="not recorded"):
            await _on_bus(bus, operator.settings, _parser().parse_args(words))
    finally:
        await bus.stop()
    assert await operator.records() == before
    assert capsys.readouterr().out == ""


async def test_show_prints_key_headers_and_value(operator: Operator) -> None:
    """`show` prints key, headers and value, with bytes that are not text escaped."""
    await operator.put(SCAN_WORKERS.dead_letter, b'{"name": "caf\xc3\xa9\x1b[2J"}', [("h", b"\xff"), ("none", None)])
    code, lines = await operator.runs("show", "scan-workers-dlq/0/0")
    assert code == 0
    assert lines[0] == "dead letter: scan-workers-dlq/0/0"
    assert lines[2:] == ["key: k", r"header h: \xff", "header none: -", r'value: {"name": "café\x1b[2J"}']
    assert await operator.recorded() == [("show_dead_letter", "scan-workers-dlq/0/0", "allowed", "")]


async def test_show_unknown_id_fails(operator: Operator) -> None:
    """An id of no dead letter is an error, and no other dead letter is used instead."""
    for topic in (SCAN_WORKERS.dead_letter, SCAN_WORKERS.name, SCAN_COMMANDS.dead_letter):
        await operator.put(topic, b"x")
    for id_ in ("scan-workers-dlq/1/0", "scan-workers-dlq", "scan-workers/0/0", "x/0/0", "scan-workers-dlq/0/-1"):
        with pytest.raises(LookupError, match=id_):
            await dead_letter(operator.bus, id_)
    for verb in ("show", "replay"):
        code, printed = await operator.runs(verb, "scan-workers-dlq/0/7")
        assert (code, printed[-1]) == (1, "there is no dead letter scan-workers-dlq/0/7")
