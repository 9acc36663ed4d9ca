"""What of a replica's changes a watcher sees: by viewer, by session, by a filter of tasks."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from branchline.v1.common_pb2 import ENTITY_KIND_TASK, ENTITY_KIND_TRANSCRIPT_ENTRY
from branchline.v1.history_pb2 import HistoryEvent, HistoryFilter
from branchline.v1.tasks_pb2 import TaskFilter, TaskSummary
from branchline.v1.watches_pb2 import CHANGE_TYPE_REMOVED, CHANGE_TYPE_UPSERTED
from branchline_internal.spine.v1.push_pb2 import WatchChange
from cachetools import LRUCache, cached

from services.runtime.sidebar import folded, has_pull_request, search_text
from services.runtime.states import ENDED

_READ_AT_ONCE = 4096


def _version(change: WatchChange) -> tuple[str, int]:
    return change.id, change.revision


@dataclass(slots=True)
class OrganizationView:
    """What one watcher of an organization sees.

    A task that does not match is shown as removed, if it was shown before or may have been by an earlier watch.
    """

    viewer_id: str
    kinds: Collection[int]
    matches: Callable[[WatchChange], bool]
    resumed: bool
    _shown: dict[str, bool] = field(default_factory=dict[str, bool])
    """Whether a task is shown; of others nothing is known but whether an earlier watch may have shown them."""

    def start_over(self) -> None:
        """Forget what was shown: a snapshot follows."""
        self.resumed = False
        self._shown.clear()

    def see(self, change: WatchChange) -> WatchChange | None:
        """Return a change as the watcher sees it."""
        if change.viewer_id not in ("", self.viewer_id) or (self.kinds and change.kind not in self.kinds):
            return None
        if change.kind != ENTITY_KIND_TASK:
            return change
        if change.type == CHANGE_TYPE_UPSERTED and self.matches(change):
            self._shown[change.id] = True
            return change
        if not self._shown.get(change.id, self.resumed):
            return None
        self._shown[change.id] = False
        return change if change.type != CHANGE_TYPE_UPSERTED else _removed(change)


@dataclass(frozen=True, slots=True)
class TaskView:
    """What one watcher of a task sees: all of it, and the transcripts of the sessions that were chosen."""

    session_ids: Collection[str]

    def start_over(self) -> None:
        """Nothing is remembered."""

    def see(self, change: WatchChange) -> WatchChange | None:
        """Return a change as the watcher sees it."""
        other = change.kind == ENTITY_KIND_TRANSCRIPT_ENTRY and change.session_id not in self.session_ids
        return None if self.session_ids and other else change


@dataclass(frozen=True, slots=True)
class HistoryView:
    """What one watcher of a feed sees: all of it, or some of its events."""

    matches: Callable[[WatchChange], bool]

    def start_over(self) -> None:
        """Nothing is remembered."""

    def see(self, change: WatchChange) -> WatchChange | None:
        """Return a change as the watcher sees it."""
        return change if change.type != CHANGE_TYPE_UPSERTED or self.matches(change) else None


def task_matcher(wanted: TaskFilter) -> Callable[[WatchChange], bool]:
    """Return what says whether a task is meant: as ListTasks would choose it. Only some filters need to read it."""
    if wanted == TaskFilter(include_ended=wanted.include_ended):
        return lambda change: wanted.include_ended or not change.hidden
    repositories, owners = frozenset(wanted.repository_ids), frozenset(wanted.owner_user_ids)
    states, activities = frozenset(wanted.states), frozenset(wanted.activities)
    words = folded(wanted.query)

    def matches(change: WatchChange) -> bool:
        task = _summary(change)
        if states:
            if task.state not in states:
                return False
        elif not wanted.include_ended and task.state in ENDED:
            return False
        return (
            (not repositories or task.repository_id in repositories)
            and (not owners or task.owner_user_id in owners)
            and (not activities or task.activity in activities)
            and (not wanted.HasField("has_pull_request") or wanted.has_pull_request == has_pull_request(task))
            and (not words or words in search_text(task))
        )

    return matches


def event_matcher(wanted: HistoryFilter) -> Callable[[WatchChange], bool]:
    """Return what says whether an event is meant: as ListHistoryEvents would choose it."""
    repositories, tasks, branches = map(frozenset, (wanted.repository_ids, wanted.task_ids, wanted.branches))
    users, kinds = frozenset(wanted.user_ids), frozenset(wanted.kinds)
    begin = wanted.start_time.ToNanoseconds() if wanted.HasField("start_time") else None
    end = wanted.end_time.ToNanoseconds() if wanted.HasField("end_time") else None

    by_task_alone = wanted == HistoryFilter(task_ids=wanted.task_ids)

    def matches(change: WatchChange) -> bool:
        if by_task_alone or (tasks and change.task_id not in tasks):  # then it need not be read
            return not tasks or change.task_id in tasks
        event = _event(change)
        time = event.event_time.ToNanoseconds()
        return (
            (not repositories or event.repository_id in repositories)
            and (not branches or event.branch in branches)
            and (not users or (event.actor.user_id or event.actor.on_behalf_of_user_id) in users)
            and (not kinds or event.kind in kinds)
            and (begin is None or begin <= time)
            and (end is None or time < end)
        )

    return matches


@cached(LRUCache(_READ_AT_ONCE), key=_version)
def _summary(change: WatchChange) -> TaskSummary:
    """Read a task to compare it with filters; once for all who watch it."""
    return TaskSummary.FromString(change.entity)


@cached(LRUCache(_READ_AT_ONCE), key=_version)
def _event(change: WatchChange) -> HistoryEvent:
    return HistoryEvent.FromString(change.entity)


def _removed(change: WatchChange) -> WatchChange:
    return WatchChange(
        kind=change.kind,
        id=change.id,
        revision=change.revision,
        change_seq=change.change_seq,
        type=CHANGE_TYPE_REMOVED,
        entity=TaskSummary(id=change.id).SerializeToString(),
        task_id=change.task_id,
    )
