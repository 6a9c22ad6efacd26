"""The demo on containers: `python -m local.compose`, with the services of docker-compose.yml and a Docker engine.

The servers to find listen inside the workers' own network namespaces, each worker having the same ones, so that nothing
that is scanned leaves a container.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

from local import demo, ports
from local.client import Client
from local.paths import ROOT
from scanfleet.testing import targets

PORT: Final = int(os.environ.get("SCANFLEET_PORT") or 8080)
"""Of the gateway on this machine, as docker-compose.yml publishes it."""
URL: Final = f"http://127.0.0.1:{PORT}"
COMPOSE: Final = ("docker", "compose", "--project-directory", str(ROOT))


def main() -> int:
    """Show the demo, and leave the containers as they were: running or stopped.

    Returns:
        The exit code.
    """
    was_up = bool(_said("ps", "--quiet", "api-gateway"))
    if not was_up and not ports.is_free(PORT):
        print(f"port {PORT} of 127.0.0.1 is taken; stop what listens there, or set SCANFLEET_PORT", file=sys.stderr)
        return 1
    subprocess.run([*COMPOSE, "up", "--wait", "--build", "--quiet-build"], check=True)
    try:
        with servers():
            nmap = [*COMPOSE, "exec", "-T", "scanner-worker", "nmap"]
            return demo.show(Client(URL, token(demo.USER)), targets.USUAL, nmap)
    finally:
        if not was_up:
            subprocess.run([*COMPOSE, "down"], check=True)


def token(user: int) -> str:
    """A JWT that the services believe."""
    return _said("run", "--rm", "token", "--user", str(user))


@contextmanager
def servers() -> Iterator[None]:
    """Servers to find, in the network namespace of every worker."""
    with ExitStack() as running:
        for worker in _said("ps", "--quiet", "scanner-worker").split():
            running.enter_context(_servers_in(worker))
        yield


@contextmanager
def _servers_in(worker: str) -> Iterator[None]:
    image = subprocess.run(
        ["docker", "inspect", "--format", "{{.Image}}", worker], check=True, capture_output=True, text=True
    ).stdout.strip()
    argv = [
        *("docker", "run", "--rm", "--network", f"container:{worker}", "--read-only", "--cap-drop", "ALL"),
        *("--no-healthcheck", "--entrypoint", "python", image, "-m", "scanfleet.testing.targets"),
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as container:
        try:
            if container.stdout is None or container.stdout.readline() != "listening\n":
                raise RuntimeError(f"the servers in {worker} did not start")
            yield
        finally:
            container.terminate()  # docker passes it on


def _said(*arguments: str) -> str:
    return subprocess.run([*COMPOSE, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
