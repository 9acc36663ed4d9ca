"""`branchline call SERVICE METHOD REQUEST`: every method of the contract, its help read from the contract itself."""

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, Any, cast

import branchline.v1
import typer
from branchline import AsyncClient
from branchline.contract import PACKAGE, words
from branchline.v1.options_pb2 import Access, MethodRule, rule
from branchline.v1.roles_pb2 import Role
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, MethodOptions
from google.protobuf.json_format import MessageToJson, ParseDict, ParseError
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from msgspec import DecodeError, json

from cli.calls import run_as_client
from cli.terminal import DEFAULT_DATA, DataDir

Request = Annotated[str, typer.Argument(help="The request as JSON, or - for standard input.", metavar="JSON")]


def services() -> Iterator[ServiceDescriptor]:
    """Yield the services of the contract, by name."""
    names = sorted(module.name for module in iter_modules(branchline.v1.__path__) if module.name.endswith("_pb2"))
    for name in names:
        yield from import_module(f"{PACKAGE}.{name}").DESCRIPTOR.services_by_name.values()


def _commands() -> typer.Typer:
    everything = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        help='Call any method of the API: `branchline call TaskService GetTask \'{"task_id": "..."}\'`.',
    )
    for service in services():
        group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=words(service))
        for method in service.methods:
            group.command(method.name, help=_help(method), short_help=words(method))(_caller(method))
        everything.add_typer(group, name=service.name)
    return everything


def _help(method: MethodDescriptor) -> str:
    lines = [words(method), "", "\b", *_facts(method), "", "\b", f"{method.input_type.name}:"]
    lines += [f"  {field.name} ({_kind(field)}): {words(field)}" for field in method.input_type.fields] or ["  empty"]
    return "\n".join(lines)


def _facts(method: MethodDescriptor) -> Iterator[str]:
    options = method.GetOptions()
    given: MethodRule = options.Extensions[rule]
    role = "not even a token" if given.anonymous else "a token"
    if given.scope:
        role = f"{Role.Name(given.required_role).removeprefix('ROLE_').lower()} in what {given.scope} names"
    yield f"Access: {Access.Name(given.access).removeprefix('ACCESS_').lower()}"
    yield f"Needs: {role}"
    once = options.idempotency_level != MethodOptions.IDEMPOTENCY_UNKNOWN
    yield f"Repeated: {'has the effect of once' if once else 'is done again'}"


def _kind(field: FieldDescriptor) -> str:
    typed = field.message_type or field.enum_type
    number = cast("FieldDescriptorProto.Type.ValueType", field.type)
    name = typed.name if typed is not None else FieldDescriptorProto.Type.Name(number).removeprefix("TYPE_").lower()
    return f"repeated {name}" if field.is_repeated else name


def _caller(method: MethodDescriptor) -> Callable[..., None]:
    def call(request: Request = "{}", data_dir: DataDir = DEFAULT_DATA) -> None:
        wanted = _parsed(method, sys.stdin.read() if request == "-" else request)

        async def job(client: AsyncClient, _organization_id: str) -> None:
            async for answer in _answers(client, method, wanted):
                print(MessageToJson(answer, preserving_proto_field_name=True), flush=True)

        run_as_client(data_dir, job)

    return call


def _parsed(method: MethodDescriptor, text: str) -> Message:
    try:
        return ParseDict(json.decode(text, type=dict[str, Any]), GetMessageClass(method.input_type)())
    except (DecodeError, ParseError) as error:
        raise typer.BadParameter(f"this is no {method.input_type.name}: {error}") from error


async def _answers(client: AsyncClient, method: MethodDescriptor, request: Message) -> AsyncIterator[Message]:
    response = GetMessageClass(method.output_type)
    if method.server_streaming:
        async for answer in client.caller.stream(method, request, response):
            yield answer
    else:
        yield await client.caller.call(method, request, response)


app = _commands()
