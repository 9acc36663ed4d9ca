"""Messages that wait until the agents of their task are free: in the order in which they will be sent.

What is done to them is written when their task is closed; see `open_task`.
"""

from collections.abc import Iterable, Mapping, Sequence

from branchline.v1.common_pb2 import ENTITY_KIND_QUEUED_MESSAGE, BlobReference
from branchline.v1.errors_pb2 import ERROR_REASON_QUOTA_EXCEEDED
from branchline.v1.sessions_pb2 import QueuedMessage
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import delete, select

from services.runtime.database import Reader, Statement, Tx, is_in
from services.runtime.errors import InvalidArgument, NotFound, ResourceExhausted
from services.runtime.prompts import check_prompt, with_blobs
from services.runtime.spine.resources import Resources
from services.runtime.updates import check_etag, etag_of, update
from services.task.open_task import OpenTask
from services.task.tables import queued_messages

MOST = 100
"""Most messages that wait in one task."""

MOST_BYTES = 4 * 1024 * 1024
"""Most that the messages of one task hold together: all are written anew when the first of them leaves."""

_SETTABLE = ("prompt", "place")
_TAGGED = ("prompt",)
"""An etag does not cover the place, which changes as the messages before it are sent."""

_WAITING = Statement(
    select(queued_messages.c.task_id, queued_messages.c.payload)
    .where(is_in(queued_messages.c.task_id, "ids"))
    .order_by(queued_messages.c.task_id, queued_messages.c.place)
)
_REMOVE = Statement(delete(queued_messages).where(is_in(queued_messages.c.id, "ids")))

QUEUED = Resources(
    queued_messages,
    QueuedMessage,
    ENTITY_KIND_QUEUED_MESSAGE,
    lambda message: {"id": message.id, "task_id": message.task_id, "place": message.place},
)


def waiting(tx: Reader, task_ids: Iterable[str]) -> Mapping[str, list[QueuedMessage]]:
    """Return what waits in each of the tasks, in order."""
    found: dict[str, list[QueuedMessage]] = {}
    for row in tx.rows(_WAITING, {"ids": sorted(task_ids)}):
        found.setdefault(row.task_id, []).append(QueuedMessage.FromString(row.payload))
    return found


def load(tx: Reader, tasks: Iterable[OpenTask]) -> None:
    """Read what waits in open tasks, once."""
    new = {task.task.id: task for task in tasks if task.queue is None}
    if not new:
        return
    found = waiting(tx, new)
    for task_id, task in new.items():
        task.queue = found.get(task_id, [])


def add(tx: Reader, task: OpenTask, message: QueuedMessage) -> None:
    """Let a message wait behind all others; one that interrupts, before those that do not. Raise ResourceExhausted."""
    queue = _of(tx, task)
    if len(queue) >= MOST:
        sentence = f"at most {MOST} messages wait in a task"
        raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, sentence, limit="queued_messages")
    _check_size([*queue, message])
    message.etag = etag_of(message, _TAGGED)
    others = (place for place, one in enumerate(queue) if message.interrupts and not one.interrupts)
    queue.insert(next(others, len(queue)), message)


def change(
    tx: Reader, task: OpenTask, given: QueuedMessage, mask: FieldMask, blobs: Iterable[BlobReference]
) -> QueuedMessage:
    """Change what a message says, or where it stands. Raise NotFound, Aborted or InvalidArgument."""
    queue = _of(tx, task)
    message = _find(queue, given.id)
    check_etag(message, given)
    place = message.place
    changed = update(message, given, mask, _SETTABLE, "queued_message")
    wanted, message.place = message.place, place
    if [path for path in changed if path != "place"]:
        check_prompt(message.prompt, "queued_message.prompt")
        message.prompt.CopyFrom(with_blobs(message.prompt, blobs))
        _check_size(queue)
        message.etag = etag_of(message, _TAGGED)
        task.edited.add(message.id)
    if "place" in changed:
        if wanted < 1:
            raise InvalidArgument("queued_message.place", "is counted from 1")
        queue.remove(message)
        queue.insert(wanted - 1, message)
    return message


def withdraw(tx: Reader, task: OpenTask, message_id: str) -> QueuedMessage:
    """Take a message back. Raise NotFound if it does not wait any more."""
    queue = _of(tx, task)
    message = _find(queue, message_id)
    _leave(task, [message])
    return message


def drop(tx: Reader, task: OpenTask, session_id: str = "") -> None:
    """Take back what will not be sent: messages to one session, or all."""
    _leave(task, [one for one in _of(tx, task) if session_id in ("", one.session_id)])


def take_first(task: OpenTask, session_ids: Iterable[str]) -> QueuedMessage | None:
    """Take the next message to any of these sessions, which is to be sent, out of what was loaded; None if none is."""
    sendable = set(session_ids)
    message = next((one for one in task.queue or [] if one.session_id in sendable), None)
    if message is not None:
        _leave(task, [message])
    return message


def write(tx: Tx, changed: Sequence[QueuedMessage], gone: Sequence[QueuedMessage]) -> None:
    """Write what was changed of tasks that are closed."""
    QUEUED.save(tx, changed)
    if gone:
        tx.change(_REMOVE, {"ids": [one.id for one in gone]})


def _of(tx: Reader, task: OpenTask) -> list[QueuedMessage]:
    load(tx, [task])
    assert task.queue is not None
    return task.queue


def _find(queue: Sequence[QueuedMessage], message_id: str) -> QueuedMessage:
    message = next((one for one in queue if one.id == message_id), None)
    if message is None:
        raise NotFound(ENTITY_KIND_QUEUED_MESSAGE, message_id)
    return message


def _leave(task: OpenTask, messages: Sequence[QueuedMessage]) -> None:
    for message in messages:
        assert task.queue is not None
        task.queue.remove(message)
        if message.revision:  # one that came in this transaction was never there
            task.unqueued.append(message)


def _check_size(queue: Sequence[QueuedMessage]) -> None:
    if sum(one.ByteSize() for one in queue) > MOST_BYTES:
        sentence = f"the messages that wait in a task hold at most {MOST_BYTES} bytes together"
        raise ResourceExhausted(ERROR_REASON_QUOTA_EXCEEDED, sentence, limit="queued_message_bytes")
