"""Play problems: prompts in, tools executed, turns parsed, the outcome graded. One way for evaluation, rejection sampling and RL.

What a model said is kept twice: as tokens (engine.Rollout: what the sampler saw, never re-encoded) and as messages (what graders and
people read). Both come from the same turn, at the moment it ends.
"""
import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from common import random_key, write_atomically
from data import tasks
from data.grading import Outcome
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
        return Played(rollout, messages, Outcome.WRONG if rollout.finish_reason == "tool_timeout" else episode.grade(messages))

    with ThreadPoolExecutor(GRADERS) as pool:
        played = pool.map(finish, *(sum(groups, []) for groups in (rollouts, episodes, turns)))
        return [[next(played) for _ in group] for group in rollouts]


def in_words(messages):
    """One line of a rollout, for people: turns, calls and results as they came."""
    return " ".join(f"-> {m['content']}" if m["role"] == "tool" else
                    " ".join([m["content"], *(f"{c['name']}({', '.join(map(str, c['arguments'].values()))})" for c in m.get("tool_calls", []))])
                    for m in messages).strip()


# -----------------------------------------------------------------------------
# Many of them


def sample_to_files(model, tokenizer, problems, folder, rank, world_size, *, num_samples, temperature, seed, tool_timeout=60.0):
    """Plays every problem num_samples times and writes one JSON line per answer, 64 problems to a file; -> all files, in order.

    Ranks take turns at files, and a file that is there is not made again, so that a run can be resumed. An answer depends on
    (seed, problem, sample), not on the rank that draws it.
    """
    files = [(start, folder / f"sampled_{start:06d}.jsonl") for start in range(0, len(problems), CHUNK)]
    for start, path in files[rank::world_size]:
        if path.exists():
            continue
        chunk, lines = problems[start:start + CHUNK], []
        groups = play(model, tokenizer, chunk, num_samples=num_samples, temperature=temperature, tool_timeout=tool_timeout,
                      seed=[random_key(seed, start + i) for i in range(len(chunk))], desc=f"sample {start + len(chunk)}/{len(problems)}")
        for i, group in enumerate(groups, start):
            for sample, (r, messages, outcome) in enumerate(group):
                lines.append(json.dumps(dict(problem=i, sample=sample, task=problems[i].task, prompt=problems[i].prompt, messages=messages,
                                             outcome=outcome, finish_reason=r.finish_reason, ids=r.ids, mask=r.mask)))
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
