"""The public REST API: checks tokens, publishes commands, proxies queries."""
