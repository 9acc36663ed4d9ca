from typing import Any

from aiodocker.containers import DockerContainers
from aiodocker.events import DockerEvents
from aiodocker.images import DockerImages
from aiodocker.networks import DockerNetworks
from aiodocker.volumes import DockerVolumes

class Docker:
    containers: DockerContainers
    events: DockerEvents
    images: DockerImages
    networks: DockerNetworks
    volumes: DockerVolumes
    def __init__(self, url: str | None = None) -> None: ...
    async def close(self) -> None: ...
    async def version(self) -> dict[str, Any]: ...

class DockerError(Exception):
    status: int
    message: str
