"""Where the bytes of blobs are: an object store, which is a folder or speaks S3.

A blob is kept in segments of 1 MiB, each an object of its own under the blob's id. An object is never changed: the last
segment of an upload that goes on is written anew under another key, which its length is part of, so what a row says was
received is there whatever was written after it.
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from branchline.v1.errors_pb2 import ERROR_REASON_SERVICE_UNREACHABLE
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from services.runtime.config import Config, Secret, make_private
from services.runtime.errors import Unavailable
from services.runtime.limits import CHUNK_BYTES

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore, S3Config

SEGMENT_BYTES = CHUNK_BYTES
DEFAULT_QUOTA_BYTES = 10 * 1024**3

T = TypeVar("T")
_LISTED_AT_ONCE = 1000
_ANSWER_TIME = timedelta(seconds=10)


class BlobsConfig(Config, frozen=True, kw_only=True):
    """Where blobs are kept, and how many."""

    bucket: str = ""
    """Bucket of an S3-compatible store; empty: the folder `blobs` in the service's data folder."""

    prefix: str = ""
    """Put before every key in the bucket."""

    endpoint: str = ""
    """URL of the store, where it is not Amazon's."""

    region: str = "us-east-1"

    access_key_id: str = ""
    """Empty: what the machine is given, such as AWS_ACCESS_KEY_ID or the role of an instance."""

    secret_access_key: Secret = Secret("")

    quota_bytes: int = DEFAULT_QUOTA_BYTES
    """Most that the blobs of one organization may have together."""


@dataclass(frozen=True, slots=True)
class BlobBytes:
    """The bytes of all blobs."""

    store: "ObjectStore"
    folder: Path | None = None
    """Where the store is a folder: it, too."""

    async def append(self, blob_id: str, received: int, data: bytes) -> None:
        """Put bytes behind those that were received. These stay as they are: see `drop_tail`."""
        while data:
            number, held = divmod(received, SEGMENT_BYTES)
            part, data = data[: SEGMENT_BYTES - held], data[SEGMENT_BYTES - held :]
            body = await self._get(_key(blob_id, number, held), 0, held) + part if held else part
            await _asked(obstore.put_async(self.store, _key(blob_id, number, len(body)), body, use_multipart=False))
            received += len(part)

    async def drop_tail(self, blob_id: str, received: int) -> None:
        """Forget the last, shorter segment of what was received, which is part of a longer one by now."""
        number, held = divmod(received, SEGMENT_BYTES)
        if held:
            await self._delete([_key(blob_id, number, held)])

    async def read(self, blob_id: str, size: int, offset: int, length: int) -> bytes:
        """Return a part of a blob of this size, shorter at its end. Raise FileNotFoundError where it is not there."""
        end = min(offset + length, size)
        data = b""
        while offset < end:
            number, start = divmod(offset, SEGMENT_BYTES)
            upto = min(SEGMENT_BYTES, start + end - offset)
            data += await self._get(_segment(blob_id, size, number), start, upto)
            offset += upto - start
        return data

    async def digest(self, blob_id: str, size: int) -> str:
        """Return the SHA-256 of a whole blob, a segment in memory at a time; empty where a part is missing."""
        found = hashlib.sha256()
        for number in range(_segments(size)):
            try:
                data = await self.read(blob_id, size, number * SEGMENT_BYTES, SEGMENT_BYTES)
            except FileNotFoundError:
                return ""
            await asyncio.to_thread(found.update, data)
        return found.hexdigest()

    async def make_durable(self, blob_id: str, size: int) -> None:
        """Have the disk keep a whole blob, also if the machine stops; an object store does so by itself."""
        if self.folder is not None and size:
            names = [_segment(blob_id, size, number) for number in range(_segments(size))]
            await _asked(asyncio.to_thread(_sync, self.folder, blob_id, names))

    async def forget(self, blob_id: str) -> None:
        """Delete all bytes of a blob; there may be none."""
        if self.folder is not None:  # with what a stop in the middle of writing left, which no listing shows
            await _asked(asyncio.to_thread(_remove, self.folder / blob_id))
            return
        async for some in self._listed(f"{blob_id}/"):
            await self._delete([one["path"] for one in some])

    async def kept_since(self, before_seconds: float) -> AsyncIterator[set[str]]:
        """Yield the ids of all blobs that have bytes older than a time, some at a time."""
        async for some in self._listed(None):
            yield {one["path"].split("/")[0] for one in some if one["last_modified"].timestamp() < before_seconds}

    async def _listed(self, prefix: str | None) -> "AsyncIterator[Sequence[ObjectMeta]]":
        listed = self.store.list(prefix, chunk_size=_LISTED_AT_ONCE)  # pyright: ignore[reportUnknownMemberType] - Arrow
        while some := await _asked(anext(listed, None)):
            yield some

    async def _get(self, key: str, start: int, end: int) -> bytes:
        return bytes(await _asked(obstore.get_range_async(self.store, key, start=start, end=end)))

    async def _delete(self, keys: list[str]) -> None:
        try:
            await _asked(obstore.delete_async(self.store, keys))
        except FileNotFoundError:
            return


def open_bytes(config: BlobsConfig, data_dir: Path) -> BlobBytes:
    """Return the store that is configured."""
    if not config.bucket:
        folder = data_dir / "blobs"
        make_private(folder)
        return BlobBytes(LocalStore(folder), folder)
    where: S3Config = {"bucket": config.bucket, "region": config.region}
    if config.endpoint:
        where["endpoint"] = config.endpoint
    if config.access_key_id:
        where["access_key_id"] = config.access_key_id
        where["secret_access_key"] = config.secret_access_key.value
    store = S3Store(
        config=where,
        prefix=config.prefix or None,
        client_options={"timeout": _ANSWER_TIME, "allow_http": config.endpoint.startswith("http://")},
        retry_config={"max_retries": 3, "retry_timeout": _ANSWER_TIME},
    )
    return BlobBytes(store)


async def _asked(answer: Awaitable[T]) -> T:
    """Return what the store answers; raise Unavailable if it cannot, FileNotFoundError if there is nothing."""
    try:
        return await answer
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        sentence = "the store of blobs cannot be reached, or could not do it; try again"
        raise Unavailable(ERROR_REASON_SERVICE_UNREACHABLE, sentence) from error


def _segments(size: int) -> int:
    return -(-size // SEGMENT_BYTES)


def _segment(blob_id: str, size: int, number: int) -> str:
    return _key(blob_id, number, min(SEGMENT_BYTES, size - number * SEGMENT_BYTES))


def _key(blob_id: str, number: int, length: int) -> str:
    return f"{blob_id}/{number:02}.{length}"


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def _sync(folder: Path, blob_id: str, names: list[str]) -> None:
    for path in (*(folder / name for name in names), folder / blob_id, folder):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
