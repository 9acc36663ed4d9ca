"""Builds the history service."""

from pathlib import Path

from branchline_internal.history.v1 import history_pb2

from services.history.servicer import HistoryServicer
from services.history.store import HistoryStore
from services.runtime.config import ServiceConfig
from services.runtime.service import Chassis, Service


class HistoryConfig(ServiceConfig, frozen=True):
    """Configuration of the history service."""


def build(config: HistoryConfig) -> Service:
    """Build the service."""
    chassis = Chassis("history", config, Path(__file__).parent, callers=("organization",))
    servicer = HistoryServicer(chassis.database, HistoryStore(chassis.outbox))
    chassis.serve(servicer, history_pb2.DESCRIPTOR, "HistoryService")
    chassis.push_to("organization")
    return chassis.service
