"""docker-compose.yml, read without an engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from scanfleet.messages.acls import QUOTAS

ROOT: Final = Path(__file__).parents[2]
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
OURS: Final = {
    "api-gateway",
    "job-orchestrator",
    "scanner-worker",
    "result-store",
    "topics",
}
ONCE: Final = {"topics", "rights", "users", "replica-set", "keys", "token"}

Judge = Callable[[str, Mapping[str, str]], list[str]]


def environment(service: str) -> dict[str, str]:
    """As compose would fill it in when nothing is set outside."""
    variables = SERVICES[service].get("environment", {})
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for name, value in variables.items()}


@pytest.mark.parametrize("service", sorted(OURS))
def test_a_service_is_told_what_it_must_know_and_nothing_else(service: str, judge: Judge) -> None:
    """The service starts with the variables it gets, and reads every one of them."""
    assert judge(service, environment(service)) == []


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_a_container_has_no_more_rights_than_it_needs(service: str) -> None:
    """No container is privileged, has a capability, may gain a right or may use all of the machine."""
    container = SERVICES[service]
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & container.keys()
    administers = {"topics": "kafka", "rights": "kafka", "users": "kafka", "replica-set": "mongodb"}
    mode = f"service:{administers[service]}" if service in administers else "none"
    assert container.get("network_mode", "none") == mode
    assert {"cpus", "memory"} <= container["deploy"]["resources"]["limits"].keys()


@pytest.mark.parametrize("service", sorted(OURS | ONCE | {"kafka", "mongodb"}))
def test_a_container_writes_to_its_volumes_alone(service: str) -> None:
    """Its root filesystem is read-only."""
    assert SERVICES[service]["read_only"] is True


@pytest.mark.parametrize("service", sorted(OURS - {"topics"}))
def test_a_service_sees_its_own_secrets_alone(service: str) -> None:
    """Secrets are files in a volume of the service's own, which only what makes them and the servers' users sees beside it."""
    assert f"{service}:/secrets:ro" in SERVICES[service]["volumes"]
    others = {
        name for name, each in SERVICES.items() if any(v.startswith(f"{service}:") for v in each.get("volumes", ()))
    }
    assert others <= {service, "keys", "users", "replica-set"}
    files = {value for name, value in environment(service).items() if name.endswith("_FILE")}
    assert {str(Path(file).parent) for file in files} <= {"/secrets", "/jwt"}
    assert not any("://" in value and "@" in value for value in environment(service).values())


@pytest.mark.parametrize("service", sorted(SERVICES.keys() - ONCE))
def test_what_ends_is_started_again(service: str) -> None:
    """Whatever does not run just once comes back."""
    assert SERVICES[service]["restart"] == "unless-stopped"


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_nothing_is_reached_from_outside_this_machine(service: str) -> None:
    """Every published port is on 127.0.0.1."""
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", ()))


@pytest.mark.parametrize("service", sorted(OURS - {"api-gateway", "topics"}))
def test_a_service_may_have_any_number_of_containers(service: str) -> None:
    """It has neither a name of its own nor a published port nor a fixed host name."""
    assert not {"container_name", "ports", "hostname"} & SERVICES[service].keys()


def test_only_the_gateway_and_the_observers_have_a_way_out() -> None:
    """Scanners, state and bus are on networks without one."""
    outward = {name for name, network in COMPOSE["networks"].items() if not (network or {}).get("internal")}
    out = {name for name, service in SERVICES.items() if outward & set(service.get("networks", ()))}
    assert out == {"api-gateway", "prometheus", "grafana"}


CONNECTIONS: Final = {
    *(frozenset({service, "kafka"}) for service in OURS - {"topics"}),
    *(frozenset({service, "mongodb"}) for service in ("job-orchestrator", "result-store")),
    *(frozenset({"api-gateway", service}) for service in ("job-orchestrator", "result-store")),
}


def test_a_network_is_one_connection() -> None:
    """Two parts share a network exactly if one connects to the other; only those that observe are on several others'."""
    members = {
        network: {name for name, each in SERVICES.items() if network in each.get("networks", ())}
        for network in COMPOSE["networks"].keys() - {"edge"}
    }
    assert {frozenset(each - {"prometheus"}) for each in members.values()} == CONNECTIONS
    assert len(members) == len(CONNECTIONS)


def test_prometheus_shares_a_network_with_each_service_it_asks() -> None:
    """Every service that Prometheus scrapes can be reached by it."""
    config = yaml.safe_load((ROOT / "observability/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    asked = {name for job in config["scrape_configs"] for each in job["dns_sd_configs"] for name in each["names"]}
    ours = set(SERVICES["prometheus"]["networks"])
    assert asked == OURS - {"topics"}
    assert all(ours & set(SERVICES[name]["networks"]) for name in asked)


def test_each_user_of_the_bus_has_its_quotas() -> None:
    """What makes the users limits their rates too."""
    (script,) = SERVICES["users"]["command"]
    assert "--entity-default" in script
    assert dict(re.findall(r"(\w+_byte_rate)=(\d+)", script)) == {name: str(rate) for name, rate in QUOTAS.items()}


def test_every_volume_that_is_used_is_named() -> None:
    """A volume is one of the named ones or a folder of the project that is there."""
    for service in SERVICES.values():
        for source in (volume.split(":")[0] for volume in service.get("volumes", ())):
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), source


def test_grants_reach_every_service_that_checks_them() -> None:
    """With the file for grants the gateway, the orchestrator and the workers read it, where it is mounted, and cannot write it."""
    changed: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.grants.yml").read_text())["services"]
    assert set(changed) == {"api-gateway", "job-orchestrator", "scanner-worker"}
    for each in changed.values():
        (mount,) = each["volumes"]
        assert (mount["target"], mount["read_only"]) == (each["environment"]["SCANFLEET_GRANTS_FILE"], True)
