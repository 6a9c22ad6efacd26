"""Sign in at the issuer (OpenID Connect): code flow with PKCE in a browser on this machine, or device flow in any browser.

Only the access token is used, and the service verifies it, so the client reads no ID token and has no secret.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from html import escape
from http.server import BaseHTTPRequestHandler, HTTPServer
from secrets import token_urlsafe
from typing import Any, Final, Self
from urllib.parse import parse_qs, urlsplit

import httpx2
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import OAuth2Client
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from scanfleet.contracts import rest
from scanfleet_cli.config import is_loopback
from scanfleet_cli.errors import CommandError, Exit, UnavailableError
from scanfleet_cli.output import duration, printable
from scanfleet_cli.tokens import Tokens

BROWSER_SECONDS: Final = 300.0  # timeout of a sign-in by the user
DEVICE_GRANT: Final = "urn:ietf:params:oauth:grant-type:device_code"
DEVICE_SECONDS: Final = 5.0  # polling interval, unless the issuer states another (RFC 8628)
SLOWER_SECONDS: Final = 5.0  # increase of the interval for `slow_down` of the issuer
LONGEST_SECONDS: Final = 30.0  # maximum interval after failed connections
_PUBLIC: Final = {"token_endpoint_auth_method": "none"}  # a command on a user's machine cannot keep a client secret
IDLE_SECONDS: Final = 5.0  # timeout of a connection that sends nothing


class Issuer(BaseModel):
    """The endpoints that the issuer publishes."""

    name: str = Field(validation_alias="issuer")
    authorization_endpoint: str | None = None
    token_endpoint: str
    device_endpoint: str | None = Field(None, validation_alias="device_authorization_endpoint")


class _DeviceCode(BaseModel):
    """The response of the device endpoint (RFC 8628, 3.2)."""

    device_code: str
    user_code: str
    verification_uri: str = Field(validation_alias=AliasChoices("verification_uri", "verification_uri_complete"))
    expires_in: float = Field(BROWSER_SECONDS, ge=0)
    interval: float = Field(DEVICE_SECONDS, ge=1)


def discover(issuer: str, transport: Any = None) -> Issuer:
    """Read the issuer's configuration.

    Raises:
        CommandError: it cannot be read, or belongs to another issuer.
    """
    url = f"{issuer.rstrip('/')}/.well-known/openid-configuration"
    _secure(url)
    try:
        with httpx2.Client(transport=transport, follow_redirects=True) as client:
            answer = client.get(url).raise_for_status()
        found = Issuer.model_validate_json(answer.content)
    except httpx2.HTTPError as error:
        raise CommandError(
            f"cannot read the configuration of the issuer: {error}", Exit.UNAVAILABLE, hint=url
        ) from error
    except ValidationError as error:
        raise CommandError("the configuration of the issuer is malformed", Exit.FAULT, hint=url) from error
    if found.name.rstrip("/") != issuer.rstrip("/"):
        raise CommandError(f"{url} belongs to another issuer: {printable(found.name)}", Exit.FAULT)
    for endpoint in (found.authorization_endpoint, found.token_endpoint, found.device_endpoint):
        if endpoint is not None:
            _secure(endpoint)
    return found


def _secure(url: str) -> None:
    try:
        scheme = httpx2.URL(url).scheme if url.isprintable() else ""
    except httpx2.InvalidURL:
        scheme = ""
    if not scheme:
        raise CommandError(f"{printable(url)} is not a URL", Exit.FAULT)
    if scheme != "https" and not (scheme == "http" and is_loopback(url)):
        raise CommandError(f"{printable(url)} is not https: tokens would be sent unencrypted", Exit.FAULT)


class SignIn:
    """One sign-in for the gateway at `url`.

    Args:
        url: of the gateway.
        info: of the gateway.
        issuer: endpoints to sign in at.
        show: shows a line to the user.
        transport: HTTP transport of requests to the issuer; the network by default.
    """

    def __init__(
        self, url: str, info: rest.Info, issuer: Issuer, show: Callable[[str], None], transport: Any = None
    ) -> None:
        self._url = url
        self._info = info
        self._issuer = issuer
        self._show = show
        self._transport = transport

    def by_device(self, sleep: Callable[[float], None] = time.sleep) -> Tokens:
        """Show a code to enter in a browser on any machine, and wait for the tokens (RFC 8628).

        Raises:
            CommandError: the issuer refused the code, or the code expired.
        """
        if self._issuer.device_endpoint is None:
            raise CommandError(
                "the issuer does not support the device flow", hint="scanfleet login without --device, or --token-stdin"
            )
        with self._client() as client:
            asked = {"client_id": self._info.client_id, "scope": self._scope, "audience": self._info.audience}
            code = self._ask_for_code(client, asked)
            pause, until = code.interval, time.monotonic() + code.expires_in
            self._show(f"First copy your one-time code: {printable(code.user_code)}")
            where, left = printable(code.verification_uri), duration(code.expires_in)
            self._show(f"Open {where} in any browser … waiting (expires in {left})")
            while time.monotonic() < until:
                sleep(pause)
                try:
                    return self._tokens(self._fetch(client, grant_type=DEVICE_GRANT, device_code=code.device_code))
                except UnavailableError:
                    pause = max(pause, min(pause * 2, LONGEST_SECONDS))  # RFC 8628, 3.5
                except OAuthError as error:
                    if error.error == "slow_down":
                        pause += SLOWER_SECONDS
                    elif error.error != "authorization_pending":
                        raise _refused(error) from error
        raise CommandError("the code has expired", Exit.NOT_ALLOWED, hint="scanfleet login")

    def by_browser(self, browse: Callable[[str], bool]) -> Tokens:
        """Open the issuer in a browser on this machine, and wait for the redirect with the code (RFC 8252, RFC 7636).

        Args:
            browse: opens a URL; returns False if it cannot.

        Raises:
            CommandError: the issuer refused the sign-in, or the sign-in timed out.
        """
        if self._issuer.authorization_endpoint is None:
            raise CommandError(
                "the issuer does not support the code flow", hint="scanfleet login --device, or --token-stdin"
            )
        verifier = token_urlsafe(48)
        with Callback() as callback, self._client(redirect_uri=callback.url, code_challenge_method="S256") as client:
            address, state = client.create_authorization_url(
                self._issuer.authorization_endpoint, code_verifier=verifier, audience=self._info.audience
            )
            self._show(f"Opening {printable(address)}")
            if not browse(address):
                self._show("cannot open a browser: open the URL above on this machine, or use --device")
            answer = callback.wait(BROWSER_SECONDS)
            if answer.get("state") != state:
                raise CommandError("the response belongs to another sign-in", Exit.NOT_ALLOWED, hint="scanfleet login")
            if answer.get("iss", self._issuer.name).rstrip("/") != self._issuer.name.rstrip("/"):
                raise CommandError("the response is from another issuer", Exit.NOT_ALLOWED, hint="scanfleet login")
            if "error" in answer:
                raise _refused(OAuthError(answer["error"], answer.get("error_description", "")))
            try:
                fetched = self._fetch(
                    client,
                    grant_type="authorization_code",
                    code=answer.get("code", ""),
                    redirect_uri=callback.url,
                    code_verifier=verifier,
                )
            except OAuthError as error:
                raise _refused(error) from error
            return self._tokens(fetched)

    def _ask_for_code(self, client: Any, asked: dict[str, Any]) -> _DeviceCode:
        """Return the code.

        Raises:
            CommandError: the issuer returned an error, or a malformed response.
            UnavailableError: the issuer is unavailable.
        """
        try:
            response = client.request("POST", self._issuer.device_endpoint, withhold_token=True, data=asked)
            if response.is_success:
                return _DeviceCode.model_validate_json(response.content)
            refusal = response.json()
            raise _refused(
                OAuthError(refusal.get("error") or f"HTTP {response.status_code}", refusal.get("error_description"))
            )
        except httpx2.HTTPError as error:
            raise _silent(error) from error
        except (ValueError, AttributeError) as error:
            raise CommandError(
                f"the response of the issuer is malformed (HTTP {response.status_code})", Exit.FAULT
            ) from error

    @property
    def _scope(self) -> str:
        return " ".join(self._info.scopes)

    def _client(self, **how: Any) -> Any:
        return oauth(self._info.client_id, self._transport, scope=self._scope, **how)

    def _fetch(self, client: Any, **body: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = client.fetch_token(
                self._issuer.token_endpoint, client_id=self._info.client_id, audience=self._info.audience, **body
            )
        except (httpx2.HTTPError, ValueError) as error:
            raise _silent(error) from error
        return answer

    def _tokens(self, answer: dict[str, Any]) -> Tokens:
        blank = Tokens(self._url, "", token_endpoint=self._issuer.token_endpoint, client_id=self._info.client_id)
        return blank.renewed(answer)


def oauth(client_id: str | None, transport: Any, **how: Any) -> Any:
    """Return a public client of an issuer."""
    return OAuth2Client(client_id, transport=transport, **_PUBLIC, **how)


def refresh(tokens: Tokens, transport: Any = None) -> Tokens:
    """Refresh tokens.

    Raises:
        CommandError: the issuer rejected the refresh.
        UnavailableError: the issuer is unavailable.
    """
    with oauth(tokens.client_id, transport) as client:
        try:
            answer = client.refresh_token(
                tokens.token_endpoint, refresh_token=tokens.refresh_token, client_id=tokens.client_id
            )
        except OAuthError as error:
            raise _refused(error) from error
        except (httpx2.HTTPError, ValueError) as error:
            raise _silent(error) from error
    return tokens.renewed(answer)


def _silent(error: Exception) -> UnavailableError:
    return UnavailableError(f"the issuer is unavailable: {error}", reached=False)


def _refused(error: OAuthError) -> CommandError:
    text = printable(str(error.description or error.error))
    return CommandError(f"the issuer refused the sign-in: {text}", Exit.NOT_ALLOWED, hint="scanfleet login")


class Callback:
    """A server on this machine that receives the redirect of the browser.

    Args:
        idle: timeout in seconds of a connection that sends nothing; browsers open some in advance, which would block the redirect.
    """

    def __init__(self, idle: float = IDLE_SECONDS) -> None:
        answers: list[dict[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            timeout = idle

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                if parts.path != "/callback" or answers:
                    self.send_error(404)
                    return
                answers.append({name: values[0] for name, values in parse_qs(parts.query).items()})
                failed = escape(answers[0].get("error", ""))
                text = f"The sign-in failed: {failed}." if failed else "Signed in."
                body = f"<!doctype html><title>Scanfleet</title><p>{text} You can close this page.".encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Security-Policy", "default-src 'none'")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # as the library names it
                """Log nothing, since the request contains the code."""

        self._answers = answers
        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/callback"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.server_close()

    def wait(self, limit_seconds: float) -> dict[str, str]:
        """Return the parameters of the redirect.

        Raises:
            CommandError: the sign-in timed out.
        """
        until = time.monotonic() + limit_seconds
        while not self._answers:
            if (left := until - time.monotonic()) <= 0:
                raise CommandError(
                    "the sign-in in the browser timed out", Exit.NOT_ALLOWED, hint="scanfleet login --device"
                )
            self._server.timeout = left
            self._server.handle_request()
        return self._answers[0]
