"""Repository: coordinator of tasks. Holds the workbench index of its tasks and caches of branches and pull requests."""
