"""Runs one service in this process, or brings the databases up to date.

    python -m cli.server SERVICE DATA_DIR

is what `branchline serve` becomes: a process that holds the service's room and nothing of the command line.
"""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import uvloop

from cli.installation import LOCAL, SERVICES, Installation, distributed_installation, known_installation, uses
from cli.isolation import require_isolation
from cli.settings import Settings, SettingsError, load_settings
from services.runtime.database import DatabaseUnavailable
from services.runtime.logging import configure_logging
from services.runtime.memory import give_back
from services.runtime.migrations import bring_up_to_date

_SETTLED_SECONDS = 5.0
"""Time after which a process has all that it needs to serve."""


async def serve(data_dir: Path, service: str) -> None:
    """Run one service until the process is told to stop."""
    if service not in SERVICES:
        raise SettingsError(f'there is no service "{service}"; there are: {", ".join(SERVICES)}')
    installation = distributed_installation(configure(data_dir))
    if service == "sandbox":
        await require_isolation(isolation_of(installation))
    async with installation.build(service).running():
        await until_stopped()


async def migrate(data_dir: Path) -> None:
    """Bring the databases of all services to the newest schema."""
    try:
        await bring_up_to_date(known_installation(configure(data_dir)).databases())
    except DatabaseUnavailable as error:
        raise SettingsError(str(error)) from error


def configure(data_dir: Path, **given: Any) -> Settings:
    """Read the settings, and log as they say."""
    settings = load_settings(data_dir=data_dir, **given)
    configure_logging(json=settings.log_json, level=settings.log_level)
    return settings


def isolation_of(installation: Installation) -> str:
    """Return what the settings say of isolation on this host, which is of no interest without the `local` provider."""
    if not uses(installation.settings, LOCAL):
        return "none"
    return str(installation.settings.section("sandbox").get(LOCAL, {}).get("isolation", "auto"))


async def until_stopped() -> None:
    """Wait for SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop.set)
    loop.call_later(_SETTLED_SECONDS, give_back)
    await stop.wait()


if __name__ == "__main__":
    try:
        uvloop.run(serve(Path(sys.argv[2]), sys.argv[1]))
    except (SettingsError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
