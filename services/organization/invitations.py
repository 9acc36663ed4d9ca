"""Invitations: each makes one person a member, by a code that is kept as a hash and works once."""

from dataclasses import dataclass
from typing import Any

from branchline.v1.common_pb2 import ENTITY_KIND_INVITATION
from branchline.v1.errors_pb2 import ERROR_REASON_INVITATION_INVALID, ERROR_REASON_QUOTA_EXCEEDED
from branchline.v1.history_pb2 import EVENT_KIND_MEMBER_JOINED
from branchline.v1.organizations_pb2 import Invitation, InviteMemberRequest, Member
from branchline.v1.roles_pb2 import ROLE_OWNER
from branchline.v1.users_pb2 import User
from sqlalchemy import bindparam, delete, func, select

from services.organization.feed import Feed
from services.organization.listing import Listing
from services.organization.members import Members
from services.organization.tables import invitations
from services.runtime.actors import current_actor, user_actor
from services.runtime.clock import Clock, column_seconds
from services.runtime.database import Reader, Statement, Tx, insert
from services.runtime.errors import FailedPrecondition, NotFound, ResourceExhausted
from services.runtime.principal import current_principal
from services.runtime.secrets import token_hash

_REVISION = 1
DEFAULT_TTL_SECONDS = 7 * 24 * 3600.0
MOST_OPEN = 500
"""Most invitations of one organization that were neither accepted nor withdrawn."""

_c = invitations.c
INVITATIONS = Listing(
    Invitation,
    select(_c.payload).where(_c.organization_id == bindparam("of")),
    [_c.id],
    [str],
    descending=True,
)
_COUNT = Statement(select(func.count()).where(_c.organization_id == bindparam("of")))
_ADD = Statement(insert(invitations))
_OF_CODE = Statement(select(_c.payload).where(_c.code_hash == bindparam("hash"), _c.expire_time > bindparam("now")))
_DELETE = Statement(delete(invitations).where(_c.organization_id == bindparam("of"), _c.id == bindparam("invitation")))
_EXPIRE = Statement(delete(invitations).where(_c.expire_time <= bindparam("now")))
_FORGET = Statement(
    delete(invitations).where(
        _c.id.in_(select(_c.id).where(_c.organization_id == bindparam("of")).limit(bindparam("most")))
    )
)


@dataclass(frozen=True, slots=True)
class Invitations:
    """The invitations of every organization."""

    members: Members
    feed: Feed
    clock: Clock

    def invite(self, tx: Tx, request: InviteMemberRequest, code: str) -> Invitation:
        """Store an invitation. Only owners invite owners."""
        if request.role == ROLE_OWNER:
            current_principal().require(ROLE_OWNER)
        self.expire(tx)
        made: Any = tx.row(_OF_CODE, {"hash": token_hash(code), "now": self.clock.seconds()})
        if made is not None:  # asked for again, longer ago than requests are remembered
            return Invitation.FromString(made.payload)
        tx.take_turn("invitations", request.organization_id)
        if tx.value(_COUNT, {"of": request.organization_id}) >= MOST_OPEN:
            words = f"an organization has at most {MOST_OPEN} open invitations"
            raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, words, limit="invitations")
        seconds = request.ttl.ToNanoseconds() / 1e9 or DEFAULT_TTL_SECONDS
        invitation = Invitation(
            id=self.clock.new_id("inv"),
            organization_id=request.organization_id,
            email=request.email.strip().lower(),
            role=request.role,
            creator=current_actor(),
            create_time=self.clock.timestamp(),
            revision=_REVISION,
        )
        invitation.expire_time.FromNanoseconds(int((self.clock.seconds() + seconds) * 1e9))
        row = {
            "id": invitation.id,
            "organization_id": invitation.organization_id,
            "code_hash": token_hash(code),
            "expire_time": column_seconds(invitation.expire_time),
            "payload": invitation.SerializeToString(),
        }
        tx.change(_ADD, row)
        return invitation

    def of_code(self, tx: Reader, code: str) -> Invitation:
        """Return the invitation of a code; raise FailedPrecondition, always the same, if it is of no use."""
        row: Any = tx.row(_OF_CODE, {"hash": token_hash(code), "now": self.clock.seconds()})
        if row is None:
            raise invalid_invitation()
        return Invitation.FromString(row.payload)

    def accept(self, tx: Tx, code: str, user: User) -> Member:
        """Use an invitation up. Of two who do at the same moment one wins."""
        invitation = self.of_code(tx, code)
        if not tx.change(_DELETE, {"of": invitation.organization_id, "invitation": invitation.id}):
            raise invalid_invitation()
        member = self.members.join(tx, invitation.organization_id, user, invitation.role)
        words = f"{user.display_name} joined"
        self.feed.record(tx, invitation.organization_id, EVENT_KIND_MEMBER_JOINED, words, actor=user_actor(user.id))
        return member

    def withdraw(self, tx: Tx, organization_id: str, invitation_id: str) -> int:
        """Forget an invitation, which never changes; return the revision of its end. Raise NotFound."""
        if not tx.change(_DELETE, {"of": organization_id, "invitation": invitation_id}):
            raise NotFound(ENTITY_KIND_INVITATION, invitation_id)
        return _REVISION + 1

    def expire(self, tx: Tx) -> None:
        """Forget what has expired."""
        tx.change(_EXPIRE, {"now": self.clock.seconds()})

    def forget_of(self, tx: Tx, organization_id: str, most: int) -> int:
        """Forget some invitations of an organization; return how many."""
        return tx.change(_FORGET, {"of": organization_id, "most": most})


def invalid_invitation() -> FailedPrecondition:
    """Return what is said of every code that is of no use."""
    return FailedPrecondition(ERROR_REASON_INVITATION_INVALID, "the invitation is unknown, used, withdrawn or expired")
