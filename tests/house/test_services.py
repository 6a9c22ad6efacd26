"""The files that cannot import `scanfleet.services`, compared with it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from scanfleet.services import IMAGES, SERVICES, WITH_API, WITH_DATABASE

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = {service.package: name for name, service in SERVICES.items()}


def text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads(text("pyproject.toml"))["tool"]
    return found


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text("docker-compose.yml"))
    return found


def layers(name: str) -> set[str]:
    """Return the modules of the import contract whose name starts so."""
    (contract,) = (each for each in project()["importlinter"]["contracts"] if each["name"].startswith(name))
    return {module for layer in contract["layers"] for module in layer.split(" | ")}


def named(packages: Iterable[str]) -> set[str]:
    """Return the services that have these packages; other packages do not count."""
    return {PACKAGES[package] for package in packages if package in PACKAGES}


def folders(paths: Iterable[str]) -> set[str]:
    return {path.split("/")[1] for path in paths if path.startswith("services/")}


LISTS: Final[dict[str, Callable[[], set[str]]]] = {
    "folders of services/": lambda: {path.name for path in (ROOT / "services").iterdir()},
    "packages of services/": lambda: named(
        init.parent.name for init in (ROOT / "services").glob("*/*/__init__.py") if init.parent.name in PACKAGES
    ),
    "pyproject.toml, dev-mode-dirs": lambda: folders(project()["hatch"]["build"]["dev-mode-dirs"]),
    "pyproject.toml, wheel": lambda: folders(project()["hatch"]["build"]["targets"]["wheel"]["packages"]),
    "pyproject.toml, mypy_path": lambda: folders(project()["mypy"]["mypy_path"].split(":")),
    "pyproject.toml, coverage": lambda: named(project()["coverage"]["run"]["source_pkgs"]),
    "pyproject.toml, root_packages": lambda: named(project()["importlinter"]["root_packages"]),
    "pyproject.toml, contract of services": lambda: named(layers("Services import")),
    "pyproject.toml, contract of test support": lambda: named(layers("No runtime package")),
    "pyproject.toml, contract of the command line": lambda: named(layers("The command line imports")),
    "pyproject.toml, contract of layers": lambda: named(
        next(
            each["containers"]
            for each in project()["importlinter"]["contracts"]
            if each["name"].startswith("Every service has the same layers")
        )
    ),
    "requirements/dev.in": lambda: set(re.findall(r"^-r (.+)\.in$", text("requirements/dev.in"), re.MULTILINE)),
    "docker-compose.yml, volumes": lambda: set(compose()["volumes"]) & set(SERVICES),
    "docker-compose.yml, users of Kafka": lambda: set(
        re.findall(r"[a-z-]+", re.findall(r"for service in (.+); do", text("docker-compose.yml"))[0])
    ),
    "observability/prometheus/prometheus.yml": lambda: set(
        yaml.safe_load(text("observability/prometheus/prometheus.yml"))["scrape_configs"][0]["dns_sd_configs"][0][
            "names"
        ]
    ),
    "k8s/base, k8s/orchestrator and k8s/worker": lambda: (
        {path.stem for folder in ("base", "orchestrator", "worker") for path in (ROOT / "k8s" / folder).glob("*.yaml")}
        & set(SERVICES)
    ),
}


LISTS_OF_IMAGES: Final[dict[str, Callable[[], set[str]]]] = {
    "Dockerfile, system packages": lambda: set(re.findall(r" AS for-(\S+)", text("Dockerfile"))),
    "Dockerfile, built": lambda: set(re.findall(r" AS built-(\S+)", text("Dockerfile"))),
    "docker-compose.yml": lambda: {
        each["build"]["args"]["SERVICE"] for each in compose()["services"].values() if "build" in each
    },
}


@pytest.mark.parametrize("place", LISTS)
def test_list_of_services_is_complete(place: str) -> None:
    """A list of services in a file that cannot import Python names every service."""
    assert LISTS[place]() == set(SERVICES)


@pytest.mark.parametrize("place", LISTS_OF_IMAGES)
def test_list_of_images_is_complete(place: str) -> None:
    """A list of images in a file that cannot import Python names every image."""
    assert LISTS_OF_IMAGES[place]() == set(IMAGES)


def test_users_of_mongodb_are_the_services_with_a_database() -> None:
    """The containers create a MongoDB user for each service with a database."""
    (users,) = re.findall(r"for \(const user of (\[.+?\])\)", text("docker-compose.yml"))
    assert yaml.safe_load(users) == list(WITH_DATABASE)


def test_packages_agree_with_the_registry() -> None:
    """A service has an API exactly if it has a module `api`, and a database exactly if it has a repository."""

    def having(module: str) -> set[str]:
        return {
            name for name, each in SERVICES.items() if [*(ROOT / "services" / name / each.package).glob(f"{module}*")]
        }

    assert having("api") == set(WITH_API)
    assert having("repository") == set(WITH_DATABASE)
