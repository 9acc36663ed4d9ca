"""The feed shows as much of history as its organization wants."""

from pathlib import Path

from branchline.resource.v1.history_pb2 import HistoryEvent
from branchline.resource.v1.organization_pb2 import Organization
from sqlalchemy import create_engine

from services.organization.store import OrganizationStore
from services.organization.tables import HISTORY, WATCHED, metadata, spine
from services.runtime.clock import Clock
from services.runtime.database import Database
from services.runtime.spine.index import Entry, Index

DAY_SECONDS = 24 * 3600.0


async def test_events_older_than_the_retention_leave_the_feed_and_their_resume_tokens_with_them(
    tmp_path: Path,
) -> None:  # HIS-3
    engine = create_engine(f"sqlite:///{tmp_path / 'organization.db'}")
    metadata.create_all(engine)
    engine.dispose()
    database, clock = Database(tmp_path / "organization.db"), Clock()
    index = Index(database, spine, [*WATCHED, HISTORY], clock)
    store = OrganizationStore(database, index, clock)
    organization = Organization(id="org_1", slug="acme", revision=1)
    organization.settings.history_retention_days = 7
    async with database.transaction() as tx:
        await store.save_organization(tx, organization)
        for sequence, days in enumerate((30, 8, 6, 0), start=1):
            columns = {
                "sequence": sequence,
                "event_time": clock.seconds() - days * DAY_SECONDS,
                "event_kind": "task.created",
                "actor_user_id": "",
                "repository_id": "",
                "branch": "",
            }
            event = HistoryEvent(id=f"evt_{days}", sequence=sequence)
            await index.put(tx, Entry(HISTORY.kind, "org_1", event.id, 1, event, columns=columns))
    before = await index.view("org_1", [HISTORY.kind])
    assert before is not None

    await store.expire_history()

    after = await index.view("org_1", [HISTORY.kind])
    assert after is not None
    assert [change.id for change in after.changes] == ["evt_6", "evt_0"]
    assert await index.view("org_1", [HISTORY.kind], after=(before.epoch, 1)) is None
    assert await index.view("org_1", [HISTORY.kind], after=(before.epoch, before.change_seq)) is not None
    await database.close()
