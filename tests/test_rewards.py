"""Reward files: each way to be called and to answer, every failure a grader_error that names the row, and files in AWS's and verl's style."""
import json
import math
import os
import signal
import time

import pytest

from data.grading import Outcome, Problem
from data.rewards import MAX_HANGS, RewardFile, Sample, Score, check_reward, grader_reward, parse_rewards, payload, read_results, weighted

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR


def row(number, reference="4", **metadata):
    hidden = dict(id=f"row-{number}", reference=reference, metadata=metadata, data_source="acme/sums", where=f"rows.jsonl:{number}")
    return Problem("rows/none", [dict(role="user", content=f"2 + {number}?")], [], str(reference), hidden)


def sample(number, answer, reference="4", **metadata):
    return Sample(f"{number}/0", row(number, reference, **metadata), [dict(role="assistant", content=answer)], UNGRADABLE)


@pytest.fixture
def write(tmp_path):
    """write(text, ...) -> RewardFile of a file with that text; closed at the end."""
    made = []

    def make(text, function="lambda_handler", **options):
        path = tmp_path / f"reward{len(made)}.py"
        path.write_text(text)
        made.append(RewardFile(path, function, **options))
        return made[-1]
    yield make
    for reward in made:
        reward.close()


# -----------------------------------------------------------------------------
# Files in the documented styles

# Bedrock and SageMaker Nova: a list in, a list out, the reference below metadata, dataclasses, prints, an index kept in `id`
NOVA = '''
import json
from dataclasses import asdict, dataclass, field
from typing import List

print("cold start")


@dataclass
class Graded:
    id: str
    aggregate_reward_score: float
    metrics_list: List[dict] = field(default_factory=list)


def lambda_handler(event, context):
    print("request", context.aws_request_id, context.get_remaining_time_in_millis() > 0)
    return grade_all(event)


def grade_all(samples: List[dict]) -> List[dict]:
    graded = []
    for sample in samples:
        print(json.dumps(sample))
        last = sample["messages"][-1]
        assert last["role"] in ("assistant", "nova_assistant")
        truth = sample.get("metadata", {}).get("reference_answer")
        if truth is None:
            graded.append(Graded(sample["id"], 0.0))
            continue
        said = last["content"].rpartition("####")[2].strip()
        exact = float(said == truth["text"].rpartition("####")[2].strip())
        parts = [{"name": "exact", "value": exact, "type": "Reward"}, {"name": "chars", "value": len(said), "type": "Metric"}]
        graded.append(Graded(sample["id"], exact, parts))
    return [asdict(g) for g in graded]
'''

# SageMaker, models with open weights: an HTTP answer whose body is JSON text; the reference at the top; any of the dict events
HTTP = '''
import json


def handler(event, _context):
    if "body" in event:
        rows = json.loads(event["body"])
    else:
        rows = event.get("batch") or event.get("input") or event.get("trajectories")
    results = []
    for row in rows[::-1]:
        answer = next((m["content"] for m in reversed(row["messages"]) if m["role"] == "assistant"), "")
        hit = row["reference_answer"] in answer
        results.append({"id": row["id"], "aggregate_reward_score": 1 if hit else 0, "reward_components": {"hit": hit}})
    return {"statusCode": 200, "headers": {"Content-Type": "application/json"}, "body": json.dumps(results)}
'''


@pytest.mark.parametrize("role", ["assistant", "nova_assistant"])
def test_a_nova_file_runs_unchanged(write, role, capfd):
    reward = write(NOVA, role=role)
    reference = {"text": "2 + 2 = 4\n#### 4"}
    scores = reward([sample(1, "so #### 4", reference), sample(2, "#### 5", reference), sample(3, "#### 4", None)])
    assert [(s.value, s.outcome) for s in scores] == [(1.0, RIGHT), (0.0, WRONG), (0.0, WRONG)]
    assert scores[0].metrics == {"exact": 1.0, "chars": 1.0} and not any(s.note for s in scores)
    out, err = capfd.readouterr()
    assert "cold start" in err and "request local True" in err and not out


@pytest.mark.parametrize("event", ["batch", "input", "trajectories", "body"])
def test_an_http_file_runs_unchanged(write, event):
    """Results come back last first: matched by id."""
    reward = write(HTTP, "handler", event=event)
    scores = reward([sample(1, "it is 4"), sample(2, "it is 5"), sample(3, "4")])
    assert [s.value for s in scores] == [1, 0, 1] and [s.metrics for s in scores] == [{"hit": 1.0}, {"hit": 0.0}, {"hit": 1.0}]


def test_verl_files_run_unchanged(write):
    """Per item by keyword, with only the names that it takes; the batch plural; a number, a bool, or a dict with score."""
    one = write("def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
                "    assert data_source == 'acme/sums' and extra_info == {'level': 3}\n"
                "    return {'score': .5 if solution_str == ground_truth else 0, 'length': len(solution_str), 'pred': solution_str}\n",
                "compute_score")
    scores = one([sample(1, "4", level=3), sample(2, "44", extra_info={"level": 3}, other=1), sample(3, "4")])
    assert [s.value for s in scores] == [.5, 0, None] and scores[1].metrics == {"length": 2.0} and scores[0].outcome == WRONG
    assert "rows.jsonl:3 (sample 3/0)" in scores[2].note and "AssertionError" in scores[2].note
    few = write("def f(solution_str, ground_truth, **rest):\n    return sorted(rest) == ['data_source', 'extra_info']\n", "f")
    assert [s.value for s in few([sample(1, "4")])] == [1.0]
    many = write("def f(data_sources, solution_strs, ground_truths, extra_infos):\n"
                 "    return [float(s == g) for s, g in zip(solution_strs, ground_truths, strict=True)]\n", "f", call_size=2)
    assert [s.value for s in many([sample(1, "4"), sample(2, "5"), sample(3, "4")])] == [1, 0, 1]


def test_f_of_samples_may_use_our_graders(write):
    reward = write("from data import gsm8k\n\ndef f(samples):\n    return [{'aggregate_reward_score': gsm8k.grade(s['messages'][-1]['content'],"
                   " s['reference_answer']) == 'right'} for s in samples]\n", "f")
    assert [s.value for s in reward([sample(1, "#### 4"), sample(2, "4")])] == [1, 0]


# -----------------------------------------------------------------------------
# What is sent


def test_payload():
    """The reference in both places, other keys in all three, the prompt first, and the model's turn last."""
    sent = payload(sample(7, "4", {"x": 4}, domain="algebra"))
    assert sent == dict(
        id="7/0", messages=[dict(role="user", content="2 + 7?"), dict(role="assistant", content="4")], reference_answer={"x": 4},
        metadata=dict(reference_answer={"x": 4}, ground_truth={"x": 4}, domain="algebra"), data_source="acme/sums", domain="algebra",
        extra_info=dict(domain="algebra"))
    json.dumps(sent)
    assert payload(sample(1, "f(x=1)", {"ground_truth": ["f(x=1)"]}))["metadata"]["ground_truth"] == ["f(x=1)"]
    assert payload(sample(1, "4", "4", ground_truth="row's own"))["metadata"]["ground_truth"] == "row's own"
    assert payload(sample(1, "4", "4", id="mine", messages="mine"))["id"] == "1/0"


@pytest.mark.parametrize("messages", [[], [dict(role="assistant", content="a"), dict(role="tool", content="8")]])
def test_the_last_message_is_the_model_s(messages):
    problem = Problem("gsm8k", [dict(role="user", content="q")], [], "so\n#### 4")      # from no file: no hidden keys
    sent = payload(Sample("a", problem, messages, WRONG), "nova_assistant")
    assert sent["messages"][-1] == dict(role="nova_assistant", content="")
    assert {m["role"] for m in sent["messages"][1:]} <= {"nova_assistant", "tool"}
    assert sent["reference_answer"] == "so\n#### 4" and sent["data_source"] == "gsm8k"
    text = Problem("sums", "15*19=", "285", "285")
    assert payload(Sample("a", text, [dict(role="assistant", content="285")], RIGHT))["messages"][0] == dict(role="user", content="15*19=")


# -----------------------------------------------------------------------------
# What comes back

A, B = dict(id="a", aggregate_reward_score=.25), dict(id="b", aggregate_reward_score=.75)
FINE = [.25, .75]


@pytest.mark.parametrize("result, values", [
    ([A, B], FINE), ([B, A], FINE),
    ([dict(aggregate_reward_score=.25), dict(aggregate_reward_score=.75)], FINE),                   # no ids: by position
    (dict(statusCode=200, body=[B, A]), FINE), (dict(statusCode=200, headers={}, body=json.dumps([B, A])), FINE),
    ([A | dict(aggregate_reward_score=True), B | dict(aggregate_reward_score=2)], [1, 2]),
    ([A], [.25, None]), (A, [.25, None]), ([B], [None, .75]),                                       # dropped silently
    ([A, A, B], [None, .75]),                                                                       # doubled
    ([A, B | dict(id="c")], [.25, None]), ([A, B | dict(id=0)], [.25, None]),                       # another's
    ([A, B, B | dict(id="c")], [None, None]),                                                       # nobody's: whose are the others?
    ([A, dict(aggregate_reward_score=.75)], [.25, None]),                                           # some with an id: no position
    ([dict(aggregate_reward_score=.25)], [None, None]), ([dict(aggregate_reward_score=1)] * 3, [None, None]),
    ([A, B | dict(aggregate_reward_score=None)], [.25, None]), ([A, dict(id="b")], [.25, None]), ([A, dict(id="b", score=1)], [.25, None]),
    ([A, B | dict(aggregate_reward_score="0.75")], [.25, None]), ([A, B | dict(aggregate_reward_score=[.75])], [.25, None]),
    ([A, B | dict(aggregate_reward_score=math.nan)], [.25, None]), ([A, B | dict(aggregate_reward_score=-math.inf)], [.25, None]),
    ([A, B | dict(aggregate_reward_score=10 ** 400)], [.25, None]),
    ([A, B | dict(error="judge timed out", aggregate_reward_score=0)], [.25, None]), ([A, dict(id="b", error="x")], [.25, None]),
    (None, [None, None]), ([], [None, None]), ({}, [None, None]), (1.0, [None, None]), ("[]", [None, None]), ([None, None], [None, None]),
    ([.25, .75], [None, None]), ({"a": .25, "b": .75}, [None, None]),
    (dict(statusCode=500, body="boom"), [None, None]), (dict(statusCode=200, body="<html>"), [None, None]), (dict(statusCode=200), [None, None]),
    (dict(statusCode=200, body=json.dumps({"error": "x"})), [None, None]), (dict(statusCode=200, body="[" * 100_000), [None, None]),
    (dict(statusCode=None, body=[A, B]), [None, None]),
    ({"error": "x"}, [None, None]), (dict(errorMessage="x", errorType="KeyError"), [None, None]),
])
def test_results(result, values):
    found = read_results(result, ["a", "b"], "event")
    assert [None if isinstance(f, str) else f[0] for f in found] == values == [None if isinstance(f, str) else f[0] for f in
                                                                             read_results(result, ["a", "b"], "samples")]


def test_results_say_what_is_wrong():
    assert "no results with its id, and one with '0', which was not sent" in read_results([A, B | dict(id="0")], ["a", "b"], "event")[1]
    assert "2 results with its id" in read_results([A, A, B], ["a", "b"], "event")[0]
    assert "statusCode 503: 'busy'" in read_results(dict(statusCode=503, body="busy"), ["a"], "event")[0]
    assert "found nan" in read_results([A | dict(aggregate_reward_score=math.nan)], ["a"], "event")[0]
    assert "1 results for 2 samples" in read_results([dict(aggregate_reward_score=1)], ["a", "b"], "event")[0]
    assert len(read_results("x" * 10_000, ["a"], "event")[0]) < 300


@pytest.mark.parametrize("result, how, values", [
    (.5, "item", [.5]), (True, "item", [1]), (dict(score=1, acc=True), "item", [1]), (None, "item", [None]), (math.nan, "item", [None]),
    (dict(acc=1), "item", [None]), ("1", "item", [None]), ([.5], "item", [None]),
    ([1, dict(score=.5)], "batch", [1, .5]), ([1], "batch", [None, None]), ([1, 1, 1], "batch", [None, None]), (1, "batch", [None, None]),
    ([1, None], "batch", [1, None]), (None, "batch", [None, None]),
])
def test_verl_results(result, how, values):
    assert [None if isinstance(f, str) else f[0] for f in read_results(result, ["a", "b"][:len(values)], how)] == values


def test_metrics_are_what_is_a_number():
    result = A | dict(metrics_list=[dict(name="m", value=1, type="Metric"), dict(name="nan", value=math.nan), "junk", dict(value=2)],
                      reward_components=dict(c=.5, text="x"), metrics=dict(d=False))
    assert read_results([result], ["a"], "event") == [(.25, dict(m=1.0, c=.5, d=0.0))]
    assert read_results([A | dict(metrics_list="none", metrics=[1])], ["a"], "event") == [(.25, {})]


# -----------------------------------------------------------------------------
# The process


def test_a_hang_costs_its_call_and_not_the_run(write, capfd):
    """One of three calls hangs: its samples are errors, the others are scored, by a process started anew; where it hung is on stderr."""
    reward = write("import os, time\n\ndef f(samples):\n    if samples[0]['id'] == '2/0':\n        while True:\n            time.sleep(9)\n"
                   "    return [{'id': s['id'], 'aggregate_reward_score': 1, 'metrics': {'pid': os.getpid()}} for s in samples]\n",
                   "f", timeout=1.5, call_size=2)
    begin = time.monotonic()
    scores = reward([sample(i, "4") for i in range(6)])
    assert [s.value for s in scores] == [1, 1, None, None, 1, 1] and time.monotonic() - begin < 10
    assert scores[0].metrics["pid"] != scores[5].metrics["pid"]
    assert scores[3].outcome == ERROR and scores[3].note.startswith("rows.jsonl:3 (sample 3/0): reward0.py:f: no answer within 1.5 s")
    assert "reward0.py\", line 6 in f" in capfd.readouterr().err


def test_many_hangs_are_given_up(write):
    reward = write("import time\ndef f(samples):\n    time.sleep(60)\n", "f", timeout=.2, call_size=1)
    begin = time.monotonic()
    scores = reward([sample(i, "4") for i in range(MAX_HANGS + 40)])
    assert time.monotonic() - begin < 10 and all(s.value is None for s in scores)
    assert "not called any more" in scores[MAX_HANGS].note and "not called" not in scores[MAX_HANGS - 1].note


@pytest.mark.parametrize("body, note", [
    ("raise KeyError('text')", "KeyError: 'text'"),
    ("raise SystemExit(3)", "SystemExit: 3"),
    ("os._exit(3)", "process ended with status 3"),
    ("os.kill(os.getpid(), 9)", "process ended with status -9"),
    ("return None", "expected a list of results, found None"),
    ("return float('nan')", "found nan"),
    ("return [{'id': s['id'], 'aggregate_reward_score': float('nan')} for s in event]", "found nan"),
    ("return [{'id': 'x', 'aggregate_reward_score': 1} for s in event]", "'x', which was not sent"),
    ("return {s['id']: {1} for s in event}", "set is not JSON"),
    ("return [{'id': s['id'], 'aggregate_reward_score': object()} for s in event]", "object is not JSON"),
    ("return 'x' * (17 << 20)", "the limit is 16777216"),
    ("a = []; a.append(a); return a", "Circular reference"),
    ("return 10 ** 5000", "Exceeds the limit"),
])
def test_every_failure_names_the_row(write, body, note):
    """And the next call, of another sample, is scored: the first is the one that fails."""
    reward = write(f"import os\nnumber = 0\n\ndef f(event, context):\n    if event[0]['id'] == '1/0':\n        {body}\n"
                   "    return [{'id': s['id'], 'aggregate_reward_score': 1} for s in event]\n", "f", call_size=1)
    failed, fine = reward([sample(1, "4"), sample(2, "4")])
    assert failed.value is None and failed.outcome == ERROR and note in failed.note and failed.note.startswith("rows.jsonl:1 (sample 1/0): ")
    assert fine.value == 1


def test_what_the_file_prints_or_reads_is_not_the_protocol(write, capfd):
    """print, descriptor 1, a subprocess, and text that looks like an answer; input() finds nothing; unlike print it never blocks."""
    reward = write("""
import os, subprocess, sys

def f(event, context):
    print('{"result": [{"aggregate_reward_score": 99}]}')
    os.write(1, b'{"result": 99}\\n')
    subprocess.run(["echo", '{"result": 98}'])
    sys.stdout.write("no newline")
    return [{"id": s["id"], "aggregate_reward_score": len(sys.stdin.read())} for s in event]
""", "f")
    assert [s.value for s in reward([sample(1, "4")])] == [0]
    assert [s.value for s in reward([sample(1, "4")])] == [0]
    out, err = capfd.readouterr()
    assert not out and err.count("98") == 2 and "no newline" in err


def test_numpy_scalars_are_numbers(write):
    reward = write("import numpy\n\ndef compute_score(solution_str, ground_truth):\n    return numpy.float32(.5)\n", "compute_score")
    assert reward([sample(1, "4")])[0].value == .5


def test_texts_survive_the_way(write):
    text = 'ünï "q" \\ \u2028 \x00 \ud800 </s>\n한글'
    reward = write("def compute_score(solution_str, ground_truth):\n    return solution_str == ground_truth and len(solution_str)\n", "compute_score")
    assert reward([sample(1, text, text)])[0].value == len(text)
    big = "y" * (4 << 20)                     # far more than a pipe holds
    assert reward([sample(1, big, big)])[0].value == 4 << 20


def test_a_file_that_starts_processes_leaves_none_behind(write, tmp_path):
    """A child of the user's that sleeps, and holds the pipe, dies with a call that hangs."""
    pid = tmp_path / "pid"
    reward = write(f"import os, time\n\ndef f(samples):\n    if (child := os.fork()) == 0:\n        time.sleep(60)\n        os._exit(0)\n"
                   f"    open({str(pid)!r}, 'w').write(str(child))\n    time.sleep(60)\n", "f", timeout=1.0)
    begin = time.monotonic()
    assert reward([sample(1, "4")])[0].value is None and time.monotonic() - begin < 10
    for _ in range(100):                      # init may take a moment to bury it
        try:
            os.kill(int(pid.read_text()), 0)
            state = open(f"/proc/{pid.read_text()}/stat").read().split()[2]
        except (ProcessLookupError, FileNotFoundError):
            state = "gone"
        if state in ("gone", "Z"):
            break
        time.sleep(.02)
    else:
        os.kill(int(pid.read_text()), signal.SIGKILL)
        pytest.fail("the grandchild is alive")


def test_close_ends_the_process(write):
    reward = write("def f(samples):\n    return []\n", "f")
    process = reward._process
    assert process.poll() is None
    reward.close()
    assert process.poll() is not None


@pytest.mark.parametrize("text, function, message", [
    ("def f(a, b):\n    pass\n", "f", r"expected f\(event, context\).* found f\(a, b\)"),
    ("def f(sample, index):\n    pass\n", "f", "expected"), ("def f():\n    pass\n", "f", "expected"),
    ("def f(prompts, completions, **kwargs):\n    pass\n", "f", "expected"), ("def f(completions, **kwargs):\n    pass\n", "f", "expected"),
    ("async def f(event, context):\n    pass\n", "f", "found async f"), ("def f(event, context, extra):\n    pass\n", "f", "expected"),
    ("def f(solution_str, ground_truth, tokenizer):\n    pass\n", "f", "expected"),
    ("def compute_score(x):\n    pass\n", "lambda_handler", "found compute_score: name one with --reward_function"),
    ("lambda_handler = 3\n", "lambda_handler", "found none"),
    ("def f(:\n", "f", "SyntaxError"), ("import nothing_of_that_name\n", "f", "nothing_of_that_name"), ("raise SystemExit\n", "f", "SystemExit"),
])
def test_files_that_are_refused(write, text, function, message):
    with pytest.raises(ValueError, match=message):
        write(text, function)


def test_flags_that_are_refused(write, tmp_path):
    for path, message in (("arn:aws:lambda:us-east-1:123456789012:function:SageMaker-r", "Lambda function is not called"),
                          ("http://localhost:9000/rollout", "rollout server"), ("https://x.y", "Python file"), (tmp_path / "no.py", "none there"),
                          (tmp_path, "none there")):
        with pytest.raises(ValueError, match=message):
            RewardFile(path)
    handler = "def lambda_handler(event, context=None):\n    return event\n"
    for options, message in ((dict(event="records"), "--reward_event"), (dict(role="user"), "--reward_role"), (dict(timeout=0), "--reward_timeout"),
                             (dict(timeout=901), "--reward_timeout")):
        with pytest.raises(ValueError, match=message):
            write(handler, **options)
    assert write(handler, event="batch").how == "event"
    with pytest.raises(ValueError, match="--reward_event=batch is for"):
        write("def f(samples):\n    pass\n", "f", event="batch")


# -----------------------------------------------------------------------------
# Rewards put together


def test_grader_reward():
    samples = [Sample(str(i), Problem("gsm8k", "q", "", "4"), [], o) for i, o in enumerate((RIGHT, WRONG, UNGRADABLE, ERROR))]
    scores = grader_reward(samples)
    assert [(s.value, s.outcome) for s in scores] == [(1, RIGHT), (0, WRONG), (0, UNGRADABLE), (None, ERROR)]
    assert scores[3].note.startswith("gsm8k (sample 3): ")


@pytest.mark.parametrize("spec, found", [
    ("grader", {"": {"grader": 1}}), ("grader:1,judge:.5", {"": {"grader": 1, "judge": .5}}), (" grader , file:0 ", {"": {"grader": 1, "file": 0}}),
    ("logic/grader,chat/judge:1,chat/file:.5", {"logic": {"grader": 1}, "chat": {"judge": 1, "file": .5}}),
])
def test_parse_rewards(spec, found):
    assert parse_rewards(spec) == found


@pytest.mark.parametrize("spec, message", [
    ("graders", "did you mean grader"), ("", "expected"), ("grader,", "expected"), ("grader:", "weight"), ("grader:x", "weight"),
    ("grader:nan", "weight"), ("grader:inf", "weight"), ("grader:-1", "weight"), ("grader,grader:2", "second time"), ("a/b/grader", "expected"),
    ("grader:0", "every weight is 0"), ("a/grader,b/judge:0", "every weight of b is 0"), ("grader,chat/judge", "before every name or before none"),
    ("/grader", "expected"), ("grader judge", "expected"), ("grader:1:2", "expected"),
])
def test_parse_rewards_refuses(spec, message):
    with pytest.raises(ValueError, match=f"--rewards=.*{message}"):
        parse_rewards(spec)


def test_weighted():
    """.5 * 1 + 2 * .25 = 1; a part that failed takes the sum with it, unless it has no weight; the heaviest part's outcome."""
    grader, judge, failed = Score(1.0, RIGHT), Score(.25, WRONG, "n", dict(judge_fault=0.0)), Score(None, ERROR, "row 3: broke", dict(judge_fault=1.0))
    score = weighted(dict(grader=grader, judge=judge), dict(grader=.5, judge=2.0))
    assert score == Score(1.0, WRONG, "n", {"grader/value": 1.0, "judge/value": .25, "judge/judge_fault": 0.0})
    assert weighted(dict(grader=grader, judge=judge), dict(grader=1.0, judge=1.0)).outcome == RIGHT
    score = weighted(dict(grader=grader, judge=failed), dict(grader=1.0, judge=.1))
    assert score[:3] == (None, ERROR, "row 3: broke") and score.metrics == {"grader/value": 1.0, "judge/judge_fault": 1.0}
    assert weighted(dict(grader=grader, judge=failed), dict(grader=1.0, judge=0.0))[:2] == (1.0, RIGHT)


def test_check_reward(write):
    """References 1, empty 0, others' 0; a reward that pays everybody is named; errors are shown with their row."""
    exact = write("def compute_score(solution_str, ground_truth):\n    return solution_str == ground_truth\n", "compute_score")
    lines = check_reward(exact, [row(1, "4"), row(2, "5"), row(3, "4")])
    assert [line.split()[-4:] for line in lines[1:]] == [["1.000", "1.000", "1.000", "0"], ["0.000", "0.000", "0.000", "0"],
                                                         ["0.000", "0.000", "0.000", "0"]]
    paid = write("def compute_score(solution_str, ground_truth):\n    return 1 / len(ground_truth)\n", "compute_score")
    lines = check_reward(paid, [row(1, "4"), row(2, "5"), row(3, "")])
    assert any("warning: empty answers score no less" in line for line in lines)
    assert lines[1].split()[-1] == "1" and lines[-1].startswith("first error: rows.jsonl:3") and "ZeroDivisionError" in lines[-1]
    lines = check_reward(grader_reward, [row(1, "4"), row(2, "5")], lambda problem, messages: RIGHT if messages[0]["content"] == problem.answer else WRONG)
    assert lines[1].split()[-4:] == ["1.000", "1.000", "1.000", "0"] and lines[2].split()[-4] == "0.000"
    lines = check_reward(exact, [row(1, None)])         # nothing to check against
    assert lines[1].split()[-4:] == ["-", "-", "-", "0"]
