"""Decide which hosts are results, as a function of the log alone.

The decision does not depend on which replica reads the log, how it is cut into batches, or how often it is read. Of several
hosts with the same chunk and address, the first in the log is stored. A chunk is closed by the first ChunkScanned for which
every host that its map claims precedes it in the log. From then on this map decides which hosts are results, so later
messages from a superseded worker or a slow replica add nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, auto
from heapq import merge
from typing import Final, NamedTuple

from scanfleet.contracts.messages import ChunkIncomplete, ChunkScanned, ChunkStored, HostScanned, PortFound
from scanfleet.contracts.rest import Result
from scanfleet.runtime.bus import Record
from scanfleet.scanning.outcomes import Outcome, address_at, address_key, index_of
from scanfleet.scanning.ports import PortSet, Range, overlap, parse_ranges, port_count, ranges_text

Scanned = HostScanned | ChunkScanned

WITH_HOST: Final = frozenset({Outcome.ANSWERED, Outcome.SILENT, Outcome.TIMED_OUT})
"""The outcome codes that claim a stored host."""

NEVER_PROBED: Final = frozenset({Outcome.EXCLUDED, Outcome.REFUSED})
"""The outcome codes that no host can change: no packet was sent to these addresses."""


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a record in its partition of the log."""

    created_at: datetime
    offset: int

    def precedes(self, other: Place) -> bool:
        # Offsets restart at 0 when a broker has lost its data, and brokers' clocks may differ: neither alone is reliable.
        return self.offset < other.offset or self.created_at < other.created_at


@dataclass(frozen=True, slots=True)
class Host:
    scanned: HostScanned
    place: Place

    @property
    def found(self) -> bool:
        """Whether the host has answered or has results, so that it is listed as a host."""
        return self.scanned.outcome == Outcome.ANSWERED.value or self.result_count > 0

    @property
    def key(self) -> str:
        """Sorts the hosts of a job by address, and those of one address by the number of their chunk."""
        return key_of(self.scanned.address, self.scanned.chunk_id)

    @property
    def result_count(self) -> int:
        """Number of results of this host, and therefore of ids that it needs."""
        return len(self.scanned.ports) + port_count(self._silent)

    def results(self, first_id: int) -> Iterator[Result]:
        """Yield the host's results in port order, numbered from `first_id`."""
        listed = sorted(self.scanned.ports, key=_order)
        for result_id, found in enumerate(merge(listed, self._open_filtered(), key=_order), first_id):
            yield Result(
                id=result_id,
                job_id=self.scanned.job_id,
                ip_address=self.scanned.address,
                port=found.port,
                protocol=found.protocol,
                service=found.service,
                version=found.version,
                os_info=found.os_info,
                status=found.status,
                banner=found.banner,
                raw_data=found.raw_data,
                created_at=self.place.created_at,
                updated_at=self.place.created_at,
            )

    @property
    def _silent(self) -> tuple[Range, ...]:
        return parse_ranges(self.scanned.open_filtered)

    def _open_filtered(self) -> Iterator[PortFound]:
        """Expand the port ranges of the host one port at a time."""
        for first, last in self._silent:
            for number in range(first, last + 1):
                yield PortFound(port=number, protocol="udp", status="open|filtered")


class Parts(Enum):
    """The fields of a stored host that a reader needs; large texts that it does not need are not read."""

    SUMMARY = auto()
    """All but the banners and `raw_data` of ports, and the `element` of the host."""

    DETAILS = auto()
    """All but the listed ports."""

    PORTS = auto()
    """The ports with all their texts, and the `element` of the host, which has those that are not open."""


def _order(found: PortFound) -> tuple[int, str]:
    return found.port, found.protocol


def key_of(address: str, chunk_id: str) -> str:
    """Return the sort key of an address of a chunk: `<address_key>/<chunk>`, in numerical order of a job's chunks."""
    # The chunk ids of a job have one prefix, so their order is that of their lengths, then of their texts.
    return f"{address_key(address)}/{len(chunk_id):02}{chunk_id}"


@dataclass(frozen=True, slots=True)
class ClosedChunk:
    """A chunk whose results are complete; `outcomes` is its final outcome map.

    The other fields are empty for a chunk that release 0.1 has closed.
    """

    job_id: int
    chunk_id: str
    first_address: str
    outcomes: str
    user_id: int | None = None
    technique: str = ""
    """Of its TCP ports; empty if it has none, or if `nmap` is empty."""

    nmap: str = ""
    """The version of nmap; empty if no address was scanned, or if it is unknown what was probed."""

    ports: str = ""
    """The ports that were probed, by number, in canonical form as in a policy.

    Empty if they are unknown: `nmap` is empty, or the numbers of a `top` set were not reported.
    """

    arguments: str = ""
    """The SHA-256 of nmap's arguments without the targets; empty if `nmap` is."""

    detection: str = ""
    """As in ChunkScanned; unknown if `nmap` is empty."""

    discovery: str = ""
    at: datetime | None = None
    """When the broker received the report that closed it."""

    @property
    def key(self) -> str:
        """Sorts the chunks of a job by first address, and those of one address by number."""
        return key_of(self.first_address, self.chunk_id)

    def counts(self, address: str) -> bool:
        """Return whether the chunk's host at this address is a result."""
        index = _index(self.first_address, address)
        return 0 <= index < len(self.outcomes) and self.outcomes[index] in WITH_HOST

    def announcement(self, scanned: ChunkScanned) -> ChunkStored:
        """Build the reply to any ChunkScanned of this chunk."""
        return ChunkStored(
            traceparent=scanned.traceparent,
            job_id=self.job_id,
            chunk_id=self.chunk_id,
            outcomes=self.outcomes,
        )


@dataclass(frozen=True, slots=True)
class StoredHost:
    """The fields of a stored host that `close` needs."""

    address: str
    outcome: Outcome
    place: Place


class Removed(NamedTuple):
    """Numbers of documents that were deleted at once."""

    hosts: int
    chunks: int
    """Closed chunks."""

    port_sets: int = 0
    """Long lists of ports, which closed chunks share."""


@dataclass(frozen=True, slots=True)
class Erased:
    """Numbers of deleted documents and results of a job."""

    hosts: int = 0
    rows: int = 0
    """Results."""


Report = tuple[ChunkScanned, Place]


@dataclass(slots=True)
class Batch:
    """A batch of scan-results, deduplicated by host."""

    hosts: dict[str, Host] = field(default_factory=dict)
    """By event id; the first one in the log."""

    scanned: list[Report] = field(default_factory=list)
    """In log order within each chunk."""

    @property
    def messages(self) -> Iterator[Scanned]:
        yield from (host.scanned for host in self.hosts.values())
        yield from (chunk for chunk, _ in self.scanned)

    @property
    def chunk_ids(self) -> set[str]:
        return {host.scanned.chunk_id for host in self.hosts.values()} | {chunk.chunk_id for chunk, _ in self.scanned}


def fault_of(message: Scanned) -> str:
    """Return why the ports of a message are invalid; empty if they are valid."""
    try:
        if isinstance(message, ChunkScanned):
            parse_ranges(message.common_ports)
            return ""
        silent = parse_ranges(message.open_filtered)
    except ValueError as error:
        return str(error)
    listed: set[tuple[str, int]] = set()
    for found in message.ports:
        port = (found.protocol, found.port)
        if port in listed or (found.protocol == "udp" and overlap(silent, ((found.port, found.port),))):
            return f"it has the {found.protocol.upper()} port {found.port} twice"
        listed.add(port)
    return ""


def fold(records: Iterable[Record[Scanned]]) -> Batch:
    """Collect the hosts and ChunkScanned messages of some records, which have no fault, into a batch."""
    batch = Batch()
    for record in records:
        place = Place(record.timestamp, record.offset)
        match record.message:
            case HostScanned() as host:
                batch.hosts.setdefault(host.event_id, Host(host, place))
            case ChunkScanned() as chunk:
                batch.scanned.append((chunk, place))
    return batch


def parts(reports: Iterable[Report], addresses: int) -> Iterator[list[Report]]:
    """Divide these reports into parts of chunks with at most so many addresses together; those of one chunk stay together."""
    by_chunk: defaultdict[str, list[Report]] = defaultdict(list)
    for scanned, place in reports:
        by_chunk[scanned.chunk_id].append((scanned, place))
    part: list[Report] = []
    size = 0
    for of_chunk in by_chunk.values():
        length = len(of_chunk[0][0].outcomes)
        if part and size + length > addresses:
            yield part
            part, size = [], 0
        part += of_chunk
        size += length
    if part:
        yield part


def close(scanned: ChunkScanned, place: Place, stored: Iterable[StoredHost]) -> ClosedChunk | ChunkIncomplete:
    """Close the chunk if no code of its map is blank and each that claims a host has one in `stored` before `place`.

    The outcome of such a host overrides the code in the map: an earlier attempt may have reported the host.
    """
    letters = list(scanned.outcomes)
    held = set[int]()
    for host in stored:
        index = _index(scanned.first_address, host.address)
        if host.place.precedes(place) and 0 <= index < len(letters) and letters[index] not in NEVER_PROBED:
            letters[index] = host.outcome
            held.add(index)
    missing = [
        index
        for index, letter in enumerate(letters)
        if letter == Outcome.BLANK or (letter in WITH_HOST and index not in held)
    ]
    if missing:
        return ChunkIncomplete(
            traceparent=scanned.traceparent,
            job_id=scanned.job_id,
            chunk_id=scanned.chunk_id,
            attempt=scanned.attempt,
            worker_id=scanned.worker_id,
            addresses=tuple(str(address_at(scanned.first_address, index)) for index in missing),
        )
    return ClosedChunk(
        job_id=scanned.job_id,
        chunk_id=scanned.chunk_id,
        first_address=scanned.first_address,
        outcomes="".join(letters),
        user_id=scanned.grant.user_id if scanned.grant else None,
        technique=_technique(scanned),
        nmap=scanned.nmap,
        ports=_probed(scanned),
        arguments=scanned.arguments,
        detection=scanned.detection,
        discovery=scanned.discovery,
        at=place.created_at,
    )


def _technique(scanned: ChunkScanned) -> str:
    """Return the technique of the TCP ports; empty if there are none, or if it is unknown."""
    udp = scanned.grant is not None and scanned.grant.ports.startswith("U:")
    return scanned.technique if scanned.nmap and not udp else ""


def _probed(scanned: ChunkScanned) -> str:
    """Return the ports that were probed, by number; empty if they are unknown."""
    if scanned.grant is None or not scanned.nmap:
        return ""
    ports = PortSet.parse(scanned.grant.ports)
    return ranges_text(parse_ranges(scanned.common_ports)) if ports.top else str(ports)


def _index(first: str, address: str) -> int:
    try:
        return index_of(first, address)
    except ValueError:  # the other address family: not in this chunk's map
        return -1
