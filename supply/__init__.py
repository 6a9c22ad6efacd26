"""What Scanfleet is made from: the packages of its locks, their licences and their known vulnerabilities."""
