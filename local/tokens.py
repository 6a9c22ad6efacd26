"""A key pair of the stack's own, and tokens signed with it.

`python -m local.tokens FOLDER` makes the pair in a folder, and with `--user 7` prints a token.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

ISSUER: Final = "scanfleet-local"
AUDIENCE: Final = "scanfleet"
LIFE: Final = 12 * 3600  # seconds: a working day, within the day that the services allow


class Issuer:
    """Signs tokens for the services that trust `public_key_file`. The pair is made on first use."""

    def __init__(self, folder: Path) -> None:
        self._private_key_file = folder / "private.pem"
        self.public_key_file = folder / "public.pem"
        if not self.public_key_file.exists():  # written last
            folder.mkdir(parents=True, exist_ok=True)
            self._make_keys()

    def token(self, user: int, *, admin: bool = False) -> str:
        now = int(time.time())
        claims: dict[str, object] = {"iss": ISSUER, "aud": AUDIENCE, "sub": str(user), "iat": now, "exp": now + LIFE}
        if admin:
            claims["roles"] = ["admin"]
        return jwt.encode(claims, self._private_key_file.read_bytes(), algorithm="ES256")

    def _make_keys(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self._private_key_file.unlink(missing_ok=True)
        with os.fdopen(os.open(self._private_key_file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.public_key_file.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m local.tokens")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--user", type=int)
    parser.add_argument("--admin", action="store_true")
    arguments = parser.parse_args()
    issuer = Issuer(arguments.folder)
    if arguments.user is not None:
        print(issuer.token(arguments.user, admin=arguments.admin))


if __name__ == "__main__":
    main()
