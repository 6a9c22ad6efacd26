"""The `scanfleet` command, and the SDK that it is made of: `scanfleet_cli.client` and `scanfleet_cli.calls`."""
