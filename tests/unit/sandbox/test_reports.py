"""What a sandbox tells of its agents."""

import asyncio
from typing import Any

from branchline.v1 import agents_pb2
from branchline.v1.agents_pb2 import Agent, AgentCapabilities, AgentMode, AgentModel
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport

from services.runtime.database import Database
from services.runtime.limits import ENTITY_BYTES
from services.runtime.spine.outbox import COORDINATOR, Outbox
from services.sandbox.reports import Reports

READY = agents_pb2.AGENT_AVAILABILITY_READY


async def told(outbox: Outbox) -> list[AgentReport]:
    line = outbox.line(COORDINATOR)
    line.fall_behind()
    return [AgentReport.FromString(row.payload) for row in await asyncio.wait_for(line.take(10), 5)]


async def test_what_a_session_lists_is_added_to_what_the_sandbox_knows(
    database: Database, reports: Reports, outbox: Outbox
) -> None:
    known = Agent(id="mock", availability=READY, capabilities=AgentCapabilities(permissions=True))
    await database.write(reports.learn, "sbx_1", "task_1", [known, Agent(id="other", availability=READY)])
    listed = Agent(id="mock", models=[AgentModel(id="swift")], capabilities=AgentCapabilities(images=True))
    await database.write(reports.learn, "sbx_1", "task_1", [listed])
    [report] = await told(outbox)
    mock, other = report.agents
    assert (report.revision, list(report.sandbox_providers)) == (2, ["local"])
    assert (mock.availability, [model.id for model in mock.models]) == (READY, ["swift"])
    assert (mock.capabilities.permissions, mock.capabilities.images) == (True, True)
    assert (other.id, other.display_name) == ("other", "other")


async def test_what_is_no_news_is_not_told(database: Database, reports: Reports, outbox: Outbox) -> None:
    for _ in range(3):
        await database.write(reports.learn, "sbx_1", "task_1", [Agent(id="mock", availability=READY)])
    [report] = await told(outbox)
    assert report.revision == 1


async def test_a_report_is_never_larger_than_an_entity(database: Database, reports: Reports, outbox: Outbox) -> None:
    words: dict[str, Any] = {"display_name": "n" * 256, "description": "d" * 512}
    agents = [
        Agent(
            id=f"agent{number}",
            models=[AgentModel(id=f"{one:0128}", **words) for one in range(64)],
            modes=[AgentMode(id=f"{one:0128}", **words) for one in range(32)],
        )
        for number in range(20)
    ]
    await database.write(reports.learn, "sbx_1", "task_1", agents)
    [report] = await told(outbox)
    assert report.ByteSize() <= ENTITY_BYTES
    assert len(report.agents[0].models) == 64
