"""Groups of commands, a module each, which has the group as its `app`."""
