"""How what the organization's children push becomes rows: index rows, and work handed to other children."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.v1.history_pb2 import (
    EVENT_KIND_AGENT_ASKED,
    EVENT_KIND_AGENT_FAILED,
    EVENT_KIND_AGENT_FINISHED,
    EVENT_KIND_TASK_FAILED,
    HistoryEvent,
)
from branchline.v1.organizations_pb2 import GithubStatus
from branchline.v1.repositories_pb2 import Repository
from branchline.v1.secrets_pb2 import Secret
from branchline.v1.tasks_pb2 import TaskSummary
from branchline.v1.transcripts_pb2 import InputRequest
from branchline.v1.users_pb2 import User, UserTaskState
from branchline_internal.github_data.v1.github_data_pb2 import GithubRepository
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport
from branchline_internal.user.v1.user_pb2 import ApiTokenState, DraftState, MarkUnreadRequest

from services.organization.destinations import TO_USER
from services.organization.stores import Stores
from services.runtime.database import Database, Tx
from services.runtime.spine.ingest import Handler, Ingest, Pushed, each
from services.runtime.spine.outbox import Mark, Outbox

NEWSWORTHY = frozenset(
    {EVENT_KIND_AGENT_FINISHED, EVENT_KIND_AGENT_FAILED, EVENT_KIND_AGENT_ASKED, EVENT_KIND_TASK_FAILED}
)
"""Events that make a task unread for its organization's members."""


@dataclass(frozen=True, slots=True)
class OrganizationIngest:
    """Handlers for everything that arrives at the root."""

    outbox: Outbox
    stores: Stores

    def ingest(self, database: Database) -> Ingest:
        """Return the ingest with all handlers. Tasks come before repositories: those that are gone go first."""
        stores = self.stores
        return Ingest(
            database,
            Handler(User, stores.people.take_users),
            Handler(ApiTokenState, stores.people.take_tokens),
            Handler(TaskSummary, stores.tasks.take),
            Handler(Repository, self.repositories),
            Handler(GithubRepository, each(stores.github.take_repository)),
            Handler(GithubStatus, stores.github.take_statuses),
            Handler(HistoryEvent, self.events),
            Handler(Secret, stores.people.take_secrets),
            Handler(DraftState, stores.drafts.take),
            Handler(InputRequest, stores.input_requests.take),
            Handler(AgentReport, stores.catalogue.take),
            Handler(UserTaskState, stores.task_states.take),
        )

    def repositories(self, tx: Tx, pushed: Sequence[Pushed[Repository]]) -> None:
        """Index repositories. One that is gone may be what the end of its organization waits for."""
        for organization_id in sorted(self.stores.repositories.take(tx, pushed)):
            self.stores.teardown.advance(tx, organization_id)

    def events(self, tx: Tx, pushed: Sequence[Pushed[HistoryEvent]]) -> None:
        """Take events into the feed, and have the members told of what is news."""
        new = self.stores.feed.take(tx, [one.state for one in pushed])
        news = [event for event in new if event.kind in NEWSWORTHY]
        if not news:
            return
        readers = self.stores.members.user_ids(tx, {event.organization_id for event in news})
        marks = [
            Mark(
                event.id,
                1,
                MarkUnreadRequest(
                    organization_id=event.organization_id,
                    user_ids=readers.get(event.organization_id, []),
                    task_id=event.task_id,
                    session_id=event.session_id,
                    event_id=event.id,
                ),
                TO_USER,
            )
            for event in news
        ]
        self.outbox.mark(tx, marks)
