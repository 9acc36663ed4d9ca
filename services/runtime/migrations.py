"""Alembic per service: the scripts live in the service's `migrations` folder and run at start."""

from pathlib import Path

from alembic import command, context
from alembic.config import Config
from sqlalchemy import MetaData, create_engine


def migration_config(scripts: Path, database: Path) -> Config:
    """Return the Alembic configuration for one service's scripts and database file."""
    config = Config()
    config.set_main_option("script_location", str(scripts))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{database}")
    return config


def migrate(scripts: Path, database: Path) -> None:
    """Bring a service's database to the newest schema."""
    database.parent.mkdir(parents=True, exist_ok=True)
    command.upgrade(migration_config(scripts, database), "head")


def run_environment(metadata: MetaData) -> None:
    """Do what every service's `migrations/env.py` does: run the scripts in one transaction."""
    engine = create_engine(context.config.get_main_option("sqlalchemy.url") or "")
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()
