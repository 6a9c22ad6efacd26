"""The ports of the handlers and the routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from typing import Protocol

from result_store.domain.results import ClosedChunk, Erased, Host, Parts, Removed, StoredHost
from scanfleet.contracts.rest import Result
from scanfleet.scanning.targets import Network


class Store(Protocol):
    """Store of hosts and closed chunks. Documents never change after insertion, so every call is idempotent.

    Raises:
        DependencyError: from every method, if the store is unavailable.
    """

    async def add(self, hosts: Sequence[Host]) -> int:
        """Store each host whose chunk and address are not stored yet; return the number of new hosts."""

    async def stored(self, chunk_ids: Collection[str]) -> dict[str, list[StoredHost]]:
        """Return the hosts of each of these chunks."""

    async def close(self, chunks: Sequence[ClosedChunk]) -> dict[str, ClosedChunk]:
        """Close these chunks; return those that were already closed, as `closed` does."""

    async def closed(self, chunk_ids: Collection[str]) -> dict[str, ClosedChunk]:
        """Return those of these chunks that are closed, with their ids, first addresses and outcomes.

        Other fields may be empty.
        """

    async def begin_deletions(self, job_ids: Collection[int]) -> None:
        """Mark these jobs as deleted, so that `erase` is called for them, again if it was before."""

    async def deleted(self, job_ids: Collection[int]) -> set[int]:
        """Return those of these jobs that are marked as deleted."""

    async def open_deletions(self, limit: int) -> dict[int, int]:
        """Return the jobs to erase, each with the number of times that its deletion began."""

    async def postpone_deletion(self, job_id: int, seconds: float) -> None:
        """Leave the job out of `open_deletions` for so many seconds."""

    async def erase(self, job_id: int, limit: int) -> Removed:
        """Delete up to `limit` documents of a job that is marked as deleted, closed chunks last; return how many."""

    async def erased(self, job_id: int) -> Erased:
        """Return the numbers of deleted documents and results of a job marked as deleted, each counted once."""

    async def end_deletion(self, job_id: int, begun: int) -> None:
        """Record that no document of the job is left, unless its deletion has begun again since."""


class Results(Protocol):
    def results(
        self,
        job_id: int,
        user_id: int | None,
        *,
        after: int | None = None,
        raw: bool = True,
        within: Network | None = None,
    ) -> AsyncIterator[Iterable[Result]]:
        """Yield the job's results in order of creation, host by host.

        Args:
            job_id: the job.
            user_id: limits the results to those of this user.
            after: skips the hosts that have no result with a higher id, and yields the others in order of their ids.
            raw: include `raw_data`; without it, the field is empty.
            within: permits to skip the hosts at other addresses.

        Raises:
            NotFoundError: the job is deleted; no page that may lack results is yielded.
            DependencyError: the store is unavailable; it can fail after some results were yielded.
        """


class Hosts(Protocol):
    def hosts_by_address(
        self,
        job_id: int,
        user_id: int | None,
        parts: Parts,
        *,
        after: str | None = None,
        within: Network | None = None,
    ) -> AsyncIterator[Host]:
        """Yield the job's hosts with findings in order of their addresses, those of one address in order of their chunks.

        Args:
            job_id: the job.
            user_id: limits the hosts to those of this user.
            parts: the fields to read; others have their defaults.
            after: skips the hosts up to this address.
            within: skips the hosts at other addresses.

        Raises:
            NotFoundError: the job is deleted; no page that may lack hosts is yielded.
            DependencyError: the store is unavailable; it can fail after some hosts were yielded.
        """

    async def is_unsorted(self, job_id: int) -> bool:
        """Return whether a release without keys has stored a part of the job, which readers by address cannot find.

        Raises:
            DependencyError: the store is unavailable.
        """


class Findings(Results, Hosts, Protocol):
    def chunks_by_address(self, job_id: int, user_id: int | None) -> AsyncIterator[ClosedChunk]:
        """Yield the job's closed chunks in order of their first addresses, those of one address in order of their numbers.

        Args:
            job_id: the job.
            user_id: limits the chunks to those of this user.

        Raises:
            NotFoundError: the job is deleted; no page that may lack chunks is yielded.
            DependencyError: the store is unavailable; it can fail after some chunks were yielded.
        """
