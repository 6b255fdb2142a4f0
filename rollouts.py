"""Play problems: prompts in, tools executed, turns parsed, the outcome graded. One way for evaluation, rejection sampling and RL.

What a model said is kept twice: as tokens (engine.Rollout: what the sampler saw, never re-encoded) and as messages (what graders and
people read). Both come from the same turn, at the moment it ends.
"""
import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from common import all_gather_list, all_reduce_sum, random_key, write_atomically
from data import rewards as reward_functions
from data import tasks
from data.grading import Outcome, without_confidence
from engine import Rollout, generate
from tokenizer import ToolCallError, parse_tool_calls

CHUNK = 64                      # problems to a file of samples
GRADERS = 8                     # threads: code graders wait for their boxes


class Played(NamedTuple):
    rollout: Rollout
    messages: list              # what followed the prompt; the last is the assistant's last turn as it ended, finished or not
    outcome: Outcome


def play(model, tokenizer, problems, *, num_samples=1, max_new_tokens=None, temperature=0.0, top_p=1.0, seed=0, tool_timeout=60.0, max_slots=64, desc=""):
    """-> per problem, a list of num_samples Played. The problems of a call are of one kind: all conversations, or all texts.

    Calls are parsed strictly and executed, those of different samples at the same time; a turn that cannot be parsed gets the parser's
    message as its result. A response that ran out of tokens ends in its unfinished turn, which graders read as it stands.
    max_new_tokens: default the largest of the tasks' own. seed, tool_timeout: see engine.generate.
    """
    if not problems:
        return []
    chat = isinstance(problems[0].prompt, list)
    prompts = [tokenizer.render_prompt(p.prompt, p.tools) if chat else tokenizer.encode(p.prompt) for p in problems]
    episodes = [[tasks.episode_of(p) for _ in range(num_samples)] for p in problems]
    turns = [[[] for _ in range(num_samples)] for _ in problems]   # of each sample, (sampled tokens, messages): a turn and what answered it

    def after_turn(i, sample, ids):
        """Token ids that follow a turn of the assistant: results of its calls, or the user's next message; None: it was the last."""
        episode = episodes[i][sample]
        text = tokenizer.decode(ids[:-1])
        if not episode.has_tools:
            return None
        try:
            content, calls = parse_tool_calls(text, problems[i].tools)
        except ToolCallError as error:
            said, results = dict(role="assistant", content=text), [episode.refuse(str(error))]
        else:
            if not calls:
                answer = episode.user_turn(content)
                if answer is None:
                    return None
                turns[i][sample].append((len(ids), [dict(role="assistant", content=content), dict(role="user", content=answer)]))
                return tokenizer.render_user_turn(answer)
            try:
                results = episode.step(calls)
            except Exception:                       # our fault, and the model's turn all the same: it gets an answer, the log the reason
                logging.getLogger(__name__).exception("tools of %s failed", problems[i].task)
                results = ['{"error": "the tool failed"}'] * len(calls)
            said = dict(role="assistant", content=content, tool_calls=calls)
        turns[i][sample].append((len(ids), [said, *(dict(role="tool", content=result) for result in results)]))
        return None if episode.over else tokenizer.render_tool_results(results)

    rollouts = generate(model, tokenizer, prompts, num_samples=num_samples, temperature=temperature, top_p=top_p, seed=seed,
                        max_new_tokens=max_new_tokens or max(tasks.max_new_tokens(p.task) for p in problems),
                        tools=after_turn if chat else None, tool_timeout=tool_timeout, max_slots=max_slots, desc=desc)

    def finish(rollout, episode, turns):
        turns = list(turns)                                         # a call that was given up may still come back
        messages = [message for _, said in turns for message in said]
        last = [i for i, sampled in zip(rollout.ids, rollout.mask) if sampled][sum(size for size, _ in turns):]      # what no tool answered
        if last:
            messages.append(dict(role="assistant", content=tokenizer.decode(last[:-1] if rollout.finish_reason != "length" else last)))
        # a confidence stated at the end is no part of the answer, in any task: graders do not see it, the log and the rewards do
        graded = without_confidence(messages)[0]
        return Played(rollout, messages, Outcome.WRONG if rollout.finish_reason == "tool_timeout" else episode.grade(graded))

    with ThreadPoolExecutor(GRADERS) as pool:
        played = pool.map(finish, *(sum(groups, []) for groups in (rollouts, episodes, turns)))
        return [[next(played) for _ in group] for group in rollouts]


def in_words(messages):
    """One line of a rollout, for people: turns, calls and results as they came."""
    return " ".join(f"-> {m['content']}" if m["role"] == "tool" else
                    " ".join([m["content"], *(f"{c['name']}({', '.join(map(str, c['arguments'].values()))})" for c in m.get("tool_calls", []))])
                    for m in messages).strip()


# -----------------------------------------------------------------------------
# With rewards, for training on them


class Answer(NamedTuple):
    """One sample. ids and mask hold prompt and rollout; logps are the sampler's, of the mask = 1 tokens."""
    track: int
    problem: object
    ids: list
    mask: list
    logps: list
    messages: list
    finish_reason: str
    outcome: Outcome
    reward: float | None    # None: a grader failed, and there is none
    parts: dict             # "<reward>/value" and whatever else the rewards report: name -> number
    note: str               # why the reward is what it is, where that says something

    @property
    def truncated(self):
        return self.finish_reason == "length"

    @property
    def length(self):
        """Sampled tokens: tool results are in no length."""
        return len(self.logps)


def play_for_rewards(model, tokenizer, asked, rewards, seeds, *, num_samples, desc="", **sampling):
    """asked: [(track, Problem)], seeds: one of each. rewards: data.rewards.open_rewards. -> a list of num_samples Answers for each.

    Conversations and plain texts are played apart. sampling: see play.
    """
    groups = [None] * len(asked)
    for chat in (True, False):
        which = [i for i, (_, p) in enumerate(asked) if isinstance(p.prompt, list) == chat]
        problems = [asked[i][1] for i in which]
        played = play(model, tokenizer, problems, num_samples=num_samples, seed=[seeds[i] for i in which], desc=desc, **sampling)
        for i, p, group in zip(which, problems, played):
            prompt = tokenizer.render_prompt(p.prompt, p.tools) if chat else tokenizer.encode(p.prompt)
            groups[i] = [Answer(asked[i][0], p, prompt + r.ids, [0] * len(prompt) + r.mask, [x for x, m in zip(r.logps, r.mask) if m], messages,
                                r.finish_reason, outcome, None, {}, "") for r, messages, outcome in group]
    flat = [answer for group in groups for answer in group]
    for track, named in enumerate(rewards):
        mine = [i for i, a in enumerate(flat) if a.track == track]
        samples = [reward_functions.Sample(f"{i // num_samples}/{i % num_samples}", flat[i].problem, flat[i].messages, flat[i].outcome) for i in mine]
        scores = {name: reward(samples) if samples else [] for name, (reward, _) in named.items()}
        for j, i in enumerate(mine):
            total = reward_functions.weighted({name: s[j] for name, s in scores.items()}, {name: weight for name, (_, weight) in named.items()})
            flat[i] = flat[i]._replace(reward=total.value, outcome=total.outcome, parts=total.metrics, note=total.note)
    return [flat[i:i + num_samples] for i in range(0, len(flat), num_samples)]


def check_grader_errors(answers, limit, step):
    """-> how many samples of all ranks have no reward. More than the share `limit` of them stop all ranks; the first is named."""
    failed = all_gather_list(a.note or a.problem.task for a in answers if a.reward is None)
    total = all_reduce_sum(len(answers))
    if len(failed) > limit * total:
        raise RuntimeError(f"step {step}: {len(failed)} of {total} samples have no reward (--max_grader_error={limit}); the first: {failed[0]}. The last "
                           "checkpoint is untouched: repair the reward and --resume=latest")
    return len(failed)


def rollout_metrics(answers, tracks):
    """Means over the samples of all ranks, as rollout/<name>; of a run with several tracks also rollout/<name>_<track>."""
    rows = all_gather_list((a.track, a.reward, str(a.outcome), a.length, a.mask.index(1), a.truncated, sum(m["role"] == "assistant" for m in a.messages),
                            sum(len(m.get("tool_calls", [])) for m in a.messages), a.parts) for a in answers)
    mean = lambda values: sum(values) / len(values) if values else 0.0

    def of(rows):
        scores = [r[1] for r in rows if r[1] is not None]
        return dict(score=mean(scores), right=mean([r[2] == "right" for r in rows]), ungradable=mean([r[2] == "ungradable" for r in rows]),
                    response_length=mean([r[3] for r in rows]), truncated=mean([r[5] for r in rows])), scores
    out, scores = of(rows)
    out |= dict(score_std=mean([(x - out["score"]) ** 2 for x in scores]) ** 0.5, score_min=min(scores, default=0.0), score_max=max(scores, default=0.0),
                prompt_length=mean([r[4] for r in rows]), turns=mean([r[6] for r in rows]), tool_calls=mean([r[7] for r in rows]))
    for k, name in enumerate(tracks if len(tracks) > 1 else []):
        out |= {f"{key}_{name}": value for key, value in of([r for r in rows if r[0] == k])[0].items()}
    parts = {name: mean([r[8][name] for r in rows if name in r[8]]) for name in sorted({name for r in rows for name in r[8]})}
    return {f"rollout/{key}": value for key, value in out.items()} | {f"rewards/{name}": value for name, value in parts.items()}


def as_line(answer, tracks, step):
    """One line of rollouts.jsonl, which chat.py --rollouts shows."""
    a = answer
    return dict(step=step, track=tracks[a.track], task=a.problem.task, prompt=a.problem.prompt, messages=a.messages, reward=a.reward, rewards=a.parts,
                outcome=str(a.outcome), finish_reason=a.finish_reason, length=a.length, note=a.note)


# -----------------------------------------------------------------------------
# Many of them


def sample_to_files(model, tokenizer, problems, folder, rank, world_size, *, num_samples, temperature, seed, max_new_tokens=None, tool_timeout=60.0):
    """Plays every problem num_samples times and writes one JSON line per answer, 64 problems to a file; -> all files, in order.

    Ranks take turns at files, and a file that is there is not made again, so that a run can be resumed. An answer depends on
    (seed, problem, sample), not on the rank that draws it.
    """
    files = [(start, folder / f"sampled_{start:06d}.jsonl") for start in range(0, len(problems), CHUNK)]
    for start, path in files[rank::world_size]:
        if path.exists():
            continue
        chunk, lines = problems[start:start + CHUNK], []
        groups = play(model, tokenizer, chunk, num_samples=num_samples, temperature=temperature, max_new_tokens=max_new_tokens, tool_timeout=tool_timeout,
                      seed=[random_key(seed, start + i) for i in range(len(chunk))], desc=f"sample {start + len(chunk)}/{len(problems)}")
        for i, group in enumerate(groups, start):
            for sample, (r, messages, outcome) in enumerate(group):
                p = problems[i]
                prompt_ids = tokenizer.render_prompt(p.prompt, p.tools) if isinstance(p.prompt, list) else tokenizer.encode(p.prompt)
                lines.append(json.dumps(dict(problem=i, sample=sample, task=p.task, prompt=p.prompt, messages=messages, outcome=outcome,
                                             finish_reason=r.finish_reason, prompt_ids=prompt_ids, ids=r.ids, mask=r.mask)))
        write_atomically(path, "\n".join(lines) + "\n")
    return [path for _, path in files]


def without_overlap(problems, held_out, n=13):
    """-> the problems that share with no held-out one the whole prompt or n words in a row (case and spacing aside).

    Where three or more problems share the first or last n - 3 of those words, they are form ("End with the answer on a line of its own"), not
    content, and do not count.
    """
    def pieces(problem):
        text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
        words = tuple(text.lower().split())
        return words, {words[i:i + n] for i in range(len(words) - n + 1)} - {words}
    often = Counter(part for problem in problems for part in {q for piece in pieces(problem)[1] | {pieces(problem)[0]} for q in (piece[:n - 3], piece[3 - n:])})
    held = set()
    for problem in held_out:
        words, parts = pieces(problem)
        held |= {words, *parts}

    def clashes(problem):
        words, parts = pieces(problem)
        return words in held or any(piece in held and often[piece[:n - 3]] < 3 > often[piece[3 - n:]] for piece in parts)
    return [problem for problem in problems if not clashes(problem)]
