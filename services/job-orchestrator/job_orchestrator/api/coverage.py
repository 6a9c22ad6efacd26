"""Serve a job's snapshot and its coverage map."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Collection
from typing import Annotated

from fastapi import APIRouter, Request, Response

from job_orchestrator.api.state import MAX_ERROR_CHARS, Recorded, State, StateDep, tags
from job_orchestrator.api.tasks import readable
from job_orchestrator.domain import coverage, plan
from job_orchestrator.domain.job import ScanJob
from scanfleet.contracts import queries, rest
from scanfleet.errors import BadRequestError, TooLargeError
from scanfleet.runtime.http.requests import PathId, parsed
from scanfleet.runtime.http.responses import AsciiJSON
from scanfleet.scanning.outcomes import address_at, index_of
from scanfleet.scanning.ports import PortSet
from scanfleet.security.auth import AuthenticatedRoute, Caller

_MAX_CHUNKS = 65_536  # chunks read per response: a /16 of one address each
_MAX_RANGES = 256  # ranges of chunks, with one query or more each

router = APIRouter(prefix="/api/v1/task", route_class=AuthenticatedRoute)


@router.get("/{job_id}/snapshot")
async def read_snapshot(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> rest.JobSnapshot:
    job = await readable(state, caller, job_id, record)
    return rest.JobSnapshot(
        job_id=job.id,
        cidr=job.cidr,
        exclude=list(job.exclude),
        policy=job.policy,
        addresses=job.plan.addresses,
        excluded=job.plan.excluded,
        ports=job.plan.ports,
        chunks=job.plan.chunk_count,
        estimate_seconds=job.plan.estimate,
    )


@router.get("/{job_id}/map", response_model=rest.CoverageMap)
async def read_map(
    *,
    request: Request,
    job_id: PathId,
    caller: Caller,
    state: StateDep,
    record: Recorded,
    query: Annotated[queries.Map, parsed(queries.Map)],
) -> Response:
    job = await readable(state, caller, job_id, record)
    known = tags(request, "if-none-match")
    # A recount after a late report changes outcomes and `rev`, but not `seq`; a restore sets `rev` back, but raises `seq`.
    tag = f'"{job.seq}.{job.rev}"'
    if job.settled and tag in known:
        return Response(status_code=304, headers={"ETag": tag})
    async with state.turns.turn(caller.user_id):
        return await _map(state, job, query, known, tag)


async def _map(state: State, job: ScanJob, query: queries.Map, known: Collection[str], tag: str) -> Response:
    step = min(job.plan.chunk_addresses, job.plan.addresses) if query.by == "chunk" else 1
    first, addresses = _part(job, query.from_, step)
    cells = -(-addresses // step)
    blocks = await asyncio.to_thread(_blocks, job, query.ports)  # up to 65,535: too many for the event loop, as below
    if cells * len(blocks) > coverage.MAX_LETTERS:
        raise TooLargeError(
            f"{len(blocks)} blocks of ports with {cells} letters each are more than {coverage.MAX_LETTERS} letters; "
            f"{_name_ports(blocks)}"[:MAX_ERROR_CHARS]
        )
    ranges = plan.indexes(job, blocks, first, first + addresses)
    chunks = sum(end - begin for begin, end in ranges)
    if len(ranges) > _MAX_RANGES or chunks > _MAX_CHUNKS:
        raise TooLargeError(
            f"the map needs {chunks} chunks in {len(ranges)} ranges, and one answer reads at most {_MAX_CHUNKS} chunks in "
            f"{_MAX_RANGES} ranges; {_name_ports(blocks)}"[:MAX_ERROR_CHARS]
        )
    found = coverage.Coverage(job, first, addresses, blocks, step)
    for begin, end in ranges:
        async for chunk in state.store.chunks.map_parts(job.id, begin, end):
            found.add(chunk)
    letters = await asyncio.to_thread(lambda: dict(found.letters()))
    if not job.settled:  # outcomes change without a new `seq`
        tag = f'"{job.seq}-{zlib.crc32("".join(letters.values()).encode()):08x}"'
    if tag in known:
        return Response(status_code=304, headers={"ETag": tag})

    def render() -> Response:
        answer = rest.CoverageMap(
            job_id=job.id,
            seq=job.seq,
            status=job.status,
            first=str(address_at(job.cidr.partition("/")[0], first)),
            addresses=addresses,
            step=step,
            blocks=[],
        )
        # Creating tens of thousands of models would cost more than the rest of the response.
        shown = [{"ports": str(ports), "letters": letters[block]} for block, ports in blocks.items()]
        return AsciiJSON(answer.model_dump(mode="json") | {"blocks": shown}, headers={"ETag": tag})

    return await asyncio.to_thread(render)


def _part(job: ScanJob, from_: str | None, step: int) -> tuple[int, int]:
    """Return the position of the first requested address, and the number of requested addresses.

    With more than one address per letter, the first address is that of a letter.
    """
    network, most = job.cidr.partition("/")[0], coverage.MAX_CELLS * step
    if from_ is None:
        if job.plan.addresses > most:
            whole = ", or for a letter per chunk, as in ?by=chunk" if step < job.plan.chunk_addresses else ""
            raise TooLargeError(
                f"{job.cidr} has {job.plan.addresses} addresses, and one answer at most {most}; ask for a part "
                f"of them, as in ?from={network}{whole}"
            )
        return 0, job.plan.addresses
    try:
        first = index_of(network, from_)
    except ValueError:
        first = -1
    if not 0 <= first < job.plan.addresses:
        raise BadRequestError(f"from: {ascii(from_)[1:-1]} is not an address of {job.cidr}")
    first -= first % step
    return first, min(job.plan.addresses - first, most)


def _blocks(job: ScanJob, ports: str | None) -> dict[int, PortSet]:
    """Return the job's blocks with any of these ports, by number; None selects all."""
    blocks = enumerate(job.policy.port_set.blocks(job.plan.chunk_ports))
    if ports is None:
        return dict(blocks)
    try:
        wanted = PortSet.parse(ports)
    except ValueError as error:
        raise BadRequestError(f"ports: {error}"[:MAX_ERROR_CHARS]) from error
    found = {number: block for number, block in blocks if block.meets(wanted)}
    if not found:
        raise BadRequestError(f"ports: the job has none of them; it has {job.policy.ports}"[:MAX_ERROR_CHARS])
    return found


def _name_ports(blocks: dict[int, PortSet]) -> str:
    return f"name some of the job's ports, as in ?ports={next(iter(blocks.values()))}"
