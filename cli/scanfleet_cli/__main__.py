"""`python -m scanfleet_cli`: the `scanfleet` command where its script is not installed, as in its image."""

from scanfleet_cli.main import main

main()
