"""Checks of the documented commands of operators."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = ("docs/operations.md", "docs/runbooks.md", "docs/security.md", "k8s/README.md")


def is_complete(line: str) -> bool:
    """Return whether the line is one whole command of compose: a line that ends within quotes or joins two commands is not."""
    parsed = subprocess.run(["bash", "-n", "-c", line], capture_output=True, check=False)
    return (
        parsed.returncode == 0 and re.fullmatch(r"(\w+=\S+ )?docker compose ((?!docker compose).)+", line) is not None
    )


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_existing_settings(page: str, known: frozenset[str]) -> None:
    """Every setting on the page is read by a service."""
    named = set(re.findall(r"\bSCANFLEET_[A-Z0-9_]+", (ROOT / page).read_text(encoding="utf-8")))
    assert named <= known


def test_secrets_page_lists_every_file_setting(known: frozenset[str]) -> None:
    """The list of secrets has every setting that names a file, except the file of grants, which has no key or secret."""
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    listed = page.partition("\n## Where secrets are\n")[2].partition("\n## ")[0]
    files = {name for name in known if name.endswith("_FILE")}
    assert set(re.findall(r"\bSCANFLEET_\w+_FILE\b", listed)) == files - {"SCANFLEET_GRANTS_FILE"}


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_existing_files(page: str) -> None:
    """Every file and folder of the project on the page exists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [Path(page).parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = re.findall(r"`((?:k8s|docs|observability|overlays|components)/[\w./-]+)`", text)
    missing = [str(each) for each in [*links, *named] if not ((ROOT / each).exists() or (ROOT / "k8s" / each).exists())]
    assert missing == []


def test_documented_commands_are_tested(commands: Mapping[str, list[str]]) -> None:
    """Every documented command is run on real containers by a test."""
    containers = (ROOT / "tests/deploy/test_containers.py").read_text(encoding="utf-8")
    untested = {title for title, lines in commands.items() if lines and f'commands["{title}"]' not in containers}
    assert untested == {"Deploy"}
    assert [line for lines in commands.values() for line in lines if not is_complete(line)] == []
    for names, title in re.findall(r'^ +(.+) = commands\["(.+)"\]$', containers, re.MULTILINE):
        assert names == "steps" or len(names.split(", ")) == len(commands[title]), title
    assert commands["Deploy"] == ["SCANFLEET_ALLOWED_NETWORKS=192.0.2.0/24 docker compose up --wait"]
    assert "${SCANFLEET_ALLOWED_NETWORKS:-" in (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
