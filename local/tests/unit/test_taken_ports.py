"""The output of the commands when a default port is in use."""

from __future__ import annotations

import socket
from pathlib import Path
from unittest import mock

import pytest

from local import __main__, compose, ports
from local.paths import ROOT
from local.stack import Stack


def test_up_with_a_taken_port_names_the_port_and_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make up` names the port that was taken, the process that wanted it, and where that process listens."""
    with socket.create_server(("127.0.0.1", ports.choose())) as listener:
        usual = listener.getsockname()[1]
        stack = Stack(tmp_path, usual_ports={"api-gateway": usual, "mongod": ports.choose()})
        stack.ports.choose(["mongod", *stack.services.port_names()])  # the rest of `up` starts servers
    monkeypatch.setattr(stack, "up", lambda: True)
    __main__.up(stack)
    port = stack.url.rpartition(":")[2]
    assert capsys.readouterr().err == f"port {usual} was in use: api-gateway listens on port {port}\n"


def test_compose_demo_with_a_taken_port_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make compose-demo` names the taken port and the variable that changes it, and starts no container."""
    run = mock.Mock(return_value="")
    monkeypatch.setattr(compose, "_output", run)
    with socket.create_server(("127.0.0.1", ports.choose())) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(compose, "PORT", port)
        assert compose.main() == 1
    assert run.mock_calls == [mock.call("ps", "--quiet", "api-gateway")]
    assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err
    assert "SCANFLEET_PORT" in (ROOT / "docker-compose.yml").read_text()
