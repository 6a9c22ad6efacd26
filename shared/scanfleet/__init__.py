"""The shared library of all Scanfleet services: contracts, the bus runtime and the service runtime."""

from typing import Final

VERSION: Final = "0.2.0"
"""The version of this release, as in pyproject.toml; an image has no package metadata."""
