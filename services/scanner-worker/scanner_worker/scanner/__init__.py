"""Run nmap: the only package of the worker that uses processes, files or python-nmap."""
