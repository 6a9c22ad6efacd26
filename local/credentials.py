"""TLS and passwords of the secured local stack: an authority, the servers' certificate, a password per user."""

from __future__ import annotations

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
from cryptography.x509.oid import NameOID

ADMIN: Final = "admin"
LIFE: Final = timedelta(days=365)

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
        authority, own_key = _name("scanfleet local authority"), ec.generate_private_key(ec.SECP256R1())
        server_key = ec.generate_private_key(ec.SECP256R1())
        loopback = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
        server = _certificate(_name("server"), authority, server_key, own_key, loopback)
        self.server.unlink(missing_ok=True)
        pem = server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode() + server
        self.file(self.server.name, pem)
        is_authority = x509.BasicConstraints(ca=True, path_length=0)
        # Required by Python 3.13 and newer.
        may_vouch = x509.KeyUsage(**dict.fromkeys(_USES, False) | {"key_cert_sign": True})
        certificate = _certificate(authority, authority, own_key, own_key, is_authority, may_vouch)
        self.authority.write_text(certificate)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    *extensions: x509.ExtensionType,
) -> str:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
