"""People at work on an installation that is being killed under them: they insist, and remember what was promised."""

import asyncio
import itertools
import random
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from branchline.v1 import sessions_pb2, tasks_pb2, transcripts_pb2
from branchline.v1.common_pb2 import Consistency, Prompt
from branchline.v1.tasks_pb2 import Task
from branchline.v1.transcripts_pb2 import InputRequest, TranscriptEntry

from tests.support.client import Client
from tests.support.stack import eventually

RESTING = frozenset({tasks_pb2.TASK_STATE_FAILED, tasks_pb2.TASK_STATE_ARCHIVED, tasks_pb2.TASK_STATE_KILLED})
RESTING_ACTIVITIES = frozenset({tasks_pb2.TASK_ACTIVITY_IDLE, tasks_pb2.TASK_ACTIVITY_FAILED})
_PASSES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_MAY_REFUSE = frozenset({grpc.StatusCode.FAILED_PRECONDITION})
_REST_SECONDS = 180.0

T = TypeVar("T")


async def insist(call: Callable[[], Awaitable[T]]) -> T | None:
    """Call until there is an answer; None if the answer is that it cannot be done now."""
    while True:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            if error.code() in _MAY_REFUSE:
                return None
            if error.code() not in _PASSES:
                raise
        await asyncio.sleep(0.1)


@dataclass
class Promise:
    """A message that was taken, and what its agent says if nobody stops it."""

    task_id: str
    session_id: str
    message_id: str
    """Of the entry in the transcript, or of the message that waited."""
    words: list[str]
    undisturbed: bool
    droppable: bool = False
    """Whether its task was ended or its session closed since, which drops what still waits."""


@dataclass
class Person:
    """Works on one task after another."""

    client: Client
    organization_id: str
    repository_id: str
    chance: random.Random
    numbers: "itertools.count[int]"
    acknowledged: asyncio.Event
    """Set at each command that was acknowledged."""
    promises: list[Promise] = field(default_factory=list[Promise])
    tasks: list[str] = field(default_factory=list[str])
    tokens: dict[str, str] = field(default_factory=dict[str, str])
    """Consistency tokens of the last command to each task: a person sees what they did."""
    stuck: list[str] = field(default_factory=list[str])

    async def work(self, enough: asyncio.Event) -> None:
        """Work until it is enough."""
        while not enough.is_set():
            task = await self._create()
            for _ in range(self.chance.randint(2, 5)):
                if enough.is_set() or not await self._rest(task.id):
                    break
                deeds = (self._count, self._count, self._ask, self._hang, self._die, self._close, self._second)
                await self.chance.choice(deeds)(task)
            if self.chance.random() < 0.6:
                await self._end(task)

    async def _create(self) -> Task:
        request = tasks_pb2.CreateTaskRequest(
            request_id=str(uuid.uuid4()),
            repository_id=self.repository_id,
            prompt=Prompt(text="say hello"),
            hold_prompt=True,
        )
        made = await self._twice(self.client.tasks.CreateTask, request)
        assert made is not None
        self.tasks.append(made.task.id)
        return made.task

    async def _count(self, task: Task) -> None:
        await self._send(task, _say_all, undisturbed=True)

    async def _die(self, task: Task) -> None:
        await self._send(task, lambda words: f"say {words[0]}\ndie")

    async def _hang(self, task: Task) -> None:
        if await self._send(task, lambda words: f"say {words[0]}\nrun sleep 20"):
            await asyncio.sleep(self.chance.uniform(0, 2))
            await self._cancel(task)

    async def _close(self, task: Task) -> None:
        """Close the session and open it again."""
        which = {"task_id": task.id, "session_id": await self._first(task)}
        closing = sessions_pb2.CloseSessionRequest(request_id=str(uuid.uuid4()), **which)
        if await self._twice(self.client.sessions.CloseSession, closing) is not None:
            for promise in self.promises:
                promise.droppable = promise.droppable or promise.session_id == closing.session_id
        opening = sessions_pb2.ReopenSessionRequest(request_id=str(uuid.uuid4()), **which)
        await self._twice(self.client.sessions.ReopenSession, opening)

    async def _second(self, task: Task) -> None:
        """Open another session and have it say something while the first one does."""
        request = sessions_pb2.CreateSessionRequest(request_id=str(uuid.uuid4()), task_id=task.id)
        made = await self._twice(self.client.sessions.CreateSession, request)
        if made is not None:
            await self._send(task, _say_all, undisturbed=True)
            await self._send(task, _say_all, undisturbed=True, session_id=made.session.id)

    async def _ask(self, task: Task) -> None:
        promise = await self._send(task, lambda words: f"say {words[0]}\nask May I?\nsay {' '.join(words[1:])}")
        if promise is None:
            return
        question = await self._question(promise)
        if question is None:
            return
        await asyncio.sleep(self.chance.uniform(0, 1))
        if self.chance.random() < 0.5:
            await self._cancel(task)
            return
        request = sessions_pb2.AnswerInputRequestRequest(
            request_id=str(uuid.uuid4()),
            task_id=task.id,
            input_request_id=question.id,
            answer=transcripts_pb2.InputAnswer(option_id=self.chance.choice(("allow", "reject"))),
        )
        await self._twice(self.client.sessions.AnswerInputRequest, request)

    async def _cancel(self, task: Task) -> None:
        session = (await sessions(self.client, task.id))[0]
        request = sessions_pb2.CancelTurnRequest(
            request_id=str(uuid.uuid4()), task_id=task.id, session_id=session.id, turn=session.turn
        )
        await self._twice(self.client.sessions.CancelTurn, request)

    async def _end(self, task: Task) -> None:
        """Archive or kill the task, whatever it is doing."""
        for promise in self.promises:
            promise.undisturbed = promise.undisturbed and promise.task_id != task.id
            promise.droppable = promise.droppable or promise.task_id == task.id
        number = str(uuid.uuid4())
        if self.chance.random() < 0.5:
            archive = tasks_pb2.ArchiveTaskRequest(request_id=number, task_id=task.id)
            await self._twice(self.client.tasks.ArchiveTask, archive)
        else:
            await self._twice(self.client.tasks.KillTask, tasks_pb2.KillTaskRequest(request_id=number, task_id=task.id))

    async def _send(
        self,
        task: Task,
        script: Callable[[list[str]], str],
        *,
        undisturbed: bool = False,
        session_id: str = "",
    ) -> Promise | None:
        number = next(self.numbers)
        words = [f"m{number}w{place}" for place in range(8)]
        request = sessions_pb2.SendMessageRequest(
            request_id=str(uuid.uuid4()),
            task_id=task.id,
            session_id=session_id or await self._first(task),
            prompt=Prompt(text=script(words)),
            when_busy=sessions_pb2.WHEN_BUSY_QUEUE,
        )
        answer = await self._twice(self.client.sessions.SendMessage, request)
        if answer is None:
            return None
        message_id = answer.entry.id or answer.queued_message.id
        promise = Promise(task.id, request.session_id, message_id, words, undisturbed)
        self.promises.append(promise)
        return promise

    async def _first(self, task: Task) -> str:
        """Return the id of a task's first session."""
        return (await sessions(self.client, task.id))[0].id

    async def _question(self, promise: Promise) -> InputRequest | None:
        """Return the question once it is asked; None if the turn is over before."""
        pending = transcripts_pb2.INPUT_REQUEST_STATE_PENDING
        fresh = Consistency(at_least_as_fresh=[self.tokens.get(promise.task_id, "")])

        async def look() -> list[InputRequest] | None:
            request = sessions_pb2.ListInputRequestsRequest(
                organization_id=self.organization_id, task_ids=[promise.task_id]
            )
            answer = await insist(lambda: self.client.sessions.ListInputRequests(request, timeout=5))
            assert answer is not None
            asked = [one for one in answer.input_requests if one.state == pending]
            over = rests(await get_task(self.client, promise.task_id, fresh))
            return asked or ([InputRequest()] if over else None)

        try:
            (question, *_) = await eventually(look, _REST_SECONDS)
        except TimeoutError:
            self.stuck.append(f"no question in {promise.task_id}")
            return None
        return question if question.id else None

    async def _rest(self, task_id: str) -> bool:
        """Wait until the task rests; provision it anew if it must be. Return whether it takes messages."""

        async def look() -> Task | None:
            fresh = Consistency(at_least_as_fresh=[self.tokens.get(task_id, "")])
            task = await get_task(self.client, task_id, fresh)
            return task if rests(task) else None

        try:
            task = await eventually(look, _REST_SECONDS)
        except TimeoutError:
            self.stuck.append(f"does not come to rest: {await get_task(self.client, task_id)}")
            return False
        if task.state == tasks_pb2.TASK_STATE_FAILED and self.chance.random() < 0.5:
            request = tasks_pb2.RetryProvisioningRequest(request_id=str(uuid.uuid4()), task_id=task_id)
            if await self._twice(self.client.tasks.RetryProvisioning, request) is not None:
                return await self._rest(task_id)
        return True

    async def _twice(self, method: Any, request: Any) -> Any:
        """Give a command, sometimes twice at the same moment; both answers must be one."""
        if self.chance.random() < 0.5:
            answer: Any = await insist(lambda: method(request, timeout=5))
            return self._seen(request, answer)
        one, other = await asyncio.gather(
            insist(lambda: method(request, timeout=5)), insist(lambda: method(request, timeout=5))
        )
        if one is not None and other is not None:
            assert one == other, f"one command, two answers: {one} {other}"
        return self._seen(request, one or other)

    def _seen(self, request: Any, answer: Any) -> Any:
        token = getattr(answer, "consistency_token", "")
        self.acknowledged.set()
        if token:
            self.tokens[getattr(request, "task_id", "") or answer.task.id] = token
        return answer


def _say_all(words: list[str]) -> str:
    return "\n".join(f"say {word}\nwait 0.1" for word in words)


def rests(task: Task) -> bool:
    """Say whether nothing is under way in a task."""
    return task.state in RESTING or task.activity in RESTING_ACTIVITIES


async def get_task(client: Client, task_id: str, consistency: Consistency | None = None) -> Task:
    request = tasks_pb2.GetTaskRequest(task_id=task_id, consistency=consistency)
    answer = await insist(lambda: client.tasks.GetTask(request, timeout=5))
    assert answer is not None
    return answer.task


async def sessions(client: Client, task_id: str) -> list[sessions_pb2.Session]:
    request = sessions_pb2.ListSessionsRequest(task_id=task_id, page_size=1000)
    answer = await insist(lambda: client.sessions.ListSessions(request, timeout=5))
    assert answer is not None
    return list(answer.sessions)


async def transcript(client: Client, task_id: str, session_id: str) -> list[TranscriptEntry]:
    """Return the whole transcript of a session."""
    entries: list[TranscriptEntry] = []
    request = sessions_pb2.ListTranscriptEntriesRequest(task_id=task_id, session_id=session_id, page_size=1000)
    while True:
        answer = await insist(lambda: client.sessions.ListTranscriptEntries(request, timeout=5))
        assert answer is not None
        entries += answer.entries
        request.page_token = answer.next_page_token
        if not request.page_token:
            return entries
