"""The public contract stands alone: nothing internal is in its files, its messages or its distribution. Item 7."""

from importlib import import_module
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor

ROOT = Path(__file__).parents[2]
PUBLIC = ROOT / "protos" / "public"
SDK = ROOT / "sdk"
ALLOWED = ("branchline/v1/", "buf/validate/", "google/")
GO_PACKAGE = "github.com/branchline/branchline/sdk/go/branchline/v1;branchlinev1"
TEXTS = {".py", ".pyi", ".ts", ".js", ".json", ".toml", ".md"}

NAMES = [path.relative_to(PUBLIC) for path in sorted(PUBLIC.rglob("*.proto"))]


def imported(file: FileDescriptor) -> set[str]:
    """Return the names of all files that this one needs, however far away."""
    near = {one.name for one in file.dependencies}
    return near.union(*(imported(one) for one in file.dependencies))


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_public_file_imports_nothing_internal(name: Path) -> None:
    file: FileDescriptor = import_module(f"{'.'.join(name.with_suffix('').parts)}_pb2").DESCRIPTOR

    assert not [one for one in imported(file) if not one.startswith(ALLOWED)]
    assert file.package == "branchline.v1"


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_a_public_file_says_what_it_is_in_go(name: Path) -> None:  # without it Go's plugin makes nothing
    assert f'option go_package = "{GO_PACKAGE}";' in (PUBLIC / name).read_text()


def test_all_that_is_public_is_in_the_package_branchline_v1() -> None:
    assert {name.parent for name in NAMES} == {Path("branchline/v1")}


def test_no_sdk_carries_or_names_anything_internal() -> None:
    files = [path for path in SDK.rglob("*") if path.suffix in TEXTS and not {"node_modules", "dist"} & {*path.parts}]

    naming = [
        path for path in files if "branchline_internal" in (text := path.read_text()) or "branchline.internal" in text
    ]

    assert files
    assert not naming
