"""Generators of candidates: what a slate is chosen from, `num` rewritings of a prompt in each of five categories.

    propose = open_generator("template")                          words of the hidden world, at once and without a model
    propose = open_generator("checkpoint:out/sft/step_000400")    a chat model of ours or of Hugging Face, through the engine
    propose = open_generator("url:http://localhost:8000")         any server with OpenAI's /v1/chat/completions; the key in $GENERATOR_API_KEY
    propose(text, seed, row, turn) -> [(category, text)]          of one session; propose.batch(texts, seed, turn) of a whole crowd

A reply is one JSON object (in one code fence, if it must be) with a list of `num` texts for each category, all different, each at most MAX_WORDS words, or
it is asked for again with another sampling seed. After `tries` more of them, the cells that no reply filled come from the templates. `propose.counts` says
how often: an agent that was trained on templates because its model never answered should not pass for one that was trained on the model.
"""
import json
import os
import re
import unicodedata

from common import random_key
from data import judge
from data.slate import CATEGORIES, expansions
from tokenizer import load_strict

MAX_WORDS = 24                  # of a candidate: an agent reads no more of it
MAX_KEPT = 20_000               # answers that are kept, each of 5 x num texts
FAULTS = ("not_json", "wrong_shape", "wrong_text", "doubled")
COUNTS = ("replies", "asked_again", "unparseable", *FAULTS, "errors", "cells", "cells_from_templates")

RULES = """You rewrite prompts for a model that draws pictures. Reply with one JSON object and nothing else. Its keys are {names}; the value of each is a \
list of exactly {num} prompts. All {total} prompts differ from one another, and each is one line of at most {words} words that stands on its own:
"rephrase": the same picture in other words
"detail": the same picture with one more detail
"style": the same picture in another style or medium
"subject": the same manner with another subject
"creative": the same picture with an unexpected turn"""


class Unreadable(ValueError):
    """A reply that is not what was asked for. kind: one of FAULTS."""

    def __init__(self, kind, why):
        super().__init__(why)
        self.kind = kind


# -----------------------------------------------------------------------------
# Replies


def same(text):
    """What two texts have in common that differ in case and spaces alone."""
    return " ".join(text.casefold().split())


def is_prompt(text):
    """One line of 1 to MAX_WORDS words. A line break could pass for another turn where a session is written out."""
    return (isinstance(text, str) and text == text.strip() and 1 <= len(text.replace(",", " ").split()) <= MAX_WORDS
            and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text))


def parse_json(reply):
    fence = re.fullmatch(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", reply.strip(), re.DOTALL)
    try:
        return load_strict(fence[1] if fence else reply)
    except (ValueError, RecursionError) as error:
        raise Unreadable("not_json", f"not one JSON object: {error}") from None


def read_reply(reply, num):
    """A reply that keeps to all rules -> {category: [num texts]}. Unreadable, with the first rule that it breaks, on anything else."""
    found = parse_json(reply)
    if not isinstance(found, dict) or set(found) != set(CATEGORIES):
        raise Unreadable("wrong_shape", f"expected one JSON object with the keys {', '.join(CATEGORIES)}")
    for name, texts in found.items():
        if not isinstance(texts, list) or len(texts) != num:
            found = len(texts) if isinstance(texts, list) else type(texts).__name__
            raise Unreadable("wrong_shape", f"{name}: expected a list of {num} prompts, found {found}")
        for text in texts:
            if not is_prompt(text):
                raise Unreadable("wrong_text", f"{name}: expected a line of 1 to {MAX_WORDS} words, found {str(text)[:80]!r}")
    texts = [same(text) for name in CATEGORIES for text in found[name]]
    if len(set(texts)) < len(texts):
        raise Unreadable("doubled", "a prompt stands there twice")
    return {name: found[name] for name in CATEGORIES}


def cells_of(reply, num):
    """The cells that a reply which broke a rule did fill: per category at most num texts, none that stood before. -> {category: [texts]}"""
    try:
        found = parse_json(reply)
    except Unreadable:
        found = None
    found = found if isinstance(found, dict) else {}
    seen, cells = set(), {}
    for name in CATEGORIES:
        cells[name] = []
        for text in found[name] if isinstance(found.get(name), list) else ():
            if is_prompt(text) and same(text) not in seen and len(cells[name]) < num:
                seen.add(same(text))
                cells[name].append(text)
    return cells


def completed(cells, templates, num):
    """cells filled up from the templates' -> ({category: [num texts]}, number of cells from templates). All come from there where what was filled
    leaves too few of them that differ."""
    seen, filled = {same(text) for texts in cells.values() for text in texts}, {}
    for name in CATEGORIES:
        free = [text for category, text in templates if category == name and same(text) not in seen][:num - len(cells[name])]
        filled[name] = cells[name] + free
        seen |= {same(text) for text in free}
    if any(len(texts) < num for texts in filled.values()):
        return {name: [text for category, text in templates if category == name] for name in CATEGORIES}, num * len(CATEGORIES)
    return filled, num * len(CATEGORIES) - sum(map(len, cells.values()))


# -----------------------------------------------------------------------------
# Whom to ask


class Checkpoint(judge.Checkpoint):
    flag = "--generator"


class Server(judge.Server):
    flag, key = "--generator", "GENERATOR_API_KEY"


class Generator:
    """ask: (conversations, temperature, seeds) -> replies or Faults, or None for templates alone. name: what an agent's folder records.

    What was answered to (text, seed, row, turn) is kept and answered again, so policies that are compared meet the same candidates even where a
    server heeds no seed; what stands in for a failed request is not kept. counts: see COUNTS; unparseable replies also by the first rule that they broke,
    errors are requests without a reply (which are not repeated here: a server was asked several times already).
    """

    def __init__(self, ask, name, *, num, tries, temperature):
        self.ask, self.name, self.num, self.tries, self.temperature = ask, name, num, tries, temperature
        self.counts, self.kept = dict.fromkeys(COUNTS, 0), {}

    def __call__(self, text, seed, row, turn):
        return self.batch([text], seed, turn, [row])[0]

    def batch(self, texts, seed, turn, rows=None):
        """texts: the base prompts of rows (0, 1, .. by default) -> [(category, text)] for each; every try is one call for all that need it."""
        rows = range(len(texts)) if rows is None else rows
        if self.ask is None:
            return [expansions(text, seed, row, turn, self.num) for text, row in zip(texts, rows)]
        keys = [(text, int(seed), int(row), int(turn)) for text, row in zip(texts, rows)]
        new, failed = self._asked([k for k in dict.fromkeys(keys) if k not in self.kept])
        answers = [new[k] if k in new else self.kept[k] for k in keys]
        self.kept |= {k: v for k, v in new.items() if k not in failed}
        while len(self.kept) > MAX_KEPT:
            del self.kept[next(iter(self.kept))]
        return [list(answer) for answer in answers]

    def _asked(self, keys):
        """-> {key: [(category, text)]}, the keys among them whose request failed"""
        count, best, done, failed = self.counts, {k: {name: [] for name in CATEGORIES} for k in keys}, {}, set()
        open_keys = keys
        for attempt in range(self.tries + 1):
            if not open_keys:
                break
            count["asked_again"] += len(open_keys) if attempt else 0
            # 31 bits, since some servers keep a seed in no more
            seeds = [random_key("expansions", seed, row, turn, attempt) >> 32 for _, seed, row, turn in open_keys]
            replies = self.ask([self.conversation(k[0]) for k in open_keys], self.temperature, seeds)
            again = []
            for key, reply in zip(open_keys, replies):
                if isinstance(reply, judge.Fault):
                    count["errors"] += 1
                    failed.add(key)
                    continue
                count["replies"] += 1
                try:
                    done[key] = read_reply(reply, self.num)
                except Unreadable as why:
                    count["unparseable"] += 1
                    count[why.kind] += 1
                    cells = cells_of(reply, self.num)
                    if sum(map(len, cells.values())) > sum(map(len, best[key].values())):
                        best[key] = cells
                    again.append(key)
            open_keys = again
        for key in keys:
            if key not in done:
                done[key], num_cells = completed(best[key], expansions(*key, self.num), self.num)
                count["cells_from_templates"] += num_cells
        count["cells"] += self.num * len(CATEGORIES) * len(keys)
        return {k: [(name, text) for name in CATEGORIES for text in done[k][name]] for k in keys}, failed

    def conversation(self, text):
        rules = RULES.format(names=", ".join(CATEGORIES), num=self.num, total=self.num * len(CATEGORIES), words=MAX_WORDS)
        return [dict(role="system", content=rules), dict(role="user", content="The prompt: " + json.dumps(text, ensure_ascii=False))]


def open_generator(spec, *, tries=3, num=5, model="", temperature=1.0, timeout=60.0, retries=2, concurrency=8, max_new_tokens=1024, device="cpu", backoff=1.0):
    """spec: template, checkpoint:PATH or url:BASE -> Generator. tries: how often an unreadable reply is asked for again. num: candidates of a category.
    model: the name that a server asks for. retries, timeout (s), concurrency, backoff (s): of a server. ValueError: a spec or a setting that is none."""
    kind, colon, where = str(spec).partition(":")
    if not 1 <= num <= 5:
        raise ValueError(f"--candidates_per_category={num}: expected 1 to 5, as many as the templates make")
    if tries < 0 or retries < 0 or concurrency < 1 or max_new_tokens < 1 or not 0 < timeout < float("inf") or not 0 <= temperature < float("inf"):
        raise ValueError("expected --generator_tries and retries of at least 0, a timeout above 0, a concurrency and max_new_tokens of at least 1 and a "
                         f"temperature of at least 0, found {tries}, {retries}, {timeout}, {concurrency}, {max_new_tokens}, {temperature}")
    if kind == "template" and not colon:
        ask, name = None, "template"
    elif kind == "checkpoint" and os.path.isdir(where):
        from checkpoint import newest, weights_hash                # here and not above: templates and servers need no model
        folder = newest(where)
        ask = Checkpoint(folder, device, max_new_tokens)
        name = f"checkpoint:{weights_hash(folder)} at temperature {temperature:g}"               # by its weights: folders are moved
    elif kind == "url" and re.match(r"https?://", where):
        ask = Server(where, model, retries=retries, timeout=timeout, concurrency=concurrency, max_new_tokens=max_new_tokens, backoff=backoff)
        name = f"url:{ask.url} {model}".strip() + f" at temperature {temperature:g}"
    else:
        found = {"checkpoint": "no such folder", "url": "no http(s) URL"}.get(kind, "another word")
        raise ValueError(f"--generator={spec}: expected template, checkpoint:FOLDER or url:http(s)://HOST[:PORT][/PATH], found {found}")
    return Generator(ask, name if num == 5 else f"{name} x {num}", num=num, tries=tries, temperature=temperature)
