"""Serve queries about jobs, delete and cancel them; jobs are created by commands on the bus."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response

from job_orchestrator.api.state import Recorded, Recorder, State, StateDep, recorder_of, state_of
from job_orchestrator.domain import ledger
from job_orchestrator.domain.census import OpenChunks
from job_orchestrator.domain.fairness import LIVE
from job_orchestrator.domain.job import ScanJob
from scanfleet.contracts import queries, rest
from scanfleet.contracts.messages import JobStatus
from scanfleet.errors import (
    BadRequestError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    PublicError,
    Rule,
    TooLargeError,
    UnavailableError,
)
from scanfleet.runtime.http.requests import PathId, parse_query, parsed
from scanfleet.runtime.http.responses import ModelJSON
from scanfleet.security.auth import AuthenticatedRoute, Caller, Principal

router = APIRouter(prefix="/api/v1/task", route_class=AuthenticatedRoute)


@router.get("")
async def list_tasks(request: Request) -> Response:
    # As dependencies, these would take the application a tenth of the CPU time of a list.
    caller: Principal = request.scope["caller"]
    state = await state_of(request)
    record = await recorder_of(request)
    query = parse_query(request, queries.Tasks)
    whose = await readable_user(caller, query.user_id, record, target="/api/v1/task")
    found, total = await state.store.jobs.page(
        whose,
        set(query.status),
        query.skip,
        query.page_size,
        subnet_id=query.subnet_id,
        policy_id=query.policy_id,
        since=query.since,
    )
    return ModelJSON(rest.JobList(jobs=found, total=total, page=query.page, page_size=query.page_size))


@router.get("/{job_id}")
async def read_task(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> rest.TaskStatus:
    return task_status(await readable(state, caller, job_id, record))


@router.delete("/{job_id}")
async def delete_task(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> rest.Done:
    job = await _changeable(state, caller, job_id)
    if not job.final:
        raise ConflictError(f"Job is {job.status}; cancel it first")
    await _record_change(record, caller, job)
    if not await state.deletions.delete([job_id], "request", requested_by=caller.user_id):
        if await state.store.jobs.get([job_id]):
            raise ConflictError("Job is still being changed; try again in a few seconds")
        raise NotFoundError("Job not found")  # another request has deleted it meanwhile
    return rest.Done(message="Job deleted successfully")


@router.post("/{job_id}/cancel")
async def cancel_task(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> rest.Done:
    job = await _changeable(state, caller, job_id, unknown=Rule.REQUEST)
    if job.final:
        raise BadRequestError(f"Job is already {job.status}", rule=Rule.STATE, target=f"/api/v1/task/{job_id}")
    await _record_change(record, caller, job)
    if await state.cancels.cancel([job_id]):
        return rest.Done(message="Job cancelled successfully")
    job = await _changeable(state, caller, job_id)
    if not job.final:
        raise UnavailableError("The job cannot be changed now")
    ended: PublicError = BadRequestError(f"Job is already {job.status}")
    ended.rule = None  # the audit log already has the entry of this request
    raise ended


async def _changeable(state: State, caller: Principal, job_id: int, *, unknown: Rule | None = None) -> ScanJob:
    """Return the job to its owner, or to an administrator.

    Args:
        state: provides the store.
        caller: the authenticated caller.
        job_id: id of the job.
        unknown: rule of the audit entry if no job has this id; None for no entry.

    Raises:
        NotFoundError: the job does not exist or belongs to another user.
    """
    job = (await state.store.jobs.get([job_id])).get(job_id)
    if job is None or not (job.user_id == caller.user_id or caller.admin):
        raise NotFoundError("Job not found", rule=Rule.OWNER if job else unknown, target=f"/api/v1/task/{job_id}")
    return job


async def _record_change(record: Recorder, caller: Principal, job: ScanJob) -> None:
    """Write the change of the job to the audit log."""
    target = f"/api/v1/task/{job.id}"
    if job.user_id == caller.user_id:
        await record(target=target)
    else:
        await record(target=audit_target(target, job), rule=Rule.ROLE)


@router.get("/{job_id}/ledger")
async def read_ledger(
    *,
    job_id: PathId,
    caller: Caller,
    state: StateDep,
    record: Recorded,
    query: Annotated[queries.Ledger, parsed(queries.Ledger)],
) -> rest.Ledger:
    if query.after is not None and query.page > 1:
        raise BadRequestError("page and after exclude each other")
    job = await readable(state, caller, job_id, record)
    tally, names = ledger.Tally(job), ledger.UnprobedPage(job, query.page_size, skip=query.skip, after=query.after)
    async with state.turns.turn(caller.user_id):
        for first, end in names.ranges():
            async for chunk in state.store.chunks.of_job(job.id, first, end):
                names.add(chunk)
        async for chunk in state.store.chunks.of_job(job.id, job.totals.done):
            tally.add(chunk)
            names.add(chunk)
        names.add_unmade()
    if names.cut and query.after is None:
        raise TooLargeError(
            f"the lists of ports of {query.page_size} addresses are too long; lower page_size, or use after"
        )
    return rest.Ledger(
        job_id=job.id,
        status=job.status,
        accounted=tally.accounted,
        request=rest.LedgerRequest(
            addresses=job.plan.addresses,
            ports=job.plan.ports,
            probes=job.plan.probes,
        ),
        counts=rest.LedgerCounts(**tally.counts),
        not_probed=rest.LedgerPage(
            addresses=[
                rest.LedgerEntry(address=each.address, ports=each.ports, outcome=each.outcome, reason=each.reason)
                for each in names.page
            ],
            total=names.total,
            page=query.page,
            page_size=query.page_size,
            next=names.next,
        ),
        eta_seconds=_eta(job),
    )


@router.get("/{job_id}/waiting")
async def read_waiting(job_id: PathId, caller: Caller, state: StateDep, record: Recorded) -> rest.Waiting:
    job = await readable(state, caller, job_id, record)
    open_ = OpenChunks() if job.final else await state.store.chunks.count_open(job_id)
    waiting = not job.final and not open_.held and (open_.queued > 0 or job.status is JobStatus.PENDING)
    reasons = await _reasons(state, job, open_) if waiting else []
    return rest.Waiting(
        job_id=job_id,
        waiting=waiting,
        since=(job.waiting_since or job.updated_at) if waiting else None,
        next_possible_start=reasons[0].until if reasons else None,
        reasons=reasons,
        queued_chunks=open_.queued,
        held_chunks=open_.held,
        eta_seconds=_eta(job),
    )


async def _reasons(state: State, job: ScanJob, open_: OpenChunks) -> list[rest.WaitingReason]:
    """Return why no worker holds a chunk of the job."""
    now = state.now()
    if closed := state.grants.closed(job, now):
        return [rest.WaitingReason(kind="window", until=state.grants.opens_at(job, now), detail=closed)]
    workers = await state.store.dispatch.live_workers(LIVE)
    unseen = f"has announced itself in the last {LIVE.total_seconds():.0f} s"
    if not workers:
        return [_reason("no_worker", f"no worker that takes work {unseen}; start a scanner-worker")]
    reasons: list[rest.WaitingReason] = []
    lacks_raw = not any(worker.raw for worker in workers)
    if lacks_raw and open_.queued_raw:
        detail = (
            f"{open_.queued_raw} of {open_.queued} queued chunks need raw packets, and no worker that may send them"
        )
        reasons.append(_reason("no_raw_worker", f"{detail} {unseen}"))
    if not lacks_raw or open_.queued_raw < open_.queued or not open_.queued:
        ahead = max(0.0, await state.backlog.seconds() - job.seconds_left)
        reasons.append(_reason("queue", f"{ahead:.0f} slot seconds of work are ahead"))
    return reasons


def _reason(kind: Literal["no_worker", "no_raw_worker", "queue"], detail: str) -> rest.WaitingReason:
    return rest.WaitingReason(kind=kind, until=None, detail=detail)


def _eta(job: ScanJob) -> float | None:
    return None if job.final else job.eta_seconds


async def readable(
    state: State,
    caller: Principal,
    job_id: int,
    record: Recorder,
    *,
    target: str = "",
    streamed: bool = False,
) -> ScanJob:
    """Return the job to its owner, or, with an audit entry, to an administrator.

    Args:
        state: provides the store.
        caller: the authenticated caller.
        job_id: id of the job.
        record: writes the audit entry if an administrator reads another user's job.
        target: the requested object, if the path does not identify it.
        streamed: whether the request is one of many of a stream.

    Raises:
        NotFoundError: the job does not exist or belongs to another user.
    """
    job = (await state.store.jobs.get([job_id])).get(job_id)
    if job is None or not (job.user_id == caller.user_id or caller.admin):
        raise NotFoundError("Job not found", rule=Rule.OWNER if job else None, target=target)
    if job.user_id != caller.user_id:
        await record.reading(audit_target(target or record.request.scope["path"], job), streamed=streamed)
    return job


async def readable_user(
    caller: Principal,
    whose: str | None,
    record: Recorder,
    *,
    target: str,
    streamed: bool = False,
    what: str = "jobs",
) -> int | None:
    """Return the user whose jobs the caller may read, None for all users; access to others' jobs is audited.

    Args:
        caller: the authenticated caller.
        whose: the user as named in the request.
        record: writes the audit entry if an administrator reads another user's jobs.
        target: the requested object.
        streamed: whether the request is one of many of a stream.
        what: the requested objects, for the error.

    Raises:
        ForbiddenError: they are another user's, and the caller is no administrator.
    """
    user_id = caller.user_id if whose is None else None if whose == queries.ALL_USERS else int(whose)
    if user_id != caller.user_id:
        target = f"{target}?user_id={whose}"
        if not caller.admin:
            raise ForbiddenError(f"The {what} of other users are for administrators", rule=Rule.ROLE, target=target)
        await record.reading(target, streamed=streamed)
    return user_id


def audit_target(target: str, job: ScanJob) -> str:
    """Return the name of an object that an administrator accesses, for the audit log."""
    return f"{target} of user {job.user_id}"


def task_status(job: ScanJob) -> rest.TaskStatus:
    """Return the job in the format of the API."""
    return rest.TaskStatus.of(job.view, progress=job.progress, machines_found=job.machines_found, error=job.error)
