"""Gateway: the only public door. Reads organization and repository indexes alone, routes commands to their owners."""
