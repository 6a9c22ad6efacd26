"""Runs nmap on the chunks that it is given and turns its XML into events."""
