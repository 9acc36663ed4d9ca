"""No message of the public contract is larger than it may be, whatever its fields hold within their rules. Item 7."""

from importlib import import_module
from pathlib import Path

import grpc_tools
import pytest
from branchline.v1.common_pb2 import FileExcerpt
from branchline.v1.tasks_pb2 import TaskSummary
from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_tools import protoc

from services.runtime import limits
from tests.support.sizes import Sizes, reachable

ROOT = Path(__file__).parents[2]
PUBLIC = ROOT / "protos" / "public"

TIMES = 24
"""A timestamp or duration: a 64-bit and a 32-bit number."""

TYPES = {
    **limits.TYPES,
    timestamp_pb2.Timestamp.DESCRIPTOR.full_name: TIMES,
    duration_pb2.Duration.DESCRIPTOR.full_name: TIMES,
}
"""Messages without rules."""


def files() -> list[FileDescriptor]:
    names = [path.relative_to(PUBLIC).with_suffix("") for path in sorted(PUBLIC.rglob("*.proto"))]
    return [import_module(f"{'.'.join(name.parts)}_pb2").DESCRIPTOR for name in names]


SERVICES = [service for file in files() for service in file.services_by_name.values()]
METHODS: list[MethodDescriptor] = [method for service in SERVICES for method in service.methods]
REQUESTS = {method.input_type.full_name: method.input_type for method in METHODS}
RESPONSES = {method.output_type.full_name: method.output_type for method in METHODS}
ENTITIES = {
    message.full_name: message
    for message in reachable(SERVICES, TYPES)
    if message.full_name not in REQUESTS and message.full_name not in RESPONSES
}
"""Resources with their parts, and changes, which hold one each."""


def page(message: Descriptor) -> FieldDescriptor | None:
    """Return the field of a response that holds what a page or a frame holds: they end by bytes."""
    if "next_page_token" in message.fields_by_name or "header" in message.fields_by_name:
        return next(one for one in message.fields if one.is_repeated)
    return None


PAGED = {one.full_name: limits.PAGE_BYTES for one in map(page, RESPONSES.values()) if one is not None}


def sizes_of(*messages: Descriptor) -> Sizes:
    made = Sizes(TYPES, limits.SUMS, PAGED)
    for message in messages:
        made.largest(message)
    return made


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return sizes_of(*REQUESTS.values(), *RESPONSES.values())


def test_every_field_that_can_grow_has_a_bound(sizes: Sizes) -> None:
    assert not sizes.unbounded, f"neither a rule nor a limit of code bounds {sorted(sizes.unbounded)}"


@pytest.mark.parametrize("name", sorted(REQUESTS))
def test_a_request_is_small_enough_to_be_taken(sizes: Sizes, name: str) -> None:
    assert sizes.largest(REQUESTS[name]) <= limits.MESSAGE_BYTES


@pytest.mark.parametrize("name", sorted(RESPONSES))
def test_a_response_is_small_enough_for_every_client(sizes: Sizes, name: str) -> None:
    assert sizes.largest(RESPONSES[name]) <= limits.MESSAGE_BYTES


@pytest.mark.parametrize("name", sorted(ENTITIES))
def test_an_entity_is_small_enough_to_be_stored_and_pushed(sizes: Sizes, name: str) -> None:
    assert sizes.largest(ENTITIES[name]) <= limits.ENTITY_BYTES


def test_ten_thousand_task_summaries_fit_a_sidebar(sizes: Sizes) -> None:
    assert sizes.largest(TaskSummary.DESCRIPTOR) <= limits.SUMMARY_BYTES


def test_no_limit_is_kept_that_nothing_needs(sizes: Sizes) -> None:
    assert sizes.used == TYPES.keys() | limits.SUMS.keys()


def test_what_is_computed_is_what_a_message_at_its_limits_has() -> None:
    excerpt = FileExcerpt(
        path="p" * 4096, start_line=2**31 - 1, end_line=2**31 - 1, commit="a" * 40, text="\N{PILE OF POO}" * 4096
    )

    largest = sizes_of(FileExcerpt.DESCRIPTOR).largest(FileExcerpt.DESCRIPTOR)

    slack = 2 * 5  # an int32 might be negative
    assert excerpt.ByteSize() <= largest <= excerpt.ByteSize() + slack


def message_of(folder: Path, fields: str) -> Descriptor:
    """Compile a message `M` that has these fields."""
    includes = (folder, ROOT / "protos" / "third_party", Path(grpc_tools.__file__).with_name("_proto"))
    made = folder / "set.binpb"
    text = f'syntax = "proto3"; import "buf/validate/validate.proto"; message M {{ {fields} }}'
    (folder / "m.proto").write_text(text)
    options = [f"--proto_path={path}" for path in includes]
    assert protoc.main(["protoc", *options, f"--descriptor_set_out={made}", "--include_imports", "m.proto"]) == 0  # pyright: ignore
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(made.read_bytes()).file:
        pool.Add(file)
    return pool.FindMessageTypeByName("M")


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ("string text = 1;", "M.text"),
        ("string text = 1 [(buf.validate.field).string.min_len = 1];", "M.text"),
        ('string text = 1 [(buf.validate.field).string.pattern = "^a+$"];', "M.text"),
        ('string text = 1 [(buf.validate.field).string.pattern = "a"];', "M.text"),
        ("bytes data = 1;", "M.data"),
        ("repeated int32 numbers = 1;", "M.numbers (max_items)"),
        ("repeated string texts = 1 [(buf.validate.field).repeated.max_items = 2];", "M.texts"),
        ("map<string, int32> numbers = 1 [(buf.validate.field).map.max_pairs = 2];", "M.NumbersEntry.key"),
        ("M inner = 1;", "M > M (holds itself)"),
        ("oneof either { int32 number = 1; string text = 2; }", "M.text"),
        ("Inner inner = 1; message Inner { bytes data = 1; }", "M.Inner.data"),
    ],
)
def test_a_field_without_a_bound_is_named(fields: str, path: str, tmp_path: Path) -> None:
    assert sizes_of(message_of(tmp_path, fields)).unbounded == {path}


@pytest.mark.parametrize(
    ("fields", "bytes_at_most"),
    [
        ("string text = 1 [(buf.validate.field).string.max_bytes = 10];", 12),
        ("string text = 1 [(buf.validate.field).string.max_len = 10];", 42),
        ("string text = 1 [(buf.validate.field).string.uuid = true];", 38),
        ('string text = 1 [(buf.validate.field).string.pattern = "^([0-9a-f]{10})?$"];', 12),
        ('string text = 1 [(buf.validate.field).string.pattern = "^[^a]{10}$"];', 42),
        ("bytes data = 16 [(buf.validate.field).bytes.max_len = 200];", 204),
        ("repeated bool flags = 1 [(buf.validate.field).repeated.max_items = 5];", 10),
        ("oneof either { fixed64 number = 1; bool flag = 2; } optional float half = 3;", 14),
        (
            "map<string, int32> numbers = 1 [(buf.validate.field).map = "
            "{max_pairs: 2 keys: {string: {max_bytes: 4}}}];",
            2 * (2 + 6 + 11),
        ),
    ],
)
def test_a_size_is_added_up_from_the_rules(fields: str, bytes_at_most: int, tmp_path: Path) -> None:
    made = message_of(tmp_path, fields)

    assert sizes_of(made).largest(made) == bytes_at_most
