"""The command line: starts services, and is a client of the gateway like any other."""

import os

# Must be set before gRPC is loaded: programs that we start are executed, never forked to go on with gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
