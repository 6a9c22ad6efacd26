"""Commands for operators: each module is one, run with `python -m` and the settings of the service."""
