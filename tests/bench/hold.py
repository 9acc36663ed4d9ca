"""One caller, sandbox or organization misbehaves: how much slower are the others?

The same is thrown at a bare server of the floor. A call of ours does more than one of the floor even when nobody
misbehaves, and other rows bound that; so what is compared here is how many times slower the load makes others' calls,
ours against the floor's: (ours loaded / ours quiet) / (floor loaded / floor quiet), all measured in the same round. The
floor is measured quiet before and after each round: that is floor against floor.

Others' calls start by the clock, whether or not those before have ended: what holds them up shows in every call that it
holds up, and a measure takes no longer. A call that the server drops (of an overloaded one gRPC cancels some, whoever
makes them) is made again while its time goes on; one that has not ended in ten seconds counts as ten. How many were
dropped or did not end is a row of its own: none of ours may.
"""

import asyncio
import contextlib
import itertools
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from branchline.v1 import organizations_pb2, sessions_pb2, sessions_pb2_grpc, tasks_pb2, tasks_pb2_grpc
from branchline.v1.common_pb2 import Prompt
from branchline.v1.roles_pb2 import ROLE_MEMBER
from branchline.v1.sessions_pb2 import WHEN_BUSY_QUEUE, SessionOptions
from branchline.v1.tasks_pb2 import TASK_ACTIVITY_IDLE, Task
from branchline_internal.spine.v1 import push_pb2, push_pb2_grpc
from google.protobuf.message import Message

from cli.installation import SERVICES
from services.runtime.client import open_channel
from services.runtime.principal import Signer
from tests.bench.child import Child
from tests.bench.floor import GET, HANG, OPTIONS, PUSH, PUT, STREAM, WATCH
from tests.bench.installation import Installed, a_task, installed, task_id
from tests.bench.pipelines import Floor, floor
from tests.bench.result import NOISE, Figures, Options, Row, latencies
from tests.support.client import Client
from tests.support.processes import execute
from tests.support.stack import eventually, request_id

_OTHERS = 8
_READS_PER_SECOND = 100.0
"""Of all others together; as many writes."""

_CALLS_PER_MINUTE = "6000"
_SETTLE_SECONDS = 5.0
"""Time for a load to have its effect: queues and windows fill."""

_FULL_SECONDS = 15.0
"""After which nothing more can be sent to watchers that do not read: what they hold up from then on is measured."""

_REST_SECONDS = 1.0
_BETWEEN_SECONDS = 0.02
_DROPPED = "dropped"
_WORDS = 200
_LONGEST_SECONDS = 10.0
_START_SECONDS = 60.0
_AGAIN = (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)
"""What a dropped call looks like; the floor's gateway passes on what its upstream dropped as UNKNOWN."""

_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)

_FEW = 10
_BOUNDS = {"p50": 1.2, "p99": 2.0}

_DEAF = 1000
_FLOOD_PER_SECOND = 2000
_CHANGES_PER_SECOND = 50.0
_POISON_PER_SECOND = 20.0
_TURNS_PER_SECOND = 2.0
_SNAPSHOTS_PER_SECOND = 0.5
_FRAME_BYTES = 70_000
_FRAME_CHANGES = 200

EDGES = (
    ("sandbox", "task"),
    ("task", "repository"),
    ("repository", "organization"),
    ("user", "organization"),
    ("history", "organization"),
    ("github_data", "organization"),
)
"""Every child with its coordinator."""

Call = Callable[[], Awaitable[object]]


@dataclass(slots=True)
class Field:
    """What the misbehaving have at hand: their own task, organization and token, and the floor."""

    installation: Installed
    child: Child
    """Pushes changes of their organization's tasks."""
    task: Task
    low: Floor
    plain: Any
    """A channel to the floor's gateway."""

    async def start_load(self, stack: AsyncExitStack, *arguments: str) -> None:
        """Run a client that misbehaves until the stack ends."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.load", *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout
        stack.push_async_callback(process.wait)
        stack.callback(process.kill)
        async with asyncio.timeout(_START_SECONDS):
            await process.stdout.readline()


Load = Callable[[Field], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def _every(per_second: float, call: Call) -> AsyncGenerator[None, None]:
    """Make a call so often for the length of the block, whatever becomes of it."""

    async def once() -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call()

    async def loop() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                group.create_task(once())
                await asyncio.sleep(1 / per_second)

    task = asyncio.create_task(loop())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def _hanging_call(field: Field) -> AsyncGenerator[None, None]:
    hang = field.plain.unary_unary(HANG)
    async with _every(_TURNS_PER_SECOND, lambda: hang(b"")):
        yield


@asynccontextmanager
async def _messages(field: Field) -> AsyncGenerator[None, None]:
    """Give the agent something to do all the time."""

    async def send() -> None:
        await field.installation.client.sessions.SendMessage(
            sessions_pb2.SendMessageRequest(
                request_id=request_id(),
                task_id=field.task.id,
                session_id=field.task.sessions[0].id,
                prompt=Prompt(text="say something"),
                when_busy=WHEN_BUSY_QUEUE,
            )
        )

    async with _every(_TURNS_PER_SECOND, send):
        yield


async def _in_sandbox(field: Field, script: str) -> None:
    await execute(field.installation.client, field.task.id, "sh", "-c", script)


@asynccontextmanager
async def _git_hangs(field: Field) -> AsyncGenerator[None, None]:
    await _in_sandbox(field, "mv .git/HEAD .git/HEAD.kept && mkfifo .git/HEAD")
    try:
        async with _messages(field):
            yield
    finally:
        await _in_sandbox(field, "rm .git/HEAD && mv .git/HEAD.kept .git/HEAD")


@asynccontextmanager
async def _agent_stops(field: Field) -> AsyncGenerator[None, None]:
    sandbox_id = field.task.active_sandbox_id
    agents = [
        process
        for process in field.installation.processes.sandbox_processes()
        if sandbox_id in process.environ().get("HOME", "") and "scripted-agent" in " ".join(process.cmdline())
    ]
    assert agents, "the agent of the first turn still runs"
    for process in agents:
        process.send_signal(signal.SIGSTOP)
    try:
        async with _messages(field):
            yield
    finally:
        for process in agents:
            process.send_signal(signal.SIGCONT)


def _poison() -> push_pb2.PushRequest:
    """Return a batch of what no coordinator can take: of no known type, undecodable, or of something unknown."""
    request = push_pb2.PushRequest(child="poison", batch=1)
    of_task = f"type.googleapis.com/{Task.DESCRIPTOR.full_name}"
    for number, (url, value) in enumerate(
        (
            ("type.googleapis.com/nothing.Known", b""),
            (of_task, b"\xff" * 10),
            (of_task, Task(id="task_unknown", revision=1).SerializeToString()),
        )
    ):
        entry = request.entries.add(outbox_seq=number + 1, id=f"poison_{number}", revision=1)
        entry.state.type_url, entry.state.value = url, value
    return request


@asynccontextmanager
async def _pushing(call: Any, batch: Any) -> AsyncGenerator[None, None]:
    """Push the same batch all the time."""

    async def read() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    reading = asyncio.create_task(read())
    try:
        async with _every(_POISON_PER_SECOND, lambda: call.write(batch)):
            yield
    finally:
        call.cancel()
        await asyncio.wait([reading])


@asynccontextmanager
async def _poison_everywhere(field: Field) -> AsyncGenerator[None, None]:
    key = field.installation.processes.environment["BRANCHLINE_SIGNING_KEY"]
    async with AsyncExitStack() as stack:
        for name, coordinator in EDGES:
            channel = open_channel(coordinator, field.installation.address_of(coordinator), Signer(key, name))
            stack.push_async_callback(channel.close)
            stub: Any = push_pb2_grpc.PushServiceStub(channel)  # pyright: ignore[reportArgumentType]
            await stack.enter_async_context(_pushing(stub.Push(), _poison()))
        yield


@asynccontextmanager
async def _poison_at_the_floor(field: Field) -> AsyncGenerator[None, None]:
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(field.low.middle, options=OPTIONS))
        for _ in EDGES:
            push: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(PUSH)
            await stack.enter_async_context(_pushing(push(), _poison().SerializeToString()))
        yield


@asynccontextmanager
async def _changes(field: Field) -> AsyncGenerator[None, None]:
    """Change the tasks of the misbehaving organization, one after the other."""
    made = [
        a_task(field.installation.organization_id, field.installation.repository_id, number) for number in range(_FEW)
    ]
    revisions = itertools.count(time.time_ns() // 1000)
    tasks = itertools.cycle(made)

    async def change() -> None:
        task = next(tasks)
        task.revision = next(revisions)
        await field.child.commit([task])

    async with _every(_CHANGES_PER_SECOND, change):
        yield


@asynccontextmanager
async def _changes_at_the_floor(field: Field) -> AsyncGenerator[None, None]:
    ids = itertools.cycle(field.low.ids)
    async with _every(_CHANGES_PER_SECOND, lambda: field.low.commit([next(ids)])):
        yield


def _client(kind: str, method: str, request: Message, amount: float, *, changing: bool = False, most: int = 0) -> Load:
    """Return the load of a client of ours."""

    @asynccontextmanager
    async def load(field: Field) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as stack:
            request_bytes = _for(field, request).SerializeToString().hex()
            address, token = field.installation.address, field.installation.token
            full_name = f"/branchline.v1.{method}"
            await field.start_load(stack, kind, address, full_name, request_bytes, str(amount), token, str(most))
            if changing:
                await stack.enter_async_context(_changes(field))
            yield

    return load


def _plain_client(kind: str, method: str, request: bytes, amount: float, *, changing: bool = False) -> Load:
    """Return the same of the floor."""

    @asynccontextmanager
    async def load(field: Field) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as stack:
            await field.start_load(stack, kind, field.low.address, method, request.hex(), str(amount))
            if changing:
                await stack.enter_async_context(_changes_at_the_floor(field))
            yield

    return load


def _for(field: Field, request: Any) -> Any:
    """Return the request for the misbehaving organization."""
    made = type(request)()
    made.CopyFrom(request)
    if "organization_id" in request.DESCRIPTOR.fields_by_name:
        made.organization_id = field.installation.organization_id
    return made


async def hanging_git(options: Options, folder: Path) -> list[Row]:
    """Git hangs in a sandbox whose agent has turn after turn."""
    return await _hold("git hangs", options, folder, _git_hangs, _hanging_call)


async def stopped_agent(options: Options, folder: Path) -> list[Row]:
    """An agent's process is stopped while messages go on."""
    return await _hold("a stopped agent", options, folder, _agent_stops, _hanging_call)


async def poison(options: Options, folder: Path) -> list[Row]:
    """Entries that no coordinator can take come on every edge."""
    return await _hold("poison on every edge", options, folder, _poison_everywhere, _poison_at_the_floor)


async def deaf_watchers(options: Options, folder: Path) -> list[Row]:
    """A thousand clients watch a changing organization and never read."""
    watching = organizations_pb2.WatchOrganizationRequest()
    mine = _client("deaf", "OrganizationService/WatchOrganization", watching, _DEAF, changing=True)
    plain = _plain_client("deaf", WATCH, b"", _DEAF, changing=True)
    name = f"{_DEAF} watchers that never read"
    return await _hold(name, options, folder, mine, plain, settle_seconds=_FULL_SECONDS)


async def many_calls(options: Options, folder: Path) -> list[Row]:
    """One client makes thousands of calls a second."""
    mine = _client("calls", "TaskService/GetTask", tasks_pb2.GetTaskRequest(task_id=task_id(0)), _FLOOD_PER_SECOND)
    plain = _plain_client("calls", GET, b"500", _FLOOD_PER_SECOND)
    return await _hold(f"a client with {_FLOOD_PER_SECOND} calls/s", options, folder, mine, plain)


async def large_organization(options: Options, folder: Path) -> list[Row]:
    """An organization with very many tasks is opened again and again, and changes."""
    opening = organizations_pb2.WatchOrganizationRequest()
    frames = options.tasks // _FRAME_CHANGES
    watching = "OrganizationService/WatchOrganization"
    mine = _client("streams", watching, opening, _SNAPSHOTS_PER_SECOND, changing=True, most=frames)
    plain_opening = f"{frames} {_FRAME_BYTES}".encode()
    plain = _plain_client("streams", STREAM, plain_opening, _SNAPSHOTS_PER_SECOND, changing=True)
    name = f"{options.tasks} tasks beside {_FEW}"
    return await _hold(name, options, folder, mine, plain, tasks=options.tasks)


async def _hold(
    name: str,
    options: Options,
    folder: Path,
    mine: Load,
    plain: Load,
    *,
    tasks: int = _FEW,
    settle_seconds: float | None = None,
) -> list[Row]:
    settle = min(_SETTLE_SECONDS, options.seconds) if settle_seconds is None else settle_seconds
    found: list[dict[str, Figures]] = []
    async with _field(folder, tasks) as (field, ours, low):

        async def loaded(load: Load, callers: Callers) -> Figures:
            async with load(field):
                await asyncio.sleep(settle)
                figures = await _others(callers, options.samples)
            await asyncio.sleep(_REST_SECONDS)
            return figures

        quiet = await _others(low, options.samples)
        for _ in range(options.rounds):
            measured = {"floor, quiet": quiet, "floor, loaded": await loaded(plain, low)}
            measured["ours, quiet"] = await _others(ours, options.samples)
            measured["ours, loaded"] = await loaded(mine, ours)
            measured["floor, quiet again"] = quiet = await _others(low, options.samples)
            found.append(measured)
    dropped = [sum(one[f"{side}, loaded"].pop(_DROPPED) for one in found) for side in ("ours", "floor")]
    rows = [row for figure in found[0]["ours, loaded"] for row in _rows(name, figure, found)]
    return [*rows, Row(f"{name}: others' calls dropped", "", dropped[0], dropped[1], dropped[0], 0.0)]


def _rows(name: str, figure: str, rounds: Sequence[dict[str, Figures]]) -> list[Row]:
    def median(over: str, under: str) -> float:
        return statistics.median(one[over][figure] / one[under][figure] for one in rounds)

    spread = median("floor, quiet again", "floor, quiet")
    spread = max(spread, 1 / spread)
    slower = [_times_slower({side: figures[figure] for side, figures in one.items()}) for one in rounds]
    mine, low = (statistics.median(both) for both in zip(*slower, strict=True))
    ratio = statistics.median(ours / floors for ours, floors in slower)
    bound = _BOUNDS[figure.rpartition(" ")[2]]
    title = f"{name}: others' {figure}"
    return [
        Row(title, "times slower", mine, low, ratio, bound, counts=spread <= NOISE),
        Row(f"{title}: floor against floor", "", spread, 1.0, spread, NOISE),
    ]


def _times_slower(of: Figures) -> tuple[float, float]:
    """Return how many times slower the load makes a call: ours, and the floor's."""
    floor_quiet = (of["floor, quiet"] + of["floor, quiet again"]) / 2
    return of["ours, loaded"] / of["ours, quiet"], of["floor, loaded"] / floor_quiet


async def _others(callers: "Callers", count: int) -> Figures:
    """Have well-behaved callers read and write so often, by the clock; return the latencies of both."""
    took: dict[str, list[float]] = {"reads": [], "writes": []}
    dropped = Counter[str]()

    async def one(call: Call, pause: float, kept: list[float]) -> None:
        await asyncio.sleep(pause)
        began = time.perf_counter()
        while (left := began + _LONGEST_SECONDS - time.perf_counter()) > 0:
            try:
                async with asyncio.timeout(left):
                    await call()
                break
            except TimeoutError:
                dropped["no end"] += 1
                break
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AGAIN:
                    raise
                dropped[f"{error.code().name} {error.details()}"[:_WORDS]] += 1
                await asyncio.sleep(_BETWEEN_SECONDS)
        kept.append(min(time.perf_counter() - began, _LONGEST_SECONDS))

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            read, write = callers[number % len(callers)]
            pause = number / _READS_PER_SECOND
            group.create_task(one(read, pause, took["reads"]))
            group.create_task(one(write, pause + 0.5 / _READS_PER_SECOND, took["writes"]))
    found = {f"{kind} {name}": value for kind, seconds in took.items() for name, value in latencies(seconds).items()}
    if dropped:
        print(*dropped.most_common(3), sep="\n", file=sys.stderr)
    return {**found, _DROPPED: dropped.total()}


Callers = list[tuple[Call, Call]]


@asynccontextmanager
async def _field(folder: Path, tasks: int) -> AsyncGenerator[tuple[Field, Callers, Callers], None]:
    """Run Branchline and the floor, with a task that misbehaves and others in another organization."""
    settings = {"BRANCHLINE_GATEWAY__CALLS_PER_MINUTE": _CALLS_PER_MINUTE}
    async with AsyncExitStack() as stack:
        low = await stack.enter_async_context(floor(folder / "floor", _FEW))
        installation = await stack.enter_async_context(
            installed(folder / "ours", tasks, services=SERVICES, settings=settings)
        )
        child = await stack.enter_async_context(installation.child("task", "repository"))
        plain = await stack.enter_async_context(grpc.aio.insecure_channel(low.address, options=OPTIONS))
        task = await _ready_task(installation, installation.repository_id)
        await _first_turn(installation, task)
        task = (await installation.client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id))).task
        theirs = await _ready_task(installation, installation.other_repository_id)
        callers = [await _caller(installation, stack, theirs) for _ in range(_OTHERS)]
        plain_callers = [await _plain_caller(low, stack, number) for number in range(_OTHERS)]
        yield Field(installation, child, task, low, plain), callers, plain_callers


async def _plain_caller(low: Floor, stack: AsyncExitStack, number: int) -> tuple[Call, Call]:
    """Return the calls of somebody at the floor: read some bytes, write a row."""
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(low.address, options=OPTIONS + _OWN_CONNECTION))
    get: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(GET)
    put: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(PUT)
    return (lambda: get(b"500")), (lambda: put(b"%36d" % number + bytes(464)))


async def _ready_task(installation: Installed, repository_id: str) -> Task:
    request = tasks_pb2.CreateTaskRequest(
        request_id=request_id(),
        repository_id=repository_id,
        prompt=Prompt(text="say hello"),
        session=SessionOptions(agent="mock"),
        hold_prompt=True,
    )
    made = (await installation.client.tasks.CreateTask(request)).task
    return await _until_idle(installation, made, 0)


async def _first_turn(installation: Installed, task: Task) -> None:
    request = sessions_pb2.SendMessageRequest(
        request_id=request_id(), task_id=task.id, session_id=task.sessions[0].id, prompt=Prompt(text="say hello")
    )
    await installation.client.sessions.SendMessage(request)
    await _until_idle(installation, task, 1)


async def _until_idle(installation: Installed, task: Task, turn: int) -> Task:
    async def look() -> Task | None:
        listed = await installation.client.sessions.ListSessions(sessions_pb2.ListSessionsRequest(task_id=task.id))
        if not listed.sessions or listed.sessions[0].turn < turn:  # it is told no later than the task
            return None
        found = (await installation.client.tasks.GetTask(tasks_pb2.GetTaskRequest(task_id=task.id))).task
        return found if found.activity == TASK_ACTIVITY_IDLE else None

    return await eventually(look)


async def _caller(installation: Installed, stack: AsyncExitStack, task: Task) -> tuple[Call, Call]:
    """Return the calls of a person of the other organization: read its task, rename the task's session."""
    email = f"{request_id()}@example.com"
    inviting = organizations_pb2.InviteMemberRequest(
        request_id=request_id(), organization_id=installation.other_organization_id, email=email, role=ROLE_MEMBER
    )
    invited = await installation.client.organizations.InviteMember(inviting)
    accepting = organizations_pb2.AcceptInvitationRequest(
        request_id=request_id(), code=invited.code, display_name="Someone", email=email
    )
    async with Client(installation.address) as newcomer:
        accepted = await newcomer.organizations.AcceptInvitation(accepting)
    metadata = (("authorization", f"Bearer {accepted.secret}"),)
    channel = await stack.enter_async_context(
        grpc.aio.insecure_channel(installation.address, options=OPTIONS + _OWN_CONNECTION)
    )
    tasks: Any = tasks_pb2_grpc.TaskServiceStub(channel)
    sessions: Any = sessions_pb2_grpc.SessionServiceStub(channel)
    reading = tasks_pb2.GetTaskRequest(task_id=task.id)
    numbers = itertools.count()

    def write() -> Awaitable[object]:
        request = sessions_pb2.UpdateSessionRequest(
            request_id=request_id(),
            session=sessions_pb2.Session(id=task.sessions[0].id, task_id=task.id, display_name=f"Name {next(numbers)}"),
        )
        return sessions.UpdateSession(request, metadata=metadata)

    return (lambda: tasks.GetTask(reading, metadata=metadata)), write
