"""What agents give as JSON of their own, kept within bounds."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.limits import STRUCT_BYTES
from services.runtime.validation import validate
from services.sandbox.structs import fits, from_struct, to_struct
from services.sandbox.words import clean, head, tail

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.dictionaries(st.text(max_size=8), st.integers(-(2**53), 2**53) | st.booleans() | st.text(max_size=20)))
def test_what_is_small_is_kept_whole(value: dict[str, Any]) -> None:
    assert from_struct(to_struct(value)) == value
    assert fits(value)


@given(_JSON)
def test_any_json_becomes_a_struct_that_the_contract_takes(value: Any) -> None:
    validate(to_struct(clean(value)))


@pytest.mark.parametrize(
    "value",
    [
        {"text": "x" * 100_000},
        {f"name{number}": "x" * 100 for number in range(5000)},
        {"x" * 50_000: 1},
        {"list": ["€" * 1000] * 1000},
        [[["x" * 1000] * 100] * 100] * 10,
        {"number": 10**400, "nan": math.nan},
        "x" * 1_000_000,
    ],
)
def test_what_is_large_is_cut_and_stays_json(value: Any) -> None:
    made = to_struct(value)
    assert 0 < made.ByteSize() <= STRUCT_BYTES
    assert json.loads(json.dumps(from_struct(made), allow_nan=False))


def test_nesting_without_end_is_cut() -> None:
    deep: Any = "bottom"
    for _ in range(500):
        deep = {"in": deep}
    validate(to_struct(clean(deep)))


@given(st.text(max_size=60), st.integers(3, 40))
def test_a_text_keeps_its_beginning_or_its_end(text: str, most: int) -> None:
    assert len(head(text, most).encode()) <= most
    assert text.startswith(head(text, most).removesuffix("…")) or text == head(text, most)
    kept, omitted = tail(text, most)
    assert text.endswith(kept)
    assert len(kept.encode()) + omitted == len(text.encode())


def test_half_characters_and_the_null_character_are_replaced() -> None:
    said = json.loads('{"a\\ud800": ["\\u0000b", "\\ud83d\\ude00"]}')
    assert clean(said) == {"a�": ["�b", "😀"]}
