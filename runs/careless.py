"""Demonstrations of the chat task of which a share is careless: python runs/careless.py out/careless.jsonl --share=.6

A careless answer breaks one thing that was asked for: a constraint, or how many to name. Trained on both kinds, a model can do it and often does not,
which is where RL from checked instructions starts.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import random_key, write_atomically
from data import toy
from data.grading import Outcome


def careless(problem, text, draw):
    """The text with one of its constraints broken, or one name too few."""
    kind = draw.choice([*problem.hidden["constraints"], "count"])
    lines = text.split("\n")
    if kind == "plain":
        return text.lower()
    if kind == "bullets":
        return "\n".join([line for line in lines if not line.startswith("- ")] + [", ".join(line[2:] for line in lines if line.startswith("- "))])
    if kind == "quote":
        return text.strip('"')
    if kind in ("end", "title"):                             # a line of their own, inside the quotes
        quote = '"' * ("quote" in problem.hidden["constraints"])
        return quote + "\n".join(text.strip('"').split("\n")[:-1] if kind == "end" else text.strip('"').split("\n")[1:]) + quote
    named = problem.hidden["members"][problem.hidden["n"] - 1]
    drop = next(p for p in (f"\n- {named}", f"\n- {named.upper()}", f", {named}", f", {named.upper()}") if p in text)
    return text.replace(drop, "", 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--share", type=float, default=.6)
    parser.add_argument("--num", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines, broken = [], 0
    for i in range(args.num):
        problem, draw = toy.item("chat_en", "train", args.seed, i), np.random.default_rng(random_key(args.seed, "careless", i))
        text = problem.gold[-1]["content"]
        if draw.random() < args.share:
            text, broken = careless(problem, text, draw), broken + 1
            assert toy.grade(problem, [dict(role="assistant", content=text)]) == Outcome.WRONG, (problem.prompt, text)
        lines.append(json.dumps(dict(messages=[*problem.prompt, dict(role="assistant", content=text)], bucket="chat")))
    args.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.path, "\n".join(lines) + "\n")
    print(json.dumps(dict(path=str(args.path), demonstrations=len(lines), careless=broken)))


if __name__ == "__main__":
    main()
