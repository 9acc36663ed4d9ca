"""Alembic environment of the organization service."""

from services.organization.tables import metadata
from services.runtime.migrations import run_environment

run_environment(metadata)
