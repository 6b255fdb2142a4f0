"""Conversations from JSON lines: what is malformed is refused, with file and line."""
import json

import pytest

from data import chat, tokens
from data.tokens import TokenFile
from tokenizer import Tokenizer

USER = {"role": "user", "content": "How many?"}
DONE = {"role": "assistant", "content": "Two."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "1+1"}}]}
RESULT = {"role": "tool", "content": "2"}
GOOD = {"messages": [USER, CALL, RESULT, DONE], "bucket": "math"}
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {
    "type": "object", "properties": {"expression": {"type": "string"}}}}}


def changed(**fields):
    return json.dumps(GOOD | fields)


def with_messages(*messages):
    return changed(messages=list(messages))


# the reason is ours where chat.py finds the fault, and the tokenizer's where validate_messages does
MALFORMED = {
    "not json": ('{"messages": [', "not valid JSON"),
    "cut off": (json.dumps(GOOD)[:-1], "not valid JSON"),
    "two objects": (json.dumps(GOOD) * 2, "not valid JSON"),
    "duplicate key": ('{"text": "a", "text": "b"}', "duplicate key"),
    "nan": ('{"text": NaN}', "NaN is not JSON"),
    "deep": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "list": ("[1, 2]", 'either "messages" or "text"'),
    "null": ("null", 'either "messages" or "text"'),
    "neither": ('{"prompt": "a"}', r"found an object with keys \['prompt'\]"),
    "both": (changed(text="a"), 'either "messages" or "text"'),
    "text is no string": ('{"text": 3}', 'a string in "text", found 3'),
    "unknown key": (changed(weight=1), "unknown key 'weight'"),
    "misspelt key": (changed(tool=[]), "unknown key 'tool'.*did you mean 'tools'"),
    "no bucket": (json.dumps({"messages": GOOD["messages"]}), "no bucket, expected one of chat, math, code, tool"),
    "unknown bucket": (changed(bucket="maths"), "unknown bucket 'maths'"),
    "bucket is no string": (changed(bucket=["math"]), "unknown bucket"),
    "messages is no list": (changed(messages="hi"), ""),
    "no messages": (with_messages(), ""),
    "message is no object": (with_messages("hi"), ""),
    "unknown role": (with_messages(USER, {"role": "bot", "content": "hi"}), "role"),
    "unknown message key": (with_messages(USER, DONE | {"weight": 1}), "weight"),
    "no assistant turn": (with_messages(USER), "assistant"),
    "empty assistant turn": (with_messages(USER, {"role": "assistant", "content": ""}), "assistant|empty"),
    "content is no string": (with_messages(USER, {"role": "assistant", "content": 3}), "content"),
    "system in the middle": (with_messages(USER, {"role": "system", "content": "x"}, DONE), "system"),
    "string arguments": (with_messages(USER, {"role": "assistant", "content": "", "tool_calls": [
        {"name": "calculator", "arguments": '{"expression": "1+1"}'}]}, RESULT, DONE), "arguments"),
    "call without name": (with_messages(USER, {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}, RESULT, DONE), "name"),
    "too few results": (with_messages(USER, CALL | {"tool_calls": CALL["tool_calls"] * 2}, RESULT, DONE), "result"),
    "too many results": (with_messages(USER, CALL, RESULT, RESULT, DONE), "result"),
    "result without a call": (with_messages(USER, RESULT, DONE), "result|tool"),
    "tools is no list": (changed(tools={"a": 1}), "a list of tools"),
    "tools is a number": (changed(tools=3), "a list of tools, found 3"),
    "tool without name": (changed(tools=[{"type": "function"}]), "tool 0"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_lines_are_refused_with_file_and_line(tmp_path, name):
    line, reason = MALFORMED[name]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n" + json.dumps(GOOD) + "\n")      # a blank line counts
    with pytest.raises(ValueError, match=rf"chats\.jsonl:3: .*({reason})"):
        list(chat.read(path))
    with pytest.raises(ValueError, match=rf"chats\.jsonl:3: .*({reason})"):
        list(tokens.file_chunks([path], Tokenizer.bytes()))


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"chats.jsonl:2: not UTF-8 at byte 10 of the line"):
        list(chat.read(path))


def test_records_come_back_whole(tmp_path):
    path = tmp_path / "chats.jsonl"
    records = [GOOD, GOOD | {"tools": [TOOL], "bucket": "tool"}, {"text": "plain 한글 \ud800", "url": "x"}]
    path.write_text("".join(json.dumps(r) + "\r\n" for r in records))           # a lone surrogate is legal JSON
    assert list(chat.read(path)) == [GOOD | {"tools": None}, records[1], {"text": "plain 한글 \ud800"}]
    assert [r.get("bucket") for r in chat.read(path, bucket="mine")] == ["mine", "mine", None]


def test_first_user_message():
    assert chat.first_user_message([{"role": "system", "content": "s"}, USER, DONE]) == "How many?"
    assert chat.first_user_message([DONE]) == "Two."


def test_trained_tokens_are_what_the_assistant_said(tmp_path):
    """From the file to the mask: decoding the trained tokens gives the assistant's turns, each with its end of turn, and nothing else."""
    tok = Tokenizer.bytes()
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(GOOD | {"messages": [USER | {"content": "Say <|im_end|> 둘"}, DONE, USER, DONE]}) + "\n")
    tokens.write_sources(tmp_path / "out", tok, tokens.file_chunks([path], tok, 0), inputs=[path])
    ids, mask = TokenFile(tmp_path / "out" / "chat-math", seq_len=500).piece(0)
    assert tok.decode([i for i, m in zip(ids.tolist(), mask) if m]) == "Two.<|im_end|>" * 2
    assert ids.tolist().count(tok.end_of_turn_id) == 4      # one a turn: the one typed by the user is text
