"""What a log line holds, for machines and for people."""

import json
import logging
from collections.abc import Iterator

import pytest

from services.runtime.logging import configure_logging, get_logger


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Put the process's handlers back."""
    root, ours = logging.getLogger(), logging.getLogger("branchline")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def test_a_machine_reads_an_object_of_event_level_time_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(json=True)

    get_logger("services.task").warning("rows are parked", service="task", name="any", parked=2, error=ValueError("no"))

    line = json.loads(capsys.readouterr().err)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "rows are parked",
        "level": "warning",
        "service": "task",
        "name": "any",
        "parked": 2,
        "error": "no",
    }


def test_what_was_raised_is_told_in_one_line_to_machines_and_below_it_to_people(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for as_json in (True, False):
        configure_logging(json=as_json)
        get_logger("services.task").error("call failed", method="GetTask", exc_info=ValueError("it broke"))

    machine, *people = capsys.readouterr().err.splitlines()
    assert "ValueError: it broke" in json.loads(machine)["exception"]
    assert people[0].endswith("call failed                    method=GetTask")
    assert people[-1] == "ValueError: it broke"


def test_a_field_with_a_line_break_or_a_space_stays_one_word_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()

    get_logger("services.task").info("delivery failed", reason="first\nlevel=error second", entity="task_1")

    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"reason='first\nlevel=error second' entity=task_1")


def test_below_its_level_nothing_of_ours_is_logged_and_of_libraries_warnings_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging(level="debug")
    logging.getLogger("aiosqlite").debug("executing with a secret")
    get_logger("services.task").debug("call")
    configure_logging(level="warning")
    get_logger("services.task").info("service started")
    logging.getLogger("asyncio").warning("never retrieved")

    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == ["[debug   ] call", "[warning ] never retrieved"]
