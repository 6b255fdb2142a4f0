"""train_asft.py as a whole: one gradient however a batch is cut, exact resume, what may be read by whom, and errors that name their flag."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train_sft import flags, kill_9, metrics, run

import chat
import checkpoint
import recommend
import train_asft
from data import bandit
from model import clip_grad_norm
from train_asft import METHODS, Config, replace

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train_asft.py")
SMALL = dict(num_users=60, num_items=45, pretrain_steps=6, judge_steps=3, judges=2, num_steps=4, batch_size=10, eval_every=3, ensemble=3, warmup_steps=1)


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def last_step(name):
    return checkpoint.step_folders(Path("out") / name)[-1]


# -----------------------------------------------------------------------------
# Equalities


def test_an_infinite_temperature_is_bc_bitwise():
    """The same steps from the same start: w = 1 whatever the advantages, and the sum of weights is the number of decisions."""
    values = SMALL | dict(judges=0, eval_every=0)
    train_asft.main(Config(name="dummy/bc", method="bc", **values))
    train_asft.main(Config(name="dummy/asft", method="asft", weight_temp=math.inf, **values))
    train_asft.main(Config(name="dummy/warm", method="asft", weight_temp=1.0, **values))
    bc, asft, warm = (weights(f"out/dummy/{name}/post_{method}") for name, method in (("bc", "bc"), ("asft", "asft"), ("warm", "asft")))
    assert same(bc, asft) and not same(bc, warm)


def test_without_a_baseline_it_is_exponential_weighting_bitwise():
    values = SMALL | dict(judges=0, eval_every=0, weight_temp=1.5)
    train_asft.main(Config(name="dummy/exp", method="exp_rsft", **values))
    train_asft.main(Config(name="dummy/asft", method="asft", baseline="zero", w_max=math.inf, normalize="none", **values))
    assert same(weights("out/dummy/exp/post_exp_rsft"), weights("out/dummy/asft/post_asft"))


def gradients(monkeypatch, name, **values):
    """{stage: gradients of its first step}, before clipping and without dropout."""
    found = {}

    def record(model, max_norm):
        norm = clip_grad_norm(model, 1e9)
        found.setdefault(len(found), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return norm
    monkeypatch.setattr(train_asft, "clip_grad_norm", record)
    monkeypatch.setattr(train_asft, "finish", lambda *args: {})                # the report is another test's
    train_asft.main(Config(name=f"dummy/{name}", **SMALL | dict(num_steps=1, pretrain_steps=1, judge_steps=1, dropout=0.0) | values))
    return found


@pytest.mark.parametrize("method", ["asft", "awr", "crr", "iql", "cql", "dpo", "ppo", "ecpo", "exact"])
def test_the_gradient_is_equal_for_every_micro_batch(method, monkeypatch):
    """One pass of ten rows, three of four, ten of one: BC, judges and the method."""
    more = dict(method=method, pref_gap=0.0, gamma=0.5 if method in ("iql", "crr") else 0.0)
    whole = gradients(monkeypatch, "whole", device_batch_size=10, **more)
    assert len(whole) == 4 and all(any(g.abs().max() > 0 for g in found.values()) for found in whole.values())
    for size in (4, 1):
        cut = gradients(monkeypatch, f"cut{size}", device_batch_size=size, **more)
        for stage, found in whole.items():
            scale = max(g.abs().max() for g in found.values())
            for key, grad in found.items():
                # dividing by the spread of eight nearly equal rewards makes roundings large
                assert (grad - cut[stage][key]).abs().max() < (1e-5 if stage == 3 else 1e-6) * scale + 1e-8, (stage, key)


RANKS = """
import sys
import torch
import train_asft
from train_asft import Config, parse_config
clip, number = train_asft.clip_grad_norm, [0]
def record(model, max_norm):
    norm = clip(model, 1e9)
    if torch.distributed.get_rank() == 0:
        torch.save({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, f"ranks_{number[0]}.pt")
    number[0] += 1
    return norm
train_asft.clip_grad_norm = record
train_asft.main(parse_config(Config))
"""


@pytest.mark.parametrize("method", ["asft", "ppo"])
def test_the_gradient_is_equal_for_two_ranks(method, monkeypatch):
    Path("ranks.py").write_text(RANKS)
    more = dict(method=method, device_batch_size=4)
    run("ranks.py", *flags(name="dummy/two", **SMALL | dict(num_steps=1, pretrain_steps=1, judge_steps=1, dropout=0.0) | more), ranks=2)
    for stage, found in gradients(monkeypatch, "one", **more).items():
        there, scale = torch.load(f"ranks_{stage}.pt"), max(g.abs().max() for g in found.values())
        assert found.keys() == there.keys()
        for key, grad in found.items():
            assert (grad - there[key]).abs().max() < 2e-6 * scale + 1e-8, (stage, key)


def test_the_first_ratio_is_1(monkeypatch):
    """Post-training has no dropout and samples from a copy, so that nothing is clipped at the first step of PPO; later something may be."""
    train_asft.main(Config(name="dummy/ppo", method="ppo", **SMALL | dict(post_lr=3e-2, num_steps=6, refresh_every=3)))
    clipped = [line["train/clip_fraction"] for line in metrics("dummy/ppo") if "train/clip_fraction" in line]
    assert len(clipped) == 6 and clipped[0] == 0 == clipped[3] and max(clipped) > 0


# -----------------------------------------------------------------------------
# Resume


@pytest.mark.parametrize("method, ranks", [("asft,iql", 1), ("ppo,asft", 1), ("asft", 2)])
def test_kill_9_and_resume_is_exact(method, ranks):
    """Killed in BC and killed again after it: weights, selections, advantages, metrics and tables are bitwise those of a run that never stopped."""
    values = SMALL | dict(method=method, save_every=2, dropout=0.2)
    run(SCRIPT, *flags(name="dummy/whole", **values), ranks=ranks)
    for step, more in ((4, []), (14, ["--resume=latest"])):
        process = run(SCRIPT, *flags(name="dummy/killed", **values), *more, ranks=ranks, wait=False)
        while not Path(f"out/dummy/killed/step_{step:06d}").exists():
            assert process.poll() is None, process.communicate()
        kill_9(process)
    run(SCRIPT, *flags(name="dummy/killed", **values), "--resume=latest", ranks=ranks)
    assert metrics("dummy/killed") == metrics("dummy/whole")
    labels = ["bc", "judge0", "judge1", *(f"post_{m}" for m in method.split(",")), last_step("dummy/whole").name]
    for label in labels:
        assert same(weights(f"out/dummy/whole/{label}"), weights(f"out/dummy/killed/{label}")), label
    a, b = (np.load(f"out/dummy/{name}/advantages.npy") for name in ("whole", "killed"))
    assert np.array_equal(a, b, equal_nan=True) and np.isfinite(a).any()
    a, b = (json.loads(Path(f"out/dummy/{name}/results.json").read_text()) for name in ("whole", "killed"))
    for key in ("before", "after", "heads", "best", "results"):
        assert a[key] == b[key], key
    for name in ("whole", "killed"):                                # a step in the middle of a method, moments and copies included
        assert Path(f"out/dummy/{name}/step_000014/optim_rank0.pt").exists()
    a, b = (torch.load(f"out/dummy/{name}/step_000014/optim_rank0.pt", weights_only=True) for name in ("whole", "killed"))
    assert str(a) == str(b)


def test_resume_refuses_other_settings_and_init_other_items():
    train_asft.main(Config(name="dummy/a", **SMALL | dict(save_every=5)))
    with pytest.raises(ValueError, match="--weight_temp=1.0; resume with the same"):
        train_asft.main(Config(name="dummy/a", resume="latest", **SMALL | dict(weight_temp=2.0)))
    with pytest.raises(ValueError, match="already holds step_"):
        train_asft.main(Config(name="dummy/a", **SMALL))
    with pytest.raises(ValueError, match="other settings: --num_items=45"):
        train_asft.main(Config(name="dummy/b", init="out/dummy/a", **SMALL | dict(num_items=50)))
    for more in (dict(seed=1), dict(noise=2.0), dict(judge_share=0.25), dict(folds=2)):              # another world, readers or heads under the same items
        with pytest.raises(ValueError, match=f"was made with other settings: --{list(more)[0]}="):
            train_asft.main(Config(name="dummy/b", init="out/dummy/a", **SMALL | more))
    found = train_asft.main(Config(name="dummy/b", init="out/dummy/a", **SMALL | dict(method="reward_bc")))          # BC and judges are taken over
    assert not Path("out/dummy/b/bc").exists() and found["before"]["kl"] == pytest.approx(0, abs=1e-9)


# -----------------------------------------------------------------------------
# Who reads what


def test_training_never_sees_the_truth_and_methods_never_the_judges_rewards(monkeypatch):
    """Another truth, and other rewards of the judges' half: the selected weights stay bitwise what they were."""
    make, changes = bandit.make, {}

    def other(*args, **kwargs):
        log, truth = make(*args, **kwargs)
        if "truth" in changes:
            truth = truth._replace(mu=truth.mu[:, ::-1].copy(), bait=~truth.bait, propensity=1 - truth.propensity)
        if "judged" in changes:
            half = recommend.interactions.half(log.user_ids, 0.5)
            log = log._replace(reward_raw=np.where(half[log.user], 5 - log.reward_raw, log.reward_raw))
        return log, truth
    monkeypatch.setattr(bandit, "make", other)
    values = SMALL | dict(judge_steps=2, eval_every=0, method="asft,exact", high=-100.0)       # high: all, since targets of both halves are ranked
    kept = {}
    for change in ("nothing", "truth", "judged"):
        changes.clear()
        changes[change] = True
        train_asft.main(Config(name=f"dummy/{change}", **values))
        kept[change] = [weights(f"out/dummy/{change}/{label}") for label in ("bc", "post_asft", "post_exact", "judge0")]
    assert all(same(a, b) for a, b in zip(kept["nothing"], kept["truth"]))
    assert all(same(a, b) for a, b in zip(kept["nothing"][:3], kept["judged"][:3])) and not same(kept["nothing"][3], kept["judged"][3])


def test_every_setting_of_the_world_is_a_flag():
    """What the log follows, and what is in it, reaches the world; --init with another one is refused (see above) since each is of the world."""
    plain = train_asft.open_world(Config(**SMALL))
    for key, value in dict(taste=0.0, pop=3.0, habit=0.0, bait_share=.5, noise=0.0, noise_spread=1.0, autoplay=1.0, generosity=2.0).items():
        world = train_asft.open_world(Config(**SMALL | {key: value}))
        assert key in train_asft.OF_INIT
        clicks, rewards = np.array_equal(world.log.item, plain.log.item), np.array_equal(world.log.reward_raw, plain.log.reward_raw)
        assert (clicks, rewards) == (key in ("noise", "noise_spread", "autoplay", "generosity"), False), key
        assert (world.truth.bait.mean() > .4) == (key == "bait_share")


def test_advantages_of_every_baseline_by_hand():
    """r - V by event, from a loop over the log: nan where an event is no training decision of a user whose rewards may be read."""
    cfg = Config(**SMALL)
    world = train_asft.open_world(cfg)
    model = train_asft.Recommender(train_asft.new_model(cfg, world)).init_weights(0).eval()
    log, reward = world.log, world.reward.astype(np.float64)
    reads = lambda e: world.visible[log.user[e]] and world.part[e] == 0
    mean = np.mean([reward[e] for e in range(len(reward)) if reads(e)])
    for baseline in ("zero", "global", "item", "user"):
        found, expectations, _ = train_asft.reward_advantages(replace(cfg, baseline=baseline), model, world, torch.device("cpu"))
        for e in range(len(reward)):
            first = e == 0 or log.user[e - 1] != log.user[e]
            if not reads(e) or first:
                assert np.isnan(found[e])
                continue
            past = [reward[i] for i in range(e) if log.user[i] == log.user[e]]
            of_item = [reward[i] for i in range(len(reward)) if reads(i) and log.item[i] == log.item[e]] if baseline == "item" else []
            expected = reward[e] - dict(zero=0.0, **{"global": mean}, user=np.mean(past), item=np.mean(of_item or [0.0]))[baseline]
            assert found[e] == pytest.approx(expected, abs=1e-5), (baseline, e)
            assert expectations[e] == pytest.approx(reward[e] - expected, abs=1e-5), (baseline, e)
    for baseline in ("head", "policy"):
        found, expectations, _ = train_asft.reward_advantages(replace(cfg, baseline=baseline), model, world, torch.device("cpu"))
        assert np.isfinite(found).sum() == sum(reads(e) and e > 0 and log.user[e - 1] == log.user[e] for e in range(len(reward)))


def test_states_and_metrics_do_not_depend_on_the_block_and_the_padding():
    cfg = Config(**SMALL)
    world = train_asft.open_world(cfg)
    for backbone in ("hstu", "sasrec"):
        config = train_asft.new_model(replace(cfg, backbone=backbone, history_rewards=4), world)
        model = train_asft.Recommender(config).init_weights(0)
        rows = world.targets["test"]
        whole, parts = (torch.cat([h for *_, h in recommend.states(model, world, rows, torch.device("cpu"), size=size)]) for size in (60, 7))
        assert whole.shape == (60, 32) and (whole - parts).abs().max() < 1e-5


def test_a_target_that_training_never_saw_is_a_miss():
    world = train_asft.open_world(Config(**SMALL))
    model = train_asft.Recommender(train_asft.new_model(Config(**SMALL), world)).init_weights(0)
    of = lambda world: recommend.evaluate(model, world, None, torch.device("cpu"))["test"][1]["hr@10"].numpy()
    before, item = of(world), world.log.item[world.targets["test"][:, 1] - 1]
    hit = item == item[before.argmax()]                             # an item that is found at least once
    after = of(world._replace(part=np.where((world.part == 0) & (world.log.item == item[before.argmax()]), 9, world.part)))
    assert before[hit].sum() > 0 == after[hit].sum() and (before == after)[~hit].all()


def test_seen_items_may_be_ranked_too():
    """A repeated target among the items of its history: with them in the ranking nothing is above its place, without them it can only rise."""
    world = train_asft.open_world(Config(**SMALL))
    model = train_asft.Recommender(train_asft.new_model(Config(**SMALL), world)).init_weights(0)
    of = lambda world: recommend.evaluate(model, world, None, torch.device("cpu"))["test"][1]["mrr@10"]
    masked, ranked = of(world), of(world._replace(mask_seen=False))
    assert (masked >= ranked).all() and masked.sum() > ranked.sum()
    assert train_asft.open_world(Config(**SMALL | dict(mask_seen=False))).mask_seen is False


def test_the_first_item_is_valued_too():
    cfg = Config(**SMALL)
    world = train_asft.open_world(cfg)
    model = train_asft.Recommender(train_asft.new_model(cfg, world)).init_weights(0)
    tables = recommend.tables_of(model, [model], world, torch.device("cpu"))
    found = recommend.evaluate(model, world, tables, torch.device("cpu"))["test"][1]
    for i, row in enumerate(world.targets["test"][:world.policy_users]):
        best = tables["test"]["ref_logp"][i].argmax()
        assert found["top1_true_value"][i] == world.truth.mu[world.log.user[row[0]], best] and found["top1_judge"][i] == tables["test"]["judge"][i, best]


def test_weights_are_logged_by_tenths_of_what_was_expected():
    assert train_asft.deciles(np.array([3.0, np.nan, 1, 2, 4, 5, 6, 7, 8, 9, 10])).tolist() == [3, 0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert set(train_asft.deciles(np.array([5.0] * 7)).tolist()) == {1}
    world = train_asft.open_world(Config(**SMALL))
    whole = SMALL | dict(method="asft", batch_size=len(world.readers(world.visible)))                        # a batch of all who are trained on
    train_asft.main(Config(name="dummy/tenths", baseline="zero", **whole))
    line = [json.loads(x) for x in Path("out/dummy/tenths/metrics.jsonl").read_text().splitlines() if "train/advantage" in x][0]
    a = np.load("out/dummy/tenths/advantages.npy")
    assert line["train/advantage"] == pytest.approx(np.nanmean(a), abs=1e-5)                # V = 0: one class
    assert line["train/weight_v1"] == pytest.approx(np.minimum(np.exp(a[~np.isnan(a)]), 20).mean(), rel=1e-5) and "train/weight_v2" not in line
    train_asft.main(Config(name="dummy/tenths", overwrite=True, **whole))
    line = [json.loads(x) for x in Path("out/dummy/tenths/metrics.jsonl").read_text().splitlines() if "train/advantage" in x][0]
    assert {f"train/weight_v{k}" for k in range(1, 11)} <= line.keys()


def test_the_state_reads_nothing_later():
    """Column j depends on items up to j and times up to j + 1."""
    config = train_asft.RecommenderConfig(num_items=20, max_length=12, **train_asft.RECOMMENDER_SIZES["tiny"])
    torch.manual_seed(0)
    for backbone in ("hstu", "sasrec"):
        model = train_asft.Recommender(replace(config, backbone=backbone)).init_weights(0).eval()
        items, times = torch.randint(1, 21, (2, 9)), torch.randint(0, 10**6, (2, 9)).cumsum(1)
        lengths = torch.tensor([8, 8])
        before = model(items, lengths, times)
        later = items.clone()
        later[:, 5:] = 3
        times_later = times.clone()
        times_later[:, 6:] += 10**7
        after = model(later, lengths, times_later)
        assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6) and not torch.allclose(before[:, 5:7], after[:, 5:7], atol=1e-3)
        if backbone == "hstu":
            sooner = times.clone()
            sooner[:, 5] -= 1 + (times[:, 5] - times[:, 4]) // 2
            assert not torch.allclose(before[:, 4], model(items, lengths, sooner)[:, 4], atol=1e-6)        # the request's time counts


# -----------------------------------------------------------------------------
# Whole runs


def test_every_method_runs_and_reports(capsys):
    summary = train_asft.main(Config(name="dummy/all", method="all", **SMALL | dict(eval_every=0, num_steps=2)))
    assert METHODS.keys() <= summary.keys()
    report = Path("out/dummy/all/report.md").read_text()
    assert "RMSE" in report and "user+item" in report and all(f"| {m} |" in report for m in METHODS) and Path("out/dummy/all/frontier.png").exists()
    results = json.loads(Path("out/dummy/all/results.json").read_text())
    assert {r["method"] for r in results["results"]} == {"", *METHODS}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["name"] == "dummy/all"
    for m in METHODS:                                               # everything but tilt moved
        assert (results["after"][m]["test"]["kl"] > 1e-7) and math.isfinite(results["after"][m]["test"]["true_value"]), m
    ref = results["references"]                                     # uniform may beat the log; nothing beats the best item
    assert ref["logging"] < ref["tilt 1"] < ref["tilt 0.5"] < ref["tilt 0.25"] < ref["optimum"] and ref["uniform"] < ref["optimum"]
    assert all(results["after"][m]["test"]["true_value"] < ref["optimum"] for m in METHODS)
    best = train_asft.main(Config(name="dummy/all", method="all", resume="latest", **SMALL | dict(eval_every=0, num_steps=2)))     # finished: says it again
    assert best["asft"] == summary["asft"]


def test_a_file_from_elsewhere(tmp_path, monkeypatch, capsys):
    """Columns by name, percentile-free raw rewards, one-event users, a user of two events, and a sampled softmax; then recommendations from it."""
    rng = np.random.default_rng(0)
    lines = ["who,what,stars,when", "solo,i3,4,100", "duo,i1,3,100", "duo,i2,5,200"]
    lines += [f"u{u},i{i},{rng.integers(1, 6)},{1000 * u + 10 * k}" for u in range(40) for k, i in enumerate(rng.permutation(25)[:rng.integers(5, 15)])]
    Path("log.csv").write_text("\n".join(lines) + "\n")
    values = SMALL | dict(data="csv:log.csv", col_user="who", col_item="what", col_reward="stars", col_time="when", softmax="sampled", num_negatives=6, logq=True)
    summary = train_asft.main(Config(name="dummy/csv", **values))
    assert "true_value" not in summary["before"] and 0 < summary["asft"]["hr@10"] <= 1 and "judge" in summary["asft"]
    model, catalogue = checkpoint.load_recommender(last_step("dummy/csv"))
    assert "i3" in catalogue.item_ids and len(catalogue.item_ids) == 25
    best, p = recommend.suggest(model, [recommend.find_item(catalogue, "i3"), recommend.find_item(catalogue, "i7")], k=5)
    assert len(set(best)) == 5 and p == sorted(p, reverse=True) and recommend.find_item(catalogue, "i3") not in best
    with pytest.raises(ValueError, match="is no title and no id"):
        recommend.find_item(catalogue, "nothing")
    found = chat.main(chat.Config(init="out/dummy/csv", prompt="i3; i7"))
    assert found.keys() == {"before", "after"} and found["after"][:5] == [catalogue.item_ids[i - 1] for i in best] and not {"i3", "i7"} & set(found["before"])
    lines = iter(["i3;nothing", ";", "i1", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.main(chat.Config(init="out/dummy/csv"))
    said = capsys.readouterr().out
    assert "'nothing' is no title and no id" in said and "an empty history" in said and "after i1" in said and said.splitlines()[-1] == \
        '{"init": "out/dummy/csv", "turns": 3}'


def test_policies_are_valued_on_a_full_matrix(tmp_path):
    """Twenty users in a second log that has all of their items: the value is the sum over what the log has not of the policy, renormalised, times the reward."""
    rng = np.random.default_rng(1)
    reward = rng.normal(size=(40, 25)).round(3)
    head = "who,what,stars,when\n"
    lines = [f"u{u},i{i},{reward[u, i]},{1000 * u + 10 * k}" for u in range(40) for k, i in enumerate(rng.permutation(25)[:rng.integers(5, 15)])]
    Path("log.csv").write_text(head + "\n".join(lines) + "\n")
    Path("full.csv").write_text(head + "\n".join(f"u{u},i{i},{reward[u, i]},{i}" for u in range(20) for i in range(24)) + "\n")
    values = SMALL | dict(data="csv:log.csv", col_user="who", col_item="what", col_reward="stars", col_time="when", full_matrix="csv:full.csv", method="asft,exact")
    summary = train_asft.main(Config(name="dummy/full", **values))
    world = train_asft.open_world(Config(**values))
    model, _ = checkpoint.load_recommender(last_step("dummy/full"))
    column = [int(name[1:]) for name in world.catalogue.item_ids]
    found = []
    for _, batch, _, hidden in recommend.states(model, world, world.targets["test"], torch.device("cpu")):
        for u, logits in zip(batch.users.tolist(), model.logits(hidden)):
            name, had = int(world.log.user_ids[u][1:]), set(world.log.item[world.log.user == u].tolist())
            left = [i for i in range(25) if i + 1 not in had and column[i] < 24]
            if name < 20:
                p = logits[left].double().softmax(0).tolist()
                found.append(sum(a * float(np.float32(reward[name, column[i]])) for a, i in zip(p, left)))
    assert len(found) == 20 and recommend.evaluate(model, world, None, torch.device("cpu"))["test"][0]["full_matrix"] == pytest.approx(np.mean(found), abs=1e-9)
    assert summary["asft"]["full_matrix"] == pytest.approx(np.mean(found), abs=1e-6) and summary["before"]["full_matrix"] != summary["exact"]["full_matrix"]
    assert "test full_matrix" in Path("out/dummy/full/report.md").read_text()
    for more in (dict(reward_scale="std"), dict(data="bandit")):
        with pytest.raises(ValueError, match="--full_matrix=csv:full.csv: expected"):
            train_asft.open_world(Config(**values | more))


def test_items_are_found_by_id_title_or_part():
    catalogue = checkpoint.Catalogue(["10", "7", "8"], ["Toy Story (1995)", "Fargo (1996)", "Toy Story 2 (1999)"])
    assert [recommend.find_item(catalogue, text) for text in ("10", " fargo (1996) ", "fargo", "story 2", "toy story (1995)")] == [1, 2, 2, 3, 1]
    for text, match in (("toy", "in several titles: Toy Story"), ("farg0 (1996)", "no title and no id: Fargo"), ("", "no title and no id")):
        with pytest.raises(ValueError, match=match):
            recommend.find_item(catalogue, text)


def test_bfloat16_runs():
    assert train_asft.main(Config(name="dummy/half", dtype="bfloat16", method="asft,ppo", **SMALL))["asft"]["kl"] > 0


@pytest.mark.parametrize("more, match", [
    (dict(method="asft,grpo"), "--method=grpo: expected some of asft"), (dict(method="asft,asft"), "names a method twice"),
    (dict(size="huge"), "--size=huge is unknown"), (dict(trials=7), "--trials=7"), (dict(trials=5, method="asft,ppo"), "--trials=5: expected 1 to 4"), (dict(softmax="sampled", method="ppo"), "ppo need log-probabilities"),
    (dict(weight_temp=0.0), "--weight_temp=0.0: expected above 0"), (dict(weight_temp=0.01, method="exp_rsft"), "overflows at r ="),
    (dict(method="reward_bc", negative="stop", noise=5.0), "rewards are weights and must not be negative"), (dict(judge_share=1.0), "--judge_share=1.0"),
    (dict(ensemble=1, method="iql"), "--ensemble=1"), (dict(folds=4, ensemble=3), "--folds=4"), (dict(gamma=1.0), "expected --dropout and --gamma"),
    (dict(data="csv:nowhere.csv", col_user="a", col_item="b", col_reward="c", col_time="d"), "nowhere.csv"), (dict(num_items=30), "events per user"),
    (dict(ensemble=1, method="dpo"), "--ensemble=1"), (dict(num_samples=1, method="ppo"), "--num_samples=1"), (dict(w_max=0.5), "--w_max=0.5"),
    (dict(folds=2, baseline="policy"), "leave the user's own fold out"), (dict(batch_size=0), "--batch_size=0"), (dict(policy_users=0), "--policy_users=0"),
    (dict(method="all", ensemble=1), "--ensemble=1"), (dict(reward_share=2.0), "--reward_share: expected a share"), (dict(refresh_every=0), "--refresh_every=0")])
def test_bad_settings_are_refused_by_flag(more, match):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        train_asft.main(Config(name="dummy/bad", **SMALL | dict(judges=1) | more))


def test_a_dry_run_says_what_would_run(capsys):
    train_asft.main(Config(dry_run=True, method="all", trials=4, **SMALL))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["stages"]) == 3 + 4 * len(METHODS) and found["parameters"] > 1000 and not Path("out").exists()
