"""A scan policy: the typed, closed vocabulary in which users say how to scan."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt

from scanfleet.ports import PortSet

MAX_SCRIPTS = 32

# NSE categories and scripts that only look: nothing that logs in, floods, exploits or leaves something behind.
ALLOWED_SCRIPTS: Final = frozenset(
    {
        "default",
        "safe",
        "discovery",
        "version",
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
    scripts: Annotated[tuple[Annotated[str, AfterValidator(_script)], ...], Field(max_length=MAX_SCRIPTS)]
    timing: Annotated[StrictInt, Field(ge=0, le=5)]
    max_rate: Annotated[StrictInt, Field(ge=1, le=10_000_000)] | None
    max_retries: Annotated[StrictInt, Field(ge=0, le=10)] | None
    host_timeout: Annotated[StrictInt, Field(ge=1, le=86_400)] | None

    @property
    def port_set(self) -> PortSet:
        return PortSet.parse(self.ports)

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
    return ScanPolicy(preset=preset, **(PRESETS[preset] | given))
