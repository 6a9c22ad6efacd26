"""The hosts of a task, one object per address, streamed as JSON or NDJSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import islice
from typing import Annotated, Final, Protocol, TypeVar

from fastapi import APIRouter, Request, Response

from result_store.api.formats import JSON, NDJSON, Fields, negotiate, stream, write
from result_store.api.queries import network_in, owner
from result_store.api.state import StoreDep
from result_store.api.turns import ItsTurn
from result_store.domain.results import Host, Parts
from scanfleet.contracts import queries, rest
from scanfleet.contracts.messages import HostDetails, HostScanned, PortFound, ScriptOutput
from scanfleet.contracts.messages.results import MAX_HOSTNAMES, MAX_OUTPUT_CHARS, MAX_OUTPUTS
from scanfleet.contracts.rest import MAX_HOST_PORTS
from scanfleet.errors import BadRequestError, ConflictError
from scanfleet.runtime.http.requests import PathId, parsed
from scanfleet.scanning.outcomes import Outcome
from scanfleet.scanning.ports import Range, disjoint, overlap, parse_ranges, ranges_text
from scanfleet.security.auth import AuthenticatedRoute, Caller

_FORMATS: Final = (JSON, NDJSON)
_ALL_FIELDS: Final[Fields] = tuple(rest.Host.model_fields)
UNSORTED: Final = "A part of the job was stored by release 0.1, which did not record hosts; read its results"

_PRECEDENCE: Final = (Outcome.ANSWERED, Outcome.TIMED_OUT, Outcome.SILENT)
"""Of the outcomes of an address in several chunks the first of these is that of the host."""

_NAMES: Final[Mapping[Outcome, rest.HostOutcome]] = {
    Outcome.ANSWERED: "answered",
    Outcome.TIMED_OUT: "timed_out",
    Outcome.SILENT: "silent",
}


@dataclass(frozen=True, slots=True)
class HostSelection:
    """Which of a job's hosts are requested: those with a port that matches, if ports or a service are given."""

    limit: int | None = None
    ports: tuple[Range, ...] = ()
    """Empty selects every host."""

    service: str | None = None

    def selects(self, host: HostScanned, silent: tuple[Range, ...]) -> bool:
        if not self.ports and self.service is None:
            return True
        if any(self._selects(found) for found in host.ports):
            return True
        return self.service is None and overlap(silent, self.ports)

    def _selects(self, found: PortFound) -> bool:
        listed = not self.ports or overlap(self.ports, ((found.port, found.port),))
        return listed and self.service in (None, found.service)


class Machine:
    """The host at one address, merged from its chunks. Its size is bounded, however many chunks and ports there are.

    Attributes:
        address: its address.
        selected: whether the selection requests it.
    """

    def __init__(self, first: Host, selection: HostSelection = HostSelection()) -> None:
        self.selected = False
        self._details = HostDetails()
        self._selection = selection
        self._job_id = first.scanned.job_id
        self.address = first.scanned.address
        self._created_at = self._updated_at = first.place.created_at
        self._outcomes: set[str] = set()
        self._ports: list[rest.HostPort] = []
        self._silent: list[Range] = []
        self._port_count = 0
        self._os_info = ""

    def add(self, host: Host) -> None:
        """Add the report of one chunk about this address."""
        scanned, silent = host.scanned, parse_ranges(host.scanned.open_filtered)
        self.selected = self.selected or self._selection.selects(scanned, silent)
        self._created_at = min(self._created_at, host.place.created_at)
        self._updated_at = max(self._updated_at, host.place.created_at)
        self._outcomes.add(scanned.outcome)
        self._silent += silent
        self._port_count += host.result_count
        self._os_info = self._os_info or next((port.os_info for port in scanned.ports if port.os_info), "")
        listed = scanned.ports[: MAX_HOST_PORTS - len(self._ports)]
        self._ports += (rest.HostPort.model_validate(port, from_attributes=True) for port in listed)
        if scanned.details is not None:
            self._details = _joined(self._details, scanned.details)

    def view(self) -> rest.Host:
        """Return the host in the format of the API."""
        details = self._details
        return rest.Host(
            job_id=self._job_id,
            ip_address=self.address,
            outcome=next(_NAMES[each] for each in _PRECEDENCE if each in self._outcomes),
            reason=details.reason,
            hostnames=list(details.hostnames),
            mac=details.mac,
            vendor=details.vendor,
            os_info=details.systems[0].name if details.systems else self._os_info,
            systems=[rest.HostSystem(name=each.name, accuracy=each.accuracy) for each in details.systems],
            ports=sorted(self._ports, key=lambda port: (port.port, port.protocol)),
            open_filtered=ranges_text(disjoint(self._silent)),
            port_count=self._port_count,
            closed=details.closed,
            filtered=details.filtered,
            scripts=[rest.HostScript(id=each.id, output=each.output) for each in details.scripts],
            seconds=details.seconds,
            created_at=self._created_at,
            updated_at=self._updated_at,
        )


def _joined(one: HostDetails, other: HostDetails) -> HostDetails:
    """Return the details of two chunks together, within the bounds of one."""
    seconds = [each.seconds for each in (one, other) if each.seconds is not None]
    return HostDetails.model_construct(  # not validated: both are valid, and the sums may exceed those of one chunk
        reason=one.reason or other.reason,
        mac=one.mac or other.mac,
        vendor=one.vendor or other.vendor,
        hostnames=tuple(dict.fromkeys((*one.hostnames, *other.hostnames)))[:MAX_HOSTNAMES],
        systems=one.systems or other.systems,
        scripts=_within_bounds(dict.fromkeys((*one.scripts, *other.scripts))),
        closed=one.closed + other.closed,
        filtered=one.filtered + other.filtered,
        seconds=sum(seconds) if seconds else None,
    )


def _within_bounds(scripts: Iterable[ScriptOutput]) -> tuple[ScriptOutput, ...]:
    kept: list[ScriptOutput] = []
    left = MAX_OUTPUT_CHARS
    for script in islice(scripts, MAX_OUTPUTS):
        if len(script.output) <= left:
            kept.append(script)
            left -= len(script.output)
    return tuple(kept)


class Merged(Protocol):
    """The reports of a job's chunks about one address."""

    address: str

    def add(self, host: Host) -> None:
        """Add the report of one chunk about this address."""


_Merged = TypeVar("_Merged", bound=Merged)


async def merged(hosts: AsyncIterator[Host], begin: Callable[[Host], _Merged]) -> AsyncIterator[_Merged]:
    """Merge the hosts of each address, which are sorted by address; `begin` is called with the first one of each."""
    machine: _Merged | None = None
    async for host in hosts:
        await asyncio.sleep(0)  # hosts come in pages: without it, other requests would wait for all of one
        if machine is None or host.scanned.address != machine.address:
            if machine is not None:
                yield machine
            machine = begin(host)
        machine.add(host)
    if machine is not None:
        yield machine


async def _selected(hosts: AsyncIterator[Host], selection: HostSelection) -> AsyncIterator[Iterable[rest.Host]]:
    """Yield the selected hosts, one at a time, at most `limit`, and nothing for each of the others."""
    left = selection.limit
    async for machine in merged(hosts, lambda first: Machine(first, selection)):
        if machine.selected:
            yield (machine.view(),)
            left = None if left is None else left - 1
            if left == 0:
                return
        else:
            yield ()


router = APIRouter(route_class=AuthenticatedRoute)


def _after(address: str | None) -> str | None:
    """Return the address in its canonical form.

    Raises:
        BadRequestError: the text is not an address.
    """
    try:
        return None if address is None else str(ip_address(address))
    except ValueError as error:
        raise BadRequestError(f"after: {error}") from error


@router.get("/api/v1/task/{job_id}/hosts")
async def hosts(
    *,
    job_id: PathId,
    caller: Caller,
    request: Request,
    turn: ItsTurn,
    store: StoreDep,
    query: Annotated[queries.Hosts, parsed(queries.Hosts)],
) -> Response:
    """Stream the selected hosts of the task in order of their addresses, limited to those that the caller owns.

    As for results, the gateway asks the orchestrator first.
    """
    form = negotiate(",".join(request.headers.getlist("accept")), _FORMATS)
    after, within = _after(query.after), network_in(query.address)
    selection = HostSelection(query.limit, disjoint((port, port) for port in query.port), query.service)
    if await store.is_unsorted(job_id):
        raise ConflictError(UNSORTED)
    found = store.hosts_by_address(job_id, owner(caller), Parts.SUMMARY, after=after, within=within)
    return await stream(turn, write(form, _selected(found, selection), _ALL_FIELDS), form.media_type)
