"""The rules of each resource: which bodies it accepts, how an object is shown, and when it can be deleted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Generic, Literal, TypeVar

from pydantic import BaseModel

from job_orchestrator.domain.ports import ResourceRepository, Store
from job_orchestrator.domain.proposal import Checks
from job_orchestrator.domain.quotas import Quotas
from job_orchestrator.domain.resources import Content, Owned, ScanTarget
from scanfleet.contracts import rest
from scanfleet.errors import BadRequestError, ConflictError, Rule
from scanfleet.scanning.policy import ScanPolicy
from scanfleet.scanning.targets import Target, parse_network

Body = TypeVar("Body", bound=rest.NamedBody)
Answer = TypeVar("Answer", bound=BaseModel)
Listed = TypeVar("Listed", bound=BaseModel)

_COMMON: Final = ("id", "user_id", "name", "created_at", "updated_at")


async def _allowed(_store: Store, _id: int) -> None:
    """Allow every deletion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceRules(Generic[Body, Answer, Listed, Content]):
    """The declarations in which resources differ."""

    resource: rest.Resource[Body, Answer, Listed]
    repository: Callable[[Store], ResourceRepository[Content]]
    quota: Callable[[Quotas], int]
    """The limit per user."""

    accept: Callable[[Body, Checks], Content]
    """Return the content of the body; raises `BadRequestError` if a rule refuses it."""

    show: Callable[[Content], Mapping[str, object]]
    """Return the content as fields of the response."""

    read: Callable[[Answer], Content]
    """Return the content of a response."""

    check_unused: Callable[[Store, int], Awaitable[None]] = _allowed
    """Return if the object of this id can be deleted; raises `ConflictError` otherwise."""

    @property
    def not_found(self) -> str:
        return f"{self.resource.name.capitalize()} not found"

    def view(self, owned: Owned[Content]) -> Answer:
        """Return the object as the API shows it."""
        common = {name: getattr(owned, name) for name in _COMMON}
        return self.resource.answer.model_validate(common | dict(self.show(owned.content)))

    def viewed(self, view: Answer) -> Owned[Content]:
        """Return the object that the API shows like this."""
        common = {name: getattr(view, name) for name in _COMMON}
        return Owned(content=self.read(view), **common)


def scan_target(body: rest.SubnetBody, checks: Checks) -> ScanTarget:
    """Return the network and its exclusions in canonical form.

    Raises:
        BadRequestError: one of them is not a network, or must not be scanned. The message begins with the invalid field.
    """
    target = parsed_target(body.cidr, body.exclude)
    if refusal := checks.rules.refusal(target.network):
        raise _wrong("cidr", refusal, body.cidr)
    return ScanTarget(str(target.network), target.exclude)


def parsed_target(cidr: str, exclude: Sequence[str] | None) -> Target:
    """Return the networks of a request.

    Raises:
        BadRequestError: one of them is not a network, or every address is excluded. The message begins with the invalid field.
    """
    try:
        parse_network(cidr)
    except ValueError as error:
        raise _wrong("cidr", str(error), cidr) from error
    try:
        return Target.parse(cidr, exclude or ())
    except ValueError as error:
        raise _wrong("exclude", str(error), cidr) from error


def _wrong(field: Literal["cidr", "exclude"], reason: str, cidr: str) -> BadRequestError:
    return BadRequestError(f"{field}: {reason}", rule=Rule.TARGETS, target=cidr)


async def _without_unfinished_jobs(store: Store, subnet_id: int) -> None:
    if await store.jobs.has_unfinished(subnet_id):
        raise ConflictError("Subnet has unfinished jobs")


SUBNETS: Final = ResourceRules(
    resource=rest.SUBNETS,
    repository=lambda store: store.subnets,
    quota=lambda quotas: quotas.subnets_per_user,
    accept=scan_target,
    show=asdict,
    read=lambda view: ScanTarget(view.cidr, tuple(view.exclude)),
    check_unused=_without_unfinished_jobs,
)
POLICIES: Final = ResourceRules(
    resource=rest.POLICIES,
    repository=lambda store: store.policies,
    quota=lambda quotas: quotas.policies_per_user,
    accept=lambda body, checks: body.scan(checks.scripts),
    show=ScanPolicy.model_dump,
    read=lambda view: ScanPolicy.model_validate(view.model_dump()),
)
