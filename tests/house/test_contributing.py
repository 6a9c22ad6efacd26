"""The documents for contributors: their links, paths, make targets and commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
DOCUMENTS: Final = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "docs/adr/*.md", "k8s/*.md")
    for page in ROOT.glob(pattern)
)
MAKEFILE: Final = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS: Final = frozenset(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
HELPERS: Final = {"packages", "browser"}  # targets that other targets need, without a use of their own

_FOLDERS: Final = sorted(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
_PATH: Final = re.compile(rf"`((?:{'|'.join(_FOLDERS)})/[\w./-]*)(?:::\w+)?`")
_LINK: Final = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | environment
    )


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str) -> Iterator[str]:
    for link, anchor in _LINK.findall(text_of(page)):
        target = (ROOT / page).parent / link if link else ROOT / page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            yield f"{link}#{anchor}"


@pytest.mark.parametrize("page", DOCUMENTS)
def test_document_links_lead_to_files_and_headings(page: str) -> None:
    """Every relative link of a document leads to an existing file and heading."""
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", DOCUMENTS)
def test_document_paths_exist(page: str) -> None:
    """Every path in a document that begins with a folder of the project exists."""
    named = set(_PATH.findall(text_of(page)))
    assert sorted(path for path in named if not (ROOT / path).exists() and not (ROOT / "k8s" / path).exists()) == []


@pytest.mark.parametrize("page", DOCUMENTS)
def test_document_commands_are_targets_of_the_makefile(page: str) -> None:
    """Every `make` target in a document is one of the Makefile."""
    assert set(re.findall(r"(?:[`\"(]|^|&& )make ([a-z][a-z0-9-]*)", text_of(page), re.MULTILINE)) <= TARGETS


@pytest.mark.parametrize("page", sorted(set(DOCUMENTS) - {"CHANGELOG.md"}))
def test_document_modules_to_run_exist(page: str) -> None:
    """Every module of a service that a document runs with `-m` exists."""
    commands = set(re.findall(r"\s-m\s+((?:job_orchestrator|result_store)[\w.]+)", text_of(page)))
    assert sorted(command for command in commands if find_spec(command) is None) == []


def commands() -> list[str]:
    (block,) = re.findall(r"```sh\n(.*?)```", text_of("CONTRIBUTING.md"), re.DOTALL)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


@pytest.mark.parametrize("command", commands())
def test_contributing_command_is_accepted_by_make(command: str) -> None:
    """Every command of CONTRIBUTING.md expands to a recipe without an error."""
    target, *arguments = command.removeprefix("make ").split()
    run = make("--dry-run", target, *arguments)
    assert (run.returncode, run.stderr) == (0, "")


def test_contributing_command_for_one_file_runs_its_tests() -> None:
    """`make test T=path` of CONTRIBUTING.md runs pytest on that file, which passes."""
    (command,) = (command for command in commands() if " T=" in command)
    recipe = make("--dry-run", *command.split()[1:]).stdout.splitlines()[-1].split()
    assert recipe == [".venv/bin/pytest", command.partition("T=")[2]]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", recipe[1]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\b\d+ passed", run.stdout)


def test_tests_of_one_file_have_the_tools_of_all_tests() -> None:
    """`make test T=path` installs what `make test` installs."""

    def installers(*arguments: str) -> set[str]:
        recipe = make("--dry-run", "--always-make", "test", *arguments).stdout
        return set(re.findall(r"^.*local/install-.*$", recipe, re.MULTILINE))

    assert installers("T=tests/page") == installers()
    assert any("chromium" in line for line in installers())


def test_help_lists_every_target_in_a_group() -> None:
    """`make help` lists every target once, below the title of its group."""
    listed = re.findall(r"^  make ([a-z0-9-]+) +\S", make("help").stdout.partition("\n\n")[2], re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert sorted(listed) == sorted(set(phony.split()) - HELPERS - {"help"})


def test_docs_target_runs_every_generator() -> None:
    """`make docs` runs every script that a generated file names as its generator."""
    files = subprocess.run(
        ["git", "grep", "-hoE", "(Generated|Written) by `python [a-z0-9/_]+\\.py`", "--", "*.md", "*.yaml", "*.yml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    generators = set(re.findall(r"`python (\S+)`", files))
    assert generators
    assert generators <= set(re.findall(r"bin/python (\S+\.py)", make("--dry-run", "docs").stdout))


def test_hooks_target_installs_the_hook(tmp_path: Path) -> None:
    """`make hooks` installs an executable pre-push hook that runs `make lint`."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert make("hooks", GIT_DIR=str(tmp_path / ".git")).returncode == 0
    hook = tmp_path / ".git" / "hooks" / "pre-push"
    assert os.access(hook, os.X_OK)
    assert "make lint" in hook.read_text(encoding="utf-8")


def test_hosted_ci_runs_targets_only() -> None:
    """Every command of the hosted workflow is the CI script or a target of the Makefile."""
    runs = re.findall(r"- run: (.+)$", text_of(".github/workflows/ci.yml"), re.MULTILINE)
    assert ".ci/run" in runs
    targets = [re.fullmatch(r"make ([a-z0-9-]+)(?: [A-Z_]+=\S+)*", run) for run in runs if run != ".ci/run"]
    assert all(targets)
    assert {target[1] for target in targets if target} <= TARGETS
