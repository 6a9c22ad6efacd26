"""Follow jobs to their final state: streams, time limits, Ctrl-C and final ledgers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import click

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet_cli import calls, changes, coverage
from scanfleet_cli.client import AsyncClient, parse_json
from scanfleet_cli.errors import ApiError, CommandError, Exit, UnavailableError
from scanfleet_cli.output import Row, printable
from scanfleet_cli.session import Session, many_failed
from scanfleet_cli.views import Followed, View, end_lines

LEDGER_SECONDS: Final = 2.0  # interval of reading the ledger of a running job
TICK_SECONDS: Final = 1.0

BY_END: Final = {
    JobStatus.COMPLETED: Exit.DONE,
    JobStatus.FAILED: Exit.JOB_FAILED,
    JobStatus.CANCELLED: Exit.JOB_CANCELLED,
}

timeout_option = click.option(
    "--timeout", metavar="TIME", help="Stop waiting after 90, 90s, 30m or 2h and exit 124; the job continues."
)
found_option = click.option("--found", is_flag=True, help="Print results as soon as they are found.")
cancel_option = click.option("--cancel-on-interrupt", is_flag=True, help="Cancel the jobs on Ctrl-C.")


def seconds(text: str | None) -> float | None:
    """Parse `90`, `90s`, `30m` or `2h` to seconds.

    Raises:
        CommandError: the text is invalid, or not above 0.
    """
    if text is None:
        return None
    units = {"s": 1, "m": 60, "h": 3_600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        value = float(number) * unit
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise CommandError(f"--timeout: {text} is not a positive duration", hint="for example 90, 90s, 30m or 2h")
    return value


def to_the_end(
    session: Session,
    job_ids: Sequence[int],
    view: View,
    limit_seconds: float | None,
    *,
    cancel: bool = False,
    enough: Callable[[JobStatus], bool] = lambda status: status.final,
    ended: Callable[[Followed], None] | None = None,
    found: Callable[[Row], None] | None = None,
    query: Mapping[str, Any] | None = None,
    owner: int | None = None,
) -> list[Followed]:
    """Follow jobs to their final state; Ctrl-C and the time limit leave them running, unless `cancel` is set.

    If every job has ended before it could be cancelled, Ctrl-C changes nothing.

    Args:
        session: of the command.
        job_ids: of the jobs.
        view: shows their progress.
        limit_seconds: time limit.
        cancel: whether Ctrl-C cancels the jobs.
        enough: whether a job in this state is followed no further.
        ended: called for each final job once its ledger was read.
        found: called for results while the jobs run; the caller reads those of the last seconds.
        query: of the results; an older service ignores it.
        owner: user id of the owner of the jobs, if known.

    Raises:
        CommandError: the time limit expired, or a cancellation failed.
        KeyboardInterrupt: on Ctrl-C.
    """
    following = _Following(session, job_ids, view, enough, ended, query=query or {}, owner=owner)
    try:
        jobs = asyncio.run(following.run(limit_seconds, found))
    except KeyboardInterrupt:
        if not cancel:
            changes.note_continuing(session, job_ids)
            raise
        session.output.note(f"cancelling {' '.join(map(str, job_ids))}")
        cancelled, errors = changes.cancel_each(session, job_ids, pass_over_ended=True)
        many_failed(errors, session.output)
        if cancelled:
            raise
        jobs = asyncio.run(following.run(limit_seconds, found))
    if late := [job for job in jobs if job.task is None or not enough(job.task.status.status)]:
        raise _gave_up(late[0], limit_seconds or 0.0)
    return jobs


def _gave_up(late: Followed, limit_seconds: float) -> CommandError:
    status = late.task.status if late.task else None
    state = f"still {status.status} ({status.progress} %)" if status else "has sent no state yet"
    return CommandError(
        f"job {late.job_id} {state}, gave up waiting after {_given(limit_seconds)}",
        Exit.TIMED_OUT,
        hint=f"scanfleet job watch {late.job_id}",
    )


def _given(limit_seconds: float) -> str:
    """Format seconds as `--timeout` takes them: `90s`, `30m` or `2h`."""
    size, unit = next((each for each in ((3_600, "h"), (60, "m")) if limit_seconds % each[0] == 0), (1, "s"))
    return f"{limit_seconds / size:g}{unit}"


class _Following:
    """Follows jobs in one event loop."""

    def __init__(
        self,
        session: Session,
        job_ids: Sequence[int],
        view: View,
        enough: Callable[[JobStatus], bool],
        ended: Callable[[Followed], None] | None,
        *,
        query: Mapping[str, Any],
        owner: int | None,
    ) -> None:
        self._session = session
        self._jobs = {job_id: Followed(job_id) for job_id in job_ids}
        self._open = set(job_ids)
        self._view = view
        self._enough = enough
        self._ended = ended
        self._query = query
        self._owner = owner
        self._news: asyncio.Queue[rest.TaskStatus | Followed]
        self._tasks: list[asyncio.Task[None]]

    async def run(self, limit_seconds: float | None, found: Callable[[Row], None] | None) -> list[Followed]:
        """Follow the jobs until none is open, for up to `limit_seconds`; another call continues with the others.

        Raises:
            ApiError: a job may not be watched.
        """
        session = self._session
        self._news, self._tasks = asyncio.Queue(), []
        until = time.monotonic() + limit_seconds if limit_seconds is not None else None
        async with AsyncClient(
            session.endpoint.url,
            session.token,
            refused=session.token_refused,
            patience=session.patience,
            notice=session.repeated,
            transport=session.effects.async_transport,
        ) as client:
            self._start(self._watch(client))
            if self._view.wants_ledger:
                self._start(self._read_ledgers(client))
            if found is not None:
                self._start(self._read_found(client, found))
            try:
                while self._open and (until is None or time.monotonic() < until):
                    with suppress(TimeoutError):
                        self._take(await asyncio.wait_for(self._news.get(), TICK_SECONDS), client)
                        while not self._news.empty():  # one redraw for all of them
                            self._take(self._news.get_nowait(), client)
                    self._view.tick(list(self._jobs.values()))
                    for task in self._tasks:
                        if task.done() and (error := task.exception()):
                            raise error
                self._give_up_ledgers()
            finally:
                self._view.close()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
        return list(self._jobs.values())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    def _take(self, news: rest.TaskStatus | Followed, client: AsyncClient) -> None:
        """Handle a new state of a job, or a job whose final ledger was read."""
        if isinstance(news, Followed):
            self._open.discard(news.job_id)
            if self._ended is not None:
                self._ended(news)
            return
        job = self._jobs[news.job.id]
        if job.job_id not in self._open:
            return
        job.task = news
        self._view.changed(job)
        if self._ended is not None and job.final:
            self._start(self._read_end(client, job))
        elif self._ended is None and self._enough(news.status.status):
            self._open.discard(job.job_id)

    def _give_up_ledgers(self) -> None:
        """Report the final jobs whose ledger was not read in time."""
        for job_id in self._open:
            job = self._jobs[job_id]
            if self._ended is not None and job.final:
                job.problem = "no response before --timeout expired"
                self._ended(job)

    async def _watch(self, client: AsyncClient) -> None:
        """Queue each state: of one job from its own stream, of several from the stream of all jobs."""
        first, *others = self._jobs
        noun = f"{len(self._jobs)} jobs" if others else f"job {first}"

        def notice(sentence: str) -> None:
            self._view.notice(noun, printable(sentence))

        tasks = client.watch_jobs(list(self._jobs), notice, self._owner) if others else client.watch(first, notice)
        async for task in tasks:
            await self._news.put(task)

    async def _read_ledgers(self, client: AsyncClient) -> None:
        """Update the ledgers of running jobs while the service is available."""
        while True:
            await asyncio.sleep(LEDGER_SECONDS)
            for job in self._jobs.values():
                if job.task is not None and not job.final:
                    # Optional for a progress bar; the watch reports the failure.
                    with suppress(ApiError, UnavailableError):
                        reply = await client.ask(call := calls.read_ledger(job.job_id, page_size=1, after=0), timeout=0)
                        ledger = reply.read(call)
                        if not job.final:  # else the job has ended in between, and `_read_end` reads its final ledger
                            job.ledger = ledger

    async def _read_found(self, client: AsyncClient, found: Callable[[Row], None]) -> None:
        """Poll the new results of running jobs."""
        newest = dict.fromkeys(self._jobs, 0)
        while True:
            await asyncio.sleep(self._session.patience.poll_seconds)
            for job_id in [each.job_id for each in self._jobs.values() if each.task is not None and not each.final]:
                with suppress(ApiError, UnavailableError):  # the next poll reads them
                    call = calls.read_results(job_id, after=newest[job_id], **self._query)
                    async with client.stream(call, timeout=0) as response:
                        async for line in response.aiter_lines():
                            if line.isspace():  # sent while a long search finds nothing
                                continue
                            row = parse_json(line)
                            newest[job_id] = row["id"]
                            found(row)

    async def _read_end(self, client: AsyncClient, job: Followed) -> None:
        """Read the final ledger of a job with the reasons of its pages, and queue the job."""
        job.ledger = None
        try:
            job.not_probed = coverage.NotProbed()
            while job.not_probed.after is not None:
                ledger = await client.send(calls.read_ledger(job.job_id, after=job.not_probed.after))
                job.not_probed.add(ledger)
            job.ledger = ledger
        except (ApiError, UnavailableError) as error:
            job.problem = str(error)
        await self._news.put(job)


def print_end(session: Session, job: Followed) -> None:
    """Print the summary of an ended job on stderr."""
    for line in end_lines(job, session.output):
        session.output.note(line)


def code_of(jobs: Sequence[Followed]) -> Exit:
    """Return the exit code of the worst final state."""
    ends = [job.task.status.status for job in jobs if job.task is not None]
    for status in (JobStatus.FAILED, JobStatus.CANCELLED):
        if status in ends:
            return BY_END[status]
    return Exit.DONE
