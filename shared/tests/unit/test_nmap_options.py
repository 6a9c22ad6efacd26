"""nmap's options for a policy."""

from __future__ import annotations

from scanfleet.scanning.nmap_options import technique
from scanfleet.scanning.policy import Preset, fill_in


def test_technique_auto_depends_on_raw_packets() -> None:
    """auto is SYN with raw packets and connect without; other techniques are unchanged."""
    auto, connect = fill_in(Preset.QUICK, {"technique": "auto"}), fill_in(Preset.QUICK, {"technique": "connect"})
    assert (technique(auto, raw=True), technique(auto, raw=False)) == ("syn", "connect")
    assert technique(connect, raw=True) == "connect"
