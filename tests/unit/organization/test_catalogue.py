"""The catalogue of agents: merged from reports, written where they say something new, and what is asked for checked."""

from typing import Any

import pytest
from branchline.v1.agents_pb2 import Agent, AgentCapabilities, AgentMode, AgentModel, ListAgentsRequest
from branchline.v1.common_pb2 import ENTITY_KIND_AGENT
from branchline.v1.organizations_pb2 import Organization
from branchline.v1.sessions_pb2 import SessionOptions
from branchline.v1.tasks_pb2 import SandboxOptions
from branchline_internal.organization.v1.organization_pb2 import CheckOptionsRequest
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport

from services.organization.catalogue import MOST_AGENTS
from services.organization.public_reads import PublicAgentReader
from services.runtime.errors import InvalidArgument
from tests.unit.organization.conftest import Calling, Room, summary

CONTEXT: Any = Calling()


def agent(name: str = "mock", *, at: int = 1, models: str = "", modes: str = "", **fields: Any) -> Agent:
    told = Agent(id=name, display_name=name.title(), **fields)
    told.models.extend(AgentModel(id=one) for one in models.split())
    told.modes.extend(AgentMode(id=one) for one in modes.split())
    told.update_time.seconds = at
    return told


async def report(room: Room, *agents: Agent, sandbox: str = "sbx_1", task: int = 1, providers: str = "") -> None:
    state = AgentReport(sandbox_id=sandbox, task_id=f"task_{task:06}", agents=agents, revision=1)
    state.sandbox_providers.extend(providers.split())
    await room.push_as(sandbox, state)


async def agents_of(room: Room, organization_id: str) -> dict[str, Agent]:
    found: dict[str, Agent] = {}
    token = ""
    while True:
        request = ListAgentsRequest(organization_id=organization_id, page_size=2, page_token=token)
        answer = await PublicAgentReader(room.database, room.stores).ListAgents(request, CONTEXT)
        found |= {one.id: one for one in answer.agents}
        token = answer.next_page_token
        if not token:
            return found


async def place(room: Room, slug: str = "acme", task: int = 1) -> Organization:
    organization = await room.found(slug)
    await room.push((summary(organization.id, "repo_1", task), False))
    return organization


async def test_reports_of_several_sandboxes_are_one_catalogue(room: Room) -> None:
    organization = await place(room)
    other = await place(room, "other", task=2)
    await report(room, agent("mock", models="small"), agent("claude"))
    await report(room, agent("codex", at=5), agent("mock", at=5, modes="plan"), sandbox="sbx_2")
    await report(room, agent("secret"), sandbox="sbx_3", task=2)

    found = await agents_of(room, organization.id)
    assert sorted(found) == ["claude", "codex", "mock"]
    assert [one.id for one in found["mock"].models] == ["small"]  # a report that lists none says nothing of them
    assert [one.id for one in found["mock"].modes] == ["plan"]
    assert found["mock"].organization_id == organization.id
    assert sorted(await agents_of(room, other.id)) == ["secret"]


async def test_what_says_nothing_new_or_is_older_is_not_written(room: Room) -> None:
    organization = await place(room)
    await report(room, agent(at=10, models="large small", capabilities=AgentCapabilities(images=True)))
    before = room.stores.index
    (page,) = [one async for one in before.catch_up(organization.id, [ENTITY_KIND_AGENT], None, "*", tail=True)]

    await report(room, agent(at=20, models="large small"))
    await report(room, agent(at=5, models="old"), sandbox="sbx_2")
    unchanged = (await agents_of(room, organization.id))["mock"]
    await report(room, agent(at=30, models="large"))
    changed = (await agents_of(room, organization.id))["mock"]

    assert (unchanged.revision, unchanged.update_time.seconds) == (1, 10)
    assert (changed.revision, [one.id for one in changed.models]) == (2, ["large"])
    assert changed.capabilities.images
    pages = before.catch_up(organization.id, [ENTITY_KIND_AGENT], page.position, "*")
    assert [change.revision async for one in pages for change in one.changes] == [2]


async def test_reports_of_unknown_tasks_and_beyond_the_bound_are_passed_over(room: Room) -> None:
    organization = await place(room)
    await report(room, agent("lost"), task=77)
    await report(room, *(agent(f"a-{number:04}") for number in range(MOST_AGENTS + 5)), agent(""))
    assert len(await agents_of(room, organization.id)) == MOST_AGENTS


async def check(room: Room, organization_id: str, provider: str = "", **session: str) -> None:
    request = CheckOptionsRequest(
        organization_id=organization_id, session=SessionOptions(**session), sandbox=SandboxOptions(provider=provider)
    )
    await room.internal.CheckOptions(request, CONTEXT)


async def test_what_is_asked_for_is_checked_where_something_is_known(room: Room) -> None:
    organization = await place(room)
    await check(room, organization.id, "anything", agent="anything", model="any", mode="any")
    await report(room, agent(models="large small", modes="plan"), agent("bare"), providers="local docker")

    for known in ({"agent": "mock", "model": "small", "mode": "plan"}, {"agent": "bare", "model": "any"}, {}):
        await check(room, organization.id, "docker", **known)
    for wrong, field in (
        ({"agent": "none"}, "session.agent"),
        ({"agent": "mock", "model": "none"}, "session.model"),
        ({"agent": "mock", "mode": "none"}, "session.mode"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await check(room, organization.id, **wrong)
        assert (refused.value.reason, refused.value.metadata["field"]) == ("AGENT_UNKNOWN", field)
    with pytest.raises(InvalidArgument) as refused:
        await check(room, organization.id, "cloud")
    told = {"field": "sandbox.provider", "provider": "cloud", "providers": "docker, local"}
    assert (refused.value.reason, refused.value.metadata) == ("PROVIDER_UNKNOWN", told)


async def test_an_unknown_agent_is_told_with_those_that_are(room: Room) -> None:
    organization = await place(room)
    await report(room, agent("mock"), agent("claude"))
    with pytest.raises(InvalidArgument) as refused:
        await check(room, organization.id, agent="cluade")
    assert refused.value.metadata == {"field": "session.agent", "agent": "cluade", "agents": "claude, mock"}
