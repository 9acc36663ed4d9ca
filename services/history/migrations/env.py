"""Alembic environment of the history service."""

from services.history.tables import metadata
from services.runtime.migrations import run_environment

run_environment(metadata)
