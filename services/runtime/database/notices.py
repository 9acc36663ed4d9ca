"""What processes on the same PostgreSQL database tell each other of their commits, by LISTEN and NOTIFY.

Notices are sent behind the commit and many at once: a NOTIFY within a transaction would have all commits of the server
take turns. So a process that dies in between tells nobody, and a broken connection hears nothing: a notice makes things
fast, and looking for oneself, every few seconds and after each break, makes them certain.
Source: https://www.postgresql.org/docs/current/sql-notify.html
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import psycopg

from services.runtime.database.server import answered_within, connect
from services.runtime.database.transaction import DatabaseRefused, DatabaseUnavailable
from services.runtime.logging import get_logger
from services.runtime.loops import being_cancelled
from services.runtime.retry import Backoff

log = get_logger(__name__)

CHANNEL = "branchline"
LOOK_SECONDS = 2.0
"""How often everybody looks for what no notice told."""

_GAP_SECONDS = 0.005
"""Least time between two messages."""

_MESSAGE_BYTES = 7000
"""Of 8000 that a payload may have."""

_MOST_WAITING = 2000

_CLOSE_SECONDS = 1.0
"""Longest time that the end waits for what is still to be told."""

_LISTEN_SECONDS = 5.0
"""Longest time that a server may take to begin to tell."""

Told = Mapping[str, str]
"""What was told of a topic: the newest word on each subject."""

Hear = Callable[[Told], None]
Look = Callable[[bool], Awaitable[None]]
"""Looks for what was not heard of; told whether notices may have been lost."""


class Notices:
    """One process's end. `send` runs an SQL text with one parameter."""

    def __init__(self, url: str, send: Callable[[list[str]], Awaitable[None]]) -> None:
        self._url = url
        self._send = send
        self._me = uuid.uuid4().hex[:12]
        self._hearers: dict[str, list[Hear]] = {}
        self._lookers: list[Look] = []
        self._waiting: dict[tuple[str, str], str] = {}
        self._sending: asyncio.Task[None] | None = None
        self._connection: psycopg.Connection[Any] | None = None
        self._file = -1
        self._lost = asyncio.Event()
        self._missed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, topic: str, hear: Hear, look: Look) -> None:
        """Have what others tell of a topic heard, and looked for."""
        self._hearers.setdefault(topic, []).append(hear)
        self._lookers.append(look)

    async def start(self) -> None:
        """Listen: what is committed from now on is heard of."""
        await self._listen()
        self._tasks = [asyncio.create_task(self._keep_listening()), asyncio.create_task(self._keep_looking())]

    async def close(self) -> None:
        """Send what waits, if that can be done at once, then hear no more."""
        tasks = [*self._tasks]
        if self._sending is not None:
            await asyncio.wait({self._sending}, timeout=_CLOSE_SECONDS)
            tasks.append(self._sending)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._hang_up()

    def tell(self, topic: str, subject: str, word: str) -> None:
        """Tell the others; in the event loop, behind the commit."""
        self._waiting[topic, subject] = word
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_all())

    async def _send_all(self) -> None:
        backoff = Backoff()
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            messages = [self._me] if len(waiting) > _MOST_WAITING else _messages(self._me, waiting)
            try:
                await self._send(messages)
            except DatabaseUnavailable:
                self._waiting = {**waiting, **self._waiting} if len(waiting) <= _MOST_WAITING else waiting
                await asyncio.sleep(backoff.next_seconds())
            else:
                backoff.reset()
                await asyncio.sleep(_GAP_SECONDS)

    async def _listen(self) -> None:
        connection = await asyncio.to_thread(_listening, self._url)
        self._connection, self._file = connection, connection.fileno()
        self._lost.clear()
        asyncio.get_running_loop().add_reader(self._file, self._read, connection)

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            asyncio.get_running_loop().remove_reader(self._file)  # a broken one does not know its own any more
            connection.close()

    def _read(self, connection: psycopg.Connection[Any]) -> None:
        messages: list[str] = []
        try:
            connection.pgconn.consume_input()
            while (notice := connection.pgconn.notifies()) is not None:
                messages.append(notice.extra.decode())
        except psycopg.OperationalError:
            self._hang_up()
            self._lost.set()
        self._hear(messages)

    def _hear(self, messages: Sequence[str]) -> None:
        heard: dict[str, dict[str, str]] = {}
        for message in messages:
            sender, *lines = message.split("\n")
            if sender == self._me:
                continue
            if not lines:  # it had too much to tell
                self._missed.set()
            for line in lines:
                topic, subject, word = line.split("\t")
                heard.setdefault(topic, {})[subject] = word
        for topic, told in heard.items():
            for hear in self._hearers.get(topic, ()):
                hear(told)

    async def _keep_listening(self) -> None:
        backoff = Backoff()
        while True:
            await self._lost.wait()
            try:
                await self._listen()
            except (DatabaseUnavailable, DatabaseRefused) as error:
                log.warning("no notices of other processes are heard", reason=str(error))
                await asyncio.sleep(backoff.next_seconds())
                continue
            backoff.reset()
            self._missed.set()

    async def _keep_looking(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._missed.wait()
            lost = self._missed.is_set()
            self._missed.clear()
            await self._look(lost=lost)

    async def _look(self, *, lost: bool) -> None:
        for look in self._lookers:
            try:
                await look(lost)
            except (Exception, asyncio.CancelledError) as error:
                if being_cancelled():
                    raise
                log.info("could not look for what others committed", reason=str(error))


def _listening(url: str) -> psycopg.Connection[Any]:
    connection = connect(url)
    try:
        with answered_within(connection, _LISTEN_SECONDS):
            connection.execute(f"LISTEN {CHANNEL}".encode())
    except psycopg.Error as error:
        connection.close()
        raise DatabaseUnavailable(str(error)) from error
    return connection


def _messages(sender: str, waiting: Mapping[tuple[str, str], str]) -> list[str]:
    messages: list[str] = []
    lines, size = [sender], len(sender)
    for (topic, subject), word in waiting.items():
        line = f"{topic}\t{subject}\t{word}"
        if size + len(line.encode()) + 1 > _MESSAGE_BYTES:
            messages.append("\n".join(lines))
            lines, size = [sender], len(sender)
        lines.append(line)
        size += len(line.encode()) + 1
    return [*messages, "\n".join(lines)]
