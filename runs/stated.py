"""Demonstrations of how a confidence is stated: python runs/stated.py out/x/graded out/x/stated.jsonl

Takes answers that a model sampled itself (train_calibration.py leaves them in out/<name>/graded), or the worked answers of toy tasks (math_en,chat_en), and
ends each with <confidence>0.3</confidence>, a number drawn at random from 0, .1, ..., 1: SFT on them teaches the form, and nothing about what is right.
train_rl.py --rewards=rlcr then teaches the number.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import random_key, read_jsonl, write_atomically
from data import tasks


def sampled(folder):
    """Those that ended by themselves, and whose calls could be read: else there is no end to state anything at, or nothing to imitate."""
    for line in (line for file in sorted((folder / "chat").glob("*.jsonl")) for line in read_jsonl(file)):
        read = not any("tool_call>" in m["content"] for m in line["messages"] if m["role"] == "assistant")
        if line["finish_reason"] == "stop" and read and line["messages"] and line["messages"][-1]["role"] == "assistant":
            yield line["task"], line["prompt"], line["messages"]


def worked(names, num, seed):
    for name in names.split(","):
        yield from ((p.task, p.prompt, p.gold) for p in tasks.problems(f"{name}@train", num, seed))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("answers", help="a folder of graded answers, or toy tasks")
    parser.add_argument("path", type=Path)
    parser.add_argument("--set", default="in domain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=1000, help="worked answers of each toy task")
    args = parser.parse_args()
    lines = []
    given = sampled(Path(args.answers) / args.set) if Path(args.answers).is_dir() else worked(args.answers, args.num, args.seed)
    for i, (task, prompt, messages) in enumerate(given):
        q = np.random.default_rng(random_key(args.seed, "stated", i)).integers(0, 11) / 10
        last = messages[-1] | dict(content=f"{messages[-1]['content']}\n<confidence>{q:.1f}</confidence>")
        lines.append(json.dumps(dict(messages=prompt + messages[:-1] + [last], bucket=tasks.bucket(task)), ensure_ascii=False))
    if not lines:
        sys.exit(f"{args.answers}: no answer that ended by itself")
    write_atomically(args.path, "\n".join(lines) + "\n")
    print(json.dumps(dict(path=str(args.path), answers=len(lines))))


if __name__ == "__main__":
    main()
