"""Inputs of the images."""

from __future__ import annotations

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

import pytest

from scanfleet.services import IMAGES, SERVICES

ROOT: Final = Path(__file__).parents[2]


def pins(name: str) -> set[str]:
    return set(re.findall(r"^(\S+==\S+)", (ROOT / "requirements" / f"{name}.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("image", IMAGES)
def test_image_packages_match_the_tested_versions(image: str) -> None:
    """Every package of an image's lock is in the lock of the tests, in the same version."""
    assert pins(image) - pins("dev") == set()


@pytest.mark.parametrize("service", SERVICES)
def test_services_have_an_image(service: str) -> None:
    """The Dockerfile has a stage with the service's system packages, and its process runs that service."""
    text = (ROOT / "Dockerfile").read_text()
    (stage,) = (part for part in text.split("\nFROM ") if part.startswith(f"service AS for-{service}\n"))
    assert f'CMD ["{service}"]' in stage


@pytest.mark.parametrize("image", sorted(set(IMAGES) - {"scanner-worker"}))
def test_image_locks_have_python_nmap_in_the_worker_alone(image: str) -> None:
    """python-nmap, with its own licence, is in no other image's lock."""
    assert not any(pin.startswith("python-nmap==") for pin in pins(image))


def sent_to_the_builder(folder: str) -> set[str]:
    """Return what the Docker builder gets of `folder`: all files that .dockerignore does not exclude."""
    patterns = (ROOT / ".dockerignore").read_text().split("\n*\n")[1].split()
    excluded = {pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")}
    tracked = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    assert f"!{folder.partition('/')[0]}" in patterns
    return {
        path
        for path in tracked
        if path not in patterns and not any(fnmatch(part, name) for part in Path(path).parts for name in excluded)
    }


@pytest.mark.parametrize(
    ("folder", "package"),
    [("cli", "scanfleet_cli"), *((f"services/{each.name}", each.package) for each in SERVICES.values())],
)
def test_images_contain_no_test_support(folder: str, package: str) -> None:
    """Of the project's code an image has its own package and the shared library, without test support."""
    assert "COPY shared ${FOLDER} /app/\n" in (ROOT / "Dockerfile").read_text()
    copied = {
        Path(path).relative_to(each).parts[0] for each in ("shared", folder) for path in sent_to_the_builder(each)
    }
    assert copied == {"scanfleet", package}


def test_wheels_contain_no_test_support() -> None:
    """The wheels of the project and of the command line have the runtime packages only."""
    for file in ("pyproject.toml", "cli/pyproject.toml"):
        build = tomllib.loads((ROOT / file).read_text())["tool"]["hatch"]["build"]
        names = {Path(package).name for package in build["targets"]["wheel"]["packages"]}
        assert names
        assert not any("testing" in name for name in names)


def test_deployments_start_services_by_the_one_server() -> None:
    """No deployment starts uvicorn itself, past the limits and the ports of `scanfleet.runtime.server`."""
    for file in ("Dockerfile", "local/services.py"):
        text = (ROOT / file).read_text()
        assert '"-m", "scanfleet.runtime.server"' in text
        assert "uvicorn" not in text
