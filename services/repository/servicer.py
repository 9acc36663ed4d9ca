"""The gRPC surface that organization, gateway and task use of the repository."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from branchline.v1.repositories_pb2 import Repository
from branchline.v1.tasks_pb2 import Task, TranscriptSelection
from branchline_internal.organization.v1 import organization_pb2
from branchline_internal.organization.v1.organization_pb2_grpc import OrganizationServiceStub
from branchline_internal.repository.v1 import repository_pb2, repository_pb2_grpc

from services.repository.deletion import Deletion
from services.repository.store import RepositoryStore
from services.repository.tables import TAIL, TRANSCRIPT, WATCHED
from services.repository.workbench import Workbench
from services.runtime.database import Database, Reader
from services.runtime.principal import current_principal
from services.runtime.remote import host_of
from services.runtime.serving import Context
from services.runtime.spine.index import Index, Narrowed
from services.runtime.spine.source import watch_index
from services.runtime.spine.tokens import parse_consistency

_KINDS = tuple(table.kind for table in WATCHED)
_TAIL_ENTRIES, _MOST_TAIL_ENTRIES = 50, 500


@dataclass(frozen=True, slots=True)
class RepositoryServicer(repository_pb2_grpc.RepositoryServiceServicer):
    """Creation and deletion by the organization, the upstream watch, and what tasks ask upward."""

    database: Database
    index: Index
    store: RepositoryStore
    workbench: Workbench
    deletion: Deletion
    organization: OrganizationServiceStub

    async def EnsureRepository(
        self, request: repository_pb2.EnsureRepositoryRequest, context: Context
    ) -> repository_pb2.EnsureRepositoryResponse:
        """Create the repository or bring it up to date."""
        await self.database.write(self.store.ensure, request)
        return repository_pb2.EnsureRepositoryResponse()

    async def DeleteRepository(
        self, request: repository_pb2.DeleteRepositoryRequest, context: Context
    ) -> repository_pb2.DeleteRepositoryResponse:
        """Record that the repository shall go; the sweep does the rest."""
        await self.database.write(self.deletion.begin, request.repository_id)
        return repository_pb2.DeleteRepositoryResponse()

    async def WatchIndex(
        self, request: repository_pb2.WatchIndexRequest, context: Context
    ) -> AsyncIterator[repository_pb2.WatchIndexResponse]:
        """Watch the index tables of one task."""
        selection, principal = request.selection, current_principal()
        fresh = parse_consistency(selection.consistency)
        task = await self.database.read(self.workbench.task, request.task_id, principal)
        of = task.organization_id, principal.user_id
        await self.index.await_point(fresh.point, *of, context.time_remaining(), fresh.wait_seconds)
        narrow = {TRANSCRIPT.kind: Narrowed(TAIL, _tail(request.transcripts))}
        async for frame in watch_index(self.index, f"task/{task.id}", task.id, _KINDS, selection, narrow):
            yield repository_pb2.WatchIndexResponse(frame=frame)

    async def ClaimBlobs(
        self, request: repository_pb2.ClaimBlobsRequest, context: Context
    ) -> repository_pb2.ClaimBlobsResponse:
        """Ask upward: name blobs on behalf of a task."""
        task = await self.database.read(self.workbench.task, request.task_id, current_principal())
        claim = organization_pb2.ClaimBlobsRequest(
            organization_id=task.organization_id, task_id=task.id, blob_ids=request.blob_ids
        )
        answer = await self.organization.ClaimBlobs(claim, timeout=context.time_remaining())
        return repository_pb2.ClaimBlobsResponse(blobs=answer.blobs)

    async def FetchBlob(
        self, request: repository_pb2.FetchBlobRequest, context: Context
    ) -> repository_pb2.FetchBlobResponse:
        """Ask upward: read part of a blob that a task has named."""
        task = await self.database.read(self.workbench.task, request.task_id, current_principal())
        fetch = organization_pb2.FetchBlobRequest(
            organization_id=task.organization_id, task_id=task.id, blob_id=request.blob_id, offset=request.offset
        )
        answer = await self.organization.FetchBlob(fetch, timeout=context.time_remaining())
        return repository_pb2.FetchBlobResponse(data=answer.data)

    async def StoreBlob(
        self, request: repository_pb2.StoreBlobRequest, context: Context
    ) -> repository_pb2.StoreBlobResponse:
        """Ask upward: store the next part of what an agent has shown."""
        task = await self.database.read(self.workbench.task, request.task_id, current_principal())
        store = organization_pb2.StoreBlobRequest(
            organization_id=task.organization_id,
            task_id=task.id,
            display_name=request.display_name,
            media_type=request.media_type,
            size_bytes=request.size_bytes,
            sha256=request.sha256,
            upload_id=request.upload_id,
            offset=request.offset,
            data=request.data,
        )
        answer = await self.organization.StoreBlob(store, timeout=context.time_remaining())
        return repository_pb2.StoreBlobResponse(
            blob=answer.blob, upload_id=answer.upload_id, received_bytes=answer.received_bytes
        )

    async def GetGitCredential(
        self, request: repository_pb2.GetGitCredentialRequest, context: Context
    ) -> repository_pb2.GetGitCredentialResponse:
        """Ask upward for the credential of a task's owner at the repository's host."""
        task, repository = await self.database.read(self._of_task, request.task_id)
        credential = await self.organization.GetGitCredential(
            organization_pb2.GetGitCredentialRequest(
                organization_id=task.organization_id,
                user_id=task.owner_user_id,
                host=host_of(repository.remote_url),
            )
        )
        return repository_pb2.GetGitCredentialResponse(username=credential.username, secret=credential.secret)

    def _of_task(self, tx: Reader, task_id: str) -> tuple[Task, Repository]:
        task = self.workbench.task(tx, task_id, current_principal())
        return task, self.store.visible(tx, task.repository_id, current_principal())


def _tail(selection: TranscriptSelection) -> dict[str, Any]:
    """Return which transcripts, and how much of them, a snapshot shows."""
    entries = selection.tail_entries if selection.HasField("tail_entries") else _TAIL_ENTRIES
    ids = list(selection.session_ids)
    return {"any_session": not ids, "sessions": ids, "tail": min(entries, _MOST_TAIL_ENTRIES)}
