"""The topics and consumer groups in each service's code, compared with the registry, from which its ACLs are derived."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from scanfleet import services
from scanfleet.contracts.messages import topics
from scanfleet.contracts.messages.topics import SCAN_AUDIT, TOPICS, Topic
from scanfleet.services import SERVICES, WITH_DATABASE

ROOT: Final = Path(__file__).parents[2]
WRITES: Final = {"publish", "try_publish", "best_effort", "_publish"}
AS_MEMBER: Final = {"consume", "_handled"}
READS: Final = {"tail", "past"} | AS_MEMBER
GROUPS: Final = {"consume", "move_group"}


@cache
def functions(service: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the functions in a service's code."""
    package = ROOT / "services" / service / SERVICES[service].package
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py"))
    return [
        node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def calls(function: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    """Yield the calls of functions and methods with these names."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and callee(node) in names:
            yield node


def callee(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def constants(node: ast.AST, module: Any) -> Iterator[Any]:
    """Yield the constants of a module that an expression names."""
    for each in ast.walk(node):
        name = each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "")
        if name.isupper() and hasattr(module, name):
            yield getattr(module, name)


def named(node: ast.AST) -> set[str]:
    """Return the topics that an expression names; the table of audit topics names all of them, an item of it one."""
    if isinstance(node, ast.Subscript):
        return {table[key].name for table in constants(node.value, topics) for key in constants(node.slice, services)}
    found = set()
    for constant in constants(node, topics):
        of_constant = constant.values() if isinstance(constant, dict) else [constant]
        found |= {topic.name for topic in of_constant if isinstance(topic, Topic)}
    return found


def loops(function: ast.AST) -> dict[str, set[str]]:
    """Return the topics of each loop variable of a function."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension):
            for variable in ast.walk(node.target):
                if isinstance(variable, ast.Name):
                    found.setdefault(variable.id, set()).update(named(node.iter))
    return found


def used(service: str, names: set[str]) -> set[str]:
    """Return the topics that calls of these functions in a service's code have as an argument."""
    found = set()
    for function in functions(service):
        variables = loops(function)
        for argument in (argument for call in calls(function, names) for argument in call.args):
            found |= named(argument)
            if isinstance(argument, ast.Name):
                found |= variables.get(argument.id, set())
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_services_write_the_topics_of_which_they_are_producers(service: str) -> None:
    """A service's code publishes to exactly the topics that the registry lets it write; all services publish refusals."""
    refusals = {SCAN_AUDIT[service].name}
    assert used(service, WRITES) | refusals == {topic.name for topic in TOPICS if service in topic.producers}


@pytest.mark.parametrize("service", SERVICES)
def test_services_read_the_topics_of_which_they_are_consumers(service: str) -> None:
    """A service's code reads exactly the topics that the registry lets it read; only services with a database join groups."""
    assert used(service, READS) == {topic.name for topic in TOPICS if service in topic.consumers}
    assert bool(used(service, AS_MEMBER)) is (service in WITH_DATABASE)


@pytest.mark.parametrize("service", SERVICES)
def test_restores_move_every_group_of_a_service(service: str) -> None:
    """After a restore of its database a service's command moves the offsets of each topic that the service reads as a member."""
    assert used(service, {"move_group"}) == used(service, AS_MEMBER)


@pytest.mark.parametrize("service", SERVICES)
def test_groups_have_the_prefix_of_their_service(service: str) -> None:
    """The name of every consumer group of a service starts with the service's name, as its ACL for groups requires."""
    groups = [call.args[1] for function in functions(service) for call in calls(function, GROUPS)]
    first = [group.values[0] if isinstance(group, ast.JoinedStr) else group for group in groups]
    assert [[*constants(each, services)] for each in first] == [[service]] * len(groups)
    assert bool(groups) is (service in WITH_DATABASE)
