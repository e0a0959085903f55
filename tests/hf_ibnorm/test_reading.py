"""Files that others wrote: their content, or one line that names the file and the place."""

import re

import pytest

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.reading import check_form, read_json, read_text, read_yaml, reading

# Nine lines that stand for 10⁹ values.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\x00", r"it is no UTF-8 text \(byte 0 is 0xff\)"),
        (b"{", "cannot be read: Expecting"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"null", "got None, must be a mapping"),
        (b"[1, 2]", r"got \[1, 2\], must be a mapping"),
        (b"", "cannot be read"),
    ],
)
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^config: .*a\.json.*{message}") as caught:
        read_json("config", tmp_path / "a.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "it has more than 100,000 values, aliases written out"),
        ("a: &a [*a]", "it has more than 100,000 values"),
        ("seed: 0\nmodel: {a: 1}\nseed: 1\n", "seed stands there twice, the second time in line 3"),
        ("a: [", "cannot be read"),
        ("!!python/object/apply:os.system [true]", "cannot be read"),
        ("a: 1\n---\nb: 2", "cannot be read"),
        ("[" * 2000 + "]" * 2000, "it is nested too deeply"),
        ("- 1", "must be a mapping"),
        ("", "got None, must be a mapping"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_one_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"^config: .*a\.yaml.*{message}"):
        read_yaml("config", tmp_path / "a.yaml")


def test_aliases_and_merges_within_reason_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("base: &base {x: 1, y: 2}\nother: {<<: *base, y: 3}\nboth: [*base, *base]\n")
    found = read_yaml("config", tmp_path / "a.yaml")
    assert found["other"] == {"x": 1, "y": 3}
    assert found["both"] == [{"x": 1, "y": 2}] * 2


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_text("data", tmp_path / "a") == '{"a": 1}'
    assert read_json("data", tmp_path / "a") == read_yaml("data", tmp_path / "a") == {"a": 1}


@pytest.mark.parametrize(
    ("value", "form", "message"),
    [
        ({"a": True}, {"a": int}, "x: a: got True, must be a whole number"),
        ({"a": 1.5}, {"a": int}, "x: a: got 1.5, must be a whole number"),
        ({"a": float("nan")}, {"a": float}, "x: a: got nan, must be a finite number"),
        ({}, {"a": int}, "x has no a"),
        ({"a": None}, {"a?": str}, "x: a: got None, must be text"),
        ({"a": [{"b": "c"}, {"b": 1}]}, {"a": [{"b": str}]}, "x: a: item 1: b: got 1, must be text"),
        ({"a": {}, "b": 1}, {"*": dict}, "x: b: got 1, must be a mapping"),
        ({"a": "?" * 100}, {"a": (float, type(None))}, f"x: a: got '{'?' * 59}..., must be a finite number or null"),
    ],
)
def test_the_place_of_a_wrong_value_is_named(value, form, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check_form("x", value, form)


def test_values_of_the_right_form_pass():
    form = {"a": float, "b?": [int], "c": {"known": str, "*": (bool, type(None))}}
    check_form("x", {"a": 1, "c": {"known": "", "other": None, "more": True}, "free": object()}, form)
    check_form("x", {"a": 2.5, "b": [], "c": {"known": ""}}, form)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyError("a"), RuntimeError()])
def test_any_exception_while_reading_is_one_line_and_an_error_of_ours_stays_as_it_is(error):
    with pytest.raises(UserError, match="^config: f cannot be read: .+"), reading("config", "f"):
        raise error
    with pytest.raises(UserError, match="^own$"), reading("config", "f"):
        raise UserError("own")
