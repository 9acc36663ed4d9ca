from typing import Any

class DockerImages:
    async def inspect(self, name: str) -> dict[str, Any]: ...
