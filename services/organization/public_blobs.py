"""The public surface of blobs."""

from dataclasses import dataclass

from branchline.v1 import blobs_pb2 as api
from branchline.v1 import blobs_pb2_grpc
from branchline.v1.blobs_pb2 import Blob
from branchline.v1.common_pb2 import ENTITY_KIND_BLOB
from branchline.v1.roles_pb2 import ROLE_MEMBER

from services.organization.claims import check_complete
from services.organization.reading import Context, Reading
from services.organization.uploads import Uploads
from services.runtime.database import Tx
from services.runtime.spine.commands import Commands
from services.runtime.spine.tokens import consistency_token

_MEDIA_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class PublicBlobServicer(Reading, blobs_pb2_grpc.BlobServiceServicer):
    """Uploads and reads of blobs."""

    commands: Commands
    uploads: Uploads

    async def CreateBlob(self, request: api.CreateBlobRequest, context: Context) -> api.CreateBlobResponse:
        """Begin an upload."""
        return await self.commands.run(request, api.CreateBlobResponse, self._create, request)

    def _create(self, tx: Tx, request: api.CreateBlobRequest) -> api.CreateBlobResponse:
        self.stores.organizations.open(tx, request.organization_id, ROLE_MEMBER)
        new = Blob(
            organization_id=request.organization_id,
            display_name=request.display_name,
            media_type=request.media_type or _MEDIA_TYPE,
            size_bytes=request.size_bytes,
            sha256=request.sha256,
        )
        blob = self.stores.blobs.begin(tx, new)
        return api.CreateBlobResponse(blob=blob, consistency_token=_token(blob))

    async def WriteBlob(self, request: api.WriteBlobRequest, context: Context) -> api.WriteBlobResponse:
        """Write the next part."""
        await self.database.read(self.stores.organizations.check_open, request.organization_id, ROLE_MEMBER)
        blob = await self.uploads.write(request.organization_id, request.blob_id, request.offset, request.data)
        return api.WriteBlobResponse(blob=blob, consistency_token=_token(blob))

    async def GetBlob(self, request: api.GetBlobRequest, context: Context) -> api.GetBlobResponse:
        """Say how a blob stands."""
        await self.caught_up(request.consistency, request.organization_id, context)
        blob = await self.database.read(self.stores.blobs.of, request.organization_id, request.blob_id)
        return api.GetBlobResponse(blob=blob)

    async def ReadBlob(self, request: api.ReadBlobRequest, context: Context) -> api.ReadBlobResponse:
        """Read a part."""
        blob = await self.database.read(self.stores.blobs.of, request.organization_id, request.blob_id)
        check_complete(blob)
        return api.ReadBlobResponse(data=await self.uploads.read(blob, request.offset, request.length))


def _token(blob: Blob) -> str:
    return consistency_token([(ENTITY_KIND_BLOB, blob.id, blob.revision)])
