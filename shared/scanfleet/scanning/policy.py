"""Scan policies, in three kinds of models.

The request body is strict (`scanfleet.contracts.rest.PolicyBody`). The stored and published form (`ScanPolicy`) outlives the
release that wrote it, so it accepts values that this release does not define. The form that becomes a command line
(`ExecutablePolicy`) is strict again; `executable` validates it.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from scanfleet.errors import ScanfleetError
from scanfleet.scanning.ports import MAX_TEXT, PortSet

HOST_TIMEOUT_SECONDS: Final = 900  # default of a policy without one: the limit for a host that never answers

_MAX_PROBLEMS: Final = 5  # reported per error; enough to correct a policy in a few requests

GROUP_HOSTS: Final = 64  # minimum number of addresses that one nmap probes in parallel, as by its own default
BATCH_SECONDS: Final = 5.0  # estimated seconds of the chunks that share an nmap: with less, the start of nmap dominates
_JOINED_ADDRESSES: Final = 20
_JOINED_PROBES: Final = 1_024  # with few probes the start of nmap dominates

FLOOR_OF_ADDRESS: Final = 256
"""Highest rate floor, in probes per second, for each address that one nmap scans.

A host or firewall that limits SYNs to 100 per second drops probes of open ports at 500 per second and more, and none at 250
(measured). At 256 two probes to each of the 8,192 ports of a chunk take 64 s.
"""

VERSION_SCRIPTS: Final = frozenset({"fingerprint-strings", "http-server-header", "https-redirect", "snmp-info"})
"""NSE scripts that service detection always runs."""

ADMITTED_SCRIPTS: Final = VERSION_SCRIPTS | frozenset(
    {
        "banner",
        "dns-nsid",
        "http-headers",
        "http-title",
        "smb-os-discovery",
        "ssh-hostkey",
        "ssl-cert",
        "ssl-enum-ciphers",
    },
)
"""NSE scripts that send packets only to their target, which tests/networks/test_scripts.py checks for each."""


def max_joined_addresses(ports: int) -> int:
    """Return how many addresses the chunks that share an nmap have at most, by the number of ports of each.

    With more than 20 targets nmap (begin_sniffer in scan_engine_raw.cc) captures the packets of every other nmap of the machine
    too: five of 48 addresses with 1,000 ports each, at once, take half more CPU time than in groups of 16.
    """
    return max(_JOINED_ADDRESSES, _JOINED_PROBES // max(1, ports))  # a damaged document may have none


def _ports(text: str) -> str:
    ports = PortSet.parse(text)
    if ports.above:
        raise ValueError('ports must look like "22,80,8000-8100", "T:80,U:53" or "top:100"')
    return str(ports)


@lru_cache(maxsize=64)  # every report about a chunk has its ports
def _chunk_ports(text: str) -> str:
    return str(PortSet.parse(text))


def _script(name: str, info: ValidationInfo) -> str:
    allowed = (info.context or {}).get("scripts", ADMITTED_SCRIPTS)
    if name not in allowed:
        raise ValueError(f"{name} is not one of the allowed scripts: {', '.join(sorted(allowed))}")
    return name


Ports = Annotated[
    str,
    AfterValidator(_ports),
    Field(
        json_schema_extra={"maxLength": MAX_TEXT},
        description='nmap\'s syntax ("22,80,8000-8100", "T:80,U:53"), or "top:100" for the most common TCP ports.',
    ),
]
ChunkPorts = Annotated[str, AfterValidator(_chunk_ports), Field(json_schema_extra={"maxLength": MAX_TEXT})]
"""A part of a policy's ports; of `top:100` it may be `top:51-100`."""
TcpTechnique = Annotated[
    Literal["auto", "connect", "syn"],
    Field(description="`auto` is SYN if the worker can send raw packets, else connect."),
]
Discovery = Annotated[Literal["default", "none"], Field(description="`none` treats every address as up.")]
ServiceDetection = Annotated[StrictBool, Field(description="Detect the services on open ports.")]
VersionIntensity = Annotated[StrictInt, Field(ge=0, le=9)]
OsDetection = Annotated[StrictBool, Field(description="Needs a worker that can send raw packets.")]
MAX_SCRIPT_CHARS: Final = 64
ScriptName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=MAX_SCRIPT_CHARS)]
MAX_SCRIPTS: Final = 64
Scripts = Annotated[
    tuple[ScriptName, ...],
    Field(
        max_length=MAX_SCRIPTS,
        description=f"Names of NSE scripts: {', '.join(sorted(ADMITTED_SCRIPTS))}, and those that the operator "
        f"allows; no categories.",
    ),
]
Timing = Annotated[
    StrictInt,
    Field(
        ge=0,
        le=5,
        description="nmap's timing template; 4 and 5 can miss open ports of hosts and networks that limit their packets.",
    ),
]
_Rate = Annotated[StrictInt, Field(ge=1, le=10_000_000)]  # about the capacity of a 10 Gbit/s link
MaxRate = Annotated[
    _Rate | None,
    Field(
        description="Maximum probes per second of the whole job in discovery and port scan; service detection and "
        "scripts are not limited."
    ),
]
MinRate = Annotated[
    _Rate | None,
    Field(
        description="Minimum probes per second of the whole job, even when targets do not answer; null is the "
        "timing's default."
    ),
]
MaxRttTimeout = Annotated[
    Annotated[StrictInt, Field(ge=50, le=10_000)] | None,
    Field(description="Maximum time in milliseconds that nmap waits for an answer to a probe."),
]
MaxRetries = Annotated[StrictInt, Field(ge=0, le=10)] | None


def _host_timeout(value: Any) -> Any:
    return HOST_TIMEOUT_SECONDS if value is None else value


HostTimeout = Annotated[
    StrictInt,
    BeforeValidator(_host_timeout, json_schema_input_type=int | None),
    Field(
        ge=1,
        le=86_400,  # a day: a chunk cannot wait indefinitely for one host
        description=f"Timeout of a host in seconds; null is {HOST_TIMEOUT_SECONDS}.",
    ),
]


class Preset(StrEnum):
    QUICK = "quick"
    STANDARD = "standard"
    FULL = "full"
    SWEEP = "sweep"


_Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=64)]
_Number = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]


class ScanPolicy(BaseModel):
    """A policy as stored and published: bounded, and readable by older and newer releases."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    preset: Annotated[Preset | _Word, Field(union_mode="left_to_right")] = Preset.STANDARD
    ports: Ports = "top:1000"
    technique: TcpTechnique | _Word = "auto"
    discovery: Discovery | _Word = "default"
    service_detection: ServiceDetection = True
    version_intensity: VersionIntensity = 7
    os_detection: OsDetection = False
    scripts: Annotated[
        tuple[ScriptName, ...],
        Field(
            max_length=MAX_SCRIPTS,
            description="Names of NSE scripts; a policy of an older release may have categories, which are not run.",
        ),
        FailFast(),
    ] = ()
    timing: Timing = 3
    max_rate: Annotated[
        _Number | None, Field(description="Maximum probes per second of the whole job in discovery and port scan.")
    ] = None
    min_rate: Annotated[
        _Number | None,
        Field(
            description="Minimum probes per second of the whole job, even when targets do not answer. "
            "Each nmap of the job sends at least 500 of them, or all if they are fewer."
        ),
    ] = None
    max_rtt_timeout: Annotated[
        _Number | None, Field(description="Maximum time in milliseconds to wait for an answer.")
    ] = None
    max_retries: _Number | None = None
    host_timeout: Annotated[
        _Number,
        BeforeValidator(_host_timeout, json_schema_input_type=_Number | None),
        Field(description="Timeout of a host in seconds."),
    ] = HOST_TIMEOUT_SECONDS

    @property
    def port_set(self) -> PortSet:
        return PortSet.parse(self.ports)

    @property
    def needs_raw(self) -> bool:
        """Whether the policy needs a worker that can send raw packets, because no equivalent exists without them."""
        return self.needs_raw_for(self.port_set)

    def needs_raw_for(self, ports: PortSet) -> bool:
        """Return the same for a part of the policy's ports."""
        return (self.technique == "syn" and bool(ports.tcp_count)) or self.os_detection or bool(ports.udp_count)


class ExecutablePolicy(ScanPolicy):
    """A policy with only values that this release allows."""

    model_config = ConfigDict(extra="forbid")

    preset: Preset
    technique: TcpTechnique
    discovery: Discovery
    scripts: Annotated[tuple[Annotated[ScriptName, AfterValidator(_script)], ...], Field(max_length=MAX_SCRIPTS)]
    max_rate: MaxRate
    min_rate: MinRate
    max_rtt_timeout: MaxRttTimeout
    max_retries: MaxRetries
    host_timeout: HostTimeout

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.min_rate and self.max_rate and self.min_rate > self.max_rate:
            raise ValueError(f"min_rate {self.min_rate} is above max_rate {self.max_rate}")
        return self


class PolicyError(ScanfleetError):
    """The policy has values that this release does not allow; the message names them."""


def executable(policy: ScanPolicy, scripts: AbstractSet[str] = ADMITTED_SCRIPTS) -> ExecutablePolicy:
    """Validate a policy against the allowed scripts before it becomes a command line.

    Raises:
        PolicyError: it was stored by a release that allows more, or it is forged.
    """
    return _strict(policy.model_dump(), scripts)


def _strict(policy: dict[str, Any], scripts: AbstractSet[str]) -> ExecutablePolicy:
    try:
        return ExecutablePolicy.model_validate(policy, context={"scripts": scripts})
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, each['loc'])) or 'rates'}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors()[:_MAX_PROBLEMS]
        )
        raise PolicyError("; ".join(problems)) from error


_STANDARD: Final[dict[str, Any]] = {
    "ports": "top:1000",
    "technique": "auto",
    "discovery": "default",
    "service_detection": True,
    "version_intensity": 7,
    "os_detection": False,
    "scripts": (),
    "timing": 3,
    "max_rate": None,
    "min_rate": None,
    "max_rtt_timeout": None,
    "max_retries": None,
    "host_timeout": HOST_TIMEOUT_SECONDS,
}

_FULL_SCRIPTS: Final = (
    "banner",
    "http-headers",
    "http-title",
    "smb-os-discovery",
    "snmp-info",
    "ssh-hostkey",
    "ssl-cert",
)

PRESETS: Final[dict[Preset, dict[str, Any]]] = {
    Preset.QUICK: _STANDARD | {"ports": "top:100", "service_detection": False, "timing": 4},
    Preset.STANDARD: _STANDARD,
    Preset.FULL: _STANDARD | {"ports": "1-65535", "version_intensity": 9, "scripts": _FULL_SCRIPTS, "timing": 4},
    # For silent or sparsely used networks: every address is probed, without waiting long for answers.
    Preset.SWEEP: _STANDARD
    | {"ports": "top:100", "discovery": "none", "service_detection": False, "timing": 4, "max_retries": 1},
}


def fill_in(preset: Preset, given: dict[str, Any], scripts: AbstractSet[str] = ADMITTED_SCRIPTS) -> ScanPolicy:
    """Return a policy with the fields in `given` and the preset's value for every other field.

    Raises:
        PolicyError: a given value is not allowed.
    """
    strict = _strict(PRESETS[preset] | given | {"preset": preset}, scripts)
    return ScanPolicy.model_validate(strict.model_dump())
