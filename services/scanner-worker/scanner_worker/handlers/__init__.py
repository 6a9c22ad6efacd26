"""Handle assignments: claim, scan and report chunks."""
