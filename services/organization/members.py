"""Members and their roles: who may come, change and go. An organization always has an owner."""

from collections.abc import Iterable
from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_MEMBER
from branchline.v1.errors_pb2 import ERROR_REASON_ALREADY_MEMBER, ERROR_REASON_LAST_OWNER, ERROR_REASON_QUOTA_EXCEEDED
from branchline.v1.history_pb2 import EVENT_KIND_MEMBER_REMOVED, EVENT_KIND_MEMBER_UPDATED
from branchline.v1.organizations_pb2 import Member
from branchline.v1.roles_pb2 import ROLE_ADMIN, ROLE_OWNER, ROLE_UNSPECIFIED, Role
from branchline.v1.users_pb2 import User
from branchline_internal.user.v1.user_pb2 import ForgetTaskStatesRequest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import bindparam, func, select

from services.organization.destinations import TO_USER
from services.organization.feed import Feed
from services.organization.listing import Listing
from services.organization.tables import members
from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx, is_in
from services.runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from services.runtime.principal import current_principal
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Held
from services.runtime.updates import check_etag, etag_of, update

REMOVED_AT_ONCE = 500

MOST_MEMBERS = 2_000
"""Most members of one organization: they are listed, and carried by watches."""

MOST_MEMBERSHIPS = 500
"""Most organizations of one person: each call that says who calls carries them."""

SETTABLE = ("role",)
"""What is changed of a member."""

MEMBERS = Held(members, Member, ENTITY_KIND_MEMBER)
MEMBERS_BY_NAME = Listing(
    Member,
    select(members.c.payload).where(members.c.scope == bindparam("of"), members.c.deleted.is_(False)),
    [members.c.name_key, members.c.user_id],
    [str, str],
)
MEMBERSHIPS_OF = MEMBERS.by("user_id")
_SOME_MEMBERS_OF = MEMBERS.by("scope", limit=REMOVED_AT_ONCE)

_LAST_REVISION = Statement(select(members.c.revision).where(members.c.id == bindparam("member")))
_OWNERS = Statement(
    select(func.count()).where(
        members.c.scope == bindparam("of"), members.c.role == ROLE_OWNER, members.c.deleted.is_(False)
    )
)
_COUNT = Statement(select(func.count()).where(members.c.scope == bindparam("of"), members.c.deleted.is_(False)))
_COUNT_OF_USER = Statement(
    select(func.count()).where(members.c.user_id == bindparam("user"), members.c.deleted.is_(False))
)
_USER_IDS = Statement(
    select(members.c.scope, members.c.user_id).where(is_in(members.c.scope, "scopes"), members.c.deleted.is_(False))
)


@dataclass(frozen=True, slots=True)
class Members:
    """The members of every organization."""

    index: Index
    outbox: Outbox
    feed: Feed
    clock: Clock

    def find(self, tx: Reader, organization_id: str, user_id: str) -> Member | None:
        """Return a membership, or None."""
        return MEMBERS.find(tx, member_id(organization_id, user_id))

    def user_ids(self, tx: Reader, organization_ids: Iterable[str]) -> dict[str, list[str]]:
        """Return the users of organizations."""
        found: dict[str, list[str]] = {}
        for row in tx.rows(_USER_IDS, {"scopes": sorted(organization_ids)}):
            found.setdefault(row.scope, []).append(row.user_id)
        return found

    def join(self, tx: Tx, organization_id: str, user: User, role: Role.ValueType) -> Member:
        """Make a person a member.

        Raise AlreadyExists if the person is one, ResourceExhausted if there would be too many.
        """
        if self.find(tx, organization_id, user.id) is not None:
            sentence = f"{user.email or user.id} is a member"
            raise AlreadyExists(ENTITY_KIND_MEMBER, user.id, sentence, ERROR_REASON_ALREADY_MEMBER, user_id=user.id)
        tx.take_turn("members", organization_id)
        self.check_room(tx, organization_id)
        tx.take_turn("memberships", user.id)
        if tx.value(_COUNT_OF_USER, {"user": user.id}) >= MOST_MEMBERSHIPS:
            sentence = f"a person is a member of at most {MOST_MEMBERSHIPS} organizations"
            raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, sentence, limit="memberships")
        left = tx.value(_LAST_REVISION, {"member": member_id(organization_id, user.id)})
        member = Member(
            organization_id=organization_id,
            user_id=user.id,
            role=role,
            display_name=user.display_name,
            email=user.email,
            join_time=self.clock.timestamp(),
            revision=left or 0,
        )
        self._save(tx, member)
        return member

    def check_room(self, tx: Reader, organization_id: str) -> None:
        """Raise ResourceExhausted if the organization can have no further member."""
        if tx.value(_COUNT, {"of": organization_id}) >= MOST_MEMBERS:
            sentence = f"an organization has at most {MOST_MEMBERS} members"
            raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, sentence, limit="members")

    def change(self, tx: Tx, given: Member, mask: FieldMask) -> Member:
        """Change what a member may do; only owners make and unmake owners."""
        member = self._get(tx, given.organization_id, given.user_id)
        check_etag(member, given)
        before = Member()
        before.CopyFrom(member)
        changed = update(member, given, mask, SETTABLE, "member")
        role = member.role
        if role == ROLE_UNSPECIFIED:
            raise InvalidArgument("member.role", "must be set")
        if ROLE_OWNER in {before.role, role}:
            current_principal().require(ROLE_OWNER)
        if not changed:
            return member
        self._keep_an_owner(tx, before)
        self._save(tx, member)
        words = f"{member.display_name} is now {Role.Name(role).removeprefix('ROLE_').lower()}"
        self.feed.record(tx, member.organization_id, EVENT_KIND_MEMBER_UPDATED, words)
        return member

    def remove(self, tx: Tx, organization_id: str, user_id: str) -> Member:
        """Remove a member; everybody may leave. Return what is left: the revision of the tombstone."""
        principal = current_principal()
        member = self._get(tx, organization_id, user_id)
        if user_id != principal.user_id:
            principal.require(ROLE_OWNER if member.role == ROLE_OWNER else ROLE_ADMIN)
        self._keep_an_owner(tx, member)
        self._save(tx, member, deleted=True)
        forget = ForgetTaskStatesRequest(organization_id=organization_id, user_id=user_id)
        self.outbox.mark(tx, [Mark(member_id(organization_id, user_id), member.revision, forget, TO_USER)])
        did = "left" if user_id == principal.user_id else "was removed"
        self.feed.record(tx, organization_id, EVENT_KIND_MEMBER_REMOVED, f"{member.display_name} {did}")
        return member

    def remove_some(self, tx: Tx, organization_id: str) -> int:
        """Remove up to `REMOVED_AT_ONCE` members of an organization that ends; return how many."""
        found = _SOME_MEMBERS_OF(tx, scope=organization_id)
        for member in found:
            member.revision += 1
        self.index.put_many(tx, [_entry(member, deleted=True) for member in found])
        return len(found)

    def _get(self, tx: Reader, organization_id: str, user_id: str) -> Member:
        member = self.find(tx, organization_id, user_id)
        if member is None:
            raise NotFound(ENTITY_KIND_MEMBER, user_id)
        return member

    def _keep_an_owner(self, tx: Reader, member: Member) -> None:
        if member.role == ROLE_OWNER and tx.value(_OWNERS, {"of": member.organization_id}) == 1:
            raise FailedPrecondition(ERROR_REASON_LAST_OWNER, f"{member.display_name} is the only owner")

    def _save(self, tx: Tx, member: Member, *, deleted: bool = False) -> None:
        member.revision += 1
        member.etag = etag_of(member, SETTABLE)
        self.index.put(tx, _entry(member, deleted=deleted))


def member_id(organization_id: str, user_id: str) -> str:
    """Return the id under which a membership is indexed."""
    return f"{organization_id}/{user_id}"


def _entry(member: Member, *, deleted: bool) -> Entry:
    return Entry(
        ENTITY_KIND_MEMBER,
        member.organization_id,
        member_id(member.organization_id, member.user_id),
        member.revision,
        member,
        deleted=deleted,
        columns={"role": member.role, "user_id": member.user_id, "name_key": member.display_name.casefold()},
    )
