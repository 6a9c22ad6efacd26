"""A small OpenID provider made with authlib: code flow with PKCE, device flow, refresh that rotates.

It is a transport for clients in the same process; `served` makes it a server for others, and for browsers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit
from uuid import uuid4

import httpx2
from authlib.oauth2.rfc6749 import (
    AuthorizationServer,
    ClientMixin,
    OAuth2Request,
    TokenMixin,
    grants,
)
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oauth2.rfc8628 import DeviceAuthorizationEndpoint, DeviceCodeGrant, DeviceCredentialDict
from authlib.oidc.core import AuthorizationCodeMixin
from authlib.oidc.core.grants import OpenIDCode
from joserfc.jwk import OctKey

URL: Final = "https://issuer.test"
CLIENT_ID: Final = "scanfleet-cli"
LIFE_SECONDS: Final = 300  # of an access token


class _Client(ClientMixin):  # type: ignore[misc] # the library ships no types
    """The one public client, whose redirects are on loopback (RFC 8252)."""

    def get_client_id(self) -> str:
        return CLIENT_ID

    def get_allowed_scope(self, scope: str) -> str:
        return scope

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        return redirect_uri.startswith("http://127.0.0.1:")

    def check_endpoint_auth_method(self, method: str, _endpoint: str) -> bool:
        return method == "none"

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, _grant_type: str) -> bool:
        return True


class _Code(dict[str, Any], AuthorizationCodeMixin):  # type: ignore[misc] # as above
    def __getattr__(self, name: str) -> Any:
        return self[name]

    def get_redirect_uri(self) -> str:
        return str(self["redirect_uri"])

    def get_scope(self) -> str:
        return str(self["scope"])

    def get_nonce(self) -> str | None:
        return self.get("nonce")

    def get_auth_time(self) -> int:
        return int(time.time())

    def get_acr(self) -> None: ...

    def get_amr(self) -> None: ...


class _Refresh(TokenMixin):  # type: ignore[misc] # as above
    def __init__(self, scope: str) -> None:
        self._scope = scope

    def check_client(self, client: Any) -> bool:
        return bool(client.get_client_id() == CLIENT_ID)

    def get_scope(self) -> str:
        return self._scope


class _Request(OAuth2Request):  # type: ignore[misc] # as above
    """An HTTP request as authlib reads one."""

    def __init__(self, request: httpx2.Request) -> None:
        super().__init__(request.method, str(request.url), headers=dict(request.headers))
        self._args = dict(request.url.params)
        self._form = dict(parse_qsl(request.content.decode()))
        self.payload = BasicOAuth2Payload(self._args | self._form)

    @property
    def args(self) -> dict[str, str]:
        return self._args

    @property
    def form(self) -> dict[str, str]:
        return self._form


class _CodeGrant(grants.AuthorizationCodeGrant):  # type: ignore[misc] # as above
    TOKEN_ENDPOINT_AUTH_METHODS: Final = ["none"]

    def save_authorization_code(self, code: str, request: Any) -> None:
        data = request.payload.data
        self.server.codes[code] = _Code(
            code=code,
            redirect_uri=request.payload.redirect_uri,
            scope=request.payload.scope,
            code_challenge=data["code_challenge"],
            code_challenge_method=data["code_challenge_method"],
            nonce=data.get("nonce"),
        )

    def query_authorization_code(self, code: str, _client: Any) -> Any:
        return self.server.codes.get(code)

    def delete_authorization_code(self, authorization_code: Any) -> None:
        del self.server.codes[authorization_code["code"]]

    def authenticate_user(self, _authorization_code: Any) -> str:
        return "7"


class _OpenID(OpenIDCode):  # type: ignore[misc] # as above
    """Adds an id token to the tokens of a code."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._key = OctKey.generate_key()

    def resolve_client_private_key(self, _client: Any) -> OctKey:
        return self._key

    def get_client_algorithm(self, _client: Any) -> str:
        return "HS256"

    def get_client_claims(self, _client: Any) -> dict[str, Any]:
        return {"iss": self._url}

    def get_encode_header(self, client: Any) -> dict[str, str]:
        return {"alg": self.get_client_algorithm(client)}

    def exists_nonce(self, _nonce: str, _request: Any) -> bool:
        return False

    def generate_user_info(self, user: str, _scope: str) -> dict[str, Any]:
        return {"sub": user}


class _RefreshGrant(grants.RefreshTokenGrant):  # type: ignore[misc] # as above
    TOKEN_ENDPOINT_AUTH_METHODS: Final = ["none"]
    INCLUDE_NEW_REFRESH_TOKEN = True

    def authenticate_refresh_token(self, refresh_token: str) -> Any:
        return self.server.refresh_tokens.pop(refresh_token, None)  # good once

    def authenticate_user(self, _refresh_token: Any) -> str:
        return "7"

    def revoke_old_credential(self, refresh_token: Any) -> None: ...


class _DeviceGrant(DeviceCodeGrant):  # type: ignore[misc] # as above
    def query_device_credential(self, device_code: str) -> Any:
        return self.server.devices.get(device_code)

    def query_user_grant(self, _user_code: str) -> tuple[str, bool] | None:
        return ("7", self.server.approves) if not self.server.pending else None

    def should_slow_down(self, _credential: Any) -> bool:
        return bool(self.server.pending.pop(0) == "slow_down")


class _DeviceEndpoint(DeviceAuthorizationEndpoint):  # type: ignore[misc] # as above
    def get_verification_uri(self) -> str:
        return f"{self.server.url}/device"

    def save_device_credential(self, client_id: str, scope: str, data: dict[str, Any]) -> None:
        self.server.devices[data["device_code"]] = DeviceCredentialDict(client_id=client_id, scope=scope, **data)


class Issuer(AuthorizationServer, httpx2.BaseTransport):  # type: ignore[misc] # as above
    """The provider; it carries requests to itself, and all others on to `beyond`.

    Args:
        beyond: carries requests to other hosts.
        url: of the provider.
        new_access_token: makes access tokens.
    """

    def __init__(
        self,
        beyond: httpx2.BaseTransport,
        url: str = URL,
        new_access_token: Callable[[], str] = lambda: f"access-{uuid4().hex}",
    ) -> None:
        super().__init__()
        self.url = url
        self.codes: dict[str, _Code] = {}
        self.refresh_tokens: dict[str, _Refresh] = {}
        self.devices: dict[str, Any] = {}
        self.access_tokens: list[str] = []
        self.approves = True
        self.pending: list[str] = []
        """Errors returned to a device until the user has entered the code."""

        self.faults: list[httpx2.Response | httpx2.RequestError] = []
        """Faults of the next requests for tokens, one each."""

        self.answers: dict[str, httpx2.Response] = {}
        """Other responses, by path."""

        self.life: int | None = LIFE_SECONDS
        """Seconds of an access token; None is not stated."""

        self.new_access_token = new_access_token
        self._beyond = beyond
        self.register_grant(_CodeGrant, [CodeChallenge(required=True), _OpenID(url)])
        self.register_grant(_RefreshGrant)
        self.register_grant(_DeviceGrant)
        self.register_endpoint(_DeviceEndpoint)
        self.register_token_generator("default", self._new_token)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.netloc.decode() != urlsplit(self.url).netloc:
            return self._beyond.handle_request(request)
        request.read()
        answer: Any
        match request.url.path:
            case path if path in self.answers:
                answer = self.answers[path]
            case "/.well-known/openid-configuration":
                return httpx2.Response(
                    200,
                    json={
                        "issuer": self.url,
                        "authorization_endpoint": f"{self.url}/authorize",
                        "token_endpoint": f"{self.url}/token",
                        "device_authorization_endpoint": f"{self.url}/device_authorization",
                    },
                )
            case "/authorize":
                return httpx2.Response(302, headers={"Location": self.sign_in(str(request.url))})
            case "/token" if self.faults:
                answer = self.faults.pop(0)
                if isinstance(answer, Exception):
                    raise answer
            case "/token":
                answer = self.create_token_response(request)
            case "/device_authorization":
                answer = self.create_endpoint_response("device_authorization", request)
            case _:
                return httpx2.Response(404)
        assert isinstance(answer, httpx2.Response)  # noqa: S101 # what `handle_response` makes
        return answer

    def sign_in(self, address: str) -> str:
        """Act as the browser: approve or deny, and follow the redirect to the callback."""
        request = httpx2.Request("GET", address)
        grant = self.get_consent_grant(request, end_user="7")
        answer = self.create_authorization_response(request, grant_user="7" if self.approves else None, grant=grant)
        return str(answer.headers["location"])

    # The interface of a framework for authlib

    def query_client(self, client_id: str) -> _Client | None:
        return _Client() if client_id == CLIENT_ID else None

    def save_token(self, token: dict[str, Any], _request: Any) -> None:
        self.access_tokens.append(token["access_token"])
        self.refresh_tokens[token["refresh_token"]] = _Refresh(token["scope"])

    def create_oauth2_request(self, request: Any) -> OAuth2Request:
        return request if isinstance(request, OAuth2Request) else _Request(request)

    def handle_response(self, status: int, body: Any, headers: Any) -> httpx2.Response:
        content = json.dumps(body) if isinstance(body, dict) else body
        return httpx2.Response(status, content=content or b"", headers=dict(headers))

    def send_signal(self, *_args: object, **_kwargs: object) -> None: ...

    def _new_token(self, *, scope: str | None, **_how: object) -> dict[str, Any]:
        return {
            "token_type": "Bearer",
            "access_token": self.new_access_token(),
            "refresh_token": f"refresh-{uuid4().hex}",
            "expires_in": self.life,
            "scope": scope or "",
        }


@contextmanager
def served(issuer: Issuer) -> Iterator[None]:
    """Serve the provider at its URL, which has a port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # of the base class
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = httpx2.Request(self.command, issuer.url + self.path, headers=dict(self.headers), content=content)
            answer = issuer.handle_request(request)
            self.send_response(answer.status_code)
            for each in answer.headers.items():
                self.send_header(*each)
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_GET  # noqa: N815 # as above

        def log_message(self, *_of_request: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", urlsplit(issuer.url).port or 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
