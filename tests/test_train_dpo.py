"""Preference learning: losses against loops in float64, step-0 values, one gradient for any cut, killed runs continue bitwise."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train_dpo
from model import Transformer, add_lora, config_for_size, lora_off
from tokenizer import Tokenizer
from train_dpo import (Config, best_and_worst, encode, ipo_loss, kto_loss, loss_at_reference, mismatched, orpo_loss, pairs_of,
                       read_pairs, resolve, sigmoid_loss, simpo_loss)

ROOT = Path(__file__).resolve().parents[1]
METHODS = tuple(train_dpo.METHODS)
SMALL = dict(size="nano", cold_start=0, eval_tasks="", eval_every=0, warmup_steps=0, device_batch_size=8)
FILE = SMALL | dict(pairs="pairs.jsonl", pairs_per_step=8, num_steps=1, val_fraction=0.0)
ONLINE = SMALL | dict(data="chat_en", num_prompts=12, prompts_per_step=4, num_samples=3, max_new_tokens=120, rewards="file",
                      reward_file="reward.py", reward_function="reward")
REWARD = """
def reward(samples):
    return [dict(id=s["id"], aggregate_reward_score=len(s["messages"][-1]["content"]) % 3) for s in samples]
"""


def write_inputs(folder):
    words = "red blue green pink grey teal".split()
    with open(folder / "pairs.jsonl", "w") as f:
        for i in range(11):                                       # odd: two ranks have unequal shares
            chosen, rejected = " ".join(words[:1 + i % 4]), " ".join(words[::-1][:1 + i % 3])
            f.write(json.dumps(dict(prompt=f"Name {i} colours" + "!" * (i % 5), chosen=chosen + f" {i}", rejected=rejected)) + "\n")
    (folder / "reward.py").write_text(REWARD)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)


def flags(**settings):
    return [f"--{k}={v}" for k, v in settings.items()]


def metrics(folder="out/dummy"):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


DRIVER = """
import os, signal, sys, torch, train_dpo
from common import parse_config
clip = train_dpo.clip_grad_norm
for flags in sys.argv[1].split(";"):                            # one run after another: [kill=N] --name=... ...
    first, *rest = flags.split()
    kill_at = int(first.removeprefix("kill=")) if first.startswith("kill=") else 0
    cfg = parse_config(train_dpo.Config, rest if kill_at else [first, *rest])
    gradients = []
    def probe(model, max_norm):
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if len(gradients) == kill_at:                           # in the middle of a step; the cold start clips too
            os.kill(os.getpid(), signal.SIGKILL)
        return clip(model, max_norm)
    train_dpo.clip_grad_norm = probe
    train_dpo.main(cfg)
    torch.save(gradients[0], cfg.name.replace("/", "_") + ".pt")
"""


def run(*runs, ranks=1, killed=False):
    """Runs (lists of flags) one after another in one process per rank. killed: the last must end by SIGKILL, and not by an error of its own."""
    Path("driver.py").write_text(DRIVER)
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0",
                                                 "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([*start, "driver.py", ";".join(map(" ".join, runs))], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=600)
    expected = (("Signal 9" in done.stdout) if ranks > 1 else done.returncode == -9) if killed else done.returncode == 0
    assert expected, done.stdout[-3000:]


# -----------------------------------------------------------------------------
# The losses, against loops over Python floats written from the papers


def log_sigmoid(z):
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def sigmoid(z):
    return math.exp(log_sigmoid(z))


def loop(method, chosen, rejected, num, labels=(), z0=0.0):
    """Sums over `num`. chosen, rejected: h, h/n or l as the method asks; kto: chosen holds the rows."""
    total = 0.0
    if method == "kto":
        for h, good in zip(chosen, labels):
            total += 1.5 * (1 - sigmoid(.1 * (h - z0))) if good else .7 * (1 - sigmoid(.1 * (z0 - h)))
        return total / num
    for w, l in zip(chosen, rejected):
        if method == "sigmoid":
            total += -.9 * log_sigmoid(.3 * (w - l)) - .1 * log_sigmoid(-.3 * (w - l))
        elif method == "ipo":
            total += (w - l - 1 / (2 * .2)) ** 2
        elif method == "orpo":
            odds_w, odds_l = (math.exp(x) / -math.expm1(x) for x in (w, l))
            total += -w - .4 * log_sigmoid(math.log(odds_w / odds_l))
        else:
            total += -log_sigmoid(2.5 * (w - l) - 1.4)
    return total / num


def ours(method, chosen, rejected, num, labels=(), z0=0.0):
    if method == "kto":
        return kto_loss(chosen, torch.tensor(labels), torch.tensor(z0), num, .1, 1.5, .7)
    return dict(sigmoid=lambda: sigmoid_loss(chosen - rejected, num, .3, .1), ipo=lambda: ipo_loss(chosen - rejected, num, .2),
                orpo=lambda: orpo_loss(chosen, rejected, num, .4), simpo=lambda: simpo_loss(chosen - rejected, num, 2.5, 1.4))[method]()


@pytest.mark.parametrize("method", ["sigmoid", "ipo", "kto", "orpo", "simpo"])
def test_loss_and_gradient_against_a_loop(method):
    rng = np.random.default_rng(0)
    chosen, rejected = (-np.exp(rng.normal(0, 1, 7)) * (1 if method == "orpo" else 4) for _ in range(2))
    labels, num = [True, False, False, True, True, False, True], 11                         # 4 more pairs are on another rank
    w, l = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (chosen, rejected))
    loss = ours(method, w, l, num, labels, z0=.25)
    assert abs(loss.item() - loop(method, chosen, rejected, num, labels, .25)) < 1e-9
    loss.backward()
    for side, tensor in enumerate((w, l)[:1 if method == "kto" else 2]):
        for i in range(7):
            values = []
            for step in (1e-5, -1e-5):
                moved = [chosen.copy(), rejected.copy()]
                moved[side][i] += step
                values.append(loop(method, *moved, num, labels, .25))
            assert abs(tensor.grad[i].item() - (values[0] - values[1]) / 2e-5) < 1e-6
    single = ours(method, torch.tensor(chosen, dtype=torch.float32), torch.tensor(rejected, dtype=torch.float32), num, labels, .25)
    assert single.dtype == torch.float32 and abs(single.item() - loss.item()) < 1e-5


def test_losses_by_hand():
    zero, one = torch.zeros(1), torch.ones(1)
    assert abs(sigmoid_loss(zero, 1, 5.0).item() - 0.6931472) < 1e-6
    assert abs(sigmoid_loss(zero, 2, .1, .3).item() - 0.3465736) < 1e-6                     # half of a batch of two
    assert abs(sigmoid_loss(10 * one, 1, .1).item() - 0.3132617) < 1e-6                     # log(1 + 1/e)
    assert ipo_loss(zero, 1, .1).item() == 25 and abs(ipo_loss(5 * one, 1, .1).item()) < 1e-6
    assert abs(kto_loss(torch.zeros(2), torch.tensor([True, False]), torch.tensor(0.0), 2, .1, 2.0, 1.0).item() - 0.75) < 1e-6
    half = torch.tensor([.5]).log()                                                         # odds 1 against 1/3: log sigmoid(log 3) = log .75
    assert abs(orpo_loss(half, torch.tensor([.25]).log(), 1, 1.0).item() - (math.log(2) + math.log(4 / 3))) < 1e-6
    assert abs(simpo_loss(torch.tensor([.56]), 1, 2.5, 1.4).item() - 0.6931472) < 1e-6      # the margin is just gamma


def test_beta_scales_the_margin_and_z0_takes_no_gradient():
    assert torch.equal(sigmoid_loss(torch.tensor([2.0]), 1, .1), sigmoid_loss(torch.tensor([.2]), 1, 1.0))
    for method, value in (("ipo", 1 / (4 * .04)), ("sigmoid", math.log(2))):
        assert abs(loss_at_reference(Config(method=method, beta=.2), [True, False]) - value) < 1e-12
    assert loss_at_reference(Config(method="kto", kto_desirable=3.0), [True, False, False, False]) == (3 + 3) / 2 / 4


def test_orpo_is_stable_at_both_ends():
    """l from -1e-30 (probability 1) to -1e4: finite, and the odds of l = -1e-4 are right to 6 digits."""
    chosen = torch.tensor([-1e-30, -1e-8, -1e-4, -1.0, -1e4], requires_grad=True)
    for other in (-1e-30, -1e-3, -5.0, -1e4):
        rejected = torch.full((5,), other, requires_grad=True)
        loss = orpo_loss(chosen, rejected, 5, .1)
        loss.backward()
        assert all(torch.isfinite(t).all() for t in (loss, chosen.grad, rejected.grad))
    log_odds = -1e-4 - math.log(-math.expm1(-1e-4))
    expected = 1e-4 - .1 * log_sigmoid(log_odds - (-2 - math.log(-math.expm1(-2))))
    assert abs(orpo_loss(torch.tensor([-1e-4]), torch.tensor([-2.0]), 1, .1).item() - expected) < 1e-7


def test_dpo_on_all_pairs_of_a_bandit_reaches_the_closed_form():
    """Five arms, every pair in both orders, weighted with their Bradley-Terry probabilities sigmoid(r_w - r_l) (the reverse order is what
    label_smoothing weighs): the minimum is ref exp(r / beta)."""
    ref = torch.tensor([.35, .25, .2, .15, .05]).log()
    reward, beta = torch.tensor([.1, .5, -.3, .8, .2]), .5
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")
    w, l = torch.tensor([(i, j) for i in range(5) for j in range(i)]).T
    preferred = torch.sigmoid(reward[w] - reward[l])

    def closure():
        optimizer.zero_grad()
        h = logits.log_softmax(0) - ref
        loss = sigmoid_loss(h[w] - h[l], 10, beta, 1 - preferred)
        loss.backward()
        return loss
    optimizer.step(closure)
    target = (ref + reward / beta).softmax(0)
    assert (logits.softmax(0) - target).abs().sum() / 2 < .02 < (ref.exp() - target).abs().sum() / 2


# -----------------------------------------------------------------------------
# Pairs as tokens


def test_prompt_once_completion_as_text_one_end_of_turn():
    tokenizer = Tokenizer.bytes()
    messages = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello."), dict(role="user", content="Add 2 and 3")]
    call = [dict(role="assistant", content="", tool_calls=[dict(name="calculator", arguments={"expression": "2+3"})]),
            dict(role="tool", content="5"), dict(role="assistant", content="5")]
    prompt, (plain, tools) = encode(tokenizer, messages, [[dict(role="assistant", content="Five.")], call])
    assert prompt == tokenizer.render_prompt(messages)
    ids, mask = plain
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "Five.<|im_end|>"
    assert len(ids) == sum(mask) and ids[-1] == tokenizer.end_of_turn_id
    ids, mask = tools
    said = tokenizer.decode([i for i, m in zip(ids, mask) if m])
    assert said.count("<|im_end|>") == 2 and said.endswith("</tool_call><|im_end|>5<|im_end|>") and "tool_response" not in said
    assert "<tool_response>\n5\n</tool_response>" in tokenizer.decode(ids) and mask[0] == mask[-1] == 1


def read(records, **settings):
    Path("made.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    settings = dict(pairs="made.jsonl", val_fraction=0.0, max_new_tokens=20, max_prompt_tokens=60) | settings
    return read_pairs(resolve(Config(**settings), 1e5, 9, 0, []), Tokenizer.bytes())


def test_equal_and_long_pairs_are_left_out_never_cut():
    good = dict(prompt="a?", chosen="yes", rejected="no")
    others = dict(rejected="yes"), dict(chosen="y" * 19), dict(chosen="y" * 20), dict(prompt="p" * 99)
    data, held_out, said = read([good, *(good | other for other in others)])
    assert said["left_out"] == {"equal": 1, "too long": 2} and len(data.sequences) == 4 and not held_out.sequences
    assert [int(mask.sum()) for _, mask in data.sequences] == [4, 3, 20, 3]                 # 19 bytes and the end of turn just fit
    assert data.good == [True, False, True, False]
    with pytest.raises(ValueError, match="nothing to train on"):
        read([good | dict(rejected="yes")])


def test_prompts_are_held_out_whole():
    records = [dict(prompt=f"question {i % 20}", chosen=f"yes {i}", rejected="no") for i in range(60)]
    data, held_out, _ = read(records, val_fraction=.3)
    questions = [{tuple(ids[:int(mask.argmax())]) for ids, mask in side.sequences} for side in (data, held_out)]
    assert questions[0] and questions[1] and not questions[0] & questions[1] and len(data.good) + len(held_out.good) == 120


def test_kto_rows_and_their_mismatched_completions():
    data, _, _ = read([dict(prompt=p, chosen=f"{p} good", rejected=f"{p} bad") for p in "ABC"], method="kto")
    assert data.good == [True, False] * 3 and len(data.mismatched) == 6
    decode = Tokenizer.bytes().decode
    texts = [decode(ids.tolist()) for ids, _ in data.mismatched]
    assert ["user\nA" in t and "B good" in t for t in texts] == [True, True] + [False] * 4 and "user\nC" in texts[5] and "A good" in texts[5]
    assert all(decode(ids[mask == 1].tolist()).endswith("<|im_end|>") for ids, mask in data.mismatched)
    assert mismatched(data.sequences[:2]) == []                                             # one prompt alone: nothing to mismatch


def test_labels_are_for_kto_alone():
    records = [dict(prompt="a", completion="b", label=True), dict(prompt="c", completion="d", label=False)]
    assert read(records, method="kto")[0].good == [True, False]
    with pytest.raises(ValueError, match="labels; --method=ipo needs pairs"):
        read(records, method="ipo")


@pytest.mark.parametrize("rewards, finished, expected", [
    ([0, 1, .5], [1, 1, 1], (1, 0)), ([1, 1, 1], [1, 1, 1], "tie"), ([None, 1, None], [1, 1, 1], "ungraded"), ([0, 0, 1], [1, 1, 0], "tie"),
    ([0, 1, .5], [0, 0, 1], (2, 0)), ([0, 1], [0, 0], "unfinished"), ([None, 0, 1], [1, 1, 1], (2, 1)),
])
def test_best_against_worst(rewards, finished, expected):
    assert best_and_worst(rewards, finished) == expected


def test_online_pairs_are_the_sampled_ids():
    def answer(group, sample, ids, mask, reward, finish="stop"):
        return dict(group=group, sample=sample, ids=[9, group, *ids], mask=[0, 0, *mask], reward=reward, finish_reason=finish, used="")
    answers = [answer(0, 0, [5, 6, 7], [1, 0, 1], 0.0), answer(0, 1, [5, 8], [1, 1], 1.0), answer(1, 0, [5], [1], 1.0), answer(1, 1, [6], [1], 1.0),
               answer(2, 0, [5], [1], 1.0), answer(2, 1, [5], [1], 0.0)]
    data, dropped = pairs_of(answers, Config(), 0)
    assert [(ids.tolist(), mask.tolist()) for ids, mask in data.sequences] == [([9, 0, 5, 8], [0, 0, 1, 1]), ([9, 0, 5, 6, 7], [0, 0, 1, 0, 1])]
    assert dropped == {"tie": 1, "equal": 1} and [a["used"] for a in answers] == ["rejected", "chosen", "", "", "", ""]
    rows, dropped = pairs_of([*answers[:2], answer(3, 0, [4], [1], None), answer(3, 1, [4], [1], 1.0, "length")], Config(method="kto"), 0)
    assert sorted(rows.good) == [False, True] and dropped == {"ungraded": 1, "unfinished": 1}


# -----------------------------------------------------------------------------
# The run


def first_gradient(**settings):
    """Gradient and metrics of the first step, in this process."""
    kept, clip = {}, train_dpo.clip_grad_norm

    def probe(model, max_norm):
        kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return clip(model, max_norm)
    train_dpo.clip_grad_norm = probe
    try:
        train_dpo.main(Config(**FILE | settings))
    finally:
        train_dpo.clip_grad_norm = clip
    return kept, next(m for m in metrics() if "train/loss" in m)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Two nano models whose every weight matters: the policy and a reference that is not the same."""
    folders = []
    for seed in (1, 2):
        tokenizer = Tokenizer.bytes()
        model = Transformer(config_for_size("nano", tokenizer.vocab_size)).init_weights(0)
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.05)
        folders.append(str(tmp_path_factory.mktemp("models") / str(seed)))
        checkpoint.save_hf(model, tokenizer, folders[-1])
    return folders


def assert_equal_gradients(a, b, tolerance=1e-6):
    scale = max(1.0, math.sqrt(sum(g.square().sum().item() for g in a.values())))           # beta 5 makes norms of 30, and rounding with them
    assert a.keys() == b.keys() and any(g.any() for g in a.values())
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


def cut_settings(moved, method):
    start, other = moved
    if method == "kto":
        return dict(init=other, ref=start, method=method, beta=.02)                         # the other way round z0 is 0, and 0 for any cut
    return dict(init=start, ref=other if train_dpo.METHODS[method]["reference"] else "", method=method,
                rpo_alpha=.3 if method == "sigmoid_norm" else 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_the_same_for_any_cut(moved, method):
    """1x8, 2x4, 8x1, packed and padded: the gradient, the loss, and KTO's z0."""
    settings = cut_settings(moved, method)
    gradient, line = first_gradient(**settings)
    for cut in (dict(device_batch_size=4), dict(device_batch_size=1), dict(pack=True, device_batch_size=3)):
        found, found_line = first_gradient(**settings | cut)
        assert_equal_gradients(gradient, found)
        assert all(abs(found_line[k] - v) < 1e-5 * max(1, abs(v)) for k, v in line.items())
    assert method != "kto" or line["pairs/z0"] > .1


RESUMED = ONLINE | dict(cold_start=2, num_steps=3, save_every=2, lr=3e-3)


@pytest.fixture(scope="module")
def two_ranks(moved, tmp_path_factory):
    """The folder in which two ranks ran: first gradients, a step of one pair, a whole online run; then one that was killed, and resumed."""
    folder, before = tmp_path_factory.mktemp("two_ranks"), os.getcwd()
    write_inputs(folder)
    os.chdir(folder)
    try:
        runs = [flags(name=f"dummy/{method}", **FILE | cut_settings(moved, method) | dict(device_batch_size=2)) for method in METHODS]
        runs.append(flags(name="dummy/one", **FILE | dict(init=moved[0], ref=moved[1], pairs_per_step=1)))
        run(*runs, flags(name="dummy/whole", **RESUMED), ["kill=5", *flags(name="dummy/killed", **RESUMED)], ranks=2, killed=True)
        assert checkpoint.newest("out/dummy/killed").name == "step_000002"
        run(flags(name="dummy/killed", resume="latest", **RESUMED), ranks=2)
    finally:
        os.chdir(before)
    return folder


def test_two_ranks_make_the_same_gradient(moved, two_ranks):
    """Also where a step has one pair, and the second rank nothing."""
    one = dict(init=moved[0], ref=moved[1], pairs_per_step=1)
    for name, settings in [*((method, cut_settings(moved, method)) for method in METHODS), ("one", one)]:
        gradient, line = first_gradient(**settings)
        assert_equal_gradients(gradient, torch.load(two_ranks / f"dummy_{name}.pt", weights_only=True))
        two = next(m for m in metrics(two_ranks / f"out/dummy/{name}") if "train/loss" in m)
        assert all(abs(two[k] - v) < 1e-5 * max(1, abs(v)) for k, v in line.items())


def test_killed_run_of_two_ranks_continues_bitwise(two_ranks):
    assert_same_run(two_ranks / "out/dummy/whole", two_ranks / "out/dummy/killed", 3)
    whole, killed = ((two_ranks / f"out/dummy/{name}/rollouts.jsonl").read_text() for name in ("whole", "killed"))
    assert whole == killed and len(whole.splitlines()) == 3 * 12


@pytest.mark.parametrize("method", METHODS)
def test_first_step_and_reference(moved, method):
    """Where the policy is the reference the loss is known, and the script asserts it; full weights and LoRA agree on it."""
    _, line = first_gradient(init=moved[0], method=method)
    expected = dict(sigmoid_norm=math.log(2), sigmoid=math.log(2), ipo=25.0, kto=.5).get(method)
    if expected:
        assert abs(line["train/loss"] - expected) < 1e-4 * expected and abs(line["pairs/margin"]) < 1e-4
        lora, lora_line = first_gradient(init=moved[0], method=method, lora_rank=2, num_steps=2)
        assert abs(lora_line["train/loss"] - expected) < 1e-4 * expected and all("lora" in name for name in lora)
    else:
        assert line["pairs/margin"] != 0 and line["train/loss"] > 0


def test_a_reference_that_is_not_the_policy_stops_the_first_step(moved, monkeypatch):
    load, calls = checkpoint.load_hf, []

    def other(path, device):
        calls.append(path)
        return load(moved[0] if len(calls) == 1 else moved[1], device)
    monkeypatch.setattr(checkpoint, "load_hf", other)
    with pytest.raises(AssertionError, match="not the same model"):
        train_dpo.main(Config(**FILE | dict(init=moved[0], method="sigmoid", beta=1.0)))


def test_lora_off_is_the_base_and_comes_back():
    model = Transformer(config_for_size("nano", 300)).init_weights(0)
    ids = torch.arange(20)[None]
    base = model(ids)
    add_lora(model, 4, 64.0)
    for n, p in model.named_parameters():
        p.data.add_(.1 if "lora" in n else 0)
    changed = model(ids)
    with pytest.raises(KeyError), lora_off(model):
        assert torch.equal(model(ids), base)
        raise KeyError
    assert torch.equal(model(ids), changed) and not torch.equal(changed, base)


def test_learns_held_out_pairs_from_a_file():
    """The chosen answer ends in "!", the rejected one in "?": the margin of unseen prompts grows, and with it the loss falls."""
    with open("marks.jsonl", "w") as f:
        for i in range(64):
            f.write(json.dumps(dict(prompt=f"Say {i}", chosen=f"{i}!", rejected=f"{i}?")) + "\n")
    summary = train_dpo.main(Config(**SMALL | dict(pairs="marks.jsonl", pairs_per_step=8, num_epochs=4, val_fraction=.25, lr=3e-3, cold_start=5)))
    assert summary["val/pair_accuracy"] == 1 and summary["val/loss"] < .4 and summary["val/pair_margin"] > .1
    lines = [m for m in metrics() if "train/loss" in m]
    assert abs(lines[0]["train/loss"] - math.log(2)) < 1e-4 and lines[-1]["train/loss"] < .4
    # whole epochs: each pair as often as every other
    data, _, _ = read_pairs(resolve(Config(pairs="marks.jsonl", val_fraction=.25, max_new_tokens=99), 1e5, 9, 0, []), Tokenizer.bytes())
    assert sum(m["pairs/num"] for m in lines) == 4 * len(data.good) / 2


# -----------------------------------------------------------------------------
# Stop, kill -9, resume

def assert_same_run(a, b, step):
    folders = [Path(run) / f"step_{step:06d}" for run in (a, b)]
    for file in sorted(f.name for f in folders[0].glob("*.safetensors")):
        x, y = (load_file(folder / file) for folder in folders)
        assert x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x), file
    for x, y in zip(*(torch.load(folder / "optim_rank0.pt", weights_only=True) for folder in folders)):
        assert x["state"] and all(torch.equal(x["state"][i][k], y["state"][i][k]) for i in x["state"] for k in x["state"][i])
    assert metrics(a) == metrics(b)
    states = [json.loads((folder / "train.json").read_text())["state"] for folder in folders]
    assert states[0] == states[1]


@pytest.mark.parametrize("settings", [RESUMED | dict(method="kto", kto_threshold=1.5, lora_rank=2),
                                      FILE | dict(num_steps=5, save_every=2, eval_every=2, val_fraction=.3, lr=3e-3, method="ipo")])
def test_killed_run_continues_bitwise(settings):
    train_dpo.main(Config(**settings | dict(name="dummy/whole")))
    run([f"kill={settings['cold_start'] + 3}", *flags(name="dummy/killed", **settings)], killed=True)
    assert checkpoint.newest("out/dummy/killed").name == "step_000002"
    online = "pairs" not in settings
    if online:
        assert '"step": 3' in Path("out/dummy/killed/rollouts.jsonl").read_text()           # written before the kill, cut off on resume
    train_dpo.main(Config(**settings | dict(name="dummy/killed", resume="latest")))
    assert_same_run("out/dummy/whole", "out/dummy/killed", settings["num_steps"])
    if online:
        whole, killed = (Path(f"out/dummy/{name}/rollouts.jsonl").read_text() for name in ("whole", "killed"))
        lines = [json.loads(line) for line in whole.splitlines()]
        assert whole == killed and len(lines) == settings["num_steps"] * 12
        assert {line["used"] for line in lines} >= {"desirable", "undesirable"}
        steps = [m for m in metrics("out/dummy/whole") if "train/loss" in m]                # with the adapter left on, the policy is its own reference
        assert len(steps) == settings["num_steps"] and abs(steps[0]["pairs/margin"]) < 1e-3 < abs(steps[-1]["pairs/margin"])


def test_resume_refuses_another_run():
    settings = FILE | dict(name="dummy/changed", num_steps=1)
    train_dpo.main(Config(**settings))
    with pytest.raises(ValueError, match="method was sigmoid_norm, found ipo"):
        train_dpo.main(Config(**settings | dict(num_steps=2, method="ipo", resume="latest")))


# -----------------------------------------------------------------------------
# What it chooses, and what it refuses


def test_defaults_are_those_of_the_table():
    def chosen(parameters, num_items, **settings):
        return resolve(Config(init="x", pairs="file", **settings), parameters, num_items, 1024, [])
    norm = chosen(5e8, 10_000)
    assert (norm.lr, norm.beta, norm.pairs_per_step, norm.num_epochs, norm.num_steps, norm.warmup_steps) == (2.5e-6, 5.0, 128, 1, 79, 8)
    lora = chosen(1.5e9, 1000, lora_rank=8, method="sigmoid")
    assert (lora.lr, lora.beta, lora.pairs_per_step) == (1e-5, .1, 32)
    assert [chosen(5e8, 999, method=m).lr for m in ("ipo", "kto", "orpo", "simpo")] == [7e-7, 1e-6, 8e-6, 1e-6]
    assert [chosen(5e8, 999, method=m).beta for m in ("ipo", "kto", "orpo", "simpo")] == [.1, .1, .1, 2.5]
    assert chosen(8e9, 999).lr == 7e-7 and chosen(1e6, 999).lr == 3e-4 and chosen(5e8, 999, lr=1e-5, beta=.2).beta == .2
    online = resolve(Config(init="x"), 5e8, 900, 112, ["math_en"])
    assert (online.prompts_per_step, online.num_epochs, online.num_samples, online.max_new_tokens) == (32, 6, 8, 112)
    assert online.eval_tasks == "math_en"


@pytest.mark.parametrize("settings, message", [
    (dict(lr=.1), "--lr=0.1: expected within .1e-08, 0.01.; 0.0003 is recommended"),
    (dict(beta=0.0), "--beta=0.0: expected"),
    (dict(num_samples=65), "--num_samples=65"),
    (dict(temperature=3.0), "--temperature=3.0"),
    (dict(lora_rank=512), "--lora_rank=512"),
    (dict(label_smoothing=.1, method="ipo"), "--label_smoothing=0.1: is for sigmoid"),
    (dict(rpo_alpha=.1, method="orpo"), "--rpo_alpha=0.1: orpo has"),
    (dict(max_prompt_tokens=4000), "over the model's context of 4096"),
    (dict(resume="latest", name="never"), "holds no checkpoint"),
    (dict(pairs="online", data="mathen"), "did you mean"),
    (dict(pairs="online", data="sums"), "expected conversations"),
    (dict(pairs="online", data="chat_en", rewards="file"), "reward_file"),
])
def test_wrong_settings_name_the_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        train_dpo.main(Config(**FILE | settings))


def test_nan_stops_before_the_weights_are_touched(monkeypatch):
    monkeypatch.setattr(train_dpo, "sigmoid_loss", lambda margins, num, beta, eps: margins.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="train/loss is nan"):
        train_dpo.main(Config(**FILE))
    # a loss that is fine, and a gradient that is not: the square root's at 0
    monkeypatch.setattr(train_dpo, "sigmoid_loss", lambda margins, num, beta, eps: (margins * 0).sqrt().sum() + math.log(2))
    with pytest.raises(FloatingPointError, match="grad_norm is nan"):
        train_dpo.main(Config(**FILE))


def test_a_step_without_pairs_moves_nothing(monkeypatch):
    """All rewards equal: no update, said so, and the weights are those of the start."""
    Path("reward.py").write_text(REWARD.replace("len(s[\"messages\"][-1][\"content\"]) % 3", "1.0"))
    train_dpo.main(Config(**ONLINE | dict(num_steps=2)))
    first, last = (load_file(f"out/dummy/step_{step:06d}/model.safetensors") for step in (0, 2))
    assert all(torch.equal(first[n], last[n]) for n in first)
    assert [(m["pairs/num"], m["pairs/ties"] + m["pairs/left_out"], "train/loss" in m) for m in metrics() if m["step"]] == [(0, 4, False)] * 2


def test_failed_rewards_stop_the_run():
    Path("reward.py").write_text("def reward(samples):\n    raise KeyError('price')\n")
    with pytest.raises(RuntimeError, match="12 of 12 samples have no reward.*price"):
        train_dpo.main(Config(**ONLINE | dict(num_steps=1)))


def test_dry_run_trains_nothing(capsys):
    train_dpo.main(Config(**FILE | dict(dry_run=True)))
    out = capsys.readouterr().out
    assert "memory_estimate_mb" in out and "beta  5.0" in out and not Path("out/dummy/metrics.jsonl").exists()
