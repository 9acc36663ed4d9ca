"""User: who people are, their tokens and credentials, and all per-user workbench state. Child of organization."""
