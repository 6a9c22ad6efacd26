"""What every Scanfleet service stands on: contracts, the bus runtime, and one way to be a service."""

from typing import Final

VERSION: Final = "0.1.0"
"""Of this release, as in pyproject.toml: an image holds no metadata of packages."""
