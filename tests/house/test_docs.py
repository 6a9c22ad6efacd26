"""Pages generated from the code."""

from __future__ import annotations

import re

import pytest

from docs import cli_page, generate
from scanfleet.contracts.messages.topics import TOPICS
from scanfleet.kafka.topics import Plan, TopicSettings, plans
from scanner_worker.scanner.process import MIN_VERSION


@pytest.mark.parametrize("page", generate.PAGES)
def test_generated_pages_are_up_to_date(page: str) -> None:
    """The committed pages are those that `python docs/generate.py` writes."""
    assert (generate.FOLDER / page).read_text(encoding="utf-8") == generate.PAGES[page]()


def test_golden_documents_are_up_to_date() -> None:
    """The committed documents are those that this release writes, so that a release keeps what it has stored."""
    written = dict(generate.documents())
    folders = {path.parent for path in written}
    committed = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.json")}
    assert committed == written


def test_page_of_the_command_line_is_up_to_date() -> None:
    """The committed page is the one that `python docs/cli_page.py` writes."""
    assert cli_page.PAGE.read_text(encoding="utf-8") == cli_page.page()


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_page_has_the_minimum_nmap_version(page: str) -> None:
    """The pages that name the required software have the minimum version of nmap."""
    oldest = ".".join(map(str, MIN_VERSION))
    assert f"nmap {oldest} or newer" in (generate.FOLDER.parent / page).read_text(encoding="utf-8")


def test_operations_have_the_tested_versions() -> None:
    """The required software has the versions of Kafka and MongoDB that the containers run."""
    compose = (generate.FOLDER.parent / "docker-compose.yml").read_text(encoding="utf-8")
    (kafka,) = re.findall(r"apache/kafka:(\d+\.\d+)", compose)
    (mongodb,) = re.findall(r"mongo:(\d+\.\d+)", compose)
    text = (generate.FOLDER / "operations.md").read_text(encoding="utf-8")
    assert f"(tested: 6.0 and {mongodb}), Kafka (tested: {kafka})" in text


def test_operations_have_the_disk_usage_of_kafka() -> None:
    """The sizes of records, dead letters, further segments and all of these are those of the topics at their limits."""
    planned = plans(TopicSettings(kafka="localhost:9092"), TOPICS)
    letters = sum(_size(plan) for plan in planned if plan.name.endswith("-dlq"))
    records = sum(map(_size, planned)) - letters
    segments = sum(plan.partitions * int(plan.configs["segment.bytes"]) for plan in planned)
    text = " ".join((generate.FOLDER / "operations.md").read_text(encoding="utf-8").split())
    assert (
        f"at most {_gib(records + letters + segments)} per copy of all topics: {_gib(records)} of records, "
        f"{_gib(letters)} of dead letters, and {_gib(segments)} because"
    ) in text


def _size(plan: Plan) -> int:
    return plan.partitions * int(plan.configs["retention.bytes"])


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
