"""The results of a task, streamed as JSON, NDJSON or CSV."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import chain, islice
from typing import Annotated, Final, cast

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse

from result_store.api.formats import Fields, negotiate, stream, write
from result_store.api.queries import AddressText, ServiceName, network_in, owner, ports_in
from result_store.domain.ports import Results
from scanfleet.contracts.messages.fields import MAX_ID
from scanfleet.contracts.rest import MAX_RESULTS, Result
from scanfleet.errors import BadRequestError
from scanfleet.runtime.service import PathId, words
from scanfleet.scanning.targets import Network
from scanfleet.security.auth import Caller, Guarded

ALL_FIELDS: Final[Fields] = tuple(Result.model_fields)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of a job's results are requested."""

    after: int | None = None
    limit: int | None = None
    ports: frozenset[int] = frozenset()
    """Empty selects every port."""

    service: str | None = None
    addresses: Network | None = None

    def __contains__(self, result: Result) -> bool:
        return (
            (self.after is None or result.id > self.after)
            and (not self.ports or result.port in self.ports)
            and (self.service is None or result.service == self.service)
        )

    def _of_host(self, some: Iterable[Result]) -> Iterator[Result]:
        """Yield the selected results of one host."""
        results = iter(some)
        first = next(results, None)
        if first is not None and (self.addresses is None or ip_address(first.ip_address) in self.addresses):
            yield from (result for result in chain((first,), results) if result in self)

    async def of(self, results: AsyncIterator[Iterable[Result]]) -> AsyncIterator[Iterator[Result]]:
        """Yield the selected results, host by host and one at a time, at most `limit`."""
        left = self.limit
        async for some in results:
            found = self._of_host(some)
            if left is None:
                yield found
                continue
            page = list(islice(found, left))
            left -= len(page)
            yield iter(page)
            if not left:
                return


async def _store(request: Request) -> Results:  # without async the framework would use a thread
    return cast(Results, request.app.state.store)


router = APIRouter(route_class=Guarded)


async def _selection(
    request: Request,
    after: Annotated[int | None, Query(ge=0, le=MAX_ID)] = None,
    limit: Annotated[int | None, Query(ge=1, le=MAX_RESULTS)] = None,
    service: ServiceName = None,
    address: AddressText = None,
) -> Selection:
    by_id = after is not None or limit is not None
    return Selection((after or 0) if by_id else None, limit, ports_in(request), service, network_in(address))


async def _fields(request: Request) -> Fields:
    wanted = words(request, "fields")
    if not set(wanted) <= set(ALL_FIELDS):
        raise BadRequestError(f"fields must be of {', '.join(ALL_FIELDS)}")
    return tuple(name for name in ALL_FIELDS if name in wanted) or ALL_FIELDS


@router.get("/api/v1/task/{job_id}/results")
async def results(
    *,
    job_id: PathId,
    caller: Caller,
    request: Request,
    store: Annotated[Results, Depends(_store)],
    selection: Annotated[Selection, Depends(_selection)],
    fields: Annotated[Fields, Depends(_fields)],
) -> StreamingResponse:
    """Stream the selected results of the task in order of creation, limited to those that the caller owns.

    Only the orchestrator stores whether the task exists and who owns it; the gateway asks the orchestrator first.
    """
    form = negotiate(",".join(request.headers.getlist("accept")))
    found = store.results(job_id, owner(caller), after=selection.after, raw="raw_data" in fields)
    pieces = write(form, selection.of(found), fields)
    return await stream(pieces, form.media_type)
