"""Alembic environment of the task service."""

from services.task.tables import metadata
from services.runtime.migrations import run_environment

run_environment(metadata)
