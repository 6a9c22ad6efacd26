"""A simulation around the real handlers: a bus in memory, scripted workers and a substitute for result-store.

No part runs concurrently: a test delivers messages, advances the time and injects faults.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime, timedelta
from itertools import count
from typing import Any, Final

from job_orchestrator.domain.ports import Store
from job_orchestrator.domain.quotas import Quotas
from job_orchestrator.domain.resources import Owned, ScanTarget
from job_orchestrator.domain.time import PlatformTime
from job_orchestrator.main import Orchestrator
from job_orchestrator_testing.builders import KEYS, scan_policy
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import (
    CancelJob,
    ChunkClaimed,
    ChunkFailed,
    ChunkIncomplete,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    ChunkStored,
    DeleteResults,
    Job,
    JobEvent,
    ResultsDeleted,
    ScanChunk,
    StopChunk,
    SubmitJobs,
    WorkerReady,
)
from scanfleet.contracts.messages.envelope import decode
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
from scanfleet.contracts.user_grants import UserGrants
from scanfleet.runtime.bus import PartitionListener, Publisher, Record
from scanfleet.scanning.outcomes import Outcome, address_at
from scanfleet.scanning.policy import ADMITTED_SCRIPTS, ScanPolicy
from scanfleet.scanning.targets import TargetRules, parse_network
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.chunk_grants import signer

RULES: Final = TargetRules((parse_network("127.0.0.0/8"),))
_READ: Final = (SCAN_COMMANDS, SCAN_DELETIONS, SCAN_WORKERS, SCAN_PROGRESS, SCAN_STORED)
_EVERY_PARTITION: Final = range(SCAN_PROGRESS.partitions)
_NOW: Final = 1_000.0  # on its monotonic clock, when a simulation begins
_STEPS: Final = 1_000  # maximum number until a simulation is idle


def listeners(replica: Orchestrator) -> list[PartitionListener]:
    """Return the handlers that keep state per partition."""
    return [handler for handler in replica.handlers.values() if isinstance(handler, PartitionListener)]


class Worker:
    """A handler of scan-tasks that reports an outcome at once. With `hold` it only records its tasks.

    Attributes:
        code: the outcome of every address.
        tasks: the received tasks, in order.
        stops: the received stop messages.
    """

    def __init__(self, publisher: Publisher, worker_id: str = "w-1", *, slots: int = 4, raw: bool = False) -> None:
        self.publisher = publisher
        self.worker_id = worker_id
        self.slots = slots
        self.raw = raw
        self.hold = False
        self.code = "s"
        self.tasks: list[ScanChunk] = []
        self.stops: list[StopChunk] = []

    async def announce(self) -> None:
        ready = WorkerReady(worker_id=self.worker_id, slots=self.slots, raw=self.raw)
        await self.publisher.publish(SCAN_WORKERS, [ready])

    async def handle(self, records: Sequence[Record]) -> None:
        for record in records:
            match record.message:
                case ScanChunk() as task if task.worker_id == self.worker_id:
                    self.tasks.append(task)
                    if not self.hold:
                        await self.claim(task)
                        await self.scanned(task)
                        await self.announce()
                case StopChunk() as stop if stop.worker_id == self.worker_id:
                    self.stops.append(stop)

    async def claim(self, task: ScanChunk, **fields: Any) -> None:
        await self.publisher.publish(SCAN_PROGRESS, [ChunkClaimed(**task.token._asdict(), **fields)])

    async def progress(self, task: ScanChunk, outcomes: str) -> None:
        await self.publisher.publish(SCAN_PROGRESS, [ChunkProgressed(**task.token._asdict(), outcomes=outcomes)])

    async def release(self, task: ScanChunk, outcomes: str | None = None, **fields: Any) -> None:
        outcomes = outcomes or task.outcomes
        released = ChunkReleased(
            **task.token._asdict(), outcomes=outcomes, reason="leaving", slot_seconds=0.1, **fields
        )
        await self.publisher.publish(SCAN_PROGRESS, [released])

    async def fail(
        self, task: ScanChunk, reason: str = "nmap died", outcomes: str | None = None, *, no_route: bool = False
    ) -> None:
        outcomes = outcomes or task.outcomes
        failed = ChunkFailed(
            **task.token._asdict(), outcomes=outcomes, reason=reason, slot_seconds=0.1, no_route=no_route
        )
        await self.publisher.publish(SCAN_PROGRESS, [failed])

    async def scanned(
        self, task: ScanChunk, outcomes: str | None = None, *, slot_seconds: float = 0.1, **fields: Any
    ) -> None:
        """Publish the final report to result-store first, then to the orchestrator."""
        scanned = ChunkScanned(
            **task.token._asdict(),
            outcomes=outcomes or task.outcomes.replace(Outcome.BLANK, self.code),
            first_address=task.first_address,
            slot_seconds=slot_seconds,
            technique="connect",
            grant=task.grant,
            **fields,
        )
        await self.publisher.publish(SCAN_RESULTS, [scanned])
        await self.publisher.publish(SCAN_PROGRESS, [scanned])


class ResultStore:
    """A handler of scan-results that finds every host of the map.

    Attributes:
        missing: addresses by chunk that it misses, once.
        never: addresses whose hosts it never stores.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._maps: dict[str, str] = {}
        self.missing: dict[str, tuple[str, ...]] = {}
        self.never: set[str] = set()

    async def handle(self, records: Sequence[Record]) -> None:
        for record in records:
            if isinstance(deletion := record.message, DeleteResults):
                await self._publisher.publish(SCAN_DELETIONS, [ResultsDeleted(job_id=deletion.job_id, hosts=4, rows=9)])
            if not isinstance(scanned := record.message, ChunkScanned):
                continue
            addresses = self.missing.pop(scanned.chunk_id, ()) or self._unstored(scanned)
            answer: ChunkStored | ChunkIncomplete
            if addresses:
                answer = ChunkIncomplete(**scanned.token._asdict(), addresses=addresses)
            else:
                outcomes = self._maps.setdefault(scanned.chunk_id, scanned.outcomes)
                answer = ChunkStored(job_id=scanned.job_id, chunk_id=scanned.chunk_id, outcomes=outcomes)
            await self._publisher.publish(SCAN_STORED, [answer])

    def _unstored(self, scanned: ChunkScanned) -> tuple[str, ...]:
        up = (index for index, code in enumerate(scanned.outcomes) if code in {Outcome.ANSWERED, Outcome.SILENT})
        return tuple(sorted({str(address_at(scanned.first_address, index)) for index in up} & self.never))


class _Time(PlatformTime):
    """The database's clock, which follows the simulation's time."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(self._never, lambda: simulation.now)
        self._set(utc_now(), simulation.now)

    def step(self, by: timedelta) -> None:
        self._set(self.now() + by, self.monotonic())

    async def _never(self) -> datetime:
        raise AssertionError("a simulation has no database to ask for its time")


class Simulation:
    """Replicas of the orchestrator on one store and one bus, a worker and a result-store.

    Attributes:
        now: the monotonic clock of all replicas.
        workers: receive every task.
        results: receives every result; None while it is unavailable.
    """

    def __init__(
        self,
        store: Store,
        *,
        replicas: int = 1,
        bus: MemoryBus | None = None,
        lease_seconds: float = 30.0,
        max_workers: int = 2_000,
        rules: TargetRules = RULES,
        scripts: AbstractSet[str] = ADMITTED_SCRIPTS,
        grants: UserGrants | None = None,
        quotas: Quotas | None = None,
        keep: timedelta | None = None,
        deletes_per_second: int = 2_000,
    ) -> None:
        self.now = _NOW
        self.store = store
        self.rules = rules
        self.scripts = scripts
        self.grants = grants
        self.quotas = quotas or Quotas()
        self.keep = keep
        self.deletes_per_second = deletes_per_second
        self._clock = _Time(self)
        self.lease_seconds = lease_seconds
        self.max_workers = max_workers
        self.bus = bus or MemoryBus()
        self.worker = Worker(self.bus)
        self.workers = [self.worker]
        self.results: ResultStore | None = ResultStore(self.bus)
        self._commands = count(1)
        self._read: dict[str, int] = defaultdict(int)
        self.replicas = [self.replica() for _ in range(replicas)]

    def replica(self, store: Store | None = None, publisher: Publisher | None = None) -> Orchestrator:
        """A new process, on doubles if they are given."""
        return Orchestrator(
            store or self.store,
            publisher or self.bus,
            leaderless=self.bus.leaderless,
            rules=self.rules,
            keys=KEYS,
            signer=signer(),
            scripts=self.scripts,
            clock=self._clock,
            lease_seconds=self.lease_seconds,
            stored_seconds=60.0,
            raw_worker_seconds=600.0,
            max_workers=self.max_workers,
            user_grants=self.grants,
            quotas=self.quotas,
            keep=self.keep,
            deletes_per_second=self.deletes_per_second,
        )

    @property
    def time(self) -> datetime:
        """The platform's time."""
        return self._clock.now()

    def step_clock(self, by: timedelta) -> None:
        """Change the platform's clock, and no monotonic one, as a failover to a machine with another time does."""
        self._clock.step(by)

    @property
    def only(self) -> Orchestrator:
        (replica,) = self.replicas
        return replica

    async def start(self) -> None:
        """Assign the partitions to the replicas, as the first rebalance does."""
        for number, replica in enumerate(self.replicas):
            for listener in listeners(replica):
                await listener.revoked(_EVERY_PARTITION)
                await listener.assigned(self._partitions(number))
        await self.catch_up()

    async def restart(self, number: int = 0) -> None:
        """Replace a dead replica by a new process."""
        self.replicas[number] = self.replica()
        await self.start()

    async def catch_up(self) -> None:
        for number, replica in enumerate(self.replicas):
            for listener in listeners(replica):
                await listener.caught_up(self._partitions(number))

    async def wait(self, looks: int, *, seconds: float = 1.0) -> None:
        """Advance the time in steps; in each, workers announce themselves, and all messages are handled."""
        for _ in range(looks):
            self.now += seconds
            for worker in self.workers:
                await worker.announce()
            await self.settle()
            await self.catch_up()
            for replica in self.replicas:
                await replica.reporter.report()
                await replica.accounts.store()
                await replica.sweeper.sweep()
                await replica.deletions.step()
            await self.settle()

    async def settle(self) -> None:
        """Deliver all messages, and those that they cause, until there are none."""
        for _ in range(_STEPS):
            delivered = await self.deliver()
            for replica in self.replicas:
                await replica.reconciler.work()
                await replica.dispatcher.fill()
                await replica.outbox.empty()
            busy = any(replica.reconciler.busy for replica in self.replicas)
            if not delivered and not busy and not self._waiting():
                return
        raise AssertionError("the simulation did not reach a stable state")

    async def deliver(self) -> bool:
        """Deliver the messages sent since the last call; return whether there were any."""
        batches = {topic: self.take(topic) for topic in (*_READ, SCAN_TASKS, SCAN_RESULTS)}
        for topic, records in batches.items():
            await self.hand(topic, records)
        return any(batches.values())

    async def hand(self, topic: Topic, records: Sequence[Record]) -> None:
        """Pass these records to their handlers, in one batch each."""
        if not records:
            return
        if topic is SCAN_TASKS:
            for worker in self.workers:
                await worker.handle(records)
        elif topic is SCAN_RESULTS:
            if self.results:
                await self.results.handle(records)
        else:
            if topic is SCAN_DELETIONS and self.results:
                await self.results.handle(records)
            for number, replica in enumerate(self.replicas):
                mine = [record for record in records if record.partition in self._partitions(number)]
                while mine:
                    mine = list(await replica.handlers[topic].handle(mine) or ())

    def take(self, topic: Topic) -> list[Record]:
        """Return the messages sent to a topic since the last call."""
        raw = self.bus.broker.records(topic.name)
        new = raw[self._read[topic.name] :]
        self._read[topic.name] = len(raw)
        return [Record(decode(topic, r), r.topic, r.partition, r.offset, r.timestamp) for r in new]

    def _waiting(self) -> bool:
        return any(len(self.bus.broker.records(topic.name)) > self._read[topic.name] for topic in (*_READ, SCAN_TASKS))

    def _partitions(self, number: int) -> range:
        return _EVERY_PARTITION[number :: len(self.replicas)]

    # Actions and views of users

    async def add(
        self, *cidrs: str, user_id: int = 7, policy: ScanPolicy | None = None, exclude: tuple[str, ...] = ()
    ) -> tuple[int, list[int]]:
        """Create a policy and subnets; return their ids."""
        now = utc_now()
        (policy_id,) = await self.store.policies.take_ids()
        ids = await self.store.subnets.take_ids(len(cidrs))
        scan = policy or scan_policy()
        common: dict[str, Any] = {"user_id": user_id, "name": "x", "created_at": now, "updated_at": now}
        await self.store.policies.add(Owned(id=policy_id, content=scan, **common))
        for id_, cidr in zip(ids, cidrs, strict=True):
            await self.store.subnets.add(Owned(id=id_, content=ScanTarget(cidr, exclude), **common))
        return policy_id, list(ids)

    async def start_scan(self, *cidrs: str, policy: ScanPolicy | None = None) -> None:
        """Start the replicas, announce the worker, submit a scan, and deliver all messages, so that chunks are dispatched."""
        await self.start()
        await self.worker.announce()
        await self.submit(*cidrs, policy=policy)
        await self.settle()

    async def submit(
        self,
        *cidrs: str,
        user_id: int = 7,
        policy: ScanPolicy | None = None,
        key: str | None = None,
        roles: tuple[str, ...] = (),
    ) -> str:
        """Send a submit for new subnets; return its command id."""
        policy_id, subnet_ids = await self.add(*(cidrs or ("127.9.8.0/30",)), user_id=user_id, policy=policy)
        return await self.send(policy_id, subnet_ids, user_id=user_id, key=key, roles=roles)

    async def send(
        self,
        policy_id: int,
        subnet_ids: Sequence[int],
        *,
        user_id: int = 7,
        key: str | None = None,
        roles: tuple[str, ...] = (),
    ) -> str:
        command = SubmitJobs(
            command_id=f"command-{next(self._commands)}",
            user_id=user_id,
            policy_id=policy_id,
            subnet_ids=tuple(subnet_ids),
            idempotency_key=key,
            roles=roles,
        )
        await self.bus.publish(SCAN_COMMANDS, [command])
        return command.command_id

    async def cancel(self, job_id: int, user_id: int = 7, *, admin: bool = False) -> str:
        command = CancelJob(command_id=f"command-{next(self._commands)}", user_id=user_id, job_id=job_id, admin=admin)
        await self.bus.publish(SCAN_COMMANDS, [command])
        return command.command_id

    def replies(self, command_id: str) -> list[Any]:
        return [each for each in self.bus.messages(SCAN_REPLIES) if getattr(each, "command_id", "") == command_id]

    def accepted(self, command_id: str) -> list[Job]:
        """The jobs of the first reply."""
        jobs: list[Job] = list(self.replies(command_id)[0].jobs)
        return jobs

    def events(self, job_id: int) -> list[JobEvent]:
        """All events of a job as they were published, duplicates too."""
        return [each for each in self.bus.messages(SCAN_EVENTS) if each.job.id == job_id]
