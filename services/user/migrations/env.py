"""Alembic environment of the user service."""

from services.user.tables import metadata
from services.runtime.migrations import run_environment

run_environment(metadata)
