"""GitHub data: the cache of GitHub, pushed up to organization. Child of organization, coordinator of nothing."""
