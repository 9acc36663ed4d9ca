"""The `local` provider does what every provider does."""

from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest_asyncio

from cli.installation import python_paths
from services.runtime.config import read_config
from services.sandbox.http import Http
from services.sandbox.providers.local import LocalProvider, LocalProviderConfig
from tests.support.provider_conformance import AGENT, ONE, OTHER, Ground, ProviderConformance
from tests.support.sandbox import AGENT_SERVER


@dataclass
class LocalGround(Ground[LocalProvider]):
    root: Path

    def again(self) -> LocalProvider:
        return a_provider(self.root, self.http)

    async def kill(self, sandbox_id: str) -> None:
        found = self.provider.processes.of(sandbox_id)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=5)

    async def freeze(self, sandbox_id: str) -> None:
        for process in self.provider.processes.of(sandbox_id):
            process.suspend()

    async def thaw(self, sandbox_id: str) -> None:
        for process in self.provider.processes.of(sandbox_id):
            process.resume()


def a_provider(root: Path, http: Http) -> LocalProvider:
    config = {"sandbox_agent": AGENT_SERVER, "readable_paths": python_paths(), "agents": {"mock": AGENT}}
    return LocalProvider(root, read_config(LocalProviderConfig, config), lambda: http)


class TestLocal(ProviderConformance):
    @pytest_asyncio.fixture
    async def ground(self, tmp_path: Path) -> AsyncGenerator[LocalGround, None]:
        http = Http()
        made = LocalGround(http, a_provider(tmp_path, http), tmp_path)
        yield made
        for sandbox_id in (ONE, OTHER):
            await made.thaw(sandbox_id)
            await made.provider.destroy(sandbox_id)
        await http.close()
