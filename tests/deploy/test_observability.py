"""Alerts and dashboards speak of metrics that there are, and every alert has its runbook."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client import REGISTRY

ROOT: Final = Path(__file__).parents[2]
RULES: Final[dict[str, Any]] = yaml.safe_load((ROOT / "observability/prometheus/rules.yml").read_text(encoding="utf-8"))
ALERTS: Final[dict[str, dict[str, Any]]] = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARDS: Final = sorted((ROOT / "observability/grafana/dashboards").glob("*.json"))
_METRIC: Final = re.compile(r"\b(?:scanfleet|process)_[a-z_]+")


@pytest.fixture(scope="session")
def metrics() -> set[str]:
    """Every series that some service shows."""
    for service in (path.name.replace("-", "_") for path in (ROOT / "services").iterdir()):
        import_module(f"{service}.main")
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {metric.name + suffix for metric in REGISTRY.collect() for suffix in suffixes.get(metric.type, ())}


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_is_about_metrics_that_there_are(alert: str, metrics: set[str]) -> None:
    """Every series in its expression is one that some service shows."""
    assert set(_METRIC.findall(ALERTS[alert]["expr"])) <= metrics


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_what_to_do(alert: str) -> None:
    """It has a severity, a summary, a runbook of its name and a test of its own."""
    assert ALERTS[alert]["labels"]["severity"] in {"warning", "critical"}
    assert ALERTS[alert]["annotations"].keys() == {"summary"}
    assert f"\n## {alert}\n" in (ROOT / "docs/runbooks.md").read_text(encoding="utf-8")
    assert f"alertname: {alert}\n" in (ROOT / "observability/prometheus/rules.test.yml").read_text(encoding="utf-8")


def test_a_runbook_belongs_to_an_alert() -> None:
    """No runbook is left of an alert that is gone."""
    assert re.findall(r"^## (\w+)$", (ROOT / "docs/runbooks.md").read_text(encoding="utf-8"), re.MULTILINE) == [*ALERTS]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_shows_metrics_that_there_are(dashboard: Path, metrics: set[str]) -> None:
    """Every query of every panel names a series that some service shows."""
    panels = json.loads(dashboard.read_text(encoding="utf-8"))["panels"]
    named = [set(_METRIC.findall(target["expr"])) for panel in panels for target in panel["targets"]]
    assert set().union(*named) <= metrics
    assert len({panel["id"] for panel in panels}) == len(panels)
