# SPDX-License-Identifier: Apache-2.0
"""JSON from strangers: what is refused, where, and that size costs no recursion."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acestep_schemas.strict_json import MAX_DEPTH, MAX_NODES, JsonRefused, loads

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def refusal(text: str) -> str:
    with pytest.raises(JsonRefused) as caught:
        loads(text)
    return str(caught.value)


@patient
@given(values)
def test_it_reads_what_the_standard_library_writes(value: object) -> None:
    assert loads(json.dumps(value)).value == value
    assert loads(json.dumps(value, ensure_ascii=False, indent=1)).value == value


@patient
@given(st.text(alphabet='{}[]",:\\ 01eatfy-\n\ud800', max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        value = loads(text).value
    except JsonRefused:
        return
    assert value == json.loads(text)


@pytest.mark.parametrize(
    ("text", "where"),
    [("", "line 1, column 1"), ('{"a":\n  oops}', "line 2, column 3"), ('{"a": 1} x', "line 1, column 10")],
)
def test_a_syntax_error_says_where(text: str, where: str) -> None:
    assert where in refusal(text)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_python_writes_where_json_has_no_number_is_read(word: str) -> None:
    (found,) = loads(f'{{"a": {word}}}').fields.values()
    assert repr(found) == repr(float(word))
    assert loads(f'{{"a": "{word}"}}').value == {"a": word}


@pytest.mark.parametrize("pair", ["[]", '{"a":}'])
def test_nesting_is_bounded(pair: str) -> None:
    opening, closing = pair[:-1], pair[-1]
    deepest = opening * (MAX_DEPTH - 1) + "[]" + closing * (MAX_DEPTH - 1)
    assert loads(deepest).value
    assert "nested deeper than 32" in refusal(opening + deepest + closing)
    assert "nested deeper than 32" in refusal(opening * 200_000)


def test_brackets_inside_text_do_not_count() -> None:
    brackets = '\\"' + "[" * 1_000 + "," * (MAX_NODES + 1) + "\\\\"
    assert loads(f'["{brackets}"]').value == [json.loads(f'"{brackets}"')]


def test_the_number_of_values_is_bounded() -> None:
    assert loads(json.dumps([0] * MAX_NODES)).value == [0] * MAX_NODES
    assert "more than 20,000 values" in refusal(json.dumps([0] * (MAX_NODES + 1)))


def test_a_number_of_a_million_digits_is_just_too_large() -> None:
    assert loads("9" * 1_000_000).value == float("inf")


def test_a_long_text_costs_little_time() -> None:
    text = json.dumps({"a": "\\" * 500_000 + "x" * 500_000})
    started = time.process_time()
    loads(text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("opening", ['{"', "[", '{"a": "b", "'])
def test_a_text_without_an_end_costs_little_time(opening: str) -> None:
    """Each of its escaped quotes might be where a text begins: tried one after the other, that takes an hour."""
    started = time.process_time()
    assert refusal(opening + '\\"' * 500_000)
    assert time.process_time() - started < 2


def test_keys_that_stand_twice_in_one_object_are_reported_once_each() -> None:
    document = loads('{"a": 1, "b": {"c": 1, "c": 2, "c": 3}, "a": {"c": 0}}')
    assert document.value == {"a": {"c": 0}, "b": {"c": 3}}
    assert sorted(document.repeated) == ["a", "c"]
    assert len(loads("{" + ",".join(f'"{n}":1,"{n}":2' for n in range(500)) + "}").repeated) == 20
