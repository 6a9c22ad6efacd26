"""One module for each command or group of commands; `scanfleet_cli.main` loads the one that runs."""
