"""The engine of durable workflows, with a database that is away when it starts."""

from pathlib import Path

import pytest
from dbos import DBOS
from sqlalchemy.exc import OperationalError

from services.runtime.database import DatabaseUnavailable
from services.runtime.workflows import WorkflowEngine
from tests.support.databases import server


@DBOS.workflow(name="test.answer")
async def answer() -> str:
    return "done"


async def test_an_engine_whose_server_is_away_starts_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = WorkflowEngine(f"postgresql://task@/task?host={tmp_path}")
    with pytest.raises(DatabaseUnavailable):
        await away.start()
    await away.stop()

    def gone() -> None:
        launch()
        raise OperationalError("", None, ConnectionError("the server is gone again"))

    engine, launch = WorkflowEngine(server().create("of_an_engine")), DBOS.launch
    with monkeypatch.context() as patched:
        patched.setattr(DBOS, "launch", gone)
        with pytest.raises(DatabaseUnavailable):
            await engine.start()
    await engine.start()
    try:
        handle = await DBOS.start_workflow_async(answer)
        assert await handle.get_result() == "done"
        assert (await engine.outcomes([handle.workflow_id]))[handle.workflow_id].live is False
    finally:
        await engine.stop()
