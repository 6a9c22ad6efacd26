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

ROOT: Final = Path(__file__).parents[2]
RULES: Final[dict[str, Any]] = yaml.safe_load((ROOT / "observability/prometheus/rules.yml").read_text(encoding="utf-8"))
ALERTS: Final[dict[str, dict[str, Any]]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARDS: Final = sorted((ROOT / "observability/grafana/dashboards").glob("*.json"))
OF_ONE_DATABASE: Final = ("jobs", "oldest_job_age_seconds", "chunks", "queued_slot_seconds", "outbox_age_seconds")
"""Gauges that every replica of the orchestrator exports with the same value."""
_METRIC: Final = re.compile(r"\b(?:scanfleet|process)_[a-z_]+")


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
    panels = [panel for file in DASHBOARDS for panel in json.loads(file.read_text(encoding="utf-8"))["panels"]]
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    for name in OF_ONE_DATABASE:
        used = [each for each in [*shown, *(rule["expr"] for rule in ALERTS.values())] if f"scanfleet_{name}" in each]
        assert [
            each for each in used if not re.search(rf"(max( by \([a-z, ]+\))?|absent)\s*\(scanfleet_{name}\b", each)
        ] == []


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
