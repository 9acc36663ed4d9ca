"""Blobs: uploaded in parts and resumed, checked, counted, named, and collected; whatever is cut or killed."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import pytest
from branchline.v1.blobs_pb2 import (
    BLOB_STATE_COMPLETE,
    BLOB_STATE_UPLOADING,
    Blob,
    CreateBlobRequest,
    GetBlobRequest,
    ReadBlobRequest,
    WriteBlobRequest,
)
from branchline.v1.common_pb2 import Attachment, BlobReference, Prompt
from branchline.v1.errors_pb2 import ERROR_REASON_SERVICE_UNREACHABLE
from branchline.v1.organizations_pb2 import Organization
from branchline.v1.roles_pb2 import ROLE_MEMBER, ROLE_VIEWER
from branchline.v1.users_pb2 import Draft
from branchline_internal.organization.v1.organization_pb2 import (
    ClaimBlobsRequest,
    FetchBlobRequest,
    StoreBlobRequest,
)
from branchline_internal.user.v1.user_pb2 import DraftState, ForgetTaskStatesRequest

from services.organization.blob_bytes import SEGMENT_BYTES, BlobBytes, BlobsConfig, open_bytes
from services.organization.blobs import OLD, UPLOADS_AT_ONCE
from services.organization.claims import BLOBS_OF_IDS, OF_DIGEST
from services.organization.destinations import TO_USER
from services.runtime.config import Secret
from services.runtime.database import Statement
from services.runtime.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from tests.support.databases import look_into, migrated
from tests.support.object_store import bucket
from tests.unit.organization.conftest import NOBODY, Room, call_as, open_room, summary

KILOBYTE = 1024


def some_bytes(size: int, seed: int = 1) -> bytes:
    block = hashlib.sha256(str(seed).encode()).digest()
    return (block * (size // len(block) + 1))[:size]


def files(room: Room) -> list[str]:
    """Return the names of all that is kept, with what is left over."""
    kept = room.folder / "blobs"
    return sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file())


async def begin(room: Room, organization: Organization, data: bytes, **given: Any) -> Blob:
    request = CreateBlobRequest(
        organization_id=organization.id,
        display_name="shot.png",
        size_bytes=len(data),
        sha256=given.pop("sha256", hashlib.sha256(data).hexdigest()),
        **given,
    )
    return (await room.blobs.CreateBlob(request, NOBODY)).blob


async def write(room: Room, blob: Blob, offset: int, data: bytes) -> Blob:
    request = WriteBlobRequest(organization_id=blob.organization_id, blob_id=blob.id, offset=offset, data=data)
    return (await room.blobs.WriteBlob(request, NOBODY)).blob


async def get(room: Room, blob: Blob) -> Blob:
    return (
        await room.blobs.GetBlob(GetBlobRequest(organization_id=blob.organization_id, blob_id=blob.id), NOBODY)
    ).blob


async def upload(room: Room, organization: Organization, data: bytes = b"an image") -> Blob:
    blob = await begin(room, organization, data)
    for offset in range(0, len(data), SEGMENT_BYTES):
        blob = await write(room, blob, offset, data[offset : offset + SEGMENT_BYTES])
    return blob


async def claim(room: Room, blob: Blob, task_id: str = "task_1", **given: Any) -> list[BlobReference]:
    request = ClaimBlobsRequest(organization_id=blob.organization_id, task_id=task_id, blob_ids=[blob.id], **given)
    return list((await room.internal.ClaimBlobs(request, NOBODY)).blobs)


async def task(
    room: Room, organization: Organization, number: int = 1, *, deleted: bool = False, revision: int = 1
) -> str:
    state = summary(organization.id, "repo_1", number, revision=revision)
    assert await room.push((state, deleted)) == {}
    return state.id


async def is_there(room: Room, blob: Blob) -> bool:
    try:
        await get(room, blob)
    except NotFound:
        return False
    return True


def charged(room: Room) -> int:
    """Return what all blobs count against their quota."""
    return look_into(room.url, "SELECT coalesce(sum(charged_bytes), 0) FROM blob_usage")[0][0]


async def test_a_blob_is_uploaded_in_parts_of_any_size_and_read_in_others(room: Room) -> None:
    organization = await room.found()
    data = some_bytes(2 * SEGMENT_BYTES + 300 * KILOBYTE)
    blob = await begin(room, organization, data, media_type="image/png")
    assert (blob.state, blob.received_bytes, blob.creator.user_id) == (BLOB_STATE_UPLOADING, 0, "usr_owner")

    offset = 0
    for size in (1, 700 * KILOBYTE, SEGMENT_BYTES, 5, 400 * KILOBYTE, SEGMENT_BYTES):
        blob = await write(room, blob, offset, data[offset : offset + size])
        offset = blob.received_bytes
    assert (blob.state, offset) == (BLOB_STATE_COMPLETE, len(data))

    read = b""
    while part := await read_part(room, blob, len(read), 333 * KILOBYTE):
        read += part
    assert read == data
    assert len(await read_part(room, blob, 0, 0)) == SEGMENT_BYTES
    assert await read_part(room, blob, 10 * len(data), 1) == b""
    assert len(files(room)) == 3  # nothing is left of the parts that were put together


async def read_part(room: Room, blob: Blob, offset: int, length: int) -> bytes:
    request = ReadBlobRequest(organization_id=blob.organization_id, blob_id=blob.id, offset=offset, length=length)
    return (await room.blobs.ReadBlob(request, NOBODY)).data


async def test_an_upload_is_resumed_where_it_broke_off_and_repeats_are_passed_over(room: Room) -> None:
    organization = await room.found()
    data = some_bytes(1000)
    blob = await begin(room, organization, data)
    await write(room, blob, 0, data[:400])
    with pytest.raises(OutOfRange) as gap:
        await write(room, blob, 500, data[500:])
    assert gap.value.metadata == {"offset": "400"}
    assert (await get(room, blob)).received_bytes == 400

    assert (await write(room, blob, 0, data[:400])).received_bytes == 400
    assert (await write(room, blob, 300, data[300:600])).received_bytes == 600
    done = await write(room, blob, 600, data[600:])
    assert done.state == BLOB_STATE_COMPLETE
    assert await write(room, blob, 600, data[600:]) == done
    assert await read_part(room, blob, 0, 0) == data


async def test_a_command_that_is_repeated_begins_one_upload(room: Room) -> None:
    organization = await room.found()
    given = {"request_id": "0b9c4b49-6f4e-4b52-9f37-b25ab4bb2d9f"}
    first = await begin(room, organization, b"x", **given)
    assert await begin(room, organization, b"x", **given) == first
    assert room.count("blobs") == 1


async def test_what_has_another_digest_is_forgotten_at_once(room: Room) -> None:
    organization = await room.found()
    blob = await begin(room, organization, b"right", sha256=hashlib.sha256(b"other").hexdigest())
    with pytest.raises(DataLoss) as lost:
        await write(room, blob, 0, b"right")
    assert lost.value.reason == "DIGEST_MISMATCH"
    assert not await is_there(room, blob)
    assert files(room) == []
    assert room.count("blobs") == room.count("blob_usage") == 0


async def test_more_than_was_named_is_refused_before_it_is_kept(room: Room) -> None:
    organization = await room.found()
    blob = await begin(room, organization, b"four")
    with pytest.raises(InvalidArgument):
        await write(room, blob, 0, b"fours")
    with pytest.raises(InvalidArgument):
        await write(room, await write(room, blob, 0, b"four"), 4, b"s")
    assert files(room) == [f"{blob.id}/00.4"]


async def test_an_incomplete_blob_is_neither_read_nor_named(room: Room) -> None:
    organization = await room.found()
    blob = await begin(room, organization, b"1234")
    await write(room, blob, 0, b"12")
    with pytest.raises(FailedPrecondition) as refused:
        await read_part(room, blob, 0, 0)
    assert (refused.value.reason, refused.value.metadata) == ("BLOB_INCOMPLETE", {"received_bytes": "2"})
    with pytest.raises(FailedPrecondition):
        await claim(room, blob)


async def test_nobody_reads_or_writes_in_another_organization(room: Room) -> None:
    mine, theirs = await room.found("mine"), await room.found("theirs", owner="usr_other")
    call_as("usr_owner", mine.id)
    blob = await upload(room, mine)
    call_as("usr_other", theirs.id)
    for placed in (mine.id, theirs.id):
        asked = Blob(id=blob.id, organization_id=placed)
        with pytest.raises(NotFound):
            await get(room, asked)
        with pytest.raises(NotFound):
            await read_part(room, asked, 0, 0)
        with pytest.raises(NotFound):
            await write(room, asked, 0, b"x")
        with pytest.raises(NotFound):
            await claim(room, asked)


async def test_another_member_cannot_spoil_an_upload(room: Room) -> None:
    organization = await room.found()
    blob = await begin(room, organization, b"good")
    call_as("usr_other", organization.id, ROLE_MEMBER)
    with pytest.raises(NotFound):
        await write(room, blob, 0, b"evil")
    call_as("usr_viewer", organization.id, ROLE_VIEWER)
    with pytest.raises(PermissionDenied):
        await begin(room, organization, b"good")
    call_as("usr_owner", organization.id)
    assert (await write(room, blob, 0, b"good")).state == BLOB_STATE_COMPLETE


@pytest.fixture
async def small(tmp_path: Path) -> AsyncGenerator[Room, None]:
    """A room whose organizations may keep 10 KiB."""
    opened = await open_room(migrated("organization", tmp_path), tmp_path, 10 * KILOBYTE)
    yield opened
    await opened.database.close()


async def test_the_quota_counts_uploads_from_their_beginning_and_gives_back_what_is_collected(small: Room) -> None:
    organization = await small.found()
    first = await begin(small, organization, some_bytes(6 * KILOBYTE))
    await begin(small, organization, b"at least a block")
    with pytest.raises(ResourceExhausted) as full:
        await begin(small, organization, b"one more")
    assert (full.value.reason, full.value.metadata) == ("QUOTA_EXCEEDED", {"limit": "blob_bytes"})
    with pytest.raises(ResourceExhausted):
        await store(small, organization, b"what an agent shows")
    other = await small.found("other", owner="usr_other")
    await begin(small, other, some_bytes(10 * KILOBYTE))  # another's quota is its own

    small.clock.pass_by(days=2)
    await small.uploads.collect()
    call_as("usr_owner", organization.id)
    assert not await is_there(small, first)
    await begin(small, organization, some_bytes(10 * KILOBYTE))


async def test_one_member_cannot_use_up_the_quota_with_uploads_that_are_never_sent(room: Room) -> None:
    organization = await room.found()
    for _ in range(2 * UPLOADS_AT_ONCE):
        await begin(room, organization, some_bytes(10 * KILOBYTE))
    assert charged(room) == UPLOADS_AT_ONCE * 10 * KILOBYTE
    call_as("usr_other", organization.id)
    await upload(room, organization)


async def test_the_upload_that_was_not_written_to_for_longest_gives_way(room: Room) -> None:
    organization = await room.found()
    content = some_bytes(10 * KILOBYTE)
    written = await begin(room, organization, content)
    oldest, partly, *others = [await begin(room, organization, content) for _ in range(UPLOADS_AT_ONCE - 1)]
    await write(room, partly, 0, content[: 6 * KILOBYTE])
    for blob in (*others, written):
        room.clock.pass_by(seconds=1)
        await write(room, blob, 0, content[:1])

    await begin(room, organization, content)
    assert not await is_there(room, oldest)
    assert await is_there(room, partly)

    await begin(room, organization, content)
    assert not await is_there(room, partly)
    assert charged(room) == (UPLOADS_AT_ONCE * 10 + 6) * KILOBYTE  # what was received counts until it is collected
    await room.uploads.collect()
    assert charged(room) == UPLOADS_AT_ONCE * 10 * KILOBYTE
    with pytest.raises(NotFound):
        await write(room, partly, 6 * KILOBYTE, content[6 * KILOBYTE :])
    done = await write(room, written, 1, content[1:])
    assert done.state == BLOB_STATE_COMPLETE


async def test_what_a_task_names_is_kept_and_fetched_until_the_task_is_gone(room: Room) -> None:
    organization = await room.found()
    task_id = await task(room, organization)
    blob, unnamed = await upload(room, organization, b"named"), await upload(room, organization, b"unnamed")
    told = await claim(room, blob, task_id)
    assert [(one.blob_id, one.display_name, one.size_bytes) for one in told] == [(blob.id, "shot.png", 5)]
    assert await claim(room, blob, task_id) == told

    room.clock.pass_by(days=3)
    await room.uploads.collect()
    assert (await is_there(room, blob), await is_there(room, unnamed)) == (True, False)
    assert await fetch(room, blob, task_id) == b"named"
    assert await fetch(room, blob, task_id, 2) == b"med"
    assert await fetch(room, blob, task_id, 5) == b""
    with pytest.raises(NotFound):
        await fetch(room, blob, "task_other")

    await task(room, organization, deleted=True, revision=2)
    await room.uploads.collect()
    assert await is_there(room, blob)  # for the time of grace
    room.clock.pass_by(days=2)
    await room.uploads.collect()
    assert not await is_there(room, blob)
    assert files(room) == []
    assert [room.count(table) for table in ("blobs", "blob_claims", "blob_releases", "blob_usage")] == [0] * 4


async def fetch(room: Room, blob: Blob, task_id: str, offset: int = 0) -> bytes:
    request = FetchBlobRequest(organization_id=blob.organization_id, task_id=task_id, blob_id=blob.id, offset=offset)
    return (await room.internal.FetchBlob(request, NOBODY)).data


async def test_a_blob_that_two_tasks_name_is_kept_as_long_as_one_of_them_lives(room: Room) -> None:
    organization = await room.found()
    blob = await upload(room, organization)
    for number in (1, 2):
        await claim(room, blob, await task(room, organization, number))
    await task(room, organization, 1, deleted=True, revision=2)
    await room.uploads.collect()
    room.clock.pass_by(days=2)
    await room.uploads.collect()
    assert await is_there(room, blob)
    await task(room, organization, 2, deleted=True, revision=2)
    await room.uploads.collect()
    room.clock.pass_by(days=2)
    await room.uploads.collect()
    assert not await is_there(room, blob)


async def test_the_claim_of_a_task_that_never_was_made_ends(room: Room) -> None:
    organization = await room.found()
    blob = await upload(room, organization)
    await claim(room, blob, "task_refused")
    room.clock.pass_by(days=2)
    await room.uploads.collect()
    assert await is_there(room, blob)
    room.clock.pass_by(days=2)
    await room.uploads.collect()
    assert not await is_there(room, blob)


async def test_a_question_names_nothing(room: Room) -> None:
    organization = await room.found()
    blob = await upload(room, organization)
    assert [one.blob_id for one in await claim(room, blob, "", validate_only=True)] == [blob.id]
    assert room.count("blob_claims") == 0
    with pytest.raises(NotFound):
        await claim(room, Blob(id="blob_none", organization_id=organization.id), "", validate_only=True)
    with pytest.raises(InvalidArgument):
        await claim(room, blob, "")


def draft_of(
    task_id: str, organization: Organization, blobs: list[Blob], revision: int, user_id: str = "usr_owner"
) -> Any:
    attached = [Attachment(blob=BlobReference(blob_id=blob.id)) for blob in blobs]
    draft = Draft(task_id=task_id, prompt=Prompt(text="look", attachments=attached), revision=revision)
    return DraftState(user_id=user_id, organization_id=organization.id, draft=draft)


async def test_a_draft_keeps_the_blobs_that_it_names_and_no_longer(room: Room) -> None:
    organization = await room.found()
    task_id = await task(room, organization)
    first, second = await upload(room, organization, b"first"), await upload(room, organization, b"second")
    none = Blob(id="blob_none")
    await room.push_draft(draft_of(task_id, organization, [first, second, none], 1))
    room.clock.pass_by(days=2)
    await room.uploads.collect()
    assert (await is_there(room, first), await is_there(room, second)) == (True, True)

    await room.push_draft(draft_of(task_id, organization, [second], 2))
    await room.push_draft(draft_of(task_id, organization, [first, second], 1))  # late
    room.clock.pass_by(days=2)
    await room.uploads.collect()
    assert (await is_there(room, first), await is_there(room, second)) == (False, True)

    await room.push_draft(draft_of(task_id, organization, [], 3), deleted=True)
    room.clock.pass_by(days=2)
    await room.uploads.collect()
    assert not await is_there(room, second)
    assert room.count("drafts") == 1
    await room.database.write(room.stores.drafts.prune)
    assert room.count("drafts") == 0


async def test_drafts_without_a_task_or_a_membership_are_sent_back_to_be_forgotten(room: Room) -> None:
    organization = await room.found()
    task_id = await task(room, organization)
    blob = await upload(room, organization)
    await room.push_draft(draft_of(task_id, organization, [], 1))
    assert await room.marks(TO_USER, ForgetTaskStatesRequest) == []
    await room.push_draft(draft_of("task_gone", organization, [blob], 1))
    await room.push_draft(draft_of(task_id, organization, [blob], 1, "usr_left"))
    forgotten = await room.marks(TO_USER, ForgetTaskStatesRequest)
    assert [(one.user_id, one.task_id) for one in forgotten] == [("usr_owner", "task_gone"), ("usr_left", task_id)]
    assert room.count("blob_claims") == 0


async def store(room: Room, organization: Organization, data: bytes, task_id: str = "task_1") -> BlobReference:
    request = StoreBlobRequest(
        organization_id=organization.id,
        task_id=task_id,
        display_name="output.txt",
        media_type="text/plain",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    for offset in range(0, len(data), SEGMENT_BYTES):
        request.offset, request.data = offset, data[offset : offset + SEGMENT_BYTES]
        answer = await room.internal.StoreBlob(request, NOBODY)
        if answer.blob.blob_id:
            return answer.blob
        assert answer.received_bytes == offset + len(request.data)
        request.upload_id = answer.upload_id
    raise AssertionError("it is whole, and no blob")


async def test_what_an_agent_shows_is_stored_once_for_its_task(room: Room) -> None:
    organization = await room.found()
    data = some_bytes(SEGMENT_BYTES)
    first, second = await asyncio.gather(store(room, organization, data), store(room, organization, data))
    assert first == second
    assert (first.size_bytes, first.media_type) == (SEGMENT_BYTES, "text/plain")
    other = await store(room, organization, data, "task_2")
    assert other.blob_id != first.blob_id
    blob = Blob(id=first.blob_id, organization_id=organization.id)
    assert await fetch(room, blob, "task_1") == data


async def test_what_is_larger_than_a_part_is_stored_whole_and_told_once(room: Room) -> None:
    organization = await room.found()
    data = some_bytes(2 * SEGMENT_BYTES + 5)
    stored = await store(room, organization, data)
    assert stored.size_bytes == len(data)
    assert await store(room, organization, data) == stored
    assert await room.database.read(room.stores.claims.named_by, organization.id, "task_1", stored.blob_id)
    assert room.count("blobs") == 1


async def test_what_an_agent_shows_with_another_digest_is_forgotten(room: Room) -> None:
    organization = await room.found()
    request = StoreBlobRequest(
        organization_id=organization.id, task_id="task_1", size_bytes=4, sha256="0" * 64, data=b"four"
    )
    with pytest.raises(DataLoss):
        await room.internal.StoreBlob(request, NOBODY)
    assert [room.count(table) for table in ("blobs", "blob_claims", "blob_usage")] == [0, 0, 0]


async def test_the_end_of_an_organization_takes_its_blobs_along(room: Room) -> None:
    organization = await room.found()
    blob = await upload(room, organization)
    await begin(room, organization, b"unfinished")
    await claim(room, blob, await task(room, organization))
    other = await room.found("other", owner="usr_other")
    kept = await upload(room, other, b"kept")
    for step in (room.stores.claims.drop_of, room.stores.blobs.discard_of):
        assert not await room.database.write(step, organization.id)
    await room.uploads.collect()
    assert [room.count(table) for table in ("blobs", "blob_claims", "blob_usage")] == [1, 0, 1]
    assert files(room) == [f"{kept.id}/00.4"]


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (OLD, "blobs_unnamed (touch_time<?)"),
        (OF_DIGEST, "blobs_digest (organization_id=? AND sha256=?)"),
        (BLOBS_OF_IDS, "sqlite_autoindex_blobs_1 (id=?)"),
    ],
)
async def test_no_other_blob_is_looked_at(room: Room, statement: Statement, index: str) -> None:
    plan = room.plan(statement, organization="o", digest="d", task="t", before=1.0, ids=["b"])
    assert plan.startswith(f"SEARCH blobs USING INDEX {index}")


async def test_what_cannot_be_stored_leaves_nothing_and_counts_for_nothing(room: Room) -> None:
    organization = await room.found()

    async def fail(*_: object) -> None:
        raise Unavailable(ERROR_REASON_SERVICE_UNREACHABLE, "the store is away")

    with patch.object(BlobBytes, "make_durable", fail), pytest.raises(Unavailable):
        await store(room, organization, b"an output")
    assert room.count("blobs") == room.count("blob_usage") == 0
    assert files(room) == []


async def test_a_full_or_broken_store_is_told_as_such_and_the_upload_goes_on_later(room: Room) -> None:
    organization = await room.found()
    blob = await begin(room, organization, b"12345678")
    await write(room, blob, 0, b"1234")
    folder = room.folder / "blobs"
    folder.rename(folder.with_name("away"))
    folder.write_text("not a folder")
    with pytest.raises(Unavailable) as broken:
        await write(room, blob, 4, b"5678")
    assert broken.value.code is grpc.StatusCode.UNAVAILABLE
    folder.unlink()
    folder.with_name("away").rename(folder)
    assert (await write(room, blob, 4, b"5678")).state == BLOB_STATE_COMPLETE


async def test_a_writer_that_leaves_harms_nobody_and_what_it_wrote_counts(room: Room) -> None:
    organization = await room.found()
    blob = await begin(room, organization, b"12345678")
    other = await begin(room, organization, b"other")
    begun, go_on = asyncio.Event(), asyncio.Event()
    append = BlobBytes.append

    async def slow(kept: BlobBytes, blob_id: str, received: int, data: bytes) -> None:
        if blob_id == blob.id:
            begun.set()
            await go_on.wait()
        await append(kept, blob_id, received, data)

    with patch.object(BlobBytes, "append", slow):
        cut = asyncio.create_task(write(room, blob, 0, b"1234"))
        await begun.wait()
        with pytest.raises(Unavailable) as busy:  # nothing piles up in memory behind a slow store
            await write(room, blob, 0, b"1234")
        assert busy.value.reason == "OVERLOADED"
        cut.cancel()
        assert (await write(room, other, 0, b"other")).state == BLOB_STATE_COMPLETE
        go_on.set()
        await room.uploads.settle()
    assert (await get(room, blob)).received_bytes == 4
    assert (await write(room, blob, 4, b"5678")).state == BLOB_STATE_COMPLETE


async def test_bytes_that_no_row_knows_are_deleted_after_a_day(room: Room) -> None:
    organization = await room.found()
    blob = await upload(room, organization)
    stray = room.folder / "blobs" / "blob_stray"
    stray.mkdir()
    (stray / "00.3").write_bytes(b"123")
    await room.uploads.collect_strays()
    assert len(files(room)) == 2
    os.utime(stray / "00.3", (0, 0))
    await room.uploads.collect_strays()
    assert files(room) == [f"{blob.id}/00.8"]


_KILLED = """
import asyncio, os, signal, sys
from dataclasses import replace
from pathlib import Path
from branchline.v1.blobs_pb2 import Blob
from services.organization.blob_bytes import BlobBytes
from tests.unit.organization.conftest import call_as, open_room
from tests.unit.organization.test_blobs import write

async def main(url, folder, organization_id, blob_id, step, action):
    room = await open_room(url, Path(folder))
    call_as("usr_owner", organization_id)
    whole = getattr(BlobBytes, step)
    async def killed(*given):
        await whole(*given)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(BlobBytes, step, killed)
    blob = Blob(id=blob_id, organization_id=organization_id)
    await (write(room, blob, 4, b"5678") if action == "write" else room.uploads.collect())

asyncio.run(main(*sys.argv[1:]))
"""


def kill(room: Room, blob: Blob, step: str, action: str) -> None:
    """Have another process do something to a blob, and die when it has done a step with the bytes."""
    given = [room.url, str(room.folder), blob.organization_id, blob.id, step, action]
    command = [sys.executable, "-c", _KILLED, *given]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize("step", ["append", "digest", "make_durable"])
async def test_a_kill_between_the_bytes_and_the_row_loses_nothing(room: Room, step: str) -> None:
    organization = await room.found()
    blob = await begin(room, organization, b"12345678")
    await write(room, blob, 0, b"1234")
    await asyncio.to_thread(kill, room, blob, step, "write")
    assert (await get(room, blob)).received_bytes == 4
    assert (await write(room, blob, 4, b"5678")).state == BLOB_STATE_COMPLETE
    assert await read_part(room, blob, 0, 0) == b"12345678"
    assert files(room) == [f"{blob.id}/00.8"]


async def test_a_kill_between_the_end_of_the_bytes_and_of_the_row_is_gone_on_from(room: Room) -> None:
    organization = await room.found()
    blob = await begin(room, organization, b"12345678")
    await write(room, blob, 0, b"1234")
    await room.database.write(room.stores.blobs.discard, blob.id)
    await asyncio.to_thread(kill, room, blob, "forget", "collect")
    assert (files(room), room.count("blobs")) == ([], 1)
    await room.uploads.collect()
    assert room.count("blobs") == room.count("blob_usage") == 0


async def test_an_s3_compatible_store_keeps_blobs_as_a_folder_does(room: Room) -> None:
    organization = await room.found()
    with bucket() as server:
        config = BlobsConfig(
            bucket="ours",
            prefix="branchline",
            endpoint=server.endpoint,
            access_key_id="key",
            secret_access_key=Secret("secret"),
        )
        room.uploads = replace(room.uploads, kept=open_bytes(config, room.folder))
        data = some_bytes(SEGMENT_BYTES + 1000)
        blob = await begin(room, organization, data)
        await write(room, blob, 0, data[:500])
        await write(room, blob, 500, data[500:SEGMENT_BYTES])
        assert (await write(room, blob, SEGMENT_BYTES, data[SEGMENT_BYTES:])).state == BLOB_STATE_COMPLETE
        assert await read_part(room, blob, SEGMENT_BYTES - 10, 20) == data[SEGMENT_BYTES - 10 : SEGMENT_BYTES + 10]
        assert sorted(server.objects) == [f"branchline/{blob.id}/{name}" for name in (f"00.{SEGMENT_BYTES}", "01.1000")]

        server.objects["branchline/blob_stray/00.1"] = b"x"
        room.clock.pass_by(days=2)
        await room.uploads.collect_strays()
        assert len(server.objects) == 2
        await room.uploads.collect()
        assert server.objects == {}
    away = BlobsConfig(bucket="ours", endpoint="http://127.0.0.1:1", access_key_id="key")
    room.uploads = replace(room.uploads, kept=open_bytes(away, room.folder))
    with pytest.raises(Unavailable):
        await write(room, await begin(room, organization, b"nobody answers"), 0, b"nobody answers")
