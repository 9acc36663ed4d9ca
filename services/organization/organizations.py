"""Organizations: founded, changed, bound to GitHub, and deleted. What is being deleted takes no commands."""

import re
from dataclasses import dataclass

from branchline.v1.common_pb2 import ENTITY_KIND_ORGANIZATION
from branchline.v1.errors_pb2 import (
    ERROR_REASON_BEING_DELETED,
    ERROR_REASON_GITHUB_LOGIN_TAKEN,
    ERROR_REASON_SLUG_TAKEN,
)
from branchline.v1.history_pb2 import (
    EVENT_KIND_ORGANIZATION_CREATED,
    EVENT_KIND_ORGANIZATION_DELETING,
    EVENT_KIND_ORGANIZATION_UPDATED,
)
from branchline.v1.organizations_pb2 import Organization
from branchline.v1.roles_pb2 import ROLE_OWNER, ROLE_UNSPECIFIED, Role
from branchline.v1.users_pb2 import User
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import bindparam, select

from services.organization.feed import Feed
from services.organization.members import Members
from services.organization.tables import organizations
from services.runtime.clock import Clock
from services.runtime.database import Reader, Statement, Tx
from services.runtime.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from services.runtime.principal import current_principal
from services.runtime.spine.index import Entry, Index
from services.runtime.spine.resources import Held
from services.runtime.updates import check_etag, etag_of, update

DEFAULT_IDLE_SECONDS = 1800
ORGANIZATION_BYTES = 4 * 1024
"""Most that an organization's own state may take: every watch of it carries it, and the list of a person's own."""

SETTABLE = ("display_name", "slug", "settings")
"""What is changed of an organization."""

_SLUG = re.compile(r"[a-z0-9]([a-z0-9-]{0,37}[a-z0-9])?")
_NAME_LENGTH = 128

ORGANIZATIONS = Held(organizations, Organization, ENTITY_KIND_ORGANIZATION)
_OF_SLUG = ORGANIZATIONS.by("slug")
_OF_LOGIN = ORGANIZATIONS.by("github_login")
_TAKE_TURN = Statement(
    select(organizations.c.id).where(organizations.c.id == bindparam("organization")).with_for_update()
)


@dataclass(frozen=True, slots=True)
class Organizations:
    """All organizations of the installation."""

    index: Index
    members: Members
    feed: Feed
    clock: Clock

    def open(self, tx: Tx, organization_id: str, role: Role.ValueType = ROLE_UNSPECIFIED) -> Organization:
        """Return an organization for a command of the caller. Commands on one organization take turns.

        Raise what `check_open` does.
        """
        self.take_turn(tx, organization_id)
        return self.check_open(tx, organization_id, role)

    def take_turn(self, tx: Tx, organization_id: str) -> None:
        """Wait for other commands on an organization."""
        tx.row(_TAKE_TURN, {"organization": organization_id})

    def check_open(self, tx: Reader, organization_id: str, role: Role.ValueType) -> Organization:
        """Return an organization that takes commands.

        Raise NotFound if the caller may not know of it, PermissionDenied without the role, FailedPrecondition if it is
        being deleted.
        """
        principal = current_principal()
        if not principal.sees(organization_id):
            raise NotFound(ENTITY_KIND_ORGANIZATION, organization_id)
        principal.require(role)
        organization = ORGANIZATIONS.get(tx, organization_id)
        if organization.HasField("delete_time"):
            raise FailedPrecondition(ERROR_REASON_BEING_DELETED, f"{organization.slug} is being deleted")
        return organization

    def of_slug(self, tx: Reader, slug: str) -> Organization | None:
        """Return the organization with a slug, or None."""
        return next(iter(_OF_SLUG(tx, slug=slug)), None)

    def found(self, tx: Tx, organization: Organization, owner: User) -> None:
        """Store a new organization with its owner. Raise AlreadyExists if the slug is taken."""
        self._refuse_taken_slug(tx, organization.slug)
        organization.id = self.clock.new_id("org")
        organization.create_time.CopyFrom(self.clock.timestamp())
        organization.settings.auto_import_repositories = True
        organization.settings.idle_timeout.FromSeconds(DEFAULT_IDLE_SECONDS)
        self._save(tx, organization)
        self.members.join(tx, organization.id, owner, ROLE_OWNER)
        self.feed.record(tx, organization.id, EVENT_KIND_ORGANIZATION_CREATED, f"{organization.slug} created")

    def update(self, tx: Tx, organization: Organization, given: Organization, mask: FieldMask) -> None:
        """Take the fields that the mask names."""
        slug = organization.slug
        check_etag(organization, given)
        changed = update(organization, given, mask, SETTABLE, "organization")
        if not changed:
            return
        if organization.slug != slug:
            self._refuse_taken_slug(tx, organization.slug)
        check_profile(organization)
        self._save(tx, organization)
        self.feed.record(tx, organization.id, EVENT_KIND_ORGANIZATION_UPDATED, ", ".join(changed))

    def bind_login(self, tx: Tx, slug: str, login: str) -> Organization:
        """Bind a GitHub login, or with an empty one unbind it. Raise AlreadyExists if it is another's."""
        found = self.of_slug(tx, slug)
        if found is None:
            raise NotFound(ENTITY_KIND_ORGANIZATION, slug)
        organization = self.open(tx, found.id)
        holder = next(iter(_OF_LOGIN(tx, github_login=login.lower())), None) if login else None
        if holder is not None and holder.id != organization.id:
            sentence = f'the GitHub login "{login}" is bound to another organization'
            raise AlreadyExists(ENTITY_KIND_ORGANIZATION, holder.slug, sentence, ERROR_REASON_GITHUB_LOGIN_TAKEN)
        if organization.github_login != login:
            organization.github_login = login
            self._save(tx, organization)
            self.feed.record(tx, organization.id, EVENT_KIND_ORGANIZATION_UPDATED, "github_login")
        return organization

    def begin_deletion(self, tx: Tx, organization: Organization) -> None:
        """Close an organization for all commands; what is in it is torn down from now on."""
        organization.delete_time.CopyFrom(self.clock.timestamp())
        self._save(tx, organization)
        words = f"{organization.slug} is being deleted"
        self.feed.record(tx, organization.id, EVENT_KIND_ORGANIZATION_DELETING, words)

    def end(self, tx: Tx, organization: Organization) -> None:
        """Put a tombstone in the place of an organization; its slug and its GitHub login are free."""
        self._save(tx, organization, deleted=True)

    def _save(self, tx: Tx, organization: Organization, *, deleted: bool = False) -> None:
        organization.revision += 1
        organization.etag = etag_of(organization, SETTABLE)
        columns = {
            "slug": organization.slug,
            "github_login": organization.github_login.lower(),
            "deleting": organization.HasField("delete_time") and not deleted,
        }
        entry = Entry(
            ENTITY_KIND_ORGANIZATION,
            organization.id,
            organization.id,
            organization.revision,
            organization,
            deleted=deleted,
            columns=columns,
        )
        self.index.put(tx, entry)

    def _refuse_taken_slug(self, tx: Reader, slug: str) -> None:
        if self.of_slug(tx, slug) is not None:
            sentence = f'the slug "{slug}" is taken'
            raise AlreadyExists(ENTITY_KIND_ORGANIZATION, slug, sentence, ERROR_REASON_SLUG_TAKEN, slug=slug)


def check_profile(organization: Organization) -> None:
    """Raise InvalidArgument unless names and settings are such as an organization may have."""
    if not _SLUG.fullmatch(organization.slug):
        raise InvalidArgument("organization.slug", "must be 1 to 39 lower case letters, digits and inner hyphens")
    if not 1 <= len(organization.display_name) <= _NAME_LENGTH:
        raise InvalidArgument("organization.display_name", f"must have 1 to {_NAME_LENGTH} characters")
    if organization.ByteSize() > ORGANIZATION_BYTES:
        raise InvalidArgument("organization.settings", f"must not take more than {ORGANIZATION_BYTES} bytes")
