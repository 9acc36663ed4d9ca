"""The founding of organizations and the joining of members."""

from branchline.resource.v1.history_pb2 import ACTOR_KIND_USER, HistoryEvent
from branchline.resource.v1.organization_pb2 import ROLE_OWNER, Member, Organization, Role
from branchline.resource.v1.user_pb2 import User

from services.organization.ingest import TO_HISTORY
from services.organization.store import OrganizationStore
from services.runtime.database import Transaction
from services.runtime.errors import AlreadyExists
from services.runtime.service import Chassis
from services.runtime.spine.outbox import Mark

DEFAULT_IDLE_SECONDS = 1800
FIRST_TOKEN = "first token"  # noqa: S105 - its name
DEFAULT_SANDBOX_PROVIDER = "local"


async def found_organization(
    tx: Transaction, chassis: Chassis, store: OrganizationStore, organization: Organization, owner: User
) -> Member:
    """Store a new organization with its owner. Raise AlreadyExists if the slug is taken."""
    await refuse_taken_slug(tx, store, organization.slug)
    organization.id = chassis.clock.new_id("org")
    organization.create_time.CopyFrom(chassis.clock.timestamp())
    organization.settings.auto_import_repositories = True
    organization.settings.default_sandbox_provider = DEFAULT_SANDBOX_PROVIDER
    organization.settings.idle_timeout_seconds = DEFAULT_IDLE_SECONDS
    await store.save_organization(tx, organization)
    member = await join(tx, chassis, store, organization.id, owner, ROLE_OWNER)
    await record(tx, chassis, organization.id, "organization.created", owner.id, f"{organization.slug} created")
    return member


async def refuse_taken_slug(tx: Transaction, store: OrganizationStore, slug: str) -> None:
    """Raise AlreadyExists naming the organization that has the slug."""
    holder = await store.organization_by_slug(tx, slug)
    if holder is not None:
        raise AlreadyExists("organization", slug, f'the slug "{slug}" is taken', "SLUG_TAKEN")


async def join(
    tx: Transaction,
    chassis: Chassis,
    store: OrganizationStore,
    organization_id: str,
    user: User,
    role: Role.ValueType,
) -> Member:
    """Make a user a member. Raise AlreadyExists if the user is one."""
    if await store.member(tx, organization_id, user.id) is not None:
        raise AlreadyExists("member", user.id, f"{user.email or user.id} is a member", "ALREADY_MEMBER")
    member = Member(
        organization_id=organization_id,
        user_id=user.id,
        role=role,
        display_name=user.display_name,
        email=user.email,
        join_time=chassis.clock.timestamp(),
    )
    await store.save_member(tx, member)
    return member


async def record(
    tx: Transaction,
    chassis: Chassis,
    organization_id: str,
    kind: str,
    user_id: str,
    summary: str,
    repository_id: str = "",
) -> None:
    """Hand an event of the organization itself to history."""
    event = HistoryEvent(
        id=chassis.clock.new_id("evt"),
        organization_id=organization_id,
        event_time=chassis.clock.timestamp(),
        actor_kind=ACTOR_KIND_USER,
        actor_user_id=user_id,
        kind=kind,
        repository_id=repository_id,
        summary=summary,
    )
    await chassis.outbox.mark(tx, [Mark(event.id, 1, event, TO_HISTORY)])
