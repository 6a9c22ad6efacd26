"""Supply chain checks: the packages in the locks, their licences and their known vulnerabilities."""
