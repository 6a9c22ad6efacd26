"""Check the environment of deployed services against their settings."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from scanfleet.kafka.topics import TopicSettings

ROOT = Path(__file__).parents[2]

Judge = Callable[[str, Mapping[str, str]], list[str]]


def settings_of(service: str) -> type[BaseSettings]:
    if service == "topics":
        return TopicSettings
    cls: type[BaseSettings] = import_module(f"{service.replace('-', '_')}.settings").Settings
    return cls


@pytest.fixture(scope="session")
def known() -> frozenset[str]:
    """Return every variable that a service reads."""
    services = [path.name for path in (ROOT / "services").iterdir()]
    return frozenset(
        f"SCANFLEET_{name.upper()}" for service in [*services, "topics"] for name in settings_of(service).model_fields
    )


@pytest.fixture(scope="session")
def reads() -> Callable[[str, str], bool]:
    """Return a function that checks whether a service reads a variable."""

    def does(service: str, variable: str) -> bool:
        ours = (ROOT / "services" / service).exists() or service == "topics"
        return ours and variable.removeprefix("SCANFLEET_").lower() in settings_of(service).model_fields

    return does


@pytest.fixture(scope="session")
def judge(known: frozenset[str]) -> Judge:
    """Return a function that lists the errors of a service's environment: unknown names, missing and invalid values."""

    def wrong(service: str, environment: Mapping[str, str]) -> list[str]:
        ours = {name for name in environment if name.startswith("SCANFLEET_")}
        found = [f"{service}: no service reads {name}" for name in sorted(ours - known)]
        with mock.patch.dict(os.environ, environment, clear=True):
            try:
                settings_of(service)()
            except ValidationError as error:
                found += [f"{service}: {problem['loc']} {problem['msg']}" for problem in error.errors()]
        return found

    return wrong


@pytest.fixture(scope="session")
def commands() -> dict[str, list[str]]:
    """Return the commands in docs/operations.md, by title."""
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    return {
        title: [line for block in re.findall(r"```sh\n(.*?)```", body, re.DOTALL) for line in block.splitlines()]
        for title, body in sections.items()
    }
