"""Talk to a checkpoint in the terminal, or read what a run sampled.

    python chat.py --init=out/quickstart/sft
    python chat.py --init=out/quickstart/sft --prompt="Tom has 12 pens and buys 3 bags of 4 pens. How many pens?"
    python chat.py --rollouts=out/rl
    python chat.py --init=out/asft --prompt="Toy Story (1995); Fargo (1996)"
    python chat.py --init=out/slates --prompt="painting of a fox; 2; 1; 4 more neon"

A calculator and Python (in the sandbox) are at hand: when the model calls one, the call and its result are shown and the model goes on.
Commands: /new forgets the conversation, /raw TEXT lets the model continue plain text, /quit (or end of input) leaves.
A checkpoint with a calibration.json (train_calibration.py) says how sure it is of each answer, and when it would rather not have given it.

The checkpoint of a recommender (train_asft.py) is told a history, titles or ids with ; between them, the latest last, and shows what it recommends,
before post-training and after.

A slate agent (train_iql.py) is told what a picture should show, and then, turn by turn, which of its columns you like best (and, if you wish, a few
words): it learns a taste as you pick. With --prompt the picks stand after it, with ; between them.

--rollouts pages through the rollouts.jsonl of a run (or all below a folder): prompt, turns, calls, results, reward and outcome.
"""
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import confidence
import recommend
from common import parse_config, random_key, setup_distributed
from data import sandbox
from data.calculator import TOOL, CalculatorError, calculate
from data.expansions import open_generator
from engine import generate
from rollout_pager import page
from sessions import Session
from slate_agent import load_agent
from tokenizer import ToolCallError, parse_tool_calls


@dataclass(frozen=True)
class Config:
    init: str = ""                   # checkpoint folder: out/<name>, a step folder, or one of Hugging Face
    prompt: str = ""                 # answer this one message and stop; empty: an interactive session
    generator: str = "template"      # slate agents: who proposes candidates, as the agent was trained with; checkpoint:PATH, url:BASE
    rollouts: str = ""               # page through what a run sampled: out/<name>, or a rollouts.jsonl; needs no --init
    system: str = ""                 # system message
    tools: bool = False              # write the tools' signatures into the prompt (large models need them; toy models never saw any)
    sandbox: Literal["auto", "namespaces", "landlock", "none_i_accept"] = "auto"        # the box in which the python tool runs
    max_new_tokens: int = 256        # bound on one answer, tool results included
    temperature: float = 0.0         # 0: the most likely token; 1: as trained
    top_p: float = 1.0               # below 1: sample from the smallest set of tokens with this mass
    seed: int = 0                    # another seed, another sample


PYTHON = {"type": "function", "function": {"name": "python", "description": "Runs a Python program in a sandbox and returns what it prints.", "parameters": {
    "type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}}}


def run_call(name, arguments):
    """-> the result as text; an error is a result too."""
    try:
        if name == "calculator":
            return calculate(arguments["expression"])
        result = sandbox.run(arguments["code"])
        printed = result.stdout[-2000:]
        return printed if result.status == "ok" else json.dumps(dict(error=result.status, stdout=printed, stderr=result.stderr[-500:]))
    except (CalculatorError, sandbox.SandboxUnavailable) as error:
        return json.dumps({"error": str(error)})


def run_calls(text):
    """-> results of the calls in a turn, as text; None if it makes none."""
    if "<tool_call>" not in text:
        return None
    try:
        _, calls = parse_tool_calls(text, [TOOL, PYTHON])
    except ToolCallError as error:
        return [json.dumps({"error": str(error)})]
    return [run_call(call["name"], call["arguments"]) for call in calls]


def abstains(p, threshold):
    return p is None or p < threshold


def in_brief(p, threshold):
    """p of an answer, or None -> what is printed of it."""
    short = lambda x: f"{x:.2f}".removeprefix("0")
    if p is None:
        return "no confidence: it would rather not answer, "
    return f"confidence {short(p)}" + (f": below {short(threshold)}, it would rather not answer" if abstains(p, threshold) else "") + ", "


def reply(model, tokenizer, prompt_ids, cfg, turn, calibrated=None, in_conversation=True, max_tool_turns=8):
    """-> (ids after the prompt, text of the last turn, p). Prints what happens. calibrated: confidence.Confidence; without, and where it has none, p
    is None."""
    turns = 0

    def tools(_, __, ids):
        nonlocal turns
        text = tokenizer.decode(ids[:-1])
        results = run_calls(text)
        if results is None or turns == max_tool_turns:
            return None
        turns += 1
        print(f"  {text.strip()}\n  -> {', '.join(results)}", flush=True)
        return tokenizer.render_tool_results(results)

    t0 = time.perf_counter()
    rollout = generate(model, tokenizer, [prompt_ids], max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p,
                       seed=random_key(cfg.seed, "chat", turn), tools=tools)[0][0]
    last_turn = len(rollout.ids) - rollout.mask[::-1].index(0) if 0 in rollout.mask else 0
    speed = sum(rollout.mask) / (time.perf_counter() - t0)
    text = tokenizer.decode([i for i in rollout.ids[last_turn:] if i not in (tokenizer.end_of_turn_id, tokenizer.end_of_text_id)])
    cut = "" if rollout.finish_reason == "stop" else " [cut at --max_new_tokens]"
    p, sure = None, ""
    if calibrated:
        item = confidence.Item(prompt_ids + rollout.ids, [0] * len(prompt_ids) + rollout.mask, in_conversation, text, str(turn))
        p, = calibrated.of(model, tokenizer, [item])
        sure = in_brief(p, calibrated.threshold)
    print(f"{text}{cut}  ({sure}{speed:.0f} tok/s)", flush=True)
    return rollout.ids, text, p


def recommendations(cfg, folder):
    """Histories in, the ten best items out: from BC and after post-training, where the run's BC checkpoint is beside."""
    model, catalogue = checkpoint.load_recommender(folder)
    models = {"after": model}
    if folder.name != "bc" and (folder.parent / "bc").exists():
        models = {"before": checkpoint.load_recommender(folder.parent / "bc")[0], **models}
    name = lambda item: (catalogue.titles[item - 1] if catalogue.titles else "") or catalogue.item_ids[item - 1]

    def answer(line):
        history = [recommend.find_item(catalogue, part) for part in line.split(";") if part.strip()]
        if not history:
            raise ValueError("an empty history: give titles or ids with ; between them")
        found = {label: [(name(item), p) for item, p in zip(*recommend.suggest(m, history))] for label, m in models.items()}
        width = max(len(title) for best in found.values() for title, _ in best)
        print("after " + "; ".join(map(name, history)))
        print("    " + "   ".join(f"{label:{width + 6}}" for label in found))
        for place, line in enumerate(zip(*found.values()), 1):
            print(f"{place:2}  " + "   ".join(f"{title:{width}} {p:5.3f}" for title, p in line), flush=True)
        return {label: [title for title, _ in best] for label, best in found.items()}

    if cfg.prompt:
        found = answer(cfg.prompt)
        print(json.dumps(dict(init=cfg.init, prompt=cfg.prompt, **found), ensure_ascii=False))
        return found
    print(f"{len(catalogue.item_ids):,} items. Titles or ids with ; between them, the latest last; /quit leaves")
    turns = 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if line == "/quit":
            break
        turns += 1
        try:
            answer(line)
        except ValueError as error:
            print(error)
    print(json.dumps(dict(init=cfg.init, turns=turns)))


def slates(cfg, folder, device):
    """A session with a slate agent: a start prompt, then picks. -> what was picked, turn by turn."""
    agent, deployment = load_agent(folder, device)
    propose = open_generator(cfg.generator, device=device)
    if propose.name != deployment.generator:
        raise ValueError(f"{folder}: trained with candidates of {deployment.generator}, --generator={cfg.generator} is {propose.name}: what it learned of "
                         "candidates holds for those of its own generator")
    script = [part.strip() for part in cfg.prompt.split(";")] if cfg.prompt else None

    def hear(question):
        if script is not None:
            return script.pop(0) if script else "/quit"
        try:
            return input(question).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return "/quit"
    start = hear("What should the picture show? ")
    session = Session(agent, deployment, propose, start, cfg.seed, device) if start and start != "/quit" else None
    while session and session.turn < deployment.horizon:
        columns = session.show()
        print(f"turn {session.turn + 1} of {deployment.horizon}")
        for place, (category, text) in enumerate(columns, 1):
            print(f"  {place}  {category:9} {text}", flush=True)
        while True:
            answer = hear("Which one? ")
            number, _, words = answer.partition(" ")
            if answer == "/quit" or (number.isdecimal() and 1 <= int(number) <= len(columns)):
                break
            print(f"a number from 1 to {len(columns)}, and words after it if you like; /quit leaves")
        if answer == "/quit":
            break
        session.pick(int(number) - 1, words.strip())
        print(f"-> {session.base}", flush=True)
    shown = dict(init=cfg.init, prompt=start, picks=session.turn if session else 0, last=session.base if session else "")
    print(json.dumps(shown, ensure_ascii=False))
    return shown


def main(cfg):
    if cfg.rollouts:
        return page(Path(cfg.rollouts))
    _, _, _, device = setup_distributed()
    if not cfg.init:
        raise ValueError("--init is empty: name a checkpoint folder, e.g. --init=out/quickstart/sft")
    folder = checkpoint.newest(cfg.init)
    if (folder / "catalogue.json").exists():
        return recommendations(cfg, folder)
    if (folder / "deployment.json").exists():
        return slates(cfg, folder, device)
    model, tokenizer = checkpoint.load_hf(folder, device)
    calibrated = confidence.load(folder, model)
    if device.type == "cuda":
        model.compute_dtype = torch.bfloat16
    if calibrated and "vote" in calibrated.slopes:
        print(f"{folder / 'calibration.json'}: this confidence is a vote among several answers; here is one at a time, so it is not shown")
        calibrated = None
    tools = [TOOL, PYTHON] if cfg.tools else None
    if cfg.tools:
        sandbox.choose(cfg.sandbox)
    start = [{"role": "system", "content": cfg.system}] if cfg.system else []
    history, turn = [], 0                                     # ids as they were sampled: the past is never rendered again

    def ask(message):
        nonlocal history
        if history:
            ended = history[-1] == tokenizer.end_of_turn_id          # not if the last answer was cut
            ids = history + ([] if ended else [tokenizer.end_of_turn_id]) + tokenizer.render_user_turn(message)
        else:
            ids = tokenizer.render_prompt(start + [{"role": "user", "content": message}], tools)
        new_ids, text, p = reply(model, tokenizer, ids, cfg, turn, calibrated)
        history = ids + new_ids
        return text, p

    if cfg.prompt:
        text, p = ask(cfg.prompt)
        sure = dict(confidence=p, abstains=abstains(p, calibrated.threshold)) if calibrated else {}
        print(json.dumps(dict(init=cfg.init, prompt=cfg.prompt, response=text, **sure), ensure_ascii=False))
        return text
    print("/new forgets, /raw TEXT continues plain text, /quit leaves")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        turn += 1
        if line == "/quit":
            break
        if line == "/new":
            history = []
        elif line.startswith("/raw "):
            reply(model, tokenizer, tokenizer.encode(line.removeprefix("/raw ")), cfg, turn, calibrated, in_conversation=False)
        elif line.startswith("/"):
            print("unknown command; there are /new, /raw TEXT and /quit")
        elif line:
            ask(line)
    print(json.dumps(dict(init=cfg.init, turns=turn)))


if __name__ == "__main__":
    try:
        main(parse_config(Config))
    except ValueError as error:
        sys.exit(f"chat.py: {error}")
