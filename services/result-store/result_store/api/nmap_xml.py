"""The results of a finished task as one document in nmap's XML format.

The document is written while three streams are read in order of addresses: details of hosts, their ports, and the maps of closed
chunks, which have the outcomes of all other addresses. Memory use does not depend on the size of the document. A truncated
document has no end tag, so readers reject it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, partial
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import zip_longest
from typing import Annotated, Final, NamedTuple

from fastapi import APIRouter, Response

from result_store.api.elements import attribute
from result_store.api.formats import BEGIN_SECONDS, PIECE_BYTES, SILENT_SECONDS, Piece, stream
from result_store.api.host_xml import NO_NAMES, UNKNOWN, Reported, address, extra_ports, status
from result_store.api.hosts import UNSORTED, merged
from result_store.api.port_xml import ports
from result_store.api.queries import owner
from result_store.api.state import StoreDep
from result_store.api.turns import ItsTurn
from result_store.domain.results import ClosedChunk, Host, Parts
from scanfleet.contracts import queries
from scanfleet.contracts.messages import JobStatus
from scanfleet.contracts.rest import ExportedJob
from scanfleet.errors import ConflictError
from scanfleet.runtime.http.requests import PathId, parsed
from scanfleet.scanning.outcomes import Outcome, address_key, index_of
from scanfleet.scanning.ports import PortSet, disjoint, parse_ranges, port_count, ranges_text
from scanfleet.security.auth import AuthenticatedRoute, Caller

_PRECEDENCE: Final = "atsd"
"""Of the outcomes of an address in several chunks the first of these is that of the address; others are not written."""

_PORTS_PER_TURN: Final = 50  # about 10 ms: each element is parsed

_RANKS: Final = {each.value: (_PRECEDENCE + each.value).index(each.value) for each in Outcome}


@lru_cache(maxsize=64)  # the chunks of a job share a list, which may take a millisecond
def _tcp_count(text: str) -> int:
    """Return the number of TCP ports of a chunk, which has ports of one protocol."""
    return 0 if text.startswith("U:") else port_count(parse_ranges(text))


@dataclass(slots=True)
class Block:
    """The closed chunks of one slice of addresses, one per block of ports, merged."""

    first_address: str
    letters: str = ""
    nmap: str = ""
    technique: str = ""
    """Of its TCP ports."""

    discovery: str = ""
    """As in its policy."""

    ports: set[str] = field(default_factory=set)
    """The ports of its chunks."""

    late: set[int] = field(default_factory=set)
    """Indexes of the addresses that timed out in a chunk, whatever their outcomes in others."""

    filtered: Counter[int] = field(default_factory=Counter)
    """By index, the TCP ports of the chunks in which the address was silent: others would have answered."""

    def add(self, chunk: ClosedChunk) -> None:
        if self.letters:
            pairs = zip_longest(self.letters, chunk.outcomes, fillvalue=Outcome.BLANK.value)
            self.letters = "".join(one if _RANKS[one] <= _RANKS[other] else other for one, other in pairs)
        else:
            self.letters = chunk.outcomes
        self.late.update(index for index, letter in enumerate(chunk.outcomes) if letter == Outcome.TIMED_OUT)
        self.nmap = self.nmap or chunk.nmap
        self.technique = self.technique or chunk.technique
        self.discovery = self.discovery or chunk.discovery
        if chunk.ports:
            self.ports.add(chunk.ports)
            if Outcome.SILENT in chunk.outcomes and (tcp := _tcp_count(chunk.ports)):
                self.filtered.update(
                    {index: tcp for index, letter in enumerate(chunk.outcomes) if letter == Outcome.SILENT}
                )


async def blocks(chunks: AsyncIterator[ClosedChunk]) -> AsyncGenerator[Block]:
    """Merge the chunks of each slice of addresses; they are sorted by address."""
    block: Block | None = None
    async for chunk in chunks:
        if block is None or chunk.first_address != block.first_address:
            if block is not None:
                yield block
            block = Block(chunk.first_address)
        block.add(chunk)
    if block is not None:
        yield block


async def _first(chunks: AsyncIterator[ClosedChunk]) -> Block | None:
    """Return the first slice of addresses that nmap scanned, else the first one; None if no chunk is closed."""
    first: Block | None = None
    async with aclosing(blocks(chunks)) as slices:
        async for block in slices:
            if block.nmap:
                return block
            first = first or block
            await asyncio.sleep(0)  # for other tasks, as in `_merged`
    return first


class _Run(NamedTuple):
    """Addresses of a slice without hosts between them, as indexes from `start` up to `end`."""

    block: Block
    start: int
    end: int


class _Ports:
    """The ports of hosts, read in the order of their addresses."""

    def __init__(self, hosts: AsyncIterator[Host]) -> None:
        self._hosts = hosts
        self._next: Host | None = None

    async def of(self, address: str) -> AsyncIterator[Host]:
        """Yield the findings of the chunks of an address; skip addresses before it."""
        key = address_key(address)
        while (host := self._next or await anext(self._hosts, None)) is not None:
            self._next = host
            if (its_key := address_key(host.scanned.address)) > key:
                return
            self._next = None
            if its_key == key:
                yield host


async def document(
    job: ExportedJob,
    hosts: AsyncIterator[Reported],
    listed: AsyncIterator[Host],
    chunks: Callable[[], AsyncIterator[ClosedChunk]],
    *,
    down: bool = True,
) -> AsyncIterator[str]:
    """Yield the document in small parts.

    Args:
        job: the finished job.
        hosts: its hosts, by address.
        listed: the ports of its hosts, by address.
        chunks: returns its closed chunks, by address; called twice, since the head describes the first scanned ones.
        down: whether hosts that are down are written too; they are counted in any case.
    """
    up_count = down_count = 0
    written = _PRECEDENCE if down else _PRECEDENCE.replace(Outcome.DOWN, "")
    of_hosts = _Ports(listed)
    yield _head(job, await _first(chunks()))
    async for each in _merged(hosts, blocks(chunks())):
        if isinstance(each, Reported):
            up_count += 1
            async for part in _found(each, of_hosts):
                yield part
        else:
            letters = each.block.letters[each.start : each.end]
            of_run = sum(letters.count(letter) for letter in _PRECEDENCE)
            down_of_run = letters.count(Outcome.DOWN)
            up_count, down_count = up_count + of_run - down_of_run, down_count + down_of_run
            base = ip_address(each.block.first_address)
            yield "".join(
                _without_details(each.block, index, base + index)
                for index, letter in enumerate(letters, each.start)
                if letter in written
            )
    yield _tail(job, up_count, down_count)


async def _merged(hosts: AsyncIterator[Reported], slices: AsyncIterator[Block]) -> AsyncIterator[Reported | _Run]:
    """Yield the hosts with findings, and the addresses between them, in order of addresses."""
    host = await anext(hosts, None)
    async for block in slices:
        base, index = ip_address(block.first_address), 0
        first, last = address_key(str(base)), address_key(str(base + (len(block.letters) - 1)))
        while host is not None and (key := address_key(host.address)) <= last:
            if key >= first:  # hosts before it are of chunks that were never closed
                until = index_of(block.first_address, host.address)
                yield _Run(block, index, until)
                index = until + 1
                host.timed_out |= until in block.late
                host.add_filtered(block.filtered[until])
            yield host
            host = await anext(hosts, None)
        if index < len(block.letters):
            yield _Run(block, index, len(block.letters))
        await asyncio.sleep(0)  # chunks come in pages: without it, other requests would wait for all blocks of one
    while host is not None:
        yield host
        host = await anext(hosts, None)


def _head(job: ExportedJob, block: Block | None) -> str:
    ports = PortSet.parse(job.ports)
    wanted = f"--top-ports {ports.top}" if ports.top else f"-p {ports}"
    arguments = f"nmap {wanted} {job.cidr} (Scanfleet job {job.job_id})"
    infos = []
    if block is not None and block.technique and ports.tcp_count:
        numbers = [each for text in block.ports for each in parse_ranges(text)] if ports.top else ports.tcp
        if numbers:  # those of a `top` set may be unknown
            infos.append(_scan_info(block.technique, "tcp", ports.tcp_count, ranges_text(disjoint(numbers))))
    if ports.udp_count:
        infos.append(_scan_info("udp", "udp", ports.udp_count, ranges_text(ports.udp)))
    return "".join(
        (
            '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE nmaprun>\n',
            f'<nmaprun scanner="nmap"{attribute("args", arguments)} start="{_seconds(job.start)}"',
            f"{attribute('startstr', _written(job.start))}{attribute('version', block.nmap if block else '')}",
            ' xmloutputversion="1.05">\n',
            *infos,
            '<verbose level="1"/>\n<debugging level="0"/>\n',
        ),
    )


def _scan_info(technique: str, protocol: str, count: int, services: str) -> str:
    attributes = {"type": technique, "protocol": protocol, "numservices": count, "services": services}
    return f"<scaninfo{''.join(attribute(*each) for each in attributes.items())}/>\n"


async def _found(host: Reported, listed: _Ports) -> AsyncIterator[str]:
    """Yield the element of a host with findings in parts, one per port."""
    ended = _seconds(host.updated_at)
    began = "" if host.seconds is None else f' starttime="{ended - round(host.seconds)}"'
    yield f'<host{began} endtime="{ended}"{_LATE if host.timed_out else ""}>{host.before_ports}'
    async for each in listed.of(host.address):
        for number, port in enumerate(ports(each.scanned)):
            if number % _PORTS_PER_TURN == 0:
                await asyncio.sleep(0)  # other requests would wait for all ports
            yield port + "\n"
    yield f"{host.behind_ports}</host>\n"


_LATE: Final = ' timedout="true"'


def _without_details(block: Block, index: int, of: IPv4Address | IPv6Address) -> str:
    letter = block.letters[index]
    if letter == Outcome.DOWN:
        return f"<host>{_DOWN}{address(of)}</host>\n"
    late = _LATE if letter == Outcome.TIMED_OUT else ""
    up = _UP_BY_DISCOVERY.get(block.discovery, _UP)
    count = block.filtered[index]
    ports = f"<ports>{extra_ports('filtered', count)}</ports>\n" if count else ""
    return f"<host{late}>{up}{address(of)}{NO_NAMES}{ports}</host>\n"


_DOWN: Final = status("down", "no-response")
_UP: Final = status("up", UNKNOWN)
_UP_BY_DISCOVERY: Final = {"none": status("up", "user-set")}
"""Without discovery nmap assumes that each address is up."""


def _tail(job: ExportedJob, up: int, down: int) -> str:
    total, elapsed = up + down, max((job.end - job.start).total_seconds(), 0.0)
    summary = f"{total} addresses ({up} up) scanned in {elapsed:.2f} seconds"
    end = 'exit="success"'
    if job.status is not JobStatus.COMPLETED:
        end = f'exit="error"{attribute("errormsg", f"job {job.status}: {job.error}" if job.error else f"job {job.status}")}'
    return (
        f'<runstats><finished time="{_seconds(job.end)}"{attribute("timestr", _written(job.end))}'
        f'{attribute("summary", summary)} elapsed="{elapsed:.2f}" {end}/>'
        f'<hosts up="{up}" down="{down}" total="{total}"/>\n</runstats>\n</nmaprun>\n'
    )


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def _written(moment: datetime) -> str:
    return time.asctime(moment.utctimetuple())


async def _pieces(parts: AsyncIterator[str]) -> AsyncGenerator[Piece, None]:
    """Join small parts to pieces of about `PIECE_BYTES` bytes; smaller ones keep the connection while little is found."""
    held: list[str] = []
    size = 0
    due = time.monotonic() + BEGIN_SECONDS
    async for part in parts:
        held.append(part)
        size += len(part)
        if size >= PIECE_BYTES or time.monotonic() >= due:
            yield Piece(("".join(held) or "\n").encode("ascii"))
            held, size, due = [], 0, time.monotonic() + SILENT_SECONDS
    yield Piece("".join(held).encode("ascii"), last=True)


router = APIRouter(route_class=AuthenticatedRoute)


@router.post("/internal/jobs/{job_id}/nmap.xml", name="read_nmap_xml")
async def nmap_xml(
    *,
    job_id: PathId,
    job: ExportedJob,
    caller: Caller,
    turn: ItsTurn,
    store: StoreDep,
    query: Annotated[queries.NmapXml, parsed(queries.NmapXml)],
) -> Response:
    """Stream the document of a job, which the gateway has read from the orchestrator, limited to the caller's own."""
    if await store.is_unsorted(job_id):
        raise ConflictError(UNSORTED)
    whose = owner(caller)
    parts = document(
        job,
        merged(store.hosts_by_address(job_id, whose, Parts.DETAILS), Reported),
        store.hosts_by_address(job_id, whose, Parts.PORTS),
        partial(store.chunks_by_address, job_id, whose),
        down=query.hosts == "all",
    )
    headers = {
        "Content-Disposition": f'attachment; filename="scanfleet-job-{job_id}.xml"',
        "X-Content-Type-Options": "nosniff",
    }
    return await stream(turn, _pieces(parts), "application/xml", headers)
