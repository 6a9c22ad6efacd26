"""Scan jobs: their creation, cancellation, streams of events, and results."""

from __future__ import annotations

from typing import Annotated, Any, Final
from uuid import uuid4

from fastapi import APIRouter, Header, Request, Response

from api_gateway.api.admission import CancelRoute, Route, StreamRoute
from api_gateway.api.events import (
    JobsStream,
    JobsSubscription,
    JobStream,
    JobSubscription,
    last_received,
    last_seq,
    overlapping,
)
from api_gateway.api.keys import SentKey
from api_gateway.api.openapi import errors, query, server_sent
from api_gateway.api.state import StateDep
from scanfleet.contracts import queries, rest
from scanfleet.contracts.messages import SubmitJobs
from scanfleet.runtime import tracing
from scanfleet.runtime.http.requests import PathId, parsed, source
from scanfleet.security.auth import Caller

router = APIRouter(prefix="/api/v1/task", tags=["task"], route_class=Route)
cancels = APIRouter(prefix="/api/v1/task", tags=["task"], route_class=CancelRoute)
streams = APIRouter(prefix="/api/v1/task", tags=["task"], route_class=StreamRoute)
all_streams = APIRouter(prefix="/api/v1", tags=["task"], route_class=StreamRoute)

LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", description="The `id` of the last received event; browsers send it automatically."),
]

_RESULT: Final = {"$ref": "#/components/schemas/Result"}
_HOST: Final = {"$ref": "#/components/schemas/Host"}
_HOSTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The hosts in order of their addresses, streamed, in the format of `Accept`.",
        "model": list[rest.Host],
        "content": {
            "application/x-ndjson": {
                "schema": {**_HOST, "description": "One host per line. A line may be blank after a long search."}
            }
        },
    },
}
_NMAP_XML: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The document, streamed; one that was cut off has no end tag.",
        "headers": {
            "Content-Disposition": {"description": "`attachment`, with a file name.", "schema": {"type": "string"}},
        },
        "content": {"application/xml": {"schema": {"type": "string", "description": "Conforms to nmap's `nmap.dtd`."}}},
    },
}
_RESULTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The results in order of creation, streamed, in the format of `Accept`.",
        "model": list[rest.Result],
        "content": {
            "application/x-ndjson": {
                "schema": {**_RESULT, "description": "One result per line. A line may be blank after a long search."}
            },
            "text/csv": {
                "schema": {
                    "type": "string",
                    "description": "RFC 4180, with the names of the fields in the first line. With few `fields`, "
                    "blank lines may follow while a search finds nothing for a minute.",
                }
            },
        },
    },
}


_EVENTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The current state of the job, then each later one; the stream ends after a final state. If it ends earlier, "
        "reconnect: the new stream begins with the current state.",
        "content": {
            "text/event-stream": {
                "schema": server_sent(
                    "Server-Sent Events. `event` is the job's status, `data` the response to a GET of the task in "
                    "one line, `id` the increasing number of the state, and `retry` the reconnection delay in "
                    "milliseconds. Comments are heartbeats."
                ),
                "example": 'event: running\ndata: {"job_id":"1","status":{"status":"running",...},"job":{...}}\nid: 3\n'
                "retry: 3000\n\n",
            },
        },
    },
    204: {
        "description": "The job has ended, and the client has received its final state, by `Last-Event-ID`: do not reconnect."
    },
}

_ALL_EVENTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The current state of each unfinished job, then each change of any job, including new ones. With "
        "`Last-Event-ID` also each job that has ended since; a state may be repeated, with the same job and number in its `id`. "
        "If the stream ends, reconnect.",
        "content": {
            "text/event-stream": {
                "schema": server_sent(
                    "Server-Sent Events as of one job, except the `id`: the time in milliseconds up to which the "
                    "stream has sent every change, the job's id and the number of its state. Comments are heartbeats; the first "
                    "one follows the last of the initial states."
                ),
                "example": "retry: 3000\n\nevent: running\n"
                'data: {"job_id":"1","status":{"status":"running",...},"job":{...}}\nid: 1767225605000-1-3\nretry: 3000\n\n',
            },
        },
    },
}


@router.post("", status_code=201, responses=errors(400, 403, 413))
async def create_tasks(
    body: rest.CreateJobs,
    request: Request,
    caller: Caller,
    state: StateDep,
    idempotency_key: SentKey,
) -> rest.JobsCreated:
    """Create one scan job for each subnet, all or none. The jobs can be read once the response is received."""
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


@router.post("/estimate", response_model=rest.Estimate, responses=errors(400, 404, 413))
async def estimate_task(body: rest.EstimateBody, request: Request, _caller: Caller, state: StateDep) -> Response:  # noqa: ARG001 # documents the body
    """Estimate a scan of one subnet, with every reason for which a request for it would be refused now. Creates nothing."""
    return await state.orchestrator.forward(request, with_roles=True)


@streams.get("/{job_id}/events", response_class=Response, responses=_EVENTS | errors(404))
async def watch_task(
    job_id: PathId,
    request: Request,
    _caller: Caller,
    state: StateDep,
    subscription: JobSubscription,
    last_event_id: LastEventId = None,
) -> Response:
    """Stream states and progress of a scan job as Server-Sent Events."""
    now = await state.orchestrator.latest(state.orchestrator.identity(request), job_id)
    if isinstance(now, Response):
        return now
    if now.task.status.status.final and last_seq(last_event_id) >= now.seq:
        return Response(status_code=204)
    subscription.begin(now)
    return JobStream(subscription, job_id, request, state)


@all_streams.get(
    "/events",
    response_class=Response,
    responses=_ALL_EVENTS | errors(400, 403),
    openapi_extra={"parameters": query(queries.Events)},
)
async def watch_tasks(
    *,
    request: Request,
    _caller: Caller,
    state: StateDep,
    subscription: JobsSubscription,
    selected: Annotated[queries.Events, parsed(queries.Events)],
    last_event_id: LastEventId = None,
) -> Response:
    """Stream states and progress of all scan jobs of the caller as Server-Sent Events, without an end."""
    caller = state.orchestrator.identity(request)
    first = await state.orchestrator.latest_of(
        caller, queries.LatestJobs(user_id=selected.user_id, ended_since=overlapping(last_received(last_event_id)))
    )
    return first if isinstance(first, Response) else JobsStream(subscription, first, selected.user_id, request, state)


@cancels.post("/cancel", responses=errors(400, 413))
async def cancel_tasks(body: rest.CancelJobs, request: Request, _caller: Caller, state: StateDep) -> rest.JobsCancelled:
    """Cancel the caller's pending and running scan jobs that match every filter, or `all` of them; idempotent."""
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


@cancels.post("/{job_id}/cancel", response_model=rest.Done, responses=errors(400, 404))
async def cancel_task(job_id: PathId, request: Request, _caller: Caller, state: StateDep) -> Response:  # noqa: ARG001 # documents the path
    """Cancel a pending or running scan job. Its results so far can be read."""
    return await state.canceller.forward(request)


@router.get(
    "/{job_id}/results",
    responses=_RESULTS | errors(400, 403, 404),
    openapi_extra={"parameters": query(queries.Results)},
)
async def read_results(job_id: PathId, request: Request, _caller: Caller, state: StateDep) -> Response:
    """Read the results of a scan job so far; for its owner and administrators."""
    refusal = await state.orchestrator.refusal(request, job_id)
    return refusal or await state.result_store.forward(request)


@router.get(
    "/{job_id}/hosts", responses=_HOSTS | errors(400, 403, 404, 409), openapi_extra={"parameters": query(queries.Hosts)}
)
async def read_hosts(job_id: PathId, request: Request, _caller: Caller, state: StateDep) -> Response:
    """Read the hosts of a scan job so far: each address that answered, or that has a port that is open or open|filtered.

    For the job's owner and administrators. The map has the outcomes of all other addresses. Of a job of release 0.1 only the
    results can be read: 409.
    """
    refusal = await state.orchestrator.refusal(request, job_id, hosts=True)
    return refusal or await state.result_store.forward(request)


@router.get(
    "/{job_id}/nmap.xml",
    response_class=Response,
    responses=_NMAP_XML | errors(400, 403, 404, 409),
    openapi_extra={"parameters": query(queries.NmapXml)},
)
async def read_nmap_xml(
    job_id: PathId,
    request: Request,
    _caller: Caller,
    state: StateDep,
    selected: Annotated[queries.NmapXml, parsed(queries.NmapXml)],
) -> Response:
    """Read all results of a scan job that has ended as one document in nmap's XML format; for its owner and administrators.

    Before the end of the job the response is 409, as for a job of release 0.1.
    """
    job = await state.orchestrator.exported(request, job_id)
    if isinstance(job, Response):
        return job
    target = f"/internal/jobs/{job_id}/nmap.xml?hosts={selected.hosts}"
    return await state.result_store.pass_on(request, target, job.model_dump_json().encode())
