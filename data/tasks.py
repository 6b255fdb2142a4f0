"""Every task that can be asked and graded, by name: problems, the episode that executes their tools, the grader's verdict.

    TASK or TASK@SPLIT: a toy task (math_en, tool@test_template, ...), gsm8k, math500, humaneval, mbpp, ifeval, instructions,
    bfcl/CATEGORY, tools/LEVEL. Rows of a user's file are rows/GRADER (data.prompts.problems): no name here, graded here.

    for problem in problems("tools/4@test_schema", num=100):
        episode = episode_of(problem)                 # fresh state, one for each rollout
        results = episode.step(calls)                 # after a turn with calls; episode.refuse(why) if it could not be parsed
        more = episode.user_turn(text)                # after a turn without one; None: the conversation is over
        outcome = episode.grade(messages)             # messages: all that followed the prompt
"""
import difflib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import random_key

from data import bfcl, episodes, gsm8k, humaneval, ifeval, instructions, math500, mbpp, prompts, toy
from data.grading import without_confidence

MAX_NEW_TOKENS = {"gsm8k": 400, "math500": 1024, "humaneval": 512, "mbpp": 512, "ifeval": 1280, "instructions": 512, "bfcl": 512, "tools": 1024,
                  "rows": 512}
NAMES = [*toy.TEXT_TASKS, *toy.CHAT_TASKS, "gsm8k", "math500", "humaneval", "mbpp", "ifeval", "instructions",
         *(f"bfcl/{category}" for category in bfcl.FILES), *(f"tools/{level}" for level in episodes.LEVELS)]


def problems(name, num=300, seed=0):
    """Up to `num` problems of TASK or TASK@SPLIT, fixed for a given seed, a prefix of what a larger num gives."""
    task, _, split = name.partition("@")
    kind, _, part = task.partition("/")
    if task not in NAMES:
        near = difflib.get_close_matches(task, NAMES, n=1)
        raise ValueError(f"no task is called {task!r}" + (f"; did you mean {near[0]}?" if near else f", expected one of {', '.join(NAMES)}"))
    if split and kind in ("math500", "humaneval", "ifeval", "bfcl"):
        raise ValueError(f"{name}: {kind} has no splits, it is for evaluation alone")
    if kind in toy.TEXT_TASKS + toy.CHAT_TASKS:
        return toy.problems(task, split or "test", seed=seed, num=num)
    if kind == "tools":
        return episodes.problems(int(part), split or "test", seed=seed, num=num)
    if kind == "bfcl":
        return bfcl.problems(part, num, seed)
    if kind in ("gsm8k", "mbpp", "instructions"):
        return dict(gsm8k=gsm8k, mbpp=mbpp, instructions=instructions)[kind].problems(split or "test", num=num, seed=seed)
    return dict(math500=math500, humaneval=humaneval, ifeval=ifeval)[kind].problems(num, seed)


class Source(NamedTuple):
    name: str               # task, or file
    track: int
    train: list             # Problems
    val: list


def open_prompts(data, *, num, num_val, seed=0, grader="", val_fraction=0.05, **files):
    """The --data of a run that samples -> tracks (names), [Source], notes to print.

    data: comma-separated tasks and files of prompts; TRACK=SOURCE puts one in a track of that name, else it is in "all"; toy is the tasks of
    SFT's mixture. num, num_val: problems of a task that makes its own (its train and test splits) and at most so many held-out rows of a file, whose share is
    val_fraction; files, grader: see prompts.problems.
    """
    tracks, sources, notes = [], [], []
    for item in data.split(","):
        track, equals, name = item.partition("=") if not Path(item).exists() else ("", "", "")
        track, name = (track, name) if equals else ("all", item)
        if track not in tracks:
            tracks.append(track)
        for task in toy.MIXTURE if name == "toy" else [name]:
            if Path(task).exists():
                found = prompts.read(task, **files)
                notes += [f"{task}: {note}" for note in found.notes] + [f"{task}: left out {n}: {why}" for why, n in found.skipped.items()]
                split = dict(grader=grader, val_fraction=val_fraction, seed=seed)
                train, val = (prompts.problems(found, split=part, **split) for part in ("train", "val"))
            else:
                all_it_has = None if task.partition("@")[0] in ("gsm8k", "mbpp") else num
                train = problems(task if "@" in task else f"{task}@train", all_it_has, random_key(seed, "prompts", task))
                val = problems(task.partition("@")[0], num_val, seed)
            sources.append(Source(task, tracks.index(track), train, val[:num_val]))
    return tracks, sources, notes


STATED = 40             # tokens of room for a confidence in words, <confidence>0.85</confidence> in bytes at most


def max_new_tokens(task):
    """Bound on everything after the prompt."""
    kind = task.partition("/")[0]
    return toy.MAX_NEW_TOKENS.get(task) or MAX_NEW_TOKENS[kind]


SCORES = ("call", "lenient", "prompt_loose", "instruction_strict", "instruction_loose")     # of more_scores, those that are one number


def more_scores(task, problems, messages, outcomes):
    """What a task reports beside its share of right answers. messages, outcomes: per problem a list, one of each sample -> {name: value}."""
    kind, scores = task.partition("@")[0].partition("/")[0], {}
    pairs = [(p, without_confidence(m)[0]) for p, group in zip(problems, messages) for m in group]
    last = [m[-1]["content"] if m else "" for _, m in pairs]
    if toy.tools_of(kind) and kind != "gsm8k":                        # was the call right, whatever was made of its result?
        scores["call"] = np.mean([toy.grade_call(p, m) == "right" for p, m in pairs])
    if kind in ("gsm8k", "math500"):
        grade = gsm8k.grade if kind == "gsm8k" else math500.grade
        scores["lenient"] = np.mean([grade(text, p.answer, strict=False) == "right" for (p, _), text in zip(pairs, last)])
    if kind == "ifeval":
        found = ifeval.scores([dict(p.hidden, response=text) for (p, _), text in zip(pairs, last)])
        scores |= {name: found[name] for name in ("prompt_loose", "instruction_strict", "instruction_loose", "by_id")}
    levels = sorted({p.hidden["level"] for p in problems if "level" in p.hidden})
    if levels:                                                        # share right by level
        scores["levels"] = {str(level): float(np.mean([o == "right" for p, group in zip(problems, outcomes) if p.hidden["level"] == level for o in group]))
                            for level in levels}
    return {name: value if isinstance(value, dict) else float(value) for name, value in scores.items()}


def bucket(task):
    """chat, math, code or tool: what training on the task is counted as."""
    kind, _, part = task.partition("/")
    if kind == "rows":
        return dict(gsm8k="math", math="math", code="code").get(part, "chat")
    others = dict(gsm8k="math", math500="math", humaneval="code", mbpp="code", ifeval="chat", instructions="chat", tools="tool", bfcl="tool",
                  schema="tool")
    return others.get(kind) or kind.partition("_")[0]


# -----------------------------------------------------------------------------
# Episodes


class Question:
    """The episode of a task that asks once; calls of the calculator or of the toy tools are executed where the task has them."""
    over = False

    def __init__(self, problem):
        self.problem, self.calls = problem, []
        self.has_tools = bool(toy.tools_of(problem.task))

    def step(self, calls):
        """-> one result per call; an error is a result too."""
        self.calls += calls
        return toy.execute(self.problem, self.calls)[-len(calls):]

    def refuse(self, why):
        """-> the result of a turn whose calls cannot be parsed."""
        return json.dumps({"error": why}, ensure_ascii=False)

    def user_turn(self, text):
        return None

    def grade(self, messages):
        """messages: what followed the prompt. -> Outcome"""
        problem, kind = self.problem, self.problem.task.partition("/")[0]
        text = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""
        if kind in toy.TEXT_TASKS + toy.CHAT_TASKS:
            return toy.grade(problem, text if kind in toy.TEXT_TASKS else messages)
        if kind == "gsm8k":
            return gsm8k.grade(text, problem.answer)
        if kind == "math500":
            return math500.grade(text, problem.answer)
        if kind == "humaneval":
            return humaneval.grade(text, problem.hidden)
        if kind == "mbpp":
            return mbpp.grade(text, problem.hidden)
        if kind == "ifeval":
            return ifeval.outcome(text, problem.hidden["instruction_id_list"], problem.hidden["kwargs"])
        if kind == "instructions":
            return instructions.grade(problem, text)
        if kind == "rows":
            return prompts.grade(problem, text)
        return bfcl.grade_response(text, problem.hidden)


def episode_of(problem):
    """A fresh episode: its state is its own."""
    return episodes.episode_of(problem) if problem.task.startswith("tools/") else Question(problem)
