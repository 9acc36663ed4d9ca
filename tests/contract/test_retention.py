"""The feed shows as much of history as its organization wants."""

from pathlib import Path

from branchline.v1.common_pb2 import ENTITY_KIND_HISTORY_EVENT
from branchline.v1.history_pb2 import HistoryEvent
from branchline.v1.organizations_pb2 import Organization
from branchline.v1.users_pb2 import User

from services.organization.feed import FORGOTTEN_AT_ONCE
from services.organization.stores import Stores, open_stores
from services.runtime.clock import Clock
from services.runtime.database import Database, Tx, open_database
from services.runtime.spine.outbox import Outbox
from services.runtime.spine.tokens import Position
from services.runtime.spine.watch import Page
from tests.support.databases import migrated

DAY_SECONDS = 24 * 3600


async def caught_up(stores: Stores, scope: str, position: Position | None = None) -> list[Page]:
    return [page async for page in stores.index.catch_up(scope, [ENTITY_KIND_HISTORY_EVENT], position, "*")]


def found(tx: Tx, stores: Stores, days: tuple[int, ...]) -> str:
    organization = Organization(slug="acme", display_name="Acme")
    organization.settings.history_retention.FromSeconds(7 * DAY_SECONDS)
    stores.organizations.found(tx, organization, User(id="usr_1", display_name="One"))
    events: list[HistoryEvent] = []
    for sequence, old in enumerate(days, start=1):
        event = HistoryEvent(id=f"evt_{old}", organization_id=organization.id, sequence=sequence)
        event.event_time.FromSeconds(int(stores.feed.clock.seconds()) - old * DAY_SECONDS)
        events.append(event)
    stores.feed.take(tx, events)
    return organization.id


async def opened(folder: Path) -> tuple[Database, Stores]:
    database = open_database(migrated("organization", folder))
    await database.start()
    stores = open_stores(database, Outbox(database, Clock()), Clock())
    await stores.index.start()
    return database, stores


async def test_events_older_than_the_retention_leave_the_feed_and_their_resume_tokens_with_them(
    tmp_path: Path,
) -> None:  # HIS-3
    database, stores = await opened(tmp_path)
    scope = await database.write(found, stores, (30, 8, 6, 0))
    before = (await caught_up(stores, scope))[-1].position
    assert before is not None

    await stores.feed.expire(database)

    snapshot = await caught_up(stores, scope)
    assert [change.id for page in snapshot for change in page.changes] == ["evt_6", "evt_0"]
    oldest = await caught_up(stores, scope, Position(before.epoch, 1))
    assert oldest[0].reset
    newest = await caught_up(stores, scope, before)
    assert not any(page.reset for page in newest)
    await database.close()


async def test_a_long_feed_expires_in_bounded_steps(tmp_path: Path) -> None:
    database, stores = await opened(tmp_path)
    scope = await database.write(found, stores, tuple(range(400, 400 + FORGOTTEN_AT_ONCE + 20)))
    commits = database.commits

    await stores.feed.expire(database)

    assert database.commits - commits >= 2
    assert [change for page in await caught_up(stores, scope) for change in page.changes] == []
    await database.close()
