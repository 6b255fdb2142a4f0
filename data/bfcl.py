"""BFCL v4 Python AST, 5 sets: 1,240 requests for function calls (ShishirPatil/gorilla, Berkeley; Apache-2.0), and their grader.

    load("parallel") -> [{"id", "messages", "tools", "functions", "possible_answer"}, ...]
    grade([{"name": "spotify.play", "arguments": {"artist": "Maroon 5", "duration": 15}}], functions, possible_answer) -> Outcome

simple_python 400 (one function, one call), multiple 200 (several functions, one call), parallel 200 and parallel_multiple 200 (several
calls in any order), irrelevance 240 (no function fits: no call). Not the leaderboard's overall score; several turns are out of scope.

Calls are never run: they are compared with lists of accepted values, by the published rules with three differences, each of which can only
lower a score. A boolean is never 0 or 1, inside dicts and lists too. Parallel calls are matched to the answers as well as they can be,
where theirs is greedy. Irrelevance is right without a call tag, where theirs forgives a call that it cannot parse: that is our share of
`right` and `ungradable` together.
"""
import hashlib
import json

from data.gsm8k import fetch
from data.grading import MAX_CHARS, Outcome, Problem, never_raises
from tokenizer import CALL, ToolCallError, parse_tool_calls

# the branch, not a commit: sha256 decides whether the file is still the one that was measured here
URL = "https://raw.githubusercontent.com/ShishirPatil/gorilla/main/berkeley-function-call-leaderboard/bfcl_eval/data/{path}"
FILES = {  # category: (rows, sha256 of the questions, sha256 of the answers)
    "simple_python": (400, "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
                      "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc"),
    "multiple": (200, "aef168155ebd74b7ac2401198b201343bc7d16d7a3d7e0d4e6d8ee82c6969b2a",
                 "244e00ce9395df948bcafc7bee64e8f9c87ef70887587d83cae45b13699f3047"),
    "parallel": (200, "19f51a82eff42e5d62541aa500115a056eb78f437c2ba1f10415fd7c8e5dda84",
                 "8a6aa19c1adddc6a5a2f7e40f9dbf30cc7e95815e7b830c90589ab318229e0f0"),
    "parallel_multiple": (200, "8863ea8433239f55c5f016154cf0830853c89f693c6ea270396a2fa121960579",
                          "5ebf24f458c1f16300c05505d83d6f0a1b68b79be273a033febd0d4f840507e3"),
    "irrelevance": (240, "2b6ed4c2e992cdcf5f1678a701851f944bef7550ee026ed1ddb89efed5be01a6", None),
}
# BFCL's name of a type: (JSON schema's name, the Python type of a value). any has no name, and by their rules expects a string.
TYPES = {"string": ("string", str), "integer": ("integer", int), "float": ("number", float), "boolean": ("boolean", bool),
         "array": ("array", list), "tuple": ("array", list), "dict": ("object", dict), "any": (None, str)}


# -----------------------------------------------------------------------------
# Files


def schema(own: dict) -> dict:
    """A schema in BFCL's words -> in JSON schema's: dict -> object, float -> number, tuple -> array, any -> no type; `optional` goes (what
    is not in `required` is optional). Order of keys and all else stay."""
    new = {}
    for key, value in own.items():
        if key == "type":
            if value not in TYPES:
                raise ValueError(f"expected a type of {', '.join(TYPES)}, found {value!r}")
            if TYPES[value][0]:
                new[key] = TYPES[value][0]
        elif key == "properties":  # names of parameters are no keywords: one may be called "type" or "optional"
            new[key] = {name: schema(inner) for name, inner in value.items()}
        elif key == "items":
            new[key] = schema(value)
        elif key != "optional":
            new[key] = value
    return new


def load(category: str) -> list[dict]:
    """Rows of one of the five sets, in the order of the file. For evaluation only.

    messages         the request, one user's turn
    tools            the functions in OpenAI's form, to be rendered; names keep their dots
    functions        the same as BFCL writes them, for grade()
    possible_answer  [{name: {parameter: [accepted values]}}, ...], one per call; "" among the values: the parameter may be left out
    """
    if category not in FILES:
        raise ValueError(f"bfcl: expected a category of {', '.join(FILES)}, found {category!r}")
    _, question_hash, answer_hash = FILES[category]
    questions = _read(f"BFCL_v4_{category}.json", question_hash)
    answers = _read(f"possible_answer/BFCL_v4_{category}.json", answer_hash) if answer_hash else [
        {"id": row["id"], "ground_truth": []} for row in questions]
    rows = []
    for row, answer in zip(questions, answers, strict=True):
        names = [function["name"] for function in row["function"]]
        unknown = [name for call in answer["ground_truth"] for name in call if name not in names]
        if row["id"] != answer["id"] or unknown or len(row["question"]) != 1:
            raise ValueError(f"bfcl: {row['id']}: expected one turn and an answer with known functions, found "
                             f"{len(row['question'])} turns, the answer of {answer['id']}, unknown {unknown}")
        tools = [{"type": "function", "function": {**f, "parameters": schema(f["parameters"])}} for f in row["function"]]
        rows.append({"id": row["id"], "messages": row["question"][0], "tools": tools, "functions": row["function"],
                     "possible_answer": answer["ground_truth"]})
    return rows


def _read(path, sha256):
    return [json.loads(line) for line in fetch(f"bfcl/{path}", URL.format(path=path), sha256).read_bytes().splitlines()]


def problems(category: str, num: int | None = None, seed: int = 0) -> list[Problem]:
    """`num` problems (all, if None or more than there are) in an order that the seed alone decides: a larger num only adds to the end.
    hidden is the row; its tools are to be rendered into the prompt. The gold turn is graded right, and is never to be trained on."""
    order = sorted(load(category), key=lambda row: hashlib.blake2b(f"{seed}/{row['id']}".encode(), digest_size=8).digest())
    return [Problem(f"bfcl/{category}", row["messages"],
                    [{"role": "assistant", "content": "", "tool_calls": gold_calls(row["functions"], row["possible_answer"])}]
                    if row["possible_answer"] else [{"role": "assistant", "content": "None of the functions can do that."}],
                    "", row, row["tools"]) for row in order[:num]]


def gold_calls(functions: list[dict], possible_answer: list[dict]) -> list[dict]:
    """The first accepted value of every parameter that may not be left out -> calls [{"name", "arguments"}, ...]. A few answers would
    leave out what their schema requires: such a parameter stays."""
    required = {function["name"]: function["parameters"].get("required", []) for function in functions}

    def first(options):
        value = next(option for option in options if option != "")
        if isinstance(value, dict):
            return {key: first(inner) for key, inner in value.items() if "" not in inner}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [first([item]) for item in value]
        return value

    return [{"name": name, "arguments": {key: first(options) for key, options in parameters.items()
                                         if "" not in options or key in required[name]}}
            for call in possible_answer for name, parameters in call.items()]


# -----------------------------------------------------------------------------
# Grader

_DROPPED = str.maketrans("'", '"', " ,./-_*^")


def _plain(value):
    """A string as it is compared; any other value as it is."""
    return value.translate(_DROPPED).lower() if isinstance(value, str) else value


def _same(a, b):
    """a == b, but a boolean equals booleans only, at any depth."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def _accepted_dict(value, options):
    """Is `value` as one of `options` says, each {key: [accepted values]}?"""
    return any(isinstance(option, dict) and value.keys() <= option.keys()
               and all(any(_same(_plain(value[key]), _plain(accepted)) for accepted in option[key]) if key in value else "" in option[key]
                       for key in option) for option in options)


def _accepted(value, options, kind, items):
    """Is `value` one of `options`, for a parameter of type `kind` whose items, if it has any, are of type `items`?"""
    first = next((option for option in options if option != ""), None)
    expected = TYPES[kind][1]
    fits = type(value) is expected or (expected is float and type(value) is int)
    if not fits and type(value) is not type(first):
        return False
    if isinstance(value, dict):
        return _accepted_dict(value, options)
    if isinstance(value, list) and items == "dict":
        return any(isinstance(option, list) and len(option) == len(value)
                   and all(isinstance(v, dict) and _accepted_dict(v, [o]) for v, o in zip(value, option)) for option in options)
    if isinstance(value, list):  # "" stands for the empty list too, as list("") is one; so by their rules
        return any(_same([_plain(v) for v in value], [_plain(o) for o in option]) for option in options
                   if isinstance(option, list) or option == "")
    return any(_same(_plain(value), _plain(option)) for option in options)


def _fits(call, functions, possible):
    """Is `call` the call that `possible`, {name: {parameter: [accepted values]}}, describes?"""
    [(name, accepted)] = possible.items()
    if call["name"] != name:
        return False
    parameters, arguments = functions[name]["parameters"], call["arguments"]
    return (all(key in arguments for key in parameters.get("required", []))
            and all(key in arguments or "" in options for key, options in accepted.items())
            and all(key in parameters["properties"] and key in accepted and
                    _accepted(value, accepted[key], parameters["properties"][key]["type"],
                              parameters["properties"][key].get("items", {}).get("type")) for key, value in arguments.items()))


@never_raises
def grade(calls: list[dict], functions: list[dict], possible_answer: list[dict]) -> Outcome:
    """Compare calls [{"name", "arguments"}, ...] with a row's possible_answer; functions as in the row (not its tools).

    RIGHT if calls and answers can be paired so that each call fits its answer, in any order; with an empty possible_answer
    (irrelevance), if there is no call. A call that is not of this form is UNGRADABLE.
    """
    if not all(isinstance(call, dict) and call.keys() == {"name", "arguments"} and isinstance(call["arguments"], dict) for call in calls):
        return Outcome.UNGRADABLE
    functions = {function["name"]: function for function in functions}
    unknown = [name for possible in possible_answer for name in possible if name not in functions]
    if unknown or any(len(possible) != 1 for possible in possible_answer):
        raise ValueError(f"expected one known function per possible answer, found unknown {unknown} in {str(possible_answer)[:200]}")
    if len(calls) != len(possible_answer):
        return Outcome.WRONG
    fits = [[_fits(call, functions, possible) for possible in possible_answer] for call in calls]
    return Outcome.RIGHT if _perfect(fits) else Outcome.WRONG


def _perfect(fits):
    """Is there a perfect matching in the square boolean matrix fits[call][answer]? Kuhn: each call in turn takes an answer, and whoever
    holds it looks for another."""
    holder = {}

    def place(call, seen):
        for answer, fit in enumerate(fits[call]):
            if fit and answer not in seen:
                seen.add(answer)
                if answer not in holder or place(holder[answer], seen):
                    holder[answer] = call
                    return True
        return False

    return all(place(call, set()) for call in range(len(fits)))


@never_raises
def grade_response(response: str, row: dict) -> Outcome:
    """Grade the text of a turn, calls in <tool_call> tags, against a row of load().

    UNGRADABLE: blank, more than MAX_CHARS characters, calls that do not parse; and no call where one is asked for. Types and names are
    left to grade(), as some accepted values are not of the type that their schema names.
    """
    if len(response) > MAX_CHARS or not response.strip():
        return Outcome.UNGRADABLE
    try:
        _, calls = parse_tool_calls(response)
    except ToolCallError:
        return Outcome.UNGRADABLE
    if row["possible_answer"] and CALL not in response:
        return Outcome.UNGRADABLE
    return grade(calls, row["functions"], row["possible_answer"])
