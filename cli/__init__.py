"""The command line: starts services, and is a client of the gateway like any other."""
