"""What each sandbox tells of its agents: those that it knows, and what they listed when a session was opened."""

from collections.abc import Sequence
from dataclasses import dataclass

from branchline.v1.agents_pb2 import (
    AGENT_AVAILABILITY_INSTALLED_ON_FIRST_USE,
    AGENT_AVAILABILITY_READY,
    Agent,
    AgentCapabilities,
)
from branchline.v1.common_pb2 import ENTITY_KIND_SANDBOX
from branchline_internal.sandbox.v1.sandbox_pb2 import AgentReport

from services.runtime.clock import Clock
from services.runtime.database import Database, Tx
from services.runtime.limits import ENTITY_BYTES
from services.runtime.logging import get_logger
from services.runtime.spine.outbox import Mark, Outbox
from services.runtime.spine.resources import Resources
from services.sandbox.agent_server import AgentInfo, AgentServer
from services.sandbox.tables import agent_reports
from services.sandbox.words import head

log = get_logger(__name__)

_MOST_AGENTS = 16
_ID_BYTES = 64

REPORTS = Resources(
    agent_reports,
    AgentReport,
    ENTITY_KIND_SANDBOX,
    lambda report: {"sandbox_id": report.sandbox_id, "task_id": report.task_id},
    key=("sandbox_id",),
)


@dataclass(frozen=True, slots=True)
class Reports:
    """The reports of all sandboxes. One is pushed when it says something new."""

    database: Database
    outbox: Outbox
    clock: Clock
    providers: Sequence[str]
    """Names of the sandbox providers of this installation."""

    async def tell(self, sandbox_id: str, task_id: str, server: AgentServer) -> None:
        """Tell which agents a sandbox knows."""
        known = [_known(info) for info in await server.agents() if len(info.name.encode()) <= _ID_BYTES]
        await self.database.write(self.learn, sandbox_id, task_id, known[:_MOST_AGENTS])

    def learn(self, tx: Tx, sandbox_id: str, task_id: str, told: Sequence[Agent]) -> None:
        """Take over what is told of agents; what is not told of them stays."""
        held = REPORTS.find(tx, sandbox_id) or AgentReport(sandbox_id=sandbox_id, task_id=task_id)
        report = AgentReport()
        report.CopyFrom(held)
        del report.sandbox_providers[:]
        report.sandbox_providers.extend(sorted(self.providers))
        for one in told:
            self._merge(report, one)
        _bound(report)
        if report == held:
            return
        report.revision += 1
        REPORTS.save(tx, [report])
        self.outbox.mark(tx, [Mark(sandbox_id, report.revision, report)])

    def _merge(self, report: AgentReport, told: Agent) -> None:
        agent = next((one for one in report.agents if one.id == told.id), None)
        if agent is None:
            if len(report.agents) >= _MOST_AGENTS:
                return
            agent = report.agents.add(id=told.id, display_name=told.id)
        before = agent.SerializeToString(deterministic=True)
        agent.availability = told.availability or agent.availability
        for name in ("models", "modes"):
            if getattr(told, name):
                agent.ClearField(name)
                getattr(agent, name).extend(getattr(told, name))
        if told.HasField("capabilities"):
            agent.capabilities.CopyFrom(_together(agent.capabilities, told.capabilities))
        if agent.SerializeToString(deterministic=True) != before or not agent.HasField("update_time"):
            agent.update_time.CopyFrom(self.clock.timestamp())


def _together(known: AgentCapabilities, told: AgentCapabilities) -> AgentCapabilities:
    """Return what an agent can do by what the server says of it and by what it says itself."""
    return AgentCapabilities(
        permissions=known.permissions or told.permissions,
        images=known.images or told.images,
        resume=known.resume or told.resume,
    )


def _known(info: AgentInfo) -> Agent:
    there = AGENT_AVAILABILITY_READY if info.installed else AGENT_AVAILABILITY_INSTALLED_ON_FIRST_USE
    can = AgentCapabilities(permissions="permissions" in info.capabilities, images="images" in info.capabilities)
    return Agent(id=info.name, availability=there, capabilities=can)


def _bound(report: AgentReport) -> None:
    """Leave out descriptions where all of them would be more than an entity holds."""
    if report.ByteSize() <= ENTITY_BYTES:
        return
    log.warning("descriptions of models are left out", sandbox=report.sandbox_id, size_bytes=report.ByteSize())
    for agent in report.agents:
        for one in (*agent.models, *agent.modes):
            one.description, one.display_name = "", head(one.display_name, _ID_BYTES)
