"""Mutual TLS between the services: both sides present a certificate of the site's own authority and check the other's name."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from prometheus_client import Gauge

from scanfleet.errors import ConfigurationError
from scanfleet.runtime.settings import TlsSettings

_EXPIRY: Final = Gauge(
    "scanfleet_certificate_expiry_timestamp_seconds",
    "Earliest expiry of the certificates that were read from this file at start, in seconds since 1970",
    ["file"],
)


def server_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """Return the context of a server that requires a certificate of its authority from every client; None without TLS.

    Raises:
        ConfigurationError: a file cannot be read, or has invalid content.
    """
    return _context(settings, ssl.PROTOCOL_TLS_SERVER)


def client_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """Return the context of a client that presents its certificate and accepts only a server with the name in the URL.

    None without TLS.

    Raises:
        ConfigurationError: see `server_context`.
    """
    return _context(settings, ssl.PROTOCOL_TLS_CLIENT)


def names(certificate: Mapping[str, Any]) -> set[str]:
    """Return the DNS names of a peer's certificate, as `ssl.SSLSocket.getpeercert` returns it."""
    return {name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"}


def _context(settings: TlsSettings, protocol: ssl._SSLMethod) -> ssl.SSLContext | None:
    if settings.tls_ca_file is None or settings.tls_certificate_file is None:
        return None
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # both sides support it
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(settings.tls_ca_file)
        context.load_cert_chain(settings.tls_certificate_file, settings.tls_key_file)
        _EXPIRY.labels("authority").set(_expiry(settings.tls_ca_file))
        _EXPIRY.labels("certificate").set(_expiry(settings.tls_certificate_file))
    except (OSError, ValueError) as error:  # the base class of OpenSSL's errors, and that of an unreadable certificate
        files = f"{settings.tls_ca_file}, {settings.tls_certificate_file} and {settings.tls_key_file}"
        raise ConfigurationError(f"cannot use {files} for TLS: {error}") from error
    return context


def _expiry(file: Path) -> float:
    return min(each.not_valid_after_utc for each in x509.load_pem_x509_certificates(file.read_bytes())).timestamp()
