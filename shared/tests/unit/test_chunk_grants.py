"""The scope of the orchestrator's grants."""

from __future__ import annotations

import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from scanfleet.contracts.messages import ChunkScanned, HostScanned, PortFound
from scanfleet.contracts.messages.chunks import Grant
from scanfleet.security.chunk_grants import Grants, Signer
from scanfleet_testing.chunk_grants import grants, signer

TOKEN: dict[str, Any] = {"job_id": 41, "chunk_id": "41-3", "attempt": 2, "worker_id": "w-1"}
CHUNK: dict[str, Any] = TOKEN | {
    "user_id": 7,
    "first_address": "127.9.8.0",
    "outcomes": "..x.",
    "ports": "T:22,80-90,U:53,60-69",
}


def granted(**changed: Any) -> Grant:
    return signer().grant(**(CHUNK | changed))


def host(**changed: Any) -> HostScanned:
    fields: dict[str, Any] = {
        "user_id": 7,
        "address": "127.9.8.1",
        "outcome": "a",
        "technique": "connect",
        "ports": (PortFound(port=22), PortFound(port=90), PortFound(port=53, protocol="udp")),
        "open_filtered": "60-62,69",
        "grant": granted(),
    }
    return HostScanned(**(TOKEN | fields | changed))


def scanned(**changed: Any) -> ChunkScanned:
    fields: dict[str, Any] = {
        "outcomes": "adxs",
        "first_address": "127.9.8.0",
        "slot_seconds": 1,
        "technique": "connect",
        "grant": granted(),
    }
    return ChunkScanned(**(TOKEN | fields | changed))


@pytest.mark.parametrize("message", [host(), host(ports=(), open_filtered=""), host(address="127.9.8.3"), scanned()])
def test_grants_result_of_a_signed_chunk_is_covered(message: HostScanned | ChunkScanned) -> None:
    """Hosts with granted addresses and ports, and a map of the granted addresses, are covered."""
    assert grants().fault(message) == ""


@pytest.mark.proves("A25", "G19")
@pytest.mark.parametrize(
    "message",
    [
        host(grant=None),
        host(job_id=42),
        host(chunk_id="41-4"),
        host(attempt=1),
        host(attempt=3),
        host(worker_id="w-2"),
        host(user_id=8),
        host(user_id=8, grant=granted().model_copy(update={"user_id": 8})),
        host(address="127.9.7.255"),
        host(address="127.9.8.4"),
        host(address="127.9.8.4", grant=granted().model_copy(update={"addresses": 5})),
        host(address="127.9.8.2"),
        host(address="127.9.8.2", grant=granted().model_copy(update={"excluded": ""})),
        host(address="::7f09:801"),
        host(ports=(PortFound(port=23),)),
        host(ports=(PortFound(port=91),)),
        host(ports=(PortFound(port=54, protocol="udp"),)),
        host(ports=(PortFound(port=60, protocol="tcp"),)),
        host(ports=(PortFound(port=23),), grant=granted().model_copy(update={"ports": "T:23"})),
        host(open_filtered="59-61"),
        host(open_filtered="x"),
        scanned(grant=None),
        scanned(job_id=42),
        scanned(chunk_id="41-4"),
        scanned(attempt=1),
        scanned(worker_id="w-2"),
        scanned(first_address="127.9.8.1"),
        scanned(outcomes="adxsd"),
        scanned(outcomes="adas"),
        scanned(outcomes="xdxs"),
    ],
)
def test_grants_forged_result_is_not_covered(message: HostScanned | ChunkScanned) -> None:
    """Another job, chunk, attempt, worker, user, address or port than the signed ones is not covered, nor is no grant."""
    assert grants().fault(message) != ""


@pytest.mark.proves("A25", "G19")
def test_grants_top_ports_bound_protocol_and_number() -> None:
    """Of the most common ports the protocol and the number are checked, since nmap alone ranks them."""
    grant = granted(ports="top:51-52")
    one, two, three = (PortFound(port=number) for number in (1, 2, 3))
    assert grants().fault(host(grant=grant, ports=(one, two), open_filtered="")) == ""
    assert grants().fault(host(grant=grant, ports=(one, two, three), open_filtered="")) != ""
    assert grants().fault(host(grant=grant, ports=(), open_filtered="53")) != ""


@pytest.mark.proves("A25", "G19")
def test_grants_rotation_accepts_old_and_new_key_and_no_other() -> None:
    """While the key is replaced grants of both keys are valid; those of another key or an altered signature are not."""
    old, new, other = (Ed25519PrivateKey.generate() for _ in range(3))
    both = Grants([old.public_key(), new.public_key()])
    assert both.fault(host(grant=Signer(old).grant(**CHUNK))) == ""
    assert both.fault(host(grant=Signer(new).grant(**CHUNK))) == ""
    foreign = Signer(other).grant(**CHUNK)
    assert both.fault(host(grant=foreign)) != ""
    key_id = Signer(old).grant(**CHUNK).signature.partition(".")[0]
    renamed = foreign.model_copy(update={"signature": f"{key_id}.{foreign.signature.partition('.')[2]}"})
    assert both.fault(host(grant=renamed)) != ""
    assert Grants([new.public_key()]).fault(host(grant=Signer(old).grant(**CHUNK))) != ""


def test_grants_cost_a_fraction_of_a_millisecond_a_chunk() -> None:
    """Signing a chunk takes 0.1 ms of CPU, verifying it with 64 hosts 1 % of scanning them; bounds are five times that."""
    rounds = 200
    by = signer()
    began = time.process_time()
    made = [by.grant(**(CHUNK | {"attempt": number})) for number in range(1, rounds + 1)]
    assert (time.process_time() - began) / rounds < 0.0005
    hosts = [host(attempt=number, grant=grant) for number, grant in enumerate(made, 1)]
    verifier = grants()
    began = time.process_time()
    assert not any(verifier.fault(each) for each in hosts)
    assert (time.process_time() - began) / rounds < 0.001
    began = time.process_time()
    assert not any(verifier.fault(hosts[-1]) for _ in range(rounds))
    assert (time.process_time() - began) / rounds < 0.0005
