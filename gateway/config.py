"""Configuration of the gateway."""

from pydantic import BaseModel, ConfigDict, SecretStr


class GatewayConfig(BaseModel):
    """Where the gateway listens, and where the services are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: str
    signing_key: SecretStr
    organization_address: str
    repository_address: str
    task_address: str
    sandbox_address: str
    user_address: str
    calls_per_minute: int = 6000
    """Calls that one caller may make in a minute; more are refused with RESOURCE_EXHAUSTED."""
    drain_seconds: float = 5.0
