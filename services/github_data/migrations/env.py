"""Alembic environment of the github_data service."""

from services.github_data.tables import metadata
from services.runtime.migrations import run_environment

run_environment(metadata)
