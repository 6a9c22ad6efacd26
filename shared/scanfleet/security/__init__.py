"""Tokens, the audit log and signed chunks."""
