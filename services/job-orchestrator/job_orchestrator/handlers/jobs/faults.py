"""Isolate jobs that raise unexpected errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from job_orchestrator.domain.job import ScanJob
from job_orchestrator.metrics import SKIPPED_JOBS
from scanfleet.errors import DependencyError

_log = structlog.stdlib.get_logger(__name__)


class Faults:
    """The jobs that raised an unexpected error, each of which is skipped until it changes."""

    def __init__(self) -> None:
        self._faulty: dict[int, int] = {}
        """The `rev` at which each job raised its error."""

    def has(self, job: ScanJob) -> bool:
        """Return whether the current version of the job raised an unexpected error: it is skipped until it changes."""
        return self._faulty.get(job.id) == job.rev

    @contextmanager
    def isolated(self, job: ScanJob) -> Iterator[None]:
        """Isolate an unexpected error of the job from other jobs: log and count it, and skip the job."""
        try:
            yield
        except DependencyError:
            raise
        except Exception as error:  # noqa: BLE001 # an error of one job must not stop the others
            self._faulty[job.id] = job.rev
            SKIPPED_JOBS.inc()
            _log.exception("job_skipped", job_id=job.id, cause=repr(error))
