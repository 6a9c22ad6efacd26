"""Subnets and policies, and the declaration of a resource."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from scanfleet.contracts.rest.base import Answer, Body, NamedBody
from scanfleet.errors import BadRequestError
from scanfleet.scanning import policy as vocabulary
from scanfleet.scanning.policy import PolicyError, Preset, ScanPolicy, fill_in

MAX_EXCLUDES = 1_000  # per subnet: its document stays small and readable
MAX_IMPORT_LINES = 1_000

# Subnets


Cidr = Annotated[str, Field(max_length=50)]
Exclude = Annotated[
    list[Cidr] | None,
    Field(
        max_length=MAX_EXCLUDES,
        description="Networks to exclude; those outside the subnet have no effect, and the response shows the "
        "others merged.",
    ),
]


class SubnetBody(NamedBody):
    cidr: Cidr
    exclude: Exclude = []  # noqa: RUF012 # pydantic copies it


class Subnet(Answer):
    id: int
    user_id: int
    name: str
    cidr: str
    exclude: list[str]
    created_at: AwareDatetime
    updated_at: AwareDatetime


class SubnetList(Answer):
    subnets: list[Subnet]
    total: int
    page: int
    page_size: int


class SubnetsImported(Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    message: str
    created: int
    updated: int = 0
    """Number of existing subnets that have the network and the exclusions of a line now."""

    subnets: list[Subnet]
    """One per line, in order; existing ones of the caller are not created again."""


class SubnetImportLine(Answer):
    """The effect of an import for one line of the file."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    line: int
    """Number of the line in the file, from 1."""

    action: Literal["create", "update", "exists", "refused"]
    """`exists` if the caller has an equal subnet, or an earlier line has it; `update` only in an import with `update`."""

    id: int | None
    """Id of the existing subnet; null if there is none yet."""

    error: str | None
    """Why the line is refused."""


class SubnetImportCheck(Answer):
    model_config = ConfigDict(use_attribute_docstrings=True)

    lines: list[SubnetImportLine]
    """One per line, in order."""


# Policies


def _preset_decides() -> Any:
    """Return the default of a field that `PolicyBody.scan` fills in; a factory, so that no default is documented."""


class PolicyValues(Body):
    """The values of a policy; omitted fields have the preset's values."""

    preset: Preset = Field(
        default=Preset.STANDARD,
        description="Values of omitted fields. `quick`: the 100 most common TCP ports, without service detection. "
        "`standard`: the 1,000 most common, with it. `full`: all TCP ports, with scripts. `sweep`: for silent or sparsely "
        "used networks, the 100 most common ports of every address, without discovery and with one retry.",
    )
    ports: vocabulary.Ports = Field(default_factory=_preset_decides)
    technique: vocabulary.TcpTechnique = Field(default_factory=_preset_decides)
    discovery: vocabulary.Discovery = Field(default_factory=_preset_decides)
    service_detection: vocabulary.ServiceDetection = Field(default_factory=_preset_decides)
    version_intensity: vocabulary.VersionIntensity = Field(default_factory=_preset_decides)
    os_detection: vocabulary.OsDetection = Field(default_factory=_preset_decides)
    scripts: vocabulary.Scripts = Field(default_factory=_preset_decides)
    timing: vocabulary.Timing = Field(default_factory=_preset_decides)
    max_rate: vocabulary.MaxRate = Field(default_factory=_preset_decides)
    min_rate: vocabulary.MinRate = Field(default_factory=_preset_decides)
    max_rtt_timeout: vocabulary.MaxRttTimeout = Field(default_factory=_preset_decides)
    max_retries: vocabulary.MaxRetries = Field(default_factory=_preset_decides)
    host_timeout: vocabulary.HostTimeout = Field(default_factory=_preset_decides)

    def scan(self, scripts: AbstractSet[str]) -> ScanPolicy:
        """Return the requested policy, validated against the allowed scripts.

        Raises:
            BadRequestError: a value is not allowed, or two values are inconsistent.
        """
        given = {name: getattr(self, name) for name in self.model_fields_set - {"name", "preset"}}
        try:
            return fill_in(self.preset, given, scripts)
        except PolicyError as error:
            raise BadRequestError(str(error)) from error


class PolicyBody(PolicyValues, NamedBody):
    """A policy; omitted fields have the preset's values."""


class Policy(ScanPolicy):
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)  # a response has every field

    id: int
    user_id: int
    name: str
    created_at: AwareDatetime
    updated_at: AwareDatetime


class PolicyList(Answer):
    policies: list[Policy]
    total: int
    page: int
    page_size: int


# Resources


Body_co = TypeVar("Body_co", bound=NamedBody, covariant=True)
Answer_co = TypeVar("Answer_co", bound=BaseModel, covariant=True)
List_co = TypeVar("List_co", bound=BaseModel, covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource(Generic[Body_co, Answer_co, List_co]):
    """Objects of one kind, each owned by one user, which the user lists, creates, reads, replaces and deletes.

    The routes of the gateway and the orchestrator, and the calls of the client, are derived from it.
    """

    name: str
    """Of one object, in paths, ids and messages: `subnet`."""

    plural: str
    """The field of `listed` with the objects; also the collection, and the sequence of ids."""

    body: type[Body_co]
    answer: type[Answer_co]
    listed: type[List_co]
    replacing: str = ""
    """Documents the effect of a replacement on other objects."""

    deletable: str = ""
    """Documents which objects can be deleted, if not all; a deletion of others is answered 409."""

    @property
    def path(self) -> str:
        return f"/api/v1/{self.name}"

    @property
    def id_name(self) -> str:
        """Name of the id in paths and queries."""
        return f"{self.name}_id"


SUBNETS: Final = Resource(
    name="subnet",
    plural="subnets",
    body=SubnetBody,
    answer=Subnet,
    listed=SubnetList,
    replacing="existing jobs keep the previous one",
    deletable="that no unfinished job scans",
)
POLICIES: Final = Resource(
    name="policy",
    plural="policies",
    body=PolicyBody,
    answer=Policy,
    listed=PolicyList,
    replacing="existing jobs keep the previous one",
)
RESOURCES: Final[tuple[Resource[NamedBody, BaseModel, BaseModel], ...]] = (SUBNETS, POLICIES)
