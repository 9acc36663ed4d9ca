"""What agents wait for, over all tasks of an organization."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_INPUT_REQUEST
from branchline.v1.transcripts_pb2 import InputRequest
from sqlalchemy import bindparam, select

from services.organization.listing import Listing
from services.organization.tables import input_requests
from services.runtime.clock import column_seconds
from services.runtime.database import Tx, is_in
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.ingest import Pushed, RejectedEntryError

_c = input_requests.c
_ALL = select(_c.payload).where(_c.scope == bindparam("of"), is_in(_c.state, "states"), _c.deleted.is_(False))
_ORDER = ([_c.create_time, _c.id], [float, str])
INPUT_REQUESTS = Listing(InputRequest, _ALL, *_ORDER)
INPUT_REQUESTS_OF_TASKS = Listing(InputRequest, _ALL.where(is_in(_c.task_id, "tasks")), *_ORDER)


@dataclass(frozen=True, slots=True)
class InputRequests:
    """The index of input requests."""

    index: Index

    def take(self, tx: Tx, pushed: Sequence[Pushed[InputRequest]]) -> None:
        """Index pushed requests."""
        self.index.put_many(tx, [input_entry(one.state, one.revision, deleted=one.deleted) for one in pushed])


def input_entry(asked: InputRequest, revision: int, *, deleted: bool) -> Entry:
    """Return what is indexed of a request."""
    if not asked.organization_id:
        raise RejectedEntryError(f"input request {asked.id} names no organization")
    columns = {
        "session_id": asked.session_id,
        "state": asked.state,
        "create_time": column_seconds(asked.create_time),
    }
    return Entry(
        ENTITY_KIND_INPUT_REQUEST,
        asked.organization_id,
        asked.id,
        revision,
        asked,
        task_id=asked.task_id,
        deleted=deleted,
        columns=columns,
    )
