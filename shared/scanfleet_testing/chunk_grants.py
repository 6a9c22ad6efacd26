"""The orchestrator's test key, and results signed by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from scanfleet.contracts.messages import ChunkScanned, HostScanned
from scanfleet.security.chunk_grants import Grants, Signer

ALL_PORTS: Final = "T:0-65535,U:0-65535"

_Result = TypeVar("_Result", HostScanned, ChunkScanned)


def chunk_key() -> Ed25519PrivateKey:
    """Return a key that is the same in every process of a test."""
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def signer() -> Signer:
    return Signer(chunk_key())


def grants() -> Grants:
    return Grants([chunk_key().public_key()])


def signed(message: _Result, **covered: Any) -> _Result:
    """Return the message with a grant that covers it, unless `covered` is something else."""
    if isinstance(message, ChunkScanned):
        about: dict[str, Any] = {
            "user_id": 7,
            "first_address": message.first_address,
            "outcomes": message.outcomes,
        }
    else:
        about = {"user_id": message.user_id, "first_address": message.address, "outcomes": "."}
    token = message.token._asdict()
    grant = signer().grant(**(token | about | {"ports": ALL_PORTS} | covered))
    return message.model_copy(update={"grant": grant})


def write_chunk_keys(folder: Path) -> tuple[Path, Path]:
    """Write the private and the public key to files."""
    private, public = folder / "chunk.pem", folder / "chunk-public.pem"
    key = chunk_key()
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public
