"""A scan policy: the typed, closed vocabulary in which users say how to scan."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt

from scanfleet.ports import PortSet

# Of a category we take only the scripts that look at their target alone: none that sends packets elsewhere (broadcast,
# external), guesses passwords, floods, exploits or leaves something behind.
_CATEGORIES: Final = frozenset({"default", "safe", "discovery", "version"})
_NOT_THESE: Final = "broadcast or brute or dos or exploit or external or fuzzer or intrusive or malware"

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
    return str(PortSet.parse(text))


def _script(name: str) -> str:
    if name not in ALLOWED_SCRIPTS:
        raise ValueError(f"script is not one of {', '.join(sorted(ALLOWED_SCRIPTS))}")
    return name


class Preset(StrEnum):
    QUICK = "quick"
    STANDARD = "standard"
    FULL = "full"


class ScanPolicy(BaseModel):
    """How to scan, every field filled in. `ports` is kept in canonical form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Preset
    ports: Annotated[str, AfterValidator(_ports)]
    technique: Literal["auto", "connect", "syn"]
    discovery: Literal["default", "none"]
    service_detection: StrictBool
    version_intensity: Annotated[StrictInt, Field(ge=0, le=9)]
    os_detection: StrictBool
    scripts: Annotated[tuple[Annotated[str, AfterValidator(_script)], ...], Field(max_length=len(ALLOWED_SCRIPTS))]
    timing: Annotated[StrictInt, Field(ge=0, le=5)]
    max_rate: Annotated[StrictInt, Field(ge=1, le=10_000_000)] | None
    """Packets a second; the limit is about what a link of 10 Gbit/s carries."""

    max_retries: Annotated[StrictInt, Field(ge=0, le=10)] | None
    host_timeout: Annotated[StrictInt, Field(ge=1, le=86_400)] | None
    """Seconds, a day at most: a chunk cannot wait for one host for ever."""

    @property
    def port_set(self) -> PortSet:
        return PortSet.parse(self.ports)

    @property
    def script_selection(self) -> str:
        """`scripts` as nmap's `--script` takes them; empty when there are none."""
        return ",".join(f"({name} and not ({_NOT_THESE}))" if name in _CATEGORIES else name for name in self.scripts)

    @property
    def needs_raw(self) -> bool:
        """Whether only a worker that may send raw packets can do this: nothing honest stands in for it."""
        return self.technique == "syn" or self.os_detection or bool(self.port_set.udp)


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
    "max_retries": None,
    "host_timeout": None,
}

PRESETS: Final[dict[Preset, dict[str, Any]]] = {
    Preset.QUICK: _STANDARD | {"ports": "top:100", "service_detection": False, "timing": 4},
    Preset.STANDARD: _STANDARD,
    Preset.FULL: _STANDARD
    | {"ports": "1-65535", "version_intensity": 9, "scripts": ("default", "banner"), "timing": 4},
}


def fill_in(preset: Preset, given: dict[str, Any]) -> ScanPolicy:
    """The policy with the fields in `given`, and the preset's value for every other.

    Raises:
        pydantic.ValidationError: a given value is not allowed.
    """
    return ScanPolicy.model_validate(PRESETS[preset] | given | {"preset": preset})
