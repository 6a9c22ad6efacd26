"""The results of a task, streamed as JSON, NDJSON or CSV."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import islice
from typing import Annotated, Final, Self

from fastapi import APIRouter, Request, Response

from result_store.api.formats import Fields, negotiate, stream, write
from result_store.api.queries import network_in, owner
from result_store.api.state import StoreDep
from result_store.api.turns import ItsTurn
from scanfleet.contracts import queries
from scanfleet.contracts.rest import Result
from scanfleet.runtime.http.requests import PathId, parsed
from scanfleet.scanning.targets import Network
from scanfleet.security.auth import AuthenticatedRoute, Caller

ALL_FIELDS: Final[Fields] = tuple(Result.model_fields)
_ROWS: Final = 500  # results of a host between two pauses; a host may have 65,536


@dataclass(frozen=True, slots=True)
class ResultSelection:
    """Which of a job's results are requested."""

    after: int | None = None
    limit: int | None = None
    ports: frozenset[int] = frozenset()
    """Empty selects every port."""

    service: str | None = None
    addresses: Network | None = None

    @classmethod
    def of_query(cls, query: queries.Results) -> Self:
        """Return the selection of a query.

        Raises:
            BadRequestError: `address` is not an address or a network.
        """
        by_id = query.after is not None or query.limit is not None
        after = (query.after or 0) if by_id else None
        return cls(after, query.limit, frozenset(query.port), query.service, network_in(query.address))

    def __contains__(self, result: Result) -> bool:
        return (
            (self.after is None or result.id > self.after)
            and (not self.ports or result.port in self.ports)
            and (self.service is None or result.service == self.service)
        )

    async def of(self, results: AsyncIterator[Iterable[Result]]) -> AsyncIterator[list[Result]]:
        """Yield the selected results, at most `_ROWS` of one host at a time and at most `limit` in all."""
        left = self.limit
        async for host in results:
            rows = self._within_addresses(host)
            more = True
            while more:
                await asyncio.sleep(0)  # hosts come in pages: without it, other requests would wait for all of one
                some = list(islice(rows, _ROWS))
                more = len(some) == _ROWS
                found = [result for result in some if result in self][:left]
                yield found
                if left is not None:
                    left -= len(found)
                    if not left:
                        return

    def _within_addresses(self, host: Iterable[Result]) -> Iterator[Result]:
        """Yield the results of a host, none if its address is not selected."""
        results = iter(host)
        first = next(results, None)
        if first is not None and (self.addresses is None or ip_address(first.ip_address) in self.addresses):
            yield first
            yield from results


router = APIRouter(route_class=AuthenticatedRoute)


@router.get("/api/v1/task/{job_id}/results")
async def results(
    *,
    job_id: PathId,
    caller: Caller,
    request: Request,
    turn: ItsTurn,
    store: StoreDep,
    query: Annotated[queries.Results, parsed(queries.Results)],
) -> Response:
    """Stream the selected results of the task in order of creation, limited to those that the caller owns.

    Only the orchestrator stores whether the task exists and who owns it; the gateway asks the orchestrator first.
    """
    form = negotiate(",".join(request.headers.getlist("accept")))
    fields = tuple(name for name in ALL_FIELDS if name in query.fields) or ALL_FIELDS
    selection = ResultSelection.of_query(query)
    raw = "raw_data" in fields
    found = store.results(job_id, owner(caller), after=selection.after, raw=raw, within=selection.addresses)
    pieces = write(form, selection.of(found), fields)
    return await stream(turn, pieces, form.media_type)
