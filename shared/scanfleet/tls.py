"""TLS between the services: each side shows a certificate of the site's own authority, and checks the name in the other's."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from scanfleet.errors import ConfigurationError
from scanfleet.settings import TlsSettings


def server_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """What a server needs to demand a certificate of its authority from every client; None without TLS.

    Raises:
        ConfigurationError: a file cannot be read, or does not hold what it should.
    """
    return _context(settings, ssl.PROTOCOL_TLS_SERVER)


def client_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """What a client needs to show its certificate, and to accept only a server whose certificate has the name in the URL; None without TLS.

    Raises:
        ConfigurationError: see `server_context`.
    """
    return _context(settings, ssl.PROTOCOL_TLS_CLIENT)


def names(certificate: Mapping[str, Any]) -> set[str]:
    """The DNS names of a peer's certificate, as `ssl.SSLSocket.getpeercert` returns it."""
    return {name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"}


def _context(settings: TlsSettings, protocol: ssl._SSLMethod) -> ssl.SSLContext | None:
    if settings.tls_ca_file is None or settings.tls_certificate_file is None:
        return None
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3  # both sides are ours
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(settings.tls_ca_file)
        context.load_cert_chain(settings.tls_certificate_file, settings.tls_key_file)
    except OSError as error:  # what OpenSSL reports is one too
        files = f"{settings.tls_ca_file}, {settings.tls_certificate_file} and {settings.tls_key_file}"
        raise ConfigurationError(f"cannot use {files} for TLS: {error}") from error
    return context
