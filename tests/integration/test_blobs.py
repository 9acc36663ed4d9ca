"""Blobs through the gateway: uploaded by a member, named by a task, read by its agent's machine."""

import hashlib

import grpc
import pytest
from branchline.v1 import blobs_pb2, tasks_pb2
from branchline.v1.blobs_pb2 import BLOB_STATE_COMPLETE, Blob
from branchline.v1.common_pb2 import Attachment, BlobReference, Prompt
from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE

from tests.support.databases import look_into
from tests.support.stack import Stack, request_id

_PART = 1024 * 1024


async def upload(stack: Stack, data: bytes, name: str = "notes.txt") -> Blob:
    digest = hashlib.sha256(data).hexdigest()
    begin = blobs_pb2.CreateBlobRequest(
        request_id=request_id(),
        organization_id=stack.organization_id,
        display_name=name,
        media_type="text/plain",
        size_bytes=len(data),
        sha256=digest,
    )
    blob = (await stack.client.blobs.CreateBlob(begin)).blob
    for offset in range(0, len(data), _PART):
        part = blobs_pb2.WriteBlobRequest(
            organization_id=stack.organization_id, blob_id=blob.id, offset=offset, data=data[offset : offset + _PART]
        )
        blob = (await stack.client.blobs.WriteBlob(part)).blob
    return blob


async def download(stack: Stack, blob: Blob) -> bytes:
    read = b""
    while len(read) < blob.size_bytes:
        request = blobs_pb2.ReadBlobRequest(organization_id=stack.organization_id, blob_id=blob.id, offset=len(read))
        read += (await stack.client.blobs.ReadBlob(request)).data
    return read


def naming(*blobs: Blob, text: str = "say hello") -> Prompt:
    attached = [Attachment(blob=BlobReference(blob_id=blob.id)) for blob in blobs]
    return Prompt(text=text, attachments=attached)


def claims(stack: Stack, blob: Blob) -> list[str]:
    query = "SELECT task_id FROM blob_claims WHERE blob_id = :id"
    return [row[0] for row in look_into(stack.database("organization"), query, id=blob.id)]


async def test_a_blob_goes_up_and_down_whole(stack: Stack) -> None:
    data = bytes(range(256)) * (10 * 1024) + b"end"
    blob = await upload(stack, data)
    assert blob.state == BLOB_STATE_COMPLETE
    assert await download(stack, blob) == data


async def test_a_task_names_the_blobs_of_its_prompt_unless_it_is_only_asked_about(stack: Stack) -> None:
    repository_id = await stack.add_repository()
    blob = await upload(stack, b"remember the milk")
    request = tasks_pb2.CreateTaskRequest(repository_id=repository_id, prompt=naming(blob), validate_only=True)

    await stack.client.tasks.CreateTask(request)
    assert claims(stack, blob) == []

    request.prompt.CopyFrom(naming(Blob(id="blob_none")))
    for validate_only in (True, False):
        request.validate_only = validate_only
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stack.client.tasks.CreateTask(request)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND

    request.prompt.CopyFrom(naming(blob))
    task = (await stack.client.tasks.CreateTask(request)).task
    assert claims(stack, blob) == [task.id]
    told = task.prompt.attachments[0].blob
    assert (told.display_name, told.media_type, told.size_bytes) == ("notes.txt", "text/plain", 17)


async def test_an_agent_reads_what_is_attached(stack: Stack) -> None:
    data = bytes(range(256)) * (10 * 1024)
    blob = await upload(stack, data, "table.bin")
    repository_id = await stack.add_repository()
    text = "run cat ~/attachments/*/table.bin | sha256sum"
    request = tasks_pb2.CreateTaskRequest(repository_id=repository_id, prompt=naming(blob, text=text))
    task = (await stack.client.tasks.CreateTask(request)).task

    done = await stack.until(task.id, activity=TASK_ACTIVITY_IDLE, turn=1)

    said = [entry.tool_call for entry in await stack.transcript(done) if entry.HasField("tool_call")]
    assert blob.sha256 in said[0].outputs[0].text
