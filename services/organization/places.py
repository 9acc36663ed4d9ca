"""Where people have something of their own: tasks that there are, in organizations that they are members of.

What they have open or half written may arrive when its task or their membership is gone, from a call that had begun
before or knew no better. Then the user service is told to forget it, or it would stay for ever.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from branchline_internal.user.v1.user_pb2 import ForgetTaskStatesRequest
from sqlalchemy import select

from services.organization.destinations import TO_USER
from services.organization.tables import members, task_lookup
from services.runtime.database import Reader, Statement, Tx, is_in
from services.runtime.spine.outbox import Mark, Outbox

_PLACES = Statement(
    select(task_lookup.c.task_id, members.c.user_id)
    .join(members, members.c.scope == task_lookup.c.organization_id)
    .where(is_in(task_lookup.c.task_id, "tasks"), is_in(members.c.user_id, "users"), members.c.deleted.is_(False))
)


class Own(NamedTuple):
    """Something that a person has on a task."""

    id: str
    revision: int
    organization_id: str
    user_id: str
    task_id: str


def strays(tx: Reader, found: Iterable[Own]) -> list[Own]:
    """Return what has no place."""
    all_of_them = list(found)
    if not all_of_them:
        return []
    given = {
        "tasks": sorted({one.task_id for one in all_of_them}),
        "users": sorted({one.user_id for one in all_of_them}),
    }
    places = {(row.task_id, row.user_id) for row in tx.rows(_PLACES, given)}
    return [one for one in all_of_them if (one.task_id, one.user_id) not in places]


def send_back(tx: Tx, outbox: Outbox, lost: Sequence[Own]) -> None:
    """Have the user service forget what has no place."""
    marks = [
        Mark(
            one.id,
            one.revision,
            ForgetTaskStatesRequest(organization_id=one.organization_id, user_id=one.user_id, task_id=one.task_id),
            TO_USER,
        )
        for one in lost
    ]
    outbox.mark(tx, marks)
