"""chat.py --rollouts: what is shown, where each key leads, and files that are large, cut, damaged or hostile to a terminal."""
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from rollout_pager import arrange, in_lines, index, page

ROOT = Path(__file__).resolve().parents[1]
CALL = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"name": "calculator", "arguments": {"expression": "3*4"}}]}
FULL = dict(step=7, track="logic", task="math_en", problem=4, sample=2, prompt=[dict(role="system", content="Be brief."), dict(role="user", content="3 bags of 4?\nHow many?")],
            messages=[CALL, dict(role="tool", content="12"), dict(role="assistant", content="12")], reward=0.75, rewards=dict(grader=1.0, length=-0.25), outcome="right",
            finish_reason="stop", length=31, advantage=0.123456, ids=[1, 2], mask=[0, 1])


def write(path, *records, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + end)
    return path


def short(step, name, reward=None, outcome="wrong", **more):
    return dict(step=step, prompt=name, messages=[dict(role="assistant", content="ok")], reward=reward, outcome=outcome, **more)


def press(monkeypatch, capsys, path, *keys):
    """-> what a terminal shows: per key, the lines after it."""
    asked, shown = iter(keys), []

    def read(prompt):
        shown.append(capsys.readouterr().out)
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    page(path)
    assert len(shown) == len(keys) + ("q" not in keys), "every key is read, and the end of input leaves"
    return shown, json.loads(capsys.readouterr().out.splitlines()[-1])


def places(shown):
    """'[2/5 best] .../rollouts.jsonl | step 3\\nprompt     name' -> (2/5 best, name)"""
    return [(s.strip().partition("]")[0].strip("["), s.partition("\nprompt ")[2].split("\n")[0].strip()) for s in shown]


def test_a_rollout_in_lines():
    assert in_lines(FULL) == """\
step 7 | track logic | task math_en | problem 4 | sample 2
system     Be brief.
user       3 bags of 4?
           How many?
----------
assistant  Let me see.
           -> calculator {"expression": "3*4"}
tool       12
assistant  12
----------
reward 0.75 | rewards {"grader": 1.0, "length": -0.25} | outcome right | finish_reason stop | length 31 | advantage 0.1235"""


def test_fields_may_be_missing():
    assert in_lines({}) == "\n----------\n----------\n"
    assert in_lines(dict(prompt="2+2=", messages=[dict(role="assistant", content=None)], outcome=None)) == "\nprompt     2+2=\n----------\nassistant  \n----------\noutcome null"
    spelled_otherwise = dict(messages=[dict(role="assistant", tool_calls=[dict(type="function", function=dict(name="f", arguments='{"x": 1}'))])])
    assert 'assistant  -> f {"x": 1}\n' in in_lines(spelled_otherwise)


def test_no_control_character_reaches_the_terminal():
    """Clear screen, carriage return, a title, a bidirectional override, half a surrogate pair: all in a tool's result."""
    hostile = dict(role="tool", content="a\x1b[2J\x1b]0;title\x07\rb\u202ec\ud800d\x9be 김밥\ttab")
    text = in_lines(dict(prompt="x\x00", messages=[hostile], outcome="wr\x1bong"))
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert r"a\x1b[2J\x1b]0;title\x07\rb\u202ec\ud800d\x9be 김밥" in text and "\ttab" in text and r"outcome wr\x1bong" in text
    text.encode()


def test_index_offsets_and_defaults(tmp_path):
    path = write(tmp_path / "round_3/rollouts.jsonl", json.dumps(dict(FULL, prompt="김é"), ensure_ascii=False), dict(outcome="right"), dict(outcome="ungradable"), dict(outcome="grader_error"),
                 dict(outcome="right", reward=None), '{"outcome": "right", "reward": NaN, "step": 5}')
    entries, notes = index(path)
    assert notes == [] and [(e.step, e.reward) for e in entries] == [(7, 0.75), ("3", 1), ("3", 0), ("3", None), ("3", None), (5, None)]
    content = path.read_bytes()
    for e, line in zip(entries, content.splitlines()):
        assert content[e.offset:].startswith(line)
    assert entries[0].track == "logic" and entries[1].track is None


def test_a_cut_last_line_is_left_out_and_damaged_lines_are_named(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "rollouts.jsonl", short(1, "first"), '{"step": 1, "prom', "[1, 2]", '{"outcome": []}', short(2, "second"), '{"step": 2, "prompt": "thi', end="")
    entries, notes = index(path)
    assert [e.step for e in entries] == [1, 2]
    assert [n.split(": ")[0] for n in notes] == [f"{path}:{i}" for i in (2, 3, 4)] and "no rollout, left out" in notes[0]
    shown, summary = press(monkeypatch, capsys, tmp_path, "", "")
    assert notes[0] in shown[0] and "second" in shown[1] and "nothing there" in shown[2]
    assert summary == dict(rollouts=str(tmp_path), files=1, num_rollouts=2, num_left_out=3)
    whole = write(tmp_path / "b/rollouts.jsonl", short(1, "first"), short(2, "last line without an end, but whole"), end="")
    assert len(index(whole)[0]) == 2


def test_keys(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "rollouts.jsonl", short(1, "a", 0.5), short(1, "b", None, "grader_error"), short(2, "c", -1.0), short(10, "d", 2.0, "right"), short(10, "e", 0.5))
    shown, _ = press(monkeypatch, capsys, path, "n", "", "p", "/10", "2", "p", "p")
    assert places(shown)[:-1] == [("1/5", "a"), ("2/5", "b"), ("3/5", "c"), ("2/5", "b"), ("4/5", "d"), ("2/5", "b"), ("1/5", "a")]
    assert shown[-1].startswith("nothing there: 5 rollouts, steps 1 to 10, words grader_error right wrong (")
    shown, _ = press(monkeypatch, capsys, path, "best", "n", "4", "n", "n", "worst", "n", "/10", "all")
    moves = places(shown)
    assert moves[1:5] == [("1/5 best", "d"), ("2/5 best", "a"), ("4/5 best", "c"), ("5/5 best", "b")] and shown[5].startswith("nothing there")
    assert moves[6:] == [("1/5 worst", "c"), ("2/5 worst", "a"), ("3/5 worst", "e"), ("1/5", "a")]      # of step 10 are d and e: the worst of them
    for nonsense in ("/3", "99", "0", "-1", "nn", "only nobody", "²"):
        shown, _ = press(monkeypatch, capsys, path, nonsense, "n")
        assert shown[1].startswith("nothing there") and places(shown)[2] == ("2/5", "b"), nonsense


def test_filters(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "rollouts.jsonl", short(1, "a", 1.0, "right", track="chat"), short(2, "b", 0.0, track="logic"), short(3, "c", 3.0, track="chat"))
    shown, _ = press(monkeypatch, capsys, path, "only chat", "n", "best", "only wrong", "n", "only", "all", "q")
    assert places(shown) == [("1/3", "a"), ("1/2 chat", "a"), ("2/2 chat", "c"), ("1/2 chat best", "c"), ("1/2 wrong best", "c"), ("2/2 wrong best", "b"),
                             ("1/3 best", "c"), ("1/3", "a")]


def test_sorting_is_stable_and_puts_the_unscored_last(tmp_path):
    entries, _ = index(write(tmp_path / "rollouts.jsonl", *(short(i, "", r) for i, r in enumerate((None, 1.0, 0.0, 1.0, None, -2.0)))))
    steps = lambda sort: [e.step for e in arrange(entries, sort, "")]
    assert steps("") == [0, 1, 2, 3, 4, 5] and steps("best") == [1, 3, 2, 5, 0, 4] and steps("worst") == [5, 2, 1, 3, 0, 4]


def test_rounds_come_in_their_order(tmp_path, monkeypatch, capsys):
    for k in (10, 2, 0):
        write(tmp_path / f"round_{k}/rollouts.jsonl", dict(prompt=f"of round {k}", outcome="right"))
    write(tmp_path / "round_0/sampled_000000.jsonl", dict(prompt="not these"))
    shown, summary = press(monkeypatch, capsys, tmp_path, "", "", "/2")
    assert [p[1] for p in places(shown)] == ["of round 0", "of round 2", "of round 10", "of round 2"] and summary["files"] == 3


def test_without_a_terminal_the_first_few_are_printed(tmp_path):
    path = write(tmp_path / "rollouts.jsonl", *(dict(FULL, prompt=f"question {i}") for i in range(9)))
    done = subprocess.run([sys.executable, str(ROOT / "chat.py"), f"--rollouts={tmp_path}"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stderr == "" and [f"question {i}" in done.stdout for i in range(5)] == [True] * 3 + [False] * 2
    assert f"[3/9] {path} | step 7" in done.stdout and json.loads(done.stdout.splitlines()[-1])["num_rollouts"] == 9


@pytest.mark.parametrize("content", [None, "", "\n", "no json\n"])
def test_no_rollouts_is_an_error(content, tmp_path):
    if content is not None:
        (tmp_path / "rollouts.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"--rollouts={tmp_path}: no rollouts there; expected a rollouts.jsonl"):
        page(tmp_path)


def test_lines_are_not_held_in_memory(tmp_path):
    path = write(tmp_path / "rollouts.jsonl", *(dict(FULL, prompt="x" * 100_000) for _ in range(40)))
    tracemalloc.start()
    entries, _ = index(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(entries) == 40 and peak < 1_000_000 < 4_000_000 < path.stat().st_size
