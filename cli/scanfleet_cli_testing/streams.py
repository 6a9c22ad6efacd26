"""Streamed bodies of the fake API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

import httpx2

from scanfleet_cli_testing.jobs import FakeJob


class Jobs(Protocol):
    """The state of the API that its streams read."""

    jobs: dict[int, FakeJob]
    cut_after: int | None


class Events(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """The remaining states of a job; each read advances it."""

    def __init__(self, api: Jobs, job: FakeJob) -> None:
        self._api = api
        self._job = job

    def __iter__(self) -> Iterator[bytes]:
        api, job, sent = self._api, self._job, 0
        while True:
            if api.cut_after is not None and sent == api.cut_after:
                api.cut_after = None
                raise httpx2.RemoteProtocolError("peer closed connection without sending complete message body")
            data = job.task.model_dump_json()
            yield f"event: {job.status}\ndata: {data}\nid: {job.seq}\nretry: 3000\n\n".encode()
            sent += 1
            if job.status.final or job.seq == len(job.states):
                return
            job.seq += 1

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            await asyncio.sleep(0)
            yield piece
            if self._job.seq == len(self._job.states) and not self._job.status.final:
                await asyncio.Event().wait()  # the job continues


class AllEvents(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """The unfinished jobs, then each of their states; the stream does not end, and a blocking read times out."""

    def __init__(self, api: Jobs) -> None:
        self._api = api

    def __iter__(self) -> Iterator[bytes]:
        yield from self._events()
        raise httpx2.ReadTimeout("no event")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in self._events():
            await asyncio.sleep(0)
            yield event
        await asyncio.Event().wait()

    def _events(self) -> Iterator[bytes]:
        api, sent = self._api, 0
        changing = [job for job in api.jobs.values() if not job.status.final]
        yield b"retry: 3000\n\n"
        while changing:
            for job in changing:
                if api.cut_after is not None and sent == api.cut_after:
                    api.cut_after = None
                    raise httpx2.RemoteProtocolError("peer closed connection without sending complete message body")
                yield f"event: {job.status}\ndata: {job.task.model_dump_json()}\nid: 1-{job.id}-{job.seq}\n\n".encode()
                sent += 1
            changing = [job for job in changing if job.seq < len(job.states) and not job.status.final]
            for job in changing:
                job.seq += 1


class Lines(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            yield line.encode()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for line in self._lines:
            yield line.encode()
