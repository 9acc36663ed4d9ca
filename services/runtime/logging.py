"""Structured logs: one line per event with ids as fields; words and colours for people, JSON for machines.

log = get_logger(__name__)
log.info("service started", service=name)
"""

import json
import logging
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

_OF_LOGGING = frozenset({"exc_info", "stack_info", "stacklevel"})
_FIELDS = "fields"
_OURS = "branchline"
_COLOURS = {logging.DEBUG: 32, logging.INFO: 32, logging.WARNING: 33, logging.ERROR: 31, logging.CRITICAL: 31}
"""SGR codes of ECMA-48: green, yellow, red."""
_WORDS_WIDTH = 30


class FieldLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose calls take what the event is about as arguments of their own."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Put the fields where the formatter finds them."""
        fields = {name: value for name, value in kwargs.items() if name not in _OF_LOGGING}
        given = {name: value for name, value in kwargs.items() if name in _OF_LOGGING}
        return msg, {**given, "extra": {_FIELDS: fields}}


def get_logger(name: str) -> FieldLogger:
    """Return the logger of a module, by its `__name__`."""
    return FieldLogger(logging.getLogger(f"{_OURS}.{name}"))


def configure_logging(*, json: bool = False, level: str = "info") -> None:
    """Set up logging for the process. Call it once, first. Of libraries, warnings alone are logged."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json else LineFormatter(colours=sys.stderr.isatty()))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(_OURS).setLevel(level.upper())


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object. A value that JSON does not have is written as its text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        event: dict[str, Any] = {
            **_fields(record),
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "timestamp": _time(record),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


class LineFormatter(logging.Formatter):
    """Writes a record as a line for people, and what was raised below it."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self.colours = colours

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        level = f"{record.levelname.lower():<8}"
        if self.colours:
            level = f"\x1b[{_COLOURS.get(record.levelno, 0)}m{level}\x1b[0m"
        fields = " ".join(f"{name}={_word(value)}" for name, value in _fields(record).items())
        line = f"{_time(record)} [{level}] {record.getMessage():<{_WORDS_WIDTH}} {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    return getattr(record, _FIELDS, {})


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z")


def _word(value: object) -> str:
    """Return a value so that it stays on its line, and one value."""
    text = str(value)
    return text if text.isprintable() and text and " " not in text else repr(text)
