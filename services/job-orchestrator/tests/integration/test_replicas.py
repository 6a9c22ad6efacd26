"""Replicas side by side, on real Kafka and MongoDB, with scripted workers and a stand-in for result-store."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import httpx2
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from fastapi import FastAPI

from job_orchestrator.domain.chunk import Chunk, ChunkState
from job_orchestrator.domain.job import ScanJob
from job_orchestrator.domain.resources import Owned, ScanTarget
from job_orchestrator.main import create_app
from job_orchestrator.repository import MongoStore
from job_orchestrator.settings import Settings
from job_orchestrator_testing import KEYS, ResultStore, Worker, scan_policy
from job_orchestrator_testing.builders import THEN
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import (
    CancelJob,
    ChunkClaimed,
    CommandAccepted,
    CommandRejected,
    CommandReply,
    DeleteResults,
    JobEvent,
    JobProgressed,
    JobStatus,
    ScanChunk,
    SubmitJobs,
)
from scanfleet.contracts.messages.topics import (
    SCAN_COMMANDS,
    SCAN_DELETIONS,
    SCAN_EVENTS,
    SCAN_PROGRESS,
    SCAN_REPLIES,
    SCAN_RESULTS,
    SCAN_STORED,
    SCAN_TASKS,
    SCAN_WORKERS,
    Topic,
)
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.runtime import mongo
from scanfleet.runtime.bus import Handler
from scanfleet.runtime.loop import Loop
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.services import ORCHESTRATOR
from scanfleet_testing.chunk_grants import write_chunk_keys
from scanfleet_testing.consumers import Recorder
from scanfleet_testing.kafka import behind, read
from scanfleet_testing.tokens import InternalKeys
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

READ = (SCAN_COMMANDS, SCAN_WORKERS, SCAN_PROGRESS, SCAN_STORED)
ENDED = {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED}
PATIENCE_SECONDS = 90  # for what takes a few, on a machine that does much else


class Platform:
    """Everything around the replicas."""

    def __init__(self, kafka: str, mongodb: str, stack: AsyncExitStack) -> None:
        self.kafka = kafka
        self.mongodb = mongodb
        self.prefix = f"replicas{uuid4().hex[:8]}-"
        self.stack = stack
        folder = Path(stack.enter_context(TemporaryDirectory()))
        self.keys = InternalKeys(folder)
        self.chunk_key_file, _ = write_chunk_keys(folder)
        self.audit_key_file = folder / "audit-key"
        self.audit_key_file.write_text("signs the audit log in tests alone".replace(" ", "-"))
        self.database = mongo.connect(mongodb, self.prefix.strip("-"))
        self.store = MongoStore(self.database, KEYS, now=utc_now)
        self.bus = KafkaBus(KafkaSettings(kafka=kafka, topic_prefix=self.prefix), source="test", instance="test")
        self.events, self.tasks, self.replies, self.progress = Recorder(), Recorder(), Recorder(), Recorder()
        self.listener, self.deletions = Recorder(), Recorder()
        self.workers = [Worker(self.bus, f"w-{n}", slots=3) for n in range(4)]

    async def open(self) -> None:
        await create_topics(TopicSettings(kafka=self.kafka, topic_prefix=self.prefix))
        self.stack.callback(self.database.client.close)
        await self.store.prepare()
        self.stack.push_async_callback(self.database.client.drop_database, self.database.name)
        await self.bus.start()
        self.stack.push_async_callback(self.bus.stop)
        listeners: list[tuple[Topic, Handler]] = [
            (SCAN_EVENTS, self.events),
            (SCAN_TASKS, self.tasks),
            (SCAN_REPLIES, self.replies),
            (SCAN_PROGRESS, self.progress),
            (SCAN_DELETIONS, self.deletions),
            *((topic, self.listener) for topic in READ),
            (SCAN_RESULTS, ResultStore(self.bus)),
            *((SCAN_TASKS, worker) for worker in self.workers),
        ]
        tails = [self.bus.tail(topic, handler) for topic, handler in listeners]
        announcements = [Loop(worker.worker_id, 0.5, worker.announce) for worker in self.workers]
        await asyncio.gather(*(each.start() for each in (*tails, *announcements)))
        for each in (*announcements, *tails):
            self.stack.push_async_callback(each.stop)
        scan = scan_policy(ports="1-2000")
        policy = Owned(id=1, user_id=7, name="x", content=scan, created_at=THEN, updated_at=THEN)
        await self.store.policies.add(policy)

    async def replica(self, instance: str, *, requests_only: bool = False) -> FastAPI:
        """One as it is really built."""
        app = create_app(
            Settings(
                instance=instance,
                kafka=self.kafka,
                topic_prefix=self.prefix,
                mongodb=self.mongodb,
                database=self.database.name,
                internal_public_keys_file=self.keys.public_keys_file,
                chunk_key_file=self.chunk_key_file,
                audit_key_file=self.audit_key_file,
                allowed_networks="127.0.0.0/8",
                lease_seconds=10.0,
                stored_seconds=5.0,
                requests_only=requests_only,
            ),
        )
        await self.stack.enter_async_context(app.router.lifespan_context(app))
        return app

    async def process(self, instance: str, *death: str) -> asyncio.subprocess.Process:
        """Start a replica in a separate process; return when it is ready."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            Path(__file__).with_name("replica.py"),
            self.kafka,
            self.mongodb,
            self.prefix,
            instance,
            *death,
            stdout=asyncio.subprocess.PIPE,
        )
        self.stack.push_async_callback(self.end, process)
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await process.stdout.readline() == b"ready\n"
        return process

    @staticmethod
    async def end(process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            process.kill()
            await process.wait()

    async def submit(self, count: int) -> list[str]:
        """So many commands of one subnet each; answers their ids."""
        ids = await self.store.subnets.take_ids(count)
        for id_ in ids:
            await self.store.subnets.add(
                Owned(
                    id=id_,
                    user_id=7,
                    name="x",
                    content=ScanTarget("127.9.8.0/29"),
                    created_at=THEN,
                    updated_at=THEN,
                ),
            )
        commands = [SubmitJobs(command_id=f"s-{id_}", user_id=7, policy_id=1, subnet_ids=(id_,)) for id_ in ids]
        await self.bus.publish(SCAN_COMMANDS, commands)
        return [command.command_id for command in commands]

    async def groups(self) -> set[str]:
        """Return the replicas' consumer groups."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.kafka)
        try:
            await admin.start()
            return {group for group, _ in await admin.list_consumer_groups() if group.startswith(self.prefix)}
        finally:
            await admin.close()

    async def jobs(self) -> list[ScanJob]:
        listed, _ = await self.store.jobs.page(7, set(), 0, 1_000)
        found = await self.store.jobs.get([job.id for job in listed])
        return [found[job.id] for job in listed]

    async def chunks(self, jobs: Sequence[ScanJob]) -> list[Chunk]:
        return [each for job in jobs for each in [chunk async for chunk in self.store.chunks.of_job(job.id)]]

    async def dead_letters(self) -> int:
        """How many records the replicas have refused."""
        groups = [
            dict(record.headers)["dlq_group"] or b""
            for topic in READ
            for record in await read(self.kafka, topic, prefix=self.prefix, dead_letters=True)
        ]
        return sum(group.startswith(ORCHESTRATOR.encode()) for group in groups)

    async def until_ended(self, count: int) -> list[ScanJob]:
        """All jobs, once there are so many and each is settled, with an empty outbox and its last event received."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                jobs = await self.jobs()
                last = {event.job.id: event.job.status for event in self.heard_events() if event.job.status in ENDED}
                settled = all(job.settled and not job.outbox and last.get(job.id) is job.status for job in jobs)
                if len(jobs) == count and settled:
                    return jobs
                await asyncio.sleep(0.1)

    async def until_read(self) -> None:
        """Wait until the replicas have committed all records in the topics that they read."""
        for topic in READ:

            async def read(topic: Topic = topic) -> bool:
                return await behind(self.kafka, f"{ORCHESTRATOR}-{topic.name}", topic, prefix=self.prefix) == 0

            await until(read, PATIENCE_SECONDS)

    def heard_events(self) -> list[JobEvent]:
        return [event for event in self.events.messages if isinstance(event, JobEvent)]

    def check_order(self) -> None:
        """Life-cycle events first appear in seq order, none missing, and a duplicate is the same event."""
        seen: dict[int, dict[int, JobEvent]] = defaultdict(dict)
        for event in self.heard_events():
            assert seen[event.job.id].setdefault(event.seq, event) == event
        for by_seq in seen.values():
            lives = [event for event in by_seq.values() if not isinstance(event, JobProgressed)]
            assert [event.seq for event in lives] == sorted(event.seq for event in lives)
            kinds = [type(event).__name__ for event in lives]
            assert kinds[0] == "JobCreated"
            assert kinds[1:-1] in (["JobStarted"], [] if kinds[-1] == "JobCancelled" else None)

    def check_tokens(self) -> None:
        """No token was dispatched or claimed twice."""
        given = Counter((each.chunk_id, each.attempt) for each in self.tasks.messages if isinstance(each, ScanChunk))
        claimed = Counter(
            (each.chunk_id, each.attempt) for each in self.progress.messages if isinstance(each, ChunkClaimed)
        )
        assert set(given.values()) == {1}
        assert set(claimed.values()) <= {1}


@pytest.fixture
async def platform(kafka: str, mongodb: str) -> AsyncIterator[Platform]:
    async with AsyncExitStack() as stack:
        platform = Platform(kafka, mongodb, stack)
        await platform.open()
        yield platform


@pytest.mark.proves("F22", "G3", "G7")
async def test_replicas_share_the_work(platform: Platform) -> None:
    """Fifty jobs complete on two replicas: no chunk is dispatched twice, and all events are in order."""
    await asyncio.gather(platform.replica("one"), platform.replica("two"))
    await platform.submit(50)
    jobs = await platform.until_ended(50)
    assert {job.status for job in jobs} == {JobStatus.COMPLETED}
    platform.check_order()
    platform.check_tokens()
    for job in jobs:
        states = [chunk.state async for chunk in platform.store.chunks.of_job(job.id)]
        assert states == [ChunkState.STORED] * job.plan.chunk_count


async def test_replica_for_requests_joins_no_group_and_answers(platform: Platform) -> None:
    """A replica for requests alone joins no consumer group, answers queries, and deletes a job that another has completed."""
    app = await platform.replica("requests", requests_only=True)
    assert await platform.groups() == set()
    await platform.replica("one")
    assert len(await platform.groups()) > 1
    await platform.submit(1)
    (job,) = await platform.until_ended(1)
    bearer = platform.keys.bearer(ORCHESTRATOR)
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://orchestrator", headers=bearer) as client:
        listed = (await client.get("/api/v1/task")).json()
        assert [(each["id"], each["status"]) for each in listed["jobs"]] == [(job.id, "completed")]
        assert (await client.delete(f"/api/v1/task/{job.id}")).status_code == 200
        assert (await client.get("/api/v1/task")).json()["total"] == 0
        await until(lambda: any(isinstance(each, DeleteResults) for each in platform.deletions.messages))


@pytest.mark.proves("F11", "F22", "G6", "G8")
async def test_cancel_concurrent_with_completion_has_one_winner(platform: Platform) -> None:
    """Jobs cancelled while they complete end once, and replies, events and documents have the same outcome."""
    await asyncio.gather(platform.replica("one"), platform.replica("two"))
    chance = random.Random(7)  # noqa: S311 # moments, not secrets
    cancelled: set[int] = set()

    async def cancel_soon(job_id: int) -> None:
        await asyncio.sleep(chance.uniform(0, 0.3))  # somewhere in its life; any moment will do
        await platform.bus.publish(SCAN_COMMANDS, [CancelJob(command_id=f"c-{job_id}", user_id=7, job_id=job_id)])

    def submitted() -> set[int]:
        replies = [each for each in platform.replies.messages if isinstance(each, CommandAccepted)]
        return {job.id for each in replies if each.command_id.startswith("s-") for job in each.jobs}

    for _ in range(8):
        before = submitted()
        await platform.submit(5)
        await until(lambda before=before: len(submitted()) == len(before) + 5, PATIENCE_SECONDS)  # type: ignore[misc] # mypy infers no type for a lambda with a default
        await asyncio.gather(*(cancel_soon(job_id) for job_id in submitted() - before))
        cancelled |= submitted()
    jobs = await platform.until_ended(40)
    await until(
        lambda: len({each.command_id for each in platform.replies.messages if isinstance(each, CommandReply)}) == 80,
        PATIENCE_SECONDS,
    )
    replies = {each.command_id: each for each in platform.replies.messages if isinstance(each, CommandReply)}
    for job in jobs:
        ends = {event.seq for event in platform.heard_events() if event.job.id == job.id and event.job.status in ENDED}
        assert len(ends) == 1
        reply = replies[f"c-{job.id}"]
        if job.status is JobStatus.CANCELLED:
            assert isinstance(reply, CommandAccepted)
        else:
            assert job.status is JobStatus.COMPLETED
            assert isinstance(reply, CommandRejected)
            assert reply.error == "Job is already completed"
    platform.check_order()
    platform.check_tokens()


@pytest.mark.proves("F9", "F12", "G9")
async def test_invalid_and_replayed_messages_change_nothing(platform: Platform) -> None:
    """Invalid messages in every partition of every topic are dead-lettered, and a replay of all messages has no effect."""
    await platform.replica("one")
    producer = AIOKafkaProducer(bootstrap_servers=platform.kafka)
    await producer.start()
    platform.stack.push_async_callback(producer.stop)
    junk = 0
    for topic in READ:
        for partition in range(topic.partitions):
            for value, headers in (
                (b"\xff", []),
                (b"{}", [("ce_specversion", b"1.0"), ("ce_type", b"scanfleet.X.v1")]),
            ):
                await producer.send_and_wait(platform.prefix + topic.name, value, partition=partition, headers=headers)
                junk += 1
    await platform.submit(5)
    await platform.until_ended(5)
    await platform.until_read()  # a worker's report may arrive after the reply of result-store
    before = await platform.jobs()
    chunks = await platform.chunks(before)
    for topic in READ:
        sent = [each for each in platform.listener.messages if type(each) in topic.messages]
        await platform.bus.publish(topic, sent + sent)
    await platform.submit(1)
    await platform.until_ended(6)
    await platform.until_read()
    after = await platform.jobs()
    assert [job for job in after if job in before] == before
    assert await platform.chunks(before) == chunks
    assert await platform.dead_letters() == junk
    platform.check_order()


@pytest.mark.proves("F3", "F4", "G7")
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("kind", ["JobCreated", "JobStarted", "JobCompleted"])
async def test_replica_killed_around_a_publish_loses_no_event(platform: Platform, kind: str, moment: str) -> None:
    """After SIGKILL between write and publish, or before the outbox is emptied, another replica continues."""
    killed = await platform.process("one", kind, moment)
    await platform.submit(3)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await killed.wait() == -9
    await platform.process("one")
    jobs = await platform.until_ended(3)
    assert {job.status for job in jobs} == {JobStatus.COMPLETED}
    platform.check_order()
    platform.check_tokens()
