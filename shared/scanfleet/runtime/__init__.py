"""The runtime of every service: HTTP, consumers, loops, MongoDB, settings, logs and traces."""
