"""Blobs, asked for upward: what members attached, and where what agents show is kept.

The calls are made for the organization of the session; whoever calls has bound such a principal.
"""

import asyncio
import hashlib
from dataclasses import dataclass
from typing import Any

import grpc
from branchline.v1.common_pb2 import BlobReference
from branchline_internal.task.v1.task_pb2 import (
    FetchBlobRequest,
    FetchBlobResponse,
    StoreBlobRequest,
    StoreBlobResponse,
)

from services.runtime.errors import DomainError, reason_of
from services.runtime.limits import CHUNK_BYTES
from services.runtime.logging import get_logger
from services.sandbox.outputs import Whole

log = get_logger(__name__)

_STORE_SECONDS = 20.0
"""How long all parts of one output may take."""


@dataclass(frozen=True, slots=True)
class Blobs:
    """The blobs of tasks."""

    stub: Any
    """Stub of the task coordinator."""

    async def fetch(self, task_id: str, blob_id: str, offset: int) -> bytes:
        """Return at most 1 MiB of a blob from an offset, nothing past its end. Raise AioRpcError."""
        request = FetchBlobRequest(task_id=task_id, blob_id=blob_id, offset=offset)
        response: FetchBlobResponse = await self.stub.FetchBlob(request)
        return response.data

    async def store(self, task_id: str, whole: Whole) -> BlobReference | None:
        """Store bytes; return None where that fails: what is shown then stays cut."""
        request = StoreBlobRequest(
            task_id=task_id,
            display_name=whole.display_name,
            media_type=whole.media_type,
            size_bytes=len(whole.data),
            sha256=hashlib.sha256(whole.data).hexdigest(),
        )
        try:
            async with asyncio.timeout(_STORE_SECONDS):
                for offset in range(0, len(whole.data), CHUNK_BYTES):
                    request.offset, request.data = offset, whole.data[offset : offset + CHUNK_BYTES]
                    response: StoreBlobResponse = await self.stub.StoreBlob(request, wait_for_ready=True)
                    if response.blob.blob_id:
                        return response.blob
                    request.upload_id = response.upload_id
        except (grpc.aio.AioRpcError, DomainError, TimeoutError) as error:
            log.warning("output not stored", task=task_id, size_bytes=len(whole.data), reason=reason_of(error))
        return None
