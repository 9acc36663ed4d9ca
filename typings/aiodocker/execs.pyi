from typing import Any, Literal

from aiodocker.stream import Stream

class Exec:
    def start(self, *, detach: Literal[False] = False) -> Stream: ...
    async def inspect(self) -> dict[str, Any]: ...
