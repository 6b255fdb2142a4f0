"""Page through the rollouts that a run wrote, in the terminal: chat.py --rollouts.

A file of its own because it needs no model: chat.py samples answers, this reads those that are on the disk.
"""
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

KEYS = "Enter next, p previous, a number or /STEP goes there, best and worst sort by reward, only WORD keeps an outcome or track, all, q"
PLACE = ("step", "track", "task", "problem", "sample")


class Entry(NamedTuple):
    """A line of a rollouts.jsonl: where it starts, in bytes, and what it is found by. The lines stay on the disk."""
    path: Path
    offset: int
    step: object                     # that of the line, else "K" of a folder round_K
    reward: float | None             # that of the line; where there is none, 1 for right and 0 for other outcomes
    outcome: str | None
    track: str | None


def index(path):
    """-> ([Entry], notes on lines left out). A last line without its line end is still being written, or was cut: no note."""
    entries, notes, offset = [], [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                r = json.loads(line)
                reward = r.get("reward", {"right": 1, "wrong": 0, "ungradable": 0}.get(r.get("outcome")))
                reward = reward if isinstance(reward, (int, float)) and math.isfinite(reward) else None
                step = r.get("step", path.parent.name.partition("round_")[2])
                entries.append(Entry(path, offset, step, reward, r.get("outcome"), r.get("track")))
            except (ValueError, AttributeError, TypeError):      # no JSON; JSON, but no object; an outcome that is no string
                if line.endswith(b"\n"):
                    notes.append(f"{path}:{number}: no rollout, left out: {line[:60]!r}")
            offset += len(line)
    return entries, notes


def arrange(entries, sort, only):
    """The entries of an outcome or track (all if empty), by reward (as they came if empty); those without a reward last."""
    chosen, sign = [e for e in entries if only in ("", e.outcome, e.track)], {"best": -1, "worst": 1, "": 0}[sort]
    return sorted(chosen, key=lambda e: (sign != 0 and e.reward is None, sign * (e.reward or 0)))


def in_lines(record):
    """A rollout as text: place, prompt, what followed, judgement. Any field may be missing; lists of numbers are left out."""
    word = lambda v: v if isinstance(v, str) else f"{v:.4g}" if isinstance(v, float) else json.dumps(v, ensure_ascii=False)
    row = lambda keys: " | ".join(f"{k} {word(record[k])}" for k in keys)
    prompt, rule = record.get("prompt", []), "-" * 10
    lines = [row(k for k in PLACE if k in record)]
    asked = [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else prompt
    for m in [*asked, rule, *record.get("messages", []), rule]:
        if m == rule:
            lines.append(rule)
            continue
        calls = [c.get("function", c) for c in m.get("tool_calls") or ()]
        parts = [word(m.get("content"))] * bool(m.get("content")) + [f"-> {c.get('name')} {word(c.get('arguments'))}" for c in calls]
        lines.append(f"{m.get('role', '?'):<10} " + "\n".join(parts).replace("\n", "\n" + " " * 11))
    shown = (*PLACE, "prompt", "messages")
    lines.append(row(k for k, v in record.items() if k not in shown and not isinstance(v, list)))
    # what a model wrote may hold escape sequences, which would move the cursor or clear the screen: they are spelled out
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in "\n".join(lines))


def page(where, first=3):
    """Shows the rollouts of a file, or of all rollouts.jsonl below a folder: in a terminal by KEYS, elsewhere the first few."""
    by_number = lambda path: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", str(path))]       # round_2 before round_10
    files = [where] if where.is_file() else sorted(where.rglob("rollouts.jsonl"), key=by_number)
    entries, notes = (sum(parts, []) for parts in zip(([], []), *map(index, files)))
    for note in notes[:5] + [f"and {len(notes) - 5} more such lines"] * (len(notes) > 5):
        print(note)
    if not entries:
        raise ValueError(f"--rollouts={where}: no rollouts there; expected a rollouts.jsonl, or a folder with some in it, e.g. out/<name>")
    view, at, sort, only, interactive = entries, 0, "", "", sys.stdin.isatty() and sys.stdout.isatty()

    def show(at):
        with open(view[at].path, "rb") as file:
            file.seek(view[at].offset)
            record = json.loads(file.readline())
        print(f"\n[{' '.join(filter(None, [f'{at + 1}/{len(view)}', only, sort]))}] {view[at].path} | {in_lines(record)}", flush=True)

    for i in range(1 if interactive else min(first, len(view))):
        show(i)
    if interactive:
        print(f"({KEYS})")
    while interactive:
        try:
            key, _, argument = input("> ").strip().partition(" ")
        except (EOFError, KeyboardInterrupt):
            break
        if key == "q":
            break
        if key in ("best", "worst", "only", "all"):
            wanted = {"only": (sort, argument), "all": ("", "")}.get(key, (key, only))
            found, to = arrange(entries, *wanted), -1
            if found:
                (sort, only), view, to = wanted, found, 0
        elif key.startswith("/"):
            to = next((i for i, e in enumerate(view) if str(e.step) == key[1:]), -1)
        else:
            to = at - 1 if key == "p" else at + 1 if key in ("", "n") else int(key) - 1 if key.isdecimal() else -1
        if 0 <= to < len(view):
            at = to
            show(at)
        else:
            words = sorted({w for e in entries for w in (e.outcome, e.track) if w})
            print(f"nothing there: {len(view)} rollouts, steps {entries[0].step} to {entries[-1].step}, words {' '.join(words)} ({KEYS})")
    print(json.dumps(dict(rollouts=str(where), files=len(files), num_rollouts=len(entries), num_left_out=len(notes))))
