"""The door: the one listener of the sandbox service that sandboxes can reach."""
