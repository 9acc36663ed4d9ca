"""Builds the user service."""

from functools import partial
from pathlib import Path

from branchline.v1 import users_pb2
from branchline_internal.user.v1 import user_pb2

from services.runtime.config import ServiceConfig
from services.runtime.secrets import read_or_create_key
from services.runtime.service import Chassis, Service
from services.user.accounts import Accounts
from services.user.cipher import Cipher
from services.user.public import PublicUserServicer
from services.user.servicer import UserServicer
from services.user.task_states import TaskStates

_PRUNE_SECONDS = 3600.0


class UserConfig(ServiceConfig, frozen=True):
    """Configuration of the user service."""


def build(config: UserConfig) -> Service:
    """Build the service."""
    chassis = Chassis("user", config, Path(__file__).parent)
    database = chassis.database
    accounts = Accounts(chassis.outbox, chassis.clock, Cipher(read_or_create_key(config.data_dir / "encryption.key")))
    task_states = TaskStates(chassis.outbox, chassis.clock)
    public = PublicUserServicer(database, chassis.commands, accounts, task_states)
    chassis.serve(UserServicer(database, accounts, task_states), user_pb2.DESCRIPTOR, "UserService")
    chassis.serve(public, users_pb2.DESCRIPTOR, "UserService")
    chassis.take_commands()
    chassis.push_to("organization")
    chassis.service.every(_PRUNE_SECONDS, "prune", partial(database.write, task_states.prune))
    return chassis.service
