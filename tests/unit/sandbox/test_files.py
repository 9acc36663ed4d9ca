"""Large files in parts: what a part costs, and that parts of different states do not have one name."""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from branchline.v1.files_pb2 import ReadFileRequest, ReadFileResponse
from branchline.v1.sandboxes_pb2 import Sandbox

from services.runtime.lanes import Lanes
from services.runtime.principal import Principal, bind_principal
from services.sandbox import files
from services.sandbox.agent_server import FileEntry
from services.sandbox.commands import CommandEnd
from services.sandbox.files import FileServicer
from services.sandbox.machines import WORKSPACE

NOBODY: Any = None
MIB = 1024 * 1024


@dataclass
class Home:
    """A machine's files in a folder of the test, and the programs that were run on them."""

    folder: Path
    ran: list[str] = field(default_factory=list[str])
    after_read: Callable[[], object] = lambda: None

    @property
    def home(self) -> str:
        return str(self.folder)

    @property
    def machine(self) -> "Home":
        return self

    async def read(self, look: Callable[..., Sandbox], *given: str) -> Sandbox:
        return look(self, *given)

    def active(self, *_: Any) -> Sandbox:
        return Sandbox(id="sbx_1")

    async def use(self, _: str, call: Callable[["Home"], Awaitable[Any]]) -> Any:
        return await call(self)

    async def stat_file(self, path: str) -> FileEntry:
        found = await asyncio.to_thread(Path(path).stat)
        changed = datetime.fromtimestamp(found.st_mtime, UTC)
        return FileEntry(name=Path(path).name, directory=False, size_bytes=found.st_size, modify_time=changed)

    async def run(self, _: object, command: Sequence[str], *__: Any) -> tuple[CommandEnd, bytes]:
        self.ran.append(command[0])
        output = await asyncio.to_thread(subprocess.check_output, command)
        if command[0] == "sh":
            self.after_read()
        return CommandEnd(0, timed_out=False, duration_ms=0), output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    made = Home(tmp_path)
    (tmp_path / WORKSPACE).mkdir()
    (tmp_path / WORKSPACE / "big").write_bytes(b"0123456789abcdef" * (3 * MIB // 16))
    monkeypatch.setattr(files, "run_bytes", made.run)
    bind_principal(Principal(user_id="usr_1", organization_id="org_1"))
    return made


async def read(home: Home, offset: int) -> ReadFileResponse:
    double: Any = home
    servicer = FileServicer(database=double, store=double, machines=double, lanes=Lanes())
    return await servicer.ReadFile(ReadFileRequest(task_id="task_1", path="big", offset=offset), NOBODY)


async def test_a_part_of_a_large_file_costs_no_reading_of_the_whole(home: Home) -> None:
    parts = [await read(home, number * MIB) for number in range(3)]

    assert b"".join(part.content for part in parts) == (home.folder / WORKSPACE / "big").read_bytes()
    assert len({part.file.etag for part in parts}) == 1
    assert sorted(home.ran) == ["sh"] * 3 + ["stat"] * 3


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_what_changes_while_a_part_is_read_changes_the_name(home: Home, number: int) -> None:
    big = home.folder / WORKSPACE / "big"
    etags: set[str] = set()
    for part in range(3):
        home.after_read = (lambda: big.write_bytes(b"x" * (4 * MIB))) if part == number else (lambda: None)
        etags.add((await read(home, part * MIB)).file.etag)

    assert len(etags) == 2
