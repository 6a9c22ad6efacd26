"""Test support: in-memory implementations of the ports that pass the same test suites as the real ones."""
