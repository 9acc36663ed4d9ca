"""Reads: a page of the sidebar, a snapshot of a large organization, one task through the gateway."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
from branchline.v1 import organizations_pb2, organizations_pb2_grpc, tasks_pb2, tasks_pb2_grpc
from branchline.v1.watches_pb2 import FRAME_KIND_SYNCED

from tests.bench.floor import GET, OPTIONS
from tests.bench.installation import Installed, installed, task_id
from tests.bench.pipelines import floor
from tests.bench.result import Figures, Options, Row, against, interleave, p50, within

_FEW = 1000
_PAGE = 50
_LARGEST_PAGE = 1000
_FIRST_FRAME_SECONDS = 0.3
_ADDED_MB = 20.0
_MB = 1024 * 1024
_WARM_UP = 20

Call = Callable[[], Awaitable[object]]


@asynccontextmanager
async def connected(address: str) -> AsyncGenerator[Any, None]:
    """Open a plain channel, without what the SDK puts around calls."""
    async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
        yield channel


async def timed(call: Call, count: int) -> Figures:
    """Make calls one after the other."""
    took: list[float] = []
    for _ in range(_WARM_UP + count):
        began = time.perf_counter()
        await call()
        took.append(time.perf_counter() - began)
    return {"p50": p50(took[_WARM_UP:])}


async def page(options: Options, folder: Path) -> list[Row]:
    """Read pages of 50 in every order, the first and one in the middle, of a large and a small organization."""
    rows: list[Row] = []
    few = min(_FEW, options.tasks // 5)
    async with installed(folder, options.tasks, few) as installation, connected(installation.address) as channel:
        stub: Any = tasks_pb2_grpc.TaskServiceStub(channel)
        for order, middle in itertools.product(("update_time desc", "create_time desc", "title"), (False, True)):
            large, small = [
                await _page_call(stub, installation, owner, order, count // 2 if middle else 0)
                for owner, count in (
                    (installation.organization_id, options.tasks),
                    (installation.other_organization_id, few),
                )
            ]
            count = options.samples // 10
            rounds = await interleave(options.rounds, partial(timed, small, count), partial(timed, large, count))
            name = f"page of {_PAGE} of {options.tasks} tasks, {order}, {'middle' if middle else 'first'}"
            rows += against(name, "ms", rounds["p50"], 2.0)
    return rows


async def _page_call(stub: Any, installation: Installed, organization_id: str, order: str, skip: int) -> Call:
    """Return a call for the page that comes after so many tasks."""
    request = tasks_pb2.ListTasksRequest(organization_id=organization_id, order_by=order, page_size=_LARGEST_PAGE)
    skipped = 0
    while skipped < skip:
        request.page_size = min(_LARGEST_PAGE, skip - skipped)
        answer = await stub.ListTasks(request, metadata=installation.metadata)
        request.page_token = answer.next_page_token
        skipped += len(answer.tasks)
    request.page_size = _PAGE
    answer = await stub.ListTasks(request, metadata=installation.metadata)
    assert len(answer.tasks) == _PAGE
    return lambda: stub.ListTasks(request, metadata=installation.metadata)


async def snapshot(options: Options, folder: Path) -> list[Row]:
    """Open a large organization: how soon the first tasks are there, and what it costs the processes."""
    firsts: list[float] = []
    totals: list[float] = []
    added: dict[str, list[float]] = {"organization": [], "gateway": []}
    async with installed(folder, options.tasks) as installation, connected(installation.address) as channel:
        await _open(channel, installation, installation.other_organization_id)
        processes = {name: installation.process_of(name) for name in added}
        for _ in range(options.rounds):
            idle = {name: _reset_peak(process) for name, process in processes.items()}
            first, total, count = await _open(channel, installation, installation.organization_id)
            assert count >= options.tasks
            firsts.append(first)
            totals.append(total)
            for name, process in processes.items():
                added[name].append(_peak_mb(process) - idle[name])
    name = f"snapshot of {options.tasks} tasks"
    print(f"{name}: whole after {sorted(totals)[len(totals) // 2]:.3f} s")
    return [
        within(f"{name}, first frame", "s", max(firsts), _FIRST_FRAME_SECONDS),
        *(within(f"{name}, memory added to {of}", "MB", max(found), _ADDED_MB) for of, found in added.items()),
    ]


async def _open(channel: Any, installation: Installed, organization_id: str) -> tuple[float, float, int]:
    """Watch until synced; return the seconds to the first tasks and to the end, and the number of changes."""
    stub: Any = organizations_pb2_grpc.OrganizationServiceStub(channel)
    request = organizations_pb2.WatchOrganizationRequest(organization_id=organization_id)
    began = time.perf_counter()
    first, count = 0.0, 0
    call = stub.WatchOrganization(request, metadata=installation.metadata)
    async for response in call:
        if response.changes and not first:
            first = time.perf_counter() - began
        count += len(response.changes)
        if response.header.kind == FRAME_KIND_SYNCED:
            break
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call.code()
    return first, time.perf_counter() - began, count


def _reset_peak(process: psutil.Process) -> float:
    """Forget the largest memory that a process ever had; return what it has now, in MB."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return process.memory_info().rss / _MB


def _peak_mb(process: psutil.Process) -> float:
    """Return the largest memory that a process had since."""
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


async def get_task(options: Options, folder: Path) -> list[Row]:
    """Read one task through the gateway; the floor passes as many bytes on over one hop."""
    async with (
        floor(folder / "floor", 1) as low,
        installed(folder / "ours", _FEW) as installation,
        connected(installation.address) as channel,
        connected(low.address) as plain,
    ):
        stub: Any = tasks_pb2_grpc.TaskServiceStub(channel)
        request = tasks_pb2.GetTaskRequest(task_id=task_id(1))
        answer = await stub.GetTask(request, metadata=installation.metadata)
        size = str(answer.ByteSize()).encode()
        get = plain.unary_unary(GET)
        rounds = await interleave(
            options.rounds,
            partial(timed, lambda: get(size), options.samples),
            partial(timed, lambda: stub.GetTask(request, metadata=installation.metadata), options.samples),
        )
    return against("GetTask through the gateway, p50", "ms", rounds["p50"], 2.5)
