"""Checks of the manifests in k8s/ without a cluster."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest
import yaml
from fastapi.routing import iter_route_contexts

from api_gateway.main import create_app
from api_gateway_testing.gateway import Gateway
from k8s import generate
from scanfleet.contracts.messages.acls import QUOTAS
from scanfleet.contracts.messages.topics import TOPICS
from scanfleet.runtime.settings import ServerSettings
from scanfleet.services import SERVICES, WITH_API
from scanfleet_testing.bus import MemoryBus

K8S: Final = Path(__file__).parents[2] / "k8s"
KUBECTL: Final = Path(sysconfig.get_path("scripts")) / "kubectl"
KUBERNETES: Final = "1.35"

RAW: Final = "-raw-packets"
"""Suffix of the name of the overlay for raw-packet workers, after that of its platform's overlay."""
OVERLAYS: Final = sorted(path.name for path in (K8S / "overlays").iterdir() if not path.name.endswith(RAW))
OPTIONAL: Final = ("certificates", "grants", "hpa", "ingress", "keda", "monitoring", "tls")
"""Components that an operator may add."""
QUERIES: Final = "job-orchestrator-queries"
"""The processes of the orchestrator that only answer queries, in production."""
WORKLOADS: Final = (*SERVICES, QUERIES, "topics")
FOREIGN: Final = {
    "cert-manager.io/v1/Certificate",
    "cert-manager.io/v1/Issuer",
    "kafka.strimzi.io/v1/Kafka",
    "kafka.strimzi.io/v1/KafkaNodePool",
    "kafka.strimzi.io/v1/KafkaTopic",
    "kafka.strimzi.io/v1/KafkaUser",
    "keda.sh/v1alpha1/ScaledObject",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
}
"""Custom kinds, which their operators validate."""

# Exactly the connections of the architecture.
FLOWS: Final = {
    ("api-gateway", "job-orchestrator", 8080),
    ("api-gateway", QUERIES, 8080),
    ("api-gateway", "result-store", 8080),
    ("job-orchestrator", "mongodb", 27017),
    (QUERIES, "mongodb", 27017),
    ("result-store", "mongodb", 27017),
    *((service, "kafka", 9092) for service in WORKLOADS),
}

Manifest = dict[str, Any]
Judge = Callable[[str, Mapping[str, str]], list[str]]
Reads = Callable[[str, str], bool]


@cache
def build(kustomization: Path) -> list[Manifest]:
    done = subprocess.run([KUBECTL, "kustomize", kustomization], check=True, capture_output=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(
    scope="session",
    params=[
        *OVERLAYS,
        *(overlay + RAW for overlay in OVERLAYS),
        *(f"local+{component}" for component in OPTIONAL),
        "production+sessions",  # `local` has it
    ],
)
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Return the objects of an overlay, alone, with its namespace for raw-packet workers, or with another component."""
    overlay, _, component = request.param.removesuffix(RAW).partition("+")
    if request.param.endswith(RAW):
        return [*build(K8S / "overlays" / overlay), *build(K8S / "overlays" / request.param)]
    if not component:
        return build(K8S / "overlays" / overlay)
    folder = tmp_path_factory.mktemp(component)
    reach = os.path.relpath(K8S, folder)  # kustomize requires relative paths
    kustomization = {"resources": [f"{reach}/overlays/{overlay}"], "components": [f"{reach}/components/{component}"]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(folder)


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def workloads(manifests: list[Manifest]) -> list[Manifest]:
    return of_kind(manifests, "Deployment", "StatefulSet", "Job")


def pod(workload: Manifest) -> Manifest:
    template: Manifest = workload["spec"]["template"]
    return template


def containers(workload: Manifest) -> list[Manifest]:
    spec = pod(workload)["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


def name_of(manifest: Manifest) -> str:
    name: str = manifest["metadata"]["name"]
    return name


def service_of(workload: Manifest) -> str:
    return name_of(workload).removesuffix("-queries")


def namespace_of(manifest: Manifest) -> str:
    namespace: str = manifest["metadata"]["namespace"]
    return namespace


def is_raw(workload: Manifest) -> bool:
    return namespace_of(workload) == "scanfleet-raw"


def namespaces(manifests: list[Manifest]) -> list[str]:
    return [name_of(each) for each in of_kind(manifests, "Namespace")]


@dataclass(frozen=True, slots=True)
class Pod:
    """The namespace and labels that a network policy matches."""

    namespace: str
    labels: Mapping[str, str]

    @classmethod
    def of(cls, workload: Manifest) -> Pod:
        return cls(namespace_of(workload), pod(workload)["metadata"]["labels"])


def test_objects_match_their_schemas(manifests: list[Manifest]) -> None:
    """Every object matches its schema without unknown fields; custom kinds are listed."""
    for manifest in manifests:
        if f"{manifest['apiVersion']}/{manifest['kind']}" not in FOREIGN:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_objects_are_unique(manifests: list[Manifest]) -> None:
    """Objects are unique, and all except the namespaces are in one of them."""
    ids = [(each["kind"], each["metadata"].get("namespace"), name_of(each)) for each in manifests]
    assert len(ids) == len(set(ids))
    assert {namespace for kind, namespace, _ in ids if kind != "Namespace"} == set(namespaces(manifests))


def test_service_environment_is_complete_and_minimal(manifests: list[Manifest], judge: Judge) -> None:
    """Every service starts with its variables, and each variable is read by a service."""
    ours = [
        (service_of(each), environment(each, manifests)) for each in workloads(manifests) if name_of(each) in WORKLOADS
    ]
    assert set(SERVICES) <= {service for service, _ in ours}
    assert [wrong for service, variables in ours for wrong in judge(service, variables)] == []


def environment(workload: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """Return the environment of a workload, with a valid value for each secret."""
    (container,) = pod(workload)["spec"]["containers"]
    variables: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        (config,) = (
            each
            for each in of_kind(manifests, "ConfigMap")
            if (namespace_of(each), name_of(each)) == (namespace_of(workload), source["configMapRef"]["name"])
        )
        variables |= config["data"]
    return variables | {each["name"]: each.get("value", "secret") for each in container.get("env", ())}


def test_secrets_are_files(manifests: list[Manifest], reads: Reads) -> None:
    """No secret is in the environment, and every file in a setting is in one of the service's volumes."""
    for workload in workloads(manifests):
        for container in containers(workload):
            assert not [each for each in container.get("env", ()) if "secretKeyRef" in each.get("valueFrom", {})]
            if not {"env", "envFrom"} & container.keys():
                continue  # a sidecar, which reads no settings
            mounts = {mount["mountPath"] for mount in container.get("volumeMounts", ())}
            files = {
                value
                for name, value in environment(workload, manifests).items()
                if name.endswith("_FILE") and reads(service_of(workload), name)
            }
            assert {str(Path(file).parent) for file in files} <= mounts
            volumes = {volume["name"] for volume in pod(workload)["spec"].get("volumes", ())}
            claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes | claims


@pytest.fixture(scope="session")
def production() -> list[Manifest]:
    return build(K8S / "overlays" / "production")


def test_production_is_spread_over_machines(production: list[Manifest]) -> None:
    """There are three gateways and two of each other service, spread over machines and zones where possible."""
    replicas = {name_of(each): each["spec"]["replicas"] for each in workloads(production)}
    assert replicas == {"api-gateway": 3} | dict.fromkeys(
        ("job-orchestrator", QUERIES, "scanner-worker", "result-store"), 2
    )
    for workload in workloads(production):
        template = pod(workload)
        (term,) = template["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        (spread,) = template["spec"]["topologySpreadConstraints"]
        assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
        assert spread["topologyKey"] == "topology.kubernetes.io/zone"
        for selecting in (term["podAffinityTerm"], spread):
            assert selects(selecting["labelSelector"], template["metadata"]["labels"])
            assert selecting["matchLabelKeys"] == ["app.kubernetes.io/name"]  # of the same service only


def test_production_topics_have_three_replicas(production: list[Manifest]) -> None:
    """Three nodes replicate each topic of the registry three times, with two in-sync replicas required."""
    (nodes,) = of_kind(production, "KafkaNodePool")
    assert nodes["spec"]["replicas"] == 3
    topics = of_kind(production, "KafkaTopic")
    assert {name_of(topic) for topic in topics} == {name for each in TOPICS for name in (each.name, each.dead_letter)}
    for topic in topics:
        assert topic["spec"]["replicas"] == 3
        assert topic["spec"]["config"]["min.insync.replicas"] == "2"


def test_production_kafka_disk_usage_is_bounded(production: list[Manifest]) -> None:
    """Each user has quotas, and all topics at their limits fit on each node's disk with a quarter to spare."""
    assert all(
        name.endswith("ByteRate") for user in of_kind(production, "KafkaUser") for name in user["spec"]["quotas"]
    )
    assert {len(user["spec"]["quotas"]) for user in of_kind(production, "KafkaUser")} == {len(QUOTAS)}
    (nodes,) = of_kind(production, "KafkaNodePool")
    (volume,) = nodes["spec"]["storage"]["volumes"]
    full = sum(
        topic["spec"]["partitions"] * (int(config["retention.bytes"]) + int(config["segment.bytes"]))
        for topic in of_kind(production, "KafkaTopic")
        for config in (topic["spec"]["config"],)
    )
    assert full < 0.75 * int(volume["size"].removesuffix("Gi")) * 2**30


def test_production_kafka_requires_authentication(production: list[Manifest]) -> None:
    """The only listener requires a password over TLS, and each service has its user and may reach that listener."""
    (cluster,) = of_kind(production, "Kafka")
    (listener,) = cluster["spec"]["kafka"]["listeners"]
    assert listener["tls"] is True
    assert listener["authentication"] == {"type": "scram-sha-512"}
    assert cluster["spec"]["kafka"]["authorization"] == {"type": "simple"}
    owner = {"strimzi.io/cluster": name_of(cluster)}
    for kind in ("KafkaNodePool", "KafkaTopic", "KafkaUser"):
        assert all(owner.items() <= each["metadata"]["labels"].items() for each in of_kind(production, kind))
    assert {name_of(user) for user in of_kind(production, "KafkaUser")} == {
        service_of(each) for each in workloads(production)
    }
    node = Pod("scanfleet", owner | {"app.kubernetes.io/name": "kafka"})  # as Strimzi labels them
    policies = of_kind(production, "NetworkPolicy")
    inward = {"ingress": [{"from": listener["networkPolicyPeers"]}], "podSelector": {}, "policyTypes": ["Ingress"]}
    policies.append({"metadata": {"namespace": "scanfleet"}, "spec": inward})  # as Strimzi makes it
    raw = build(K8S / "overlays" / f"production{RAW}")
    policies += of_kind(raw, "NetworkPolicy")
    for workload in [*workloads(production), *workloads(raw)]:
        name = service_of(workload)
        variables = environment(workload, [*production, *raw])
        elsewhere = ".scanfleet" if is_raw(workload) else ""
        assert variables["SCANFLEET_KAFKA"] == f"{name_of(cluster)}-kafka-bootstrap{elsewhere}:{listener['port']}"
        assert variables["SCANFLEET_KAFKA_USERNAME"] == name
        (kafka,) = (volume for volume in pod(workload)["spec"]["volumes"] if volume["name"] == "kafka")
        secrets = {each["secret"]["name"] for each in kafka["projected"]["sources"]}
        assert secrets == {name, f"{name_of(cluster)}-cluster-ca-cert"}  # as Strimzi names them
        assert passes(policies, "egress", Pod.of(workload), node, listener["port"])
        assert not passes(policies, "egress", Pod.of(workload), node, 9092)
        assert passes(policies, "ingress", node, Pod.of(workload), listener["port"])


def test_production_encrypts_requests_between_services(production: list[Manifest]) -> None:
    """Gateway and services have the certificates that the component makes: one for each, by its name and for its side alone."""
    (component,) = (K8S / "components/certificates").glob("certificates.yaml")
    made = {
        each["spec"]["secretName"]: each["spec"]
        for each in yaml.safe_load_all(component.read_text(encoding="utf-8"))
        if each["kind"] == "Certificate"
    }
    ports = {name_of(each): each["spec"]["ports"][0]["port"] for each in of_kind(production, "Service")}
    for workload in workloads(production):
        service = service_of(workload)
        secrets = {volume["secret"]["secretName"] for volume in pod(workload)["spec"]["volumes"] if "secret" in volume}
        if service not in WITH_API:
            assert not secrets & made.keys()
            continue
        assert secrets & made.keys() == {f"{service}-certificate"}
        assert name_of(workload) in made[f"{service}-certificate"]["dnsNames"]
        side = "client" if service == "api-gateway" else "server"
        assert made[f"{service}-certificate"]["usages"] == ["digital signature", f"{side} auth"]
        if side == "server":
            assert ports[name_of(workload)] == 443
    (gateway,) = (each for each in workloads(production) if name_of(each) == "api-gateway")
    variables = environment(gateway, production)
    assert variables["SCANFLEET_ORCHESTRATOR_URL"] == f"https://{QUERIES}"
    assert variables["SCANFLEET_RESULT_STORE_URL"] == "https://result-store"


def test_production_answers_queries_in_processes_without_consumers(production: list[Manifest]) -> None:
    """They differ from the other processes of the orchestrator in their name and in this setting only."""
    (others, queries) = (each for each in of_kind(production, "StatefulSet") if service_of(each) == "job-orchestrator")
    settings = [environment(each, production) for each in (others, queries)]
    assert settings[1] == settings[0] | {"SCANFLEET_REQUESTS_ONLY": "true"}
    assert yaml.safe_dump(pod(queries)["spec"]["volumes"]) == yaml.safe_dump(pod(others)["spec"]["volumes"])
    (certificate,) = (
        each
        for each in yaml.safe_load_all((K8S / "components/certificates/certificates.yaml").read_text(encoding="utf-8"))
        if name_of(each) == "job-orchestrator-certificate"
    )
    assert certificate["spec"]["dnsNames"] == ["job-orchestrator", QUERIES]


def test_session_keys_are_in_the_gateway_only() -> None:
    """The gateway has the keys of browser sessions, as in compose, and no other pod has them."""
    local = build(K8S / "overlays" / "local")
    holders = {
        name_of(workload): volume["name"]
        for workload in workloads(local)
        for volume in pod(workload)["spec"].get("volumes", ())
        if volume.get("secret", {}).get("secretName") == "session-keys"
    }
    assert holders.keys() == {"api-gateway"}
    (gateway,) = (each for each in workloads(local) if name_of(each) == "api-gateway")
    (container,) = containers(gateway)
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == holders["api-gateway"])
    assert environment(gateway, local)["SCANFLEET_SESSION_KEYS_FILE"] == f"{mount['mountPath']}/session-keys"


def test_pods_meet_the_restricted_standard(manifests: list[Manifest]) -> None:
    """No container may run as root, write to its filesystem, or have or gain privileges, except workers with raw packets."""
    for workload in workloads(manifests):
        security = pod(workload)["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(workload):
            raw = is_raw(workload) and container["name"] == "scanner-worker"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": raw,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]} | ({"add": ["NET_RAW"]} if raw else {}),
            }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod(workload)["spec"].keys()
        assert all("hostPath" not in volume for volume in pod(workload)["spec"].get("volumes", ()))


def test_namespace_enforces_the_restricted_standard(manifests: list[Manifest]) -> None:
    """The platform's namespace admits restricted pods only; one with raw-packet workers admits more, and holds nothing else."""
    for namespace in of_kind(manifests, "Namespace"):
        raw = name_of(namespace) == "scanfleet-raw"
        labels = namespace["metadata"]["labels"]
        modes = {name: labels[f"pod-security.kubernetes.io/{name}"] for name in ("audit", "enforce", "warn")}
        assert modes == {"audit": "restricted", "enforce": "privileged" if raw else "restricted", "warn": "restricted"}
    assert {name_of(each) for each in workloads(manifests) if is_raw(each)} <= {"scanner-worker"}


def test_namespace_quota_covers_the_workloads(manifests: list[Manifest]) -> None:
    """The limits of all workloads, with twice the replicas during an update, are within the quota."""
    quotas = {namespace_of(each): each["spec"]["hard"] for each in of_kind(manifests, "ResourceQuota")}
    assert quotas.keys() == set(namespaces(manifests))
    for namespace, quota in quotas.items():
        memory = sum(
            2 * workload["spec"].get("replicas", 1) * _mebibytes(container["resources"]["limits"]["memory"])
            for workload in workloads(manifests)
            for container in containers(workload)
            if namespace_of(workload) == namespace
        )
        assert 0 < memory < _mebibytes(quota["limits.memory"])
        assert "0" in (quota.get("services"), quota.get("services.nodeports"))


def test_namespace_has_default_limits(manifests: list[Manifest]) -> None:
    """Each namespace has defaults for the requests and limits that its quota counts."""
    defaults = {namespace_of(each): each["spec"]["limits"] for each in of_kind(manifests, "LimitRange")}
    assert defaults.keys() == set(namespaces(manifests))
    for (limits,) in defaults.values():
        assert {"cpu", "memory"} <= limits["defaultRequest"].keys()
        assert {"memory", "ephemeral-storage"} <= limits["default"].keys()


def _mebibytes(text: str) -> int:
    return int(text[:-2]) * {"Mi": 1, "Gi": 1024}[text[-2:]]


def test_production_allows_no_egress_by_default(production: list[Manifest]) -> None:
    """Services reach nothing outside the cluster until a site configures its issuer, MongoDB and the networks to scan."""
    services = {service_of(each) for each in workloads(production)}
    for policy in of_kind([*production, *build(K8S / "overlays" / f"production{RAW}")], "NetworkPolicy"):
        for rule in policy["spec"].get("egress", ()):
            strimzi = policy["spec"]["podSelector"] == {"matchLabels": {"strimzi.io/cluster": "scanfleet"}}
            assert rule.get("to") or strimzi, name_of(policy)  # Strimzi's own pods ask Kubernetes, wherever it is
    assert {name_of(each) for each in of_kind(production, "NetworkPolicy")} >= {"issuer", "state"} | services


def test_pods_have_no_cluster_access(manifests: list[Manifest]) -> None:
    """Every pod has its own service account, without a token."""
    accounts = {
        (namespace_of(each), name_of(each)): each["automountServiceAccountToken"]
        for each in of_kind(manifests, "ServiceAccount")
    }
    for workload in workloads(manifests):
        spec = pod(workload)["spec"]
        assert spec["serviceAccountName"] == name_of(workload)
        account = accounts[namespace_of(workload), name_of(workload)]
        assert spec["automountServiceAccountToken"] is account is False


def test_containers_have_resources_and_probes(manifests: list[Manifest]) -> None:
    """Every container has requests and a memory limit; long-running ones have startup, liveness and readiness probes."""
    for workload in workloads(manifests):
        for container in containers(workload):
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
        if workload["kind"] != "Job":
            for container in pod(workload)["spec"]["containers"]:
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_probes_have_a_port_of_their_own(manifests: list[Manifest]) -> None:
    """Every service is probed on the probe port, which no policy opens but to those who measure, and the API on the other."""
    ours = [each for each in workloads(manifests) if each["kind"] != "Job" and name_of(each) in WORKLOADS]
    for workload in ours:
        (container,) = pod(workload)["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        api = {"http": 8080} if service_of(workload) in WITH_API else {}
        assert ports == {"probes": ServerSettings.model_fields["probe_port"].default, **api}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == "probes"
    opened = {
        name_of(policy)
        for policy in of_kind(manifests, "NetworkPolicy")
        for rule in policy["spec"].get("ingress", ())
        if any(port["port"] == 8081 for port in rule["ports"])
    }
    assert opened <= {"keda", "monitoring"}


def test_ingress_routes_every_path_of_the_gateway() -> None:
    """The Ingress has the first part of the path of each route, by which it matches all below, and nothing else."""
    (ingress, _) = yaml.safe_load_all((K8S / "components/ingress/ingress.yaml").read_text(encoding="utf-8"))
    (rule,) = ingress["spec"]["rules"]
    app = create_app(Gateway().settings(), bus=MemoryBus())
    routes = {f"/{route.path.split('/')[1]}" for route in iter_route_contexts(app.routes) if route.path is not None}
    assert {path["path"] for path in rule["http"]["paths"]} == routes
    exact = {path["path"] for path in rule["http"]["paths"] if path["pathType"] == "Exact"}
    assert exact == {"/", "/openapi.json"}


def test_production_example_trusts_the_ingress_in_the_gateway_only(tmp_path: Path) -> None:
    """The overlay that the README shows builds, and sets the gateway's trusted proxies; no other service gets that value."""
    shown = re.search(
        r"\n## In production\n.*?```yaml\n(.*?)```", (K8S / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert shown is not None
    reach = os.path.relpath(K8S, tmp_path)
    example = yaml.safe_load(shown[1])
    example["resources"] = [f"{reach}/overlays/{each}" for each in example["resources"]]
    example["components"] = [f"{reach}/{each}" for each in example["components"]]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(example))
    built = build(tmp_path)
    trusted = {name_of(each): environment(each, built).get("SCANFLEET_TRUSTED_PROXIES") for each in workloads(built)}
    anyone = "0.0.0.0/0,::/0"  # the network policy admits the gateway only
    assert trusted.pop("api-gateway") not in (None, anyone)
    assert trusted == dict.fromkeys(("job-orchestrator", QUERIES, "result-store"), anyone) | {"scanner-worker": None}


def test_labels_follow_the_convention(manifests: list[Manifest]) -> None:
    """Every object has the part-of label, and every pod the name label, by which it is selected."""
    assert all(each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "scanfleet" for each in manifests)
    for workload in workloads(manifests):
        labels = pod(workload)["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == workload["metadata"]["labels"]["app.kubernetes.io/name"]
        if workload["kind"] != "Job":
            assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_services_have_a_disruption_budget(manifests: list[Manifest]) -> None:
    """A drain evicts one pod of a service at a time."""
    budgets = {name_of(each): each["spec"]["maxUnavailable"] for each in of_kind(manifests, "PodDisruptionBudget")}
    services = {name_of(each) for each in workloads(manifests)} & set(WORKLOADS)
    assert budgets == dict.fromkeys(services - {"topics"}, 1)


def test_static_group_members_are_stateful_sets(manifests: list[Manifest]) -> None:
    """Static members of consumer groups are StatefulSets."""
    kinds = {name_of(each): each["kind"] for each in workloads(manifests)}
    assert {kinds["job-orchestrator"], kinds["result-store"]} == {"StatefulSet"}


def test_default_network_policy_denies_all_traffic(manifests: list[Manifest]) -> None:
    """In each namespace one policy selects every pod in both directions and allows nothing."""
    nothing = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    denying = {namespace_of(each) for each in of_kind(manifests, "NetworkPolicy") if each["spec"] == nothing}
    assert denying == set(namespaces(manifests))


def test_policies_allow_exactly_the_flows(manifests: list[Manifest]) -> None:
    """Between any two pods exactly the connections of the architecture are allowed by the policies of both."""
    pods = [(name_of(each), Pod.of(each)) for each in workloads(manifests)]
    policies = of_kind(manifests, "NetworkPolicy")
    for source, sender in pods:
        for target, receiver in pods:
            for port in {1, 8081, *(port for _, _, port in FLOWS)}:
                allowed = passes(policies, "egress", sender, receiver, port) and passes(
                    policies, "ingress", receiver, sender, port
                )
                assert allowed is ((source, target, port) in FLOWS), (source, target, port)


@pytest.mark.parametrize(("server", "port"), [("kafka", 9092), ("mongodb", 27017)])
def test_trial_servers_admit_query_processes(server: str, port: int) -> None:
    """The one-node servers admit the orchestrator's query processes, which a site may add to them."""
    policies = of_kind(build(K8S / "overlays/local"), "NetworkPolicy")
    queries, node = (Pod("scanfleet", {"app.kubernetes.io/name": name}) for name in (QUERIES, server))
    assert passes(policies, "egress", queries, node, port)
    assert passes(policies, "ingress", node, queries, port)


def test_pod_without_named_connections_has_no_dns_access(manifests: list[Manifest]) -> None:
    """The cluster's name server is open to those who connect by name: the services, and what Strimzi runs."""
    dns = Pod("kube-system", {"k8s-app": "kube-dns"})
    policies = of_kind(manifests, "NetworkPolicy")
    asking = {name_of(each) for each in workloads(manifests) if passes(policies, "egress", Pod.of(each), dns, 53)}
    assert asking == {name_of(each) for each in workloads(manifests)} & set(WORKLOADS)
    if of_kind(manifests, "Kafka"):
        assert passes(policies, "egress", Pod("scanfleet", {"strimzi.io/cluster": "scanfleet"}), dns, 53)


def test_autoscalers_use_the_same_metric() -> None:
    """The autoscaler, the adapter's rule in the README, and KEDA use the same metric and target."""
    (autoscaler,) = yaml.safe_load_all((K8S / "components/hpa/autoscaler.yaml").read_text(encoding="utf-8"))
    (asked,) = (each["external"] for each in autoscaler["spec"]["metrics"])
    scaled, service, _ = yaml.safe_load_all((K8S / "components/keda/scaled-object.yaml").read_text(encoding="utf-8"))
    (trigger,) = (each["metadata"] for each in scaled["spec"]["triggers"])
    (port,) = service["spec"]["ports"]
    assert trigger["url"] == f"http://{name_of(service)}.scanfleet:{port['port']}/metrics"
    assert asked["metric"] == {"name": trigger["valueLocation"]}
    assert asked["target"] == {"type": "AverageValue", "averageValue": trigger["targetValue"]}
    blocks = re.findall(r"```yaml\n(.*?)```", (K8S / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (rules,) = (block["externalRules"] for block in map(yaml.safe_load, blocks) if "externalRules" in block)
    (rule,) = rules
    assert rule["seriesQuery"] == asked["metric"]["name"]
    assert rule["metricsQuery"].startswith("max(")  # an autoscaler adds up whatever series it is given


@pytest.mark.parametrize("file", generate.FILES)
def test_generated_manifests_are_up_to_date(file: str) -> None:
    """The committed files are those that `python k8s/generate.py` writes."""
    assert (K8S / file).read_text(encoding="utf-8") == generate.text(file)


def passes(policies: list[Manifest], way: str, ours: Pod, other: Pod, port: int) -> bool:
    """Return whether a pod's policies allow traffic in this direction; without a policy they do."""
    holding = [
        each["spec"]
        for each in policies
        if namespace_of(each) == ours.namespace
        and way.capitalize() in each["spec"]["policyTypes"]
        and selects(each["spec"]["podSelector"], ours.labels)
    ]
    peers = "to" if way == "egress" else "from"
    return not holding or any(
        port in {each["port"] for each in rule.get("ports", [{"port": port}])}
        and (peers not in rule or any(_is_peer(peer, other, ours.namespace) for peer in rule[peers]))
        for spec in holding
        for rule in spec.get(way, ())
    )


def _is_peer(peer: Manifest, other: Pod, namespace: str) -> bool:
    if "ipBlock" in peer:
        return False
    names = {"kubernetes.io/metadata.name": other.namespace}
    here = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    return selects(peer.get("namespaceSelector", here), names) and selects(peer.get("podSelector", {}), other.labels)


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", ())
    )
