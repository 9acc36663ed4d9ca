"""The public reads of the sidebar, the feed and the caller."""

from branchline.v1 import (
    agents_pb2,
    agents_pb2_grpc,
    history_pb2,
    history_pb2_grpc,
    secrets_pb2,
    secrets_pb2_grpc,
    sessions_pb2,
    sessions_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
    users_pb2,
    users_pb2_grpc,
)
from branchline.v1.common_pb2 import ENTITY_KIND_TASK
from branchline.v1.organizations_pb2 import WatchOrganizationRequest
from branchline.v1.roles_pb2 import Role
from branchline.v1.transcripts_pb2 import INPUT_REQUEST_STATE_PENDING
from branchline.v1.users_pb2 import Membership

from services.organization.asking import INPUT_REQUESTS, INPUT_REQUESTS_OF_TASKS
from services.organization.catalogue import AGENTS
from services.organization.members import MEMBERSHIPS_OF
from services.organization.organizations import ORGANIZATIONS
from services.organization.people import SECRETS, TOKENS, USERS
from services.organization.reading import Context, Reading
from services.organization.tasks import BY_CREATE_TIME, BY_TITLE, BY_UPDATE_TIME
from services.runtime.database import Reader
from services.runtime.principal import Principal, current_principal
from services.runtime.spine.pages import order, page_size
from services.runtime.spine.tokens import (
    history_topic,
    organization_topic,
    parse_page_token,
    resume_token,
    selection_of,
)

_ORDERS = {"update_time desc": BY_UPDATE_TIME, "create_time desc": BY_CREATE_TIME, "title": BY_TITLE}
_FEED_ORDERS = {"sequence desc": False, "sequence": True}


class PublicTaskReader(Reading, tasks_pb2_grpc.TaskServiceServicer):
    """The sidebar."""

    async def ListTasks(self, request: tasks_pb2.ListTasksRequest, context: Context) -> tasks_pb2.ListTasksResponse:
        """List the tasks of all repositories."""
        await self.caught_up(request.consistency, request.organization_id, context)
        return await self.database.read(self._list, request, current_principal().user_id)

    def _list(self, tx: Reader, request: tasks_pb2.ListTasksRequest, user_id: str) -> tasks_pb2.ListTasksResponse:
        scope = request.organization_id
        by = order(request.order_by, _ORDERS, "update_time desc")
        after = parse_page_token(request, request.page_token, by.cursor, str)
        resume = "" if request.page_token else self._resume_token(tx, request, user_id)
        most = page_size(request.page_size)
        page = self.stores.tasks.page(tx, scope, request.filter, by, after, most)
        return tasks_pb2.ListTasksResponse(
            tasks=page.found, next_page_token=page.next_token(request), resume_token=resume
        )

    def _resume_token(self, tx: Reader, request: tasks_pb2.ListTasksRequest, user_id: str) -> str:
        """Return where a watch of the same tasks goes on."""
        watched = WatchOrganizationRequest(organization_id=request.organization_id, kinds=[ENTITY_KIND_TASK])
        if request.HasField("filter"):
            watched.tasks.CopyFrom(request.filter)
        topic = f"{organization_topic(request.organization_id)}/{user_id}"
        present = self.stores.index.present(tx, request.organization_id)
        return resume_token(topic, present, selection_of(watched))


class PublicHistoryReader(Reading, history_pb2_grpc.HistoryServiceServicer):
    """The feed."""

    async def ListHistoryEvents(
        self, request: history_pb2.ListHistoryEventsRequest, context: Context
    ) -> history_pb2.ListHistoryEventsResponse:
        """List events."""
        await self.caught_up(request.consistency, request.organization_id, context)
        oldest_first = order(request.order_by, _FEED_ORDERS, "sequence desc")
        place = parse_page_token(request, request.page_token, int)
        return await self.database.read(self._list, request, int(place[0]) if place else None, oldest_first)

    def _list(
        self, tx: Reader, request: history_pb2.ListHistoryEventsRequest, after: int | None, oldest_first: bool
    ) -> history_pb2.ListHistoryEventsResponse:
        resume = "" if request.page_token else self._resume_token(tx, request)
        most = page_size(request.page_size)
        page = self.stores.feed.page(
            tx, request.organization_id, request.filter, after, most, oldest_first=oldest_first
        )
        return history_pb2.ListHistoryEventsResponse(
            events=page.found, next_page_token=page.next_token(request), resume_token=resume
        )

    def _resume_token(self, tx: Reader, request: history_pb2.ListHistoryEventsRequest) -> str:
        """Return where a watch of the same events goes on."""
        watched = history_pb2.WatchHistoryRequest(organization_id=request.organization_id)
        if request.HasField("filter"):
            watched.filter.CopyFrom(request.filter)
        topic = f"{history_topic(request.organization_id)}/"
        return resume_token(topic, self.stores.index.present(tx, request.organization_id), selection_of(watched))


class PublicSessionReader(Reading, sessions_pb2_grpc.SessionServiceServicer):
    """What waits for people."""

    async def ListInputRequests(
        self, request: sessions_pb2.ListInputRequestsRequest, context: Context
    ) -> sessions_pb2.ListInputRequestsResponse:
        """List what agents ask, oldest first."""
        await self.caught_up(request.consistency, request.organization_id, context)
        listing = INPUT_REQUESTS_OF_TASKS if request.task_ids else INPUT_REQUESTS
        given = {
            "of": request.organization_id,
            "tasks": list(request.task_ids),
            "states": list(request.states) or [INPUT_REQUEST_STATE_PENDING],
        }
        after = listing.after(request, request.page_token)
        page = await self.database.read(listing.page, given, after, request.page_size)
        return sessions_pb2.ListInputRequestsResponse(
            input_requests=page.found, next_page_token=page.next_token(request)
        )


class PublicAgentReader(Reading, agents_pb2_grpc.AgentServiceServicer):
    """The catalogue of agents."""

    async def ListAgents(
        self, request: agents_pb2.ListAgentsRequest, context: Context
    ) -> agents_pb2.ListAgentsResponse:
        """List the agents, by id."""
        await self.caught_up(request.consistency, request.organization_id, context)
        after = AGENTS.after(request, request.page_token)
        page = await self.database.read(AGENTS.page, {"of": request.organization_id}, after, request.page_size)
        return agents_pb2.ListAgentsResponse(agents=page.found, next_page_token=page.next_token(request))


class PublicSecretReader(Reading, secrets_pb2_grpc.SecretServiceServicer):
    """The caller's secrets."""

    async def ListSecrets(
        self, request: secrets_pb2.ListSecretsRequest, context: Context
    ) -> secrets_pb2.ListSecretsResponse:
        """List the caller's secrets, without their values."""
        await self.caught_up(request.consistency, "", context)
        after = SECRETS.after(request, request.page_token)
        given = {"user": current_principal().user_id}
        page = await self.database.read(SECRETS.page, given, after, request.page_size)
        return secrets_pb2.ListSecretsResponse(secrets=page.found, next_page_token=page.next_token(request))


class PublicUserReader(Reading, users_pb2_grpc.UserServiceServicer):
    """What is read of the caller."""

    async def GetCurrentUser(
        self, request: users_pb2.GetCurrentUserRequest, context: Context
    ) -> users_pb2.GetCurrentUserResponse:
        """Say who the caller is."""
        await self.caught_up(request.consistency, "", context)
        return await self.database.read(_who, current_principal())

    async def ListApiTokens(
        self, request: users_pb2.ListApiTokensRequest, context: Context
    ) -> users_pb2.ListApiTokensResponse:
        """List the caller's tokens."""
        await self.caught_up(request.consistency, "", context)
        after = TOKENS.after(request, request.page_token)
        given = {"user": current_principal().user_id}
        page = await self.database.read(TOKENS.page, given, after, request.page_size)
        return users_pb2.ListApiTokensResponse(api_tokens=page.found, next_page_token=page.next_token(request))

    async def GetDraft(self, request: users_pb2.GetDraftRequest, context: Context) -> users_pb2.GetDraftResponse:
        """Give what the caller has half written."""
        await self.caught_up(request.consistency, "", context)
        find = self.stores.drafts.of
        draft = await self.database.read(find, current_principal().user_id, request.task_id, request.session_id)
        return users_pb2.GetDraftResponse(draft=draft)


def _who(tx: Reader, principal: Principal) -> users_pb2.GetCurrentUserResponse:
    memberships = MEMBERSHIPS_OF(tx, user_id=principal.user_id)
    known = {one.id: one for one in ORGANIZATIONS.find_many(tx, [member.organization_id for member in memberships])}
    return users_pb2.GetCurrentUserResponse(
        user=USERS.get(tx, principal.user_id),
        memberships=[
            Membership(
                organization_id=member.organization_id,
                organization_slug=known[member.organization_id].slug,
                organization_display_name=known[member.organization_id].display_name,
                role=Role.ValueType(role),
            )
            for member in memberships
            if member.organization_id in known and (role := principal.role_in(member.organization_id, member.role))
        ],
    )
