"""Running nmap: the only room of the worker that touches a process, a file or python-nmap."""
