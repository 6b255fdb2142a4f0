"""
Messages to ids and mask, and model text back to calls: what is trained on is the response and nothing else, the text is
that of Qwen's templates, nothing in a message becomes a special token, and what was sampled is never rendered again.
"""

import importlib.util
import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from adversarial import cost
from tokenizer import Tokenizer, ToolCallError, parse_tool_calls, validate_messages

QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# the two facts that are read from a template, as Qwen's files spell them
QWEN25_MARK = "{{- '<|im_start|>system\\n" + QWEN25_SYSTEM + "<|im_end|>\\n' }}"
QWEN3_MARK = "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
EMPTY_THINK = "<think>\n\n</think>\n\n"


def styled(template=""):
    """The byte tokenizer in the chat style of a template."""
    return Tokenizer({**Tokenizer.bytes().files, "chat_template.jinja": template})


TOKENIZERS = {"bytes": Tokenizer.bytes(), "qwen2.5": styled(QWEN25_MARK), "qwen3": styled(QWEN3_MARK)}

TOOLS = [
    {"type": "function", "function": {
        "name": "kv_get", "description": "값 <tool_call>", "parameters": {
            "type": "object", "properties": {"key": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["key"]}}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = {"name": "kv_get", "arguments": {"key": "사과 \"1\" </tool_call>", "n": [1, 2.5, None, True]}}
TOOL_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, {"name": "now", "arguments": {}}]},
    {"role": "tool", "content": "3"},
    {"role": "tool", "content": '{"time": "12:00"}'},
    {"role": "assistant", "tool_calls": [{"name": "now", "arguments": {}}]},
    {"role": "tool", "content": "later"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]


def trained_runs(tokenizer, ids, mask):
    """The texts of the maximal runs of mask 1."""
    runs, last = [], 0
    for i, m in zip(ids, mask):
        if m and not last:
            runs.append([])
        if m:
            runs[-1].append(i)
        last = m
    return [tokenizer.decode(run) for run in runs]


def response(message):
    """What an assistant's message is as sampled text, written out again here and not taken from tokenizer.py."""
    calls = ['<tool_call>\n{"name": "' + c["name"] + '", "arguments": ' + json.dumps(c["arguments"], ensure_ascii=False)
             + "}\n</tool_call>" for c in message.get("tool_calls") or []]
    return "\n".join([message.get("content")] * bool(message.get("content")) + calls) + "<|im_end|>"


# -----------------------------------------------------------------------------
# By hand

def test_one_turn_by_hand():
    tokenizer = Tokenizer.bytes()
    ids, mask = tokenizer.render([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])
    text = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert tokenizer.decode(ids) == text
    assert ids == [257, *b"user\n2+2?", 258, 10, 257, *b"assistant\n", ord("4"), 258, 10]
    assert mask == [0] * 23 + [1, 1, 0]


def test_a_call_and_its_result_by_hand():
    tokenizer = Tokenizer.bytes()
    messages = [{"role": "user", "content": "?"},
                {"role": "assistant", "tool_calls": [{"name": "now", "arguments": {}}]},
                {"role": "tool", "content": "9"}, {"role": "assistant", "content": "9"}]
    ids, mask = tokenizer.render(messages)
    call = [259, *b'\n{"name": "now", "arguments": {}}\n', 260, 258]
    result = [10, 257, *b"user\n", 261, *b"\n9\n", 262, 258, 10, 257, *b"assistant\n"]
    assert ids == [257, *b"user\n?", 258, 10, 257, *b"assistant\n", *call, *result, ord("9"), 258, 10]
    assert mask == [0] * 20 + [1] * len(call) + [0] * len(result) + [1, 1, 0]
    assert tokenizer.render_tool_results(["9"]) == result
    two = "\n<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
    assert tokenizer.decode(tokenizer.render_tool_results(["a", "b"])) == two + "<|im_start|>assistant\n"


def test_tools_block_in_full():
    tokenizer = Tokenizer.bytes()
    text = tokenizer.decode(tokenizer.render_prompt(TOOL_TALK[:2], TOOLS))
    assert text == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "kv_get", "description": "값 <tool_call>", "parameters": '
        '{"type": "object", "properties": {"key": {"type": "string"}, "n": {"type": "integer"}}, '
        '"required": ["key"]}}}\n'
        '{"type": "function", "function": {"name": "now"}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("style, system", [("bytes", None), ("qwen2.5", QWEN25_SYSTEM), ("qwen3", None)])
def test_default_system_message(style, system):
    tokenizer = TOKENIZERS[style]
    text = tokenizer.decode(tokenizer.render_prompt([{"role": "user", "content": "Hi"}]))
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    tail = EMPTY_THINK if style == "qwen3" else ""
    assert text == head + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" + tail
    with_tools = tokenizer.decode(tokenizer.render_prompt([{"role": "user", "content": "Hi"}], TOOLS))
    assert with_tools.startswith("<|im_start|>system\n" + (f"{system}\n\n" if system else "") + "# Tools\n")


# -----------------------------------------------------------------------------
# Any conversation

# words that could be taken for special tokens, white space at the ends, JSON and marks that combine
pieces = st.sampled_from([
    "a", "Tom", " ", "\n", "\n\n", "\t", "가", "e\u0301", "\u0301", "😀", "7", '"', "\\", "{", "}", "<think",
    "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool_response>", "</tool_response>"])
texts = st.lists(pieces, max_size=6).map("".join)
json_values = st.recursive(
    st.one_of(texts, st.sampled_from(["<tool_call>", "</tool_call>", True, False, None]), st.integers(-9**20, 9**20),
              st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5)
calls = st.fixed_dictionaries({"name": st.sampled_from(["kv_get", "now", "math.sum", "계산"]),
                               "arguments": st.dictionaries(texts, json_values, max_size=3)})
filled = texts.filter(len)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2))):
            made = draw(st.lists(calls, min_size=1, max_size=3))
            content = draw(st.one_of(st.just({}), st.builds(lambda t: {"content": t}, texts)))
            messages.append({"role": "assistant", **content, "tool_calls": made})
            messages += [{"role": "tool", "content": draw(texts)} for _ in made]
        messages.append({"role": "assistant", "content": draw(filled)})
    return messages


@pytest.mark.parametrize("style", list(TOKENIZERS))
def test_any_conversation(style):
    tokenizer = TOKENIZERS[style]
    eot, names = tokenizer.end_of_turn_id, {i: name for name, i in tokenizer.specials.items()}

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(conversations(), st.sampled_from([None, TOOLS]))
    def check(messages, tools):
        ids, mask = tokenizer.render(messages, tools)
        assistants = [m for m in messages if m["role"] == "assistant"]
        # exactly the responses are trained on, each ended by one end-of-turn, and what is trained on parses back
        runs = trained_runs(tokenizer, ids, mask)
        assert runs == [response(m) for m in assistants]
        assert sum(i == eot and m for i, m in zip(ids, mask)) == len(assistants)
        for run, message in zip(runs, assistants):
            assert parse_tool_calls(run.removesuffix("<|im_end|>")) == (
                message.get("content") or "", message.get("tool_calls") or [])
        # no text made a special token: they are as many as the turns and calls have
        turns = sum(m["role"] != "tool" for m in messages) + sum(
            m["role"] == "tool" and messages[n - 1]["role"] != "tool" for n, m in enumerate(messages))
        turns += messages[0]["role"] != "system" and (tools is not None or tokenizer.default_system is not None)
        num_calls = sum(len(m.get("tool_calls") or []) for m in messages)
        count = {name: ids.count(i) for i, name in names.items()}
        assert count["<|im_start|>"] == count["<|im_end|>"] == turns and count["<|endoftext|>"] == 0
        assert count["<tool_response>"] == count["</tool_response>"] == num_calls
        assert count["<tool_call>"] == count["</tool_call>"] == num_calls + 2 * (tools is not None)
        assert count["<think>"] == len(assistants) * (style == "qwen3")
        # every prompt on the way is a prefix, and what follows it is the response
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer.render_prompt(messages[:n], tools)
                assert ids[:len(prompt)] == prompt and not any(mask[:len(prompt)][-8:])
                assert mask[len(prompt)] == 1
    check()


@pytest.mark.parametrize("style", list(TOKENIZERS))
def test_prompt_plus_sampled_plus_results_is_the_next_prompt(style):
    """The loop of the engine: nothing is encoded twice, and the whole is the training sequence."""
    tokenizer = TOKENIZERS[style]
    whole, mask = tokenizer.render(TOOL_TALK, TOOLS)
    context = tokenizer.render_prompt(TOOL_TALK[:2], TOOLS)
    sampled_mask = [0] * len(context)
    for n, message in enumerate(TOOL_TALK[:8]):
        if message["role"] == "assistant":
            end = len(context) + whole[len(context):].index(tokenizer.end_of_turn_id) + 1
            sampled_mask += [1] * (end - len(context))
            context = context + whole[len(context):end]                       # "sampled"
            if message.get("tool_calls"):
                num = len(message["tool_calls"])
                context += tokenizer.render_tool_results([m["content"] for m in TOOL_TALK[n + 1:n + 1 + num]])
                assert context == tokenizer.render_prompt(TOOL_TALK[:n + 1 + num], TOOLS)
                sampled_mask += [0] * (len(context) - len(sampled_mask))
    assert context == whole[:len(context)] and sampled_mask == mask[:len(context)]


def test_segments_of_a_bpe_are_encoded_apart():
    """Where content starts with line ends, a BPE would join them with the header's: generation never sees that."""
    from test_tokenizer import both, train
    tokenizer = both(train("gpt2"))[0]
    assert tokenizer.encode("assistant\n") + tokenizer.encode("\n    Yes") != tokenizer.encode("assistant\n\n    Yes")
    start, end, encode = tokenizer.specials["<|im_start|>"], tokenizer.end_of_turn_id, tokenizer.encode
    parts = [[start], encode("user\n"), encode("\n    Hi"), [end], encode("\n"),
             [start], encode("assistant\n"), encode("\n    Yes"), [end], encode("\n")]
    user = {"role": "user", "content": "\n    Hi"}
    ids, mask = tokenizer.render([user, {"role": "assistant", "content": "\n    Yes"}])
    assert ids == sum(parts, [])
    assert mask == [int(n in (7, 8)) for n, part in enumerate(parts) for _ in part]
    assert tokenizer.render_prompt([user]) == sum(parts[:7], [])


def test_think_tags_in_a_response():
    tokenizer = TOKENIZERS["qwen3"]
    think, end = tokenizer.specials["<think>"], tokenizer.specials["</think>"]
    ids, mask = tokenizer.render([{"role": "user", "content": "<think>"},
                                  {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}])
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\nhm\n</think>\n\n4<|im_end|>\n")
    assert [m for i, m in zip(ids, mask) if i in (think, end)] == [1, 1]      # the user's is text, the block is sampled
    ids, mask = tokenizer.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": "4"}])
    assert [m for i, m in zip(ids, mask) if i in (think, end)] == [0, 0]      # the empty block is part of the prompt


def test_tokenizer_without_chat_tokens():
    files = dict(Tokenizer.bytes().files)
    spec = json.loads(files["tokenizer.json"])
    spec["added_tokens"] = spec["added_tokens"][:1]
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(spec)})
    assert tokenizer.end_of_turn_id is None
    with pytest.raises(ValueError, match="im_start"):
        tokenizer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    # tags that are no tokens are written out, and the mask is over their letters
    spec = json.loads(files["tokenizer.json"])
    spec["added_tokens"] = spec["added_tokens"][:3]
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(spec)})
    ids, mask = tokenizer.render(TOOL_TALK, TOOLS)
    assert tokenizer.decode(ids) == Tokenizer.bytes().decode(Tokenizer.bytes().render(TOOL_TALK, TOOLS)[0])
    assert trained_runs(tokenizer, ids, mask) == [response(m) for m in TOOL_TALK if m["role"] == "assistant"]


# -----------------------------------------------------------------------------
# Beside Qwen's own templates

def qwen_template(name):
    pytest.importorskip("jinja2", reason="chat templates need jinja2 (requirements-peers.txt)")
    spec = importlib.util.find_spec("trl")
    if spec is None:
        pytest.skip("trl is not installed: it carries the chat templates (requirements-peers.txt)")
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text()


def jinja_text(template, messages, tools, prompt=False):
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="requirements-peers.txt")
    messages = [{"content": "", **m} for m in messages]
    return utils.render_jinja_template(conversations=[messages], tools=tools, chat_template=template,
                                       add_generation_prompt=prompt, enable_thinking=False)[0][0]


def test_text_is_that_of_qwen_2_5():
    template = qwen_template("qwen2_5")
    tokenizer = styled(template)
    assert tokenizer.default_system == QWEN25_SYSTEM and not tokenizer.empty_think

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(conversations(), st.sampled_from([None, TOOLS]))
    def check(messages, tools):
        assert tokenizer.decode(tokenizer.render(messages, tools)[0]) == jinja_text(template, messages, tools)
        assert tokenizer.decode(tokenizer.render_prompt(messages[:-1], tools)) == jinja_text(
            template, messages[:-1], tools, prompt=True)
    check()


def test_text_is_that_of_qwen_3():
    own, stable = qwen_template("qwen3"), qwen_template("qwen3_training")      # the second leaves history alone
    tokenizer = styled(own)
    assert tokenizer.default_system is None and tokenizer.empty_think

    @settings(max_examples=80, deadline=None, derandomize=True)
    @given(conversations(), st.sampled_from([None, TOOLS]))
    def check(messages, tools):
        # the template strips line ends from the front of a response
        messages = [{**m, "content": m["content"].lstrip("\n") or "x"} if m["role"] == "assistant" and "content" in m
                    else m for m in messages]
        text = tokenizer.decode(tokenizer.render(messages, tools)[0])
        assert text == jinja_text(stable, messages, tools)
        if sum(m["role"] == "assistant" for m in messages) == 1:
            assert text == jinja_text(own, messages, tools)
            assert tokenizer.decode(tokenizer.render_prompt(messages[:-1], tools)) == jinja_text(
                own, messages[:-1], tools, prompt=True)
    check()
    thought = [TOOL_TALK[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThree."}]
    assert tokenizer.decode(tokenizer.render(thought)[0]) == jinja_text(own, thought, None)


def test_ids_are_those_of_the_template_text():
    """A BPE with Qwen's split and tags: rendering and `tokenizers` on the template's text agree on every id."""
    from test_tokenizer import both, train
    template, spec = qwen_template("qwen2_5"), train("qwen2")
    theirs = both(spec)[1]
    tokenizer = Tokenizer({"tokenizer.json": json.dumps(spec), "chat_template.jinja": template})
    assert "<tool_call>" in tokenizer.specials and "<tool_response>" not in tokenizer.specials       # as in Qwen2.5
    plain = [dict(m) for m in TOOL_TALK]
    plain[2] = {**plain[2], "tool_calls": [{"name": "kv_get", "arguments": {"key": "사과"}}, plain[2]["tool_calls"][1]]}
    tools = json.loads(json.dumps(TOOLS).replace(" <tool_call>", ""))
    korean = [{"role": "user", "content": "한국어로 답해 줘.\n\n"}, {"role": "assistant", "content": "네!\n"}]
    for messages in (plain, plain[1:], korean):
        for given_tools in (None, tools):
            expected = theirs.encode(jinja_text(template, messages, given_tools), add_special_tokens=False).ids
            assert tokenizer.render(messages, given_tools)[0] == expected


# -----------------------------------------------------------------------------
# The strict parser

def wrap(body):
    return f"<tool_call>\n{body}\n</tool_call>"


GOOD = '{"name": "kv_get", "arguments": {"key": "a"}}'


def test_calls_that_are_read():
    call = {"name": "kv_get", "arguments": {"key": "a"}}
    assert parse_tool_calls("Hello") == ("Hello", []) and parse_tool_calls("") == ("", [])
    assert parse_tool_calls(wrap(GOOD), TOOLS) == ("", [call])
    assert parse_tool_calls("Yes\n" + wrap(GOOD) + "\n" + wrap(GOOD), TOOLS) == ("Yes", [call, call])
    assert parse_tool_calls("Yes\n\n" + wrap(GOOD), TOOLS) == ("Yes\n", [call])
    assert parse_tool_calls(f"<tool_call>{GOOD}</tool_call>") == ("", [call])
    assert parse_tool_calls(wrap('{"arguments": {}, "name": "now"}'), TOOLS) == ("", [{"name": "now", "arguments": {}}])
    for text in ("<tool_call>", "</tool_call>", 'a "</tool_call>" b', "\\", "{[{["):
        body = json.dumps({"name": "kv_get", "arguments": {"key": text}}, ensure_ascii=False)
        assert parse_tool_calls(wrap(body), TOOLS)[1] == [{"name": "kv_get", "arguments": {"key": text}}]
    deep = "[" * 30 + "]" * 30                                                # 32 with the two objects around it
    assert parse_tool_calls(wrap(f'{{"name": "f", "arguments": {{"a": {deep}}}}}'))[1]
    long = "x" * (16 * 1024 - len(GOOD) - 1)                                  # the body is 16 KB with its line ends
    assert parse_tool_calls(wrap(GOOD.replace('"a"', f'"{long}"')))[1]


@pytest.mark.parametrize("text, reason", [
    ("<tool_call>\n" + GOOD, "not closed"),
    ("<tool_call>", "not closed"),
    (wrap(GOOD) + "\n<tool_call>\n", "not closed"),
    ("</tool_call>", "without"),
    ("a </tool_call>\n" + wrap(GOOD), "without"),
    (wrap(GOOD) + " done", "after a call"),
    (wrap(GOOD) + "</tool_call>", "after a call"),
    (wrap(GOOD) + "<|im_end|>", "after a call"),
    (wrap(GOOD) + "and" + wrap(GOOD), "after a call"),
    (wrap(""), "JSON"),
    (wrap(GOOD + GOOD), "Extra data"),
    (wrap(GOOD + " ok"), "Extra data"),
    (wrap("<tool_call>" + GOOD), "JSON"),
    (wrap(GOOD[:-1]), "JSON"),
    (wrap(GOOD.replace('"', "'")), "JSON"),
    (wrap("[" + GOOD + "]"), "exactly name and arguments"),
    (wrap("null"), "exactly name and arguments"),
    (wrap('{"name": "now"}'), "exactly name and arguments"),
    (wrap('{"name": "now", "arguments": {}, "id": 1}'), "exactly name and arguments"),
    (wrap('{"name": "now", "arguments": "{}"}'), "object"),
    (wrap('{"name": "now", "arguments": []}'), "object"),
    (wrap('{"name": 1, "arguments": {}}'), "string"),
    (wrap('{"name": "", "arguments": {}}'), "string"),
    (wrap('{"name": "now", "name": "now", "arguments": {}}'), "duplicate"),
    (wrap('{"name": "kv_get", "arguments": {"key": "a", "key": "b"}}'), "duplicate"),
    (wrap('{"name": "f", "arguments": {"a": NaN}}'), "NaN"),
    (wrap('{"name": "f", "arguments": {"a": -Infinity}}'), "Infinity"),
    (wrap('{"name": "f", "arguments": {"a": 1e999}}'), "1e999"),
    (wrap('{"name": "f", "arguments": {"a": 01}}'), "JSON"),
    (wrap('{"name": "f", "arguments": {"a": "x\ny"}}'), "control"),
    (wrap('{"name": "f", "arguments": {"a": ' + "[" * 31 + "]" * 31 + "}}"), "deeper than 32"),
    (wrap('{"name": "f", "arguments": {"a": ' + "[" * 100_000), "deeper than 32"),
    (wrap('{"name": "f", "arguments": {"a": "' + "가" * 6000 + '"}}'), "16384 bytes"),
    (wrap('{"name": "f", "arguments": {"a": ' + "9" * 10_000 + "}}"), "JSON"),
])
def test_calls_that_are_refused(text, reason):
    with pytest.raises(ToolCallError) as error:
        parse_tool_calls(text)
    assert reason in str(error.value) and len(str(error.value)) < 500


SCHEMA = {"type": "object", "required": ["s"], "properties": {
    "s": {"type": "string"}, "i": {"type": "integer"}, "x": {"type": "number"}, "b": {"type": "boolean"},
    "e": {"enum": ["a", 1, None]}, "l": {"type": "array", "items": {"type": "integer"}}, "any": {},
    "o": {"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"]},
    "free": {"type": "object"}, "si": {"type": ["string", "integer"]},
    "open": {"type": "object", "properties": {}, "additionalProperties": {"type": "integer"}}}}
ONE = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


@pytest.mark.parametrize("extra, fits", [
    ({}, True), ({"s": 1}, False), ({"s": None}, False), ({"z": 1}, False),
    ({"i": 3}, True), ({"i": 3.0}, False), ({"i": True}, False), ({"i": "3"}, False),
    ({"x": 3}, True), ({"x": 3.5}, True), ({"x": False}, False),
    ({"b": True}, True), ({"b": 1}, False), ({"b": "true"}, False),
    ({"e": "a"}, True), ({"e": 1}, True), ({"e": True}, False), ({"e": None}, True), ({"e": "b"}, False),
    ({"l": []}, True), ({"l": [1, 2]}, True), ({"l": [1, "2"]}, False), ({"l": "1"}, False), ({"l": [[1]]}, False),
    ({"o": {"k": "v"}}, True), ({"o": {}}, False), ({"o": {"k": "v", "z": 1}}, False), ({"o": {"k": 1}}, False),
    ({"free": {"a": [1, {}]}}, True), ({"open": {"a": 1}}, True), ({"open": {"a": "1"}}, False),
    ({"si": 1}, True), ({"si": "1"}, True), ({"si": 1.5}, False), ({"any": [{"a": None}]}, True),
])
def test_arguments_and_schema(extra, fits):
    text = wrap(json.dumps({"name": "f", "arguments": {"s": "x"} | extra}))
    if fits:
        assert parse_tool_calls(text, ONE)[1][0]["arguments"] == {"s": "x"} | extra
    else:
        with pytest.raises(ToolCallError, match="arguments"):
            parse_tool_calls(text, ONE)
        assert parse_tool_calls(text)[1]                                      # without tools only the form is checked


def test_known_tools_only():
    with pytest.raises(ToolCallError, match="unknown tool 'f', expected one of kv_get, now"):
        parse_tool_calls(wrap('{"name": "f", "arguments": {}}'), TOOLS)
    with pytest.raises(ToolCallError, match="missing key"):
        parse_tool_calls(wrap('{"name": "kv_get", "arguments": {}}'), TOOLS)
    with pytest.raises(ToolCallError, match="unknown 'a', expected nothing"):
        parse_tool_calls(wrap('{"name": "now", "arguments": {"a": 1}}'), TOOLS)
    with pytest.raises(ToolCallError, match="unknown tool"):
        parse_tool_calls(wrap(GOOD), [])
    odd = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "float"}}}}}]
    with pytest.raises(ValueError, match="unknown type 'float'") as error:     # the tool's fault, not the model's
        parse_tool_calls(wrap('{"name": "f", "arguments": {"a": 1}}'), odd)
    assert not isinstance(error.value, ToolCallError)


def test_parser_is_linear_and_never_crashes():
    units = ("<tool_call>", "</tool_call>", '"', '\\"', '"\\', "{", "[]", "<tool_call>{", '<tool_call>"', "\ud800", "<")

    def parse(text):
        try:
            return parse_tool_calls(text)[1]
        except ToolCallError:
            return []
    for unit in units:
        for head in ("", "<tool_call>", '<tool_call>{"name": "', "a"):
            assert cost(lambda: parse(head + unit * (64_000 // len(unit))), enough=0.1)[1] <= 0.1, (head, unit)      # quadratic: over a second
    calls, seconds = cost(lambda: parse('<tool_call>{"name": "a", "arguments": {}}</tool_call>' * 40_000), enough=0.5)
    assert len(calls) == 40_000 and seconds <= 0.5                            # 2 MB of calls, .2 s; 1.3 s if each copies the rest


# -----------------------------------------------------------------------------
# What a conversation may hold

USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ASK, RESULT = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}, {"role": "tool", "content": "r"}


@pytest.mark.parametrize("messages", [
    [USER, REPLY], [{"role": "system", "content": ""}, USER, REPLY], [USER, USER, REPLY], [REPLY, USER], [USER, ASK],
    [USER, ASK, RESULT, REPLY], [USER, {**REPLY, "tool_calls": None}], [USER, {**ASK, "content": None}],
    [USER, {**ASK, "content": "x"}, RESULT],
])
def test_valid_messages(messages):
    validate_messages(messages)


@pytest.mark.parametrize("messages, reason", [
    ([], "list of messages"), ("hello", "list of messages"), ([USER, "hello"], "message 1"),
    ([{"role": "human", "content": "a"}, REPLY], "message 0: expected role"),
    ([{"content": "a"}, REPLY], "message 0: expected role"), ([{"role": ["user"], "content": "a"}], "expected role"),
    ([{**USER, "name": "Tom"}, REPLY], "unknown key"), ([{**USER, "tool_calls": []}, REPLY], "unknown key"),
    ([USER, {**REPLY, "weight": 1}], "message 1 (assistant): unknown key"),
    ([{"role": "user"}, REPLY], "message 0 (user): expected content"),
    ([USER, {"role": "assistant"}], "message 1 (assistant): expected content"),
    ([USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], "expected content"),
    ([USER, {"role": "assistant", "content": ""}], "found neither"),
    ([USER], "no assistant turn"), ([USER, REPLY, {"role": "system", "content": "s"}], "message 2 (system)"),
    ([USER, REPLY, REPLY], "two assistant turns"), ([USER, RESULT, REPLY], "message 1 (tool): a result without a call"),
    ([USER, ASK, RESULT, RESULT, REPLY], "message 3 (tool): a result without a call"),
    ([USER, ASK, USER, REPLY], "message 2 (user): 1 tool results are missing"),
    ([USER, {**ASK, "tool_calls": ASK["tool_calls"] * 2}, RESULT, REPLY], "message 3 (assistant): 1 tool results"),
    ([USER, {**REPLY, "content": "x <tool_call>"}], "move the call to tool_calls"),
    ([USER, {"role": "assistant", "tool_calls": {"name": "f", "arguments": {}}}], "to be a list"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}], "OBJECT"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}, "id": "1"}]}], "OBJECT"),
    ([USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}], "OBJECT"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "", "arguments": {}}]}], "name"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": float("nan")}}]}], "NaN"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {1: 2}}]}], "string keys"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": {1, 2}}}]}], "serializable"),
    ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": "x" * 20_000}}]}], "16384"),
])
def test_invalid_messages(messages, reason):
    with pytest.raises(ValueError) as error:
        validate_messages(messages)
    assert reason in str(error.value) and len(str(error.value)) < 700


def test_invalid_prompts_and_tools():
    tokenizer = Tokenizer.bytes()
    for messages in ([USER, REPLY], [USER, ASK], [{"role": "system", "content": "s"}]):
        with pytest.raises(ValueError, match="expected a prompt to end"):
            tokenizer.render_prompt(messages)
    for tools in ([{"name": "f"}], [{"type": "function", "function": {}}], ["f"], [TOOLS[0], TOOLS[0]],
                  [{"type": "function", "function": {"name": "f", "parameters": "x"}}]):
        with pytest.raises(ValueError, match="tool [01]: expected"):
            tokenizer.render_prompt([USER], tools)
        with pytest.raises(ValueError, match="tool [01]: expected"):
            validate_messages([USER, REPLY], tools)
