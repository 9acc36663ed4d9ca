"""What a turn costs the databases of the rooms below the task, counted exactly on both databases."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from branchline.v1 import sessions_pb2, transcripts_pb2
from branchline.v1.agents_pb2 import Agent
from branchline.v1.common_pb2 import Actor, Prompt
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.transcripts_pb2 import (
    InputAnswer,
    InputRequest,
    InputRequestState,
    PermissionOption,
    PermissionRequest,
    TranscriptEntry,
)
from branchline_internal.sandbox.v1.sandbox_pb2 import StartTurnRequest
from sqlalchemy import MetaData

from services.history.store import HistoryStore
from services.history.tables import metadata as history_tables
from services.runtime.clock import Clock
from services.runtime.database import Database, open_database
from services.runtime.spine.outbox import Outbox
from services.sandbox.offers import Offer
from services.sandbox.questions import Asked
from services.sandbox.records import Place, Progress
from services.sandbox.sessions import SessionStore
from services.sandbox.tables import metadata as sandbox_tables
from services.sandbox.transcript import Draft
from tests.support.databases import Databases


@asynccontextmanager
async def started(databases: Databases, tables: MetaData) -> AsyncGenerator[Database]:
    database = open_database(databases.make(tables))
    await database.start()
    try:
        yield database
    finally:
        await database.close()


def counter(database: Database) -> Callable[[], int]:
    """Return what tells how many statements were run since it was asked last."""
    seen = database.statements

    def since() -> int:
        nonlocal seen
        before, seen = seen, database.statements
        return seen - before

    return since


PLACE = Place("ses_1", "sbx_1", "task_1", "org_1", "mock")


def begins(turn: int, text: str) -> StartTurnRequest:
    return StartTurnRequest(session_id="ses_1", turn=turn, prompt=Prompt(text=text))


def asked(
    request_id: str,
    rpc_id: str,
    state: InputRequestState.ValueType = transcripts_pb2.INPUT_REQUEST_STATE_PENDING,
    revision: int = 1,
) -> Asked:
    permission = PermissionRequest(options=[PermissionOption(id="allow")])
    request = InputRequest(id=request_id, session_id="ses_1", state=state, permission=permission, revision=revision)
    return Asked(request, rpc_id)


def event(number: int, organization_id: str = "org_1") -> HistoryEvent:
    return HistoryEvent(id=f"evt_{organization_id}_{number}", organization_id=organization_id)


async def test_events_of_a_feed_take_three_statements_however_many(databases: Databases) -> None:  # C5
    async with started(databases, history_tables) as database:
        store = HistoryStore(Outbox(database, Clock()))
        await database.write(store.append, [event(1)])
        taken = counter(database)

        await database.write(store.append, [event(2), event(3)])
        few = taken()
        await database.write(store.append, [event(number) for number in range(4, 60)])

        assert (few, taken()) == (3, 3)  # the feed's numbers, the events, the outbox
        page = await database.read(store.page, "org_1", 0)
        assert [(one.id, one.sequence) for one in page] == [(f"evt_org_1_{n}", n) for n in range(1, 60)]


async def test_events_that_come_again_take_no_numbers_of_a_feed(databases: Databases) -> None:  # F26
    async with started(databases, history_tables) as database:
        store = HistoryStore(Outbox(database, Clock()))
        await database.write(store.append, [event(1), event(2), event(1, "org_2")])

        await database.write(store.append, [event(2), event(3), event(3), event(1), event(4), event(1, "org_2")])
        await database.write(store.append, [event(5), event(2, "org_2")])

        for organization_id, last in (("org_1", 5), ("org_2", 2)):
            page = await database.read(store.page, organization_id, 0)
            numbers = range(1, last + 1)
            assert [(one.id, one.sequence) for one in page] == [(f"evt_{organization_id}_{n}", n) for n in numbers]


async def test_a_turn_takes_six_statements_until_its_agent_has_it(databases: Databases) -> None:  # C5
    async with started(databases, sandbox_tables) as database:
        clock = Clock()
        sessions = SessionStore(Outbox(database, clock), clock.timestamp)
        begun = await database.write(sessions.begin, PLACE)
        offer = Offer(Agent(id="mock"), "swift", "code")
        await database.write(sessions.agent_opened, begun, "acp", "1/1/1.0", offer)
        taken = counter(database)

        await database.write(sessions.start_turn, begins(1, "go"), 10.0)
        found = await database.read(sessions.opened, "ses_1")
        assert found is not None
        record = found.record
        await database.write(sessions.post, record, 1, 1001, 5)
        said = Progress(1, 0, accepted=True, drafts=(), asked=(), state=record.state)
        await database.write(sessions.progress, record, said)

        assert taken() == 6
        assert found.prompt is not None
        assert (found.prompt.prompt.text, found.offer) == ("go", offer)
        assert (await database.read(sessions.get, "ses_1")).accepted


async def test_what_is_opened_has_its_entries_and_of_its_questions_the_open_ones(databases: Databases) -> None:
    async with started(databases, sandbox_tables) as database:
        clock = Clock()
        sessions = SessionStore(Outbox(database, clock), clock.timestamp)
        await database.write(sessions.begin, PLACE)
        await database.write(sessions.start_turn, begins(1, "go"), 10.0)
        record = await database.read(sessions.get, "ses_1")
        ids = [f"ent_1_{number}" for number in (1, 2, 3)]
        drafts = [Draft(TranscriptEntry(id=one, session_id="ses_1"), number) for number, one in enumerate(ids)]
        asks = [asked(f"inp_{number}", str(number)) for number in (7, 8, 9)]
        said = Progress(1, 3, accepted=True, drafts=drafts, asked=asks, state=sessions_pb2.SESSION_STATE_WAITING)
        await database.write(sessions.progress, record, said)
        over = asked("inp_9", "9", transcripts_pb2.INPUT_REQUEST_STATE_CANCELLED, 2)
        later = Progress(2, 3, accepted=True, drafts=(), asked=(over,), state=sessions_pb2.SESSION_STATE_WAITING)
        await database.write(sessions.progress, record, later)
        answer = InputAnswer(option_id="allow")
        assert await database.write(sessions.questions.answer, "ses_1", "inp_8", answer, Actor(user_id="usr_ada"))

        found = await database.read(sessions.opened, "ses_1")
        await database.write(sessions.start_turn, begins(2, "on"), 20.0)

        assert found is not None
        assert list(found.drafts) == ids
        held = sorted((one.request.id, one.rpc_id, one.request.answer.option_id) for one in found.asked)
        assert held == [("inp_7", "7", ""), ("inp_8", "8", "allow")]
        assert await database.read(sessions.questions.asked, "ses_1") == []  # a turn that cuts another off leaves none
