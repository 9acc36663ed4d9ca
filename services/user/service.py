"""Builds the user service."""

from functools import partial
from pathlib import Path

from branchline.v1 import secrets_pb2, users_pb2
from branchline_internal.user.v1 import user_pb2

from services.runtime.config import ServiceConfig
from services.runtime.secrets import read_or_create_key
from services.runtime.service import Chassis, Service
from services.user.accounts import Accounts
from services.user.cipher import Cipher
from services.user.drafts import Drafts
from services.user.keeping import Secrets
from services.user.public import PublicSecretServicer, PublicUserServicer
from services.user.servicer import UserServicer
from services.user.task_states import TaskStates

_PRUNE_SECONDS = 3600.0


class UserConfig(ServiceConfig, frozen=True):
    """Configuration of the user service."""


def build(config: UserConfig) -> Service:
    """Build the service."""
    chassis = Chassis("user", config, Path(__file__).parent, callers=("gateway", "organization"))
    database, outbox, clock = chassis.database, chassis.outbox, chassis.clock
    accounts, task_states, drafts = Accounts(outbox, clock), TaskStates(outbox, clock), Drafts(outbox, clock)
    secrets = Secrets(outbox, clock, Cipher(read_or_create_key(config.data_dir / "encryption.key")))
    internal = UserServicer(database, accounts, task_states, drafts, secrets)
    public = PublicUserServicer(chassis.commands, accounts, task_states, drafts)
    chassis.serve(internal, user_pb2.DESCRIPTOR, "UserService")
    chassis.serve(public, users_pb2.DESCRIPTOR, "UserService")
    chassis.serve(PublicSecretServicer(chassis.commands, secrets), secrets_pb2.DESCRIPTOR, "SecretService")
    chassis.take_commands()
    chassis.push_to("organization")
    chassis.service.every(_PRUNE_SECONDS, "prune", partial(database.write, task_states.prune))
    chassis.service.every(_PRUNE_SECONDS, "prune drafts", partial(database.write, drafts.prune))
    return chassis.service
