"""The local stack, in `.local/`: `python -m local up|down|status|logs|token|demo|backup|restore`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import httpx2

from local import demo
from local.paths import STATE
from local.stack import USUAL_PORTS, Stack, StackError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the stopped processes and return when everything is ready")
    commands.add_parser("down", help="stop everything and keep the data")
    commands.add_parser("status", help="print one line per process")
    commands.add_parser("logs", help="print the tail of each process's log")
    commands.add_parser("demo", help="scan real servers through the API and compare with plain nmap")
    for command, what in (("backup", "copy MongoDB's files while the stack runs"), ("restore", "restore such a copy")):
        commands.add_parser(command, help=what).add_argument("folder", type=Path)
    token = commands.add_parser("token", help="print a token")
    token.add_argument("--user", type=int, required=True)
    token.add_argument("--admin", action="store_true")
    arguments = parser.parse_args()

    try:
        return do(Stack(STATE, usual_ports=USUAL_PORTS), arguments)
    except (StackError, TimeoutError, httpx2.HTTPError) as error:
        print(error, file=sys.stderr)
        return 1


def do(stack: Stack, arguments: argparse.Namespace) -> int:
    """Execute a command and return the exit code."""
    match arguments.command:
        case "up":
            up(stack)
        case "down":
            print("stopped" if stack.down() else "nothing was running")
        case "status":
            return status(stack)
        case "logs":
            logs = sorted((stack.folder / "logs").glob("*.log"))
            return subprocess.run(["tail", "-n", "40", *logs], check=False).returncode
        case "token":
            print(stack.token(arguments.user, admin=arguments.admin))
        case "demo":
            return demo.run(stack)
        case "backup":
            stack.backup(arguments.folder)
        case "restore":
            stack.restore(arguments.folder)
    return 0


def up(stack: Stack) -> None:
    started = stack.up()
    for name, (usual, port) in stack.ports.moved().items():
        print(f"port {usual} was in use: {name} listens on port {port}", file=sys.stderr)
    print(f"{'started' if started else 'was running'}: {stack.url} (addresses in {stack.folder / 'stack.env'})")


def status(stack: Stack) -> int:
    """Print one line per process: name, pid, state, addresses; the last address of a service is that of its probes.

    Returns:
        The exit code: 1 unless every process is running.
    """
    processes = stack.processes()
    for process in processes:
        addresses = " ".join(stack.ports.addresses(process.name))
        print(f"{process.name:<18} {process.pid or '-':>8} {process.state:<9} {addresses}")
    if not processes:
        print("nothing is running; `make up` starts the stack", file=sys.stderr)
    return 0 if processes and all(process.running for process in processes) else 1


if __name__ == "__main__":
    sys.exit(main())
