"""What stands behind this address, for clients that have no credential yet."""

from importlib.metadata import version

from branchline.v1.server_pb2 import GetServerInfoRequest, GetServerInfoResponse, ServerLimits

from services.runtime.limits import BLOB_BYTES, CHUNK_BYTES, MESSAGE_BYTES
from services.runtime.serving import Context
from services.runtime.spine.pages import MOST_ITEMS


async def server_info(_request: GetServerInfoRequest, _context: Context) -> GetServerInfoResponse:
    """Say what the server is."""
    limits = ServerLimits(
        request_bytes=MESSAGE_BYTES,
        response_bytes=MESSAGE_BYTES,
        page_size=MOST_ITEMS,
        blob_bytes=BLOB_BYTES,
        chunk_bytes=CHUNK_BYTES,
    )
    return GetServerInfoResponse(version=version("branchline-server"), limits=limits)
