"""Write the manifests that are made from what is said elsewhere: `python k8s/generate.py`.

A test compares them with it, so a file that has drifted is red until this is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml

FOLDER: Final = Path(__file__).parent
HEAD: Final = "# Written by `python k8s/generate.py`; change what it reads, not this file.\n"

Manifest = dict[str, Any]


def alerts() -> Iterator[Manifest]:
    """The alerts of observability/, for the Prometheus operator."""
    rules = yaml.safe_load((FOLDER.parent / "observability/prometheus/rules.yml").read_text(encoding="utf-8"))
    yield {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "scanfleet"},
        "spec": rules,
    }


FILES: Final[dict[str, Callable[[], Iterator[Manifest]]]] = {
    "components/monitoring/rules.yaml": alerts,
}


def text(file: str) -> str:
    return HEAD + yaml.safe_dump_all(FILES[file](), sort_keys=False)


if __name__ == "__main__":
    for file in FILES:
        (FOLDER / file).write_text(text(file), encoding="utf-8")
