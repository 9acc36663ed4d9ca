"""Sandbox providers: plug-ins found by the entry point group `branchline.sandbox_providers`."""
