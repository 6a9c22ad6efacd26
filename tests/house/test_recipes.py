"""The recipes of CONTRIBUTING.md: the names in their steps exist, and their steps work on a copy of the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
COPIED: Final = ("shared", "services", "cli", "docs", "local", "pyproject.toml", "conftest.py")

_RECIPES: Final = (
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n## Recipes\n")[2].partition("\n## ")[0]
)
_SPAN: Final = re.compile(r"`([^`]+)`")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z_0-9]+")

RESULTS: Final = "services/result-store/result_store"
MESSAGES: Final = "shared/scanfleet/contracts/messages"
POLICY: Final = "shared/scanfleet/scanning/policy.py"
JOB: Final = "services/job-orchestrator/job_orchestrator/domain/job.py"

Edit = tuple[str, str, str]
"""A file, a text in it, and what follows that text after the step; an empty text is the end of the file."""

METRIC: Final[list[Edit]] = [
    (f"{RESULTS}/metrics.py", "", '\nRECIPE: Final = Counter("scanfleet_results_recipe_total", "Followed recipes.")\n'),
]
EVENT: Final[list[Edit]] = [
    (f"{MESSAGES}/jobs.py", "", '\n\nclass JobPaused(JobEvent):\n    """The job waits for its user."""\n'),
    (f"{MESSAGES}/__init__.py", "    JobEvent,\n", "    JobPaused,\n"),
    (f"{MESSAGES}/__init__.py", '    "JobEvent",\n', '    "JobPaused",\n'),
    (f"{MESSAGES}/topics.py", "    JobFailed,\n", "    JobPaused,\n"),
    (f"{MESSAGES}/topics.py", "messages=(JobCreated, ", "JobPaused, "),
    (JOB, "    JobFailed,\n", "    JobPaused,\n"),
    (JOB, '    FAIL = "fail"\n', '    PAUSE = "pause"\n'),
    (JOB, "    JobStatus.RUNNING: {\n", "        JobTrigger.PAUSE: JobStatus.PENDING,\n"),
    (JOB, "    JobTrigger.FAIL: JobFailed,\n", "    JobTrigger.PAUSE: JobPaused,\n"),
]
EXPORT_FORMAT: Final[list[Edit]] = [
    (
        f"{RESULTS}/api/formats.py",
        'CSV: Final = Format("text/csv", _csv_head, _csv_row, "", "", "\\r\\n", reserve=128)\n',
        'RECIPE: Final = Format("text/recipe", _csv_head, _csv_row, "", "", "\\r\\n")\n',
    ),
    (f"{RESULTS}/api/formats.py", "FORMATS: Final = (JSON, NDJSON, ", "RECIPE, "),
    (
        "services/api-gateway/api_gateway/api/tasks.py",
        '"model": list[rest.Result],\n        "content": {\n',
        '            "text/recipe": {"schema": {"type": "string"}},\n',
    ),
]
QUERY_PARAMETER: Final[list[Edit]] = [
    (
        "shared/scanfleet/contracts/queries.py",
        '    """Only jobs of this subnet."""\n',
        '\n    recipe_id: Id | None = None\n    """Only jobs of this recipe."""\n',
    ),
]
POLICY_FIELD: Final[list[Edit]] = [
    (POLICY, "    max_retries: _Number | None = None\n", "    recipes: _Number | None = None\n"),
    (POLICY, "    max_retries: MaxRetries\n", "    recipes: MaxRetries\n"),
    (POLICY, '    "max_retries": None,\n', '    "recipes": None,\n'),
    (
        "shared/scanfleet/contracts/rest/resources.py",
        "    max_retries: vocabulary.MaxRetries = Field(default_factory=_preset_decides)\n",
        "    recipes: vocabulary.MaxRetries = Field(default_factory=_preset_decides)\n",
    ),
    (
        "shared/scanfleet/scanning/nmap_options.py",
        '        *_number("--host-timeout", policy.host_timeout, "s"),\n',
        '        *_number("--recipes", policy.recipes),\n',
    ),
]


def steps() -> Iterator[tuple[str, str]]:
    """Yield each step of a recipe that names a file, with the title of its recipe and its number."""
    for recipe in re.split(r"^### ", _RECIPES, flags=re.MULTILINE)[1:]:
        title, _, body = recipe.partition("\n")
        for number, step in re.findall(r"^(\d)\. (.*?)(?=^\d\. |\Z)", body, re.MULTILINE | re.DOTALL):
            if files(step):
                yield f"{title}, step {number}", step


def files(step: str) -> list[Path]:
    """Return the files that a step names."""
    paths = [ROOT / span.removeprefix("make test T=") for span in _SPAN.findall(step)]
    return [path for path in paths if path.is_file()]


def test_recipes_have_steps_that_name_files() -> None:
    """More than twenty steps of the recipes name a file."""
    assert len(list(steps())) > 20


@pytest.mark.parametrize(("named", "step"), list(steps()))
def test_recipe_names_exist_in_the_files_of_their_step(named: str, step: str) -> None:
    """Each class, function and constant in a step of a recipe is in one of the step's files."""
    names = {span for span in _SPAN.findall(step) if _NAME.fullmatch(span) and not (ROOT / span).exists()}
    text = "\n".join(file.read_text(encoding="utf-8") for file in files(step))
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", text)) == [], named


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code after the steps of five recipes, with its pages generated again."""
    folder = tmp_path_factory.mktemp("recipes")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *COPIED]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name, text, more in (*METRIC, *EVENT, *EXPORT_FORMAT, *QUERY_PARAMETER, *POLICY_FIELD):
        before = (folder / name).read_text(encoding="utf-8")
        at = before.index(text) + len(text) if text else len(before)
        (folder / name).write_text(before[:at] + more + before[at:], encoding="utf-8")
    examples = folder / MESSAGES / "examples" / "current"
    shutil.copy(examples / "JobStarted.v1.json", examples / "JobPaused.v1.json")
    for example in examples.glob("*.json"):
        document = json.loads(example.read_text(encoding="utf-8"))
        if "policy" in document:
            document["policy"]["recipes"] = 3
            example.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    run(folder, "docs/generate.py")
    return folder


def run(folder: Path, *arguments: str) -> str:
    """Run Python with the packages of the copy."""
    paths = [folder / "shared", folder / "cli", *(folder / "services").iterdir()]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def openapi(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "docs/openapi/current.json").read_text(encoding="utf-8"))
    return found


def test_recipe_of_a_metric_documents_it(copy: Path) -> None:
    """A metric in the service's `metrics.py` is a row of docs/metrics.md."""
    assert "| `scanfleet_results_recipe_total` | counter |" in (copy / "docs/metrics.md").read_text(encoding="utf-8")


def test_recipe_of_an_event_publishes_and_documents_it(copy: Path) -> None:
    """An event in module, registry, table and examples is in the pages of events and states, with a schema that tests accept."""
    assert "JobPaused" in (copy / "docs/events.md").read_text(encoding="utf-8")
    assert "pause" in (copy / "docs/states.md").read_text(encoding="utf-8")
    assert (copy / MESSAGES / "schemas" / "JobPaused.v1.json").is_file()
    run(copy, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "shared/tests/unit/test_messages.py")


def test_recipe_of_an_export_format_offers_it(copy: Path) -> None:
    """A format in the list of result-store is the answer to its media type, and the gateway documents it."""
    code = "from result_store.api.formats import negotiate; print(negotiate('text/recipe').media_type)"
    assert run(copy, "-c", code).strip() == "text/recipe"
    content = openapi(copy)["paths"]["/api/v1/task/{job_id}/results"]["get"]["responses"]["200"]["content"]
    assert "text/recipe" in content


def test_recipe_of_a_query_parameter_documents_it(copy: Path) -> None:
    """A field of the route's model of parameters is in the OpenAPI document."""
    parameters = openapi(copy)["paths"]["/api/v1/task"]["get"]["parameters"]
    assert "recipe_id" in {parameter["name"] for parameter in parameters}


def test_recipe_of_a_policy_field_accepts_it_and_passes_it_to_nmap(copy: Path) -> None:
    """A field of the policy is in the OpenAPI document, and an option of nmap."""
    assert "recipes" in openapi(copy)["components"]["schemas"]["Policy"]["properties"]
    code = """
from scanfleet.contracts.rest import PolicyBody
from scanfleet.scanning.nmap_options import nmap_options
from scanfleet.scanning.policy import executable

policy = executable(PolicyBody(name="a", recipes=3).scan(frozenset()))
print(*nmap_options(policy, policy.port_set, addresses=1, family=4, min_rate=None, max_rate=None, raw=False))
"""
    assert "--recipes 3" in run(copy, "-c", code)
