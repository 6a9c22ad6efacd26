"""The stack's key pair, and tokens signed with it.

`python -m local.tokens FOLDER` creates the pair in a folder, and those of the gateway and of job-orchestrator; with
`--user 7` it prints a token.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

ISSUER: Final = "scanfleet-local"
AUDIENCE: Final = "scanfleet"
LIFE_SECONDS: Final = 12 * 3600  # a working day, below the limit of the services


class Issuer:
    """Signs tokens for services that trust `public_key_file`. The pair is created on first use.

    Args:
        folder: of the pair.
        name: the `iss` of the tokens.
    """

    def __init__(self, folder: Path, name: str = ISSUER) -> None:
        self.name = name
        self._private_key_file = folder / "private.pem"
        self.public_key_file = folder / "public.pem"
        if not self.public_key_file.exists():  # written last
            folder.mkdir(parents=True, exist_ok=True)
            self._make_keys()

    def token(self, user: int, *, admin: bool = False) -> str:
        now = int(time.time())
        claims: dict[str, object] = {
            "iss": self.name,
            "aud": AUDIENCE,
            "sub": str(user),
            "iat": now,
            "exp": now + LIFE_SECONDS,
        }
        if admin:
            claims["roles"] = ["admin"]
        return jwt.encode(claims, self._private_key_file.read_bytes(), algorithm="ES256")

    def _make_keys(self) -> None:
        _write_pair(ec.generate_private_key(ec.SECP256R1()), self._private_key_file, self.public_key_file)


def make_signing_keys(private: Path, *public: Path, mode: int = 0o600) -> None:
    """Create the key pair for signatures between services, unless it exists.

    Args:
        private: file for the service that signs.
        public: files for the services that verify, each with the public key.
        mode: permissions of the private file.
    """
    if not all(file.exists() for file in (private, *public)):
        _write_pair(Ed25519PrivateKey.generate(), private, *public, mode=mode)


def _write_pair(
    key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey, private: Path, *public: Path, mode: int = 0o600
) -> None:
    private.parent.mkdir(parents=True, exist_ok=True)
    private.unlink(missing_ok=True)
    with os.fdopen(os.open(private, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "wb") as opened:
        opened.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for file in public:
        file.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m local.tokens")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--user", type=int)
    parser.add_argument("--admin", action="store_true")
    arguments = parser.parse_args()
    issuer = Issuer(arguments.folder)
    for pair in ("internal", "chunk"):
        make_signing_keys(arguments.folder / f"{pair}.pem", arguments.folder / f"{pair}-public.pem")
    if arguments.user is not None:
        print(issuer.token(arguments.user, admin=arguments.admin))


if __name__ == "__main__":
    main()
