"""train_user_model.py and data/preferences.py: EM that climbs, finds the types that are there and none that are not, resumes exactly, and names what is wrong."""
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train_sft import flags, kill_9, metrics, run
from user_world import observations, singles, small_log, unit

import checkpoint
import train_user_model
import user_model as um
from data import preferences, slate
from data.embeddings import save_embeddings
from train_user_model import Config, m_loss, temperature, updated_prior

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(num_users=60, num_sessions=2, num_types="3", restarts=1, num_steps=6, eval_every=3, rank=1)
WORLD = """
import os
import sys
import torch
import train_user_model
from user_world import small_log

train_user_model.open_log = small_log
sums, number = train_user_model.sum_gradients, [0]
def sum_gradients(params):
    sums(params)
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save([p.grad.clone() for p in params], f"gradients_{number[0]}.pt")
    number[0] += 1
if __name__ == "__main__":
    if "--keep_gradients" in sys.argv:
        sys.argv.remove("--keep_gradients")
        train_user_model.sum_gradients = sum_gradients
    train_user_model.main(train_user_model.parse_config(train_user_model.Config))
"""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def world(monkeypatch):
    """Turns of a world whose types are known, in place of the shipped one; with pairs and ratings of the same users if `single`."""
    def use(seed=0, single=False, num=None, **settings):
        obs, types = observations(seed, **settings)
        users = num or len(types)                                    # the others are nobody's: for the test alone
        obs = type(obs)(*(column[obs.user < users] for column in obs))
        pairs, ratings, _ = singles(seed, users, 3, width=obs.start.shape[1]) if single else (None, None, None)
        monkeypatch.setattr(train_user_model, "open_log", lambda cfg: (
            [f"u{i}" for i in range(users)], obs, pairs and pairs._asdict(), ratings and ratings._asdict(), types[:users], "world"))
        return types
    return use


def last_step(name):
    return checkpoint.step_folders(Path("out") / name)[-1]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -----------------------------------------------------------------------------
# The algorithm


def test_the_m_step_loss_by_hand():
    """g (.25, .75) of user 0 and (1, 0) of user 1; log p -1, -2 | -3, -4 of user 0 and -5, -6 of user 1: .25 x -4 + .75 x -6 - 5 = -10.5, over 3."""
    g = torch.tensor([[0.25, 0.75], [1.0, 0.0]], requires_grad=True)
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], requires_grad=True)
    loss = m_loss(g, logps, torch.tensor([0, 0, 1]), 3)
    loss.backward()
    assert loss.item() == pytest.approx(3.5) and g.grad is None
    assert logps.grad.flatten().tolist() == pytest.approx([-0.25 / 3, -0.25, -0.25 / 3, -0.25, -1 / 3, 0])


def test_pi_by_hand():
    """Ten users, sums of g (7, 3), one counted beforehand for each: (8, 4) / 12; with a fifth of them in a step, pi moves a fifth of the way."""
    half = torch.tensor([0.5, 0.5]).log()
    pi = lambda *args: updated_prior(*args).exp().tolist()
    assert pi(half, torch.tensor([7.0, 3.0]), 10, 1.0, 1.0) == pytest.approx([8 / 12, 4 / 12])
    assert pi(half, torch.tensor([7.0, 3.0]), 10, 0.0, 1.0) == pytest.approx([0.7, 0.3])
    assert pi(half, torch.tensor([1.4, 0.6]), 2, 1.0, 0.2) == pytest.approx([0.5 + 0.2 / 6, 0.5 - 0.2 / 6])          # (1.4 + .2, .6 + .2) / 2.4 is (2, 1) / 3
    assert pi(half, torch.tensor([2.0, 0.0]), 2, 0.0, 1.0) == [1.0, 0.0]


def test_the_temperature_reaches_1_at_half():
    assert [temperature(step, 100, 5.0) for step in (0, 25, 50, 99)] == [5.0, 3.0, 1.0, 1.0] and temperature(0, 100, 1.0) == 1.0


@pytest.mark.parametrize("single, shrink", [(False, 0.0), (True, 2.0)])
def test_full_batch_likelihood_never_falls(single, shrink, world):
    """Backtracked M-steps, pi without a count: each step's log-likelihood (with shrink, less the penalty) is at least the one before, and steps that are
    too long are halved."""
    world(1, single, num_users=50, num_choices=5, num_types=3, width=12, images=2)
    settings = dict(num_types="3", restarts=1, prior_count=0.0, min_pi=0.0, dtype="float64", lr=0.3, num_steps=30, eval_every=0, decay_share=0.0, shrink=shrink)
    train_user_model.main(Config(m_step="backtrack", m_steps=1 + single, **settings))
    lines = [line for line in metrics() if "train/loss" in line]
    losses = np.array([line["train/loss"] + line["train/penalty"] for line in lines])
    assert len(losses) == 30 and np.diff(losses).max() <= 1e-9 and losses[-1] < losses[0] - 0.2
    assert max(line["train/halvings"] for line in lines) > 0 and (max(line["train/penalty"] for line in lines) > 0) == (shrink > 0)
    train_user_model.main(Config(name="dummy/adam", **settings))     # without halvings it does fall
    assert np.diff([line["train/loss"] for line in metrics("dummy/adam") if "train/loss" in line]).max() > 1e-3


def test_backtracking_comes_back_from_a_step_that_cannot_go_down(world):
    """A step against the gradient: the weights stay, the moments go."""
    world(0, num_users=60, num_choices=5, width=12)
    data = train_user_model.open_data(Config(), "cpu", torch.float64).everyone
    model = um.UserModel(um.UserModelConfig(2, 12)).double().init_weights(0)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr=0.1)
    logps, user = um.all_likelihoods(model, data)
    g = um.posterior(model, logps, user, 60)
    loss = m_loss(g, logps, user, 300)
    (-loss).backward()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert train_user_model.backtrack(model, optimizer, before, [data], [(g, user)], 300, 0.0, loss.detach()) == 31
    assert all(torch.equal(a, b) for a, b in zip(params, before)) and not optimizer.state


# -----------------------------------------------------------------------------
# Recovery


def test_types_are_recovered_and_the_curves_rise_and_saturate(world):
    """300 users with 20 choices among 4 columns, d = 16; types of 170 more users, whom no part of the run has seen."""
    types = world(0, num=430, num_users=600, num_choices=20, images=2)
    found = train_user_model.main(Config(num_types="1,2,4,8", restarts=2, num_steps=40, lr=0.1, eval_every=10))
    everyone = um.evidence(600, observations(0, 600, images=2)[0])
    others = um.select(everyone, np.arange(430, 600))
    ari = {}
    for K in (4, 8):
        model, origin = um.load_user_model(f"out/dummy/types_{K}")
        ari[K] = um.recovery(types[430:], um.evaluate(model, others)[1])["ari"]
    assert origin == um.Origin("world", "all", "world") and ari[4] >= 0.95 and 0.6 < ari[8] <= 1, ari
    accuracy = {K: t["filtered"]["choice_accuracy"] for K, t in found["test"].items()}
    compare = {K: t["filtered"]["compare_accuracy"] for K, t in found["test"].items()}
    assert accuracy["1"] + 0.02 < accuracy["2"] < accuracy["4"] - 0.02 and abs(accuracy["8"] - accuracy["4"]) < 0.03, accuracy
    assert compare["1"] + 0.02 < compare["4"] and found["types"] in (4, 8) and found["at_bound"] == []
    for K in "1248":                                                 # types help only once something is known of the user
        assert abs(found["test"][K]["prior"]["choice_accuracy"] - accuracy["1"]) < 0.04
    nth = json.loads(Path("out/dummy/results.json").read_text())["test"]["4"]
    assert np.mean(nth["by_nth"]["choice_accuracy"][-5:]) > nth["by_nth"]["choice_accuracy"][0] + 0.05
    assert np.diff(nth["entropy_by_nth"]).max() < 0.02 and nth["entropy_by_nth"][-1] < 0.1 < 1.2 < nth["entropy_by_nth"][0]


def test_shuffled_choices_have_no_types(world):
    types = world(2, num_users=430, num_choices=20, images=2, shuffle=True)
    found = train_user_model.main(Config(num_types="4", restarts=1, num_steps=40, lr=0.1, eval_every=40))
    assert len(types) == 430 and abs(found["test"]["4"]["ari"]) <= 0.05
    assert found["test"]["4"]["filtered"]["choice_accuracy"] < 0.29 and found["test"]["4"]["loss"] > 0.95 * (math.log(4) + 0.8 * math.log(2))


def test_training_never_sees_the_types(monkeypatch, world):
    types = world(0, num_users=60, num_choices=10, num_types=3, width=12)
    a = train_user_model.main(Config(**SMALL))
    log = train_user_model.open_log(None)
    monkeypatch.setattr(train_user_model, "open_log", lambda cfg: (*log[:4], types[::-1].copy(), "world"))
    b = train_user_model.main(Config(**SMALL | dict(name="dummy/b")))
    monkeypatch.setattr(train_user_model, "open_log", lambda cfg: (*log[:4], None, "world"))
    train_user_model.main(Config(**SMALL | dict(name="dummy/c")))
    assert a["test"]["3"]["ari"] != b["test"]["3"]["ari"]
    assert same(weights(last_step("dummy")), weights(last_step("dummy/b"))) and same(weights(last_step("dummy")), weights(last_step("dummy/c")))


def test_a_type_that_dies_begins_anew_and_is_counted(world):
    world(0, num_users=60, num_choices=10, num_types=2, width=12)
    found = train_user_model.main(Config(**SMALL | dict(num_types="6", num_steps=60, min_pi=0.08, prior_count=0.0)))
    lines = [line["train/reseeded"] for line in metrics() if "train/reseeded" in line]
    assert found["test"]["6"]["reseeded"] == lines[-1] > 0 and np.diff(lines).min() >= 0
    quiet = train_user_model.main(Config(**SMALL | dict(name="dummy/never", num_types="6", num_steps=60, min_pi=0.0, prior_count=0.0)))
    assert quiet["test"]["6"]["reseeded"] == 0 and np.isfinite(quiet["test"]["6"]["loss"])
    assert "re-seeded" in Path("out/dummy/report.md").read_text()


def test_tau_at_a_bound_is_an_alarm(world, capsys):
    world(0, num_users=60, num_choices=5, num_types=2, width=12)
    found = train_user_model.main(Config(**SMALL | dict(num_types="2", tau_init=100.0, num_steps=1, lr=1e-6)))
    assert "K=2 choice" in found["at_bound"] and "is at a bound of (0.1, 100.0)" in capsys.readouterr().out
    assert "tau was at a bound" in Path("out/dummy/report.md").read_text()


def test_halves_share_no_users_but_the_test(world):
    world(0, num_users=200, num_choices=5, width=12)
    data = {half: train_user_model.open_data(Config(half=half), "cpu", torch.float32) for half in ("all", "a", "b")}
    of = lambda half, part: set(np.flatnonzero(data[half].part == part))
    for part in (0, 1):
        assert not of("a", part) & of("b", part) and of("a", part) | of("b", part) == of("all", part) and of("a", part) and of("b", part)
    assert of("a", 2) == of("b", 2) == of("all", 2) and not of("all", 2) & (of("all", 0) | of("all", 1))


@pytest.mark.parametrize("more", [dict(pool="sample"), dict(em_temp=5.0), dict(total_batch_size=16), dict(agg="max", same="half"), dict(agg="mean", change=False),
                                  dict(rank=0), dict(m_steps=3), dict(half="b")])
def test_every_setting_learns(more, world):
    world(1, num_users=120, num_choices=10, num_types=3, width=12)
    found = train_user_model.main(Config(**SMALL | dict(num_steps=40, lr=0.1) | more))["test"]["3"]
    assert found["filtered"]["choice_accuracy"] > 0.36 and found["loss"] < math.log(4) + 0.8 * math.log(2)
    assert found["filtered"]["choice_loss"] < found["prior"]["choice_loss"] or more == dict(pool="sample")


# -----------------------------------------------------------------------------
# Equalities


@pytest.fixture
def small_world(monkeypatch):
    """world.py for processes of their own, and the same world here."""
    import test_train_sft
    monkeypatch.setattr(test_train_sft, "ROOT", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")           # what `run` puts on the path
    Path("world.py").write_text(WORLD)
    monkeypatch.setattr(train_user_model, "open_log", small_log)


def gradients(monkeypatch, name, **settings):
    """Of the first two steps, in this process."""
    found, sums = [], train_user_model.sum_gradients

    def record(params):
        sums(params)
        found.append([p.grad.clone() for p in params])
    monkeypatch.setattr(train_user_model, "sum_gradients", record)
    train_user_model.main(Config(name=name, **settings))
    monkeypatch.setattr(train_user_model, "sum_gradients", sums)
    return found[:2]


def kill_at(step, *args, ranks):
    process = run("world.py", *args, ranks=ranks, wait=False)
    while not Path(f"out/dummy/killed/step_{step:06d}").exists():
        assert process.poll() is None, process.communicate()
    kill_9(process)


def assert_the_same_run(a, b, step):
    assert metrics(a) == metrics(b)
    for label in ("types_1", "types_3", last_step(a).name, f"step_{step:06d}"):
        assert same(weights(f"out/{a}/{label}"), weights(f"out/{b}/{label}")), label
    left, right = (json.loads(Path(f"out/{name}/results.json").read_text()) for name in (a, b))
    assert all(left[key] == right[key] for key in ("best", "test", "selected", "results"))
    left, right = (torch.load(f"out/{name}/step_{step:06d}/optim_rank0.pt", weights_only=True) for name in (a, b))
    assert str(left) == str(right)


RESUMED = SMALL | dict(num_types="1,3", restarts=2, num_steps=8, save_every=2, total_batch_size=20, min_pi=0.1, em_temp=2.0)


def test_kill_9_and_resume_is_exact(small_world):
    """Killed in the first start and in the second: weights, moments, selections, metrics and tables are bitwise those of a run that never stopped."""
    train_user_model.main(Config(name="dummy/whole", **RESUMED))
    kill_at(4, *flags(name="dummy/killed", **RESUMED), ranks=1)
    kill_at(14, *flags(name="dummy/killed", **RESUMED), "--resume=latest", ranks=1)
    train_user_model.main(Config(name="dummy/killed", resume="latest", **RESUMED))
    assert_the_same_run("dummy/whole", "dummy/killed", 14)


def test_the_gradient_is_equal_for_every_micro_batch(small_world, monkeypatch):
    """All users at once, seven at a time, one at a time; posteriors and pi of the second step come from the first."""
    whole = gradients(monkeypatch, "dummy/whole", dtype="float64", **SMALL)
    assert all(g.abs().max() > 1e-4 for g in whole[0]) and len(whole[0]) == 7
    for size in (7, 1):
        cut = gradients(monkeypatch, f"dummy/cut{size}", dtype="float64", device_batch_size=size, **SMALL)
        for a, b in zip(sum(whole, []), sum(cut, [])):
            assert (a - b).abs().max() < 1e-12 * a.abs().max() + 1e-15


def test_two_ranks_are_one_rank_and_resume_exactly(small_world, monkeypatch):
    values = RESUMED | dict(dtype="float64", device_batch_size=9)
    run("world.py", "--keep_gradients", *flags(name="dummy/whole", **values), ranks=2)
    one = gradients(monkeypatch, "dummy/one", **values)
    for a, b in zip(sum(one, []), sum((torch.load(f"gradients_{i}.pt") for i in range(2)), [])):
        assert (a - b).abs().max() < 1e-12 * a.abs().max() + 1e-15
    a, b = (metrics(f"dummy/{name}") for name in ("one", "whole"))
    assert len(a) == len(b) and all(x == pytest.approx(y, rel=1e-6, abs=1e-9) for x, y in zip(a, b))
    kill_at(14, *flags(name="dummy/killed", **values), ranks=2)
    run("world.py", *flags(name="dummy/killed", **values), "--resume=latest", ranks=2)
    assert_the_same_run("dummy/whole", "dummy/killed", 14)


def test_resume_refuses_other_settings_and_a_finished_run_says_it_again(world, capsys):
    world(0, num_users=60, num_choices=10, num_types=3, width=12)
    first = train_user_model.main(Config(**SMALL))
    with pytest.raises(ValueError, match="--prior_count=1.0; resume with the same"):
        train_user_model.main(Config(**SMALL | dict(resume="latest", prior_count=2.0)))
    with pytest.raises(ValueError, match="already holds step_000006"):
        train_user_model.main(Config(**SMALL))
    again = train_user_model.main(Config(**SMALL | dict(resume="latest")))
    assert again["test"] == first["test"] and json.loads(capsys.readouterr().out.splitlines()[-1])["test"] == json.loads(json.dumps(first["test"]))
    assert {p.name for p in Path("out/dummy").iterdir()} == {"config.json", "metrics.jsonl", "code.patch", "report.md", "results.json", "user_model.png", "types_3",
                                                             "step_000006"}


# -----------------------------------------------------------------------------
# Files


def write_lines(path, records):
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def files():
    """Pairs, ratings and rankings of 30 users by two tastes, and sessions of 20 of them, with an embedding file."""
    rng = np.random.default_rng(0)
    names = [f"p{i}" for i in range(20)] + [f"i{i}" for i in range(200)]
    emb = unit(rng.normal(size=(220, 8))).astype(np.float32)
    tastes = unit(rng.normal(size=(2, 8)))
    save_embeddings(Path("e.npz"), names, emb.astype(np.float16), "tiny", True)
    place, single, sessions = {n: i for i, n in enumerate(names)}, [], []
    for u in range(30):
        value = lambda image: float(emb[place[image]] @ tastes[u % 2])
        for _ in range(6):
            a, b, c = (f"i{i}" for i in rng.choice(200, 3, replace=False))
            prompt = f"p{rng.integers(20)}"
            single.append(dict(user=f"u{u}", prompt=prompt, image_a=a, image_b=b, label=int(value(a) > value(b))))
            single.append(dict(user=f"u{u}", prompt=prompt, image=c, rating=3 + 2 * value(c)))
            order = sorted((a, b, c), key=value, reverse=True)
            single.append(dict(user=f"u{u}", prompt=prompt, images=[a, b, c], rank=[order.index(x) + 1 for x in (a, b, c)]))
        if u < 20:
            turns, base = [], "p0"
            for t in range(int(rng.integers(1, 5))):                 # sessions of unequal length
                images = [[f"i{i}" for i in rng.choice(200, 2, replace=False)] for _ in range(3)]
                choice = int(np.argmax([max(map(value, column)) for column in images]))
                candidates = [dict(category=c, text=f"p{i}") for i, c in zip(rng.choice(20, 3, replace=False), ("rephrase", "detail", "style"))]
                turns.append(dict(t=t, candidates=candidates, slate=[0, 1, 2], images=images, choice=choice, **(dict(compare="better") if t else {})))
            sessions.append(dict(session=f"s{u}", user=f"u{u}", source="human", prompt=base, end="horizon", turns=turns))
    write_lines("single.jsonl", single)
    write_lines("log.jsonl", sessions)
    write_lines("log.truth.jsonl", [dict(session=f"s{u}", user=f"u{u}", type=u % 2, utility=[[0.0] * 3] * len(sessions[u]["turns"])) for u in range(20)])
    return single, sessions


def test_files_of_both_kinds_are_fitted_together(files):
    cfg = Config(data="log.jsonl", single="single.jsonl", truth="log.truth.jsonl", embeddings="e.npz", num_types="2", restarts=2, num_steps=40, lr=0.1, single_steps=10,
                 rank=1)
    found = train_user_model.main(cfg)["test"]["2"]
    assert {"choice_accuracy", "compare_accuracy", "pair_accuracy", "spearman", "rating_rmse"} <= found["filtered"].keys()
    assert found["filtered"]["pair_accuracy"] > 0.7 and found["filtered"]["spearman"] > 0.4 and found["ari"] == 1.0
    single = train_user_model.main(Config(name="dummy/single", data="", single="single.jsonl", embeddings="e.npz", num_types="1,2", restarts=2, num_steps=40, lr=0.1, rank=1))
    assert single["test"]["2"]["filtered"]["pair_accuracy"] > single["test"]["1"]["filtered"]["pair_accuracy"] + 0.05
    assert "choice_accuracy" not in single["test"]["2"]["filtered"] and "ari" not in single["test"]["2"]
    assert um.load_user_model(last_step("dummy/single"))[1] == um.Origin("tiny", "all", "single.jsonl")


def test_preferences_read_what_was_written(files):
    found = preferences.read(["single.jsonl"])
    assert len(found.pairs) == 30 * 6 * (1 + 3) and len(found.ratings) == 180
    write_lines("rank.jsonl", [dict(prompt="p0", images=["i1", "i2", "i3"], rank=[2, 1, 2]), dict(user="a", prompt="p1", image_a="i5", image_b="i4", label=0.5)])
    found = preferences.read(["rank.jsonl"])
    own = "rank.jsonl:1"                                             # nobody's: a user of its own
    assert found.pairs == [(own, "p0", "i1", "i2", 0.0, 1 / 3, own), (own, "p0", "i1", "i3", 0.5, 1 / 3, own), (own, "p0", "i2", "i3", 1.0, 1 / 3, own),
                           ("a", "p1", "i5", "i4", 0.5, 1.0, "rank.jsonl:2")]
    users = {"a": 0}
    emb = np.eye(3, 4, dtype=np.float16) * 2
    pairs, ratings = preferences.arrays(preferences.Preferences([found.pairs[0], found.pairs[3]], []), ["p0", "i1", "i2", "p1", "i4", "i5"], emb[[0, 1, 2, 0, 1, 2]], users)
    assert ratings is None and users == {"a": 0, own: 1} and pairs["user"].tolist() == [0, 1] and pairs["weight"].tolist() == pytest.approx([1, 1 / 3])
    assert pairs["image_a"].tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]] and pairs["label"].tolist() == [0.5, 0.0]        # of length 1, by user


@pytest.mark.parametrize("record, match", [
    ("{", "x.jsonl:2: not a JSON object"), ("[1]", "expected image_a and image_b"), ('{"prompt": "p"}', "found none of them"),
    (dict(image="i", image_a="a", prompt="p"), "found image_a, image"), (dict(prompt="p", image_a="a", image_b="b"), "'label' is missing"),
    (dict(prompt="p", image_a="a", image_b="b", label=2), "x.jsonl:2: label 2: expected 1"), (dict(prompt="p", image_a="a", image_b="b", label=True), "label is bool"),
    (dict(prompt="p", image_a="a", image_b="b", label=1, weight=3), "unknown key 'weight'"), (dict(prompt="p", image="i", rating="5"), "rating is str"),
    ('{"prompt": "p", "image": "i", "rating": NaN}', "not a JSON object: NaN"), ('{"prompt": "p", "image": "i", "rating": 1' + "0" * 400 + "}", "expected a finite number"),
    (dict(prompt="p", images=["a"], rank=[1]), "at least 2 different ids"), (dict(prompt="p", images=["a", "a"], rank=[1, 2]), "at least 2 different ids"),
    (dict(prompt="p", images=["a", "b"], rank=[1]), "expected 2 whole numbers from 1"), (dict(prompt="p", images=["a", "b"], rank=[0, 1]), "whole numbers from 1"),
    (dict(prompt="p", images=["a", "b"], rank=[2, 2]), "whole numbers from 1"), (dict(prompt="p", image="i", rating=1, user=3), "user is int")])
def test_malformed_preferences_are_named_by_line(record, match):
    good = json.dumps(dict(prompt="p", image="i", rating=1))
    Path("x.jsonl").write_text(good + "\n" + (record if isinstance(record, str) else json.dumps(record)) + "\n")
    with pytest.raises(ValueError, match="x.jsonl:2: .*") as error:
        preferences.read(["x.jsonl"])
    assert error.match(match)


def test_preferences_name_ids_without_embedding_and_bytes_that_are_no_text():
    Path("x.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="x.jsonl:1: not UTF-8 at byte 12"):
        preferences.read(["x.jsonl"])
    Path("x.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="x.jsonl: empty"):
        preferences.read(["x.jsonl"])
    write_lines("x.jsonl", [dict(prompt="p", image="i", rating=1), dict(prompt="p", image="j", rating=1)])
    with pytest.raises(ValueError, match="x.jsonl:2: image 'j' is not in the embedding file .1 of 2 are not"):
        preferences.arrays(preferences.read(["x.jsonl"]), ["p", "i"], np.eye(2, dtype=np.float32), {})


def test_files_that_do_not_fit_are_named(files):
    single, sessions = files
    base = dict(data="log.jsonl", embeddings="e.npz", num_steps=1, restarts=1, num_types="2")
    save_embeddings(Path("other.npz"), ["x"], np.eye(1, 8, dtype=np.float32), "another", True)
    save_embeddings(Path("wide.npz"), ["x"], np.eye(1, 9, dtype=np.float32), "tiny", True)
    for more, match in ((dict(embeddings="e.npz,other.npz"), "differ in model: tiny and another"), (dict(embeddings="e.npz,wide.npz"), "differ in width: 8 and 9"),
                        (dict(embeddings="e.npz,e.npz"), "220 ids are in two of the files"), (dict(embeddings=""), "--embeddings is empty"), (dict(data=""), "--data and --single are empty"),
                        (dict(data="world", single="single.jsonl"), "--single: its ids are not of the synthetic world"),
                        (dict(truth="log.truth.jsonl", data="", single="single.jsonl"), "--truth: expected session files"), (dict(single_steps=3), "expected both --single and")):
        with pytest.raises(ValueError, match=match):
            train_user_model.main(Config(**base | more))
    for change, match in ((lambda t: t.pop("choice"), "log.jsonl:3: turn 0: 'choice' is missing"), (lambda t: t["slate"].pop(), "log.jsonl:3"),
                          (lambda t: t["images"][0].__setitem__(0, "nobody"), "image 'nobody' is not in the embedding file")):
        broken = json.loads(json.dumps(sessions))
        change(broken[2]["turns"][0])
        write_lines("log.jsonl", broken)
        with pytest.raises(ValueError, match=match):
            train_user_model.main(Config(**base))
    assert not list(Path(".").glob("out/*/step_*")) and single


@pytest.mark.parametrize("more, match", [
    (dict(num_types="0"), "--num_types=0: expected different whole numbers"), (dict(num_types="2,two"), "--num_types"), (dict(num_types="2,2"), "--num_types"),
    (dict(num_types=""), "--num_types"), (dict(restarts=0), "--restarts=0"), (dict(lr=0.0), "--lr=0.0"), (dict(tau_init=0.01), "--tau_init=0.01: expected from 0.1"),
    (dict(min_pi=0.2), "--min_pi=0.2: 3 types have 0.333 each"), (dict(em_temp=0.5), "--em_temp=0.5"), (dict(m_step="backtrack", total_batch_size=4), "--m_step=backtrack"),
    (dict(device_batch_size=0), "--device_batch_size=0"), (dict(prior_count=-1.0), "--prior_count=-1.0"), (dict(rating_sigma=0.0), "--rating_sigma=0.0")])
def test_bad_settings_are_refused_by_flag(more, match):
    with pytest.raises(ValueError, match=match):
        train_user_model.main(Config(**SMALL | more))


def test_too_few_users_are_an_error(world):
    world(0, num_users=2, num_choices=5, width=12)
    with pytest.raises(ValueError, match="2 users: none is in the"):
        train_user_model.main(Config(**SMALL))


def test_a_dry_run_says_what_would_run(world, capsys):
    world(0, num_users=60, num_choices=10, width=12)
    train_user_model.main(Config(**SMALL | dict(num_types="1,2,4", restarts=3, dry_run=True)))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["stages"]) == 7 and found["steps"] == 42 and found["observations"] == 600 and found["memory_mb"]["weights"] > 0 and not Path("out").exists()


def test_the_shipped_readers_give_what_the_model_reads(files):
    """Columns of data/slate.py stand where those of user_model.py stand."""
    log = slate.read("log.jsonl", one_per_category=False)
    assert slate.Observations._fields == um.Observations._fields and len(log.user_ids) == 20
