"""Finds what is stuck in a passing state, and moves it on or says why not: at start and every minute."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from branchline.v1 import common_pb2
from branchline.v1.common_pb2 import Failure
from branchline_internal.sandbox.v1.sandbox_pb2 import OpenSessionRequest, StartTurnRequest

from services.runtime.database import Database, Tx
from services.runtime.failures import failed
from services.runtime.logging import get_logger
from services.runtime.loops import for_each
from services.runtime.spine.outbox import Outbox
from services.runtime.workflows import Outcome, WorkflowEngine
from services.task.destinations import TO_SANDBOX
from services.task.downward import Downward
from services.task.lifecycle import PROVISION
from services.task.machine import Deadlines
from services.task.open_task import OpenTask
from services.task.store import SWEEP_ROWS, TaskStore
from services.task.turns import Turns
from services.task.workflows import TaskWorkflows, broken, workflow_id

log = get_logger(__name__)

SWEEP_SECONDS = 60.0
_MARGIN_SECONDS = 900.0
_START_SECONDS = 1800.0
"""How long a workflow may take to begin before provisioning fails."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What the task service looks for."""

    database: Database
    store: TaskStore
    outbox: Outbox
    turns: Turns
    downward: Downward
    workflows: TaskWorkflows
    engine: WorkflowEngine
    deadlines: Deadlines

    async def run(self) -> None:
        """Look once. No look, and nothing that it finds, holds up another."""
        looks = (self.revive_workflows, self.end_refused_turns, self.end_lost_turns)
        await for_each(looks, "sweep", lambda look: look())

    async def forget_old(self) -> None:
        """Forget what ended long ago."""
        await self.engine.forget_old()

    async def revive_workflows(self) -> None:
        """Find tasks that have waited for a workflow since the last look though it does not run."""
        before = self.store.clock.seconds() - SWEEP_SECONDS
        waiting = await self.database.read(self.store.waiting_for_workflow, before)
        ids = [workflow_id(task) for task in waiting]
        outcomes: Mapping[str, Outcome] = await self.engine.outcomes(ids) if ids else {}
        await for_each(
            waiting, "look after a workflow", lambda task: self._revive(task, outcomes.get(workflow_id(task)))
        )

    async def _revive(self, task: OpenTask, outcome: Outcome | None) -> None:
        task_id, attempt = task.task.id, task.row.attempt
        if outcome is not None and outcome.live:
            await self.database.write(self._look_later, task_id, attempt)
            return
        log.warning("a task waits for a workflow that does not run", task=task_id, workflow=workflow_id(task))
        waited = self.store.clock.seconds() - task.task.state_time.ToNanoseconds() / 1e9
        if outcome is not None and task.row.workflow == PROVISION:
            await self.database.write(self.workflows.fail_provisioning, task_id, attempt, broken(outcome.reason))
        elif task.row.workflow == PROVISION and waited > _START_SECONDS:
            failure = broken("it could not be started")
            await self.database.write(self.workflows.fail_provisioning, task_id, attempt, failure)
        else:
            await self.database.write(self._start_again, task_id, attempt, outcome)

    def _look_later(self, tx: Tx, task_id: str, attempt: int) -> None:
        with self.store.open(tx, task_id) as task:
            if task.row.attempt == attempt:
                task.row.workflow_time, task.row.touched = self.store.clock.seconds(), True

    def _start_again(self, tx: Tx, task_id: str, attempt: int, outcome: Outcome | None) -> None:
        """Start a workflow that never began, or a new one for one that ended before its task."""
        with self.store.open(tx, task_id) as task:
            if task.row.attempt != attempt:
                return
            if outcome is None:
                task.start_again()
            else:
                task.start(task.row.workflow)

    async def end_refused_turns(self) -> None:
        """End turns in failure, and sessions that wait to be opened, whose delivery to the sandbox was given up."""
        after = 0
        while True:
            parked = await self.outbox.listed(parked=True, destination=TO_SANDBOX, after_seq=after, most=SWEEP_ROWS)
            await for_each(parked, "end a refused turn", self._end_refused_turn)
            if len(parked) < SWEEP_ROWS:
                return
            after = parked[-1].seq

    async def _end_refused_turn(self, row: Any) -> None:
        if row.type_url.endswith(f"/{StartTurnRequest.DESCRIPTOR.full_name}"):
            failure = _not_taken("the sandbox did not take the message", row.parked_reason)
            await self.database.write(self.downward.end_turn, row.entity_id, row.revision, failure)
        elif row.type_url.endswith(f"/{OpenSessionRequest.DESCRIPTOR.full_name}"):
            failure = _not_taken("the agent could not be started", row.parked_reason)
            await self.database.write(self.downward.not_opened, row.entity_id, failure)

    async def end_lost_turns(self) -> None:
        """End turns in failure that have gone on for longer than any turn may: their end was lost."""
        hours = self.deadlines.turn_hours
        before = self.store.clock.seconds() - hours * 3600 - _MARGIN_SECONDS
        working = await self.database.read(self.store.working_since, before)
        await for_each(working, "end a lost turn", lambda one: self.database.write(self._end_lost_turn, *one, before))

    def _end_lost_turn(self, tx: Tx, task_id: str, session_id: str, before: float) -> None:
        with self.store.open(tx, task_id) as task:
            row = task.rows.get(session_id)
            if row is None or row.working_since is None or row.working_since >= before:
                return
            words = f"nothing was heard of the turn for {self.deadlines.turn_hours:g} hours"
            failure = failed(common_pb2.FAILURE_REASON_TIMED_OUT, words)
            self.turns.give_up(task, row.session, row.session.turn, failure)


def _not_taken(what: str, why: str) -> Failure:
    return failed(common_pb2.FAILURE_REASON_INTERNAL, f"{what}: {why}")
