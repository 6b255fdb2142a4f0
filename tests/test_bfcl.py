import copy
import json
import os

import pytest

from adversarial import assert_bounded
from data import bfcl
from data.grading import Outcome
from tokenizer import Tokenizer, call_json, check_value, parse_tool_calls

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR
staged = pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), "bfcl")),
                            reason="needs TEMPER_DATA=<folder that holds bfcl/>")
ANSWERED = ("simple_python", "multiple", "parallel", "parallel_multiple")
# two answers list a parameter that their function does not have; it may be left out, and given it is refused
BEYOND_SCHEMA = {"parallel_multiple_12": "permeability", "parallel_multiple_26": "type"}


def function(name, required=(), **properties):
    return {"name": name, "description": "", "parameters": {"type": "dict", "properties": properties, "required": list(required)}}


def call(name, **arguments):
    return {"name": name, "arguments": arguments}


def one(kind, options, value, **more):
    """Outcome of f(x=value) where x has type kind and accepts options."""
    return bfcl.grade([call("f", x=value)], [function("f", x={"type": kind, **more})], [{"f": {"x": options}}])


# -----------------------------------------------------------------------------
# Rules, by hand


@pytest.mark.parametrize("kind, options, right, wrong", [
    ("string", ["New York, NY"], ["New York, NY", "new york ny", "NEW-YORK_NY", "new.york/ny^*"], ["New York", "", "NYC", 5, ["New York, NY"], None, "new\tyork ny"]),
    ("string", ["it's"], ["it's", 'it"s'], ["its"]),
    ("string", ["a", ""], ["A", ""], ["b", None]),
    ("integer", [5], [5], [5.0, "5", True, 6, [5], None]),
    ("integer", [1], [1], [True, 1.0]),
    ("float", [5.0], [5.0, 5], ["5.0", 5.1, True, 10**400]),
    ("float", [1], [1, 1.0], [True]),
    ("float", [0.5, 50.0], [0.5, 50], [0.50001]),
    ("boolean", [True], [True], [1, "true", False, 1.0]),
    ("boolean", [False, ""], [False], [0, ""]),
    ("any", ["x"], ["X"], [1]),
    ("any", [7], [7], ["7", 7.0]),                                   # a gold of another type than the schema's
    ("string", ["", True], [True], ["true", 1]),
    ("float", ["", None], [None], ["None", ""]),
    ("dict", [{"a": [1, 2], "b": ["X y", ""]}], [{"a": 1}, {"a": 2, "b": "xy"}, {"a": 1, "b": ""}], [{}, {"b": "xy"}, {"a": 3}, {"a": 1, "c": 1}, {"a": True}, [], "a"]),
    ("dict", [{"a": [1]}, {"b": [2]}, ""], [{"a": 1}, {"b": 2}], [{"a": 1, "b": 2}, {}]),
    ("dict", [{"a": [[True, 2]]}], [{"a": [True, 2]}], [{"a": [1, 2]}]),
])
def test_values(kind, options, right, wrong):
    assert [one(kind, options, value) for value in right] == [RIGHT] * len(right)
    assert [(value, one(kind, options, value)) for value in wrong] == [(value, WRONG) for value in wrong]


@pytest.mark.parametrize("kind", ("array", "tuple"))
@pytest.mark.parametrize("items, options, right, wrong", [
    ("integer", [[3, 5]], [[3, 5]], [[5, 3], [3], [3, 5, 5], ["3", "5"], "3, 5", 3, []]),
    ("float", [[3.0, 5.5]], [[3.0, 5.5], [3, 5.5]], [[3.0, 5]]),
    ("string", [["New York", "LA"], ["NYC", "LA"]], [["new york", "L.A."], ["nyc", "la"]], [["NYC", "New York"], ["newyorkla"]]),
    ("boolean", [[True]], [[True]], [[1]]),
    ("string", [["a"], ""], [["A"], []], [[""], [["a"]]]),
    ("array", [[[1, 2], [3, 4]]], [[[1, 2], [3, 4]]], [[[1, 2], [4, 3]], [[1, 2]]]),
    ("dict", [[{"a": [1]}, {"a": [2], "b": ["x", ""]}]], [[{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 2, "b": "X"}]], [[{"a": 2}, {"a": 1}], [{"a": 1}], [{"a": 1}, 2], []]),
])
def test_lists(kind, items, options, right, wrong):
    assert [one(kind, options, value, items={"type": items}) for value in right] == [RIGHT] * len(right)
    assert [(value, one(kind, options, value, items={"type": items})) for value in wrong] == [(value, WRONG) for value in wrong]


def test_parameters():
    functions = [function("m.f", ["x"], x={"type": "integer"}, y={"type": "integer"}, z={"type": "integer"}), function("g", x={"type": "integer"})]
    gold = [{"m.f": {"x": [1], "y": [2, ""], "w": [""]}}]
    grade = lambda *calls: bfcl.grade(list(calls), functions, gold)
    assert grade(call("m.f", x=1)) == grade(call("m.f", x=1, y=2)) == RIGHT
    for bad in (call("m.f"), call("m.f", y=2), call("m.f", x=1, y=3), call("m.f", x=1, z=3), call("m.f", x=1, w=1), call("m_f", x=1), call("g", x=1)):
        assert grade(bad) == WRONG, bad
    assert grade() == grade(call("m.f", x=1), call("m.f", x=1)) == grade(call("m.f", x=1), call("g", x=1)) == WRONG
    # required by the schema and left out of the answer: no call without it is right
    assert bfcl.grade([call("m.f", y=2)], functions, [{"m.f": {"x": ["", 1], "y": [2]}}]) == WRONG
    # and what the answer requires is required, whatever the schema says
    assert bfcl.grade([call("m.f", x=1)], functions, [{"m.f": {"x": [1], "y": [2]}}]) == WRONG


def test_parallel_calls_are_matched_as_well_as_can_be():
    functions = [function("f", ["x"], x={"type": "integer"})]
    gold = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}, {"f": {"x": [3]}}]
    for order in ((1, 2, 3), (2, 1, 3), (3, 2, 1), (1, 3, 2)):   # greedily, 1 takes the first answer and leaves none to 2
        assert bfcl.grade([call("f", x=x) for x in order], functions, gold) == RIGHT, order
    for order in ((1, 1, 2), (2, 2, 3), (1, 2), (1, 2, 3, 3)):
        assert bfcl.grade([call("f", x=x) for x in order], functions, gold) == WRONG, order
    assert bfcl.grade([call("f", x=1), call("f", x=1), call("f", x=3)], functions, gold) == RIGHT


ROW = {"functions": [function("m.f", ["x"], x={"type": "integer"})], "possible_answer": [{"m.f": {"x": [1]}}]}
IRRELEVANT = {**ROW, "possible_answer": []}
GOOD = '<tool_call>\n{"name": "m.f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize("response, outcome, irrelevant", [
    (GOOD, RIGHT, WRONG), ("I call it.\n" + GOOD, RIGHT, WRONG), (GOOD + "\n" + GOOD, WRONG, WRONG), (GOOD.replace("1", "2"), WRONG, WRONG),
    (GOOD.replace("1", '"1"'), WRONG, WRONG), (GOOD.replace("m.f", "m_f"), WRONG, WRONG), (GOOD + " done", UNGRADABLE, UNGRADABLE),
    (GOOD.removesuffix("</tool_call>"), UNGRADABLE, UNGRADABLE), (GOOD.replace("1}", "1,}"), UNGRADABLE, UNGRADABLE),
    (GOOD.replace('"x": 1', '"x": 2, "x": 1'), UNGRADABLE, UNGRADABLE), (GOOD.replace("1", "NaN"), UNGRADABLE, UNGRADABLE),
    ("I cannot do that.", UNGRADABLE, RIGHT), ("m.f(x=1)", UNGRADABLE, RIGHT), ("", UNGRADABLE, UNGRADABLE), (" \n", UNGRADABLE, UNGRADABLE),
])
def test_responses(response, outcome, irrelevant):
    assert bfcl.grade_response(response, ROW) == outcome
    assert bfcl.grade_response(response, IRRELEVANT) == irrelevant


def test_an_exception_is_never_a_score(caplog):
    assert bfcl.grade([call("f")], [], [{"f": {}}]) == ERROR and "unknown ['f']" in caplog.text
    assert bfcl.grade([], [function("f")], [{"f": {}, "g": {}}]) == ERROR
    assert bfcl.grade(None, [], []) == bfcl.grade_response(None, ROW) == ERROR
    assert bfcl.grade([{"name": "f"}], [function("f")], [{"f": {}}]) == bfcl.grade(["f()"], [function("f")], [{"f": {}}]) == UNGRADABLE


def test_adversarial_corpus():
    outcomes = assert_bounded(lambda text: bfcl.grade_response(text, ROW))
    assert set(outcomes.values()) == {UNGRADABLE, WRONG}
    irrelevant = assert_bounded(lambda text: bfcl.grade_response(text, IRRELEVANT))
    assert ERROR not in irrelevant.values() and {irrelevant[name] for name in ("empty", "blank", "nul", "too long")} == {UNGRADABLE, RIGHT}
    assert irrelevant["nul"] == RIGHT and irrelevant["64 KB of calls"] == WRONG and irrelevant["deep call"] == UNGRADABLE
    nested = '{"name": "m.f", "arguments": {"x": %s}}'
    for value in ("9" * 4000, "-" + "9" * 4000, '"' + "a" * 16000 + '"', "[" * 20 + "]" * 20):
        assert bfcl.grade_response(f"<tool_call>\n{nested % value}\n</tool_call>", ROW) == WRONG


# -----------------------------------------------------------------------------
# Schemas and files


def test_schema():
    assert bfcl.schema({"type": "dict", "optional": True, "properties": {
        "optional": {"type": "tuple", "items": {"type": "float", "optional": False}, "description": "d"}, "type": {"type": "any", "default": 1},
        "o": {"type": "array", "items": {"type": "dict", "properties": {"x": {"type": "boolean"}}}}}, "required": ["type"]}) == {
        "type": "object", "properties": {
            "optional": {"type": "array", "items": {"type": "number"}, "description": "d"}, "type": {"default": 1},
            "o": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "boolean"}}}}}, "required": ["type"]}
    with pytest.raises(ValueError, match="expected a type of string, .*found 'object'"):
        bfcl.schema({"type": "object"})


def test_unknown_category_and_missing_file(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="expected a category of simple_python, .*found 'java'"):
        bfcl.load("java")
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    (tmp_path / "bfcl").mkdir()
    (tmp_path / "bfcl/BFCL_v4_irrelevance.json").write_text("{}")
    with pytest.raises(ValueError, match="BFCL_v4_irrelevance.json: expected sha256"):
        bfcl.load("irrelevance")


@staged
def test_rows_render():
    tokenizer, names = Tokenizer.bytes(), set()
    for category, (num, *_) in bfcl.FILES.items():
        rows = bfcl.load(category)
        assert len(rows) == num and all(set(row) == {"id", "messages", "tools", "functions", "possible_answer"} for row in rows)
        for row in rows:
            names |= {tool["function"]["name"] for tool in row["tools"]}
            text = json.dumps(row["tools"])
            assert not any(f'"type": "{old}"' in text for old in ("dict", "float", "tuple", "any"))
            assert [m["role"] for m in row["messages"]] == ["user"]
            assert bool(row["possible_answer"]) == (category != "irrelevance")
        ids = tokenizer.render_prompt(rows[0]["messages"], rows[0]["tools"])
        assert json.dumps(rows[0]["tools"][0], ensure_ascii=False) in tokenizer.decode(ids)
    assert any("." in name for name in names)


@staged
def test_golds_are_right():
    right = fits_schema = 0
    for category in ANSWERED:
        for row in bfcl.load(category):
            calls = bfcl.gold_calls(row["functions"], row["possible_answer"])
            text = "\n".join(f"<tool_call>\n{call_json(c)}\n</tool_call>" for c in calls)
            assert bfcl.grade(calls, row["functions"], row["possible_answer"]) == RIGHT == bfcl.grade_response(text, row), row["id"]
            assert bfcl.grade(calls[::-1], row["functions"], row["possible_answer"]) == RIGHT
            right += 1
            # and with every optional parameter that has a value
            full = copy.deepcopy(calls)
            for c, possible in zip(full, row["possible_answer"]):
                c["arguments"].update({key: value for key, options in possible[c["name"]].items() if key not in c["arguments"]
                                       for value in options[::-1] if value != "" and not isinstance(value, dict)})
            beyond = any(BEYOND_SCHEMA.get(row["id"]) in c["arguments"] for c in full)
            assert bfcl.grade(full, row["functions"], row["possible_answer"]) == (WRONG if beyond else RIGHT), row["id"]
            assert beyond == (row["id"] in BEYOND_SCHEMA)
            for c in calls:  # the strict parser's check, with the schema that the model sees
                tool = next(t["function"] for t in row["tools"] if t["function"]["name"] == c["name"])
                try:
                    check_value(c["arguments"], tool["parameters"], "arguments")
                    fits_schema += 1
                except ValueError:
                    pass
    assert right == 1000 and fits_schema == 1745  # of 1,747: None is accepted for a float once, True for a string once


@staged
def test_golds_of_other_rows_are_wrong():
    for category in ANSWERED:
        rows = bfcl.load(category)
        calls = [bfcl.gold_calls(row["functions"], row["possible_answer"]) for row in rows]
        right = sum(bfcl.grade(calls[i - 1], row["functions"], row["possible_answer"]) == RIGHT for i, row in enumerate(rows))
        assert right == 0
    assert all(bfcl.grade_response("No function fits.", row) == RIGHT for row in bfcl.load("irrelevance"))


def corruptions(row):
    """(kind, calls) that differ from the gold in one field."""
    gold = bfcl.gold_calls(row["functions"], row["possible_answer"])
    functions = {f["name"]: f["parameters"] for f in row["functions"]}
    for i, c in enumerate(gold):
        def changed(name=c["name"], i=i, **arguments):
            new = list(gold)
            new[i] = {"name": name, "arguments": {k: v for k, v in {**c["arguments"], **arguments}.items() if v is not Ellipsis}}
            return new
        yield "name", changed(c["name"] + "x")
        yield "extra", changed(no_such_parameter=1)
        for key in functions[c["name"]]["required"]:
            if key in c["arguments"]:
                yield "missing", changed(**{key: ...})
        for key, value in c["arguments"].items():
            if isinstance(value, bool):
                yield "value", changed(**{key: not value})
            elif isinstance(value, int | float):
                yield "value", changed(**{key: value + 1})
            elif isinstance(value, str):
                yield "value", changed(**{key: value + "q"})
            elif isinstance(value, list):
                yield "value", changed(**{key: [*value, value[0] if value else 1]})
            elif isinstance(value, dict):
                yield "value", changed(**{key: {**value, "no_such_key": 1}})
            yield "type", changed(**{key: int(value)} if isinstance(value, bool) else {key: str(value)} if not isinstance(value, str) else {key: 12345})
        yield "dropped", gold[:i] + gold[i + 1:]
        yield "doubled", gold[:i] + [c] + gold[i:]


@staged
def test_one_wrong_field_is_wrong():
    num, accepted = {}, []
    for category in ANSWERED:
        for row in bfcl.load(category):
            for kind, calls in corruptions(row):
                num[kind] = num.get(kind, 0) + 1
                if bfcl.grade(calls, row["functions"], row["possible_answer"]) != WRONG:
                    accepted.append((row["id"], kind))
    assert all(num[kind] >= n for kind, n in {"name": 1700, "extra": 1700, "missing": 3600, "value": 4100, "type": 4100, "dropped": 1700, "doubled": 1700}.items()), num
    assert accepted == [("simple_python_238", "value")]  # any year of a war is accepted, so one later is too


@staged
def test_problems():
    some, every = bfcl.problems("parallel", 3, seed=1), bfcl.problems("parallel", seed=1)
    assert some == every[:3] and len(every) == 200 and every != bfcl.problems("parallel", seed=2)
    for p in (*every[:20], *bfcl.problems("irrelevance", 3)):
        text = p.gold[0]["content"] + "".join(f"\n<tool_call>\n{call_json(c)}\n</tool_call>" for c in p.gold[0].get("tool_calls", []))
        assert bfcl.grade_response(text, p.hidden) == RIGHT and p.tools and parse_tool_calls(text)
