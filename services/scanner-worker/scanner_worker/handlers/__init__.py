"""Handle scan tasks: claim, scan and report chunks."""
