"""The packages that `requirements/*.txt` pin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from scanfleet.services import IMAGES

ROOT: Final = Path(__file__).parents[1]
LOCKS: Final = (*IMAGES, "dev", "mongod", "uv")

_IMAGE: Final = {  # what an image runs on; other packages of the lock are for other machines
    "python_version": "3.13",
    "python_full_version": "3.13.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}


@dataclass(frozen=True, slots=True, order=True)
class Package:
    name: str
    version: str


def packages(lock: str, environment: Mapping[str, str] | None = _IMAGE) -> list[Package]:
    """Return the packages of a lock for `environment`; all of them if it is None."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(" --hash=")[0].strip() for line in text.splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return sorted(
        Package(pin.name, str(pin.specifier).removeprefix("=="))
        for pin in pins
        if environment is None or pin.marker is None or pin.marker.evaluate(dict(environment))
    )
