"""What counts as a result: the first host in the log, until its chunk is closed.

A chunk is closed by a ChunkScanned whose every stored letter has its host; from then on its map says which of its hosts
are results, and nothing that comes later, from whomever, changes that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Final, TypedDict

from scanfleet.bus import Record
from scanfleet.errors import MessageError
from scanfleet.messages import ChunkIncomplete, ChunkScanned, ChunkStored, HostScanned
from scanfleet.outcomes import Outcome, address_at, index_of

WITH_HOST: Final = frozenset({Outcome.ANSWERED, Outcome.SILENT, Outcome.TIMED_OUT})
"""The letters that claim a stored host."""

NEVER_PROBED: Final = frozenset({Outcome.EXCLUDED, Outcome.REFUSED})
"""The letters that no host can change: nothing was sent to these addresses."""


class Result(TypedDict):
    """One port as the public API shows it; times are RFC 3339 in UTC."""

    id: int
    job_id: int
    ip_address: str
    port: int
    protocol: str
    service: str
    version: str
    os_info: str
    status: str
    banner: str
    raw_data: str
    created_at: str
    updated_at: str


@dataclass(frozen=True, slots=True)
class Host:
    """A host, and where it stands in the log."""

    scanned: HostScanned
    created_at: datetime
    offset: int

    def results(self, first_id: int) -> list[Result]:
        """Its results in port order, numbered from `first_id`."""
        created_at = self.created_at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return [
            Result(
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
                created_at=created_at,
                updated_at=created_at,
            )
            for result_id, found in enumerate(
                sorted(self.scanned.ports, key=lambda each: (each.port, each.protocol)),
                first_id,
            )
        ]


@dataclass(frozen=True, slots=True)
class ClosedChunk:
    """A chunk whose results are complete; `outcomes` is its final map."""

    job_id: int
    chunk_id: str
    first_address: str
    outcomes: str

    def counts(self, address: str) -> bool:
        """Whether the chunk's host of this address is a result."""
        index = _index(self.first_address, address)
        return 0 <= index < len(self.outcomes) and self.outcomes[index] in WITH_HOST

    def announcement(self, scanned: ChunkScanned) -> ChunkStored:
        """The answer to any ChunkScanned of this chunk."""
        return ChunkStored(
            traceparent=scanned.traceparent,
            job_id=self.job_id,
            chunk_id=self.chunk_id,
            outcomes=self.outcomes,
        )


@dataclass(slots=True)
class Round:
    """A part of a batch in which every host precedes the ChunkScanned of its chunk."""

    hosts: list[Host] = field(default_factory=list)
    scanned: list[ChunkScanned] = field(default_factory=list)

    @property
    def chunk_ids(self) -> set[str]:
        return {host.scanned.chunk_id for host in self.hosts} | {each.chunk_id for each in self.scanned}


def rounds(records: Sequence[Record]) -> list[Round]:
    """Fold a batch into the fewest rounds that keep each chunk's order; most batches make one.

    Raises:
        MessageError: a message names an address that is none; nothing of the batch was done.
    """
    found: list[Round] = []
    next_round: dict[str, int] = {}
    for record in records:
        message = record.message
        if not isinstance(message, HostScanned | ChunkScanned):
            raise MessageError(f"{message.type_name()} does not belong on this topic")
        number = next_round.get(message.chunk_id, 0)
        if number == len(found):
            found.append(Round())
        if isinstance(message, HostScanned):
            _check_addresses(message.address, 1)
            found[number].hosts.append(Host(message, record.timestamp, record.offset))
        else:
            _check_addresses(message.first_address, len(message.outcomes))
            found[number].scanned.append(message)
            next_round[message.chunk_id] = number + 1
    return found


def firsts(hosts: Iterable[Host]) -> list[Host]:
    """The first of the hosts that are the same."""
    found: dict[str, Host] = {}
    for host in hosts:
        found.setdefault(host.scanned.event_id, host)
    return list(found.values())


def close(scanned: ChunkScanned, stored: Mapping[str, Outcome]) -> ClosedChunk | ChunkIncomplete:
    """Close the chunk if every letter of its map that claims a host has one in `stored`, and none is blank.

    A stored host is what became of its address, whatever the map says: an earlier attempt may have reported it.
    """
    letters = list(scanned.outcomes)
    held = set[int]()
    for address, outcome in stored.items():
        index = _index(scanned.first_address, address)
        if 0 <= index < len(letters) and letters[index] not in NEVER_PROBED:
            letters[index] = outcome
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
    )


def _index(first: str, address: str) -> int:
    try:
        return index_of(first, address)
    except ValueError:  # of the other family: in no map of this chunk
        return -1


def _check_addresses(first: str, count: int) -> None:
    try:
        canonical = str(ip_address(first))
        address_at(first, count - 1)
    except ValueError as error:
        raise MessageError(f"not {count} addresses from {first!r} on: {error}") from error
    if canonical != first or "%" in first:  # a host written in two ways would be two; an IPv6 zone may be any text
        raise MessageError(f"{first!r} is not a canonical address without zone")
