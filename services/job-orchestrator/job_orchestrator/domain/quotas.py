"""Limits per job and per user. ADR 0063."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from job_orchestrator.domain.job import Plan


@dataclass(frozen=True, slots=True)
class Usage:
    """The unfinished jobs of one user: how many, and the slot seconds that they are expected to take."""

    jobs: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.jobs + other.jobs, self.seconds + other.seconds)


class QuotaError(Exception):
    """A request exceeds a quota; the message names the limit and the remedy.

    Attributes:
        temporary: the same request fits once other jobs of the user have ended.
    """

    def __init__(self, text: str, *, temporary: bool = False) -> None:
        super().__init__(text)
        self.temporary = temporary


@dataclass(frozen=True, slots=True, kw_only=True)
class Quotas:
    """The limits; `settings.QuotaSettings` describes each."""

    probes_per_job: int = 10_000_000_000
    chunks_per_job: int = 1_000_000
    unfinished_jobs_per_user: int = 10_000
    queued_seconds_per_user: float = 1_000_000_000
    subnets_per_user: int = 10_000
    policies_per_user: int = 1_000

    def check_job(self, plan: Plan) -> None:
        """Check the plan of one job.

        Raises:
            QuotaError: the job is too large.
        """
        addresses = plan.addresses - plan.excluded
        probes = addresses * plan.ports
        if probes > self.probes_per_job:
            raise QuotaError(
                f"a job of {addresses} addresses × {plan.ports} ports has {probes} probes, and the limit is "
                f"{self.probes_per_job} (SCANFLEET_PROBES_PER_JOB); use a smaller subnet or fewer ports"
            )
        if plan.chunk_count > self.chunks_per_job:
            raise QuotaError(
                f"the job would be split into {plan.chunk_count} chunks, and the limit is {self.chunks_per_job} "
                "(SCANFLEET_CHUNKS_PER_JOB); use a smaller subnet, fewer ports or a higher timing"
            )

    def check_jobs(self, usage: Usage, jobs: int) -> None:
        """Check whether a user may have this number of new jobs at all, which needs no plans.

        Raises:
            QuotaError: the user has too much, or the request alone is for too many.
        """
        if jobs > self.unfinished_jobs_per_user:
            raise QuotaError(
                f"the request makes {jobs} jobs, and a user may have {self.unfinished_jobs_per_user} unfinished jobs "
                "(SCANFLEET_UNFINISHED_JOBS_PER_USER); name fewer subnets"
            )
        if usage.jobs + jobs > self.unfinished_jobs_per_user:
            raise QuotaError(
                f"you have {usage.jobs} unfinished jobs and requested {jobs} more, and the limit is "
                f"{self.unfinished_jobs_per_user} (SCANFLEET_UNFINISHED_JOBS_PER_USER); wait until some have ended, or cancel some",
                temporary=True,
            )
        if usage.seconds >= self.queued_seconds_per_user:
            raise QuotaError(
                f"your unfinished jobs are expected to take {usage.seconds:.0f} slot seconds, and the limit is "
                f"{self.queued_seconds_per_user:.0f} (SCANFLEET_QUEUED_SECONDS_PER_USER); wait until some have ended, or "
                "cancel some",
                temporary=True,
            )

    def check_user(self, usage: Usage, plans: Sequence[Plan]) -> Usage:
        """Check the plans of new jobs of a user; return the user's usage including them.

        Raises:
            QuotaError: the user has too much, or the request alone is too much.
        """
        self.check_jobs(usage, len(plans))
        wanted = Usage(len(plans), sum(plan.estimate for plan in plans))
        if wanted.seconds > self.queued_seconds_per_user:
            raise QuotaError(
                f"the request is expected to take {wanted.seconds:.0f} slot seconds, and a user may have "
                f"{self.queued_seconds_per_user:.0f} queued (SCANFLEET_QUEUED_SECONDS_PER_USER); name fewer or smaller subnets, "
                "or fewer ports"
            )
        total = usage + wanted
        if total.seconds > self.queued_seconds_per_user:
            raise QuotaError(
                f"your unfinished jobs are expected to take {usage.seconds:.0f} slot seconds and these "
                f"{wanted.seconds:.0f} more, and the limit is {self.queued_seconds_per_user:.0f} "
                "(SCANFLEET_QUEUED_SECONDS_PER_USER); wait until some have ended, or cancel some",
                temporary=True,
            )
        return total

    def check_owned(self, kind: str, limit: int, owned: int, wanted: int) -> None:
        """Check that a user who has `owned` subnets or policies may create `wanted` more.

        Raises:
            QuotaError: the user would have more than the limit.
        """
        if owned + wanted <= limit:
            return
        asked, first = (f" and requested {wanted} more", "some") if wanted > 1 else ("", "one")
        raise QuotaError(
            f"you have {owned} {kind}{asked}, and the limit is {limit} (SCANFLEET_{kind.upper()}_PER_USER); "
            f"delete {first} first"
        )

    def admit(self, usage: Mapping[int, Usage], requests: Iterable[Request]) -> Admission:
        """Decide on requests for jobs, one after the other.

        A repeat of an admitted request under its Idempotency-Key creates no further jobs, so it is neither counted nor refused.
        """
        after = dict(usage)
        refusals: list[QuotaError | None] = []
        keys: set[tuple[int, str]] = set()
        for request in requests:
            key = (request.user_id, request.key or "")
            if request.key and key in keys:
                refusals.append(None)
                continue
            try:
                after[request.user_id] = self.check_user(after.get(request.user_id, Usage()), request.plans)
            except QuotaError as error:
                refusals.append(error)
            else:
                refusals.append(None)
                keys.add(key)
        return Admission(refusals, after)


@dataclass(frozen=True, slots=True)
class Request:
    """The plans of the jobs that a user requests."""

    user_id: int
    key: str | None
    plans: Sequence[Plan]


@dataclass(frozen=True, slots=True)
class Admission:
    """The decisions on some requests."""

    refusals: Sequence[QuotaError | None]
    """By request, in order; None if it is admitted."""
    usage: Mapping[int, Usage]
    """By user, including the admitted jobs."""

    @property
    def temporary(self) -> bool:
        """Whether one of the refused requests fits once other jobs have ended."""
        return any(refusal.temporary for refusal in self.refusals if refusal)
