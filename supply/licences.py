"""Licences of the images and tools, and the allowed licences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata
from typing import Final

from license_expression import get_spdx_licensing

from scanfleet.services import IMAGES
from supply.locks import PAGE, Package, contents, packages, page_packages

ALLOWED: Final = frozenset(
    {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MIT-0", "MPL-2.0", "PSF-2.0"},
)
"""For every image: redistributing the licence texts in the packages meets their terms."""

EXCEPTIONS: Final = {
    "scanner-worker": frozenset(
        {"python-nmap"}
    ),  # GPL-3, which applies to the image as a whole; NOTICE lists the obligations
    "dev": frozenset({"python-nmap", "supervisor"}),  # for development only, never distributed
    PAGE: frozenset({"argparse"}),  # the same: a part of the generator of types, under Python-2.0
}
"""Exceptions: packages of a lock with another licence."""

BESIDE: Final = {"scanner-worker": {"nmap": "LicenseRef-NPSL"}}
"""Other content of the images, apart from lock and base image, by licence."""

_OURS: Final = "Apache-2.0"

# Licence names of packages without an SPDX expression.
_SPELLINGS: Final = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD 2-Clause License": "BSD-2-Clause",
    "BSD License": "BSD-3-Clause",  # a classifier for both: the one with more conditions
    "BSD-derived (http://www.repoze.org/LICENSE.txt)": "LicenseRef-repoze",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "PSFL": "PSF-2.0",
    "gpl-3.0.txt": "GPL-3.0-or-later",
}

_LONGEST: Final = 200  # characters of an expression; some packages write the whole text of the licence instead

_LICENSING: Final = get_spdx_licensing()


class UnknownLicenceError(Exception):
    """A package has no known licence; the message has its name and its metadata."""


@cache
def licence(package: Package) -> str:
    """Return the package's licence as an SPDX expression, from its lock or the metadata of the installed version.

    A lock may pin another version for the Python of the images; the licence is taken to be the same.

    Raises:
        UnknownLicenceError: it is not installed, or has no licence of the table.
    """
    named = [package.licence] if package.ecosystem == "npm" else _installed(package)
    for text in named:
        expression: str = _SPELLINGS.get(text.strip(), text.strip())
        if expression.startswith("LicenseRef-") or (
            0 < len(expression) <= _LONGEST and not _LICENSING.validate(expression).errors
        ):
            return expression
    raise UnknownLicenceError(
        f"{package.name} {package.version} has a licence that is not in the table: {named!r:.200}"
    )


def _installed(package: Package) -> list[str]:
    try:
        data = metadata(package.name)
    except PackageNotFoundError:
        raise UnknownLicenceError(f"{package.name} is not installed: run `make setup`") from None
    classifiers = [
        each.rpartition(" :: ")[2] for each in data.get_all("Classifier") or () if each.startswith("License ::")
    ]
    # Not `data["License"]`: with the backport of importlib.metadata imported, a missing field is a KeyError.
    fields = [text for field in ("License-Expression", "License") for text in data.get_all(field) or ()]
    return [text for text in (*fields, *classifiers) if text]


def allowed(expression: str) -> bool:
    """Return whether allowed licences satisfy `expression`."""
    parsed = _LICENSING.parse(expression)
    choice = {each: _LICENSING.TRUE if str(each) in ALLOWED else _LICENSING.FALSE for each in parsed.symbols}
    return bool(parsed.subs(choice, simplify=True) == _LICENSING.TRUE)


def expression(image: str) -> str:
    """Return the licence of an image as an SPDX expression: of its code, packages and other content."""
    every = [_OURS, *map(licence, contents(image)), *BESIDE.get(image, {}).values()]
    whole = " AND ".join(f"({each})" for each in dict.fromkeys(every))
    return str(_LICENSING.parse(whole).simplify())


def problems(
    licence_of: Callable[[Package], str] = licence, exceptions: Mapping[str, frozenset[str]] = EXCEPTIONS
) -> list[str]:
    """Return a sentence for each package of an image or a lock with a licence that is not allowed."""
    found = []
    locked = {image: contents(image) for image in IMAGES} | {"dev": packages("dev"), PAGE: page_packages()}
    for lock, pinned in locked.items():
        for package in pinned:
            try:
                named = licence_of(package)
            except UnknownLicenceError as error:
                found.append(f"{lock}: {error}")
                continue
            if not allowed(named) and package.name not in exceptions.get(lock, ()):
                found.append(f"{lock}: {package.name} is under {named}, which is not among the allowed licences")
    return found
