"""The `docker` provider: a container per sandbox on a Docker Engine, in a network of its own that leads to the door."""
