"""The command line as people and machines use it: the console script, against the service."""
