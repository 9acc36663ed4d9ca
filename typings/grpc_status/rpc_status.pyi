"""What typeshed leaves untyped; calls of grpc.aio fail with errors that are as good as calls here."""

import grpc
from google.rpc.status_pb2 import Status

def from_call(call: grpc.Call | grpc.aio.AioRpcError) -> Status | None: ...
def to_status(status: Status) -> grpc.Status: ...
