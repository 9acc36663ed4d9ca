"""Where the organization's outbox leads: its direct children."""

TO_REPOSITORY = "repository"
TO_USER = "user"
TO_HISTORY = "history"
TO_GITHUB_DATA = "github_data"
