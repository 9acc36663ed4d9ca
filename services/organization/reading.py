"""What the public servicers share: reads that see what the caller has written."""

from dataclasses import dataclass

from branchline.v1.common_pb2 import (
    ENTITY_KIND_API_TOKEN,
    ENTITY_KIND_DRAFT,
    ENTITY_KIND_SECRET,
    ENTITY_KIND_USER,
    Consistency,
)
from branchline_internal.spine.v1.push_pb2 import ConsistencyPoint

from services.organization.stores import Stores
from services.runtime.database import Database
from services.runtime.principal import current_principal
from services.runtime.serving import Context
from services.runtime.spine.tokens import parse_consistency

_ONES_OWN = frozenset({ENTITY_KIND_USER, ENTITY_KIND_API_TOKEN, ENTITY_KIND_SECRET, ENTITY_KIND_DRAFT})


@dataclass(frozen=True, slots=True)
class Reading:
    """A servicer of reads."""

    database: Database
    stores: Stores

    async def caught_up(self, consistency: Consistency, organization_id: str, context: Context) -> None:
        """Wait until the index is as new as is asked, in what is the organization's or the caller's own.

        Without an organization nothing but the caller's own is waited for: organizations and members are this
        service's own and as new as their commands' answers.
        """
        freshness = parse_consistency(consistency)
        point = freshness.point
        if not organization_id:
            point = ConsistencyPoint(entities=[one for one in point.entities if one.kind in _ONES_OWN])
        if not point.entities:
            return
        user_id = current_principal().user_id
        await self.stores.index.await_point(
            point, organization_id, user_id, context.time_remaining(), freshness.wait_seconds
        )
