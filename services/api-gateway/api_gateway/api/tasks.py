"""Scan jobs: created and cancelled by commands, everything else is asked of the services behind."""

from __future__ import annotations

from typing import Annotated, Any, Final
from uuid import uuid4

from fastapi import APIRouter, Header, Request, Response

from api_gateway.api.admission import CancelRoute, Route, StreamRoute
from api_gateway.api.document import ETAG, ID, IF_NONE_MATCH, TIME, errors, paging, query
from api_gateway.api.events import (
    JobsStream,
    JobStream,
    Watched,
    WatchedJobs,
    Whose,
    last_received,
    last_seq,
    overlapping,
)
from api_gateway.api.state import Handed
from scanfleet import rest, tracing
from scanfleet.auth import Caller
from scanfleet.messages import CancelJob, JobStatus, SubmitJobs
from scanfleet.messages.fields import MAX_ID
from scanfleet.service import PathId, source

router = APIRouter(prefix="/api/v1/task", tags=["task"], route_class=Route)
cancels = APIRouter(prefix="/api/v1/task", tags=["task"], route_class=CancelRoute)
streams = APIRouter(prefix="/api/v1/task", tags=["task"], route_class=StreamRoute)
all_streams = APIRouter(prefix="/api/v1", tags=["task"], route_class=StreamRoute)

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Visible ASCII. The same key with the same body gives the same answer and creates nothing.",
    ),
]

LastEventId = Annotated[
    str | None,
    Header(
        alias="Last-Event-ID", description="The `id` of the last event that was received; a browser sends it by itself."
    ),
]

_STATUS: Final = query(
    "status",
    {"type": "array", "items": {"type": "string", "enum": list(JobStatus)}},
    "Only jobs in one of these states; repeated, or separated by commas.",
)
_USER_ID: Final = query(
    "user_id",
    {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_ID}, {"const": "all"}]},
    "For administrators: the jobs of this user, or of `all`; without it the caller's own.",
)
_JOB_FILTERS: Final = [
    query("subnet_id", ID, "Only jobs of this subnet."),
    query("policy_id", ID, "Only jobs of this policy."),
    query("since", TIME, "Only jobs that were created then or later."),
]
_PORTS: Final = query(
    "ports", {"type": "string"}, "Only blocks that hold some of these ports, in the syntax of a policy's `ports`."
)
_FROM: Final = query(
    "from",
    {"type": "string"},
    "Only from this address on: one answer has 65,536 addresses, and a larger subnet needs it.",
)
_NOT_MODIFIED: Final[dict[int | str, dict[str, Any]]] = {
    200: {"headers": ETAG},
    304: {"description": "The map is still the one of `If-None-Match`.", "headers": ETAG},
}
_RESULT: Final = {"$ref": "#/components/schemas/Result"}
_RESULT_FILTERS: Final = [
    query(
        "fields",
        {"type": "array", "items": {"type": "string", "enum": list(rest.Result.model_fields)}},
        "Only these fields; without `raw_data` the answer is a seventh in size. Repeated, or separated by commas.",
    ),
    query(
        "after",
        {"type": "integer", "minimum": 0, "maximum": MAX_ID},
        "Only results with a greater `id`; with it, or with `limit`, they come in the order of their ids.",
    ),
    query("limit", {"type": "integer", "minimum": 1, "maximum": rest.MAX_RESULTS}, "At most so many; all without it."),
    query(
        "port",
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 65_535}},
        "Only these ports; repeated, or separated by commas.",
    ),
    query("service", {"type": "string", "maxLength": 200}, "Only this service, as nmap names it."),
    query("address", {"type": "string", "maxLength": 50}, "Only this address, or the addresses of this network."),
]
_RESULTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The results in order of creation, streamed; how they are written is asked for by `Accept`.",
        "model": list[rest.Result],
        "content": {
            "application/x-ndjson": {"schema": {**_RESULT, "description": "One result a line."}},
            "text/csv": {
                "schema": {"type": "string", "description": "RFC 4180, with the fields' names as its first line."}
            },
        },
    },
}


def server_sent(description: str) -> dict[str, Any]:
    """Return the schema of a stream: tools apply it to the whole text or, since OpenAPI 3.2, to each event."""
    fields = {"event": "string", "data": "string", "id": "string", "retry": "integer"}
    event = {"type": "object", "properties": {name: {"type": type_} for name, type_ in fields.items()}}
    return {"anyOf": [{"type": "string", "description": description}, event]}


_EVENTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The job's state as it is now, then each later one as it comes; the stream ends after a final one. "
        "One that ends before was cut short: ask again, and it begins with the state of then.",
        "content": {
            "text/event-stream": {
                "schema": server_sent(
                    "Server-Sent Events. `event` is the job's status, `data` is what a GET of the task "
                    "answers, in one line, `id` is the number of the state, which rises, and `retry` is when to connect "
                    "again, in milliseconds. A comment is a heartbeat."
                ),
                "example": 'event: running\ndata: {"job_id":"1","status":{"status":"running",...},"job":{...}}\nid: 3\n'
                "retry: 3000\n\n",
            },
        },
    },
    204: {
        "description": "The job has ended, and `Last-Event-ID` says that its final state was received: do not ask again."
    },
}

_ALL_EVENTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "Each unfinished job as it is now, then each change of any job, new ones included. With `Last-Event-ID` "
        "it also begins with the jobs that have ended since; a state may come twice then, with the same job and number in its "
        "`id`. A stream that ends was cut short: ask again.",
        "content": {
            "text/event-stream": {
                "schema": server_sent(
                    "Server-Sent Events as those of one job, but for the `id`: the time in milliseconds up to "
                    "which the stream has sent every change, the job's id and the number of its state. A comment is a heartbeat; "
                    "the first one follows the last job that was there at the beginning."
                ),
                "example": "retry: 3000\n\nevent: running\n"
                'data: {"job_id":"1","status":{"status":"running",...},"job":{...}}\nid: 1767225605000-1-3\nretry: 3000\n\n',
            },
        },
    },
}


@router.get(
    "",
    response_model=rest.JobList,
    responses=errors(400, 403),
    openapi_extra={"parameters": [_STATUS, _USER_ID, *_JOB_FILTERS, *paging()]},
)
async def list_tasks(request: Request, _caller: Caller, state: Handed) -> Response:
    """All scan jobs of the caller, pending ones first, then the latest start first."""
    return await state.orchestrator.forward(request)


@router.post("", status_code=201, responses=errors(400, 403, 413))
async def create_tasks(
    body: rest.CreateJobs,
    request: Request,
    caller: Caller,
    state: Handed,
    idempotency_key: IdempotencyKey = None,
) -> rest.JobsCreated:
    """Create one scan job for each subnet, all or none. After the answer the jobs can be read."""
    command = SubmitJobs(
        command_id=uuid4().hex,
        user_id=caller.user_id,
        source=source(request),
        request_id=request.scope["request_id"],
        policy_id=body.policy_id,
        subnet_ids=tuple(body.subnet_ids),
        idempotency_key=idempotency_key,
        roles=tuple(sorted(caller.roles)),
        traceparent=tracing.current(),
    )
    jobs = await state.commands.send(command, state.orchestrator, state.orchestrator.identity(request))
    return rest.JobsCreated(message="Scan jobs created successfully", jobs=list(jobs))


@router.get("/{job_id}", response_model=rest.TaskStatus, responses=errors(404))
async def read_task(job_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """A scan job's state and progress as they are now."""
    return await state.orchestrator.forward(request)


@router.delete("/{job_id}", response_model=rest.Done, responses=errors(404, 409))
async def delete_task(job_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """Delete a scan job that has ended, with its results and its ledger."""
    return await state.orchestrator.forward(request)


@streams.get("/{job_id}/events", response_class=Response, responses=_EVENTS | errors(404))
async def watch_task(
    job_id: PathId,
    request: Request,
    _caller: Caller,
    state: Handed,
    watch: Watched,
    last_event_id: LastEventId = None,
) -> Response:
    """A scan job's states and progress as they come, as Server-Sent Events."""
    now = await state.orchestrator.latest(state.orchestrator.identity(request), job_id)
    if isinstance(now, Response):
        return now
    if now.task.status.status.final and last_seq(last_event_id) >= now.seq:
        return Response(status_code=204)
    watch.begin(now)
    return JobStream(watch, job_id, request, state)


@all_streams.get("/events", response_class=Response, responses=_ALL_EVENTS | errors(400, 403))
async def watch_tasks(
    *,
    request: Request,
    _caller: Caller,
    state: Handed,
    watch: WatchedJobs,
    whose: Whose = None,
    last_event_id: LastEventId = None,
) -> Response:
    """States and progress of all scan jobs of the caller as they come, in one stream of Server-Sent Events that does not end."""
    caller = state.orchestrator.identity(request)
    first = await state.orchestrator.latest_of(caller, whose, ended_since=overlapping(last_received(last_event_id)))
    return first if isinstance(first, Response) else JobsStream(watch, first, whose, request, state)


@cancels.post("/cancel", responses=errors(400, 413))
async def cancel_tasks(body: rest.CancelJobs, request: Request, _caller: Caller, state: Handed) -> rest.JobsCancelled:
    """Cancel all of the caller's pending and running scan jobs that match every filter, or `all`; safe to repeat."""
    job_ids: list[int] = []
    more = True
    while more:
        page = await state.canceller.cancel(state.canceller.identity(request), body)
        job_ids += page.job_ids
        more = page.more
    return rest.JobsCancelled(
        message=f"{len(job_ids)} job{'' if len(job_ids) == 1 else 's'} cancelled",
        job_ids=job_ids,
    )


@cancels.post("/{job_id}/cancel", responses=errors(400, 404))
async def cancel_task(job_id: PathId, request: Request, caller: Caller, state: Handed) -> rest.Done:
    """Cancel a scan job that is pending or running. What was found until then can be read."""
    command = CancelJob(
        command_id=uuid4().hex,
        user_id=caller.user_id,
        admin=caller.admin,
        source=source(request),
        request_id=request.scope["request_id"],
        job_id=job_id,
        traceparent=tracing.current(),
    )
    await state.commands.send(command, state.canceller, state.canceller.identity(request))
    return rest.Done(message="Job cancelled successfully")


@router.get(
    "/{job_id}/results", responses=_RESULTS | errors(400, 403, 404), openapi_extra={"parameters": _RESULT_FILTERS}
)
async def read_results(job_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:
    """All results of a scan job so far, for its owner and administrators."""
    refusal = await state.orchestrator.refusal(request, job_id)
    return refusal or await state.result_store.forward(request)


@router.get(
    "/{job_id}/ledger",
    response_model=rest.Ledger,
    responses=errors(400, 404),
    openapi_extra={"parameters": paging(rest.LedgerPageSize, 100)},
)
async def read_ledger(job_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """What became of every probe of a scan job, and by name what was not probed."""
    return await state.orchestrator.forward(request)


@router.get("/{job_id}/snapshot", response_model=rest.JobSnapshot, responses=errors(404))
async def read_snapshot(job_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """What a scan job was asked for, whatever became of its subnet and policy since."""
    return await state.orchestrator.forward(request)


@router.get(
    "/{job_id}/map",
    response_model=rest.CoverageMap,
    responses=_NOT_MODIFIED | errors(400, 404, 413),
    openapi_extra={"parameters": [_PORTS, _FROM, IF_NONE_MATCH]},
)
async def read_map(job_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """What became of each address of a scan job, one letter an address, for each block of its ports."""
    return await state.orchestrator.forward(request)


@router.get("/{job_id}/waiting", response_model=rest.Waiting, responses=errors(404))
async def read_waiting(job_id: PathId, request: Request, _caller: Caller, state: Handed) -> Response:  # noqa: ARG001 # documents the path
    """Why a scan job does not progress: what no worker is scanning now, and what it waits for."""
    return await state.orchestrator.forward(request)
