import hashlib
import io
import json
import os
import urllib.error

import pytest

from adversarial import assert_bounded
from data import calculator, gsm8k
from data.grading import Outcome, last_number, parse_number
from tokenizer import Tokenizer

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR
staged = pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), "gsm8k")),
                            reason="needs TEMPER_DATA=<folder that holds gsm8k/>")


# -----------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("text, value", [
    ("72", 72), (" 72. ", 72), ("-72", -72), ("+72", 72), ("\u221272", -72), ("$72", 72), ("-$72", -72), ("$-72", -72), ("72%", 72),
    ("72 %", 72), ("72%.", 72), ("1,234", 1234), ("12,345,678.50", 12345678.5), ("0.5", .5), (".5", .5), ("007", 7), ("72.00", 72),
    ("1234567", 1234567),
    *((bad, None) for bad in ("", "$", "-", ".", "%", "1,23", "1234,567", "0,123", ",123", "1,2345", "1.2.3", "1/2", "1e5", "--5", "-$-5", "5 6",
                              "５", "٥", "5a", "0x5", "1_000", "inf", "NaN", "$$5", "5%%", "- 5", "½", "²", "5\u200f", "9" * 129)),
])
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text, value", [
    ("so 3*4=12.", 12), ("pages 10-15", 15), ("it is -15", -15), ("12 - -15!", -15), ("it costs -$5, yes", -5), ("(3)-4", 4), ("x=\u22125", -5),
    ("72 of H2O", 72), ("5kg", 5), ("**72**", 72), ("\\boxed{72}", 72), ("is...5", 5), ("of .5", .5), ("답은 72개", 72), ("답은72", 72),
    ("from 1,000 to 2,000.", 2000), ("10:30", 30), ("72.\n\n", 72), ("72 ...", 72), ("a, b, 5,", 5), ("$72.00.", 72), ("7 apples / day", 7),
    *((bad, None) for bad in ("", "no", "v1", "1e5", "1e-5", "2/5", "5/2", "2^5", "1,2,3", "1.2.3", "Tuesday.5", "１2", "2１", "９", ".,.,", "9" * 200)),
])
def test_last_number(text, value):
    assert last_number(text) == value


# -----------------------------------------------------------------------------
# Grader


@pytest.mark.parametrize("response, strict, lenient", [
    ("2+2=4\n#### 4", RIGHT, RIGHT), ("#### 4.", RIGHT, RIGHT), ("#### $4.00", RIGHT, RIGHT), ("####4", RIGHT, RIGHT), ("####  4  \nbye", RIGHT, RIGHT),
    ("#### 5\n#### 4", RIGHT, RIGHT), ("#### 4\n#### 5", WRONG, WRONG), ("#### -4", WRONG, WRONG), ("#### 40", WRONG, WRONG),
    ("#### 4%", RIGHT, RIGHT), ("The answer is 4.", UNGRADABLE, RIGHT), ("#### four", UNGRADABLE, UNGRADABLE), ("", UNGRADABLE, UNGRADABLE),
    ("#### 4 or 5", UNGRADABLE, WRONG), ("#### 5 or 4", UNGRADABLE, RIGHT), ("#### 4 apples", UNGRADABLE, RIGHT), ("4 ####", UNGRADABLE, RIGHT),
    ("####\n4", UNGRADABLE, RIGHT), ("### 4", UNGRADABLE, RIGHT), ("#### 8/2", UNGRADABLE, UNGRADABLE), ("#### ４", UNGRADABLE, UNGRADABLE),
    ("#### 3.9999999999999999999999", WRONG, WRONG), ("#### 4e0", UNGRADABLE, UNGRADABLE),
])
def test_grade(response, strict, lenient):
    assert gsm8k.grade(response, "some text\n#### 4") == strict == gsm8k.grade(response, "4")
    assert gsm8k.grade(response, "4", strict=False) == lenient


def test_grade_compares_values_not_text():
    assert gsm8k.grade("#### 1200", "#### 1,200") == gsm8k.grade("#### 1,200.0", "1200") == RIGHT


def test_an_exception_is_never_a_score(monkeypatch, caplog):
    assert gsm8k.grade("#### 4", "no number") == ERROR
    assert "expected a reference" in caplog.text
    assert gsm8k.grade(None, "4") == ERROR
    monkeypatch.setattr(gsm8k, "parse_number", lambda text: 1 / 0)
    assert gsm8k.grade("#### 4", "#### 4") == ERROR and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("strict", (True, False))
def test_adversarial_corpus(strict):
    outcomes = assert_bounded(lambda text: gsm8k.grade(text, "#### 72", strict))
    assert ERROR not in outcomes.values() and RIGHT not in outcomes.values()
    if strict:
        assert set(outcomes.values()) == {UNGRADABLE}
    long = "x" * 65529 + "#### 72"  # 64 KB are read, not a character more
    assert gsm8k.grade(long, "72", strict) == RIGHT and gsm8k.grade("x" + long, "72", strict) == UNGRADABLE


@staged
def test_gold_answers():
    for split, num in gsm8k.NUM_ROWS.items():
        rows = gsm8k.load(split)
        assert len(rows) == num
        golds = [row["answer"] for row in rows]
        assert all(gsm8k.grade(gold, gold) == gsm8k.grade(gold, gold, strict=False) == RIGHT for gold in golds)
        shifted = [gsm8k.grade(golds[i - 1], gold) for i, gold in enumerate(golds)]
        assert set(shifted) == {RIGHT, WRONG} and shifted.count(RIGHT) < 0.02 * num
        assert all(gsm8k.grade(row["question"], row["answer"]) == UNGRADABLE for row in rows)


# -----------------------------------------------------------------------------
# Files

ROWS = [{"question": "2+2?", "answer": "Two and two is <<2+2=4>>4.\u2028\n#### 4"},
        {"question": "Half of 1?", "answer": "1/2 = $<<1/2=.5>>0.50 and <<0.5*2=1>>1 back\n#### 1"},
        {"question": "1?", "answer": "#### 1"}]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """GSM8K of three rows behind a network that counts its reads."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    source = {"content": content, "reads": 0, "cache": tmp_path / "cache/temper/gsm8k"}

    def urlopen(url, timeout):
        assert url.startswith("https://raw.githubusercontent.com/openai/grade-school-math/3101c7d50724") and timeout
        source["reads"] += 1
        if source["content"] is None:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(source["content"])

    monkeypatch.setattr(gsm8k.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(gsm8k, "SHA256", dict.fromkeys(("train", "test"), hashlib.sha256(content).hexdigest()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TEMPER_DATA", raising=False)
    return source


def test_downloaded_once(source):
    assert gsm8k.load("test") == ROWS == gsm8k.load("test")
    assert source["reads"] == 1 and [p.name for p in source["cache"].iterdir()] == ["test.jsonl"]


def test_staged_folder_comes_first(source, tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/test.jsonl").write_bytes(source["content"])
    assert gsm8k.load("test") == ROWS and source["reads"] == 0
    assert gsm8k.load("train") == ROWS and source["reads"] == 1  # not staged, so fetched


def test_wrong_bytes_are_named_and_never_kept(source, tmp_path, monkeypatch):
    good, source["content"] = source["content"], source["content"][:-30]
    with pytest.raises(ValueError, match="https://.*expected sha256 .*found .*truncated"):
        gsm8k.load("test")
    assert not source["cache"].exists() or not list(source["cache"].iterdir())
    source["content"] = good
    gsm8k.load("test")
    (source["cache"] / "test.jsonl").write_bytes(good[:-30])  # a disk that filled up
    with pytest.raises(ValueError, match="test.jsonl: expected sha256"):
        gsm8k.load("test")


def test_a_killed_download_leaves_nothing_that_is_read(source, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gsm8k.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            gsm8k.load("test")
    assert list(source["cache"].iterdir()) == []
    (source["cache"] / "test.jsonl.999.part").write_bytes(b"half")  # killed harder: its part stays
    assert gsm8k.load("test") == ROWS


def test_offline_says_what_to_do(source):
    source["content"] = None
    with pytest.raises(ConnectionError, match="TEMPER_DATA.*not set.*test.jsonl.*no route to host.*put the file at"):
        gsm8k.load("test")


def test_bad_reference_and_bad_split_are_refused(source, monkeypatch):
    with pytest.raises(ValueError, match="expected split train or test, found 'val'"):
        gsm8k.load("val")
    source["content"] = json.dumps({"question": "?", "answer": "#### several"}).encode()
    monkeypatch.setattr(gsm8k, "SHA256", {"test": hashlib.sha256(source["content"]).hexdigest()})
    with pytest.raises(ValueError, match="test.jsonl:1: expected an answer that ends in '#### number'"):
        gsm8k.load("test")


# -----------------------------------------------------------------------------
# Conversations


def test_notes_removed(source):
    records = list(gsm8k.conversations("train"))
    assert [record["messages"][1]["content"] for record in records] == [
        "Two and two is 4.\u2028\n#### 4", "1/2 = $0.50 and 1 back\n#### 1", "#### 1"]
    assert records[0]["messages"][0] == {"role": "user", "content": "2+2?\n" + gsm8k.INSTRUCTION}
    assert all(set(record) == {"messages", "bucket"} and record["bucket"] == "math" for record in records)


def test_notes_as_calls(source):
    records = list(gsm8k.conversations("train", calls=True))
    assert records[1]["messages"][1:] == [
        {"role": "assistant", "content": "1/2 = $", "tool_calls": [{"name": "calculator", "arguments": {"expression": "1/2"}}]},
        {"role": "tool", "content": "0.5"},
        {"role": "assistant", "content": "0.50 and", "tool_calls": [{"name": "calculator", "arguments": {"expression": "0.5*2"}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "1 back\n#### 1"}]
    assert records[2]["messages"][1:] == [{"role": "assistant", "content": "#### 1"}]  # no note, no call
    assert all(record["tools"] == [calculator.TOOL] for record in records)


@staged
@pytest.mark.parametrize("calls", (False, True))
def test_all_conversations_render_and_are_right(calls):
    tokenizer, rows = Tokenizer.bytes(), gsm8k.load("test")
    for row, record in zip(rows, gsm8k.conversations("test", calls), strict=True):
        ids, mask = tokenizer.render(record["messages"], record.get("tools"))
        assert 0 < sum(mask) < len(ids) and "<<" not in tokenizer.decode(ids)
        assert gsm8k.grade(record["messages"][-1]["content"], row["answer"]) == RIGHT
    if calls:
        plain = sum(len(record["messages"]) == 2 for split in gsm8k.NUM_ROWS for record in gsm8k.conversations(split, calls=True))
        assert plain == 113


def test_problems(source):
    some, all_of_them = gsm8k.problems("test", 2, seed=3), gsm8k.problems("test", seed=3)
    assert some == all_of_them[:2] and len(all_of_them) == 3 and {p.answer for p in all_of_them} == {row["answer"] for row in ROWS}
    assert any(gsm8k.problems("test", seed=seed) != all_of_them for seed in range(9))
    for p in all_of_them:
        assert gsm8k.grade(p.gold[-1]["content"], p.answer) == RIGHT and p.tools is None and p.prompt[0]["role"] == "user"
    assert gsm8k.problems("test", 1, calls=True)[0].tools == [calculator.TOOL]
