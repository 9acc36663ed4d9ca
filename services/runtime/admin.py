"""What an operator may ask of every service: what waits to leave it, and what is parked."""

from dataclasses import dataclass
from typing import Any

from branchline_internal.admin.v1 import admin_pb2, admin_pb2_grpc

from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.runtime.spine.chunks import parts
from services.runtime.spine.outbox import Outbox

_PAGE_ROWS = 100


@dataclass(frozen=True, slots=True)
class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """The outbox of one service, for the installation's operator alone."""

    outbox: Outbox

    async def ListOutbox(self, request: admin_pb2.ListOutboxRequest, context: Context) -> admin_pb2.ListOutboxResponse:
        """List what waits."""
        current_principal().require_operator()
        waiting, parked = await self.outbox.counts()
        most = request.page_size or _PAGE_ROWS
        found = await self.outbox.listed(
            parked=request.parked, destination=request.destination, after_seq=request.after_seq, most=most
        )
        page = next(parts(map(_listed, found), admin_pb2.OutboxRow.ByteSize, most), None)
        return admin_pb2.ListOutboxResponse(rows=page, waiting_count=waiting, parked_count=parked)

    async def RetryOutbox(
        self, request: admin_pb2.RetryOutboxRequest, context: Context
    ) -> admin_pb2.RetryOutboxResponse:
        """Deliver parked rows again."""
        current_principal().require_operator()
        return admin_pb2.RetryOutboxResponse(count=await self.outbox.retry(list(request.seqs)))

    async def DropOutbox(self, request: admin_pb2.DropOutboxRequest, context: Context) -> admin_pb2.DropOutboxResponse:
        """Forget parked rows."""
        current_principal().require_operator()
        return admin_pb2.DropOutboxResponse(count=await self.outbox.drop(list(request.seqs)))


def _listed(row: Any) -> admin_pb2.OutboxRow:
    listed = admin_pb2.OutboxRow(
        seq=row.seq,
        destination=row.destination,
        type=row.type_url.rpartition("/")[2],
        entity_id=row.entity_id,
        revision=row.revision,
        attempts=row.attempts,
        parked_reason=row.parked_reason,
        size_bytes=row.size_bytes,
    )
    listed.mark_time.FromNanoseconds(int(row.mark_time * 1e9))
    return listed
