"""Grants: the orchestrator signs the scope of each attempt, and workers attach that signature to their reports.

The signature covers job, chunk, attempt, worker, user, addresses and ports, and result-store stores only results with a
valid signature. A worker can therefore report only within assignments that it has read: its own and, since all workers read
scan-tasks, those of others. ADR 44 names what a signature does not prevent.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from scanfleet.contracts.messages import ChunkScanned, HostScanned
from scanfleet.contracts.messages.chunks import Grant
from scanfleet.scanning.outcomes import Outcome, index_of
from scanfleet.scanning.ports import PortSet, Range, parse_ranges, ranges_text

_CONTEXT: Final = "scanfleet.grant.v1"  # domain separation: a signature for another purpose is not valid here
_KEY_ID_CHARS: Final = 8
_VERIFIED: Final = 256  # cached grants: the hosts of a chunk arrive together, and a grant has up to 14 kB


class Signer:
    """Signs grants with the orchestrator's key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.key_id = key_id(key.public_key())

    def grant(
        self,
        *,
        job_id: int,
        chunk_id: str,
        attempt: int,
        worker_id: str,
        user_id: int,
        first_address: str,
        outcomes: str,
        ports: str,
    ) -> Grant:
        """Return the signed grant of an attempt on the addresses of a map, except the excluded ones.

        First address and ports are in canonical form, as in the chunk, because a reader verifies the parsed values.
        """
        # Not validated, which would take longer than signing: all values come from the orchestrator itself.
        grant = Grant.model_construct(
            user_id=user_id,
            first_address=first_address,
            addresses=len(outcomes),
            excluded=_excluded(outcomes),
            ports=ports,
            signature="",
        )
        signature = self._key.sign(_signed_bytes(job_id, chunk_id, attempt, worker_id, grant))
        text = urlsafe_b64encode(signature).rstrip(b"=").decode()
        return grant.model_copy(update={"signature": f"{self.key_id}.{text}"})


class Grants:
    """Checks results against their grants.

    Args:
        keys: the orchestrator's public keys; several during a key rotation.
    """

    def __init__(self, keys: Sequence[Ed25519PublicKey]) -> None:
        self._keys = {key_id(key): key for key in keys}
        # Keyed by the signed bytes, so that a chunk costs one verification whatever the number of its hosts.
        self._signed = lru_cache(maxsize=_VERIFIED)(self._verify)

    def fault(self, message: HostScanned | ChunkScanned) -> str:
        """Return why no grant of the orchestrator covers the message; empty when one does."""
        grant = message.grant
        if grant is None:
            return "it is not signed"
        fault = _host_fault(message, grant) if isinstance(message, HostScanned) else _map_fault(message, grant)
        if fault:
            return fault
        signed = _signed_bytes(message.job_id, message.chunk_id, message.attempt, message.worker_id, grant)
        return "" if self._signed(signed, grant.signature) else "its signature is not valid"

    def _verify(self, signed: bytes, signature: str) -> bool:
        id_, _, text = signature.partition(".")
        key = self._keys.get(id_)
        if key is None:
            return False
        try:
            key.verify(urlsafe_b64decode(f"{text}=="), signed)
        except InvalidSignature:
            return False
        return True


def key_id(key: Ed25519PublicKey) -> str:
    """Return the id of this key in signatures and in the audit log."""
    return urlsafe_b64encode(sha256(key.public_bytes_raw()).digest()).decode()[:_KEY_ID_CHARS]


def _signed_bytes(job_id: int, chunk_id: str, attempt: int, worker_id: str, grant: Grant) -> bytes:
    # A JSON list of numbers and strings is unambiguous, so no two grants have the same bytes.
    token = [_CONTEXT, job_id, chunk_id, attempt, worker_id]
    covered = [grant.user_id, grant.first_address, grant.addresses, grant.excluded, grant.ports]
    return json.dumps(token + covered, separators=(",", ":")).encode()


def _excluded(outcomes: str) -> str:
    if Outcome.EXCLUDED not in outcomes:
        return ""
    places = (place for place, letter in enumerate(outcomes) if letter == Outcome.EXCLUDED)
    merged: list[Range] = []
    for place in places:
        if merged and merged[-1][1] == place - 1:
            merged[-1] = (merged[-1][0], place)
        else:
            merged.append((place, place))
    return ranges_text(tuple(merged))


def _map_fault(scanned: ChunkScanned, grant: Grant) -> str:
    if (scanned.first_address, len(scanned.outcomes)) != (grant.first_address, grant.addresses):
        return "its map is not of the granted addresses"
    if _excluded(scanned.outcomes) != grant.excluded:
        return "its map excludes other addresses than the grant"
    return ""


def _host_fault(host: HostScanned, grant: Grant) -> str:
    if host.user_id != grant.user_id:
        return "its user is not the granted one"
    try:
        place = index_of(grant.first_address, host.address)
        excluded, silent = parse_ranges(grant.excluded), parse_ranges(host.open_filtered)
    except ValueError:
        return "its address or ports are not of the granted kind"
    if not 0 <= place < grant.addresses or _within([(place, place)], excluded):
        return "its address is not granted"
    ports = PortSet.parse(grant.ports)
    tcp = {found.port for found in host.ports if found.protocol == "tcp"}
    udp = [(found.port, found.port) for found in host.ports if found.protocol == "udp"]
    # Only nmap has the list of the most common ports, so only their number is checked.
    tcp_granted = len(tcp) <= ports.tcp_count if ports.top else _within([(port, port) for port in tcp], ports.tcp)
    return "" if tcp_granted and _within((*udp, *silent), ports.udp) else "its ports are not granted"


def _within(ranges: Iterable[Range], granted: Sequence[Range]) -> bool:
    """Return whether each range lies within one of `granted`, which are sorted and disjoint."""
    rest = iter(granted)
    current = next(rest, None)
    for low, high in sorted(ranges):
        while current is not None and current[1] < low:
            current = next(rest, None)
        if current is None or not current[0] <= low <= high <= current[1]:
            return False
    return True
