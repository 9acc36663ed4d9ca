from typing import NamedTuple, Self

class Message(NamedTuple):
    stream: int
    data: bytes

class Stream:
    async def read_out(self) -> Message | None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...
