"""The web page: built files under /app, and the headers that confine what runs in it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BUILT: Final = Path(__file__).parents[1] / "page"
"""Directory of the files that `make setup` and the image's build write."""

_FEATURES: Final = (
    "accelerometer autoplay browsing-topics camera clipboard-read clipboard-write display-capture encrypted-media "
    "fullscreen gamepad geolocation gyroscope hid identity-credentials-get idle-detection local-fonts magnetometer microphone "
    "midi otp-credentials payment picture-in-picture publickey-credentials-create publickey-credentials-get screen-wake-lock "
    "serial storage-access usb window-management xr-spatial-tracking"
)
_HEADERS: Final = {
    # Injected markup cannot run code: inline code is forbidden, and strings are not converted to code or markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": ", ".join(f"{feature}=()" for feature in _FEATURES.split()),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_HASHED: Final = "/app/assets/"  # files with the hash of their content in the name

_log = structlog.stdlib.get_logger(__name__)


def serve(app: FastAPI, directory: Path = BUILT) -> None:
    """Serve the page in `directory` under /app, and redirect browsers from / to it."""
    app.add_middleware(_Headers)
    app.add_route("/", _root)
    app.add_route("/app", _root)
    if (directory / "index.html").is_file():
        app.frontend("/app", directory=directory, fallback="index.html")
    else:
        _log.warning(
            "page_missing",
            directory=str(directory),
            cause="the page is not built, so /app answers 404",
            next_step="build it with make setup",
        )


async def _root(request: Request) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        raise HTTPException(404)
    return RedirectResponse("/app/", 303)


class _Headers:
    """Adds the headers of the page to every response under /app, and answers with whole files everywhere.

    No client needs a part of a file, and Starlette's errors for a Range header are not in the common form.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["headers"] = [each for each in scope["headers"] if each[0] != b"range"]
        if scope["type"] != "http" or not scope["path"].startswith("/app/"):
            await self._app(scope, receive, send)
            return

        async def send_confined(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                is_file = message["status"] < 300 and "text/html" not in headers.get("Content-Type", "")  # noqa: PLR2004 # success
                lasting = is_file and scope["path"].startswith(_HASHED)
                headers["Cache-Control"] = "public, max-age=31536000, immutable" if lasting else "no-cache"
            await send(message)

        await self._app(scope, receive, send_confined)
