"""Processes of a sandbox service that is killed: they go on, and so does who asks again."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from branchline.v1.processes_pb2 import (
    PROCESS_STATE_ENDED,
    Process,
    ProcessSpec,
    StartProcessRequest,
    WatchProcessRequest,
    WatchProcessResponse,
    WriteProcessInputRequest,
)
from branchline.v1.processes_pb2_grpc import ProcessServiceStub
from branchline_internal.sandbox.v1 import sandbox_pb2

from services.runtime.client import open_channel
from services.runtime.principal import Signer
from tests.support.sandbox import KEY, SANDBOX, TASK, Room, eventually, sandbox_room


@pytest_asyncio.fixture
async def room(tmp_path: Path) -> AsyncGenerator[Room, None]:
    local = {"isolation": "none", "user_ids": [0, 0]}
    async with sandbox_room(tmp_path, local=local) as made:
        await made.start()
        create = sandbox_pb2.CreateSandboxRequest(sandbox_id=SANDBOX, task_id=TASK, provider="local")
        await made.stub.CreateSandbox(create, timeout=60)
        await made.execute("mkdir -p workspace")
        yield made


@pytest_asyncio.fixture
async def stub(room: Room) -> AsyncGenerator[Any, None]:
    channel: Any = open_channel("sandbox", f"unix:{room.folder}/sandbox.sock", Signer(KEY, "task"))
    yield ProcessServiceStub(channel)
    await channel.close()


async def start(stub: Any, script: str, request_id: str = "") -> Process:
    spec = ProcessSpec(command=["sh", "-c", script])
    request = StartProcessRequest(request_id=request_id, task_id=TASK, spec=spec)
    return (await stub.StartProcess(request, timeout=60, wait_for_ready=True)).process


async def follow(stub: Any, process: Process) -> tuple[bytes, WatchProcessResponse]:
    """Watch to the end, again from where it broke whenever it breaks."""
    said = b""
    async with asyncio.timeout(60):
        while True:
            request = WatchProcessRequest(task_id=TASK, process_id=process.id, offset=len(said))
            try:
                async for response in stub.WatchProcess(request, wait_for_ready=True):
                    if response.HasField("end"):
                        return said, response
                    assert not response.HasField("gap")
                    said += response.output.data
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)


async def test_output_offsets_input_and_exit_survive_kills(room: Room, stub: Any) -> None:
    process = await start(stub, "for i in $(seq 60); do echo line $i; sleep 0.1; done; cat; exit 6")
    watching = asyncio.ensure_future(follow(stub, process))
    for _ in range(3):
        await asyncio.sleep(1)
        await room.kill()
        await room.start()
    for _ in range(2):  # the second time it is passed over, though the service that took the first is no more
        request = WriteProcessInputRequest(task_id=TASK, process_id=process.id, data=b"the end", close=True)
        assert (await stub.WriteProcessInput(request, timeout=60, wait_for_ready=True)).offset == 7
        if not watching.done():
            await room.kill()
            await room.start()
    said, last = await watching
    assert said == b"".join(b"line %d\n" % number for number in range(1, 61)) + b"the end"
    assert last.end.exit_code == 6
    known = await eventually(lambda: _ended(room, process), room.log)
    assert (known.end.exit_code, known.output_tail) == (6, said)


@pytest.mark.parametrize("pause", [0.0, 0.01, 0.03, 0.06, 0.1])
async def test_a_start_is_made_once_whenever_the_service_is_killed(room: Room, stub: Any, pause: float) -> None:
    request_id = str(uuid.uuid4())
    process = await start(stub, "echo once >> begun; sleep 0.2; cat begun", request_id)
    await asyncio.sleep(pause)
    await room.kill()
    await room.start()
    assert (await start(stub, "echo once >> begun; sleep 0.2; cat begun", request_id)).id == process.id
    said, last = await follow(stub, process)
    assert (said, last.end.exit_code) == (b"once\n", 0)


def _ended(room: Room, process: Process) -> Process | None:
    known = room.coordinator.processes.get(process.id)
    return known if known is not None and known.state == PROCESS_STATE_ENDED else None
