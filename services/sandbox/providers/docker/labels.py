"""Labels of all that is made on an Engine. Whoever restarts finds it by these."""

INSTALLATION = "branchline.installation"
ORGANIZATION = "branchline.organization"
TASK = "branchline.task"
SANDBOX = "branchline.sandbox"
CONFIG = "branchline.config"
"""Digest of what a container was made of."""
