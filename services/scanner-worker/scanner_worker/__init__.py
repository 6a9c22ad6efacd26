"""Run nmap on dispatched chunks and publish its XML output as events."""
