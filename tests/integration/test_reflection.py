"""Server reflection as generic clients use it, in both versions. API-1."""

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

from tests.support.stack import Stack


async def asked(stack: Stack, version: str, request: ServerReflectionRequest) -> ServerReflectionResponse:
    async with grpc.aio.insecure_channel(stack.address) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=ServerReflectionRequest.SerializeToString,
            response_deserializer=ServerReflectionResponse.FromString,
        )(iter([request]))
        answer = await call.read()
    assert isinstance(answer, ServerReflectionResponse)
    return answer


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_every_service_that_is_listed_is_described(stack: Stack, version: str) -> None:
    listed = await asked(stack, version, ServerReflectionRequest(list_services=""))
    names = {service.name for service in listed.list_services_response.service}

    assert {f"grpc.reflection.{one}.ServerReflection" for one in ("v1", "v1alpha")} < names
    assert not [name for name in names if "internal" in name]
    for name in names:
        described = await asked(stack, version, ServerReflectionRequest(file_containing_symbol=name))
        files = [
            FileDescriptorProto.FromString(file) for file in described.file_descriptor_response.file_descriptor_proto
        ]
        assert name in {f"{file.package}.{service.name}" for file in files for service in file.service}, name


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
@pytest.mark.parametrize(
    "symbol",
    [
        "branchline.v1.TaskService.CreateTask",
        "branchline.v1.CreateTaskRequest.prompt",
        "branchline.v1.TaskState",
        "branchline.v1.TASK_STATE_ACTIVE",
        "branchline.v1.TaskState.TASK_STATE_ACTIVE",
    ],
)
async def test_what_stands_inside_a_service_a_message_or_an_enum_is_found(
    stack: Stack, version: str, symbol: str
) -> None:
    described = await asked(stack, version, ServerReflectionRequest(file_containing_symbol=symbol))

    files = described.file_descriptor_response.file_descriptor_proto
    assert "branchline/v1/tasks.proto" in {FileDescriptorProto.FromString(file).name for file in files}


@pytest.mark.parametrize("symbol", ["branchline.v1.TaskService.Nothing", "branchline.v1.Nothing", "Nothing", ""])
async def test_what_there_is_not_is_not_found(stack: Stack, symbol: str) -> None:
    described = await asked(stack, "v1", ServerReflectionRequest(file_containing_symbol=symbol))

    assert described.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
