"""Alerts and dashboards use existing metrics, and every alert has a runbook."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client import REGISTRY

from local.paths import TOOLS
from scanfleet.services import SERVICES, WITH_DATABASE

ROOT: Final = Path(__file__).parents[2]
RULES: Final[dict[str, Any]] = yaml.safe_load((ROOT / "observability/prometheus/rules.yml").read_text(encoding="utf-8"))
ALERTS: Final[dict[str, dict[str, Any]]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARDS: Final = sorted((ROOT / "observability/grafana/dashboards").glob("*.json"))
QUERIES: Final = [
    *(rule["expr"] for rule in ALERTS.values()),
    *(
        target["expr"]
        for file in DASHBOARDS
        for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]
        for target in panel["targets"]
    ),
]
"""The expressions of all alerts and panels."""
METRICS: Final = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
"""The generated page."""
OF_ONE_DATABASE: Final = re.findall(r"^\| `(\w+)` .*Every replica counts the same database", METRICS, re.MULTILINE)
"""Gauges that every replica of the orchestrator exports with the same value."""
NAMING: Final = (
    *(f"docs/{page}.md" for page in ("operations", "runbooks", "security")),
    "k8s/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "k8s").rglob("*.yaml")),
)
"""Files that name metrics and are not checked as expressions."""
LABELS: Final = {
    name: set(re.findall(r"`(\w+)`", labels))
    for name, labels in re.findall(r"^\| `(\w+)` \| \w+ \| (.+?) \|", METRICS, re.MULTILINE)
}
"""The labels of each metric."""
OF_TARGETS: Final = {"instance", "job", "service"}
"""Labels that Prometheus adds to every series."""
_METRIC: Final = re.compile(r"\b(?:scanfleet|process)_[a-z_]+")
_SUFFIX: Final = re.compile(r"_(?:bucket|sum|count)$")


@pytest.fixture(scope="session")
def metrics() -> set[str]:
    """Return every series that a service exports."""
    for service in (path.name.replace("-", "_") for path in (ROOT / "services").iterdir()):
        import_module(f"{service}.main")
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {metric.name + suffix for metric in REGISTRY.collect() for suffix in suffixes.get(metric.type, ())}


def promtool(*arguments: str) -> None:
    found = shutil.which("promtool") or shutil.which(TOOLS / "prometheus/promtool")
    assert found, "no promtool: make .local/tools/prometheus/promtool"
    done = subprocess.run(
        [found, *arguments], cwd=ROOT / "observability/prometheus", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_configuration_is_valid() -> None:
    """promtool accepts the configuration and the rules."""
    promtool("check", "config", "prometheus.yml")


def test_alerts_fire_in_their_cases() -> None:
    """In promtool's rule tests each alert fires in its case, and not just before."""
    promtool("test", "rules", "rules.test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_alerts_use_existing_metrics(alert: str, metrics: set[str]) -> None:
    """Every series in its expression is exported by a service."""
    assert set(_METRIC.findall(ALERTS[alert]["expr"])) <= metrics


@pytest.mark.parametrize("alert", ALERTS)
def test_alerts_have_severity_runbook_and_test(alert: str) -> None:
    """The alert has a severity, a summary, a runbook and a test."""
    assert ALERTS[alert]["labels"]["severity"] in {"warning", "critical"}
    assert ALERTS[alert]["annotations"].keys() == {"summary"}
    assert f"\n## {alert}\n" in (ROOT / "docs/runbooks.md").read_text(encoding="utf-8")
    assert f"alertname: {alert}\n" in (ROOT / "observability/prometheus/rules.test.yml").read_text(encoding="utf-8")


def test_runbooks_belong_to_alerts() -> None:
    """Every runbook belongs to an alert."""
    assert re.findall(r"^## (\w+)$", (ROOT / "docs/runbooks.md").read_text(encoding="utf-8"), re.MULTILINE) == [*ALERTS]


def test_replicated_gauges_are_not_summed() -> None:
    """Every alert and panel uses the maximum of gauges that all replicas read from one database."""
    assert len(OF_ONE_DATABASE) > 5
    for name in OF_ONE_DATABASE:
        used = [each for each in QUERIES if re.search(rf"\b{name}\b", each)]
        assert [each for each in used if not re.search(rf"(max( by \([a-z, ]+\))?|absent)\s*\({name}\b", each)] == []


@pytest.mark.parametrize("query", QUERIES)
def test_queries_use_existing_labels(query: str) -> None:
    """Alerts and panels select and group series by labels that these series have."""
    labels = {name: LABELS[name] for name in map(_base, _METRIC.findall(query)) if name in LABELS}
    for name, selected in re.findall(r"\b(\w+)\{(.*?)\}", query):
        assert set(re.findall(r"(\w+)(?:[=!]~|!?=)\"", selected)) <= OF_TARGETS | labels.get(_base(name), set())
    grouped = {label.strip() for group in re.findall(r"\bby \(([\w, ]+)\)", query) for label in group.split(",")}
    assert grouped <= OF_TARGETS | {"le"} | set().union(*labels.values())


def _base(series: str) -> str:
    """Return the name of a series without the suffix of a histogram."""
    return _SUFFIX.sub("", series)


@pytest.mark.parametrize("file", NAMING)
def test_pages_and_manifests_name_existing_metrics(file: str) -> None:
    """Every metric that the file names is on the page of metrics."""
    databases = {f"scanfleet_{SERVICES[name].package}" for name in WITH_DATABASE}
    named = set(re.findall(r"\bscanfleet_[a-z_]+", (ROOT / file).read_text(encoding="utf-8")))
    assert {_base(name) for name in named - databases} <= LABELS.keys()


def test_metric_names_follow_the_convention(metrics: set[str]) -> None:
    """Counters end in _total, and times are in seconds."""
    ours = [metric for metric in REGISTRY.collect() if metric.name.startswith("scanfleet_")]
    assert metrics
    assert {metric.name for metric in ours if not re.fullmatch(r"[a-z]+(_[a-z]+)+", metric.name)} == set()
    assert {
        metric.name for metric in ours if re.search(r"_(ms|milliseconds|minutes|total|count)$", metric.name)
    } == set()
    assert {
        metric.name for metric in ours if metric.type == "histogram" and not metric.name.endswith("_seconds")
    } == set()
    assert {metric.name for metric in ours if not metric.documentation} == set()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_use_existing_metrics(dashboard: Path, metrics: set[str]) -> None:
    """Every query of every panel uses a series that a service exports."""
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    named = [set(_METRIC.findall(target["expr"])) for panel in panels for target in panel["targets"]]
    assert set().union(*named) <= metrics
    assert len({panel["id"] for panel in panels}) == len(panels)
