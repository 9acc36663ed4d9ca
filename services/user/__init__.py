"""User: who people are, their tokens and credentials, and all per-user workbench state. Child of organization."""

from pathlib import Path

from branchline.gateway.v1 import users_pb2_grpc
from branchline.spine.v1 import push_pb2_grpc
from branchline.user.v1 import user_pb2_grpc
from cryptography.fernet import Fernet

from services.runtime.config import ServiceConfig
from services.runtime.secrets import read_or_create_key
from services.runtime.service import Service, chassis
from services.runtime.spine.push import PushClient
from services.user.servicer import PublicUserServicer, UserServicer
from services.user.store import UserStore
from services.user.tables import spine


class UserConfig(ServiceConfig):
    """Configuration of the user service."""

    organization_address: str


def build(config: UserConfig) -> Service:
    """Build the service."""
    parts = chassis("user", config, spine, Path(__file__).parent)
    store = UserStore(parts, Fernet(read_or_create_key(config.data_dir / "encryption.key")))
    internal, public = UserServicer(parts, store), PublicUserServicer(parts, store)
    parts.service.serves(
        "branchline.user.v1.UserService",
        lambda server: user_pb2_grpc.add_UserServiceServicer_to_server(internal, server),
    )
    parts.service.serves(
        "branchline.gateway.v1.UserService",
        lambda server: users_pb2_grpc.add_UserServiceServicer_to_server(public, server),
    )
    organization = parts.channel(config.organization_address)
    push = PushClient(parts.outbox, lambda: push_pb2_grpc.PushServiceStub(organization), "user")
    parts.service.loops.append(push.run)
    return parts.service
