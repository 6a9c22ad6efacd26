"""Test support of the command: a fake of the API, and an OpenID provider."""
