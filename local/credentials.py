"""TLS and passwords of the secured stacks: authorities, certificates, a password per user."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from secrets import token_hex
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from scanfleet.services import GATEWAY, ORCHESTRATOR, WITH_API

ADMIN: Final = "admin"
LIFE: Final = timedelta(days=365)

LOOPBACK: Final = x509.IPAddress(ip_address("127.0.0.1"))

# Clients and servers; a certificate of one kind is refused for the other.
_PURPOSES: Final = dict.fromkeys(WITH_API, ExtendedKeyUsageOID.SERVER_AUTH) | {GATEWAY: ExtendedKeyUsageOID.CLIENT_AUTH}

_USES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class Credentials:
    """Missing files in `folder` are created on first use, readable only by their owner."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self.authority = folder / "ca.pem"
        """The certificate of the servers' authority."""
        self.server = folder / "server.pem"
        """The servers' key and certificate."""
        if not self.authority.exists():  # written last
            self._make_certificates()

    def password(self, user: str) -> str:
        return self.password_file(user).read_text()

    def password_file(self, user: str) -> Path:
        return self.file(f"{user}-password", token_hex(24))

    def file(self, name: str, content: str) -> Path:
        """Return the file of a secret, created with `content` if missing."""
        path = self._folder / name
        if not path.exists():
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(content)
        return path

    def _make_certificates(self) -> None:
        authority = Authority("scanfleet local authority")
        self.server.unlink(missing_ok=True)
        key, certificate = authority.issue("server", x509.SubjectAlternativeName([LOOPBACK]))
        self.file(self.server.name, key + certificate)
        self.authority.write_text(authority.certificate)


class Authority:
    """Signs certificates for the lifetime of this object: its key is not stored.

    trustme, the usual library for test certificates, cannot replace it: each of its certificates is for clients, servers and code
    signing, whereas a service's certificate must be refused for any other purpose than its own.

    Args:
        name: its common name.
        life: how long it and what it signs is valid.
    """

    def __init__(self, name: str, life: timedelta = LIFE) -> None:
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._life = life
        is_authority = x509.BasicConstraints(ca=True, path_length=0)
        # Required by Python 3.13 and newer.
        may_sign = x509.KeyUsage(**dict.fromkeys(_USES, False) | {"key_cert_sign": True})
        self.certificate = self._sign(self._name, self._key, is_authority, may_sign)
        """Its own certificate, in PEM."""

    def issue(self, name: str, *extensions: x509.ExtensionType) -> tuple[str, str]:
        """Return a new key and its certificate, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return private, self._sign(_name(name), key, *extensions)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType) -> str:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + self._life)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


def make_service_certificates(
    folder: Path,
    *addresses: x509.GeneralName,
    life: timedelta = LIFE,
    mode: int = 0o600,
) -> None:
    """Write `ca.crt`, `tls.crt` and `tls.key` into the folder of each service that sends or receives requests, unless they exist.

    All are signed by one authority, whose key is not kept: when one is missing, all are made again.

    Args:
        folder: holds a folder for each service, which is made where it is missing.
        addresses: further names of the servers.
        life: how long the certificates are valid.
        mode: of the files.
    """
    files = [folder / service / name for service in _PURPOSES for name in ("ca.crt", "tls.crt", "tls.key")]
    if all(file.exists() for file in files):
        return
    authority = Authority("scanfleet services", life)
    for service, purpose in _PURPOSES.items():
        names = [service, f"{service}-queries"] if service == ORCHESTRATOR else [service]  # as in k8s/queries
        named = x509.SubjectAlternativeName([*map(x509.DNSName, names), *addresses])
        key, certificate = authority.issue(service, named, x509.ExtendedKeyUsage([purpose]))
        (folder / service).mkdir(parents=True, exist_ok=True)
        for name, text in {"tls.key": key, "tls.crt": certificate, "ca.crt": authority.certificate}.items():
            file = folder / service / name
            file.touch(mode)
            file.chmod(mode)
            file.write_text(text)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def main() -> None:
    """Create the certificates of the services: `python -m local.credentials FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m local.credentials", description=make_service_certificates.__doc__)
    parser.add_argument("folder", type=Path)
    make_service_certificates(parser.parse_args().folder)


if __name__ == "__main__":
    main()
