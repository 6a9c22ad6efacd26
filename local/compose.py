"""Run the demo on the containers of docker-compose.yml: `python -m local.compose`; needs a Docker engine.

Every worker's network namespace has the same target servers, so no scan leaves a container.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from local import demo, ports, targets
from local.paths import ROOT

PORT: Final = int(os.environ.get("SCANFLEET_PORT") or 8080)
"""Published port of the gateway."""
URL: Final = f"http://127.0.0.1:{PORT}"
COMPOSE: Final = ("docker", "compose", "--project-directory", str(ROOT))


def main() -> int:
    """Run the demo, and leave the containers running or stopped as before.

    Returns:
        The exit code.
    """
    was_up = bool(_output("ps", "--quiet", "api-gateway"))
    if not was_up and not ports.is_free(PORT):
        print(f"port {PORT} of 127.0.0.1 is in use; stop its process, or set SCANFLEET_PORT", file=sys.stderr)
        return 1
    subprocess.run([*COMPOSE, "up", "--wait", "--build", "--quiet-build"], check=True)
    try:
        with servers():
            nmap = [*COMPOSE, "exec", "-T", "scanner-worker", "nmap"]
            return demo.show(URL, token(demo.USER), targets.USUAL, nmap)
    finally:
        if not was_up:
            subprocess.run([*COMPOSE, "down"], check=True)


def token(user: int) -> str:
    """Return a JWT that the services accept."""
    return _output("run", "--rm", "token", "--user", str(user))


@contextmanager
def servers() -> Iterator[None]:
    """Run the target servers in the network namespace of every worker."""
    with ExitStack() as running:
        for worker in _output("ps", "--quiet", "scanner-worker").split():
            running.enter_context(_servers_in(worker))
        yield


@contextmanager
def _servers_in(worker: str) -> Iterator[None]:
    image = subprocess.run(
        ["docker", "inspect", "--format", "{{.Image}}", worker], check=True, capture_output=True, text=True
    ).stdout.strip()
    argv = [
        *("docker", "run", "--rm", "--network", f"container:{worker}", "--read-only", "--cap-drop", "ALL"),
        *("--no-healthcheck", "--entrypoint", "python", image, "-c", Path(targets.__file__).read_text()),
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as container:
        try:
            if container.stdout is None or container.stdout.readline() != "listening\n":
                raise RuntimeError(f"the servers in {worker} did not start")
            yield
        finally:
            container.terminate()  # docker forwards it


def _output(*arguments: str) -> str:
    return subprocess.run([*COMPOSE, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
