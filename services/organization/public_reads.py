"""The public reads of the sidebar, the feed and the caller."""

from collections.abc import Iterable

from branchline.v1 import (
    history_pb2,
    history_pb2_grpc,
    tasks_pb2,
    tasks_pb2_grpc,
    users_pb2,
    users_pb2_grpc,
)
from branchline.v1.vocabulary_pb2 import EventKind

from services.organization.feed import FeedFilter
from services.organization.members import MEMBERSHIPS_OF
from services.organization.people import USERS
from services.organization.reading import Context, Reading
from services.organization.tasks import BY_CREATE_TIME, BY_TITLE, BY_UPDATE_TIME, TaskFilter
from services.runtime.clock import column_seconds
from services.runtime.database import Reader
from services.runtime.errors import InvalidArgument
from services.runtime.principal import current_principal
from services.runtime.spine.tokens import parse_page_token

_PAGE_TASKS = 50
_PAGE_EVENTS = 100
_ORDERS = {
    tasks_pb2.TASK_SORT_UNSPECIFIED: BY_UPDATE_TIME,
    tasks_pb2.TASK_SORT_CREATE_TIME: BY_CREATE_TIME,
    tasks_pb2.TASK_SORT_TITLE: BY_TITLE,
}


class PublicTaskReader(Reading, tasks_pb2_grpc.TaskServiceServicer):
    """The sidebar."""

    async def ListTasks(self, request: tasks_pb2.ListTasksRequest, context: Context) -> tasks_pb2.ListTasksResponse:
        """List the tasks of all repositories."""
        await self.caught_up(request.consistency_token, request.organization_id, context)
        order = _ORDERS[request.sort]
        wanted = TaskFilter(
            organization_id=request.organization_id,
            repository_id=request.repository_id,
            owner_user_id=request.owner_user_id,
            has_pull_request=request.has_pull_request if request.HasField("has_pull_request") else None,
            text=request.query,
            statuses=tuple(request.statuses),
        )
        after = parse_page_token(request, request.page_token, order.cursor, str)
        most = request.page_size or _PAGE_TASKS
        page = await self.database.read(self.stores.tasks.page, wanted, order, after, most)
        return tasks_pb2.ListTasksResponse(tasks=page.found, next_page_token=page.next_token(request))


class PublicHistoryReader(Reading, history_pb2_grpc.HistoryServiceServicer):
    """The feed."""

    async def ListHistory(
        self, request: history_pb2.ListHistoryRequest, context: Context
    ) -> history_pb2.ListHistoryResponse:
        """List events."""
        wanted = FeedFilter(
            organization_id=request.organization_id,
            repository_id=request.repository_id,
            task_id=request.task_id,
            branch=request.branch,
            actor_user_id=request.user_id,
            kinds=tuple(_kinds(request.kinds)),
            since=column_seconds(request.start_time) if request.HasField("start_time") else None,
            before=column_seconds(request.end_time) if request.HasField("end_time") else None,
            oldest_first=request.oldest_first,
        )
        place = parse_page_token(request, request.page_token, int)
        after = int(place[0]) if place else None
        page = await self.database.read(self.stores.feed.page, wanted, after, request.page_size or _PAGE_EVENTS)
        return history_pb2.ListHistoryResponse(events=page.found, next_page_token=page.next_token(request))


class PublicUserReader(Reading, users_pb2_grpc.UserServiceServicer):
    """What is read of the caller."""

    async def WhoAmI(self, request: users_pb2.WhoAmIRequest, context: Context) -> users_pb2.WhoAmIResponse:
        """Say who the caller is."""
        return await self.database.read(_who, current_principal().user_id)

    async def ListApiTokens(
        self, request: users_pb2.ListApiTokensRequest, context: Context
    ) -> users_pb2.ListApiTokensResponse:
        """List the caller's tokens."""
        tokens = await self.database.read(self.stores.people.tokens_of, current_principal().user_id)
        return users_pb2.ListApiTokensResponse(api_tokens=tokens)


def _who(tx: Reader, user_id: str) -> users_pb2.WhoAmIResponse:
    return users_pb2.WhoAmIResponse(user=USERS.get(tx, user_id), memberships=MEMBERSHIPS_OF(tx, user_id=user_id))


def _kinds(names: Iterable[str]) -> Iterable[EventKind.ValueType]:
    """Read kinds of events such as "task.created" or "EVENT_KIND_TASK_CREATED"."""
    for name in names:
        word = name.removeprefix("EVENT_KIND_").replace(".", "_").upper()
        try:
            yield EventKind.Value(f"EVENT_KIND_{word}")
        except ValueError as error:
            raise InvalidArgument("kinds", f'there is no kind "{name}"') from error
