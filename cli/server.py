"""The commands that run services."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from cli import demo as demo_job
from cli import views
from cli.installation import SERVICES, distributed_installation, local_installation
from cli.settings import Settings, SettingsError, load_settings
from cli.up import bootstrap as bootstrap_installation
from cli.up import everything, until_stopped
from services.runtime.logging import configure_logging


async def up(console: Console, data_dir: Path, agent: str) -> None:
    """Run all services until the process is told to stop."""
    settings = _settings(data_dir)
    if not settings.local.agents:
        settings = _settings(data_dir, local={**settings.local.model_dump(), "agents": demo_job.scripted_agents()})
    installation = local_installation(settings)
    async with everything(installation):
        organization_id, token = await bootstrap_installation(installation, agent)
        views.print_welcome(console, installation.addresses, organization_id, token)
        console.print("\nBranchline is up. Ctrl-C stops it; agents at work go on and are found again.")
        await until_stopped()


async def serve(data_dir: Path, service: str) -> None:
    """Run one service until the process is told to stop."""
    if service not in SERVICES:
        raise SettingsError(f'there is no service "{service}"; there are: {", ".join(SERVICES)}')
    built = distributed_installation(_settings(data_dir)).build(service)
    async with built.running():
        await until_stopped()


async def bootstrap(console: Console, data_dir: Path, agent: str) -> None:
    """Create the first user, organization and token of services that run apart."""
    installation = distributed_installation(_settings(data_dir))
    organization_id, token = await bootstrap_installation(installation, agent)
    views.print_welcome(console, installation.addresses, organization_id, token)


async def demo(console: Console, source: Path, data_dir: Path | None) -> int:
    """Run the demo; return its exit code."""
    configure_logging(level=os.environ.get("BRANCHLINE_LOG_LEVEL", "error"))
    return await demo_job.run(console, source, data_dir)


def _settings(data_dir: Path, **given: Any) -> Settings:
    settings = load_settings(data_dir=data_dir, **given)
    configure_logging(json=settings.log_json, level=settings.log_level)
    return settings
