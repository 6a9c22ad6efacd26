"""Checks of docker-compose.yml without an engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from scanfleet.contracts.messages.acls import QUOTAS
from scanfleet.services import SERVICES as PLATFORM
from scanfleet.services import WITH_API, WITH_DATABASE

ROOT: Final = Path(__file__).parents[2]
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
OURS: Final = {*PLATFORM, "topics"}
ONCE: Final = {"topics", "rights", "users", "replica-set", "keys", "token", "cli"}

Judge = Callable[[str, Mapping[str, str]], list[str]]


def environment(service: str) -> dict[str, str]:
    """Return the environment with compose's defaults."""
    variables = SERVICES[service].get("environment", {})
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for name, value in variables.items()}


@pytest.mark.parametrize("service", sorted(OURS))
def test_service_environment_is_complete_and_minimal(service: str, judge: Judge) -> None:
    """The service starts with its variables, and reads every one of them."""
    assert judge(service, environment(service)) == []


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_containers_have_minimal_privileges(service: str) -> None:
    """No container is privileged, has a capability, can gain privileges or has unlimited resources."""
    container = SERVICES[service]
    assert container["cap_drop"] == ["ALL"]
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "pid", "ipc"} & container.keys()
    administers = {"topics": "kafka", "rights": "kafka", "users": "kafka", "replica-set": "mongodb"}
    mode = f"service:{administers[service]}" if service in administers else "none"
    assert container.get("network_mode", "none") == mode
    assert {"cpus", "memory"} <= container["deploy"]["resources"]["limits"].keys()


@pytest.mark.parametrize("service", sorted(OURS | ONCE | {"kafka", "mongodb"}))
def test_containers_have_read_only_root_filesystems(service: str) -> None:
    """Its root filesystem is read-only."""
    assert SERVICES[service]["read_only"] is True


@pytest.mark.parametrize("service", sorted(SERVICES.keys() - ONCE))
def test_logs_of_containers_that_stay_have_a_limit(service: str) -> None:
    """Its log is rotated at a maximum size and number of files: without these options Docker never deletes a line."""
    logging = SERVICES[service]["logging"]
    assert (logging["driver"], logging["options"]) == ("json-file", {"max-size": "20m", "max-file": "3"})


@pytest.mark.parametrize("service", sorted(OURS - {"topics"}))
def test_secrets_are_separate_per_service(service: str) -> None:
    """Secrets are files in a separate volume per service, shared only with the containers that create and need them."""
    assert f"{service}:/secrets:ro" in SERVICES[service]["volumes"]
    others = {
        name for name, each in SERVICES.items() if any(v.startswith(f"{service}:") for v in each.get("volumes", ()))
    }
    assert others <= {service, "keys", "users", "replica-set"}
    files = {value for name, value in environment(service).items() if name.endswith("_FILE")}
    assert {str(Path(file).parent) for file in files} <= {"/secrets", "/jwt"}
    assert not any("://" in value and "@" in value for value in environment(service).values())


@pytest.mark.parametrize("service", sorted(SERVICES.keys() - ONCE))
def test_services_are_restarted(service: str) -> None:
    """Every long-running service is restarted."""
    assert SERVICES[service]["restart"] == "unless-stopped"


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_published_ports_are_on_loopback(service: str) -> None:
    """Every published port is on 127.0.0.1."""
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", ()))


@pytest.mark.parametrize("service", sorted(OURS - {"api-gateway", "topics"}))
def test_services_can_be_scaled(service: str) -> None:
    """The service has no fixed container name, published port or host name."""
    assert not {"container_name", "ports", "hostname"} & SERVICES[service].keys()


def test_compose_external_networks_are_for_gateway_client_and_monitoring() -> None:
    """Workers, databases and bus are on internal networks only."""
    outward = {name for name, network in COMPOSE["networks"].items() if not (network or {}).get("internal")}
    out = {name for name, service in SERVICES.items() if outward & set(service.get("networks", ()))}
    assert out == {"api-gateway", "cli", "prometheus", "grafana"}


CONNECTIONS: Final = {
    *(frozenset({service, "kafka"}) for service in OURS - {"topics"}),
    *(frozenset({service, "mongodb"}) for service in WITH_DATABASE),
    *(frozenset({"api-gateway", service}) for service in WITH_DATABASE),
}


def test_networks_match_the_connections() -> None:
    """Two services share a network exactly if one connects to the other; only monitoring is on several networks."""
    members = {
        network: {name for name, each in SERVICES.items() if network in each.get("networks", ())}
        for network in COMPOSE["networks"].keys() - {"edge"}
    }
    assert {frozenset(each - {"prometheus"}) for each in members.values()} == CONNECTIONS
    assert len(members) == len(CONNECTIONS)


def test_prometheus_reaches_every_scraped_service() -> None:
    """Prometheus can reach every service that it scrapes."""
    config = yaml.safe_load((ROOT / "observability/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    asked = {name for job in config["scrape_configs"] for each in job["dns_sd_configs"] for name in each["names"]}
    ours = set(SERVICES["prometheus"]["networks"])
    assert asked == OURS - {"topics"}
    assert all(ours & set(SERVICES[name]["networks"]) for name in asked)


def test_requests_between_services_are_encrypted() -> None:
    """The gateway calls services by https; it and those services alone have the three TLS files."""
    with_files = {name for name in SERVICES if "SCANFLEET_TLS_CA_FILE" in environment(name)}
    assert with_files == set(WITH_API)
    urls = {name: url for name, url in environment("api-gateway").items() if name.endswith("_URL")}
    assert {url for url in urls.values() if not url.startswith("https://")} == set()
    assert len(urls) == len(with_files) - 1


def test_kafka_users_have_quotas() -> None:
    """The job that creates the users sets their quotas too."""
    (script,) = SERVICES["users"]["command"]
    assert "--entity-default" in script
    assert dict(re.findall(r"(\w+_byte_rate)=(\d+)", script)) == {name: str(rate) for name, rate in QUOTAS.items()}


def test_volumes_are_declared() -> None:
    """A volume is a declared one or an existing folder of the project."""
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
