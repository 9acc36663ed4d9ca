"""Messages that wait: their places, what can be done to them, and how they leave."""

from typing import Any

import pytest
from branchline.v1 import sessions_pb2
from branchline.v1.common_pb2 import Attachment, BlobReference, Consistency, FileExcerpt, Prompt
from branchline.v1.sessions_pb2 import QueuedMessage
from branchline.v1.transcripts_pb2 import TranscriptEntry
from branchline_internal.sandbox.v1.sandbox_pb2 import CancelTurnRequest, StartTurnRequest
from google.protobuf.field_mask_pb2 import FieldMask

from services.runtime.errors import DomainError
from services.runtime.spine.outbox import COORDINATOR
from services.runtime.spine.tokens import parse_consistency
from services.task import message_queue
from services.task.open_task import OpenTask
from tests.unit.task.room import Room, request_id
from tests.unit.task.test_open_task import message
from tests.unit.task.test_turns import broke, ended, queue, send


async def working(room: Room, *texts: str) -> tuple[OpenTask, list[QueuedMessage]]:
    """Return a task whose agent works, with messages that wait."""
    task = await room.task()
    await send(room, task)
    return task, [await queue(room, task, text=text) for text in texts]


async def texts(room: Room, task: OpenTask) -> list[str]:
    found = await room.queued(task.task.id)
    assert [one.place for one in found] == list(range(1, len(found) + 1))
    return [one.prompt.text for one in found]


async def change(
    room: Room, held: QueuedMessage, *paths: str, etag: str = "", blobs: Any = (), **fields: Any
) -> QueuedMessage:
    given = QueuedMessage(id=held.id, task_id=held.task_id, etag=etag, **fields)
    request = sessions_pb2.UpdateQueuedMessageRequest(
        request_id=request_id(), queued_message=given, update_mask=FieldMask(paths=paths)
    )
    answer = await room.database.write(room.sessions.change_queued, request, blobs)
    assert answer.consistency_token
    return answer.queued_message


async def refusal(call: Any) -> str:
    with pytest.raises(DomainError) as refused:
        await call
    return refused.value.reason


async def test_messages_wait_in_their_order_with_places_from_1_and_are_no_entries_yet(room: Room) -> None:
    task, waiting = await working(room, "a", "b")

    assert [(one.place, one.revision, one.author.user_id) for one in waiting] == [(1, 1, "usr_ann"), (2, 1, "usr_ann")]
    assert all(one.id.startswith("msg_") and one.etag and one.HasField("create_time") for one in waiting)
    assert await texts(room, task) == ["a", "b"]
    assert [one.user_message.text for one in await room.marks(TranscriptEntry)] == ["go on"]
    assert await room.marks(QueuedMessage, COORDINATOR) == waiting


async def test_a_message_that_is_sent_leaves_the_queue_and_the_others_move_up(room: Room) -> None:
    task, waiting = await working(room, "a", "b", "c")

    await room.push(ended(task))

    assert await texts(room, task) == ["b", "c"]
    left = {one.id: one for one in await room.marks(QueuedMessage)}
    assert [(left[one.id].place, left[one.id].revision) for one in waiting] == [(1, 2), (1, 2), (2, 2)]
    assert [left[one.id].etag for one in waiting] == [one.etag for one in waiting]
    entry = [one for one in await room.marks(TranscriptEntry) if one.user_message.text == "a"]
    assert [(one.position, one.turn, one.actor.user_id) for one in entry] == [(2, 2, "usr_ann")]
    assert await refusal(change(room, waiting[0], place=1)) == "RESOURCE_NOT_FOUND"


async def test_a_message_that_interrupts_cancels_the_turn_and_is_sent_next(room: Room) -> None:
    task, _ = await working(room, "a")
    request = message(task, text="stop", when_busy=sessions_pb2.WHEN_BUSY_INTERRUPT)

    answer = await room.database.write(room.sessions.send, request)

    assert answer.queued_message.place == 1
    assert await texts(room, task) == ["stop", "a"]
    assert [one.turn for one in await room.marks(CancelTurnRequest)] == [1]
    assert "TURN_CANCELLED" in await room.events(task.task.id)
    await room.push(ended(task))
    assert [one.prompt.text for one in await room.marks(StartTurnRequest)][-1] == "stop"
    assert await texts(room, task) == ["a"]


async def test_messages_that_interrupt_are_sent_in_the_order_in_which_they_came(room: Room) -> None:
    task, _ = await working(room, "a")
    for said in ("1", "2", "3"):
        request = message(task, text=said, when_busy=sessions_pb2.WHEN_BUSY_INTERRUPT)
        await room.database.write(room.sessions.send, request)
    assert await texts(room, task) == ["1", "2", "3", "a"]
    assert [one.interrupts for one in await room.queued(task.task.id)] == [True, True, True, False]


async def test_a_message_that_would_interrupt_an_agent_at_rest_is_sent_at_once(room: Room) -> None:
    task = await room.task()
    request = message(task, when_busy=sessions_pb2.WHEN_BUSY_INTERRUPT)

    answer = await room.database.write(room.sessions.send, request)

    assert answer.HasField("entry")
    assert not await room.marks(CancelTurnRequest)


async def test_a_turn_that_fails_leaves_what_waits_until_somebody_goes_on(room: Room) -> None:
    task, _ = await working(room, "a")

    await room.push(broke(task))
    assert await texts(room, task) == ["a"]
    await send(room, task, text="on")
    await room.push(ended(task, turn=2, revision=2))

    assert await texts(room, task) == []
    assert [one.prompt.text for one in await room.marks(StartTurnRequest)][-1] == "a"


async def test_a_message_is_edited_and_only_that_changes_its_etag(room: Room) -> None:
    _, (held, other) = await working(room, "a", "b")

    edited = await change(room, held, "prompt", etag=held.etag, prompt=Prompt(text="z"))

    assert (edited.prompt.text, edited.place, edited.revision) == ("z", 1, 2)
    assert edited.etag != held.etag
    assert await refusal(change(room, held, etag=held.etag, prompt=Prompt(text="y"))) == "ETAG_MISMATCH"
    moved = await change(room, other, place=1)
    assert moved.etag == other.etag


async def test_an_edit_that_says_nothing_new_changes_nothing(room: Room) -> None:
    task, (held,) = await working(room, "a")

    same = await change(room, held, prompt=Prompt(text="a"))

    assert same == held
    assert await room.queued(task.task.id) == [held]


@pytest.mark.parametrize(("place", "order"), [(1, "cab"), (2, "acb"), (3, "abc"), (99, "abc")])
async def test_a_message_is_moved_and_the_others_make_room(room: Room, place: int, order: str) -> None:
    task, waiting = await working(room, "a", "b", "c")

    moved = await change(room, waiting[2], place=place)

    assert "".join(await texts(room, task)) == order
    assert moved.place == order.index("c") + 1


@pytest.mark.parametrize(
    ("paths", "fields", "field"),
    [
        (["place"], {"place": 0}, "queued_message.place"),
        (["place"], {"place": -1}, "queued_message.place"),
        (["prompt"], {"prompt": Prompt(text=" ")}, "queued_message.prompt.text"),
        (["author"], {}, "update_mask"),
        ([], {}, "queued_message"),
    ],
)
async def test_what_no_message_can_be_is_refused_and_nothing_changes(
    room: Room, paths: list[str], fields: dict[str, Any], field: str
) -> None:
    task, (held,) = await working(room, "a")

    with pytest.raises(DomainError) as refused:
        await change(room, held, *paths, **fields)

    assert (refused.value.reason, refused.value.metadata["field"]) == ("FIELD_INVALID", field)
    assert await room.queued(task.task.id) == [held]


async def test_an_edit_tells_the_blobs_that_it_names_as_the_organization_knows_them(room: Room) -> None:
    _, (held,) = await working(room, "a")
    named = Prompt(text="look", attachments=[Attachment(blob=BlobReference(blob_id="blob_1"))])
    known = BlobReference(blob_id="blob_1", display_name="a.png", media_type="image/png", size_bytes=7)

    edited = await change(room, held, prompt=named, blobs=[known])

    assert edited.prompt.attachments[0].blob == known


async def test_a_message_is_taken_back_and_a_read_can_wait_for_that(room: Room) -> None:
    task, waiting = await working(room, "a", "b")
    request = sessions_pb2.DeleteQueuedMessageRequest(
        request_id=request_id(), task_id=task.task.id, queued_message_id=waiting[0].id
    )

    answer = await room.database.write(room.sessions.delete_queued, request)

    assert await texts(room, task) == ["b"]
    tombstone = next(one for one in await room.marks(QueuedMessage) if one.id == waiting[0].id)
    point = parse_consistency(Consistency(at_least_as_fresh=[answer.consistency_token])).point
    assert {one.id: one.revision for one in point.entities}[waiting[0].id] == tombstone.revision == 2
    assert await refusal(room.database.write(room.sessions.delete_queued, request)) == "RESOURCE_NOT_FOUND"


async def test_a_message_of_another_task_is_not_found(room: Room) -> None:
    _, (held,) = await working(room, "a")
    other, _ = await working(room)
    strange = QueuedMessage(id=held.id, task_id=other.task.id, place=1)

    assert await refusal(change(room, strange, place=1)) == "RESOURCE_NOT_FOUND"


async def test_at_most_a_hundred_messages_wait_and_not_too_much_of_them(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = await working(room)
    for number in range(message_queue.MOST):
        await queue(room, task, text=f"{number}")

    with pytest.raises(DomainError) as many:
        await queue(room, task)
    monkeypatch.setattr(message_queue, "MOST", 1000)
    excerpt = Attachment(file_excerpt=FileExcerpt(path="a", text="x" * 16000))
    large = Prompt(text="x", attachments=[excerpt] * 16)
    for _ in range(message_queue.MOST_BYTES // (large.ByteSize() + 1000)):
        await queue(room, task, prompt=large)
    with pytest.raises(DomainError) as much:
        await queue(room, task, prompt=large)

    assert (many.value.reason, many.value.metadata) == ("QUOTA_EXCEEDED", {"limit": "queued_messages"})
    assert (much.value.reason, much.value.metadata) == ("QUOTA_EXCEEDED", {"limit": "queued_message_bytes"})
