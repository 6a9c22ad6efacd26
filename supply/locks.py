"""The packages that `requirements/*.txt` and `page/package-lock.json` pin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from packaging.requirements import Requirement

from scanfleet.services import IMAGES

ROOT: Final = Path(__file__).parents[1]
LOCKS: Final = (*IMAGES, "dev", "mongod", "node", "uv")
PAGE: Final = "page"
"""The lock of the npm packages."""
PAGE_LOCK: Final = ROOT / "page" / "package-lock.json"

Ecosystem = Literal["PyPI", "npm"]  # as in OSV's format

_IMAGE: Final = {  # the environment of the images; other packages of the lock are for other environments
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
    """A pinned package.

    Attributes:
        licence: the licence that the lock states, as npm's does.
        integrity: the package's hash, as an npm lock writes it.
    """

    name: str
    version: str
    ecosystem: Ecosystem = "PyPI"
    licence: str = ""
    integrity: str = ""


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


def page_packages(*, bundled: bool = False) -> list[Package]:
    """Return the npm packages that the page is built and tested with; only those in the built page if `bundled`."""
    entries = json.loads(PAGE_LOCK.read_text(encoding="utf-8"))["packages"]
    return sorted(
        Package(name, entry["version"], "npm", entry.get("license", ""), entry["integrity"])
        for path, entry in entries.items()
        if (name := path.rpartition("node_modules/")[2])  # the project itself has an empty path
        # The bundler is no development dependency either: the build in the image needs it.
        and not (bundled and (entry.get("dev") or name == "esbuild" or name.startswith("@esbuild/")))
    )


def contents(image: str) -> list[Package]:
    """Return the packages in an image: of its lock and, in the gateway's, of the page."""
    return packages(image) + (page_packages(bundled=True) if image == "api-gateway" else [])
