"""Plain implicit Q-learning: losses by hand and in float64, answers that are known, one gradient however a batch is cut, exact resume, errors."""
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train_sft import flags, kill_9, metrics, run

import checkpoint
import train_iql
from data import offline
from offline_agent import MLP, OfflineAgent, OfflineAgentConfig
from train_iql import expectile_loss, losses_of, policy_loss, q_loss, td_target, update_target

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train_iql.py")
SMALL = dict(width=16, num_episodes=40, num_steps=6, batch_size=32, device_batch_size=32, eval_every=3, num_games=4, log_every=1)
Config = lambda **values: train_iql.resolved(train_iql.Config(task="offline", **values))
tensor = lambda *x: torch.tensor(x, dtype=torch.float64)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def last_step(name):
    return checkpoint.step_folders(Path("out") / name)[-1]


def agent_of(name):
    path = last_step(name)
    settings = checkpoint.read_json(path / "config.json")
    assert settings.pop("architectures") == ["OfflineAgent"]
    return checkpoint.load_weights(path, OfflineAgent(OfflineAgentConfig(**settings)))


# -----------------------------------------------------------------------------
# The losses


def test_losses_by_hand():
    """u = 1, -1, 2 at expectile .7: .7 + .3 + 2.8. y = 1 + .9 * 2 where it goes on, 1 where it ended. Weights e^.5 and the bound 3 where e^2 is above it."""
    assert abs(expectile_loss(tensor(1, -1, 2), .7, 4).item() - 3.8 / 4) < 1e-12
    assert abs(expectile_loss(tensor(1, -1, 2), .5, 1).item() - 3) < 1e-12                  # .5: half of the squares
    assert torch.allclose(td_target(tensor(1, 1), tensor(0, 1), tensor(2, 2), .9), tensor(2.8, 1))
    assert abs(q_loss(tensor([1, 2], [3, 5]), tensor(2, 2), 4).item() - (1 + 0 + 1 + 9) / 4) < 1e-12
    logps = tensor(math.log(.5), math.log(.25))
    assert abs(policy_loss(logps, tensor(.5, 2), 1.0, 3.0, 2).item() - (math.exp(.5) * math.log(2) + 3 * math.log(4)) / 2) < 1e-12
    assert abs(policy_loss(logps, tensor(1e6, -1e6), 3.0, 100.0, 1).item() - 100 * math.log(2)) < 1e-9           # no overflow


def test_signs():
    """A step against the gradient raises v where the target is above it, and the log-probability of every action, most where the advantage is."""
    v = tensor(0, 0).requires_grad_()
    expectile_loss(tensor(1, -1) - v, .7, 1).backward()
    assert torch.allclose(v.grad, tensor(-1.4, .6))
    logps = tensor(-1, -1).requires_grad_()
    policy_loss(logps, tensor(.1, 0), 1.0, 100.0, 1).backward()
    assert torch.allclose(logps.grad, tensor(-math.exp(.1), -1))
    qs = tensor([0, 0], [1, 1]).requires_grad_()
    q_loss(qs, tensor(1, -1), 2).backward()
    assert torch.allclose(qs.grad, tensor([-1, 1], [0, 2]))


def test_losses_against_loops_in_float64():
    g = torch.Generator().manual_seed(0)
    qs, target, v, v_next, r, logps = (torch.randn(*shape, 50, generator=g, dtype=torch.float64) for shape in ((2,), (2,), (), (), (), ()))
    terminal = (torch.rand(50, generator=g) < .3).double()
    e, gamma, beta, clip = .8, .95, 3.0, 5.0
    fit_v = fit_pi = fit_q = 0.0
    for n in range(50):
        u = min(float(target[0, n]), float(target[1, n])) - float(v[n])
        fit_v += (e if u > 0 else 1 - e) * u * u / 64
        fit_pi -= min(math.exp(beta * u), clip) * float(logps[n]) / 64
        y = float(r[n]) + (0 if terminal[n] else gamma * float(v_next[n]))
        fit_q += sum((float(qs[i, n]) - y) ** 2 for i in range(2)) / 64
    u = target.amin(0) - v
    assert abs(expectile_loss(u, e, 64).item() - fit_v) < 1e-12
    assert abs(policy_loss(logps, u, beta, clip, 64).item() - fit_pi) < 1e-12
    assert abs(q_loss(qs, td_target(r, terminal, v_next, gamma), 64).item() - fit_q) < 1e-12


@pytest.mark.parametrize("e, p, by_hand", [(.7, .25, .4375), (.9, .25, .75), (.5, .25, .25)])
def test_the_minimum_for_a_bernoulli_is_the_closed_form(e, p, by_hand):
    x, v = torch.cat([torch.ones(round(100 * p)), torch.zeros(100 - round(100 * p))]).double(), tensor(.1).requires_grad_()
    optimizer = torch.optim.LBFGS([v], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = expectile_loss(x - v, e, 100)
        loss.backward()
        return loss
    optimizer.step(closure)
    assert abs(v.item() - by_hand) < 1e-6


def test_only_terminal_stops_the_bootstrap():
    """At the last turn the reward is the whole target; cut off by time, the target differs by exactly gamma v(s')."""
    ended, cut = (td_target(torch.tensor([.3]), torch.tensor([t]), torch.tensor([5.0]), .5) for t in (1.0, 0.0))
    assert torch.equal(ended, torch.tensor([.3])) and torch.equal(cut, torch.tensor([.3]) + .5 * 5)


# -----------------------------------------------------------------------------
# Networks and gradients


def tiny(continuous, seed=0):
    """An agent, its target with other weights, and a batch of 12."""
    c = OfflineAgentConfig(0, 3, 0, 2, 8, 2) if continuous else OfflineAgentConfig(5, 0, 4, 0, 8, 2)
    agent, g = OfflineAgent(c).init_weights(seed), torch.Generator().manual_seed(seed)
    target = OfflineAgent(c).init_weights(seed + 1).q.requires_grad_(False)
    if continuous:
        obs, next_obs, actions = (torch.randn(12, n, generator=g) for n in (3, 3, 2))
        actions = actions.tanh()
    else:
        obs, next_obs, actions = (torch.randint(n, (12,), generator=g) for n in (5, 5, 4))
    return agent, target, (obs, actions, torch.randn(12, generator=g), next_obs, (torch.rand(12, generator=g) < .3).float())


@pytest.mark.parametrize("continuous", [False, True])
def test_each_loss_reaches_its_own_network_only(continuous):
    agent, target, batch = tiny(continuous)
    losses, _ = losses_of(Config(), agent, agent, target, batch, 12)
    for i, own in enumerate(("v.", "policy.", "q.")):
        grads = torch.autograd.grad(losses[i], [p for p in agent.parameters() if p.requires_grad], retain_graph=True, allow_unused=True)
        for (name, _), grad in zip([(n, p) for n, p in agent.named_parameters() if p.requires_grad], grads):
            reached = name.startswith(own) or (own == "policy." and name == "log_std")
            assert (grad is not None and bool(grad.abs().max() > 0)) == reached, (own, name)
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("continuous", [False, True])
def test_losses_of_a_batch_against_loops(continuous):
    """Networks as chains of torch.nn.functional.linear in float64, one step of the log at a time; the smaller target head decides, both heads learn."""
    agent, target, batch = tiny(continuous)
    cfg = Config(expectile=.8, beta=2.0, weight_clip=1.5, gamma=.9)
    losses, found = losses_of(cfg, agent, agent, target, batch, 20)

    def net(mlp, head, x):
        x = x.double()
        for i, (w, b) in enumerate(zip(mlp.weights, mlp.biases)):
            x = torch.nn.functional.linear(x if i == 0 else x.clamp(min=0), w[head].double().t(), b[head, 0].double())
        return x
    fit = torch.zeros(3, dtype=torch.float64)
    for obs, action, reward, after, terminal in zip(*batch):
        s, t = (obs, after) if continuous else (torch.eye(5)[obs], torch.eye(5)[after])
        q_of = lambda mlp, head: net(mlp, head, torch.cat([s, action]))[0] if continuous else net(mlp, head, s)[action]
        u = min(q_of(target, 0), q_of(target, 1)) - net(agent.v, 0, s)[0]
        out = net(agent.policy, 0, s)
        logp = torch.distributions.Normal(out.tanh(), 1.0).log_prob(action.double()).sum() if continuous else out.log_softmax(0)[action]
        y = reward.double() + .9 * (1 - terminal) * net(agent.v, 0, t)[0]
        fit += torch.stack([(.8 if u > 0 else .2) * u ** 2, -min(math.exp(2 * u.item()), 1.5) * logp, sum((q_of(agent.q, h) - y) ** 2 for h in range(2))]).detach() / 20
    assert torch.allclose(losses.double(), fit, atol=1e-6) and 0 <= found["below"] * 20 <= 12


def test_a_numbered_state_is_a_row_of_the_identity():
    mlp = MLP([5, 8, 3], 2)
    mlp.init_weights(torch.Generator().manual_seed(0))
    states = torch.tensor([0, 4, 4, 2])
    assert torch.allclose(mlp(states), mlp(torch.eye(5)[states]), atol=1e-6) and mlp(states).shape == (2, 4, 3)
    bound = {tuple(p.shape): p.abs().max().item() for p in mlp.parameters()}
    assert .8 / 5 ** .5 < bound[2, 5, 8] <= 5 ** -.5 and .8 / 8 ** .5 < bound[2, 8, 3] <= 8 ** -.5          # nn.Linear's uniform


def test_the_deviation_has_a_floor():
    agent, _, (obs, actions, *_) = tiny(True)
    agent.log_std.data.fill_(-30.0)
    mean = agent.greedy(obs)
    assert mean.abs().max() <= 1 and torch.allclose(agent.logps(obs, mean), torch.full((12,), 2 * (5 - .5 * math.log(2 * math.pi))), atol=1e-4)


def test_the_target_moves_by_rho_only():
    online, target = MLP([3, 4, 1], 2), MLP([3, 4, 1], 2)
    online.init_weights(torch.Generator().manual_seed(0)), target.init_weights(torch.Generator().manual_seed(1))
    before = copy.deepcopy(target)
    update_target(target, online, .25)
    for p, old, new in zip(target.parameters(), before.parameters(), online.parameters()):
        assert torch.allclose(p, .75 * old + .25 * new, atol=1e-7)
    # and in a run of one step: from where Q began, rho of the way to where it is now
    values = SMALL | dict(num_steps=1, eval_every=0, save_every=0)
    train_iql.main(Config(name="dummy/one", rho=.1, lr=.1, **values))
    began, now, moved = OfflineAgent(agent_of("dummy/one").config).init_weights(0), agent_of("dummy/one"), checkpoint.load_extra(last_step("dummy/one"))
    for (name, start), end in zip(began.q.named_parameters(), now.q.parameters()):
        assert (end - start).abs().max() > .05 and torch.allclose(moved[f"target.{name}"], start + .1 * (end - start), atol=1e-6)


def gradients(monkeypatch, name, **values):
    """{parameter: gradient} of the first step."""
    found, step = {}, torch.optim.Adam.step

    def record(self, *args):
        found.setdefault("grads", [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])
        return step(self, *args)
    monkeypatch.setattr(torch.optim.Adam, "step", record)
    train_iql.main(Config(name=f"dummy/{name}", **SMALL | dict(num_steps=1, eval_every=0) | values))
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    return found["grads"]


def close(a, b):
    scale = max(g.abs().max() for g in a)
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=0, atol=1e-6 * float(scale) + 1e-9) for x, y in zip(a, b))


@pytest.mark.parametrize("method", ["iql", "bc"])
def test_the_gradient_is_equal_for_every_micro_batch(method, monkeypatch):
    whole = gradients(monkeypatch, "whole", method=method)
    assert len(whole) == (18 if method == "iql" else 6) and max(g.abs().max() for g in whole) > 0
    for size in (8, 5, 1):
        assert close(whole, gradients(monkeypatch, f"cut{size}", method=method, device_batch_size=size)), size


RANKS = """
import sys
import torch
import train_iql
from train_iql import Config, parse_config
step = torch.optim.Adam.step
def record(self, *args):
    if torch.distributed.get_rank() == 0:
        torch.save([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None], "ranks.pt")
    return step(self, *args)
torch.optim.Adam.step = record
train_iql.main(parse_config(Config))
"""


def test_the_gradient_is_equal_for_two_ranks(monkeypatch):
    Path("ranks.py").write_text(RANKS)
    values = SMALL | dict(num_steps=1, eval_every=0, device_batch_size=8)
    run("ranks.py", *flags(task="offline", name="dummy/two", **values), ranks=2)
    assert close(gradients(monkeypatch, "one"), torch.load("ranks.pt", weights_only=True))
    train_iql.main(Config(name="dummy/alone", **values))
    for key in ("train/v_loss", "train/q_loss", "train/policy_loss", "train/below"):
        assert metrics("dummy/two")[0][key] == pytest.approx(metrics("dummy/alone")[0][key], rel=1e-6), key


# -----------------------------------------------------------------------------
# Resume


def test_kill_9_and_resume_is_exact():
    """Killed between two checkpoints: weights, target, optimizer and metrics are bitwise those of a run that never stopped."""
    values = SMALL | dict(num_steps=300, save_every=50, eval_every=100, log_every=20)
    train_iql.main(Config(name="dummy/whole", **values))
    process = run(SCRIPT, *flags(task="offline", name="dummy/killed", **values), wait=False)
    while not Path("out/dummy/killed/step_000100").exists():
        assert process.poll() is None, process.communicate()
    kill_9(process)
    assert not Path("out/dummy/killed/step_000300").exists()
    train_iql.main(Config(name="dummy/killed", resume="latest", **values))
    a, b = last_step("dummy/whole"), last_step("dummy/killed")
    assert a.name == b.name == "step_000300" and same(weights(a), weights(b)) and same(checkpoint.load_extra(a), checkpoint.load_extra(b))
    assert not same({f"target.{k[2:]}": v for k, v in weights(a).items() if k.startswith("q.")}, checkpoint.load_extra(a))
    a, b = (torch.load(path / "optim_rank0.pt", weights_only=True) for path in (a, b))
    assert str(a) == str(b)
    assert metrics("dummy/whole") == metrics("dummy/killed")


def test_resume_refuses_other_settings_and_init_takes_weights():
    train_iql.main(Config(name="dummy/a", **SMALL))
    with pytest.raises(ValueError, match="--expectile=0.7; resume with the same"):
        train_iql.main(Config(name="dummy/a", resume="latest", expectile=.9, **SMALL))
    with pytest.raises(ValueError, match="already holds step_"):
        train_iql.main(Config(name="dummy/a", **SMALL))
    with pytest.raises(ValueError, match=r"v.weights.0 has shape|shape \[1, 4, 16\]"):
        train_iql.main(Config(name="dummy/b", init="out/dummy/a", **SMALL | dict(width=8)))
    before = metrics("dummy/a")[-1]
    train_iql.main(Config(name="dummy/b", init="out/dummy/a", **SMALL))
    assert metrics("dummy/b")[0]["val/nll"] == before["val/nll"]               # it begins where the other ended


# -----------------------------------------------------------------------------
# Answers that are known


def world(monkeypatch, mdp, num_episodes, most=200):
    monkeypatch.setattr(offline, "open_data", lambda *args: offline.tabular_transitions(mdp, 0, num_episodes, "a table", most))
    return offline.tabular_transitions(mdp, 0, num_episodes, "a table", most)


@pytest.mark.parametrize("expectile", [.5, .9])
def test_the_learned_net_reaches_the_fixed_point(expectile, monkeypatch):
    """A random world of 8 states: v is within .02 of what iteration finds on the log; expectile .5 is the value of the log's policy."""
    rng = np.random.default_rng(0)
    transition = np.zeros((8, 3, 8))
    np.put_along_axis(transition, rng.integers(0, 8, (8, 3, 1)), 1.0, 2)      # a move leads to one place: what is sampled is actions
    transition[:, 0] = np.eye(8)[np.arange(8) // 2]
    mdp = offline.Tabular(transition, np.array([1.0, .2, -.5, .3, .6, -.2, .1, 0]), np.arange(8) == 0, np.append(0, np.full(7, 1 / 7)), rng.dirichlet(np.ones(3), 8))
    data = world(monkeypatch, mdp, 400)
    train_iql.main(Config(name="dummy/fixed", data="table", width=32, lr=1e-3, rho=.05, num_steps=1500, batch_size=1024, device_batch_size=1024, gamma=.9,
                          expectile=expectile, val_share=0.0, eval_every=0))
    seen, counts = offline.empirical(data)
    exact = offline.expectile_values(seen, counts, .9, expectile)
    if expectile == .5:
        assert np.abs(exact - offline.policy_values(seen, seen.behavior, .9)).max() < 1e-8
    with torch.no_grad():
        learned = agent_of("dummy/fixed").values(torch.arange(8)).numpy()
    gap = np.abs(learned - exact)[1:]                                         # nobody acts in the terminal state
    assert gap.max() < .02, gap


def test_iql_beats_the_clone_and_finds_the_optimum(monkeypatch):
    """A corridor of 5 rooms whose log mostly turns back: its mode never arrives, the optimum pays 10 times .9^3."""
    transition, behavior = np.zeros((5, 2, 5)), np.tile([.7, .3], (5, 1))
    for room in range(5):
        transition[room, 0, max(room - 1, 0)] = transition[room, 1, min(room + 1, 4)] = 1
    mdp = offline.Tabular(transition, 10.0 * (np.arange(5) == 4), np.arange(5) == 4, np.eye(5)[0], behavior)
    world(monkeypatch, mdp, 60)
    values = dict(data="corridor", width=32, lr=3e-3, rho=.1, num_steps=500, gamma=.9, expectile=.9, eval_every=0)
    iql, bc = ([train_iql.main(Config(name=f"dummy/{method}{seed}", method=method, seed=seed, **values))["eval/value"] for seed in range(2)]
               for method in ("iql", "bc"))
    assert iql == pytest.approx([10 * .9 ** 3] * 2) and bc == pytest.approx([0, 0])


def test_walks():
    result = train_iql.main(Config(data="walks", width=64, lr=1e-3, rho=.02, num_steps=1500, beta=10.0, eval_every=0))
    assert result["eval/optimality"] >= .98 and result["val/below"] > .1


def test_a_high_expectile_promises_what_the_policy_does_not_hold(monkeypatch):
    """Few samples for a state and action: learned v at the start less the true value of the policy grows with the expectile."""
    world(monkeypatch, offline.sepsis(0, 120), 600)
    found = {e: train_iql.main(Config(name=f"dummy/{e}", data="sepsis", width=64, lr=1e-3, rho=.05, num_steps=1000, gamma=1.0, expectile=e, eval_every=0))
             for e in (.5, .95)}
    assert found[.95]["eval/value_gap"] > found[.5]["eval/value_gap"] + .05 and found[.95]["eval/value_gap"] > .05
    for result in found.values():
        assert {f"{part}/{x}_p{q}" for part in ("train", "val") for x in "qvu" for q in ("05", "50", "95")} | {"train/below", "val/below", "val/bellman"} <= result.keys()
        assert result["train/v_p05"] <= result["train/v_p50"] <= result["train/v_p95"] and 0 < result["val/below"] < 1
    assert found[.95]["val/below"] > found[.5]["val/below"]


def test_cartpole_from_random_actions():
    values = dict(width=64, lr=1e-3, num_steps=3000, eval_every=0)
    iql = train_iql.main(Config(name="dummy/iql", **values))
    bc = train_iql.main(Config(name="dummy/bc", method="bc", **values | dict(num_steps=500)))
    assert iql["eval/return"] >= 350 and bc["eval/return"] <= 60 and 18 < iql["data_return"] < 27


# -----------------------------------------------------------------------------
# Files, flags


def test_a_file_with_vector_actions_and_references():
    rng = np.random.default_rng(0)
    obs, done = rng.normal(size=(600, 3)), np.arange(600) % 20 == 19
    actions = np.tanh(obs[:, :2] * .5)
    np.savez("log.npz", observations=obs * 10 + 5, actions=actions, rewards=np.ones(600), terminals=np.zeros(600, bool), timeouts=done)
    result = train_iql.main(Config(data="log.npz", width=32, lr=3e-3, num_steps=300, eval_every=0, score_random=10.0, score_expert=30.0, log_every=1))
    assert result["data_return"] == 20 and result["data_score"] == 50 and "eval/return" not in result
    lines = [line["train/policy_loss"] for line in metrics() if "train/policy_loss" in line]
    assert result["val/nll"] < .5 < metrics()[0]["val/nll"] if "val/nll" in metrics()[0] else lines[-1] < lines[0]
    agent = agent_of("dummy")
    assert (agent.mean - 5).abs().max() < 1.5 and (agent.std - 10).abs().max() < 1.5                    # with the weights, so that a checkpoint can act
    played = agent.greedy(torch.from_numpy(obs * 10 + 5).float()).numpy()
    assert np.abs(played - actions).mean() < .1


def test_a_file_is_played_in_gymnasium_where_it_is_installed():
    pytest.importorskip("gymnasium")
    data = offline.cartpole(0, 60)
    ends = np.append(data.episode[1:] != data.episode[:-1], True)
    np.savez("log.npz", observations=data.obs, actions=data.actions, rewards=data.rewards, terminals=ends, timeouts=np.zeros_like(ends))
    result = train_iql.main(Config(data="log.npz", env="CartPole-v1", score_random=22.0, score_expert=500.0, **SMALL | dict(num_episodes=-1)))
    assert 8 <= result["eval/return"] <= 500 and result["eval/score"] == pytest.approx(100 * (result["eval/return"] - 22) / 478)


@pytest.mark.parametrize("values, message", [
    (dict(beta=0.0), "--beta=0.0: expected above 0: at 0 every weight is 1"),
    (dict(beta=-1.0), "--beta=-1.0: expected above 0"),
    (dict(expectile=1.0), "--expectile in"),
    (dict(gamma=1.5), "--gamma in"),
    (dict(rho=0.0), "--rho in"),
    (dict(weight_clip=.5), "--weight_clip=0.5: expected at least 1"),
    (dict(batch_size=0), "--batch_size=0: expected at least 1"),
    (dict(val_share=.999), "are left to train on"),
    (dict(data="walk", num_episodes=-1), "--data=walk: expected cartpole, walks"),
])
def test_settings_that_cannot_be_meant_stop_the_run(values, message):
    with pytest.raises(ValueError, match=message):
        train_iql.main(Config(**SMALL | values))


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match="train/"):
        train_iql.main(Config(**SMALL | dict(lr=1e30, num_steps=20)))


def test_dry_run_prints_every_setting_and_leaves_nothing(capsys):
    summary = train_iql.main(Config(dry_run=True, **SMALL))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert summary["expectile"] == .7 and summary["parameters"] > 0 and summary["memory_mb"].keys() == {"weights", "gradients", "optimizer", "target", "data", "activations"}
    assert not Path("out").exists()


def test_the_last_line_is_json(capsys):
    result = train_iql.main(Config(**SMALL))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval/return"] == result["eval/return"]
