"""Upload a file, in parts that may be sent again, and give it to an agent.

BRANCHLINE_TOKEN=$(cat data/token) python attach_file.py TASK_ID FILE "Look at the file I attached"
"""

import asyncio
import hashlib
import mimetypes
import os
import sys
from pathlib import Path

from branchline import AsyncClient
from branchline.v1.blobs_pb2 import BLOB_STATE_COMPLETE, Blob, CreateBlobRequest, WriteBlobRequest
from branchline.v1.common_pb2 import Attachment, BlobReference, Prompt
from branchline.v1.sessions_pb2 import WHEN_BUSY_QUEUE, ListSessionsRequest, SendMessageRequest
from branchline.v1.tasks_pb2 import GetTaskRequest

ADDRESS, TOKEN = os.environ.get("BRANCHLINE_ADDRESS", "127.0.0.1:7700"), os.environ["BRANCHLINE_TOKEN"]
PART_BYTES = 1024 * 1024


async def upload(client: AsyncClient, organization_id: str, file: Path) -> Blob:
    """Upload a file of at most 64 MiB."""
    data = file.read_bytes()
    creating = CreateBlobRequest(
        organization_id=organization_id,
        display_name=file.name,
        media_type=mimetypes.guess_type(file.name)[0] or "",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    blob = (await client.blobs.create_blob(creating)).blob
    while blob.state != BLOB_STATE_COMPLETE:  # `received_bytes` is where an upload that broke off goes on
        part = data[blob.received_bytes : blob.received_bytes + PART_BYTES]
        writing = WriteBlobRequest(
            organization_id=organization_id, blob_id=blob.id, offset=blob.received_bytes, data=part
        )
        blob = (await client.blobs.write_blob(writing)).blob
    return blob


async def main(task_id: str, name: str, text: str) -> None:
    async with AsyncClient(ADDRESS, TOKEN) as client:
        task = (await client.tasks.get_task(GetTaskRequest(task_id=task_id))).task
        blob = await upload(client, task.organization_id, Path(name))
        print(f"{blob.id}: {blob.size_bytes} bytes of {blob.media_type}")
        session = (await client.sessions.list_sessions(ListSessionsRequest(task_id=task_id))).sessions[0]
        attached = Attachment(blob=BlobReference(blob_id=blob.id))
        sending = SendMessageRequest(
            task_id=task_id,
            session_id=session.id,
            prompt=Prompt(text=text, attachments=[attached]),
            when_busy=WHEN_BUSY_QUEUE,
        )
        print((await client.sessions.send_message(sending)).WhichOneof("message"))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
