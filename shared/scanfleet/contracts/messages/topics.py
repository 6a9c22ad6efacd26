"""The topic registry: messages, key, retention, producers and consumers of every topic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Generic

from typing_extensions import TypeVar  # with defaults, which Python has from 3.13 on

from scanfleet.contracts.messages.audit import Audited, OperatorActed
from scanfleet.contracts.messages.base import Message
from scanfleet.contracts.messages.chunks import (
    ChunkClaimed,
    ChunkFailed,
    ChunkIncomplete,
    ChunkProgressed,
    ChunkReleased,
    ChunkScanned,
    ChunkStored,
    ScanChunk,
    StopChunk,
    WorkerReady,
)
from scanfleet.contracts.messages.commands import CancelJob, CommandAccepted, CommandRejected, CommandReply, SubmitJobs
from scanfleet.contracts.messages.deletions import DeleteResults, JobDeleted, ResultsDeleted
from scanfleet.contracts.messages.jobs import (
    JobCancelled,
    JobCompleted,
    JobCreated,
    JobEvent,
    JobFailed,
    JobProgressed,
    JobStarted,
)
from scanfleet.contracts.messages.results import HostScanned
from scanfleet.services import GATEWAY, ORCHESTRATOR, RESULT_STORE, SERVICES, WORKER

OPERATOR: Final = "operator"
"""The user of the bus's administrators, not a service; may write to any topic."""

PARTITIONS: Final = 12  # divides evenly among 1, 2, 3, 4, 6 or 12 replicas; never changes
MIB: Final = 1024 * 1024


M_co = TypeVar("M_co", bound=Message, covariant=True, default=Message)
"""The messages of a topic: a class or a union of classes. `Topic` alone is a topic of any messages."""


@dataclass(frozen=True, slots=True)
class Topic(Generic[M_co]):
    """One topic; the broker keeps records for `retention`, and at most `retention_bytes` per partition."""

    name: str
    key: str
    messages: tuple[type[M_co], ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    retention: timedelta
    public: bool = False
    partitions: int = PARTITIONS
    retention_bytes: int = 256 * MIB

    def key_of(self, message: Message) -> str:
        """Return the record key; records with the same key stay in order."""
        return _KEYS[self.key](message)

    def partition_of(self, key: str) -> int:
        """Return the partition of this key."""
        return (_murmur2(key.encode()) & 0x7FFF_FFFF) % self.partitions

    @property
    def dead_letter(self) -> str:
        return f"{self.name}-dlq"


def _murmur2(data: bytes) -> int:
    """Return the hash by which Kafka's clients choose a partition: MurmurHash2 of Austin Appleby (seed 0x9747b28c)."""
    multiplier, mask = 0x5BD1_E995, 0xFFFF_FFFF
    hashed = 0x9747_B28C ^ len(data)
    whole = len(data) & ~3
    for start in range(0, whole, 4):
        word = int.from_bytes(data[start : start + 4], "little") * multiplier & mask
        word = (word ^ word >> 24) * multiplier & mask
        hashed = hashed * multiplier & mask ^ word
    if rest := data[whole:]:
        hashed = (hashed ^ int.from_bytes(rest, "little")) * multiplier & mask
    hashed = (hashed ^ hashed >> 13) * multiplier & mask
    return hashed ^ hashed >> 15


# Every message of a topic has the attribute that the key needs; the registry's test verifies it.
_KEYS: Final[dict[str, Callable[[Any], str]]] = {
    "command id": lambda m: m.command_id,
    "worker id": lambda m: m.worker_id,
    "worker instance": lambda m: m.instance,
    "job id": lambda m: str(m.job_id),
    "event's job id": lambda m: str(m.job.id),
    "entry's id": lambda m: m.entry.id,
}

DEAD_LETTER_RETENTION: Final = timedelta(days=14)  # an operator may be absent for a week
DEAD_LETTER_RETENTION_BYTES: Final = 256 * MIB

SCAN_COMMANDS: Final[Topic[SubmitJobs | CancelJob]] = Topic(
    name="scan-commands",
    key="command id",
    messages=(SubmitJobs, CancelJob),
    producers=(GATEWAY,),
    consumers=(ORCHESTRATOR,),
    retention=timedelta(days=1),
)
SCAN_REPLIES: Final[Topic[CommandReply]] = Topic(
    name="scan-replies",
    key="command id",
    messages=(CommandAccepted, CommandRejected),
    producers=(ORCHESTRATOR,),
    consumers=(GATEWAY,),
    retention=timedelta(hours=1),
)
SCAN_WORKERS: Final[Topic[WorkerReady]] = Topic(
    name="scan-workers",
    key="worker instance",  # the same for a restarted worker, whose messages show that the previous process has ended
    messages=(WorkerReady,),
    producers=(WORKER,),
    consumers=(ORCHESTRATOR,),
    retention=timedelta(hours=1),
)
SCAN_TASKS: Final[Topic[ScanChunk | StopChunk]] = Topic(
    name="scan-tasks",
    key="worker id",
    messages=(ScanChunk, StopChunk),
    producers=(ORCHESTRATOR,),
    consumers=(WORKER,),
    retention=timedelta(hours=1),
)
SCAN_PROGRESS: Final[Topic[ChunkClaimed | ChunkProgressed | ChunkReleased | ChunkScanned | ChunkFailed]] = Topic(
    name="scan-progress",
    key="job id",
    messages=(ChunkClaimed, ChunkProgressed, ChunkReleased, ChunkScanned, ChunkFailed),
    producers=(WORKER,),
    consumers=(ORCHESTRATOR,),
    retention=timedelta(days=1),
    retention_bytes=1024 * MIB,
)
SCAN_RESULTS: Final[Topic[HostScanned | ChunkScanned]] = Topic(
    name="scan-results",
    key="job id",
    messages=(HostScanned, ChunkScanned),
    # The orchestrator resends a ChunkScanned without an answer.
    producers=(WORKER, ORCHESTRATOR),
    consumers=(RESULT_STORE,),
    retention=timedelta(days=7),
    public=True,
    retention_bytes=2048 * MIB,  # 25 million hosts of 1 kB; the alert of result-store's lag fires much earlier
)
SCAN_STORED: Final[Topic[ChunkStored | ChunkIncomplete]] = Topic(
    name="scan-stored",
    key="job id",
    messages=(ChunkStored, ChunkIncomplete),
    producers=(RESULT_STORE,),
    consumers=(ORCHESTRATOR,),
    retention=timedelta(days=1),
)
SCAN_EVENTS: Final[Topic[JobEvent]] = Topic(
    name="scan-events",
    key="event's job id",
    messages=(JobCreated, JobStarted, JobProgressed, JobCompleted, JobFailed, JobCancelled),
    producers=(ORCHESTRATOR,),
    consumers=(GATEWAY, ORCHESTRATOR),  # the orchestrator reads its own events after a restore of its database
    retention=timedelta(days=7),
    public=True,
    retention_bytes=512 * MIB,
)
SCAN_DELETIONS: Final[Topic[DeleteResults | ResultsDeleted]] = Topic(
    name="scan-deletions",
    key="job id",
    messages=(DeleteResults, ResultsDeleted),
    producers=(ORCHESTRATOR, RESULT_STORE),
    consumers=(
        ORCHESTRATOR,
        RESULT_STORE,
    ),  # each reads the other's messages, and its own after a restore of its database
    retention=timedelta(days=30),  # messages with ids only; an older backup restores deleted jobs
    retention_bytes=64 * MIB,
)
SCAN_CHANGES: Final[Topic[JobDeleted]] = Topic(
    name="scan-changes",
    key="job id",
    messages=(JobDeleted,),
    producers=(ORCHESTRATOR,),
    consumers=(),
    retention=timedelta(days=7),
    public=True,
    retention_bytes=32 * MIB,  # about a million deletions in all partitions
)


def _audit(
    service: str, *messages: type[Audited | OperatorActed], retention_bytes: int = 1024 * MIB
) -> Topic[Audited | OperatorActed]:
    return Topic(
        name=f"scan-audit-{service}",
        key="entry's id",
        messages=messages,
        producers=(service,),
        consumers=(ORCHESTRATOR,),
        retention=timedelta(days=7),  # longer than any outage of the orchestrator
        retention_bytes=retention_bytes,
        partitions=1,  # a few hundred a minute at most, by the limits in `scanfleet.security.audit`
    )


SCAN_AUDIT: Final = {service: _audit(service, Audited) for service in SERVICES} | {
    # Its restore command runs while the orchestrator, which records its own in the database, is stopped.
    RESULT_STORE: _audit(RESULT_STORE, Audited, OperatorActed),
}
"""Topics by service; only that service may write to its topic, so the topic identifies the service of an entry."""

SCAN_AUDIT_OPERATOR: Final = _audit(
    OPERATOR, OperatorActed, retention_bytes=64 * MIB
)  # an entry of an operator's command has a few hundred bytes
"""Commands of the bus's administrators. No service may write to it."""

TOPICS: Final[tuple[Topic, ...]] = (
    SCAN_COMMANDS,
    SCAN_REPLIES,
    SCAN_WORKERS,
    SCAN_TASKS,
    SCAN_PROGRESS,
    SCAN_RESULTS,
    SCAN_STORED,
    SCAN_EVENTS,
    SCAN_DELETIONS,
    SCAN_CHANGES,
    *SCAN_AUDIT.values(),
    SCAN_AUDIT_OPERATOR,
)
