"""What a job was asked for, and what became of each of its addresses."""

from __future__ import annotations

import zlib
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from job_orchestrator.api.state import MAX_ERROR_CHARS, Handed, Recorded, State, tags
from job_orchestrator.api.tasks import readable
from job_orchestrator.domain import coverage, plan
from job_orchestrator.domain.job import ScanJob
from scanfleet import rest
from scanfleet.auth import Caller, Guarded
from scanfleet.errors import BadRequestError, TooLargeError
from scanfleet.outcomes import address_at, index_of
from scanfleet.ports import MAX_TEXT, PortSet
from scanfleet.service import AsciiJSON, PathId

router = APIRouter(prefix="/api/v1/task", route_class=Guarded)


@router.get("/{job_id}/snapshot")
async def read_snapshot(job_id: PathId, caller: Caller, state: Handed, record: Recorded) -> rest.JobSnapshot:
    job = await readable(state, caller, job_id, record)
    return rest.JobSnapshot(
        job_id=job.id,
        cidr=job.cidr,
        exclude=list(job.exclude),
        policy=job.policy,
        addresses=job.addresses,
        excluded=job.excluded,
        ports=job.ports,
        chunks=job.chunk_count,
        estimate_seconds=job.estimate,
    )


@router.get("/{job_id}/map", response_model=rest.CoverageMap)
async def read_map(
    *,
    request: Request,
    job_id: PathId,
    caller: Caller,
    state: Handed,
    record: Recorded,
    ports: Annotated[str | None, Query(max_length=MAX_TEXT)] = None,
    from_: Annotated[str | None, Query(alias="from", max_length=50)] = None,
) -> Response:
    job = await readable(state, caller, job_id, record)
    first, addresses = _part(job, from_)
    blocks = _blocks(job, ports)
    if addresses * len(blocks) > coverage.MAX_LETTERS:
        raise TooLargeError(
            f"{len(blocks)} blocks of ports with {addresses} addresses each are more than {coverage.MAX_LETTERS} letters; "
            f"name some of the job's ports, as in ?ports={plan.block_ports(job, 0)}"[:MAX_ERROR_CHARS]
        )
    known = tags(request, "if-none-match")
    tag = f'"{job.seq}"'
    if job.settled and tag in known:
        return Response(status_code=304, headers={"ETag": tag})
    found = await _map(state, job, first, addresses, blocks)
    if not job.settled:  # letters come without a new state of the job
        tag = f'"{job.seq}-{zlib.crc32("".join(block.letters for block in found.blocks).encode()):08x}"'
    if tag in known:
        return Response(status_code=304, headers={"ETag": tag})
    return AsciiJSON(found.model_dump(mode="json"), headers={"ETag": tag})


async def _map(state: State, job: ScanJob, first: int, addresses: int, blocks: list[int]) -> rest.CoverageMap:
    found = coverage.Coverage(job, first, addresses, blocks)
    for begin, end in plan.indexes(job, blocks, first, first + addresses):
        async for chunk in state.store.job_chunks(job.id, begin, end):
            found.add(chunk)
    return rest.CoverageMap(
        job_id=job.id,
        seq=job.seq,
        status=job.status,
        first=str(address_at(job.cidr.partition("/")[0], first)),
        addresses=addresses,
        blocks=[
            rest.MapBlock(ports=str(plan.block_ports(job, block)), letters=letters)
            for block, letters in found.letters()
        ],
    )


def _part(job: ScanJob, from_: str | None) -> tuple[int, int]:
    """Place of the first address that is asked for, and how many there are."""
    if from_ is None:
        if job.addresses > coverage.MAX_ADDRESSES:
            raise TooLargeError(
                f"{job.cidr} has {job.addresses} addresses, and one answer at most {coverage.MAX_ADDRESSES}; ask for a part "
                f"of them, as in ?from={job.cidr.partition('/')[0]}"
            )
        return 0, job.addresses
    try:
        first = index_of(job.cidr.partition("/")[0], from_)
    except ValueError:
        first = -1
    if not 0 <= first < job.addresses:
        raise BadRequestError(f"from: {ascii(from_)[1:-1]} is not an address of {job.cidr}")
    return first, min(job.addresses - first, coverage.MAX_ADDRESSES)


def _blocks(job: ScanJob, ports: str | None) -> list[int]:
    """Numbers of the blocks with some of these ports."""
    if ports is None:
        return list(range(job.blocks))
    try:
        wanted = PortSet.parse(ports)
    except ValueError as error:
        raise BadRequestError(f"ports: {error}"[:MAX_ERROR_CHARS]) from error
    found = [block for block in range(job.blocks) if plan.block_ports(job, block).meets(wanted)]
    if not found:
        raise BadRequestError(f"ports: the job has none of them; it has {job.policy.ports}"[:MAX_ERROR_CHARS])
    return found
