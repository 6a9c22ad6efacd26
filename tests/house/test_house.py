"""Project rules that no tool checks."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from scanfleet import VERSION
from scanfleet.scanning.outcomes import WORST_FIRST

ROOT: Final = Path(__file__).parents[2]
ADRS: Final = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))

# Home folders and hosts of package registries, which are specific to a machine.
_FOREIGN: Final = re.compile(
    r"/(?:home|root|work|Users)/|\b(?:pypi\.org|pythonhosted\.org|repo1?\.maven\.|registry\.npmjs|docker\.io)",
)
_EXEMPTION: Final = re.compile(r"#\s*(?:ruff:\s*noqa|noqa|type:\s*ignore|mypy:|pragma:)")
_REASONED: Final = re.compile(
    r"# (?:noqa: [A-Z]+[0-9]+(?:, [A-Z]+[0-9]+)*|type: ignore\[[a-z-]+(?:, [a-z-]+)*\]) # \w.*"
)
# In a pipeline with pipefail the command before one of these gets SIGPIPE, and the pipeline fails at random.
_EXITS_EARLY: Final = re.compile(r"\|\s*(?:grep\s+(?:-\w*[qm]|--quiet|--max-count)|head\b)")
# Production code: packages of services and the shared one, without test support.
_PRODUCTION: Final = re.compile(r"(?:services/[^/]+/(?!tests/)\w+(?<!_testing)|shared/scanfleet|local(?!/tests/))/")
_LEVELS: Final = frozenset({"debug", "info", "warning", "error", "critical", "exception", "log"})
# An object and its state, `lease_expired`; most states are participles.
_EVENT: Final = re.compile(r"(?:[a-z][a-z0-9]*_)+(?:[a-z]+ed|[a-z]+able|timed_out|missing|unknown|unhealthy)")
_ABBREVIATED_SECONDS: Final = re.compile(r"\b_?[A-Z][A-Z_]*_S\b")
_UNIT_IN_COMMENT: Final = re.compile(
    r"\s*(?:self\.)?\w+(?<!_SECONDS)(?<!_MS)(?<!_BYTES)(?<!_seconds)(?<!_ms)(?<!_bytes)(?:: [^=#]+)? = [^#]*# (?:seconds|ms|bytes)\b"
)
_COUNTER: Final = re.compile(r"\bCounter\(\s*\"(\w+)\"")
_SENTENCE_END: Final = re.compile(r"[.!?](?=\s|$)")


def committed(suffix: str = "") -> list[Path]:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [path for name in names.decode().split("\0") if name.endswith(suffix) and (path := ROOT / name).is_file()]


def test_files_have_no_machine_specific_paths() -> None:
    """No committed file names a home folder or the host of a package registry."""
    foreign = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in committed()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if _FOREIGN.search(line)
    ]
    assert foreign == []


def test_paths_with_reviewers_exist() -> None:
    """Each path of CODEOWNERS exists, and a folder's ends with a slash."""
    lines = (ROOT / ".github" / "CODEOWNERS").read_text(encoding="utf-8").splitlines()
    paths = [line.split()[0].removeprefix("/") for line in lines if line.startswith("/")]
    assert len(paths) > 5
    found = {path for path in paths if ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())}
    assert [path for path in paths if path not in found] == []


def test_pipelines_do_not_exit_early() -> None:
    """No script, recipe, manifest or documented command pipes into `grep -q` or `head`, which fails at random with pipefail."""
    early = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in committed()
        if path.suffix in {"", ".md", ".sh", ".yml", ".yaml"} and path.name != "LICENSE"
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if not line.lstrip().startswith("#") and _EXITS_EARLY.search(line)
    ]
    assert early == []


def test_exemptions_have_a_reason() -> None:
    """An exemption from ruff or mypy names its rule and is followed by the reason."""
    unreasoned = [
        f"{path.relative_to(ROOT)}:{token.start[0]} {token.string}"
        for path in committed(".py")
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type == tokenize.COMMENT and _EXEMPTION.match(token.string) and not _REASONED.match(token.string)
    ]
    assert unreasoned == []


def events(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the line and the event of each use of a logger's level in the file; None if the event is no literal."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = {id(node.func): node.args for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name(id=name) | ast.Attribute(attr=name), attr=level) if (
                name in {"_log", "log", "logger", "_logger"} and level in _LEVELS
            ):
                match calls.get(id(node), [])[level == "log" :]:
                    case [ast.Constant(value=event), *_]:
                        yield node.lineno, event
                    case _:
                        yield node.lineno, None


def test_log_events_are_an_object_and_its_state_in_snake_case() -> None:
    """Production code logs each event under a literal name, an object and its state, which a collector can search for."""
    found = [
        (f"{name}:{line}", event)
        for path in committed(".py")
        if _PRODUCTION.match(name := path.relative_to(ROOT).as_posix())
        for line, event in events(path)
    ]
    assert len(found) > 50  # the search finds the calls
    assert [each for each in found if not _EVENT.fullmatch(str(each[1] or ""))] == []


def test_loggers_have_the_name_of_their_module() -> None:
    """Every module creates its logger in the same manner, with its own name."""
    loggers = [
        f"{name}:{number} {line}"
        for path in committed(".py")
        if _PRODUCTION.match(name := path.relative_to(ROOT).as_posix())
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "get_logger(" in line
    ]
    assert len(loggers) > 20  # the search finds them
    assert [each for each in loggers if not each.endswith(" _log = structlog.stdlib.get_logger(__name__)")] == []


def test_constants_and_fields_have_their_unit_in_the_name() -> None:
    """A number of seconds, milliseconds or bytes has its unit in its name, with seconds in full, and not in a comment."""
    unnamed = [
        f"{path.relative_to(ROOT)}:{number} {line}"
        for path in committed(".py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if _ABBREVIATED_SECONDS.search(line) or _UNIT_IN_COMMENT.match(line)
    ]
    assert unnamed == []


def test_counters_are_declared_with_total() -> None:
    """Production code declares a counter under the name that Prometheus reads, which ends with `_total`."""
    counters = [
        name
        for path in committed(".py")
        if _PRODUCTION.match(path.relative_to(ROOT).as_posix())
        for name in _COUNTER.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(counters) > 20  # the search finds them
    assert [name for name in counters if not name.endswith("_total")] == []


def claims(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node


def test_tests_have_a_one_sentence_docstring() -> None:
    """The docstring of every test is one sentence."""
    silent = [
        f"{path.relative_to(ROOT)}:{test.lineno} {test.name}"
        for path in committed(".py")
        if path.name.startswith("test_")
        for test in claims(path)
        if len(_SENTENCE_END.findall(ast.get_docstring(test) or "")) != 1
    ]
    assert silent == []


def test_decision_records_are_one_page_and_indexed() -> None:
    """Each decision record has its three sections in at most 60 lines, and the index lists exactly these by their titles."""
    entries = []
    for page in ADRS:
        title, *lines = page.read_text(encoding="utf-8").splitlines()
        assert title.startswith(f"# {int(page.name[:4])}. "), page.name
        sections = [line for line in lines if line.startswith("## ")]
        assert sections == ["## Context", "## Decision", "## Consequences"], page.name
        assert len(lines) < 60, page.name
        entries.append(f"- [{title.removeprefix('# ')}]({page.name})")
    index = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in index if line.startswith("- [")] == entries


def test_page_and_command_show_the_same_letter_of_an_address() -> None:
    """For several letters, the maps of the page and of the command choose by the same order."""
    page = (ROOT / "page" / "src" / "map.tsx").read_text(encoding="utf-8")
    assert re.findall(r'^const WORST = "(.+)";$', page, re.MULTILINE) == [WORST_FIRST]


def test_release_version_is_equal_in_code_and_package() -> None:
    """The version that the gateway publishes is that of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION
