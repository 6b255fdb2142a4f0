"""What a reward is, rewards for being right and for knowing it, the user's own reward file in a child process, and rewards put together.

    reward(samples: list[Sample]) -> list[Score]        one per sample, in order; reward.close() where it holds something

A Score's value is None where the reward itself failed (Outcome.GRADER_ERROR): that sample leaves its group, is counted, and is never a 0.
Its note then begins with the row, "prompts.jsonl:12 (sample 7/3): ...", which is what a run that stops prints.

A reward file is Python that the user wrote and trusts: no box. It follows the contract of Amazon Bedrock's and SageMaker's reward Lambdas,
or verl's (data/README.md, "Reward files"), so that a file written for one of them runs here unchanged.
"""
import contextlib
import difflib
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from data.grading import Outcome, Problem, without_confidence

CHILD = Path(__file__).with_name("rewards_child.py")
START_SECONDS = 60.0        # at least this long for a reward file to load: it may import torch
GRACE = 1.0                 # seconds after its timeout in which the child ends itself and says where it hung
MAX_HANGS = 3               # of one call for all samples; what is left then is not asked, or a hang would take hours to show
EVENTS = ("list", "batch", "input", "trajectories", "body")
NAMES = ("grader", "judge", "file", "rlcr")


class Sample(NamedTuple):
    id: str                 # a string that no other sample of the call has
    problem: Problem        # hidden: id, reference, metadata, data_source, where, as data/prompts.py fills it; may be without them
    messages: list          # what followed the prompt: assistant, tool, ... turns
    outcome: Outcome        # what the task's own grader found


class Score(NamedTuple):
    value: float | None     # None: grader_error
    outcome: Outcome        # of a reward with no notion of right and wrong: RIGHT for full marks (1, or the top of a judge's range)
    note: str = ""
    metrics: dict = {}      # name -> finite number, for the log


def row_of(sample):
    """Where a person finds the sample: 'prompts.jsonl:12 (sample 7/3)', or the task where its problem came from no file."""
    return f"{sample.problem.hidden.get('where') or sample.problem.task} (sample {sample.id})"


def error(sample, why, **metrics):
    return Score(None, Outcome.GRADER_ERROR, f"{row_of(sample)}: {why}", metrics)


def grader_reward(samples):
    """1 for right, 0 for wrong and ungradable, None for grader_error: what the task's grader said when the episode was played."""
    return [error(s, f"the grader of {s.problem.task} failed, its traceback is in the log") if s.outcome == Outcome.GRADER_ERROR
            else Score(float(s.outcome == Outcome.RIGHT), s.outcome) for s in samples]


def rlcr_reward(samples):
    """c - (q - c)^2 with c = 1 for right, else 0, and q the confidence that the answer ends with (data.grading.stated_confidence); -2 without a
    readable one; None for grader_error. RLCR, arXiv 2507.16806: the authors' .5 format + .5 c + .5 (1 - (q - c)^2) is 1 + value / 2.

    In [-1, 1]: right is paid 1 - (1 - q)^2 >= 0, wrong -q^2 <= 0, so no wrong answer beats a right one; they tie where both say q = 0. For an answer
    that is right with probability p, q = p is best and worth p^2, which grows with p. The log score in the place of -(q - c)^2 is proper too and yet
    no reward: it has no lower bound, so that c + log says more for a wrong answer with q = 0 (0) than for a right one with q = .2 (-.61).

    Metrics: stated (1 or 0), and where a confidence was: confidence (q) and brier ((q - c)^2).
    """
    scores = []
    for sample, graded in zip(samples, grader_reward(samples)):
        c, q = graded.value, without_confidence(sample.messages)[1]
        if c is None:
            scores.append(graded)
        elif q is None:
            scores.append(Score(-2.0, graded.outcome, "no readable <confidence> at the end", dict(stated=0.0)))
        else:
            scores.append(Score(c - (q - c) ** 2, graded.outcome, "", dict(stated=1.0, confidence=q, brier=(q - c) ** 2)))
    return scores


# -----------------------------------------------------------------------------
# --rewards, and its parts put together


def parse_rewards(spec):
    """"grader:1,judge:.5" -> {"": {"grader": 1.0, "judge": 0.5}}; "logic/grader,chat/judge:1,chat/file:.5" -> {"logic": ..., "chat": ...}.

    A weight is 1 where none is given. Weight 0: computed and logged, not paid. ValueError names the flag and the part that is wrong.
    """
    found = {}
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(?:(\w+)/)?(\w+)(?::([^:,]*))?\s*", part)
        track, name, weight = match.groups() if match else (None, part, None)
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise ValueError(f"--rewards={spec}: expected [TRACK/]NAME[:WEIGHT] with NAME one of {', '.join(NAMES)}, found {part!r}"
                             + (f"; did you mean {near[0]}?" if near else ""))
        try:
            weight = 1.0 if weight is None else float(weight)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise ValueError(f"--rewards={spec}: expected a finite weight of at least 0 in {part!r}")
        if name in found.setdefault(track or "", {}):
            raise ValueError(f"--rewards={spec}: {part.strip()!r} names {name} a second time")
        found[track or ""][name] = weight
    if "" in found and len(found) > 1:
        raise ValueError(f"--rewards={spec}: expected a track before every name or before none (as in logic/grader,chat/judge)")
    for track, weights in found.items():
        if not any(weights.values()):
            raise ValueError(f"--rewards={spec}: every weight{f' of {track}' * bool(track)} is 0, so nothing would be rewarded")
    return found


def weighted(scores, weights):
    """scores, weights: name -> Score, name -> weight of one sample -> Score: sum of weight * value, None if any part with weight has none.

    The outcome is that of the part with the largest weight (the first of equals). Metrics: NAME/value, and each part's own as NAME/...
    """
    metrics = {f"{name}/{key}": value for name in weights for key, value in
               (scores[name].metrics | ({} if scores[name].value is None else {"value": scores[name].value})).items()}
    failed = [name for name, weight in weights.items() if weight and scores[name].value is None]
    if failed:
        return Score(None, Outcome.GRADER_ERROR, scores[failed[0]].note, metrics)
    first = scores[max(weights, key=weights.get)]
    return Score(sum(weight * scores[name].value for name, weight in weights.items() if weight), first.outcome, first.note, metrics)


def open_rewards(spec, tracks, *, device="cpu", reward_file="", reward_function="lambda_handler", reward_role="assistant", reward_event="list",
                 reward_timeout=30.0, judge="", judge_model="", judge_retries=2, judge_timeout=60.0, judge_range="0:1",
                 rubric="instruction"):
    """The flags of a run -> for each track {name: (reward, weight)}; a reward that several tracks name is one object."""
    found = parse_rewards(spec)
    if wrong := [t for t in found if t and t not in tracks] or [t for t in tracks if not (found.get(t) or found.get(""))]:
        raise ValueError(f"--rewards={spec}: the tracks are {', '.join(tracks)}; {wrong[0]!r} is " + ("none of them" if wrong[0] in found else "missing"))

    def make(name):
        if name == "grader":
            return grader_reward
        if name == "rlcr":
            return rlcr_reward
        if name == "file":
            if not reward_file:
                raise ValueError(f"--rewards={spec} names file: expected the path of a Python file in --reward_file")
            return RewardFile(reward_file, reward_function, timeout=reward_timeout, role=reward_role, event=reward_event)
        from data.judge import Judge
        if not judge:
            raise ValueError(f"--rewards={spec} names judge: expected a checkpoint folder or a URL in --judge")
        low, _, high = judge_range.partition(":")
        try:
            bounds = float(low), float(high)
        except ValueError:
            raise ValueError(f"--judge_range={judge_range}: expected lowest:highest, e.g. 0:1") from None
        return Judge(judge, rubric, retries=judge_retries, timeout=judge_timeout, score_range=bounds, model=judge_model, device=device)
    weights = [found.get(t) or found[""] for t in tracks]
    made = {name: make(name) for name in dict.fromkeys(name for named in weights for name in named)}
    return [{name: (made[name], weight) for name, weight in named.items()} for named in weights]


# -----------------------------------------------------------------------------
# What a reward file is sent


def payload(sample, role="assistant"):
    """The JSON object of one sample. The reference stands in two places, since AWS's own samples read either.

    The last message is always the model's, empty if it said nothing or ran out of tokens inside a tool's turn. Other keys of the row are in
    `metadata` (Bedrock), at the top (SageMaker: "same as your training dataset sample"), and in extra_info where the row has none (verl).
    """
    problem, hidden = sample.problem, sample.problem.hidden
    reference = hidden["reference"] if "reference" in hidden else problem.answer
    metadata = hidden.get("metadata") or {}
    prompt = [dict(role="user", content=problem.prompt)] if isinstance(problem.prompt, str) else problem.prompt
    said = [dict(m, role=role) if m["role"] == "assistant" else m for m in sample.messages]
    if not said or said[-1]["role"] != role:
        said.append(dict(role=role, content=""))
    # a reference that is {"ground_truth": ...} must not hide behind another ground_truth
    truth = reference["ground_truth"] if isinstance(reference, dict) and "ground_truth" in reference else reference
    return metadata | dict(
        id=sample.id, messages=[*prompt, *said], reference_answer=reference, data_source=hidden.get("data_source") or problem.task,
        metadata=dict(reference_answer=reference, ground_truth=truth) | metadata,
        extra_info=metadata["extra_info"] if isinstance(metadata.get("extra_info"), dict) else metadata)


def event_of(payloads, event):
    """The first argument of f(event, context): the list itself, a dict that holds it, or API Gateway's proxy event with JSON text."""
    if event == "body":
        return dict(httpMethod="POST", headers={"Content-Type": "application/json"}, body=json.dumps(payloads), isBase64Encoded=False)
    return payloads if event == "list" else {event: payloads}


def verl_arguments(sent):
    """The four arguments of verl's function, by name. solution_str: the text of the last turn."""
    return dict(data_source=sent["data_source"], solution_str=sent["messages"][-1]["content"] or "",
                ground_truth=sent["metadata"]["ground_truth"], extra_info=sent["extra_info"])


# -----------------------------------------------------------------------------
# What comes back. Each sample gets (value, metrics), or a text that says why it has none.


def read_results(result, ids, how):
    """result: what the function returned, as parsed JSON; how: its calling convention. -> per id (float, metrics) or str."""
    if how in ("item", "batch"):
        results = [result] if how == "item" else result
        if not isinstance(results, list) or len(results) != len(ids):
            return [f"expected a list of {len(ids)} scores, found {_short(result)}"] * len(ids)
        return [read_score(r if isinstance(r, dict) else {"score": r}, "score") for r in results]
    try:
        results = unwrap(result)
    except ValueError as why:
        return [str(why)] * len(ids)
    named = [r["id"] for r in results if isinstance(r, dict) and r.get("id") is not None]
    if not named:
        if len(results) != len(ids):
            return [f"{len(results)} results for {len(ids)} samples, none with an id"] * len(ids)
        return [read_score(r, "aggregate_reward_score") for r in results]
    known = set(ids)
    unknown = [i for i in named if not isinstance(i, str) or i not in known]
    if unknown and len(named) - len(unknown) >= len(ids):       # nobody's result is missing, so nobody knows whose this one is
        return [f"a result has the id {_short(unknown[0])}, which was not sent"] * len(ids)
    found = []
    for i in ids:
        mine = [r for r in results if isinstance(r, dict) and r.get("id") == i]
        stray = f", and one with {_short(unknown[0])}, which was not sent" if unknown else f" among {len(results)} for {len(ids)} samples"
        found.append(read_score(mine[0], "aggregate_reward_score") if len(mine) == 1 else f"{len(mine) or 'no'} results with its id{stray}")
    return found


def unwrap(result):
    """The list of results in what a handler returned: the list itself, one result alone, or an HTTP answer {statusCode, body}. ValueError:
    anything else, an error that was returned rather than raised included."""
    if isinstance(result, dict) and "statusCode" in result:
        if result["statusCode"] not in (200, "200"):
            raise ValueError(f"statusCode {_short(result['statusCode'])}: {_short(result.get('body'))}")
        result = result.get("body")
        try:
            result = json.loads(result) if isinstance(result, str) else result
        except (ValueError, RecursionError):
            raise ValueError(f"expected a body of JSON, found {_short(result)}") from None
    if isinstance(result, dict):
        if "error" in result or "errorMessage" in result:
            raise ValueError(f"it returned an error: {_short(result)}")
        if "aggregate_reward_score" in result:
            return [result]
    if not isinstance(result, list):
        raise ValueError(f"expected a list of results, found {_short(result)}")
    return result


def read_score(result, key):
    """One result -> (value, metrics) or a text. A score is a finite number or a bool; a number spelled as text is none."""
    if not isinstance(result, dict) or key not in result:
        return f"expected an object with {key}, found {_short(result)}"
    value = _number(result[key])
    if value is None:
        return f"expected a finite number as {key}, found {_short(result[key])}"
    if "errorMessage" in result or (isinstance(result.get("error"), str) and result["error"]):
        return f"it returned an error: {_short(result)}"
    # metrics are for the log only: what is no number is left out rather than held against the sample
    listed = result.get("metrics_list")
    metrics = {m["name"]: m.get("value") for m in (listed if isinstance(listed, list) else [])
               if isinstance(m, dict) and isinstance(m.get("name"), str)}
    for more in (result.get("reward_components"), result.get("metrics"), result if key == "score" else None):
        metrics |= more if isinstance(more, dict) else {}
    return value, {n: _number(v) for n, v in metrics.items() if n != key and _number(v) is not None}


def _number(value):
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:       # an integer beyond a double
        return None


def _short(value):
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


# -----------------------------------------------------------------------------


class RewardFile:
    """--rewards=file: calls `function` of the Python file `path` in a child process.

    timeout: seconds for one call of the function, after which the process is killed; the next call starts another. call_size: samples per
    call of a function that takes many, so that a hang or an exception costs this many and not the step; verl's per-item function gets one.
    role: of the model's own turns, "assistant" or "nova_assistant". event: what f(event, context) gets: "list", or "batch", "input",
    "trajectories" (a dict with that key), or "body" (API Gateway).

    ValueError: a Lambda ARN, a URL, a file or function that is not there, a file that does not load, another signature.
    """

    def __init__(self, path, function="lambda_handler", *, timeout=30.0, role="assistant", event="list", call_size=8):
        flag = f"--reward_file={path}"
        if str(path).startswith("arn:"):
            raise ValueError(f"{flag}: a Lambda function is not called from here: give the Python file that was deployed to it")
        if re.match(r"https?://", str(path)):
            raise ValueError(f"{flag}: rollout servers (POST /rollout) and other URLs are not called: give a Python file")
        if not Path(path).is_file():
            raise ValueError(f"{flag}: expected a Python file, found none there")
        if event not in EVENTS or role not in ("assistant", "nova_assistant"):
            raise ValueError(f"expected --reward_event one of {', '.join(EVENTS)} and --reward_role assistant or nova_assistant, "
                             f"found {event} and {role}")
        if not 0 < timeout <= 900 or call_size < 1:
            raise ValueError(f"expected --reward_timeout above 0 and up to 900 s, call_size of at least 1, found {timeout}, {call_size}")
        self.path, self.function, self.timeout, self.role, self.event = Path(path), function, timeout, role, event
        self.name, self._process = f"{self.path.name}:{function}", None
        started = self._start()
        if "error" in started:
            raise ValueError(f"{flag}: {started['error']}")
        self.how, self._verl_names = started["convention"], started["names"]
        if event != "list" and self.how != "event":
            self.close()
            raise ValueError(f"{flag}: --reward_event={event} is for f(event, context), found another signature for {function}")
        self.call_size = 1 if self.how == "item" else call_size

    def __call__(self, samples):
        ids = [s.id for s in samples]
        assert len(set(ids)) == len(ids) and all(isinstance(i, str) and i for i in ids), "every sample has an id of its own"
        scores, hangs = [], 0
        for start in range(0, len(samples), self.call_size):
            part = samples[start:start + self.call_size]
            if hangs == MAX_HANGS:
                found = [f"not called any more: {hangs} calls of this step hung for {self.timeout:g} s"] * len(part)
            else:
                reply = self._exchange(self._request([payload(s, self.role) for s in part]))
                hangs += reply.get("hang", False)
                found = [reply["error"]] * len(part) if "error" in reply else read_results(reply["result"], [s.id for s in part], self.how)
            for sample, f in zip(part, found, strict=True):
                scores.append(error(sample, f"{self.name}: {f}") if isinstance(f, str) else
                              Score(f[0], Outcome.RIGHT if f[0] >= 1 else Outcome.WRONG, metrics=f[1]))
        return scores

    def close(self):
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            process.stdout.close()
            with contextlib.suppress(OSError):      # a request that nobody read
                process.stdin.close()

    def _request(self, payloads):
        args, kwargs = [], {}
        if self.how in ("item", "batch"):
            arguments = [verl_arguments(p) for p in payloads]
            columns = arguments[0] if self.how == "item" else {f"{name}s": [a[name] for a in arguments] for name in arguments[0]}
            kwargs = {name: columns[name] for name in self._verl_names}
        else:
            args = [event_of(payloads, self.event) if self.how == "event" else payloads]
        return dict(args=args, kwargs=kwargs)

    def _start(self):
        # -P: the child's own folder, data/, is not a place to import from. A session of its own: what it starts is killed with it.
        self._process = subprocess.Popen([sys.executable, "-P", str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         start_new_session=True)
        job = dict(path=str(self.path), function=self.function, timeout=self.timeout, root=str(CHILD.parent.parent))
        reply = self._ask(job, max(START_SECONDS, self.timeout))
        if "error" in reply:
            self.close()
        return reply

    def _exchange(self, request):
        if self._process is None:
            started = self._start()
            if "error" in started:
                return started
        return self._ask(request, self.timeout)

    def _ask(self, message, timeout):
        """One line out, one line in. {"error"}: the function raised; the process ended or hung, and is gone."""
        process, begin = self._process, time.monotonic()
        timer = threading.Timer(timeout + GRACE, _kill, [process])
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = b""
        finally:
            timer.cancel()
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            hang = time.monotonic() - begin >= timeout
            self.close()
            return dict(hang=hang, error=f"no answer within {timeout:g} s; where it hung is on stderr" if hang else
                        f"its process ended with status {process.returncode}")


def _kill(process):
    try:
        os.killpg(process.pid, 9)              # SIGKILL
    except ProcessLookupError:
        pass
    process.wait()


# -----------------------------------------------------------------------------


def check_reward(reward, problems, grade=None):
    """--reward_check=8: what a reward says to the references, to empty answers and to the references of other problems -> lines to print.

    Answered is the problem's worked answer (`gold`) where it has one, else its reference if that is text, else the reference's JSON.
    grade(problem, messages) -> Outcome: for rewards that use the grader's; without it a sample arrives as ungradable. Nothing is stopped
    here: a reward may be right to refuse all of them (a form that references do not have), and the lines say so.
    """
    answers = [(p.gold[-1].get("content") or "") if isinstance(p.gold, list) and p.gold else _as_text(p.hidden.get("reference", p.answer))
               for p in problems]
    shuffled = [next((b for b in (answers[i + 1:] + answers[:i]) if b not in (a, None)), None) for i, a in enumerate(answers)]
    lines = [f"{f'reward check, {len(problems)} problems':<24}    mean     min     max  errors"]
    means, notes = {}, []
    for name, texts in (("references", answers), ("empty answers", [""] * len(answers)), ("references of others", shuffled)):
        samples = []
        for i, (problem, text) in enumerate(zip(problems, texts)):
            if text is not None:
                messages = [dict(role="assistant", content=text)]
                samples.append(Sample(f"check/{i}", problem, messages, grade(problem, messages) if grade else Outcome.UNGRADABLE))
        scores = reward(samples) if samples else []
        values = [s.value for s in scores if s.value is not None]
        notes += [s.note for s in scores if s.value is None]
        means[name] = sum(values) / len(values) if values else None
        numbers = "".join(f"{x:8.3f}" for x in (means[name], min(values), max(values))) if values else "       -" * 3
        lines.append(f"{name:<24}{numbers}{len(scores) - len(values):8}")
    best = means.pop("references")
    for name, mean in means.items():
        if best is not None and mean is not None and mean >= best:
            lines.append(f"warning: {name} score no less than references do: this reward cannot teach the difference")
    return lines + [f"first error: {note}" for note in notes[:1]]


def _as_text(reference):
    return reference if reference is None or isinstance(reference, str) else json.dumps(reference, ensure_ascii=False)
