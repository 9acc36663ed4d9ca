"""Organization: the root coordinator. Coordinator of repositories and users, parent of history and github-data."""
