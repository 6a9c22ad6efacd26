"""Messages about chunks between orchestrator, workers and result-store."""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from scanfleet.contracts.messages.base import Message
from scanfleet.contracts.messages.fields import Address, ChunkId, Id, Number, Positive, Reason, Seconds, Word, WorkerId
from scanfleet.scanning.outcomes import MAX_ADDRESSES, OutcomeMap
from scanfleet.scanning.policy import MAX_SCRIPT_CHARS, MAX_SCRIPTS, ChunkPorts, ScanPolicy, ScriptName
from scanfleet.scanning.ports import MAX_RANGES_TEXT

MAX_SLOTS: Final = 256  # per worker
MAX_EXCLUDED_CHARS: Final = 5 * MAX_ADDRESSES

MAX_DETECTION_CHARS: Final = MAX_SCRIPTS * (MAX_SCRIPT_CHARS + 1) + 8

Technique = Literal["connect", "syn"]
Version = Annotated[str, Field(max_length=64)]
Digest = Annotated[str, Field(pattern=r"^(?:[0-9a-f]{64})?$", max_length=64)]
"""A SHA-256 in hexadecimal digits; empty if it is unknown."""


_PROCESS = re.compile(r"-[0-9a-f]{8}$")


def instance_of(worker_id: str) -> str:
    """Return the worker's instance: its id without the eight random digits of each process."""
    return _PROCESS.sub("", worker_id)


class WorkerReady(Message):
    """A worker's credit: the number of chunks it runs in parallel; 0 when shutting down or unable to start nmap."""

    worker_id: WorkerId
    slots: Annotated[int, Field(ge=0, le=MAX_SLOTS)]
    raw: bool
    """Whether the worker can send raw packets."""

    @property
    def instance(self) -> str:
        """Stable across restarts of the worker's process, unlike the rest of the id."""
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


class FencingToken(NamedTuple):
    """Identifies an attempt: a message counts only while its token is the chunk's current one."""

    job_id: int
    chunk_id: str
    attempt: int
    worker_id: str


class _Fenced(ChunkMessage):
    attempt: Positive
    worker_id: WorkerId
    """Together with `attempt` the chunk's fencing token: only its current holder can change the chunk."""

    @property
    def token(self) -> FencingToken:
        return FencingToken(self.job_id, self.chunk_id, self.attempt, self.worker_id)


class Grant(BaseModel):
    """The signed scope of an attempt, which the worker forwards unchanged; see `scanfleet.security.chunk_grants`."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    user_id: Id
    first_address: Address
    addresses: Annotated[int, Field(ge=1, le=MAX_ADDRESSES)]
    """Number of addresses from `first_address` on."""

    excluded: Annotated[str, Field(pattern=r"^[0-9,-]*$", max_length=MAX_EXCLUDED_CHARS)] = ""
    """Positions, from 0, of addresses that are not covered, as ranges: "0,4-7"."""

    ports: ChunkPorts
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8}\.[A-Za-z0-9_-]{86}$", max_length=95)]
    """Key id, a dot, and the Ed25519 signature of job, chunk, attempt, worker and all of the above (base64url)."""

    @model_validator(mode="after")
    def _within_the_address_space(self) -> Self:
        # Adding to an address raises beyond the end of its family.
        _ = ip_address(self.first_address) + (self.addresses - 1)
        return self


class ScanChunk(_Fenced):
    """Scan the addresses that are blank in `outcomes`."""

    user_id: Id
    first_address: Address
    outcomes: OutcomeMap
    """One outcome code per address from `first_address` on; only blank addresses are scanned."""

    policy: ScanPolicy
    ports: ChunkPorts
    """The chunk's part of the policy's ports, in the same syntax."""

    lease_seconds: Annotated[Seconds, Field(gt=0)]
    estimate_seconds: Seconds
    failures: Number = 0
    """Number of failed attempts; a chunk with failed attempts does not share an nmap."""

    limit: Annotated[int, Field(ge=1, le=MAX_ADDRESSES)] | None = None
    """Scan only this many blank addresses, then release the chunk; without it, all of them."""

    max_rate: Positive | None = None
    """Maximum probes per second of this nmap: its share of the policy's; without it, the policy's."""

    min_rate: Positive | None = None
    """Minimum probes per second of this nmap, even when targets do not answer."""

    grant: Grant | None = None
    """The scope that result-store accepts from this attempt."""

    granted_by: Word = ""
    """The user grant that the job was accepted under; empty if there were none."""

    stop_after_seconds: Seconds | None = None
    """Seconds from now until nmap must have stopped; null when nothing limits it."""

    @model_validator(mode="after")
    def _within_the_address_space(self) -> Self:
        # Adding to an address raises beyond the end of its family.
        _ = ip_address(self.first_address) + (len(self.outcomes) - 1)
        return self


class StopChunk(_Fenced):
    """Kill this attempt's nmap; the chunk is cancelled, reassigned or complete."""

    reason: Reason


class Run(BaseModel):
    """How the nmap of an attempt ran, as its worker reports it."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    nmap: Version = ""
    """The version of nmap."""

    arguments: Digest = ""
    """SHA-256 of nmap's arguments without the targets, separated by NUL."""

    source: Address | None = None
    """The worker's address from which packets to the chunk's first address are sent; null without a route."""

    egress: Address | None = None
    """The address that targets see instead, if packets pass a NAT and the operator has configured it."""

    rules: Digest = ""
    """SHA-256 of the worker's target rules."""

    began: Seconds | None = None
    """Seconds from the start of nmap to this message."""


class _Probed(_Fenced):
    """What the attempt probes. All of it is unknown if nmap was not started."""

    technique: Technique | None = None
    """Null if it is unknown."""

    scripts: Annotated[tuple[ScriptName, ...], Field(max_length=2 * MAX_SCRIPTS), FailFast()] = ()
    """The NSE scripts that were enabled: the policy's, and those of service detection."""

    common_ports: Annotated[str, Field(max_length=MAX_RANGES_TEXT)] = ""
    """The TCP ports of a `top` set by number, as ranges; empty for another set."""

    detection: Annotated[str, Field(max_length=MAX_DETECTION_CHARS)] = ""
    """The detection that ran: `sV7` with the version intensity, `O` for operating systems, and the policy's scripts.

    Separated by slashes, the scripts by commas, as in `sV7/O/banner,ssl-cert`; empty if none ran.
    """

    discovery: Word = ""
    """The host discovery of the policy."""

    run: Run | None = None
    """Null if nmap was not started."""


class ChunkClaimed(_Probed):
    """The scan has begun."""


class _Mapped(_Fenced):
    outcomes: OutcomeMap
    """The whole map, with only the hosts that Kafka has acknowledged."""


class ChunkProgressed(_Mapped):
    """Sent every second: the heartbeat that renews the lease."""


class ChunkReleased(_Mapped, _Probed):
    """The chunk is released unfinished, for a reason unrelated to the chunk."""

    reason: Reason
    slot_seconds: Seconds = 0.0
    too_slow: bool = False
    """An attempt on several addresses timed out: the next one should get half as many."""

    unacknowledged: bool = False
    """Kafka did not acknowledge the attempt's hosts or heartbeats in time: an outage, whatever the number of such attempts."""


class ChunkScanned(_Mapped, _Probed):
    """Every address has an outcome. Sent first to scan-results, then to scan-progress."""

    first_address: Address
    """The address at position 0 of the map (as in ScanChunk): result-store has no other information about the chunk."""

    slot_seconds: Seconds
    technique: Technique
    """Has no meaning if `nmap` is empty."""

    reason: Reason = ""
    """Why addresses were refused, if any were."""

    grant: Grant | None = None
    """The grant of the ScanChunk; without it, result-store drops the message."""

    nmap: Version = ""
    """The version of nmap; empty when there was nothing to scan, and if it is unknown what was probed."""

    arguments: Digest = ""
    """SHA-256 of nmap's arguments without the targets, separated by NUL; empty if `nmap` is."""

    @property
    def event_id(self) -> str:
        """The same for every copy of an attempt's report."""
        return f"{self.chunk_id}/{self.attempt}"


class ChunkFailed(_Mapped, _Probed):
    """nmap failed; its earlier results are kept. Counts as a failed attempt of the chunk."""

    reason: Reason
    slot_seconds: Seconds = 0.0
    no_route: bool = False
    """The worker has no route to blank addresses, which nmap skipped or got no answer from: another worker may have one."""


class ChunkStored(ChunkMessage):
    """Every host that is answered, silent or timed out in the map is readable; valid for every attempt."""

    outcomes: OutcomeMap


class ChunkIncomplete(_Fenced):
    """These addresses have an outcome but no stored host: they become blank again."""

    addresses: Annotated[tuple[Address, ...], Field(max_length=MAX_ADDRESSES), FailFast()]
