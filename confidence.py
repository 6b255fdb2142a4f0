"""How sure a model is of its own answer: a number q in [0, 1] read from the model. calibration.py says how far q can be trusted.

    query     after the answer, a fixed text asks whether it is right and offers no and yes: q = sig(z_yes - z_no), the logits of the two label
              tokens at the last position (arXiv 2207.05221, 2406.08391)
    verbal    the model ends its answer with <confidence>0.85</confidence>, as RLCR trains it to (arXiv 2507.16806); else there is no q
    logprob   exp of the mean log-probability of the sampled tokens
    vote      share of all samples to the prompt whose last line is this one's

A checkpoint of train_calibration.py carries calibration.json: which of these, the text of the query, the rescaling, and the threshold below which
to abstain. `load` finds it, `Confidence.of` applies it: eval.py and chat.py do. An adapter that is on for the query alone leaves answers as they
were, bit by bit; what it costs is a second pass over prompt and answer.
"""
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import checkpoint
from calibration import combine, sigmoid
from common import write_atomically
from data.grading import stated_confidence
from data.packing import micro_batches, sequence_batch, token_offsets
from kernels import linear_logprob
from model import LoRALinear, add_lora, lora_scaled

SOURCES = ("query", "verbal", "logprob", "vote")
QUERY = "Is this answer right?\n0: {no}\n1: {yes}"
LABELS = ("0", "1")


class Item(NamedTuple):
    """An answer and what it answers."""
    ids: list           # of prompt and answer, as sampled
    mask: list          # 1 where sampled
    chat: bool          # a conversation; else plain text
    text: str           # of the assistant's last turn
    prompt: str         # a key that samples to one prompt share


def last_words(messages):
    """What followed a prompt -> content of the assistant's last turn."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")


# -----------------------------------------------------------------------------
# The query


def label_ids(tokenizer):
    """-> the ids of the two labels. ValueError unless each is one token of its own."""
    found = [tokenizer.encode(label) for label in LABELS]
    if {len(ids) for ids in found} != {1} or found[0] == found[1]:
        raise ValueError(f"the labels {LABELS} of the query are the tokens {found}: expected one token each, and different ones")
    return [ids[0] for ids in found]


def query_sequence(tokenizer, item, text, swapped=False, with_answer=False):
    """-> (ids, mask) of prompt, answer, query and a label. Mask 1 on the label: its place is where the logits are read; with_answer: on the sampled
    tokens before it, too. swapped: the options change places, so that label 0 says yes."""
    asked = text.format(no="yes", yes="no") if swapped else text.format(no="no", yes="yes")
    if item.chat:
        ended = item.ids[-1] == tokenizer.end_of_turn_id                  # not if the answer was cut
        ids, query = item.ids, ([] if ended else [tokenizer.end_of_turn_id]) + tokenizer.render_user_turn(asked)
    else:
        ids, query = item.ids[:-1] if item.ids[-1] == tokenizer.end_of_text_id else item.ids, tokenizer.encode(f"\n{asked}\n")
    mask = item.mask[:len(ids)] if with_answer else [0] * len(ids)
    return ids + query + [label_ids(tokenizer)[0]], mask + [0] * len(query) + [1]


def check_query(text):
    """ValueError unless both options have their place."""
    try:
        parts = [text.format(no="\0", yes="\1"), text.format(no="\1", yes="\0")]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):             # {no.x} and {no[x]} too
        parts = [""]
    if len(set(parts)) < 2 or any(part.count(option) != 1 for part in parts for option in "\0\1"):
        raise ValueError(f"--query={text!r}: expected {{no}} and {{yes}} once each, where the options of labels {LABELS[0]} and {LABELS[1]} go")


def query_logits(hidden, weight, labels, swapped):
    """hidden (N, D) where the label would be said -> (N,) fp32 z_yes - z_no. swapped (N,) bool."""
    z = F.linear(hidden.float(), weight[labels].float())
    z = z[:, 1] - z[:, 0]
    return torch.where(swapped, -z, z)


@torch.no_grad()
def ask(model, tokenizer, items, text, device_batch_size=16, swapped=False):
    """-> (N,) float64 z_yes - z_no of each item."""
    out = torch.zeros(len(items), dtype=torch.float64)
    sequences, labels = [query_sequence(tokenizer, item, text, swapped) for item in items], label_ids(tokenizer)
    offsets, device = token_offsets(sequences), model.lm_head.weight.device
    for which in micro_batches([len(ids) for ids, _ in sequences], device_batch_size):
        b = sequence_batch(sequences, which, offsets).to(device)
        hidden = model(b.ids, b.positions, b.doc_ids).flatten(0, 1)[b.rows]
        z = query_logits(hidden, model.lm_head.weight, labels, torch.full((len(hidden),), swapped, device=device))
        out[b.sequences.cpu()] = z.double().cpu()
    return out


# -----------------------------------------------------------------------------
# Sources: items -> a list of q, None where there is none


def by_query(model, tokenizer, items, text, both_orders=False, device_batch_size=16):
    q = sigmoid(ask(model, tokenizer, items, text, device_batch_size).numpy())
    if both_orders:
        q = (q + sigmoid(ask(model, tokenizer, items, text, device_batch_size, swapped=True).numpy())) / 2
    return q.tolist()


@torch.no_grad()
def by_logprob(model, items, temperature, device_batch_size=16):
    """temperature: at which the answers were sampled; 0 (greedy) counts as 1."""
    sequences, total = [(item.ids, item.mask) for item in items], torch.zeros(len(items), dtype=torch.float64)
    offsets = token_offsets(sequences)
    for which in micro_batches([len(ids) for ids, _ in sequences], device_batch_size):
        b = sequence_batch(sequences, which, offsets).to(model.lm_head.weight.device)
        hidden = model(b.ids, b.positions, b.doc_ids).flatten(0, 1)[b.rows]
        logps = linear_logprob(hidden, model.lm_head.weight, b.targets, temperature=temperature or 1.0).logp
        total.index_add_(0, b.sequences.cpu(), logps.double().cpu())
    return [min(1.0, math.exp(x / sum(item.mask))) for x, item in zip(total.tolist(), items)]


def by_words(items):
    return [stated_confidence(item.text)[1] for item in items]


def by_vote(items):
    """Agreement is equality of the last line without the stated confidence: graders say right or wrong, not what an answer is. Code, whose last line
    says little, needs another source. One sample is no vote."""
    last = [(stated_confidence(item.text)[0].strip().splitlines() or [""])[-1].strip() for item in items]
    together, same = Counter(item.prompt for item in items), Counter((item.prompt, line) for item, line in zip(items, last))
    return [same[item.prompt, line] / together[item.prompt] if together[item.prompt] > 1 else None for item, line in zip(items, last)]


# -----------------------------------------------------------------------------
# What a checkpoint knows about itself


class Confidence(NamedTuple):
    """calibration.json. p = sig(sum of slope logit(q) over the sources + offset); answers with p below threshold are those to abstain from. One source
    with slope 1 and offset 0 is stated as it is."""
    slopes: dict                    # source -> slope
    offset: float = 0.0
    threshold: float = 0.0
    query: str = QUERY
    both_orders: bool = False
    lora_rank: int = 0              # above 0: of the adapter that is on for the query
    lora_alpha: float = 0.0
    temperature: float = 1.0        # at which log-probabilities are read: that of the answers it was fitted on, however these here were sampled

    def of(self, model, tokenizer, items, device_batch_size=16):
        """items: for a vote, all samples to their prompts -> a list of p, None where there is none."""
        found = []
        for source in self.slopes:
            if source == "query":
                with lora_scaled(model, self.lora_alpha / self.lora_rank if self.lora_rank else None):
                    found.append(by_query(model, tokenizer, items, self.query, self.both_orders, device_batch_size))
            else:
                found.append(by_logprob(model, items, self.temperature, device_batch_size) if source == "logprob" else
                             by_words(items) if source == "verbal" else by_vote(items))
        return found[0] if (*self.slopes.values(), self.offset) == (1.0, 0.0) else combine(found, self.slopes.values(), self.offset)

    def save(self, folder):
        write_atomically(Path(folder) / "calibration.json", json.dumps(self._asdict(), indent=1) + "\n")


def load(folder, model):
    """-> the Confidence of a checkpoint, None if it has none. Its adapter is put into the model (as it came from load_hf), switched off."""
    file = Path(folder) / "calibration.json"
    if not file.exists():
        return None
    found = checkpoint.read_json(file)
    try:
        known = Confidence(**found)
        if not known.slopes or not set(known.slopes) <= set(SOURCES) or known.lora_rank < 0 or not known.temperature > 0 or not math.isfinite(
                sum(known.slopes.values()) + known.offset + known.threshold + known.lora_alpha + known.temperature):
            raise TypeError(f"slopes {known.slopes}, offset {known.offset}, threshold {known.threshold}, adapter {known.lora_rank}, {known.lora_alpha}, "
                            f"temperature {known.temperature}")
        check_query(known.query)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not what train_calibration.py writes ({error})") from None
    if known.lora_rank:
        add_lora(model, known.lora_rank, known.lora_alpha)
        checkpoint.restore_lora(folder, model)
        for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
            layer.scale = 0.0
    return known
