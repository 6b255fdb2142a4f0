import functools
import gzip
import json
import os

import pytest

import rollouts
from adversarial import cost
from data import gsm8k, ifeval, mbpp, tasks
from data.grading import Outcome
from data.prompts import Label, Pair, parse_filter, problems, read, turns
from engine import Rollout
from tokenizer import Tokenizer

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR


staged = pytest.mark.skipif(not all(os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), name)) for name in ("gsm8k", "hh_rlhf", "ifeval", "mbpp")),
                            reason="needs TEMPER_DATA=<folder that holds gsm8k/, hh_rlhf/, ifeval/ and mbpp/>")


def user(text):
    return dict(role="user", content=text)


def said(text):
    return dict(role="assistant", content=text)


def system(text):
    return dict(role="system", content=text)


@pytest.fixture
def write(tmp_path):
    def write(*records, name="x.jsonl"):
        """records: what becomes a line each, text as it is -> path"""
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
        return path
    return write


# -----------------------------------------------------------------------------
# Samples, written by hand in the form of the services' own documentation

RFT = '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}], "reference_answer": {"answer": 4}, "topic": "sums"}'
NOVA = """{"id": "tool-001", "messages": [{"role": "user", "content": [{"type": "text", "text": "Roll "}, {"text": "a stat."}]}], "reference_answer": "7",
 "tools": [{"type": "function", "function": {"name": "roll", "parameters": {"type": "object", "properties": {"sides": {"type": "integer"}}}}}]}""".replace("\n", "")
RLVR = """{"data_source": "openai/gsm8k", "prompt": [{"content": "48 and half as many?", "role": "user"}], "ability": "math",
 "reward_model": {"ground_truth": "72", "style": "rule"}, "extra_info": {"answer": "48/2=24 #### 72", "index": 0}}""".replace("\n", "")
DPO = '{"system": "Be kind.", "prompt": "Hi?", "chosen": "Hello!", "rejected": "What."}'
DPO_LISTS = """{"chosen": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}],
 "rejected": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "bad"}]}""".replace("\n", "")
NOVA_DPO = """{"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "S"}], "messages": [{"role": "user", "content": [{"text": "Q"}]},
 {"role": "assistant", "content": [{"text": "A"}]}, {"role": "user", "content": [{"text": "more"}]}, {"role": "assistant", "candidates": [
 {"content": [{"text": "p1"}], "preferenceLabel": "preferred"}, {"content": [{"text": "n"}], "preferenceLabel": "non-preferred"},
 {"content": [{"text": "p2"}], "preferenceLabel": "preferred"}]}]}""".replace("\n", "")
SCORED = '{"prompt": "Q", "samples": [{"completion": "b", "score": 0.5}, {"completion": "a", "score": 2}, {"completion": "c", "score": -1}]}'
KTO = '{"prompt": "Q", "completion": "A", "label": false}'


def log(operation="Converse", asked=None, answer=None, metadata=None, **more):
    record = {"schemaType": "ModelInvocationLog", "schemaVersion": "1.0", "timestamp": "2026-01-01T00:00:00Z", "accountId": "1", "region": "us-east-1",
              "operation": operation, "modelId": "amazon.nova-lite-v1:0", "requestMetadata": metadata,
              "input": {"inputContentType": "application/json", "inputBodyJson": asked, "inputTokenCount": 4},
              "output": {"outputContentType": "application/json", "outputBodyJson": answer, "outputTokenCount": 3}}
    return record | more


CONVERSE = {"messages": [{"role": "user", "content": [{"text": "hello"}, {"cachePoint": {"type": "default"}}]}], "inferenceConfig": {"maxTokens": 9}}
CONVERSED = {"output": {"message": {"role": "assistant", "content": [{"reasoningContent": {"reasoningText": {"text": "hm"}}}, {"text": "Hi"}, {"text": "!"}]}}}
LOG = log(asked=CONVERSE, answer=CONVERSED, requestId="r1")


def test_chat_rows(write):
    found = read(path := write(RFT, "", NOVA))
    first, second = found.rows
    assert found.kind == "prompts" and found.skipped == {}
    assert first.messages == [system("Be brief."), user("2+2?")] and first.reference == {"answer": 4} and first.metadata == {"topic": "sums"}
    assert (first.id, first.where, second.id, second.where) == ("1", f"{path}:1", "tool-001", f"{path}:3")   # a blank line is a line
    assert second.messages == [user("Roll a stat.")] and second.tools[0]["function"]["name"] == "roll" and second.metadata == {}
    assert found.notes == [f"{path}: 2 prompts, read as OpenAI chat / Bedrock RFT", f"{path}: 2 prompts; Bedrock takes 100 to 20,000"]


def test_rl_rows(write):
    text = {"prompt": "Name a colour.", "extra_info": {"answer": "red"}, "id": 7, "system": [{"text": "S"}]}
    bare = {"prompt": "Name a colour.", "reward_model": {"style": "llmj", "ground_truth": None}}
    first, second, third = read(write(RLVR, text, bare)).rows
    assert first.messages == [user("48 and half as many?")] and first.reference == "72" and first.data_source == "openai/gsm8k"
    assert first.metadata["extra_info"]["index"] == 0 and first.metadata["reward_model"]["style"] == "rule" and first.metadata["ability"] == "math"
    assert second.messages == [system("S"), user("Name a colour.")] and second.reference == "red" and second.id == "7" and second.data_source == ""
    assert third.reference is None and third.id == "3"


def test_chat_rows_keep_a_prompt_key_as_metadata(write):
    row, = read(write({"messages": [user("a")], "prompt": "b", "completion": "c", "extra_info": {"answer": "no"}})).rows
    assert row.messages == [user("a")] and row.metadata == {"prompt": "b", "completion": "c", "extra_info": {"answer": "no"}} and row.reference is None


def test_openai_calls_become_ours(write):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\"x\": 1}"}}
    messages = [user("1+1"), {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"}]
    row, = read(write({"messages": messages})).rows
    assert row.messages == [user("1+1"), {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"x": 1}}]}, {"role": "tool", "content": "2"}]
    messages[2]["tool_call_id"] = "c2"
    with pytest.raises(ValueError, match=r"x.jsonl:1: message 2: .*c1, found that of c2"):
        read(write({"messages": messages}))


def test_preference_pairs(write):
    found = read(write(DPO, DPO_LISTS, {"input": [user("Q")], "chosen": [said("a")], "rejected": "b"}))
    one, two, three = found.rows
    assert found.kind == "pairs" and len(found.notes) == 1
    assert one[:4] == ([system("Be kind."), user("Hi?")], [said("Hello!")], [said("What.")], None)
    assert two[:3] == ([system("S"), user("Q")], [said("good")], [said("bad")])
    assert three[:3] == ([user("Q")], [said("a")], [said("b")])


def test_pairs_without_a_prompt_share_whole_turns(write):
    turn = [user("Q"), said("A"), user("R")]
    long = {"chosen": [*turn, said("x"), user("S"), said("y")], "rejected": [*turn, said("z")]}
    equal = {"chosen": [*turn, said("same")], "rejected": [*turn, said("same")]}
    ultra = {"prompt": "Q", "prompt_id": "1", "messages": [user("Q"), said("x")], "score_chosen": 8, "chosen": [user("Q"), said("x")], "rejected": [user("Q"), said("xy")]}
    hh = {"chosen": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: yes", "rejected": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R\n\nAssistant: no"}
    a, b, c, d = read(write(long, equal, ultra, hh)).rows
    assert (a.messages, a.chosen, a.rejected) == (turn, [said("x"), user("S"), said("y")], [said("z")])
    assert (b.messages, b.chosen, b.rejected) == (turn, [said("same")], [said("same")])       # for the train script to drop and count
    assert (c.messages, c.chosen, c.rejected) == ([user("Q")], [said("x")], [said("xy")])     # not "x" as the shared beginning of a text
    assert (d.messages, d.chosen, d.rejected) == (turn, [said("yes")], [said("no")])


def test_a_prompt_in_a_template_takes_its_white_space_along(write):
    pair, = read(write({"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " yes", "rejected": " no"})).rows
    assert pair[:3] == ([user("Q")], [said("yes")], [said("no")])
    pair, = read(write({"prompt": "Q", "chosen": " yes", "rejected": " no"})).rows
    assert pair[:3] == ([user("Q")], [said(" yes")], [said(" no")])


def test_hh_style_pairs_that_are_left_out(write):
    empty = {"chosen": "\n\nHuman: Q\n\nAssistant: ", "rejected": "\n\nHuman: Q\n\nAssistant: no"}
    inline = {"chosen": "\n\nHuman: Q\n\nAssistant: A  Human: R\n\nAssistant: yes", "rejected": "\n\nHuman: Q\n\nAssistant: no"}
    found = read(write(empty, inline, DPO))
    assert len(found.rows) == 1 and found.skipped == {"an empty answer": 1, "a template whose turns cannot be told apart": 1}
    with pytest.raises(ValueError, match="x.jsonl:1: .*two assistant turns"):              # turns that somebody told apart, wrongly
        read(write({"chosen": [user("Q"), said("A"), said("yes")], "rejected": [user("Q"), said("no")]}))


@staged
def test_hh_rlhf():
    found = read(os.path.join(os.environ["TEMPER_DATA"], "hh_rlhf/harmless-base_test.jsonl.gz"))
    assert len(found.rows) == 2299 and found.skipped == {"an empty answer": 4, "a template whose turns cannot be told apart": 9}
    assert all(len(pair.chosen) == len(pair.rejected) == 1 and pair.messages[-1]["role"] == "user" for pair in found.rows)


def test_converse_candidates_give_every_pair(write):
    found = read(write(NOVA_DPO))
    assert [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in found.rows] == [("p1", "n"), ("p2", "n")]
    assert all(pair.messages == [system("S"), user("Q"), said("A"), user("more")] for pair in found.rows)


def test_scored_and_kto(write):
    ties = {"prompt": "Q", "samples": [{"completion": "b", "score": 1}, {"completion": "a", "score": 1.0}]}
    found = read(write(SCORED, ties))
    assert found.kind == "pairs" and found.rows[0][:3] == ([user("Q")], [said("a")], [said("c")])
    assert found.skipped == {"all scores are equal": 1} and "1 records left out: 1 all scores are equal" in found.notes[1]
    path = write(KTO, {"prompt": [user("Q")], "completion": [said("B")], "label": True}, {"prompt": "Q", "completion": " ", "label": True})
    found = read(path)
    assert found.kind == "labels" and found.skipped == {"an empty answer": 1}
    assert found.rows == [Label([user("Q")], [said("A")], False, None, f"{path}:1"), Label([user("Q")], [said("B")], True, None, f"{path}:2")]


# -----------------------------------------------------------------------------
# What is refused

CHAT_ROW = {"messages": [user("Q")]}


@pytest.mark.parametrize("good, bad, why", [
    (RFT, '{"messages": [{"role": "user", "content": "Q"}', "not valid JSON"),
    (RFT, '{"messages": [{"role": "user", "content": "Q"}], "reference_answer": NaN}', "NaN"),
    (RFT, '{"messages": [{"role": "user", "content": "Q"}], "reference_answer": -Infinity}', "Infinity"),
    (RFT, '{"messages": [{"role": "user", "content": "Q"}], "reference_answer": 1e999}', "1e999"),
    (RFT, '{"messages": [{"role": "user", "content": "Q"}], "messages": []}', "duplicate key"),
    (RFT, "[" * 100_000, "not valid JSON|recursion"),
    (RFT, "42", "found 42"),
    (RFT, DPO, r"expected a record of the kind OpenAI chat .*x.jsonl:1, found preference with the keys \['chosen', 'prompt', 'rejected', 'system'\]"),
    (RFT, {"messages": [user("Q"), said("A")]}, "expected a prompt to end with a user's message"),
    (RFT, {"messages": []}, "expected a list of messages"),
    (RFT, {"messages": [system("S")]}, "expected a prompt to end"),
    (RFT, {"messages": [user("Q")], "system": "S", "tools": "roll"}, "expected tools to be list"),
    (RFT, {"messages": [system("S"), user("Q")], "system": "S"}, "found both"),
    (RFT, {"messages": [dict(role="wizard", content="Q")]}, "expected role"),
    (RFT, {"messages": [dict(role="user", content=[{"type": "image_url", "image_url": {"url": "u"}}])]}, "expected text alone, found image or file blocks"),
    (RFT, {"messages": [dict(role="user", content=[{"toolResult": {}}])]}, "found tool blocks"),
    (RFT, {"messages": [dict(role="user", content=[{}])]}, "blocks"),
    (RFT, {"messages": [user([])]}, "the prompt is blank"), (DPO, {"prompt": [user(" ")], "chosen": "a", "rejected": "b"}, "the prompt is blank"),
    (RFT, CHAT_ROW | {"id": ""}, "expected id"), (RFT, CHAT_ROW | {"id": True}, "expected id"), (RFT, CHAT_ROW | {"id": "1"}, "the id '1' is that of .*x.jsonl:1"),
    (RLVR, {"data_source": "x", "question": "Q"}, r"expected a record of one of the kinds .*found the keys \['data_source', 'question'\]"),
    (RLVR, {"prompt": " "}, "blank"), (RLVR, {"prompt": 3}, "list of messages"), (RLVR, {"prompt": "Q", "reward_model": "rule"}, "expected reward_model"),
    (RLVR, {"prompt": "Q", "completion": "A"}, "one of the kinds"),
    (RLVR, {"prompt": "<|im_start|>user\nQ<|im_end|><|endoftext|>"}, r"special token '<\|im_end\|>'"),
    (DPO, {"chosen": "a", "rejected": "b"}, "expected prompt or input"),
    (DPO, {"prompt": "Q", "chosen": [user("R"), said("a")], "rejected": [user("R"), said("b")]}, "to answer the prompt"),
    (DPO, {"chosen": [user("Q"), said("a")], "rejected": [user("R"), said("a")]}, "begin with the same turns"),
    (DPO, {"chosen": [user("Q"), said("a"), user("R"), said("b")], "rejected": [user("Q"), said("a"), user("S"), said("b")]}, "part at message 2"),
    (DPO, {"prompt": [user("Q"), said("A")], "chosen": "a", "rejected": "b"}, "expected a prompt to end"),
    (NOVA_DPO, {"messages": [user("Q"), {"role": "assistant", "candidates": [{"content": [{"text": "a"}], "preferenceLabel": "preferred"}]}]}, "at least two"),
    (NOVA_DPO, {"messages": [user("Q"), {"role": "assistant", "candidates": [{"content": [{"text": "a"}], "preferenceLabel": "preferred"}] * 2}]}, "and a non-preferred"),
    (NOVA_DPO, {"messages": [user("Q"), {"role": "assistant", "candidates": [{"content": "a", "preferenceLabel": "good"}] * 2}]}, "found 'good'"),
    (SCORED, {"prompt": "Q", "samples": [{"completion": "a", "score": 1}]}, "at least two"),
    (SCORED, {"prompt": "Q", "samples": [{"completion": "a", "score": True}, {"completion": "a", "score": 0}]}, "number as score"),
    (KTO, {"prompt": "Q", "completion": "A", "label": 1}, "label true or false, found 1"),
    (LOG, {**LOG, "schemaType": "Other"}, "one of the kinds"), (LOG, RFT, "found OpenAI chat"),
    (LOG, log("InvokeModel", {"prompt": "[INST] Q"}, {"generation": "A"}), "expected \\[/INST\\]"),
    (LOG, log(asked=[], input="none"), "expected input to be dict"),
])
def test_a_bad_line_stops_with_file_and_line(write, good, bad, why):
    assert read(write(good)).rows                            # or the bad line would not be what stops it
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*(?:{why})"):
        read(write(good, bad))


def nodes(value, path=()):
    """The path of every node of a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from nodes(value[key], (*path, key))


@pytest.mark.parametrize("sample", [RFT, NOVA, RLVR, DPO, DPO_LISTS, NOVA_DPO, SCORED, KTO, LOG])
def test_a_wrong_value_anywhere_is_a_value_error_with_file_and_line(write, sample):
    sample = sample if isinstance(sample, str) else json.dumps(sample)
    refused = 0
    for path in nodes(json.loads(sample)):
        for wrong in (None, 3, "", [], {"a": 1}, [None]):
            record = json.loads(sample)
            *before, last = path or ("none",)
            inner = functools.reduce(lambda value, key: value[key], before, record)
            inner[last] = wrong
            file = write(record if path else wrong)
            try:
                assert read(file, use_prompt_response="schemaType" in record).rows
            except ValueError as error:
                assert str(error).startswith(str(file)), (path, wrong, error)
                refused += 1
    assert refused > 10


@pytest.mark.parametrize("content, why", [
    (b"", r"x\.jsonl: empty"), (b" \n\n", r"x\.jsonl: empty"), (b"[ ]", r"x\.jsonl: empty"), (gzip.compress(b"", mtime=0), r"x\.jsonl: empty"),
    (RFT.encode() + b"\n" + RFT.encode("utf-16"), r"x\.jsonl:2: not UTF-8 at byte 0"),
    (b'[\n{"prompt": "Q"},\n{"prompt": "\xe9"}]', r"x\.jsonl:3: not UTF-8 at byte 12"),
    (gzip.compress(RFT.encode() * 99, mtime=0)[:-20], r"x\.jsonl:1: truncated or damaged gzip"),
    (gzip.compress(f"{RFT}\n".encode(), 0, mtime=0)[:-4] + b"....", r"x\.jsonl:2: truncated or damaged gzip"),
    (gzip.compress(f"{RFT}\n".encode(), 0, mtime=0).replace(b"messages", b"Messages"), r"truncated or damaged gzip|Messages"),
    (b"PAR1\x15\x04", r"Parquet.*read_table\('.*x.jsonl'\)"),
])
def test_bad_files(tmp_path, content, why):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=why):
        read(path)


def test_parquet_is_known_by_its_name_too(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"> train.jsonl$"):
        read(tmp_path / "train.parquet")


def test_arrays_gzip_and_folders_give_the_same_rows(write, tmp_path):
    want = [row[:6] for row in read(write(RFT, RFT.replace("2+2", "3+3"))).rows]
    array = write(f"\n [{RFT}\n,\n{RFT.replace('2+2', '3+3')} ]\n", name="array.txt")
    found = read(array)
    assert [row[1:6] for row in found.rows] == [row[1:] for row in want] and [row.where for row in found.rows] == [f"{array}:2", f"{array}:4"]
    zipped = tmp_path / "no_suffix"
    zipped.write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    assert [row[:6] for row in read(zipped).rows] == want
    folder = tmp_path / "folder"
    write(RFT, name="folder/b/2.ndjson"), write(RFT.replace("2+2", "3+3"), name="folder/a.json"), write("junk", name="folder/.git/x")
    found = read(folder)
    assert [(row.id, row.messages[1]["content"]) for row in found.rows] == [("a.json:1", "3+3?"), ("b/2.ndjson:1", "2+2?")]
    assert "2 files" in found.notes[0]
    write(KTO, name="folder/c")
    with pytest.raises(ValueError, match=r"folder/c:1: .*OpenAI chat.*a\.json:1, found KTO"):
        read(folder)


@pytest.mark.parametrize("text, line", [(f"[{RFT}\n{RFT}]", 2), (f"[{RFT},\n]", 2), (f"[{RFT},\n\n{{]", 3), (f"[{RFT}\n", 3), (f"[\n{RFT}]\n\n{RFT}", 2), ("[,]", 1)])
def test_broken_arrays(write, text, line):
    with pytest.raises(ValueError, match=rf"x.jsonl:{line}: not valid JSON"):
        read(write(text))


def test_a_huge_line(write):
    row, = read(write({"prompt": "x" * 5_000_000})).rows
    assert len(row.messages[0]["content"]) == 5_000_000


def test_bedrocks_bounds_are_a_note(write):
    line = {"prompt": "Q"}
    assert len(read(write(*[line] * 100)).notes) == 1 and len(read(write(*[line] * 99)).notes) == 2
    assert "20,001 prompts; Bedrock takes 100 to 20,000" in read(write(*[line] * 20_001)).notes[1]
    assert len(read(write(DPO)).notes) == 1                  # not prompts


# -----------------------------------------------------------------------------
# Templates

LLAMA = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>\n<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize("text, messages", [
    (LLAMA, [system("S"), user("Q")]),
    ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>What is the capital of Sudan?<|eot_id|><|start_header_id|>assistant<|end_header_id|>", [user("What is the capital of Sudan?")]),
    ("<|begin_of_text|><|header_start|>user<|header_end|>\n\nQ<|eot|><|header_start|>assistant<|header_end|>\n\n", [user("Q")]),
    ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ\n\nR<|im_end|>\n<|im_start|>assistant\n", [system("S"), user("Q\n\nR")]),
    ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] R [/INST]", [system("S"), user("Q"), said("A"), user("R")]),
    ("<s>[INST] Q [/INST] A</s>[INST] R [/INST]", [user("Q"), said("A"), user("R")]),
    ("\n\nHuman: Q\n\nAssistant: A\n\nHuman: R: Human: x\n\nAssistant:", [user("Q"), said("A"), user("R: Human: x")]),
    ("S\n\nHuman: Q\n\nAssistant:", [system("S"), user("Q")]),
    ("Human: Q\n\nAssistant: It is", [user("Q"), said("It is")]),
])
def test_templates(text, messages):
    assert turns(text) == (messages, True)


@pytest.mark.parametrize("text", ["Q", " Q\n", "Human: no answer", "The Human: a study\n\nAssistant: x", "1 < 2 | 3 > 2", "<s>old</s> price", "a list [INST"])
def test_what_is_no_template_stays_as_it_is(text):
    assert turns(text) == ([user(text)], False)


@pytest.mark.parametrize("text, why", [
    ("Q<|endoftext|>", "<.endoftext.>"), ("[/INST] Q", "/INST"), ("<|start_header_id|>user<|end_header_id|>Q<|eot_id|> <|end_of_text|>", "left over"),
    ("Q [INST] R [/INST]", "before the first turn"), ("<s>[INST] Q</s> [/INST]", "</s>"), ("hm <|im_start|>user\nQ<|im_end|>", "before the first turn"),
    ("<|start_header_id|>user<|im_sep|>Q", "left over"), ("[INST] <<SYS>> S [/INST] <<SYS>>", "SYS"),
])
def test_broken_templates(text, why):
    with pytest.raises(ValueError, match=why):
        turns(text)


@pytest.mark.parametrize("text", ["<|im_start|>" * 20_000, "[INST]" * 40_000, "[INST][/INST]" * 20_000, "\n\nHuman:" * 30_000 + "\n\nAssistant:", "\n" * 250_000 + "x", "<|" * 120_000])
def test_templates_are_linear(text):
    def read():
        try:
            turns(text)
        except ValueError:
            pass
    assert cost(read, enough=1)[1] <= 1                  # a quadratic scan of 250 KB takes minutes


# -----------------------------------------------------------------------------
# Logs

CLAUDE = {"anthropic_version": "bedrock-2023-05-31", "system": [{"type": "text", "text": "S"}], "messages": [user([{"type": "text", "text": "Q"}])]}
STREAMED = [{"type": "message_start", "message": {"role": "assistant", "content": []}}, {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "He"}},
            {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "llo"}}, {"type": "message_stop", "amazon-bedrock-invocationMetrics": {}}]


@pytest.mark.parametrize("operation, asked, answer, messages, text", [
    ("Converse", CONVERSE, CONVERSED, [user("hello")], "Hi!"),
    ("Converse", {"system": [{"text": "S"}], "messages": [user([{"text": "a"}]), said([{"text": "b"}]), user([{"text": "c"}])]}, CONVERSED,
     [system("S"), user("a"), said("b"), user("c")], "Hi!"),
    ("ConverseStream", CONVERSE, CONVERSED, [user("hello")], "Hi!"),
    ("ConverseStream", CONVERSE, [{"messageStart": {"role": "assistant"}}, {"contentBlockDelta": {"delta": {"text": "O"}, "contentBlockIndex": 0}},
                                  {"contentBlockDelta": {"delta": {"text": "K"}}}, {"contentBlockStop": {}}, {"messageStop": {"stopReason": "end_turn"}}], [user("hello")], "OK"),
    ("InvokeModel", {"prompt": LLAMA, "max_gen_len": 9}, {"generation": "\n\nKhartoum.", "stop_reason": "stop"}, [system("S"), user("Q")], "\n\nKhartoum."),
    ("InvokeModel", {"prompt": "\n\nHuman: Q\n\nAssistant:"}, {"completion": " A", "stop": "x"}, [user("Q")], " A"),
    ("InvokeModel", CLAUDE, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}]}, [system("S"), user("Q")], "A"),
    ("InvokeModel", CLAUDE | {"system": "T"}, {"content": [{"type": "text", "text": "A"}]}, [system("T"), user("Q")], "A"),
    ("InvokeModel", {"inputText": "Q", "textGenerationConfig": {}}, {"inputTextTokenCount": 1, "results": [{"outputText": "A", "tokenCount": 1}]}, [user("Q")], "A"),
    ("InvokeModel", {"prompt": "<s>[INST] Q [/INST]"}, {"outputs": [{"text": "A", "stop_reason": "stop"}]}, [user("Q")], "A"),
    ("InvokeModel", {"messages": [user("Q")]}, {"choices": [{"message": said("A")}]}, [user("Q")], "A"),
    ("InvokeModelWithResponseStream", CLAUDE, STREAMED, [system("S"), user("Q")], "Hello"),
    ("InvokeModelWithResponseStream", {"prompt": LLAMA}, [{"generation": "A"}, {"generation": "B"}, {"generation": "", "stop_reason": "stop"}], [system("S"), user("Q")], "AB"),
    ("InvokeModelWithResponseStream", {"prompt": "Q"}, [{"completion": "A"}, {"completion": "B"}], [user("Q")], "AB"),
    ("InvokeModelWithResponseStream", {"inputText": "Q"}, [{"outputText": "A", "index": 0}, {"outputText": "B"}], [user("Q")], "AB"),
])
def test_every_operation(write, operation, asked, answer, messages, text):
    path = write(log(operation, asked, answer, {"team": "a"}))
    row, = read(path, use_prompt_response=True).rows
    assert row.messages == messages and row.reference == text and row.metadata == {"team": "a"} and row.id == "1" and row.tools is None
    row, = read(path).rows
    assert row.messages == messages and row.reference is None


def test_what_is_left_out_of_a_log(write):
    picture = {"messages": [user([{"image": {"format": "png", "source": {}}}, {"text": "What?"}])]}
    result = {"messages": [user([{"text": "Q"}]), said([{"toolUse": {"name": "f"}}]), user([{"toolResult": {}}])]}
    records = [LOG, LOG, log(asked=CONVERSE, errorCode="ThrottlingException"), log(asked=picture, answer=CONVERSED), log(asked=result, answer=CONVERSED),
               log(asked=CONVERSE | {"toolConfig": {"tools": [{}]}}, answer={"output": {"message": {"content": [{"toolUse": {}}]}}}),
               log("InvokeModel", {"inputText": "Q"}, {"embedding": [.1, .2]}), log("InvokeModel", {"texts": ["Q"]}, None, modelId="cohere.embed-english-v3"),
               log("InvokeModel", {"inputText": "Q"}, None, modelId="amazon.titan-embed-text-v2:0"),
               log("InvokeModel", {"prompt": "a cat"}, {"images": ["iVBOR"]}), log("InvokeModel", "aGk=", CONVERSED), log("AsyncInvoke", CONVERSE, CONVERSED),
               log(asked={"messages": [user([{"text": "Q"}]), said([{"text": "Well,"}])]}, answer=CONVERSED)]
    found = read(write(*records))
    assert [row.id for row in found.rows] == ["r1"]
    assert found.skipped == {"errorCode": 1, "image or file blocks": 1, "tool blocks": 2, "no text": 5, "operation AsyncInvoke": 1,
                             "a requestId that was there before": 1, "an answer that the caller began": 1}
    with pytest.raises(ValueError, match="no record is left, left out: 1 errorCode"):
        read(write(records[2]))


def test_bodies_that_are_stored_elsewhere(write, tmp_path):
    name = "11111111-2222-3333-4444-555555555555"
    stored = log("InvokeModelWithResponseStream", requestId="far", input={"inputBodyS3Path": f"s3://b/AWSLogs/data/{name}_input.json.gz"},
                 output={"outputBodyJson": None, "outputBodyS3Path": f"s3://b/AWSLogs/data/{name}_output.json.gz"})
    write(stored, log(asked=CONVERSE, answer=CONVERSED, requestId="near"), name="logs/01/a.json")
    folder = tmp_path / "logs/01/data"
    folder.mkdir()
    (tmp_path / "logs/amazon-bedrock-logs-permission-check").write_bytes(b"")
    for side, body in (("input", CLAUDE), ("output", STREAMED)):
        (folder / f"{name}_{side}.json.gz").write_bytes(gzip.compress(json.dumps(body).encode()))
    found = read(tmp_path / "logs")
    assert [row.id for row in found.rows] == ["near"] and found.skipped == {"its body is in a file that is not under --log_bodies": 1}
    assert "3 files that the log keeps beside its records" in found.notes[2]
    found = read(tmp_path / "logs", log_bodies=tmp_path / "logs", use_prompt_response=True)
    assert [(row.id, row.reference) for row in found.rows] == [("far", "Hello"), ("near", "Hi!")] and not found.skipped
    (folder / f"{name}_output.json.gz").unlink()
    assert len(read(tmp_path / "logs", log_bodies=folder).rows) == 2                     # the response is not needed
    assert len(read(tmp_path / "logs", log_bodies=folder, use_prompt_response=True).rows) == 1
    (folder / f"{name}_input.json.gz").write_bytes(gzip.compress(b"{}" * 50, mtime=0)[:-9])
    with pytest.raises(ValueError, match=rf"a\.json:1: .*{name}_input"):
        read(tmp_path / "logs", log_bodies=folder)
    with pytest.raises(ValueError, match="--log_bodies=.*expected a folder"):
        read(tmp_path / "logs", log_bodies=folder / "nowhere")


@pytest.mark.parametrize("text, kept", [
    ("", "abcd"), ('{"equals": {"team": "x"}}', "ab"), ('{"notEquals": {"team": "x"}}', "cd"), ('{"notEquals": {"nobody": "x"}}', "abcd"),
    ('{"andAll": [{"equals": {"team": "x"}}, {"notEquals": {"env": "prod"}}]}', "b"), ('{"orAll": [{"equals": {"team": "y"}}, {"equals": {"env": "prod"}}]}', "ac"),
])
def test_filters(write, text, kept):
    metadata = dict(a={"team": "x", "env": "prod"}, b={"team": "x", "env": "dev"}, c={"team": "y"}, d=None)
    path = write(*(log(asked=CONVERSE, answer=CONVERSED, metadata=m, requestId=name) for name, m in metadata.items()))
    found = read(path, log_filter=text)
    assert "".join(row.id for row in found.rows) == kept and found.skipped == ({"--log_filter": 4 - len(kept)} if len(kept) < 4 else {})


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"equals": {"a": "b"}, "notEquals": {"a": "c"}}', '{"equals": {"a": "b"}, "equals": {"a": "c"}}', '{"equals": {"a": "b", "a": "c"}}',
    '{"equals": {"a": "b", "c": "d"}}', '{"equals": {}}', '{"equals": {"a": 1}}', '{"andAll": []}', '{"andAll": {"equals": {"a": "b"}}}', '{"like": {"a": "b"}}',
    '{"orAll": [{"andAll": [{"equals": {"a": "b"}}]}]}', '{"orAll": [{"equals": {"a": "b"}, "notEquals": {"a": "c"}}]}', '{"equals": {"a": NaN}}', "[" * 100_000])
def test_bad_filters(text):
    with pytest.raises(ValueError, match="--log_filter: "):
        parse_filter(text)


@pytest.mark.parametrize("flag", [dict(log_filter='{"equals": {"a": "b"}}'), dict(use_prompt_response=True), dict(log_bodies="/tmp")])
def test_flags_of_logs_are_refused_elsewhere(write, tmp_path, flag):
    with pytest.raises(ValueError, match="are for invocation logs, found the kind OpenAI chat"):
        read(write(RFT), **{key: str(tmp_path) if key == "log_bodies" else value for key, value in flag.items()})


# -----------------------------------------------------------------------------
# Problems and graders


def row(source, reference, **more):
    return {"prompt": f"Q about {reference}", "data_source": source, "reward_model": {"ground_truth": reference}} | more


def test_problems_by_data_source(write):
    found = problems(path := write(row("openai/gsm8k", "72"), row("HuggingFaceH4/MATH-500", r"\frac12"), row("lighteval/MATH", "3"), row("DigitalLearningGmbH/MATH-lighteval", "3 "),
                                   row("google/IFEval", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}), row("mine", [1, 2]), row("", None),
                                   row("mbpp", {"test_list": ["assert f(1) == 2"]})), val_fraction=0)
    assert [p.task for p in found] == [f"rows/{name}" for name in "gsm8k math math math ifeval none none code".split()]
    assert found[0].prompt == [user("Q about 72")] and found[0].answer == "72" and found[0].gold == []
    assert found[5].answer == "[1, 2]" and found[6].answer == ""
    assert found[5].hidden["reference"] == [1, 2] and found[5].hidden["where"] == f"{path}:6" and found[5].hidden["id"] == "6" and found[5].hidden["data_source"] == "mine"
    assert found[5].hidden["metadata"]["reward_model"] == {"ground_truth": [1, 2]}
    assert {p.task for p in problems(path, grader="none", val_fraction=0)} == {"rows/none"}
    assert tasks.max_new_tokens("rows/gsm8k") == 512
    assert [tasks.bucket(p.task) for p in found] == ["math", "math", "math", "math", "chat", "chat", "chat", "code"]


@pytest.mark.parametrize("grader, reference, text, outcome", [
    ("exact", "blue", " blue\n", RIGHT), ("exact", " blue", "blue", RIGHT), ("exact", "blue", "Blue", WRONG), ("exact", "blue", " ", UNGRADABLE), ("exact", 72, "72", RIGHT),
    ("exact", "blue", "b" * 70_000, UNGRADABLE),
    ("gsm8k", "The answer: 48/2=24\n#### 72", "so\n#### 72", RIGHT), ("gsm8k", "72", "#### 72.0", RIGHT), ("gsm8k", 72, "#### 71", WRONG), ("gsm8k", "72", "It is 72.", UNGRADABLE),
    ("gsm8k", {"answer": "1,000"}, "#### 1000", RIGHT),
    ("math", r"\frac{1}{2}", r"\boxed{1/2}", RIGHT), ("math", r"so it is \boxed{\frac12}.", r"\boxed{0.5}", RIGHT), ("math", "3", r"\boxed{4}", WRONG), ("math", "3", "3", UNGRADABLE),
    ("ifeval", {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                "kwargs": [{"num_words": None, "relation": None}, {"num_words": 2, "relation": "at least", "keyword": None}]}, "one two", RIGHT),
    ("ifeval", '{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [null]}', "one, two", WRONG),
    ("ifeval", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, "", UNGRADABLE),
    ("code", {"test_list": ["assert f(1) == 2"]}, "```python\ndef f(x):\n    return x + 1\n```", RIGHT),
    ("code", '{"test_list": ["assert f(1) == g(1)"], "code": "def f(x): return 2\\ng = f"}', "```python\ndef f(x): return 3\n```", WRONG),
    ("code", {"test_list": ["assert f(1) == 2"]}, "no idea", UNGRADABLE),
    ("none", "blue", "blue", UNGRADABLE),
])
def test_graders(write, grader, reference, text, outcome):
    problem, = problems(write(row("", reference)), grader)
    episode = tasks.episode_of(problem)
    assert not episode.has_tools and episode.user_turn(text) is None
    assert episode.grade([said(text)]) is outcome
    assert episode.grade([said("wrong"), user("again"), said(text)]) is outcome          # the last turn is what counts
    assert episode.grade([user("nothing was said")]) in (UNGRADABLE, WRONG) and episode.grade([]) in (UNGRADABLE, WRONG)


@staged
def test_references_of_the_real_sets_are_accepted(write):
    rows = [dict(row("openai/gsm8k", r["answer"]), prompt=r["question"]) for r in gsm8k.load("test")]
    rows += [row("google/IFEval", {key: r[key] for key in ("instruction_id_list", "kwargs")}) for r in ifeval.load()]
    rows += [row("mbpp", {key: r[key] for key in ("test_list", "code", "test_setup_code")}) for r in mbpp.load("validation")]
    found = problems(write(*rows), val_fraction=0)
    assert [p.task for p in found] == ["rows/gsm8k"] * 1319 + ["rows/ifeval"] * 541 + ["rows/code"] * 90
    assert all(tasks.episode_of(p).grade([said(p.answer)]) is RIGHT for p in found[:1319])
    assert tasks.episode_of(found[-1]).grade([said(f"```python\n{found[-1].hidden['reference']['code']}\n```")]) is RIGHT


def test_rows_are_played(write, monkeypatch):
    """The tokens that were sampled are graded as the assistant's last turn; a call is text, since rows bring no tools that work."""
    tokenizer = Tokenizer.bytes()

    def scripted(model, tokenizer, prompts, *, tools, max_new_tokens, **options):
        assert max_new_tokens == 512 and len(prompts) == 2
        ids = [tokenizer.encode(text) + [tokenizer.end_of_turn_id] for text in ("#### 72", "#### 7")]
        assert [tools(i, 0, said) for i, said in enumerate(ids)] == [None, None]
        return [[Rollout(ids=said, mask=[1] * len(said), finish_reason="stop")] for said in ids]
    monkeypatch.setattr(rollouts, "generate", scripted)
    played = rollouts.play(None, tokenizer, problems(write(RLVR, RLVR), val_fraction=0))
    assert [group[0].outcome for group in played] == [RIGHT, WRONG]


@pytest.mark.parametrize("grader, reference", [
    ("exact", None), ("exact", ""), ("exact", " "), ("exact", True), ("exact", [1]), ("exact", {"answers": "x"}),
    ("gsm8k", None), ("gsm8k", "seventy"), ("gsm8k", "72 apples"), ("gsm8k", "#### 72\nthat is all"), ("gsm8k", 1e300), ("gsm8k", {"answer": None}),
    ("math", None), ("math", ""), ("math", "x" * 600), ("math", "}{"),
    ("ifeval", None), ("ifeval", "no commas"), ("ifeval", {"instruction_id_list": ["punctuation:no_comma"]}), ("ifeval", {"instruction_id_list": ["no:such"], "kwargs": [{}]}),
    ("ifeval", {"instruction_id_list": [], "kwargs": []}), ("ifeval", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]}),
    ("code", None), ("code", {"test_list": []}), ("code", {"test_list": ["f(1) == 2"]}), ("code", {"test_list": ["assert f(1) =="]}), ("code", {"test_list": ["assert f(1) == g(1)"]}),
    ("code", {"test_list": [1]}), ("code", {"test_list": ["assert f(1) == 2"], "code": 3}),
])
def test_a_bad_reference_is_refused_at_load(write, grader, reference):
    path = write(row("", {"exact": "a", "gsm8k": "1", "math": "1", "code": {"test_list": ["assert f(1) == 2"]},
                          "ifeval": {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}}[grader]), row("", reference))
    for split in ("train", "val"):                           # whichever of them the row is in
        with pytest.raises(ValueError, match=rf"x\.jsonl:2: a reference that {grader} cannot grade by"):
            problems(path, grader=grader, split=split)
    assert problems(path, grader="none", val_fraction=0)


def test_splits(write):
    path = write(*({"prompt": f"Q{i // 2}", "id": f"n{i}"} for i in range(400)))         # each question twice
    sides = {(seed, split): [p.hidden["id"] for p in problems(path, split=split, seed=seed)] for seed in (0, 1) for split in ("train", "val")}
    assert len(sides[0, "val"]) == 20 and len(sides[0, "train"]) == 380                  # .05 of 200 questions, twice each
    assert {int(name[1:]) // 2 for name in sides[0, "val"]}.isdisjoint(int(name[1:]) // 2 for name in sides[0, "train"])
    assert sides[0, "val"] != sides[1, "val"] and sides[0, "train"] == sorted(sides[0, "train"], key=lambda name: int(name[1:]))
    assert [p.hidden["id"] for p in problems(path, split="val")] == sides[0, "val"] != sorted(sides[0, "val"], key=lambda name: int(name[1:]))
    assert {p.hidden["id"] for p in problems(path, split="val", val_fraction=.025)} == set(sides[0, "val"][:10])       # its beginning is a sample
    few = read(write({"prompt": "a"}, {"prompt": "b"}))
    assert len(problems(few, split="val", val_fraction=.001)) == len(problems(few, val_fraction=.9)) == 1
    assert len(problems(few, val_fraction=0)) == 2 and problems(few, split="val", val_fraction=0) == []
    assert len(problems(read(write({"prompt": "a"})), val_fraction=.5)) == 1


def test_the_val_split_does_not_depend_on_ids_or_order(write):
    lines = [{"prompt": f"Q{i}"} for i in range(40)]
    val = {p.prompt[0]["content"] for p in problems(write(*lines), split="val", val_fraction=.2)}
    assert len(val) == 8 and val == {p.prompt[0]["content"] for p in problems(write(*reversed(lines)), split="val", val_fraction=.2)}


@pytest.mark.parametrize("given, why", [(dict(grader="gsm8"), "no grader is called 'gsm8'"), (dict(split="test"), "split train or val"), (dict(val_fraction=1), "below 1"),
                                        (dict(val_fraction=-.1), "at least 0")])
def test_bad_arguments(write, given, why):
    with pytest.raises(ValueError, match=why):
        problems(write(RFT), **given)


def test_pairs_are_no_problems(write):
    with pytest.raises(ValueError, match=r"x\.jsonl:1: expected prompts, found pairs"):
        problems(write(DPO))


def test_rows_are_rendered(write):
    tokenizer = Tokenizer.bytes()
    for p in problems(write(RFT, NOVA, {"messages": [user("lone \ud800 surrogate")]}), val_fraction=0):
        assert len(tokenizer.render_prompt(p.prompt, p.tools)) > 10
    pair = read(write(NOVA_DPO)).rows[0]
    assert isinstance(pair, Pair) and sum(tokenizer.render(pair.messages + pair.chosen, pair.tools)[1]) > 0
