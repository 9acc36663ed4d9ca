"""Writes the pages of `docs/api` from the public contract, as `make generate` does.

Usage: `buf build --as-file-descriptor-set -o - | python docs/reference.py docs/api`
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from branchline.contract import PACKAGE, Place, comments, public_files
from branchline.v1 import options_pb2
from branchline.v1.roles_pb2 import Role
from buf.validate import validate_pb2
from buf.validate.validate_pb2 import FieldRules
from google.api import field_behavior_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    MethodDescriptorProto,
    MethodOptions,
    ServiceDescriptorProto,
)
from google.protobuf.message import Message

HEAD = "<!-- Written by docs/reference.py from protos/public: change the protos and run `make generate`. -->\n"

INDEX = f"""{HEAD}
# The API, method by method

How it works is in [api.md](../api.md); here is what there is. In JSON, 64-bit numbers are strings, bytes are base64,
times are RFC 3339 and durations end in "s".

**Access** says what a method does: a *read* changes nothing and is answered from an index; a *write* changes state
once, however often its request is repeated; *machine* reaches into the sandbox of a task. **Scope** is the field of the
request that names where the caller must have the **role**.
"""

_SERVICE, _MESSAGE, _ENUM = 6, 4, 5  # numbers of the fields of FileDescriptorProto that hold them
_METHOD, _FIELD, _VALUE = 2, 2, 2


@dataclass(frozen=True)
class File:
    """A file of the contract with its comments, by place within it."""

    proto: FileDescriptorProto
    comments: dict[Place, str]

    @property
    def page(self) -> str:
        """Name of the page that tells of it."""
        return Path(self.proto.name).stem + ".md"

    def comment(self, *path: int) -> str:
        """Return what is written above a thing, on one line."""
        return self.comments.get(path, "")


def read(descriptors: bytes) -> list[File]:
    """Return the public files of a descriptor set with source information."""
    return [File(file, comments(file)) for file in public_files(descriptors)]


class Reference:
    """The pages, by name."""

    def __init__(self, files: list[File]) -> None:
        self.files = files
        self.home: dict[str, str] = {}
        self.calls: set[str] = set()
        for file in files:
            for one in (*file.proto.message_type, *file.proto.enum_type):
                self.home[f".{PACKAGE}.{one.name}"] = file.page
            for service in file.proto.service:
                for method in service.method:
                    self.calls |= {method.input_type, method.output_type}

    def pages(self) -> dict[str, str]:
        """Return the text of every page."""
        made = {file.page: self._page(file) for file in self.files if file.page != "options.md"}
        return {"README.md": self._index(), **made}

    def _index(self) -> str:
        lines = [INDEX, "| service | methods |", "| --- | --- |"]
        for file in self.files:
            for service in file.proto.service:
                links = (f"[{one.name}]({file.page}#{one.name.lower()})" for one in service.method)
                lines.append(f"| [{service.name}]({file.page}) | {', '.join(links)} |")
        rest = [file for file in self.files if not file.proto.service and file.page not in ("options.md", "errors.md")]
        shared = ", ".join(f"[{file.page[:-3]}]({file.page})" for file in rest)
        lines.append(f"\nWhy a call fails: [errors](errors.md). What several services share: {shared}.")
        return "\n".join(lines) + "\n"

    def _page(self, file: File) -> str:
        services = [part for number, one in enumerate(file.proto.service) for part in self._service(file, number, one)]
        title = [] if services else [f"# {file.page[:-3].capitalize()}"]
        messages = [
            self._message(file, number, one)
            for number, one in enumerate(file.proto.message_type)
            if f".{PACKAGE}.{one.name}" not in self.calls
        ]
        enums = [self._enum(file, number, one) for number, one in enumerate(file.proto.enum_type)]
        if services and (messages or enums):
            services.append("# What it speaks of")
        return "\n\n".join((HEAD.strip(), *title, *services, *messages, *enums)) + "\n"

    def _service(self, file: File, number: int, service: ServiceDescriptorProto) -> Iterator[str]:
        yield f"# {service.name}"
        yield file.comment(_SERVICE, number)
        rows = ["| method | access | answered by | role |", "| --- | --- | --- | --- |"]
        for method in service.method:
            rule = _rule(method)
            rows.append(
                f"| [{method.name}](#{method.name.lower()}) | {_word(options_pb2.Access, rule.access)} "
                f"| {_word(options_pb2.Level, rule.level)} | {_role(rule)} |"
            )
        yield "\n".join(rows)
        for place, method in enumerate(service.method):
            yield f"## {method.name}"
            yield file.comment(_SERVICE, number, _METHOD, place)
            yield self._facts(file, method)
            yield self._call("Request", method.input_type)
            yield self._call("Each answer of the stream" if method.server_streaming else "Response", method.output_type)

    def _facts(self, file: File, method: MethodDescriptorProto) -> str:
        rule = _rule(method)
        facts = [
            f"Path: `/{PACKAGE}.{file.proto.service[0].name}/{method.name}`",
            f"Access: {_word(options_pb2.Access, rule.access)}, answered by the {_word(options_pb2.Level, rule.level)}",
            f"Role: {_role(rule)}" + (f", in what `{rule.scope}` names" if rule.scope else ""),
            f"Repeated: {self._repeated(method)}",
        ]
        return "\n".join(f"- {fact}" for fact in facts)

    def _repeated(self, method: MethodDescriptorProto) -> str:
        level = method.options.idempotency_level
        if level == MethodOptions.NO_SIDE_EFFECTS:
            return "as often as you like; it changes nothing"
        if level != MethodOptions.IDEMPOTENT:
            return "does it again; clients must not retry by themselves"
        if any(one.name == "request_id" for one in self._message_of(method.input_type)[2].field):
            return "with the same `request_id` it is done once"
        return "has the effect of once"

    def _message_of(self, type_name: str) -> tuple[File, int, DescriptorProto]:
        for file in self.files:
            for number, message in enumerate(file.proto.message_type):
                if f".{PACKAGE}.{message.name}" == type_name:
                    return file, number, message
        raise KeyError(type_name)

    def _call(self, title: str, type_name: str) -> str:
        file, number, message = self._message_of(type_name)
        fields = self._fields(file, number, message)
        return f"**{title}** `{message.name}`" + (f"\n\n{fields}" if fields else ", empty")

    def _message(self, file: File, number: int, message: DescriptorProto) -> str:
        parts = (f"## {message.name}", file.comment(_MESSAGE, number), self._fields(file, number, message))
        return "\n\n".join(part for part in parts if part)

    def _fields(self, file: File, number: int, message: DescriptorProto) -> str:
        if not message.field:
            return ""
        rows = ["| field | type | what it is | bounds |", "| --- | --- | --- | --- |"]
        for place, one in enumerate(message.field):
            choice = (
                ""
                if one.proto3_optional or not one.HasField("oneof_index")
                else message.oneof_decl[one.oneof_index].name
            )
            told = file.comment(_MESSAGE, number, _FIELD, place) + (f" One of `{choice}`." if choice else "")
            cells = (f"`{one.name}`", self._type(message, one), told, "; ".join(bounds(one)))
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        return "\n".join(rows)

    def _type(self, message: DescriptorProto, one: FieldDescriptorProto) -> str:
        entry = next(
            (nested for nested in message.nested_type if one.type_name.endswith(f".{message.name}.{nested.name}")), None
        )
        if entry is not None:
            return f"map of {self._type(entry, entry.field[0])} to {self._type(entry, entry.field[1])}"
        name = one.type_name.rpartition(".")[2]
        if one.type_name in self.home:
            text = f"[{name}]({self.home[one.type_name]}#{name.lower()})"
        else:
            text = name or FieldDescriptorProto.Type.Name(one.type).removeprefix("TYPE_").lower()
        if one.label == FieldDescriptorProto.LABEL_REPEATED:
            return f"repeated {text}"
        return f"optional {text}" if one.proto3_optional else text

    def _enum(self, file: File, number: int, enum: EnumDescriptorProto) -> str:
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
        values = [
            (one.name, one.number, file.comment(_ENUM, number, _VALUE, place)) for place, one in enumerate(enum.value)
        ]
        table = _reasons(values, prefix) if enum.name == "ErrorReason" else _values(values)
        return "\n\n".join((f"## {enum.name}", file.comment(_ENUM, number), table))


def _values(values: Iterable[tuple[str, int, str]]) -> str:
    return "\n".join(
        ("| value | number | what it is |", "| --- | --- | --- |", *(f"| `{a}` | {b} | {c} |" for a, b, c in values))
    )


def _reasons(values: Iterable[tuple[str, int, str]], prefix: str) -> str:
    """Make a table of the reasons: the comment of each begins with its code and ends with its metadata."""
    rows = ["| reason | code | what it means | metadata |", "| --- | --- | --- | --- |"]
    for name, number, comment in values:
        if number:
            code, _, told = comment.partition(". ")
            told, _, metadata = told.partition(" metadata: ")
            keys = ", ".join(f"`{key}`" for key in metadata.split(", ") if key)
            rows.append(f"| `{name.removeprefix(prefix)}` | {code} | {told} | {keys} |")
    return "\n".join(rows)


def _rule(method: MethodDescriptorProto) -> options_pb2.MethodRule:
    return method.options.Extensions[options_pb2.rule]


def _word(enum: Any, value: int) -> str:
    return str(enum.Name(value)).partition("_")[2].lower()


def _role(rule: options_pb2.MethodRule) -> str:
    if rule.anonymous:
        return "none, not even a token"
    if not rule.scope:
        return "none; it is about the caller"
    return _word(Role, rule.required_role) if rule.required_role else "any"


def bounds(one: FieldDescriptorProto) -> Iterator[str]:
    """Yield what the rules and the behaviour of a field say, in words."""
    extensions: Any = one.options.Extensions
    for behaviour in extensions[field_behavior_pb2.field_behavior]:
        yield str(field_behavior_pb2.FieldBehavior.Name(behaviour)).lower().replace("_", " ")
    yield from _rules(extensions[validate_pb2.field])


def _rules(rules: FieldRules) -> Iterator[str]:
    if rules.required:
        yield "required"
    kind = rules.WhichOneof("type")
    if kind is None:
        return
    given = {field.name: value for field, value in getattr(rules, kind).ListFields()}
    if kind in ("string", "bytes"):
        yield from _text(kind, given)
    elif kind in ("repeated", "map"):
        yield from _many(rules, given)
    elif kind == "enum":
        yield from _choice(given)
    else:
        least, most = _number(given.get("gte")), _number(given.get("lte"))
        yield f"{least} to {most}" if least and most else f"at least {least}" if least else f"at most {most}"


def _text(kind: str, given: dict[str, Any]) -> Iterator[str]:
    if "uuid" in given:
        yield "a UUID"
    if "email" in given:
        yield "an e-mail address"
    if "pattern" in given:
        yield f"`{given['pattern']}`"
    if "min_len" in given:
        yield "not empty"
    if kind == "string" and "max_len" in given:
        yield f"at most {given['max_len']} characters"
    most = given.get("max_bytes") if kind == "string" else given.get("max_len")
    if most is not None:
        yield f"at most {_bytes(most)}"


def _many(rules: FieldRules, given: dict[str, Any]) -> Iterator[str]:
    if "min_items" in given:
        yield "not empty"
    if "max_items" in given:
        yield f"at most {given['max_items']} items"
    if "max_pairs" in given:
        yield f"at most {given['max_pairs']} pairs"
    for word, inner in (("each", rules.repeated.items), ("keys", rules.map.keys), ("values", rules.map.values)):
        told = ", ".join(_rules(inner))
        if told:
            yield f"{word}: {told}"


def _choice(given: dict[str, Any]) -> Iterator[str]:
    if given.get("defined_only"):
        yield "a value that is known"
    if 0 in given.get("not_in", ()):
        yield "not UNSPECIFIED"


def _number(value: int | Message | None) -> str:
    if value is None:
        return ""
    return f"{value.seconds} s" if isinstance(value, Message) else str(value)  # pyright: ignore


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 1024 * 1024), ("KiB", 1024)):
        if count >= size and count % size == 0:
            return f"{count // size} {unit}"
    return f"{count} bytes"


def main(folder: Path) -> None:
    """Write the pages into a folder; what else it holds goes."""
    pages = Reference(read(sys.stdin.buffer.read())).pages()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
