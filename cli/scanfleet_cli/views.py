"""Views of jobs: progress bars, log lines and JSON lines, and the summary of an ended job."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from scanfleet.contracts import rest
from scanfleet.contracts.messages import JobStatus
from scanfleet_cli import coverage
from scanfleet_cli.output import Format, Output, count, duration, printable

if TYPE_CHECKING:
    from rich.live import Live

SILENCE_SECONDS: Final = 30.0  # maximum time between two log lines
BLOCKS: Final = 5  # maximum number of jobs shown at once
BAR: Final = 40  # maximum number of cells
_TIME: Final = "%Y-%m-%dT%H:%M:%SZ"


@dataclass(slots=True)
class Followed:
    """The current state of one job."""

    job_id: int
    task: rest.TaskStatus | None = None
    ledger: rest.Ledger | None = None
    not_probed: coverage.NotProbed = field(default_factory=coverage.NotProbed)
    """Addresses that the final ledger lists as not fully probed."""

    problem: str = ""
    """Reason why the final ledger could not be read."""

    @property
    def final(self) -> bool:
        return self.task is not None and self.task.status.status.final

    @property
    def took(self) -> float:
        """Run time of the job in seconds; 0 before its start."""
        job = self.task.job if self.task else None
        if job is None or job.start_time is None:
            return 0.0
        return ((job.end_time or datetime.now(UTC)) - job.start_time).total_seconds()


class View(Protocol):
    """Shows the progress of jobs."""

    wants_ledger: bool

    def changed(self, job: Followed) -> None:
        """Show the new state of a job."""

    def tick(self, jobs: Sequence[Followed]) -> None:
        """Refresh; called once a second."""

    def notice(self, noun: str, sentence: str) -> None:
        """Report that the connection is lost or restored."""

    def close(self) -> None:
        """Stop showing progress."""


class Silent:
    """A view that prints nothing but notices."""

    wants_ledger = False

    def __init__(self, output: Output) -> None:
        self._output = output

    def changed(self, job: Followed) -> None: ...

    def tick(self, jobs: Sequence[Followed]) -> None: ...

    def notice(self, noun: str, sentence: str) -> None:
        self._output.note(f"{noun}: {sentence}")

    def close(self) -> None: ...


class JsonLines(Silent):
    """Prints each state as a JSON line on stdout."""

    def changed(self, job: Followed) -> None:
        if job.task is not None:
            self._output.line({"kind": "task"} | job.task.model_dump(mode="json"))


class Log(Silent):
    """Prints a line on stderr for each change of status up to the end, and one after each half minute without a change.

    Args:
        output: of the command.
        silence: maximum seconds between two lines of a job.
    """

    wants_ledger = True

    def __init__(self, output: Output, silence: float = SILENCE_SECONDS) -> None:
        super().__init__(output)
        self._silence = silence
        self._shown: dict[int, tuple[JobStatus | None, float]] = {}

    def changed(self, job: Followed) -> None:
        # The summary of the ended job follows for a final state.
        if job.task is None or job.final:
            return
        if self._shown.get(job.job_id, (None, 0))[0] is not job.task.status.status:
            self._line(job)

    def tick(self, jobs: Sequence[Followed]) -> None:
        for job in jobs:
            _, when = self._shown.setdefault(job.job_id, (None, time.monotonic()))
            if not job.final and time.monotonic() - when >= self._silence:
                self._line(job)

    def notice(self, noun: str, sentence: str) -> None:
        self._output.note(f"{self._output.now().strftime(_TIME)} {noun} {sentence}")

    def _line(self, job: Followed) -> None:
        now = self._output.now().strftime(_TIME)
        status = job.task.status if job.task else None
        self._shown[job.job_id] = (status.status if status else None, time.monotonic())
        if status is None:
            self._output.note(f"{now} job {job.job_id} no state yet")
            return
        outcomes = f" {coverage.short(job.ledger)}" if job.ledger else ""
        self._output.note(f"{now} job {job.job_id} {status.status} {status.progress}%{outcomes}")


class LiveLines:
    """Lines on the terminal that are redrawn in place, below the permanent lines.

    Args:
        output: of the command.
        file: its stdout or stderr.
    """

    def __init__(self, output: Output, file: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415 # only where there is a terminal

        self._output = output
        self._console = Console(file=file, no_color=not output.coloured, highlight=False)
        self._live: Live | None = None
        output.clear = self._clear

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._console.width

    def draw(self, lines: Iterable[str]) -> None:
        """Redraw the lines."""
        from rich.text import Text  # noqa: PLC0415 # as above

        if self._live is None:
            from rich.live import Live  # noqa: PLC0415 # as above

            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.update(Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        """Erase the lines and stop redrawing."""
        self._clear()
        self._output.clear = lambda: None

    def _clear(self) -> None:
        # A permanent line that was printed below them would be erased by the next redraw.
        if self._live is not None:
            self._live.stop()
            self._live = None


class Bars(Silent):
    """Draws a progress bar for each job, redrawn in place on the terminal; the last one of an unfinished job remains."""

    wants_ledger = True

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._live_lines = LiveLines(output, output.stderr)
        self._open: list[Followed] = []

    def tick(self, jobs: Sequence[Followed]) -> None:
        self._open = [job for job in jobs if not job.final]
        self._live_lines.draw(self._blocks(self._open))

    def close(self) -> None:
        self._live_lines.close()
        for line in self._blocks([job for job in self._open if job.task is not None and not job.final]):
            self._output.note(line)

    def _blocks(self, jobs: Sequence[Followed]) -> list[str]:
        lines = [line for job in jobs[:BLOCKS] for line in self._block(job, named=len(jobs) > 1)]
        if len(jobs) > BLOCKS:
            lines.append(f"and {len(jobs) - BLOCKS} more")
        return lines

    def _block(self, job: Followed, *, named: bool) -> list[str]:
        name = f"job {job.job_id} " if named else ""
        if job.task is None:
            return [f"{name}connecting"]
        status, ledger = job.task.status, job.ledger
        looked, left = "", ""
        if ledger is not None:
            addresses = count(ledger.request.addresses, "address", "addresses")
            looked = f"{coverage.looked_at(ledger):,} of {addresses}  "
            left = f", about {duration(ledger.eta_seconds)} left" if ledger.eta_seconds else ""
        progress, tail = f" {status.progress:>3} %  ", f"  {looked}{duration(job.took)}{left}"
        cells = max(0, min(BAR, self._live_lines.width - len(f"{name}{status.status}{progress}{tail}")))
        filled = round(cells * status.progress / 100)
        bar = "█" * filled + "░" * (cells - filled)
        line = f"{name}{self._output.paint(status.status)}{progress}{bar}{tail}"
        return [line] if ledger is None else [line, " " * 9 + coverage.outcomes(ledger, self._output.paint)]


def view_for(output: Output) -> View:
    """Return the view for the format and stderr."""
    if output.format is Format.JSONL:
        return JsonLines(output)
    if output.quiet:
        return Silent(output)
    return Bars(output) if output.stderr.isatty() else Log(output)


def end_lines(followed: Followed, output: Output) -> list[str]:
    """Summarise an ended job: in one line for a log, in several on a terminal."""
    if followed.task is None:
        return []
    lines = (
        _ended(followed, followed.task, output) if output.stderr.isatty() else _logged(followed, followed.task, output)
    )
    if followed.problem:
        lines.append(f"  cannot read the ledger: {printable(followed.problem)}")
    return lines


def _logged(followed: Followed, task: rest.TaskStatus, output: Output) -> list[str]:
    ledger, status = followed.ledger, task.status
    now = output.now().strftime(_TIME)
    line = f"{now} job {task.job_id} {status.status} {status.progress}% machines={status.machines_found}"
    if ledger is not None:
        line += f" accounted={str(ledger.accounted).lower()} {coverage.short(ledger)}"
        if coverage.missing(ledger):
            return [line, f"  {coverage.proof(ledger)}: {_why(followed, task)}"]
    return [line, f"  {printable(status.error)}"] if status.error else [line]


def _ended(followed: Followed, task: rest.TaskStatus, output: Output) -> list[str]:
    ledger, status = followed.ledger, task.status
    completed = status.status is JobStatus.COMPLETED
    mark, when = ("✓", "in") if completed else ("✗", "after")
    took = f" {when} {duration(followed.took)}" if task.job.start_time and task.job.end_time else ""
    line = f"{mark} job {task.job_id} {output.paint(status.status)}{took}"
    lines = []
    if ledger is not None:
        line += f" · {coverage.proof(ledger)}" + (f": {_why(followed, task)}" if coverage.missing(ledger) else "")
        lines.append(f"         {coverage.outcomes(ledger, output.paint)}")
    elif status.error:
        line += f" · {printable(status.error)}"
    if not completed:
        lines.append(f"  scanfleet job ledger {task.job_id} --not-probed     addresses and reasons")
        lines.append(f"  scanfleet job results {task.job_id}                   results so far")
    return [line, *lines]


def _why(followed: Followed, task: rest.TaskStatus) -> str:
    return printable("; ".join(followed.not_probed.reasons) or task.status.error or task.status.status)
