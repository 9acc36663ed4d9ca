"""What all tests share: quiet logs, and no handlers for forks in gRPC's hands."""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from services.runtime.logging import configure_logging

configure_logging(level=os.environ.get("TESTS_LOG_LEVEL", "error"))
