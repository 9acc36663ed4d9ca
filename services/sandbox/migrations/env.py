"""Alembic environment of the sandbox service."""

from services.sandbox.tables import metadata
from services.runtime.migrations import run_environment

run_environment(metadata)
