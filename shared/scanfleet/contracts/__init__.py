"""Contracts between services, clients and operators: messages, REST models and the grants file."""
