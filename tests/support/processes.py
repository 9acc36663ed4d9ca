"""Processes in the sandbox of a task, as a client of the gateway starts and follows them."""

from dataclasses import dataclass, field
from typing import Any, cast

from branchline.v1.processes_pb2 import (
    OUTPUT_STREAM_STDERR,
    Process,
    ProcessEnd,
    ProcessSpec,
    StartProcessRequest,
    WatchProcessRequest,
)

from tests.support.client import Client
from tests.support.stack import request_id


@dataclass
class Seen:
    """What a watcher of a process saw, until its end."""

    offset: int = 0
    """Where the watch begins, from the end if negative; then of the first byte that has not come."""

    out: bytes = b""
    errors: bytes = b""
    gaps: list[int] = field(default_factory=list[int])
    """Offsets at which it went on after what is no longer kept."""

    end: ProcessEnd = field(default_factory=ProcessEnd)

    @property
    def stdout(self) -> str:
        return self.out.decode()

    @property
    def stderr(self) -> str:
        return self.errors.decode()

    def take(self, response: Any) -> bool:
        """Take an answer; fail if it does not begin where the one before it ended. Return whether it is the last."""
        match response.WhichOneof("event"):
            case "output":
                output = response.output
                self.offset = output.offset if self.offset < 0 else self.offset
                assert output.offset == self.offset, f"{output.offset} follows {self.offset}"
                self.offset += len(output.data)
                if output.stream == OUTPUT_STREAM_STDERR:
                    self.errors += output.data
                else:
                    self.out += output.data
            case "gap":
                assert response.gap.next_offset > self.offset
                self.offset = response.gap.next_offset
                self.gaps.append(self.offset)
            case "end":
                self.end = response.end
            case _:
                pass
        return response.HasField("end")


async def start(client: Client, task_id: str, *command: str, **spec: Any) -> Process:
    """Start a process in a task's sandbox."""
    request = StartProcessRequest(request_id=request_id(), task_id=task_id, spec=ProcessSpec(command=command, **spec))
    return (await client.processes.StartProcess(request)).process


async def follow(client: Client, process: Process, offset: int = 0) -> Seen:
    """Watch a process from an offset to its end."""
    request = WatchProcessRequest(task_id=process.task_id, process_id=process.id, offset=offset)
    seen = Seen(offset)
    async for response in cast("Any", client.processes.WatchProcess(request)):
        if seen.take(response):
            return seen
    raise AssertionError("the watch ended before the process")


async def execute(client: Client, task_id: str, *command: str, **spec: Any) -> Seen:
    """Run a command to its end."""
    return await follow(client, await start(client, task_id, *command, **spec))
