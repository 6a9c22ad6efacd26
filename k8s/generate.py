"""Generate the manifests that are derived from other files: `python k8s/generate.py`.

A test fails when a generated file is out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from scanfleet.contracts.messages.acls import QUOTAS, acls_of
from scanfleet.contracts.messages.topics import TOPICS
from scanfleet.kafka.topics import TopicSettings, plans
from scanfleet.services import SERVICES

FOLDER: Final = Path(__file__).parent
HEAD: Final = "# Written by `python k8s/generate.py`; change what it reads, not this file.\n"

CLUSTER: Final = "scanfleet"
PATTERNS: Final = {"topic": "literal", "group": "prefix"}

Manifest = dict[str, Any]


class Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a block."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, _text)


def alerts() -> Iterator[Manifest]:
    """Return the alerts of observability/ for the Prometheus operator."""
    rules = yaml.safe_load((FOLDER.parent / "observability/prometheus/rules.yml").read_text(encoding="utf-8"))
    yield {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "scanfleet"},
        "spec": rules,
    }


def topics() -> Iterator[Manifest]:
    """Return the topics of the registry for Strimzi."""
    settings = TopicSettings(kafka=f"{CLUSTER}-kafka-bootstrap:9093", topic_prefix="", replication=3)
    for plan in plans(settings, TOPICS):
        spec = {"partitions": plan.partitions, "replicas": settings.replication, "config": dict(plan.configs)}
        yield _of_cluster("KafkaTopic", plan.name, spec)


def targets() -> Iterator[Manifest]:
    """Return the program of the target servers, which the images do not contain."""
    program = (FOLDER.parent / "local/targets.py").read_text(encoding="utf-8")
    yield {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "scan-targets"},
        "data": {"targets.py": program},
    }


def users() -> Iterator[Manifest]:
    """Return a user with ACLs for each service, for Strimzi, which creates the password."""
    for service in SERVICES:
        acls = [
            {
                "resource": {"type": acl.resource, "name": acl.name, "patternType": PATTERNS[acl.resource]},
                "operations": [acl.operation],
            }
            for acl in acls_of(service)
        ]
        spec = {
            "authentication": {"type": "scram-sha-512"},
            "authorization": {"type": "simple", "acls": acls},
            "quotas": {
                "producerByteRate": QUOTAS["producer_byte_rate"],
                "consumerByteRate": QUOTAS["consumer_byte_rate"],
            },
        }
        yield _of_cluster("KafkaUser", service, spec)


def _of_cluster(kind: str, name: str, spec: Manifest) -> Manifest:
    return {
        "apiVersion": "kafka.strimzi.io/v1",
        "kind": kind,
        "metadata": {"name": name, "labels": {"strimzi.io/cluster": CLUSTER}},
        "spec": spec,
    }


FILES: Final[dict[str, Callable[[], Iterator[Manifest]]]] = {
    "components/monitoring/rules.yaml": alerts,
    "components/scan-targets/targets.yaml": targets,
    "overlays/production/topics.yaml": topics,
    "overlays/production/users.yaml": users,
}


def text(file: str) -> str:
    return HEAD + yaml.dump_all(FILES[file](), Dumper=Dumper, sort_keys=False)


if __name__ == "__main__":
    for file in FILES:
        (FOLDER / file).write_text(text(file), encoding="utf-8")
