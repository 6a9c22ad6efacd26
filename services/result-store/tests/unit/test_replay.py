"""The store's content is a function of the log, whatever batches, failures and redeliveries occur."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from result_store.domain.results import ClosedChunk, Host, Scanned
from result_store_testing import FIRST, Log, MemoryStore, host, scanned
from result_store_testing import handler as results_handler
from scanfleet.contracts.messages import ChunkIncomplete, ChunkStored, Message
from scanfleet.contracts.messages.topics import Topic
from scanfleet.errors import DependencyError
from scanfleet.runtime.bus import Record
from scanfleet.scanning.outcomes import address_at

ADDRESSES = 3
JOBS = 3

# An event of a chunk: a host (address, outcome, ports, attempt; one address is outside the map), or a ChunkScanned's map.
hosts = st.tuples(st.integers(0, ADDRESSES), st.sampled_from("ast"), st.sampled_from([(), (80,)]), st.integers(1, 3))
maps = st.text("asd.x", min_size=ADDRESSES, max_size=ADDRESSES)
events = st.tuples(st.integers(0, 1), hosts | maps)


@st.composite
def recordings(draw: st.DrawFn) -> list[list[Record[Scanned]]]:
    """Draw a partition for each of some jobs of two chunks, with hosts and ChunkScanned messages in any possible order."""
    logs = []
    for job_id in range(1, draw(st.integers(1, JOBS)) + 1):
        log = Log()
        for chunk, event in draw(st.lists(events, max_size=12)):
            chunk_id = f"{job_id}-{chunk}"
            if isinstance(event, str):
                log.append(scanned(event, job_id=job_id, chunk_id=chunk_id))
            else:
                index, outcome, ports, attempt = event
                address = str(address_at(FIRST, index))
                log.append(host(address, *ports, job_id=job_id, chunk_id=chunk_id, outcome=outcome, attempt=attempt))
        logs.append(log.records)
    return logs


class TornStore(MemoryStore):
    """Fails at random: a part of the write is done at once, a part later by a frozen replica, and a part never."""

    def __init__(self, chance: Random) -> None:
        super().__init__()
        self._chance = chance
        self.limbo: list[Host] = []

    async def add(self, hosts: Sequence[Host]) -> int:
        if not self._fails():
            return await super().add(hosts)
        fates = [self._chance.choice(["now", "later", "never"]) for _ in hosts]
        await super().add([each for each, fate in zip(hosts, fates, strict=True) if fate == "now"])
        self.limbo += [each for each, fate in zip(hosts, fates, strict=True) if fate == "later"]
        raise DependencyError("torn")

    async def close(self, chunks: Sequence[ClosedChunk]) -> dict[str, ClosedChunk]:
        if not self._fails():
            return await super().close(chunks)
        await super().close(chunks[: self._chance.randint(0, len(chunks))])
        raise DependencyError("torn")

    async def thaw(self) -> None:
        await super().add(self.limbo)
        self.limbo = []

    def _fails(self) -> bool:
        return self._chance.random() < 0.25


class Sent:
    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def publish(self, topic: Topic, messages: Iterable[Message]) -> None:  # noqa: ARG002 # the port's signature
        self.messages += messages


async def plainly(logs: list[list[Record[Scanned]]]) -> tuple[MemoryStore, Sent]:
    """Handle each record once, one at a time, job by job."""
    store, sent = MemoryStore(), Sent()
    handler = results_handler(store, sent)
    for log in logs:
        for record in log:
            await handler.handle([record])
    return store, sent


async def roughly(logs: list[list[Record[Scanned]]], chance: Random) -> tuple[MemoryStore, Sent]:
    """Handle random batches of the jobs in random order, with failures, redeliveries and a replica that resumes late."""
    store, sent = TornStore(chance), Sent()
    handler = results_handler(store, sent)
    committed = [0] * len(logs)
    while any(position < len(log) for position, log in zip(committed, logs, strict=True)):
        order = chance.sample(range(len(logs)), len(logs))
        reach = [chance.randint(committed[job], len(logs[job])) for job in range(len(logs))]
        batch = [record for job in order for record in logs[job][committed[job] : reach[job]]]
        try:
            await handler.handle(batch)
        except DependencyError:
            continue
        if chance.random() < 0.5:  # else the replica crashes before the commit
            committed = reach
        if chance.random() < 0.5:
            await store.thaw()
    await store.thaw()
    return store, sent


async def readable(store: MemoryStore) -> list[list[dict[str, Any]]]:
    """Return all results of every job in order, without their ids."""
    return [
        [result.model_dump(exclude={"id"}) async for results in store.results(job_id, None) for result in results]
        for job_id in range(1, JOBS + 1)
    ]


def announced(sent: Sent) -> set[str]:
    return {each.model_dump_json() for each in sent.messages if isinstance(each, ChunkStored)}


@settings(max_examples=400, deadline=None)
@given(recordings(), st.integers(0, 1_000_000))
def test_replay_any_order_gives_the_same_database(logs: list[list[Record[Scanned]]], seed: int) -> None:
    """Stored, read and published data do not depend on batching, interleaving, redelivery and interruptions of a log."""

    async def story() -> None:
        plain, plain_sent = await plainly(logs)
        rough, rough_sent = await roughly(logs, Random(seed))  # noqa: S311 # chance, not secrecy
        assert {key: each for key, (each, _) in rough.hosts.items()} == {
            key: each for key, (each, _) in plain.hosts.items()
        }
        assert rough.chunks == plain.chunks
        assert await readable(rough) == await readable(plain)
        assert announced(rough_sent) == announced(plain_sent)

    asyncio.run(story())


@settings(max_examples=100, deadline=None)
@given(recordings())
def test_replay_closed_chunk_is_complete(logs: list[list[Record[Scanned]]]) -> None:
    """In every closed chunk no code is blank, each claim has its host, and no other host is a result."""

    async def story() -> None:
        store, sent = await plainly(logs)
        for chunk in store.chunks.values():
            assert "." not in chunk.outcomes
            claimed = {str(address_at(FIRST, i)) for i, letter in enumerate(chunk.outcomes) if letter in "ast"}
            mine = [each.scanned for each, _ in store.hosts.values() if each.scanned.chunk_id == chunk.chunk_id]
            assert claimed <= {each.address for each in mine}
            assert {each.address for each in mine if chunk.counts(each.address)} == claimed
        assert all(each.addresses for each in sent.messages if isinstance(each, ChunkIncomplete))

    asyncio.run(story())
