"""History: the one append-only feed of each organization. Child of organization, coordinator of nothing."""
