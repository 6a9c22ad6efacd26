"""Following jobs to their end: one stream for each, and views that show what comes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol

from scanfleet import rest
from scanfleet.messages import JobStatus
from scanfleet_cli import calls, coverage
from scanfleet_cli.client import AsyncClient
from scanfleet_cli.errors import ApiError, Exit, UnavailableError
from scanfleet_cli.output import Format, Output, Row, count, duration, parse_time, printable
from scanfleet_cli.session import Session

if TYPE_CHECKING:
    from rich.console import RenderableType

LEDGER_SECONDS: Final = 2.0  # between two looks at the ledger of a job
SILENCE_SECONDS: Final = 30.0  # that a log is silent at most
TICK_SECONDS: Final = 1.0
BLOCKS: Final = 5  # jobs that a terminal shows at once
BAR: Final = 40  # cells
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"

BY_END: Final = {
    JobStatus.COMPLETED: Exit.DONE,
    JobStatus.FAILED: Exit.JOB_FAILED,
    JobStatus.CANCELLED: Exit.JOB_CANCELLED,
}


@dataclass(slots=True)
class Followed:
    """One job as it is seen now."""

    job_id: int
    task: rest.TaskStatus | None = None
    ledger: rest.Ledger | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def final(self) -> bool:
        return self.task is not None and self.task.status.status.final

    @property
    def took(self) -> float:
        """Seconds from the job's start until its end or now; 0 before its start."""
        job = self.task.job if self.task else None
        if job is None or job.start_time is None:
            return 0.0
        return ((job.end_time or datetime.now(UTC)) - job.start_time).total_seconds()


class View(Protocol):
    """Shows jobs while they are followed."""

    wants_ledger: bool

    def changed(self, job: Followed) -> None:
        """A job has a new state."""

    def tick(self, jobs: Sequence[Followed]) -> None:
        """A second has passed."""

    def close(self) -> None:
        """No more follows."""


class Silent:
    """Shows nothing."""

    wants_ledger = False

    def changed(self, job: Followed) -> None: ...

    def tick(self, jobs: Sequence[Followed]) -> None: ...

    def close(self) -> None: ...


class JsonLines(Silent):
    """Each state as a line on stdout."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def changed(self, job: Followed) -> None:
        if job.task is not None:
            line = {"kind": "task"} | job.task.model_dump(mode="json")
            self._output.say(json.dumps(line, separators=(",", ":")))


class Log(Silent):
    """A line on stderr for each change of status, and one after half a minute without."""

    wants_ledger = True

    def __init__(self, output: Output) -> None:
        self._output = output
        self._shown: dict[int, tuple[JobStatus, float]] = {}

    def changed(self, job: Followed) -> None:
        if job.task is not None and self._shown.get(job.job_id, (None, 0))[0] is not job.task.status.status:
            self._line(job)

    def tick(self, jobs: Sequence[Followed]) -> None:
        for job in jobs:
            shown = self._shown.get(job.job_id)
            if not job.final and shown and time.monotonic() - shown[1] >= SILENCE_SECONDS:
                self._line(job)

    def _line(self, job: Followed) -> None:
        if job.task is None:
            return
        status = job.task.status
        self._shown[job.job_id] = (status.status, time.monotonic())
        now = self._output.now().strftime(_TIME)
        outcomes = f" {coverage.short(job.ledger)}" if job.ledger else ""
        self._output.note(f"{now} job {job.job_id} {status.status} {status.progress}%{outcomes}")


class Bars(Silent):
    """A block for each job on the terminal, redrawn in place; nothing of it stays but what is printed at the end."""

    wants_ledger = True

    def __init__(self, output: Output) -> None:
        from rich.console import Console  # noqa: PLC0415 # only where there is a terminal
        from rich.live import Live  # noqa: PLC0415 # as above

        self._output = output
        console = Console(file=output.stderr, no_color=not output.coloured, highlight=False)
        self._live = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def tick(self, jobs: Sequence[Followed]) -> None:
        self._live.update(self._blocks([job for job in jobs if not job.final]), refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _blocks(self, jobs: Sequence[Followed]) -> RenderableType:
        from rich.text import Text  # noqa: PLC0415 # as above

        lines = [line for job in jobs[:BLOCKS] for line in self._block(job, named=len(jobs) > 1)]
        if len(jobs) > BLOCKS:
            lines.append(f"and {len(jobs) - BLOCKS} more")
        return Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis")

    def _block(self, job: Followed, *, named: bool) -> list[str]:
        name = f"job {job.job_id} " if named else ""
        if job.task is None:
            return [f"{name}asking"]
        status = job.task.status
        filled = round(BAR * status.progress / 100)
        line = f"{name}{self._output.paint(status.status)} {status.progress:>3} %  {'█' * filled}{'░' * (BAR - filled)}"
        if job.ledger is None:
            return [f"{line}  {duration(job.took)}"]
        looked = f"{coverage.looked_at(job.ledger):,} of {count(job.ledger.request.addresses, 'address', 'addresses')}"
        eta = job.ledger.eta_seconds
        left = f", about {duration(eta)} left" if eta else ""
        indent = " " * 9
        return [
            f"{line}  {looked}  {duration(job.took)}{left}",
            indent + coverage.outcomes(job.ledger, self._output.paint),
        ]


def view_for(output: Output) -> View:
    """The view that goes with stderr and the format."""
    if output.format is Format.JSONL:
        return JsonLines(output)
    if output.quiet:
        return Silent()
    return Bars(output) if output.stderr.isatty() else Log(output)


async def follow(
    session: Session,
    job_ids: Sequence[int],
    view: View,
    *,
    timeout: float | None = None,  # noqa: ASYNC109 # of the user, and not an error when it ends
    enough: Callable[[JobStatus], bool] = lambda status: status.final,
    each: Callable[[Followed], None] = lambda _job: None,
) -> dict[int, Followed]:
    """Follow jobs until each is in a state that is `enough`.

    Args:
        session: of the command.
        job_ids: which.
        view: shows what comes.
        timeout: seconds; when they end, the jobs are returned as they are.
        enough: whether a job need not be followed further.
        each: called for each job once it is followed no further.

    Raises:
        ApiError: a job may not be watched.
    """
    jobs = {job_id: Followed(job_id) for job_id in job_ids}
    open_ = set(job_ids)
    queue: asyncio.Queue[tuple[int, rest.TaskStatus]] = asyncio.Queue()
    until = time.monotonic() + timeout if timeout else None
    async with AsyncClient(
        session.place.url, session.token, patience=session.patience, transport=session.world.async_transport
    ) as client:
        watchers = [asyncio.create_task(_watch(client, job_id, queue, session.output)) for job_id in job_ids]
        ledgers = asyncio.create_task(_read_ledgers(client, jobs)) if view.wants_ledger else None
        try:
            while open_:
                if until is not None and time.monotonic() >= until:
                    break
                with suppress(TimeoutError):
                    job_id, task = await asyncio.wait_for(queue.get(), TICK_SECONDS)
                    jobs[job_id].task = task
                    view.changed(jobs[job_id])
                    if enough(task.status.status) and job_id in open_:
                        open_.discard(job_id)
                        each(jobs[job_id])
                view.tick(list(jobs.values()))
                for watcher in watchers:
                    if watcher.done() and (error := watcher.exception()):
                        raise error
        finally:
            view.close()
            tasks = [*watchers, *([ledgers] if ledgers else [])]
            for each_task in tasks:
                each_task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return jobs


async def _watch(
    client: AsyncClient, job_id: int, queue: asyncio.Queue[tuple[int, rest.TaskStatus]], output: Output
) -> None:
    def notice(sentence: str) -> None:
        output.note(f"job {job_id}: {printable(sentence)}")

    async for task in client.watch(job_id, notice):
        await queue.put((job_id, task))


async def _read_ledgers(client: AsyncClient, jobs: dict[int, Followed]) -> None:
    """Keep the ledgers of running jobs up to date, as far as the service answers."""
    while True:
        await asyncio.sleep(LEDGER_SECONDS)
        for job in jobs.values():
            if job.task is not None and not job.final:
                with suppress(ApiError, UnavailableError):
                    reply = await client.ask(call := calls.read_ledger(job.job_id, page_size=1), timeout=0)
                    job.ledger = reply.read(call)


def run(session: Session, job_ids: Sequence[int], view: View, **how: Any) -> dict[int, Followed]:
    """`follow`, in a loop of its own; Ctrl-C raises KeyboardInterrupt and changes no job."""
    return asyncio.run(follow(session, job_ids, view, **how))


def end_of(session: Session, job: Followed) -> rest.Ledger | None:
    """Print on stderr how a job ended; its ledger, when the service answers."""
    output, task = session.output, job.task
    if task is None:
        return None
    ledger: rest.Ledger | None = None
    with suppress(ApiError, UnavailableError):
        ledger = session.client.send(calls.read_ledger(job.job_id))
    for line in end_lines(session, task, ledger, output):
        output.note(line)
    return ledger


def end_lines(session: Session, task: rest.TaskStatus, ledger: rest.Ledger | None, output: Output) -> list[str]:
    """How a job ended: in one line for a log, in a few for a person."""
    status, job = task.status, task.job
    start, end = job.start_time, job.end_time
    took = duration((end - start).total_seconds()) if start and end else ""
    if not output.stderr.isatty():
        now = output.now().strftime(_TIME)
        line = f"{now} job {task.job_id} {status.status} {status.progress}% machines={status.machines_found}"
        if ledger is not None:
            line += f" accounted={str(ledger.accounted).lower()} {coverage.short(ledger)}"
        lines = [line]
        if ledger is not None and coverage.missing(ledger):
            lines.append(f"  {coverage.proof(ledger)}: {_why(session, task, ledger)}")
        elif status.error:
            lines.append(f"  {printable(status.error)}")
        return lines
    mark = "✓" if status.status is JobStatus.COMPLETED else "✗"
    proof = ""
    if ledger is not None:
        proof = f" · {coverage.proof(ledger)}"
        if coverage.missing(ledger):
            proof += f": {_why(session, task, ledger)}"
    elif status.error:
        proof = f" · {printable(status.error)}"
    when = "in" if status.status is JobStatus.COMPLETED else "after"
    lines = [f"{mark} job {task.job_id} {output.paint(status.status)}{f' {when} {took}' if took else ''}{proof}"]
    if ledger is not None:
        lines.append(f"         {coverage.outcomes(ledger, output.paint)}")
    if status.status is not JobStatus.COMPLETED:
        lines.append(f"  scanfleet job ledger {task.job_id} --not-probed     which, and why")
        lines.append(f"  scanfleet job results {task.job_id}                 what was found is readable")
    return lines


def _why(session: Session, task: rest.TaskStatus, ledger: rest.Ledger) -> str:
    job_id = int(task.job_id)
    with suppress(ApiError, UnavailableError):
        entries = coverage.entries(lambda page: session.client.send(calls.read_ledger(job_id, page)), ledger)
        if reasons := coverage.reasons(entries):
            return printable("; ".join(reasons))
    return printable(task.status.error or task.status.status)


def code_of(jobs: Sequence[Followed]) -> Exit:
    """The exit code by the jobs' ends: that of the worst."""
    ends = [job.task.status.status for job in jobs if job.task is not None]
    for status in (JobStatus.FAILED, JobStatus.CANCELLED):
        if status in ends:
            return BY_END[status]
    return Exit.DONE


def took(job: Row, output: Output) -> str:
    """How long a job has run, from the API's object."""
    if not job["start_time"]:
        return "-"
    end = parse_time(job["end_time"]) if job["end_time"] else output.now()
    return duration((end - parse_time(job["start_time"])).total_seconds())
