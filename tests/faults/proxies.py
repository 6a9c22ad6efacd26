"""TCP proxies between services and servers, on a separate event loop, so that a test may block while they work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Final

from scanfleet_testing.proxy import Proxy

LIMIT_SECONDS: Final = 10.0  # for a command to a proxy


class FaultProxy:
    """A proxy from a service to a dependency, in which faults can be injected."""

    def __init__(self, proxies: FaultProxies, host: str, port: int) -> None:
        self._proxies = proxies
        self._proxy = Proxy(host, port)
        self.heal()
        self.port = self._proxy.port

    def refuse(self) -> None:
        """Cut every connection and refuse new ones."""
        self._proxies.run(self._proxy.refuse())

    def swallow(self) -> None:
        """Accept all data and answer nothing."""
        self._proxies.call(self._proxy.swallow)

    def delay(self, seconds: float) -> None:
        """Delay data in both directions."""
        self._proxies.call(self._proxy.delay, seconds)

    def cut(self) -> None:
        """Close the existing connections."""
        self._proxies.run(self._proxy.cut())

    def heal(self) -> None:
        """Remove all faults."""
        self._proxies.run(self._proxy.heal())


class FaultProxies:
    """Runs the proxies."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()
        self._open: list[FaultProxy] = []

    def open(self, host: str, port: int) -> FaultProxy:
        proxy = FaultProxy(self, host, port)
        self._open.append(proxy)
        return proxy

    def close(self) -> None:
        for proxy in self._open:
            proxy.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LIMIT_SECONDS)
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_SECONDS)

    def call(self, function: Any, *arguments: Any) -> None:
        done: Future[None] = Future()

        def work() -> None:
            function(*arguments)
            done.set_result(None)

        self._loop.call_soon_threadsafe(work)
        done.result(LIMIT_SECONDS)
