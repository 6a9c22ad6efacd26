"""Inputs of the images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
SERVICES: Final = sorted(path.name for path in (ROOT / "services").iterdir())


def pins(name: str) -> set[str]:
    return set(re.findall(r"^(\S+==\S+)", (ROOT / "requirements" / f"{name}.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("service", SERVICES)
def test_image_packages_match_the_tested_versions(service: str) -> None:
    """Every package of a service's lock is in the lock of the tests, in the same version."""
    assert pins(service) - pins("dev") == set()


@pytest.mark.parametrize("service", SERVICES)
def test_services_have_an_image(service: str) -> None:
    """The Dockerfile has a stage with the service's system packages, and its process runs that service."""
    text = (ROOT / "Dockerfile").read_text()
    (stage,) = (part for part in text.split("\nFROM ") if part.startswith(f"python AS for-{service}\n"))
    assert f'CMD ["{service}"]' in stage


@pytest.mark.parametrize("service", sorted(set(SERVICES) - {"scanner-worker"}))
def test_only_the_worker_has_python_nmap(service: str) -> None:
    """python-nmap, with its own licence, is in no other service's lock."""
    assert not any(pin.startswith("python-nmap==") for pin in pins(service))


def test_deployments_start_services_by_the_one_server() -> None:
    """No deployment starts uvicorn itself, past the limits and the ports of `scanfleet.server`."""
    for file in ("Dockerfile", "local/stack.py"):
        text = (ROOT / file).read_text()
        assert '"-m", "scanfleet.server"' in text
        assert "uvicorn" not in text
