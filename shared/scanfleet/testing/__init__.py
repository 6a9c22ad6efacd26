"""What ships for testing: fakes at the ports that pass the same suites as the real parts."""
