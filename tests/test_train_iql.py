"""The agent of slates as a whole: losses by hand and in loops, a small world whose values are exact, one gradient however a batch is cut, exact resume,
sessions of files, of user models and of both, and errors that name the flag."""
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train_sft import flags, kill_9, metrics, run

import checkpoint
import sessions
import train_iql
import train_user_model
from common import random_key
from data import slate
from data.embeddings import save_embeddings
from sessions import ModelCrowd, SmallCrowd, SmallGenerator, agent_policy, random_policy, simulate, stranger
from slate_agent import Batch, Sessions, SlateAgent, SlateAgentConfig, Texts, load_agent, new_agent, rectangles
from train_iql import bc_loss, choice_loss, cql_penalty, slate_losses, slate_q, slate_stats
from user_model import load_user_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train_iql.py")
TINY = dict(hidden_size=16, num_layers=1, sim_sessions=40, num_steps=2, batch_size=8, eval_every=0, eval_people=6, val_people=4, log_every=1, horizon=3,
            slate_size=2, images_per_prompt=1, candidates_per_category=2, val_share=.3)
SMALL = dict(simulator="small", evaluate="small", slate_size=2, candidates_per_category=1, max_per_category=1, horizon=5, images_per_prompt=1, behavior="random")
tensor = lambda *x: torch.tensor(x, dtype=torch.float64)


def Config(**values):
    return train_iql.resolved(train_iql.Config(**values))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
    """Half of the time of a run of two steps is matplotlib's."""
    monkeypatch.setattr(sessions, "picture", lambda *args: None)
    monkeypatch.setattr(sessions, "storyboard", lambda *args: None)


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """A user model of two types, barely fitted."""
    folder, here = tmp_path_factory.mktemp("users"), Path.cwd()
    os.chdir(folder)
    train_user_model.main(train_user_model.Config(name="dummy/users", num_users=40, num_sessions=1, num_types="2", restarts=1, num_steps=3, rank=1))
    os.chdir(here)
    return str(folder / "out/dummy/users")


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def last_step(name):
    return checkpoint.step_folders(Path("out") / name)[-1]


def file_of(path, n=30, reward=None, horizon=3, **settings):
    """A session file of the hidden world and its embeddings. reward: what every turn was worth; None: nobody says."""
    found = sessions.world_log(slate.World(0), 7, num_users=n, horizon=horizon, slate_size=2, images_per_prompt=1, **settings)
    log = found.log if reward is None else found.log._replace(reward=np.full(len(found.log.choice), float(reward)))
    slate.write(log, path)
    save_embeddings(str(Path(path).with_suffix(".npz")), found.ids, found.emb, "world 0", False)
    return log, found


# -----------------------------------------------------------------------------
# The losses


def test_losses_by_hand():
    """Items worth 1 and 3: 2 in the mean, 2.5 where the better one is picked three times of four. Probabilities 1/3 and 2/3 of a slate's items, the third candidate
    is none; a pick of probability 3/4; logsumexp of 0 and ln 3 is ln 4, their mean half of ln 3. The second turn is padding."""
    logits = tensor(0, math.log(3)).requires_grad_()
    f = tensor(1, 3).requires_grad_()
    assert slate_q(f, "mean").item() == 2 and abs(slate_q(f, "choice", logits).item() - 2.5) < 1e-12
    slate_q(f, "choice", logits).backward()
    assert logits.grad is None and torch.allclose(f.grad, tensor(.25, .75))
    valid, pair = tensor([1, 0]), torch.tensor([[[0, 1], [0, 1]]])
    scores = tensor([[0, math.log(2), -math.inf], [5, 6, 7]])
    assert abs(bc_loss(scores, pair, valid, 4).item() - math.log(9 / 2) / 2 / 4) < 1e-12
    assert abs(choice_loss(tensor([[0, math.log(3)], [9, 9]]), torch.tensor([[1, 0]]), valid, 2).item() - math.log(4 / 3) / 2) < 1e-12
    f, present = tensor([[[0, math.log(3), 9], [4, 4, 4]]])[None], torch.tensor([[[True, True, False], [True, True, True]]])
    assert abs(cql_penalty(f, f[0][..., :2], present, valid, 2).item() - (math.log(4) - math.log(3) / 2) / 2) < 1e-12


B, T, C, L = 4, 4, 6, 2
ENDS = ("horizon", "quit", "truncated", "horizon")
LENGTHS = (4, 2, 3, 1)


def made(seed=0):
    """Sessions of 4, 2, 3 and 1 turns: the last ends, quits, is cut off, ends; some turns have fewer candidates."""
    rng = np.random.default_rng(seed)
    categories = rng.integers(0, 5, (B, T, C))
    categories[:, 1, 4:] = -1
    pairs = np.stack([[rng.permutation(4)[:L] for _ in range(T)] for _ in range(B)])
    valid = np.arange(T) < np.array(LENGTHS)[:, None]
    terminal = np.zeros((B, T))
    for b, (length, end) in enumerate(zip(LENGTHS, ENDS)):
        terminal[b, length - 1] = end != "truncated"
    categories[~valid], pairs[~valid] = -1, 0
    zeros = torch.zeros(B, T, dtype=torch.int64)
    batch = Batch(torch.zeros(8, 24, dtype=torch.int64), zeros[:, 0], torch.zeros(B, T, L, dtype=torch.int64), torch.zeros(B, T, L, dtype=torch.int64),
                  torch.from_numpy(rng.integers(0, L, (B, T)) * valid), zeros - 1, torch.tensor(LENGTHS), zeros[:, 0] - 1)
    return Sessions(Texts(), batch, torch.arange(C).expand(B, T, C), torch.from_numpy(categories), torch.from_numpy(pairs),
                    torch.from_numpy(rng.normal(size=(B, T)) * valid), torch.from_numpy(terminal), torch.from_numpy(valid))


def tables(heads, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, T + 1, generator=g, dtype=torch.float64).requires_grad_(), torch.randn(heads, B, T, C, generator=g, dtype=torch.float64).requires_grad_()


def forward_of(v, f):
    """An agent that is a table: the row of a candidate is its place."""
    return lambda batch, rows, categories: (v, f.gather(3, rows.expand(len(f), -1, -1, -1)))


@pytest.mark.parametrize("value, alpha, gamma, method", [("mean", 0.0, .9, "iql"), ("choice", .5, 1.0, "iql"), ("mean", .5, 1.0, "iql"), ("mean", 0.0, 0.0, "myopic"),
                                                        ("mean", 0.0, 1.0, "bc")])
def test_losses_of_sessions_against_loops_in_float64(value, alpha, gamma, method):
    cfg, s = Config(slate_value=value, cql_alpha=alpha, expectile=.8), made()
    (v, f), (_, f_bar), num, scale = tables(2 + (value == "choice"), 1), tables(2 + (value == "choice"), 2), 13, 2.0
    losses, found = slate_losses(cfg, method, forward_of(v, f), forward_of(v, f_bar), s, scale, gamma, num)
    expected, below = dict.fromkeys(losses, 0.0), 0
    for b in range(B):
        for t in range(LENGTHS[b]):
            items = s.slate[b, t].tolist()
            there = [c for c in range(C) if s.categories[b, t, c] >= 0]
            if method == "bc":
                mean = [(f[0, b, t, c] + f[1, b, t, c]).item() / 2 for c in range(C)]
                total = math.log(sum(math.exp(mean[c]) for c in there))
                expected["bc_loss"] -= sum(mean[c] - total for c in items) / L / num
                continue
            share = [1 / L] * L
            if value == "choice":
                logits = [math.exp(f[2, b, t, c].item()) for c in items]
                share = [x / sum(logits) for x in logits]
                expected["choice_loss"] -= math.log(share[s.batch.picked[b, t]]) / num
            q = [sum(p * f[i, b, t, c].item() for p, c in zip(share, items)) for i in range(2)]
            bar = min(sum(p * f_bar[i, b, t, c].item() for p, c in zip(share, items)) for i in range(2))
            u = bar - v[b, t].item()
            below += u < 0
            expected["v_loss"] += (.8 if u > 0 else .2) * u * u / num
            stops = t == LENGTHS[b] - 1 and ENDS[b] != "truncated"
            y = s.reward[b, t].item() / scale + (0 if stops else gamma * v[b, t + 1].item())
            expected["q_loss"] += sum((x - y) ** 2 for x in q) / num
            if alpha:
                for i in range(2):
                    row = [f[i, b, t, c].item() for c in range(C)]
                    expected["cql_loss"] += alpha * (math.log(sum(math.exp(row[c]) for c in there)) - sum(row[c] for c in items) / L) / num
    names = {"bc_loss"} if method == "bc" else {"v_loss", "q_loss"} | ({"choice_loss"} if value == "choice" else set()) | ({"cql_loss"} if alpha else set())
    assert set(losses) == names
    for name, x in losses.items():
        assert abs(x.item() - expected[name]) < 1e-10, name
    if method != "bc":
        assert abs(found["below"].item() - below / num) < 1e-6


def test_the_statistics_of_sessions_against_loops():
    """f of what was not shown less f of what was, the Bellman error and the share below, over turns that are there and candidates that are."""
    s, (v, f), (_, f_bar) = made(), tables(2, 1), tables(2, 2)
    found = slate_stats(Config(), forward_of(v, f), forward_of(v, f_bar), s, 2.0, 1.0)
    unseen, shown, errors, below = [], [], [], []
    for b in range(B):
        for t in range(LENGTHS[b]):
            items = s.slate[b, t].tolist()
            for c in range(C):
                if s.categories[b, t, c] >= 0:
                    (shown if c in items else unseen).append(f[:, b, t, c].mean().item())
            stops = t == LENGTHS[b] - 1 and ENDS[b] != "truncated"
            y = s.reward[b, t].item() / 2 + (0 if stops else v[b, t + 1].item())
            errors += [(f[i, b, t, items].mean().item() - y) ** 2 for i in range(2)]
            below.append(min(f_bar[i, b, t, items].mean().item() for i in range(2)) < v[b, t].item())
    assert abs(found["unseen_less_shown"] - (np.mean(unseen) - np.mean(shown))) < 1e-9
    assert abs(found["bellman"] - np.mean(errors)) < 1e-9 and abs(found["below"] - np.mean(below)) < 1e-9
    # a slate that is all there is leaves nothing unseen
    alone = s._replace(candidates=s.candidates[..., :2], categories=s.categories[..., :2], slate=torch.tensor([0, 1]).expand(B, T, L))
    assert "unseen_less_shown" not in slate_stats(Config(), forward_of(v, f[..., :2]), forward_of(v, f_bar[..., :2]), alone, 2.0, 1.0)


def log_of(*ends):
    """The same two turns, as often as there are ends."""
    turn = lambda t, r: dict(t=t, candidates=[dict(category=c, text=f"{c} fox") for c in slate.CATEGORIES], slate=[0, 1], choice=1, reward=r)
    lines = [json.dumps(dict(session=f"s{i}", user=f"u{i}", source="human", prompt="a fox", end=end, turns=[turn(0, .5), turn(1, .25)])) for i, end in enumerate(ends)]
    Path("ends.jsonl").write_text("\n".join(lines) + "\n")
    return slate.read("ends.jsonl")


def test_quit_is_terminal_and_truncated_differs_by_gamma_v(monkeypatch):
    log = log_of("horizon", "quit", "truncated")
    s, targets = rectangles(log, log.reward), []
    monkeypatch.setattr(train_iql, "q_loss", lambda qs, y, num: targets.append(y) or (qs - y).square().sum())
    v, f = torch.arange(9.0).view(3, 3) / 8, torch.zeros(2, 3, 2, 5)
    forward = lambda batch, rows, categories: (v, f[..., :rows.shape[2]])
    slate_losses(Config(), "iql", forward, forward, s, 1.0, .5, 6)
    ended, quits, cut = targets[0].view(3, 2)
    assert ended[1] == quits[1] == .25 and cut[1] == .25 + .5 * v[2, 2]
    assert torch.equal(targets[0].view(3, 2)[:, 0], .5 + .5 * v[:, 1])
    slate_losses(Config(), "myopic", forward, forward, s, 1.0, 0.0, 6)
    assert torch.equal(targets[1], torch.tensor([.5, .25] * 3))                # no bootstrap anywhere


def agent_and_sessions(seed=0, **settings):
    found = sessions.world_log(slate.World(0), 7, num_users=6, horizon=3, slate_size=2, images_per_prompt=1)
    s = rectangles(found.log, np.linspace(0, 1, 18))
    agent = new_agent(SlateAgentConfig(hidden_size=16, num_layers=1, max_turns=3, **settings)).init_weights(seed)
    with torch.no_grad():
        for name, p in agent.named_parameters():                               # heads start at 0, where nothing flows
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * .1)
    return agent, s


@pytest.mark.parametrize("share_trunk", [True, False])
def test_each_loss_reaches_its_own_heads(share_trunk):
    """V never pulls at f, Q never at v; the trunk has both, or each its own."""
    agent, s = agent_and_sessions(share_trunk=share_trunk)
    target = agent_and_sessions(1, share_trunk=share_trunk)[0]
    losses, _ = slate_losses(Config(), "iql", agent, target, s, 1.0, 1.0, 18)
    reached = {}
    for name, loss in losses.items():
        agent.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        reached[name] = {k.split(".")[0] for k, p in agent.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not any(p.grad is not None for p in target.parameters())
    of_v, of_f = {"value", "value_up"}, {"score", "item"}
    assert of_v <= reached["v_loss"] and of_f <= reached["q_loss"] and not of_v & reached["q_loss"] and not of_f & reached["v_loss"]
    shared = {"layers", "role", "turn"}
    assert shared <= reached["q_loss"]
    if share_trunk:
        assert shared <= reached["v_loss"]
    else:
        assert "of_value" in reached["v_loss"] and "of_value" not in reached["q_loss"] and not shared & reached["v_loss"]


def test_the_target_moves_by_rho_only(no_pictures):
    values = TINY | dict(method="iql", save_every=1, rho=.1, lr=.05, warmup_steps=0)
    train_iql.main(Config(name="dummy/one", **values))
    path = Path("out/dummy/one/step_000001")
    settings = checkpoint.read_json(path / "config.json")
    settings.pop("architectures")
    began, now, moved = new_agent(SlateAgentConfig(**settings)).init_weights(random_key(0, "weights") % 2**31), weights(path), checkpoint.load_extra(path)
    for name, start in began.named_parameters():
        if name != "offset":                                                   # which begins at the mean return
            assert torch.allclose(moved[f"target.{name}"], start + .1 * (now[name] - start), atol=1e-6), name
    assert (now["score.down"] - began.score.down).abs().max() > .02


def test_constant_rewards_are_worth_what_is_left_and_only_to_who_knows_the_turn(monkeypatch, no_pictures):
    """v = r (H - t), learned from nothing: the offsets' start at the mean return, which is the answer here, is taken away. Who does not know the turn is off
    by more than half a reward somewhere: a horizon cannot be seen (a known failure, and the reason for the flag's default)."""
    file_of("constant.jsonl", n=40, reward=.3, horizon=5)
    monkeypatch.setattr(train_iql, "mean_returns", lambda s, gamma: torch.zeros(5))
    error = {}
    for turn_number in (True, False):
        train_iql.main(Config(name="dummy/c", overwrite=True, data="constant.jsonl", **TINY | dict(
            method="iql", num_steps=150, batch_size=24, lr=.02, rho=.3, turn_number=turn_number, val_people=1, horizon=5)))
        agent = load_agent("out/dummy/c/iql")[0]
        log = slate.read("constant.jsonl")
        s = rectangles(log, log.reward)
        with torch.no_grad():
            v = agent(s.batch, s.candidates, s.categories)[0][:, :5].double()
        error[turn_number] = float((v.mean(0) - tensor(1.5, 1.2, .9, .6, .3)).abs().max())
    assert error[True] < .12 and error[False] > max(.2, 2 * error[True]), error


# -----------------------------------------------------------------------------
# The small world


def exact(world, policy):
    """Utility per turn of a policy in the small world: of 32 persons, each picks its own sequence of columns and weighs what it is likely to."""
    n, weight = 2 ** world.horizon, np.ones(2 ** world.horizon)
    crowd, generator = SmallCrowd(world, n), SmallGenerator(world)

    def probabilities(utilities, turn):
        which = np.arange(n) >> turn & 1
        weight[:] *= slate.softmax(world.tau * utilities)[np.arange(n), which]
        return np.eye(2)[which]
    crowd.probabilities = probabilities
    picked = simulate(crowd, [generator.start] * n, policy, slate_size=2, images_per_prompt=1, propose=generator, keep=False).picked
    assert abs(weight.sum() - 1) < 1e-9
    return float(weight @ picked.mean(1))


def table_policy(world, table):
    """A table (5, 36, 10) of one pair for each turn and state, as an agent would show them."""
    def policy(view, facts):
        states = [sessions.small_state(world, view.texts.texts[b]) for b in view.base]
        return np.array([world.PAIRS[table[view.turn, s].argmax()] for s in states]), "table"
    return policy


@pytest.mark.parametrize("novelty", [0.0, .4])
def test_the_crowd_is_the_small_world(novelty):
    """Policies that are tables are worth in simulation what dynamic programming says; random slates, of many persons, to three standard errors."""
    world = slate.SmallWorld(novelty)
    for table in (world.greedy(), world.greedy(0.0), world.mean_form(), world.mean_form(0.0)):
        assert abs(exact(world, table_policy(world, table)) - world.value(table)) < 1e-9
    generator = SmallGenerator(world)
    picked = simulate(SmallCrowd(world, 3000), [generator.start] * 3000, random_policy, seed=1, slate_size=2, images_per_prompt=1, propose=generator,
                      keep=False).picked.mean(1)
    assert abs(picked.mean() - world.value(world.random())) < 3 * picked.std() / 3000 ** .5
    texts = {t for s in world.STATES for _, t in generator("start style{} details{} off{}".format(*s), 0, 0, 0)}
    crowd = SmallCrowd(world, 1)
    assert np.allclose(np.linalg.norm(crowd.embed(sorted(texts)), axis=1), 1)
    assert [c for c, _ in generator(generator.start, 0, 0, 0)] == list(slate.CATEGORIES)


@pytest.mark.parametrize("values", [dict(slate_size=3), dict(candidates_per_category=2), dict(max_per_category=0), dict(horizon=4), dict(evaluate="world"),
                                    dict(simulator="world"), dict(generator="url:http://localhost:1")])
def test_the_small_world_is_played_by_its_own_rules_only(values):
    with pytest.raises(ValueError, match="small world.*--slate_size=2 --candidates_per_category=1 --max_per_category=1 --horizon=5"):
        train_iql.main(Config(**SMALL | values))


def learned(novelty, method, **values):
    """{method: exact utility per turn} of agents that learned from random slates. The last step stays: to select steps by simulated people is a search
    among policies of its own, which finds .78 even for clones of random slates."""
    train_iql.main(Config(name="dummy/small", overwrite=True, novelty=novelty, method=method, **SMALL | dict(
        hidden_size=32, num_layers=1, expectile=.9, eval_people=20, val_people=20, eval_every=0) | values))
    world = slate.SmallWorld(novelty)
    return {m: exact(world, agent_policy(load_agent(f"out/dummy/small/{m}")[0])) for m in method.split(",")}


def test_the_learned_agent_beats_any_that_looks_one_turn_ahead_where_that_pays(no_pictures):
    """With quick wins, IQL is .05 above the best slates for one turn (.636), which myopic learns exactly, and at most .04 below what a mean over items can
    know (.733): over seeds 0 to 2 it was .702, .702, .736, and .734 after 2,000 steps, which are too long for this test. Without quick wins both are
    level: an agent that reads its whole history may be above a table of states (.721), but not above the planner (.755)."""
    world = slate.SmallWorld(.4)
    far, near = world.value(world.mean_form()), world.value(world.mean_form(0.0))
    assert abs(far - .7334) < 1e-4 and abs(near - .6362) < 1e-4
    found = learned(.4, "iql", num_steps=600, lr=.005, rho=.05, sim_sessions=4000)
    assert max(near + .05, far - .04) < found["iql"] < world.value(world.greedy()) + 1e-9, found
    short = dict(num_steps=120, lr=.01, rho=.1, sim_sessions=2000)
    assert abs(learned(.4, "myopic", **short)["myopic"] - near) < .02
    world, found = slate.SmallWorld(0.0), learned(0.0, "iql,myopic", **short)
    for value in found.values():
        assert world.value(world.mean_form()) - .02 < value < world.value(world.greedy()) + 1e-9, found


# -----------------------------------------------------------------------------
# One gradient, however a batch is cut


def stirred(init=SlateAgent.init_weights):
    """Heads start at 0, behind which no gradient flows: init_weights that leaves nothing at 0."""
    def init_weights(self, seed):
        init(self, seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * .1)
        return self
    return init_weights


def uneven(path):
    """Sessions of which every third has a turn less: a mean over sessions, or micro-batches, would weigh its turns more."""
    file_of(path, n=30, reward=.3)
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rng = np.random.default_rng(0)
    for number, line in enumerate(lines):
        line["turns"] = line["turns"][:2 if number % 3 == 0 else 3]
        for turn in line["turns"]:
            turn["reward"] = float(rng.normal())
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


CUT = TINY | dict(num_steps=1, data="uneven.jsonl", batch_size=12)


def gradients(monkeypatch, name, **values):
    """[gradient of each parameter] of the first step, as the optimizer meets it, and what was logged."""
    found, step = {}, torch.optim.AdamW.step

    def record(self, *args):
        found.setdefault("grads", [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])
        return step(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record)
        patch.setattr(SlateAgent, "init_weights", stirred())
        patch.setattr(train_iql, "finish_slate", lambda *args: None)
        train_iql.main(Config(name=f"dummy/{name}", **CUT | values))
    return found["grads"], metrics(f"dummy/{name}")[0]


def close(a, b):
    scale = max(float(g.abs().max()) for g in a)
    return len(a) == len(b) and sum(float(g.abs().max()) > 0 for g in a) > 10 and all(torch.allclose(x, y, rtol=0, atol=1e-6 * scale) for x, y in zip(a, b))


EVERYTHING = dict(method="iql", slate_value="choice", cql_alpha=.5)


@pytest.mark.parametrize("values", [EVERYTHING, dict(method="bc")])
def test_the_gradient_is_equal_for_every_micro_batch(values, monkeypatch):
    uneven("uneven.jsonl")
    whole, logged = gradients(monkeypatch, "whole", **values)
    for size in (5, 1):
        cut, also = gradients(monkeypatch, f"cut{size}", device_batch_size=size, **values)
        assert close(whole, cut), size
        for k in (k for k in logged if k.startswith("train/")):
            assert also[k] == pytest.approx(logged[k], rel=1e-5, abs=1e-7), k


RANKS = """
import sys
sys.path.insert(0, TESTS)
import torch
import train_iql
from slate_agent import SlateAgent
from test_train_iql import stirred
SlateAgent.init_weights = stirred()
step, number = torch.optim.AdamW.step, [0]
def record(self, *args):
    if torch.distributed.get_rank() == 0 and number[0] in (0, 2):                    # the first steps of both methods
        torch.save([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None], f"ranks{number[0]}.pt")
    number[0] += 1
    return step(self, *args)
torch.optim.AdamW.step = record
train_iql.main(train_iql.parse_config(train_iql.Config))
"""


def test_two_ranks(monkeypatch):
    """The gradients of one, for two methods in turn, the second of which leaves v alone; every rank trains what rank 0 reports."""
    uneven("uneven.jsonl")
    Path("ranks.py").write_text(RANKS.replace("TESTS", repr(str(ROOT / "tests"))))
    values = CUT | dict(num_steps=2, eval_every=1, share_trunk="false", device_batch_size=4)
    out = run("ranks.py", *flags(name="dummy/two", **values | dict(method="iql,bc")), ranks=2)
    assert json.loads(out.strip().splitlines()[-1])["name"] == "dummy/two"
    for number, method in ((0, "iql"), (2, "bc")):
        alone, logged = gradients(monkeypatch, f"one_{method}", method=method, share_trunk=False, num_steps=2)
        assert close(alone, torch.load(f"ranks{number}.pt", weights_only=True)), method
        also = next(m for m in metrics("dummy/two") if m["step"] == number + 1)
        for k in (k for k in logged if k.startswith("train/")):
            assert also[k] == pytest.approx(logged[k], rel=1e-5, abs=1e-7), k


# -----------------------------------------------------------------------------
# Resume


def test_kill_9_in_the_second_method_and_resume_is_exact(no_pictures):
    """Metrics, the weights of both methods as selected and results are bitwise those of a run that never stopped."""
    values = TINY | dict(method="iql,bc", num_steps=60, save_every=20, eval_every=30, log_every=10)
    train_iql.main(Config(name="dummy/whole", **values))
    process = run(SCRIPT, *flags(name="dummy/killed", **values), wait=False)
    while not Path("out/dummy/killed/step_000080").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(.002)
    kill_9(process)
    assert not Path("out/dummy/killed/step_000120").exists() and not Path("out/dummy/killed/results.json").exists()
    with pytest.raises(ValueError, match="--lr=0.001; resume with the same"):
        train_iql.main(Config(name="dummy/killed", resume="latest", lr=.1, **values))
    train_iql.main(Config(name="dummy/killed", resume="out/dummy/killed/step_000080", **values))
    for part in ("iql", "bc", "step_000020", "step_000060", "step_000080", "step_000100", "step_000120"):
        assert same(weights(f"out/dummy/whole/{part}"), weights(f"out/dummy/killed/{part}")), part
    a, b = (checkpoint.load_extra(f"out/dummy/{name}/step_000100") for name in ("whole", "killed"))
    assert same(a, b) and metrics("dummy/whole") == metrics("dummy/killed")
    a, b = (json.loads(Path(f"out/dummy/{name}/results.json").read_text()) for name in ("whole", "killed"))
    assert all(a[k] == b[k] for k in ("results", "best", "history"))


def test_kill_9_of_two_ranks_and_resume_is_exact():
    values = TINY | dict(method="iql,bc", num_steps=40, save_every=20, eval_every=0, log_every=10, device_batch_size=2)
    run(SCRIPT, *flags(name="dummy/whole", **values), ranks=2)
    process = run(SCRIPT, *flags(name="dummy/killed", **values), ranks=2, wait=False)
    while not Path("out/dummy/killed/step_000060").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(.002)
    kill_9(process)
    assert not Path("out/dummy/killed/results.json").exists()
    run(SCRIPT, *flags(name="dummy/killed", resume="latest", **values), ranks=2)
    for part in ("iql", "bc", "step_000060", "step_000080"):
        assert same(weights(f"out/dummy/whole/{part}"), weights(f"out/dummy/killed/{part}")), part
    assert metrics("dummy/whole") == metrics("dummy/killed")


# -----------------------------------------------------------------------------
# What a run leaves


def test_a_run_and_its_report(capsys):
    """The last line is JSON, and the agent in out/<name>/iql plays what results.json and report.md say of it; the pictures are there."""
    values = TINY | dict(method="iql,myopic,bc,oracle", num_steps=4, eval_every=2, sim_sessions=60, eval_people=20, lr=.01, critique=.3)
    cfg = Config(name="dummy/r", **values)
    gammas, original = [], train_iql.slate_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_iql, "slate_losses", lambda *args: gammas.append((args[1], args[6])) or original(*args))
        train_iql.main(cfg)
    assert list(dict.fromkeys(gammas)) == [("iql", 1.0), ("myopic", 0.0), ("bc", 1.0)] and gammas.count(("iql", 1.0)) == 8          # the oracle is IQL, too
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    found = json.loads(Path("out/dummy/r/results.json").read_text())
    assert set(found["results"]) == {"world"} and set(found["results"]["world"]) == {"base", "random", "iql", "myopic", "bc", "oracle_greedy", "oracle_type"}
    report = Path("out/dummy/r/report.md").read_text()
    for policy, r in found["results"]["world"].items():
        assert last[f"world {policy}"] == dict(mean=round(r["mean"], 4), last_turn=round(r["last_turn"], 4))
        assert f"| {policy} | {r['mean']:.4f} | {r['last_turn']:.4f} |" in report
    for name in ("utility.png", "storyboard.png"):
        assert (Path("out/dummy/r") / name).read_bytes()[:4] == b"\x89PNG"
    # deployment: the folder alone plays the evaluation again
    agent, deployment = load_agent("out/dummy/r/iql")
    assert deployment[:4] == ("template x 2", 2, 3, 1) and load_agent(last["checkpoint"])[1] == deployment
    seed = random_key(0, "held out") % 2**31
    crowds = train_iql.open_crowds(cfg)
    picked = simulate(crowds.make("world", 20, seed), slate.start_prompts(20, seed)[0], agent_policy(agent), seed=seed, keep=False,
                      **train_iql.settings_of(cfg, train_iql.open_generator("template", num=2))).picked
    assert float(picked.mean()) == found["results"]["world"]["iql"]["mean"]
    best = found["best"]["iql"]
    assert max(h["eval/utility"] for h in found["history"] if h["stage"] == "iql") == best["score"] and best["step"] in (2, 4)
    # the oracle alone reads types, and clones alone have no value to train
    assert load_agent("out/dummy/r/oracle_world")[0].config.num_kinds == 4 and agent.config.num_kinds == 0


def test_dry_run_prints_every_setting_and_leaves_nothing(capsys):
    train_iql.main(Config(dry_run=True, method="all", **TINY | dict(num_steps=7)))
    found = json.loads(capsys.readouterr().out)
    assert found["num_steps"] == 7 and found["gamma"] == 1.0 and found["stages"] == ["iql", "myopic", "bc", "oracle_world"] and found["memory_mb"]["weights"] > 0
    assert not Path("out").exists()


# -----------------------------------------------------------------------------
# Sessions of files, of user models, of both


def test_rewards_of_a_file_are_what_is_learned(no_pictures, capsys):
    file_of("given.jsonl", reward=.3)
    train_iql.main(Config(data="given.jsonl", **TINY | dict(method="iql", reward_scale="none")))
    out = capsys.readouterr().out
    assert "30 sessions of 30 people, 90 turns, reward 0.3000" in out and metrics()[0]["train/below"] <= 1


def test_a_file_without_rewards_needs_a_user_model(users, no_pictures, capsys):
    file_of("silent.jsonl")
    with pytest.raises(ValueError, match="silent.jsonl: 90 turns have no reward; --reward_source=model"):
        train_iql.main(Config(data="silent.jsonl", **TINY))
    with pytest.raises(ValueError, match="--reward_source=model: --simulator must be the folder of a user model"):
        train_iql.main(Config(data="silent.jsonl", reward_source="model", **TINY))
    with pytest.raises(ValueError, match="--embeddings is empty"):
        train_iql.main(Config(data="silent.jsonl", reward_source="model", simulator=users, **TINY))
    values = dict(reward_source="model", simulator=users, embeddings="silent.npz")
    train_iql.main(Config(data="silent.jsonl", evaluate=f"world,{users}", **values, **TINY | dict(method="iql,oracle")))
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {"world iql", "users iql", "world oracle_type"} <= set(last) and "users oracle_type" not in last
    # what a user model says stands for all turns, also where somebody wrote rewards of another scale
    cfg = Config(data="given.jsonl", **values | dict(embeddings="given.npz"), **TINY)
    file_of("given.jsonl", reward=99)
    _, rewards, _, _ = train_iql.open_sessions(cfg, train_iql.open_crowds(cfg), None, "")
    assert np.abs(rewards).max() < 10


def test_rewards_of_a_user_model_against_a_loop(users):
    """sum_k g(k) R_k(pick), g from all picks and comparisons of a user, over sessions that stand apart in the file."""
    model = load_user_model(checkpoint.newest(users))[0]
    with torch.no_grad():                                                      # types that differ, or any posterior would do
        for p in (model.taste, model.up, model.down):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        model.log_prior.copy_(torch.tensor([.3, .7]).log())
    found = sessions.world_log(slate.World(0), 7, num_users=5, num_sessions=2, horizon=3, slate_size=2, images_per_prompt=2)
    log = found.log.take([7, 0, 3, 1, 9, 2, 8, 4, 6, 5])
    emb = {name: torch.from_numpy(e.astype(np.float32) / np.linalg.norm(e.astype(np.float32))) for name, e in zip(found.ids, found.emb)}
    R, score = {}, {u: model.log_prior.detach().double() for u in range(5)}
    tau_choice, tau_compare = (float(model.tau(name).detach()) for name in ("choice", "compare"))
    with torch.no_grad():
        for s in range(10):
            before = None
            for t, n in enumerate(range(log.first[s], log.first[s + 1])):
                images = torch.stack([torch.stack([emb[log.image_ids[i]] for i in column]) for column in log.images[n]])
                R[n] = model.utilities(emb[log.texts[log.prompt[s]]][None], emb[log.texts[log.base[n]]][None], images[None])[0].double()       # (L, K)
                picked = R[n][log.choice[n]]
                score[log.user[s]] = score[log.user[s]] + tau_choice * picked - (tau_choice * R[n]).logsumexp(0)
                if t and log.compare[n] in (1, -1):
                    score[log.user[s]] = score[log.user[s]] + torch.nn.functional.logsigmoid(int(log.compare[n]) * tau_compare * (picked - before))
                before = picked
    got = sessions.label_rewards(model, log, (found.ids, found.emb))
    spread = [float(score[u].softmax(0)[0]) for u in range(5)]
    assert max(spread) - min(spread) > .1
    for s in range(10):
        for n in range(log.first[s], log.first[s + 1]):
            assert got[n] == pytest.approx(float((score[log.user[s]].softmax(0) * R[n][log.choice[n]]).sum()), abs=1e-5)
    # less the levels of the types, which picks are silent about
    shares = np.array([score[log.user[s]].softmax(0).numpy() for s in log.session])
    picked = np.array([R[n][log.choice[n]].numpy() for n in range(len(log.choice))])
    centered = (shares * (picked - (shares * picked).sum(0) / shares.sum(0))).sum(1)
    assert np.allclose(sessions.label_rewards(model, log, (found.ids, found.emb), center=True), centered, atol=1e-5)


def test_levels_of_types_are_no_reward(users, monkeypatch, no_pictures):
    """A constant added to all utilities of a type changes no pick, and with --center_types no reward either; without, it is most of what is learned from."""
    assert np.allclose(sessions.type_levels(np.array([1.0, 3, 10]), np.array([[1, 0], [1, 0], [0, 1.0]])), [2, 10])
    propose, found = train_iql.open_generator("template", num=2), {}
    for shift in (0.0, 5.0):
        for center in (True, False):
            cfg = Config(**TINY | dict(simulator=users, sim_sessions=60, center_types=center))
            crowds = train_iql.open_crowds(cfg)
            model, original = crowds.models[users], crowds.models[users].utilities
            with torch.no_grad():                                             # types that differ
                model.taste.copy_(torch.randn(model.taste.shape, generator=torch.Generator().manual_seed(3)))
            monkeypatch.setattr(model, "utilities", lambda *x, shift=shift, original=original: original(*x) + torch.tensor([0.0, shift]))
            log, rewards, _, kinds = train_iql.open_sessions(cfg, crowds, propose, users)
            found[shift, center] = log.choice, rewards, kinds
    (picks, rewards, kinds), (same_picks, same_rewards, _) = found[0.0, True], found[5.0, True]
    assert len(set(kinds)) == 2 and np.array_equal(picks, same_picks) and np.allclose(rewards, same_rewards, atol=1e-5) and rewards.std() > .01
    of_turn = kinds[log.session]
    assert all(abs(rewards[of_turn == k].mean()) < 1e-9 for k in (0, 1))
    assert np.allclose(found[5.0, False][1] - found[0.0, False][1], 5.0 * of_turn, atol=1e-5)


def test_types_of_simulated_people_follow_real_users(users, no_pictures):
    """--sim_types=FILE: each is a user's, drawn by what the user model says of the user's picks; without, the model's own shares."""
    table = np.array([[1.0, 0, 0], [0, 1.0, 0], [.2, .3, .5]])
    kinds = sessions.types_from(table, 30_000, 0)
    assert np.allclose(np.bincount(kinds, minlength=3) / 30_000, table.mean(0), atol=.01)
    assert np.array_equal(kinds, sessions.types_from(table, 30_000, 0)) and not np.array_equal(kinds, sessions.types_from(table, 30_000, 1))
    file_of("silent.jsonl")
    values = TINY | dict(simulator=users, sim_sessions=400)
    cfg = Config(sim_types="silent.jsonl", embeddings="silent.npz", **values)
    crowds = train_iql.open_crowds(cfg)
    with torch.no_grad():
        crowds.models[users].log_prior.copy_(torch.tensor([.02, .98]).log())
    propose = train_iql.open_generator("template", num=2)
    posterior, _ = sessions.posterior_of_users(crowds.models[users], slate.read("silent.jsonl", 2, True), train_iql.open_embeddings("silent.npz"))
    *_, kinds = train_iql.open_sessions(cfg, crowds, propose, users)
    assert len(kinds) == 400 and np.mean(kinds) == pytest.approx(float(posterior[:, 1].mean()), abs=.05)
    *_, prior = train_iql.open_sessions(Config(**values), crowds, propose, users)
    assert np.mean(prior) == pytest.approx(.98, abs=.03)
    for change in (dict(sim_types="no.jsonl"), dict(simulator="world"), dict(sim_types="posterior")):
        with pytest.raises(ValueError, match="--sim_types=.*expected prior, or a file of sessions"):
            train_iql.main(Config(**dict(sim_types="silent.jsonl", embeddings="silent.npz", **values) | change))


def test_mixtures_are_sampled_by_weight(monkeypatch, no_pictures):
    """real:3,simulated:1: three sessions of four come from the file, though it has 20 and 60 are simulated."""
    file_of("real.jsonl", n=20, reward=50)
    seen, original = [], train_iql.slate_losses

    def losses(*args):
        seen.extend((args[4].reward[:, 0] == 50).tolist())
        return original(*args)
    monkeypatch.setattr(train_iql, "slate_losses", losses)
    monkeypatch.setattr(train_iql, "finish_slate", lambda *args: None)
    train_iql.main(Config(data="real.jsonl:3,simulated:1", **TINY | dict(method="bc", sim_sessions=60, batch_size=200, num_steps=5)))
    assert len(seen) == 1000 and abs(np.mean(seen) - .75) < .06                # the shares that are held out differ a little
    cfg = Config(data="real.jsonl:3,simulated:1", **TINY)
    log, _, share, kind = train_iql.open_sessions(cfg, train_iql.open_crowds(cfg), train_iql.open_generator("template", num=2), "")
    real = np.array(log.source) == "human"
    assert real.sum() == 20 and share[real].sum() == pytest.approx(3 * share[~real].sum()) and kind is None


def test_people_of_a_user_model(users):
    """Sessions whose utilities are the model's, of each person's type; strangers of other types by the prior; comparisons by the model's temperature."""
    model = load_user_model(checkpoint.newest(users))[0].requires_grad_(False)
    model.log_prior.copy_(torch.tensor([.2, .8]).log())
    world = slate.World(0)
    crowd = ModelCrowd(model, 400, 5, world.embed)
    assert abs((crowd.kind == 1).mean() - .8) < .06 and crowd.num_kinds == 2
    other = stranger(crowd, 1, 0)
    assert abs((other.kind == 1).mean() - .8) < .06 and (other.kind != crowd.kind).any() and crowd.kind is not other.kind
    starts = slate.start_prompts(400, 5)[0]
    s = simulate(crowd, starts, random_policy, seed=5, horizon=2, slate_size=2, images_per_prompt=2, critique=.5)
    emb = dict(zip(s.ids, s.emb.astype(np.float32)))
    n = s.log.first[7] + 1                                                     # the second turn of the eighth person
    images = np.stack([[emb[s.log.image_ids[i]] for i in column] for column in s.log.images[n]])[None]
    u = model.utilities(torch.from_numpy(world.embed([starts[7]])), torch.from_numpy(world.embed([s.log.texts[s.log.base[n]]])), torch.from_numpy(images))
    assert np.allclose(s.utility[7, 1], u[0, :, crowd.kind[7]], atol=1e-5) and set(s.log.compare.reshape(400, 2)[:, 1]) == {1, -1}
    assert any(s.log.critique) and all(c in [""] + [f"more {w}" for w in slate.STYLES] for c in s.log.critique)
    noise = torch.special.ndtri(torch.linspace(.0005, .9995, 1000, dtype=torch.float64)).numpy()
    for gain in (-.2, .1):
        share = (crowd.compared(np.full(1000, gain), noise) == 1).mean()
        assert abs(share - 1 / (1 + math.exp(-float(model.tau("compare")) * gain))) < .002
    p = crowd.probabilities(s.utility[:, 0], 0)
    assert np.allclose(np.log(p[:, 1] / p[:, 0]), float(model.tau("choice")) * (s.utility[:, 0, 1] - s.utility[:, 0, 0]))


# -----------------------------------------------------------------------------
# Variants


def test_a_session_that_is_written_out(no_pictures, capsys):
    """encoder=text from sessions to report; an evaluation in between does not change what is trained on."""
    values = dict(encoder="text", method="iql,bc", **TINY | dict(sim_sessions=12, batch_size=3, eval_people=2, val_people=2, horizon=2, candidates_per_category=1, lr=.01))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_iql, "slate_stats", lambda *args: {})
        train_iql.main(Config(name="dummy/a", save_every=2, **values))
        assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["world iql"]["mean"]
        train_iql.main(Config(name="dummy/b", save_every=2, **values | dict(eval_every=1)))
    a, b = (weights(f"out/dummy/{name}/step_000002") for name in "ab")
    assert same(a, b) and load_agent("out/dummy/a/iql")[1].tokenizer is not None
    before = Texts(["one"])
    agent = load_agent("out/dummy/a/iql")[0]
    agent.texts = before
    simulate(sessions.WorldCrowd(slate.World(0), 2, 1), ["a fox", "an owl"], agent_policy(agent), horizon=1, slate_size=2)
    assert agent.texts is before


@pytest.mark.parametrize("values", [dict(share_trunk=False), dict(slate_value="choice"), dict(cql_alpha=.5), dict(turn_number=False), dict(critique=.5)])
def test_variants_change_what_they_should(values, no_pictures):
    train_iql.main(Config(name="dummy/plain", **TINY | dict(method="iql", num_steps=4, lr=.01)))
    train_iql.main(Config(name="dummy/other", **TINY | dict(method="iql,bc", num_steps=4, lr=.01), **values))
    plain, other, clone = (weights(f"out/dummy/{x}") for x in ("plain/iql", "other/iql", "other/bc"))
    logged = metrics("dummy/other")[0]
    assert ("of_value.role.weight" in other) == ("share_trunk" in values) == ("of_value.role.weight" in clone)
    assert other["score.down"].shape[0] == (3 if "slate_value" in values else 2) and clone["score.down"].shape[0] == 1
    assert ("train/choice_loss" in logged) == ("slate_value" in values) and ("train/cql_loss" in logged) == ("cql_alpha" in values)
    assert not torch.equal(plain["score.up"], other["score.up"][:2])
    if "turn_number" in values:
        began = new_agent(load_agent("out/dummy/other/iql")[0].config).init_weights(random_key(0, "weights") % 2**31)
        rest = other["turn.weight"][1:] / began.turn.weight[1:].detach()
        assert (rest - rest[0, 0]).abs().max() < 1e-5                          # but for decay, rows of later turns are never read


# -----------------------------------------------------------------------------
# Settings that cannot be meant


@pytest.mark.parametrize("values, message", [
    (dict(method="iql,dqn"), "--method=dqn: expected some of iql, myopic, bc, oracle"), (dict(method="iql,iql"), "--method=iql,iql names a method twice"),
    (dict(behavior="random:.5,greedy"), "--behavior=.*'greedy'"), (dict(behavior="random:many"), "--behavior=.*'many' is no number"),
    (dict(expectile=1.0), "--expectile in"), (dict(gamma=1.5), "--gamma in"), (dict(rho=0.0), "--rho in"), (dict(val_share=0.0), "--val_share in"),
    (dict(val_share=.001), "--val_share=0.001: .* are left to train on, 0 to hold out"), (dict(slate_size=6), "--slate_size=6: 5 categories"),
    (dict(batch_size=0), "--batch_size=0: expected at least 1"), (dict(critique=2.0), "--critique=2.0"), (dict(hidden_size=10), "width that is a multiple"),
    (dict(novelty=-1.0), "novelty -1.0"), (dict(candidates_per_category=9), "--candidates_per_category=9"), (dict(generator="magic"), "--generator=magic"),
    (dict(simulator="nowhere"), "nowhere: no config.json and origin.json there"), (dict(encoder="text", share_trunk=False), "--share_trunk=false"),
    (dict(init="out/x"), "--init=out/x: expected --encoder=text"), (dict(data="none.jsonl"), "--data=none.jsonl: no file"),
    (dict(data="given.jsonl:x"), "--data=given.jsonl:x: 'x' is no number"), (dict(data="given.jsonl:0"), "--data=given.jsonl:0: expected weights above 0"),
    (dict(data="empty.jsonl"), "empty.jsonl: empty"), (dict(data="given.jsonl", slate_size=3), "given.jsonl:1: .* 2 columns of 1 images, expected 3 .*--slate_size"),
    (dict(data="given.jsonl,simulated", images_per_prompt=2), "logs of different slates"), (dict(embeddings="clip:nowhere"), "nowhere"),
])
def test_settings_that_cannot_be_meant_stop_the_run_and_lose_nothing(values, message):
    file_of("given.jsonl", n=10, reward=1)
    Path("empty.jsonl").touch()
    Path("out/dummy/step_000005").mkdir(parents=True)
    Path("out/dummy/step_000005/checkpoint.json").touch()
    with pytest.raises((ValueError, OSError), match=message):
        train_iql.main(Config(name="dummy", overwrite=True, **TINY | values))
    assert Path("out/dummy/step_000005").exists() or "val_share" in values


def test_user_models_that_do_not_fit(users, tmp_path):
    shutil.copytree(checkpoint.newest(users), tmp_path / "clipped")
    origin = json.loads((tmp_path / "clipped/origin.json").read_text())
    (tmp_path / "clipped/origin.json").write_text(json.dumps(origin | dict(embeddings="clip900")) + "\n")
    with pytest.raises(ValueError, match="clipped: fitted to embeddings of clip900, here texts are embedded by world 0"):
        train_iql.main(Config(simulator=str(tmp_path / "clipped"), **TINY))
    shutil.copytree(users, tmp_path / "users")
    with pytest.raises(ValueError, match="have one name in the tables"):
        train_iql.main(Config(simulator=str(tmp_path / "users"), evaluate=f"world,{users}", **TINY))


def test_a_loss_that_is_not_finite_stops_the_run():
    file_of("huge.jsonl", reward=1e30)
    with pytest.raises((ValueError, FloatingPointError, RuntimeError), match="train/"):
        train_iql.main(Config(data="huge.jsonl", **TINY | dict(method="iql", reward_scale="none")))
