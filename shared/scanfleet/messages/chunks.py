"""The talk about chunks between orchestrator, workers and result-store."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from scanfleet.messages.base import Message
from scanfleet.messages.fields import Address, ChunkId, Id, Number, Positive, Reason, Seconds, WorkerId
from scanfleet.outcomes import MAX_ADDRESSES, OutcomeMap
from scanfleet.policy import MAX_SCRIPTS, ChunkPorts, ScanPolicy, ScriptName

MAX_SLOTS: Final = 256  # of one worker
MAX_EXCLUDED_CHARS: Final = 5 * MAX_ADDRESSES

Technique = Literal["connect", "syn"]


_PROCESS = re.compile(r"-[0-9a-f]{8}$")


def instance_of(worker_id: str) -> str:
    """The worker's instance: its id without the eight digits that each process draws for itself."""
    return _PROCESS.sub("", worker_id)


class WorkerReady(Message):
    """A worker's credit: how many chunks it will run side by side; 0 when it is leaving or cannot start nmap."""

    worker_id: WorkerId
    slots: Annotated[int, Field(ge=0, le=MAX_SLOTS)]
    raw: bool
    """Whether it may send raw packets."""

    @property
    def instance(self) -> str:
        """Survives a restart of the worker's process; the rest of the id does not."""
        return instance_of(self.worker_id)

    @property
    def subject(self) -> str:
        return f"worker/{self.worker_id}"


class ChunkMessage(Message):
    job_id: Id
    chunk_id: ChunkId

    @property
    def subject(self) -> str:
        return f"chunk/{self.chunk_id}"


class _Fenced(ChunkMessage):
    attempt: Positive
    worker_id: WorkerId
    """With `attempt` the chunk's fencing token: only its current holder can change the chunk."""


class Grant(BaseModel):
    """What an attempt covers, signed by the orchestrator; see `scanfleet.grants`. The worker passes it on unchanged."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    user_id: Id
    first_address: Address
    addresses: Annotated[int, Field(ge=1, le=MAX_ADDRESSES)]
    """How many, from `first_address` on."""

    excluded: Annotated[str, Field(pattern=r"^[0-9,-]*$", max_length=MAX_EXCLUDED_CHARS)] = ""
    """Places from 0 of addresses that are not covered, as ranges: "0,4-7"."""

    ports: ChunkPorts
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8}\.[A-Za-z0-9_-]{86}$", max_length=95)]
    """The id of the key, a dot, and the Ed25519 signature of job, chunk, attempt, worker and all of the above (base64url)."""

    @model_validator(mode="after")
    def _within_the_address_space(self) -> Self:
        # Adding to an address raises past the end of its family.
        _ = ip_address(self.first_address) + (self.addresses - 1)
        return self


class ScanChunk(_Fenced):
    """Scan the blanks of `outcomes`."""

    user_id: Id
    first_address: Address
    outcomes: OutcomeMap
    """One letter per address from `first_address` on; what has a letter is not scanned."""

    policy: ScanPolicy
    ports: ChunkPorts
    """The chunk's part of the policy's ports, in the same syntax."""

    lease_seconds: Annotated[Seconds, Field(gt=0)]
    estimate_seconds: Seconds
    failures: Number = 0
    """Attempts that failed; a chunk that has failed shares no nmap."""

    limit: Annotated[int, Field(ge=1, le=MAX_ADDRESSES)] | None = None
    """Scan only the first so many blanks, then release the chunk; without it, all of them."""

    max_rate: Positive | None = None
    """Probes a second of this nmap: its part of the policy's; without it, the policy's."""

    min_rate: Positive | None = None
    """Probes a second of this nmap below which silence must not slow it."""

    grant: Grant | None = None
    """What result-store accepts of this attempt."""

    @model_validator(mode="after")
    def _within_the_address_space(self) -> Self:
        # Adding to an address raises past the end of its family.
        _ = ip_address(self.first_address) + (len(self.outcomes) - 1)
        return self


class StopChunk(_Fenced):
    """Kill this attempt's nmap; the chunk is cancelled or no longer yours."""

    reason: Reason


class ChunkClaimed(_Fenced):
    """The scan has begun."""


class _Mapped(_Fenced):
    outcomes: OutcomeMap
    """The whole map as far as Kafka has acknowledged the hosts in it."""


class ChunkProgressed(_Mapped):
    """Sent each second: the heartbeat that keeps the lease."""


class ChunkReleased(_Mapped):
    """Released undone, through no fault of the chunk."""

    reason: Reason
    slot_seconds: Seconds = 0.0
    too_slow: bool = False
    """An attempt on several addresses ran out of its time: the next one should get half as many."""


class ChunkScanned(_Mapped):
    """Every address has a letter. Sent first to scan-results, then to scan-progress."""

    first_address: Address
    """The address of the map's first letter (as in ScanChunk): result-store knows the chunk by nothing else."""

    slot_seconds: Seconds
    technique: Technique
    reason: Reason = ""
    """Why addresses were refused, if any were."""

    grant: Grant | None = None
    """As in the ScanChunk; without it, result-store drops the message."""

    nmap: Annotated[str, Field(max_length=64)] = ""
    """The version of the nmap that scanned; empty when there was nothing to scan."""

    scripts: Annotated[tuple[ScriptName, ...], Field(max_length=2 * MAX_SCRIPTS), FailFast()] = ()
    """The NSE scripts that it had to run where they apply: the policy's, and those of service detection."""


class ChunkFailed(_Mapped):
    """nmap failed; what it found before counts. Counts against the chunk."""

    reason: Reason
    slot_seconds: Seconds = 0.0


class ChunkStored(ChunkMessage):
    """Every host that the map calls answered, silent or timed out is readable; a fact, true for every attempt."""

    outcomes: OutcomeMap


class ChunkIncomplete(_Fenced):
    """These addresses have a letter but no stored host: they are blank again."""

    addresses: Annotated[tuple[Address, ...], Field(max_length=MAX_ADDRESSES), FailFast()]
