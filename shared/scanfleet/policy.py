"""A scan policy: how to scan, in three kinds of models.

What a caller may send is strict (`scanfleet.rest.PolicyBody`). What is stored and sent (`ScanPolicy`) outlives the release that
wrote it, so it takes words and numbers that this release does not know. What becomes a command line (`ExecutablePolicy`) is
strict again: `executable` is the gate in front of it.
"""

from __future__ import annotations

from enum import StrEnum
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
    model_validator,
)

from scanfleet.errors import ScanfleetError
from scanfleet.ports import MAX_TEXT, PortSet

# Of a category we take only the scripts that look at their target alone: none that sends packets elsewhere (broadcast,
# external), guesses passwords, floods, exploits or leaves something behind.
_CATEGORIES: Final = frozenset({"default", "safe", "discovery", "version"})
_NOT_THESE: Final = "broadcast or brute or dos or exploit or external or fuzzer or intrusive or malware"

HOST_TIMEOUT_SECONDS: Final = 900  # of a policy that names none: what ends a host that answers nothing

GROUP_HOSTS: Final = 64  # addresses that one nmap probes side by side at least, by its own choice too

ALLOWED_SCRIPTS: Final = _CATEGORIES | frozenset(
    {
        "banner",
        "http-title",
        "http-headers",
        "http-server-header",
        "ssh-hostkey",
        "ssl-cert",
        "ssl-enum-ciphers",
        "dns-nsid",
        "smb-os-discovery",
        "snmp-info",
    },
)


def _ports(text: str) -> str:
    ports = PortSet.parse(text)
    if ports.above:
        raise ValueError('ports must look like "22,80,8000-8100", "T:80,U:53" or "top:100"')
    return str(ports)


def _chunk_ports(text: str) -> str:
    return str(PortSet.parse(text))


def _script(name: str) -> str:
    if name not in ALLOWED_SCRIPTS:
        raise ValueError(f"script is not one of {', '.join(sorted(ALLOWED_SCRIPTS))}")
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
"""A part of a policy's ports, which of `top:100` may be `top:51-100`."""
TcpTechnique = Annotated[
    Literal["auto", "connect", "syn"],
    Field(description="`auto` is SYN where the worker may send raw packets, else connect."),
]
Discovery = Annotated[Literal["default", "none"], Field(description="`none` takes every address as up.")]
ServiceDetection = Annotated[StrictBool, Field(description="Ask open ports what runs on them.")]
VersionIntensity = Annotated[StrictInt, Field(ge=0, le=9)]
OsDetection = Annotated[StrictBool, Field(description="Needs a worker that may send raw packets.")]
Scripts = Annotated[
    tuple[Annotated[str, AfterValidator(_script)], ...],
    Field(
        max_length=len(ALLOWED_SCRIPTS),
        description=f"NSE categories or scripts, of {', '.join(sorted(ALLOWED_SCRIPTS))}.",
    ),
]
Timing = Annotated[StrictInt, Field(ge=0, le=5, description="nmap's timing template.")]
_Rate = Annotated[StrictInt, Field(ge=1, le=10_000_000)]  # about what a link of 10 Gbit/s carries
MaxRate = Annotated[
    _Rate | None,
    Field(description="Packets a second of the whole job, whatever the number of workers."),
]
MinRate = Annotated[
    _Rate | None,
    Field(description="Probes a second of the whole job below which silence cannot slow it; null is the timing's own."),
]
MaxRttTimeout = Annotated[
    Annotated[StrictInt, Field(ge=50, le=10_000)] | None,
    Field(description="Milliseconds that nmap waits for an answer to a probe at most."),
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
        description=f"Seconds after which nmap gives up on a host; null is {HOST_TIMEOUT_SECONDS}.",
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
    """How to scan, as it is stored and sent: bounded, and readable by older and newer releases."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    preset: Annotated[Preset | _Word, Field(union_mode="left_to_right")] = Preset.STANDARD
    ports: Ports = "top:1000"
    technique: TcpTechnique | _Word = "auto"
    discovery: Discovery | _Word = "default"
    service_detection: ServiceDetection = True
    version_intensity: VersionIntensity = 7
    os_detection: OsDetection = False
    scripts: Annotated[
        tuple[_Word, ...], Field(max_length=64, description="NSE categories or scripts."), FailFast()
    ] = ()
    timing: Timing = 3
    max_rate: Annotated[_Number | None, Field(description="Packets a second of the whole job.")] = None
    min_rate: Annotated[_Number | None, Field(description="Probes a second of the whole job in silence.")] = None
    max_rtt_timeout: Annotated[_Number | None, Field(description="Milliseconds to wait for an answer.")] = None
    max_retries: _Number | None = None
    host_timeout: Annotated[
        _Number,
        BeforeValidator(_host_timeout, json_schema_input_type=_Number | None),
        Field(description="Seconds after which nmap gives up on a host."),
    ] = HOST_TIMEOUT_SECONDS

    @property
    def port_set(self) -> PortSet:
        return PortSet.parse(self.ports)

    @property
    def needs_raw(self) -> bool:
        """Whether only a worker that may send raw packets can do all of this: nothing honest stands in for it."""
        return self.needs_raw_for(self.port_set)

    def needs_raw_for(self, ports: PortSet) -> bool:
        """The same of a part of the policy's ports."""
        return (self.technique == "syn" and bool(ports.tcp_count)) or self.os_detection or bool(ports.udp_count)


class ExecutablePolicy(ScanPolicy):
    """A policy that consists of what this release allows, and of nothing else."""

    model_config = ConfigDict(extra="forbid")

    preset: Preset
    technique: TcpTechnique
    discovery: Discovery
    scripts: Scripts
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

    @property
    def script_selection(self) -> str:
        """`scripts` as nmap's `--script` takes them; empty when there are none."""
        return ",".join(f"({name} and not ({_NOT_THESE}))" if name in _CATEGORIES else name for name in self.scripts)


class PolicyError(ScanfleetError):
    """A policy asks for what this release does not allow; says what."""


def executable(policy: ScanPolicy) -> ExecutablePolicy:
    """Check a policy before it becomes a command line.

    Raises:
        PolicyError: it was stored by another release, which allowed more, or it is forged.
    """
    try:
        return ExecutablePolicy.model_validate(policy.model_dump())
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, each['loc'])) or 'rates'}: {each['msg']}" for each in error.errors())
        raise PolicyError(f"this worker does not execute the policy: {'; '.join(problems)}") from error


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

PRESETS: Final[dict[Preset, dict[str, Any]]] = {
    Preset.QUICK: _STANDARD | {"ports": "top:100", "service_detection": False, "timing": 4},
    Preset.STANDARD: _STANDARD,
    Preset.FULL: _STANDARD
    | {"ports": "1-65535", "version_intensity": 9, "scripts": ("default", "banner"), "timing": 4},
    # For networks that are silent or sparsely used: every address is probed, and silence is not waited for.
    Preset.SWEEP: _STANDARD
    | {"ports": "top:100", "discovery": "none", "service_detection": False, "timing": 4, "max_retries": 1},
}


def fill_in(preset: Preset, given: dict[str, Any]) -> ScanPolicy:
    """The policy with the fields in `given`, and the preset's value for every other.

    Raises:
        pydantic.ValidationError: a given value is not allowed.
    """
    strict = ExecutablePolicy.model_validate(PRESETS[preset] | given | {"preset": preset})
    return ScanPolicy.model_validate(strict.model_dump())
