"""Task: one git branch each. Coordinator of its sessions and sandboxes, child of repository."""
