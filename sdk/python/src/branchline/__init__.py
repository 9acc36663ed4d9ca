"""Branchline: the multiplayer backend for coding agents. Generated stubs, and a thin client in `client`."""
