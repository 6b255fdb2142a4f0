"""Demonstrations of how a confidence is stated: python runs/stated.py out/x/graded out/x/stated.jsonl

Takes answers that a model sampled itself (train_calibration.py leaves them in out/<name>/graded) and ends each with <confidence>0.3</confidence>, a number
drawn at random from 0, .1, ..., 1: SFT on them teaches the form, and nothing about what is right. train_rl.py --rewards=rlcr then teaches the number.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from common import random_key, read_jsonl, write_atomically
from data import tasks


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("graded", type=Path)
    parser.add_argument("path", type=Path)
    parser.add_argument("--set", default="in domain")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lines = []
    for i, line in enumerate(line for file in sorted((args.graded / args.set / "chat").glob("*.jsonl")) for line in read_jsonl(file)):
        messages = line["messages"]
        if line["finish_reason"] != "stop" or not messages or messages[-1]["role"] != "assistant":
            continue                                                # cut, or ended by a tool: there is no end to state anything at
        q = np.random.default_rng(random_key(args.seed, "stated", i)).integers(0, 11) / 10
        last = messages[-1] | dict(content=f"{messages[-1]['content']}\n<confidence>{q:.1f}</confidence>")
        lines.append(json.dumps(dict(messages=line["prompt"] + messages[:-1] + [last], bucket=tasks.bucket(line["task"])), ensure_ascii=False))
    if not lines:
        sys.exit(f"{args.graded}/{args.set}/chat: no answer that ended by itself")
    write_atomically(args.path, "\n".join(lines) + "\n")
    print(json.dumps(dict(path=str(args.path), answers=len(lines))))


if __name__ == "__main__":
    main()
