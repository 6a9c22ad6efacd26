"""The talk about chunks between orchestrator, workers and result-store."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from scanfleet.messages.base import Message
from scanfleet.outcomes import OutcomeMap
from scanfleet.policy import MAX_SCRIPTS, ChunkPorts, ScanPolicy, ScriptName

Address = Annotated[str, AfterValidator(lambda text: str(ip_address(text)))]
Technique = Literal["connect", "syn"]


_PROCESS = re.compile(r"-[0-9a-f]{8}$")


def instance_of(worker_id: str) -> str:
    """The worker's instance: its id without the eight digits that each process draws for itself."""
    return _PROCESS.sub("", worker_id)


class WorkerReady(Message):
    """A worker's credit: how many chunks it will run side by side; 0 when it is leaving or cannot start nmap."""

    worker_id: str
    slots: Annotated[int, Field(ge=0)]
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
    job_id: int
    chunk_id: str

    @property
    def subject(self) -> str:
        return f"chunk/{self.chunk_id}"


class _Fenced(ChunkMessage):
    attempt: Annotated[int, Field(ge=1)]
    worker_id: str
    """With `attempt` the chunk's fencing token: only its current holder can change the chunk."""


class ScanChunk(_Fenced):
    """Scan the blanks of `outcomes`."""

    user_id: int
    first_address: Address
    outcomes: OutcomeMap
    """One letter per address from `first_address` on; what has a letter is not scanned."""

    policy: ScanPolicy
    ports: ChunkPorts
    """The chunk's part of the policy's ports, in the same syntax."""

    lease_seconds: Annotated[float, Field(gt=0)]
    estimate_seconds: Annotated[float, Field(ge=0)]
    failures: Annotated[int, Field(ge=0)] = 0
    """Attempts that failed; a chunk that has failed shares no nmap."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Scan only the first so many blanks, then release the chunk; without it, all of them."""

    max_rate: Annotated[int, Field(ge=1)] | None = None
    """Packets a second of this nmap: its part of the policy's; without it, the policy's."""

    min_rate: Annotated[int, Field(ge=1)] | None = None
    """Probes a second of this nmap below which silence must not slow it."""

    @model_validator(mode="after")
    def _within_the_address_space(self) -> Self:
        # Adding to an address raises past the end of its family.
        _ = ip_address(self.first_address) + (len(self.outcomes) - 1)
        return self


class StopChunk(_Fenced):
    """Kill this attempt's nmap; the chunk is cancelled or no longer yours."""

    reason: str


class ChunkClaimed(_Fenced):
    """The scan has begun."""


class _Mapped(_Fenced):
    outcomes: OutcomeMap
    """The whole map as far as Kafka has acknowledged the hosts in it."""


class ChunkProgressed(_Mapped):
    """Sent each second: the heartbeat that keeps the lease."""


class ChunkReleased(_Mapped):
    """Released undone, through no fault of the chunk."""

    reason: str
    slot_seconds: Annotated[float, Field(ge=0)] = 0.0
    too_slow: bool = False
    """An attempt on several addresses ran out of its time: the next one should get half as many."""


class ChunkScanned(_Mapped):
    """Every address has a letter. Sent first to scan-results, then to scan-progress."""

    first_address: str
    """The address of the map's first letter (as in ScanChunk): result-store knows the chunk by nothing else."""

    slot_seconds: Annotated[float, Field(ge=0)]
    technique: Technique
    reason: str = ""
    """Why addresses were refused, if any were."""

    nmap: Annotated[str, Field(max_length=64)] = ""
    """The version of the nmap that scanned; empty when there was nothing to scan."""

    scripts: Annotated[tuple[ScriptName, ...], Field(max_length=2 * MAX_SCRIPTS)] = ()
    """The NSE scripts that it had to run where they apply: the policy's, and those of service detection."""


class ChunkFailed(_Mapped):
    """nmap failed; what it found before counts. Counts against the chunk."""

    reason: str
    slot_seconds: Annotated[float, Field(ge=0)] = 0.0


class ChunkStored(ChunkMessage):
    """Every host that the map calls answered, silent or timed out is readable; a fact, true for every attempt."""

    outcomes: OutcomeMap


class ChunkIncomplete(_Fenced):
    """These addresses have a letter but no stored host: they are blank again."""

    addresses: tuple[str, ...]
