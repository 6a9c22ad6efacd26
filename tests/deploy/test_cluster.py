"""The manifests on a real cluster, that of the current kubeconfig: `make k8s-test`.

The tests scan each worker pod's own loopback network, where the sidecar `scan-targets` listens.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import pytest
import yaml

from local import demo, ports, targets, wait
from local.compose import PORT
from local.paths import ROOT
from local.wait import until
from scanfleet.services import SERVICES, WITH_API, WITH_DATABASE
from tests.client import Client
from tests.deploy.container_programs import REACHED

pytestmark = pytest.mark.k8s

NAMESPACE: Final = "scanfleet"
RAW: Final = "scanfleet-raw"
"""The namespace of workers that send raw packets."""
OTHER: Final = "scanfleet-stranger"
"""A namespace of others, without policies."""
K8S: Final = ROOT / "k8s"
TOOLS: Final = sysconfig.get_path("scripts")
ENVIRONMENT: Final = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
LOOK_SECONDS: Final = 0.5  # polling interval: each query of the cluster starts a process

DEPLOY, REACH, ADD_RAW = (
    block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
)
"""The README's commands to deploy, to reach the deployment, and to add raw-packet workers."""

OPEN: Final = {(host, port) for port, _, hosts in targets.SERVERS for host in hosts}
SUBNET: Final = "127.9.8.0/24"
PORTS: Final = "2100-2625,6379,8000"
LONG: Final[dict[str, Any]] = {
    # 256 addresses × 528 ports at 500 a second and nmap: 270 slot seconds in 16 chunks, little of it work for a processor.
    "ports": PORTS,
    "technique": "connect",
    "service_detection": False,
    "discovery": "none",
    "max_rate": 1000,
}
PER_WORKER: Final = 1000
"""Probes per second of a worker's two nmaps: a job with n times that rate keeps n workers busy."""
FINISH_SECONDS: Final = 300.0  # for such a scan, whatever happens to it

WORKLOADS: Final = (
    "deployment/api-gateway",
    "statefulset/job-orchestrator",
    "deployment/scanner-worker",
    "statefulset/result-store",
)
ADDRESSES: Final = {
    "kafka": 9092,
    "mongodb": 27017,
    **dict.fromkeys(WITH_API, 80),
    "kubernetes.default": 443,
}
REACHES: Final[dict[str, set[str]]] = {
    "api-gateway": {"kafka", "job-orchestrator", "result-store"},
    "job-orchestrator": {"kafka", "mongodb"},
    "scanner-worker": {"kafka"},
    "result-store": {"kafka", "mongodb"},
    "stranger": set(),
}
"""The allowed connections of the architecture; a stranger is a pod that no policy selects."""

WANTS: Final = {
    "keda": ("scaledobjects.keda.sh",),
    "monitoring": ("podmonitors.monitoring.coreos.com", "prometheusrules.monitoring.coreos.com"),
}
"""Kinds that a component needs, whose operators a cluster may have."""

_METRICS: Final = """
from urllib.request import urlopen
print(urlopen("http://127.0.0.1:8081/metrics").read().decode())
"""

_ASK: Final = """
import ssl, sys
from urllib.error import HTTPError
from urllib.request import urlopen
context = ssl.create_default_context(cafile="/tls/ca.crt")
if sys.argv[2:]:
    context.load_cert_chain(*sys.argv[2:])
try:
    urlopen(f"https://{sys.argv[1]}/internal/ready", context=context)
    print("answered")
except HTTPError:  # without an internal token
    print("answered")
except OSError:
    print("closed")
"""
"""Sends a request to the service that its first argument names, with the certificate and the key that the others name."""

Manifest = dict[str, Any]


def kubectl(*arguments: str, text: str | None = None) -> str:
    return subprocess.run(
        ["kubectl", "--namespace", NAMESPACE, *arguments],
        check=True,
        env=ENVIRONMENT,
        input=text,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.strip()


def objects(*arguments: str) -> list[Manifest]:
    items: list[Manifest] = json.loads(kubectl("get", "--output", "json", *arguments))["items"]
    return items


def pods(service: str) -> list[Manifest]:
    """Return the service's pods that are not being deleted."""
    found = objects("pods", "--selector", f"app.kubernetes.io/name={service}")
    return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]


def is_ready(pod: Manifest) -> bool:
    return any(each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", ()))


def in_pod(service: str, *argv: str) -> str:
    """Return the output of a command in a pod of a service."""
    return exec_in(next(pod for pod in pods(service) if is_ready(pod)), service, *argv)


def exec_in(pod: Manifest, container: str, *argv: str) -> str:
    return kubectl("exec", pod["metadata"]["name"], "--container", container, "--", *argv)


def metrics(service: str, name: str) -> list[float]:
    """Return the value of a metric in each ready pod of a service."""
    shown = [exec_in(pod, service, "python", "-c", _METRICS) for pod in pods(service) if is_ready(pod)]
    return [float(value) for each in shown for value in re.findall(rf"^{name} (\S+)$", each, re.MULTILINE)]


def expired() -> float:
    """Return the number of expired leases of the only orchestrator."""
    (count,) = metrics("job-orchestrator", "scanfleet_leases_expired_total")
    return count


def scanning() -> int:
    """Return the number of workers that are scanning."""
    return sum(nmaps > 0 for nmaps in metrics("scanner-worker", "scanfleet_worker_nmap_running"))


def scale(workload: str, replicas: int) -> None:
    kubectl("scale", workload, f"--replicas={replicas}")
    rolled_out(workload)


def rolled_out(*workloads: str) -> None:
    for workload in workloads:
        kubectl("rollout", "status", "--timeout=5m", workload)


def apply(folder: Path, *flags: str) -> str:
    kubectl("wait", "--for=delete", "job/topics", "--timeout=3m")  # whose template cannot change
    # With --force-conflicts, since scaling by hand takes the ownership of the field.
    return kubectl("apply", "--server-side", "--force-conflicts", *flags, "--kustomize", str(folder))


def run(commands: Sequence[str]) -> None:
    """Run documented commands as they are written."""
    for command in commands:
        subprocess.run(["bash", "-c", command], check=True, cwd=ROOT, env=ENVIRONMENT)


def variant(folder: Path, component: str, patches: Sequence[Manifest] = ()) -> Path:
    """Create an overlay in `folder` that adds a component to the local overlay."""
    reach = os.path.relpath(K8S, folder)  # kustomize requires relative paths
    kustomization = {
        "resources": [f"{reach}/overlays/local"],
        "components": [f"{reach}/components/{component}"],
        "patches": list(patches),
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def needs(*kinds: str) -> None:
    """Skip on a cluster without these kinds, because their operator is not installed."""
    for kind in kinds:
        if not kubectl("get", "customresourcedefinition", kind, "--ignore-not-found"):
            pytest.skip(f"the cluster does not define {kind}: install its operator to run this test")


@pytest.fixture(scope="module", autouse=True)
def deployed() -> Iterator[None]:
    """Deploy everything with the commands of k8s/README.md."""
    assert not kubectl("get", "namespace", NAMESPACE, RAW, "--ignore-not-found"), (
        "a namespace is in use: delete it first"
    )
    try:
        run(DEPLOY)
        yield
    finally:
        kubectl("delete", "namespace", NAMESPACE, RAW, "--ignore-not-found", "--timeout=5m")


@contextmanager
def gateway() -> Iterator[Client]:
    """Yield a user of the gateway while its pod runs."""
    assert ports.is_free(PORT)
    forward, make_token = (shlex.split(command.replace(" 8080:", f" {PORT}:")) for command in REACH)
    token = subprocess.run(make_token, check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with subprocess.Popen(forward, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as forwarding:
        try:
            wait.listens("127.0.0.1", PORT, 30)
            client = Client(f"http://127.0.0.1:{PORT}", token)
            with client.http:
                yield client
        finally:
            forwarding.terminate()


@pytest.fixture
def user() -> Iterator[Client]:
    with gateway() as client:
        yield client


@pytest.fixture(scope="module")
def truth() -> set[tuple[str, int]]:
    """Return what plain nmap finds in a worker's network namespace."""
    xml = in_pod("scanner-worker", "nmap", "-n", "-Pn", "-sT", "-T4", "-p", PORTS, "-oX", "-", SUBNET)
    found = {
        (address.attrib["addr"], int(port.attrib["portid"]))
        for host in ET.fromstring(xml).iterfind("host")  # noqa: S314 # our own nmap on our own servers
        for address in host.iterfind("address")
        for port in host.iterfind("ports/port")
        if port.find("state[@state='open']") is not None
    }
    assert found == OPEN
    return found


@pytest.fixture
def stranger() -> Iterator[Manifest]:
    """Yield a foreign pod in the namespace that meets the enforced pod security standard."""
    name = "stranger"
    manifest = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": name}},
        "spec": {
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 0,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": name,
                    "image": "scanfleet/scanner-worker:dev",
                    "command": ["python", "-c", "import signal; signal.pause()"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }
    yield manifest
    kubectl("delete", "pod", name, "--ignore-not-found")


def started(user: Client, **policy: Any) -> int:
    """Start a long scan; return once it makes progress."""
    job_id = user.scan(SUBNET, **LONG | policy)
    until(lambda: user.task(job_id)["status"]["progress"] > 0, 120, "the scan to be under way", LOOK_SECONDS)
    return job_id


def assert_as_found(user: Client, job_id: int, truth: set[tuple[str, int]]) -> None:
    """Check that the scan found what plain nmap finds, each once, and that every probe has an outcome."""
    assert user.finished(job_id, limit_seconds=FINISH_SECONDS)["status"]["status"] == "completed"
    found = [(each["ip_address"], each["port"]) for each in user.results(job_id)]
    assert len(found) == len(set(found))
    assert set(found) == truth
    ledger = user.ledger(job_id)
    assert ledger["accounted"]
    assert ledger["counts"]["answered"] == ledger["request"]["probes"]


def test_ready_platform_accepts_the_first_requests(user: Client) -> None:
    """Once every pod is ready the first requests create a subnet, a policy and a job."""
    user.scan(SUBNET, ports="8000", technique="connect", service_detection=False)


def test_scan_finds_the_same_as_nmap(user: Client) -> None:
    """A scan through the gateway finds the same machines, ports, services and versions as nmap in a worker's pod."""
    worker = pods("scanner-worker")[0]["metadata"]["name"]
    nmap = ["kubectl", "--namespace", NAMESPACE, "exec", worker, "--container", "scanner-worker", "--", "nmap"]
    assert demo.show(user.url, user.token, targets.USUAL, nmap) == 0


def test_scaling_workers_during_a_scan_loses_nothing(user: Client, truth: set[tuple[str, int]]) -> None:
    """Scaling from one worker to three and back loses no result and expires no lease."""
    scale("deployment/scanner-worker", 1)
    before = expired()
    job_id = started(user, max_rate=3 * PER_WORKER)
    scale("deployment/scanner-worker", 3)
    until(lambda: scanning() == 3, 60, "three workers to scan", LOOK_SECONDS)
    kubectl("scale", "deployment/scanner-worker", "--replicas=1")
    assert_as_found(user, job_id, truth)
    until(lambda: len(pods("scanner-worker")) == 1, 60, "two workers to be gone", LOOK_SECONDS)
    assert expired() == before


def test_killed_worker_loses_no_result(user: Client, truth: set[tuple[str, int]]) -> None:
    """With a worker's pod killed in mid-scan every server is found, once."""
    scale("deployment/scanner-worker", 2)
    job_id = started(user, max_rate=2 * PER_WORKER)
    until(lambda: scanning() == 2, 60, "both workers to scan", LOOK_SECONDS)
    kubectl("delete", "pod", pods("scanner-worker")[0]["metadata"]["name"], "--grace-period=1")
    assert_as_found(user, job_id, truth)


def test_rolling_update_during_a_scan_loses_nothing(truth: set[tuple[str, int]]) -> None:
    """With every pod of every service replaced in mid-scan the results are the same."""
    rolled_out(*WORKLOADS)
    before = ids()
    with gateway() as user:
        job_id = started(user)
        kubectl("rollout", "restart", *WORKLOADS)
        rolled_out(*WORKLOADS)
    assert not before & ids()
    with gateway() as user:
        user.scan(SUBNET, **LONG | {"ports": "8000"})  # ready means usable: no request is repeated
        assert_as_found(user, job_id, truth)


def ids() -> set[str]:
    return {pod["metadata"]["uid"] for service in SERVICES for pod in pods(service)}


def test_kafka_outage_makes_services_unready_without_restart(user: Client) -> None:
    """While Kafka is unavailable all services are unready without restarts, and recover by themselves."""
    before = restarts()
    scale("statefulset/kafka", 0)
    until(lambda: not any(map(is_ready, all_pods())), 120, "no service to be ready", LOOK_SECONDS)
    scale("statefulset/kafka", 1)
    until(lambda: all(map(is_ready, all_pods())), 120, "every service to be ready", LOOK_SECONDS)
    assert restarts() == before
    job_id = user.scan(SUBNET, ports="2222", technique="connect", service_detection=False)
    assert user.finished(job_id)["status"]["status"] == "completed"


def all_pods() -> list[Manifest]:
    return [pod for service in SERVICES for pod in pods(service)]


def restarts() -> dict[str, int]:
    return {
        pod["metadata"]["name"]: sum(each["restartCount"] for each in pod["status"]["containerStatuses"])
        for pod in all_pods()
    }


@pytest.mark.parametrize("service", SERVICES)
def test_network_policies_allow_exactly_the_flows(service: str) -> None:
    """A service's pod can connect to exactly its allowed flows in the namespace."""
    assert reached_from(service) == REACHES[service]


def test_network_policies_isolate_unknown_pods(stranger: Manifest) -> None:
    """A pod without a service's labels can connect to no pod, neither by name nor by address."""
    kubectl("apply", "--filename", "-", text=json.dumps(stranger))
    kubectl("wait", "pod/stranger", "--for=condition=Ready", "--timeout=2m")
    # A cluster may need a moment to apply its policies to a new pod.
    until(lambda: not addresses_reached_by_stranger(NAMESPACE), 30, "the policies to hold for a stranger")
    assert reached_from("stranger") == REACHES["stranger"]


def test_network_policies_admit_other_namespaces_to_the_gateway_only(stranger: Manifest) -> None:
    """A pod of a namespace without policies can connect to the gateway's API and to no other port of the platform's pods."""
    kubectl("create", "namespace", OTHER)
    try:
        kubectl("--namespace", OTHER, "apply", "--filename", "-", text=json.dumps(stranger))
        kubectl("--namespace", OTHER, "wait", "pod/stranger", "--for=condition=Ready", "--timeout=2m")
        gateways = sorted(pod["status"]["podIP"] for pod in pods("api-gateway"))
        assert addresses_reached_by_stranger(OTHER) == gateways
    finally:
        kubectl("delete", "namespace", OTHER, "--timeout=2m")


def addresses_reached_by_stranger(namespace: str) -> list[str]:
    """Return the address of each declared port of the platform's pods to which the pod `stranger` can connect."""
    listening = (
        f"{pod['status']['podIP']}:{port['containerPort']}"
        for pod in objects("pods")
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
    )
    return sorted(
        kubectl("--namespace", namespace, "exec", "stranger", "--", "python", "-c", REACHED, *listening).split()
    )


def reached_from(service: str) -> set[str]:
    listening = (f"{name}:{port}" for name, port in ADDRESSES.items())
    return set(in_pod(service, "python", "-c", REACHED, *listening).split())


def test_privileged_pod_is_rejected(stranger: Manifest) -> None:
    """The namespace accepts a pod that meets the restricted standard, and rejects the same pod with one more privilege."""
    kubectl("apply", "--dry-run=server", "--filename", "-", text=json.dumps(stranger))
    del stranger["spec"]["containers"][0]["securityContext"]["capabilities"]
    with pytest.raises(subprocess.CalledProcessError):
        kubectl("apply", "--dry-run=server", "--filename", "-", text=json.dumps(stranger))


def test_pods_have_no_service_account_token() -> None:
    """No token of an account is mounted into any pod."""
    sources = [
        source
        for pod in objects("pods")
        for volume in pod["spec"].get("volumes", ())
        for source in volume.get("projected", {}).get("sources", ())
    ]
    assert not [source for source in sources if "serviceAccountToken" in source]


def test_disruption_budgets_allow_one_pod() -> None:
    """Every disruption budget selects pods, and allows one disruption."""
    until(
        lambda: {each["status"]["disruptionsAllowed"] for each in objects("pdb")} == {1},
        60,
        "the budgets",
        LOOK_SECONDS,
    )
    expected = {each["metadata"]["name"]: each["status"]["expectedPods"] for each in objects("pdb")}
    assert expected == {service: len(pods(service)) for service in SERVICES}


@pytest.mark.parametrize("component", ["hpa", "keda", "monitoring"])
def test_components_are_accepted_by_the_api_server(component: str, tmp_path: Path) -> None:
    """The API server accepts every object of the local overlay with the component, with all admission checks."""
    needs(*WANTS.get(component, ()))
    apply(variant(tmp_path, component), "--dry-run=server")


def test_production_is_accepted_by_the_api_server() -> None:
    """The API server accepts every object of the production overlay whose kind it defines, with all admission checks."""
    dry_run(K8S / "overlays/production")


def dry_run(folder: Path) -> None:
    served = set(kubectl("api-versions").split())
    every = list(yaml.safe_load_all(kubectl("kustomize", str(folder))))
    ours = [each for each in every if each["apiVersion"] in served]
    assert {each["kind"] for each in ours} >= {"Deployment", "NetworkPolicy", "ResourceQuota"}
    arguments = ("--server-side", "--force-conflicts", "--dry-run=server", "--filename", "-")
    namespace = every[0]["metadata"]["name"]
    kubectl("--namespace", namespace, "apply", *arguments, text=yaml.safe_dump_all(ours))


def test_raw_packet_namespace_enables_syn_scans(user: Client, truth: set[tuple[str, int]]) -> None:
    """A scan by SYN waits for a worker that may send raw packets, and one of the other namespace finds what plain nmap finds."""
    job_id = user.scan(SUBNET, **LONG | {"technique": "syn", "max_rate": None})

    def reasons() -> set[str]:
        waiting = user.http.get(f"/api/v1/task/{job_id}/waiting").json()
        return {reason["kind"] for reason in waiting["reasons"]}

    until(lambda: "no_raw_worker" in reasons(), 60, "the job to wait for raw packets", LOOK_SECONDS)
    try:
        run(ADD_RAW)
        assert_as_found(user, job_id, truth)
        (raw,) = objects("--namespace", RAW, "pods")
        names = {name if "." in name else f"{name}.{NAMESPACE}": port for name, port in ADDRESSES.items()}
        listening = (f"{name}:{port}" for name, port in names.items())
        reached = kubectl(
            *("--namespace", RAW, "exec", raw["metadata"]["name"], "--container", "scanner-worker", "--"),
            *("python", "-c", REACHED, *listening),
        )
        assert reached == f"kafka.{NAMESPACE}"
        dry_run(K8S / "overlays/production-raw-packets")
    finally:
        kubectl("delete", "namespace", RAW, "--ignore-not-found", "--timeout=5m")


def test_keda_scales_workers_with_the_queue(tmp_path: Path, user: Client, truth: set[tuple[str, int]]) -> None:
    """KEDA scales workers from zero to several for a scan and back to zero, and the scan loses nothing."""
    if not kubectl("--namespace", "keda", "get", "deployment", "keda-operator", "--ignore-not-found"):
        pytest.skip("the cluster has no keda-operator in the namespace keda: install KEDA to run this test")
    impatient = {
        "target": {"kind": "ScaledObject"},
        "patch": yaml.safe_dump([{"op": "replace", "path": "/spec/cooldownPeriod", "value": 10}]),
    }
    apply(variant(tmp_path, "keda", [impatient]))
    try:
        until(lambda: not pods("scanner-worker"), 120, "no worker to be left", LOOK_SECONDS)
        job_id = user.scan(SUBNET, **LONG)
        until(lambda: len(pods("scanner-worker")) > 1, 120, "workers to come", LOOK_SECONDS)
        assert_as_found(user, job_id, truth)
        until(lambda: not pods("scanner-worker"), 120, "all workers to go", LOOK_SECONDS)
    finally:
        kubectl("delete", "scaledobject", "--all")
        apply(K8S / "overlays/local")


def test_tls_component_encrypts_requests_between_services(tmp_path: Path, truth: set[tuple[str, int]]) -> None:
    """With the component and the documented certificates services use TLS, and refuse a caller without a certificate."""
    (commands,) = re.findall(r"```shell\n(\S+ -m local\.credentials.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
    run([commands.replace(" certificates\n", f" {tmp_path}/files\n").replace("=certificates/", f"={tmp_path}/files/")])
    (tmp_path / "overlay").mkdir()
    apply(variant(tmp_path / "overlay", "tls"))
    rolled_out(*WORKLOADS)
    with gateway() as user:
        job_id = user.scan(SUBNET, **LONG | {"max_rate": None})
        assert_as_found(user, job_id, truth)
    for service in WITH_DATABASE:
        ask = ("python", "-c", _ASK, service)
        assert in_pod("api-gateway", *ask, "/tls/tls.crt", "/tls/tls.key") == "answered"
        assert in_pod("api-gateway", *ask) == "closed"
