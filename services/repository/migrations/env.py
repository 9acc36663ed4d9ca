"""Alembic environment of the repository service."""

from services.repository.tables import metadata
from services.runtime.migrations import run_environment

run_environment(metadata)
