"""user_model.py: likelihoods by hand and against plain loops, posteriors, metrics, recovery, folders, and what it refuses."""
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from user_world import observations, singles, unit

import checkpoint
import user_model as um
from user_model import Observations, Pairs, Ratings, UserModel, UserModelConfig


def model_of(K=3, width=6, seed=0, spread=1.0, **settings):
    """In float64, with every parameter away from its start."""
    model = UserModel(UserModelConfig(K, width, **settings)).double().init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += spread * 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    model.project()
    return model


def world(num_users=5, num_choices=7, width=6, seed=0, **settings):
    """Turns, pairs and ratings of the same users, in float64; some comparisons are "same", some were not asked."""
    obs, _ = observations(seed, num_users, num_choices, width=width, columns=3, images=2, **settings)
    rng = np.random.default_rng(seed)
    compare = np.where((obs.compare != 2) & (rng.random(len(obs.compare)) < 0.3), 0, obs.compare)
    pairs, ratings, _ = singles(seed, num_users, 4, width=width)
    return um.evidence(num_users, obs._replace(compare=compare), pairs, ratings, torch.float64)


def copies(model, **changed):
    """The model with other values of some parameters."""
    other = UserModel(model.config).to(model.taste.dtype)
    other.load_state_dict(model.state_dict() | {k: torch.as_tensor(v, dtype=model.taste.dtype) for k, v in changed.items()})
    return other


# -----------------------------------------------------------------------------
# Scores and likelihoods


def test_a_score_and_a_choice_by_hand():
    """One type in the plane, A = I, taste (0, 1), c = 2 tanh(.5) = .924234: start (1, 0), base (0, 1), image (.6, .8) is worth .6 + .8 + .924234 x .2."""
    model = UserModel(UserModelConfig(1, 2, rank=0, agg="mean")).double().init_weights(0, tau=2.0)
    model = copies(model, taste=[[0.0, 1.0]], change=[0.5])
    start, base = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    images = torch.tensor([[[[0.6, 0.8], [1.0, 0.0]], [[0.0, 1.0], [0.8, 0.6]]]]).double()
    s = model.scores(start, base, images.flatten(1, 2))[0, :, 0]
    assert s.tolist() == pytest.approx([1.5848469, 1.9242344, 1.0, 1.7696938], abs=1e-6)
    utilities = model.utilities(start, base, images)
    assert utilities.flatten().tolist() == pytest.approx([1.7545406, 1.3848469], abs=1e-6)
    assert model.log_choice(utilities).exp().flatten().tolist() == pytest.approx([0.6768619, 0.3231381], abs=1e-6)          # softmax of 2 R: 1/(1+e^-.7393875)
    lse = UserModel(UserModelConfig(1, 2, rank=0, lse_temp=0.5)).double()
    lse.load_state_dict(model.state_dict())
    assert lse.utilities(start, base, images)[0, 0, 0].item() == pytest.approx(0.5 * math.log((math.exp(1.5848469 / 0.5) + math.exp(1.9242344 / 0.5)) / 2), abs=1e-6)


def test_low_rank_by_hand():
    """A = I + (1, 0)' (0, 1): A(0, 1) = (1, 1), A(1, 0) = (1, 0), so that cos = 1 / sqrt 2."""
    model = UserModel(UserModelConfig(1, 2, rank=1, change=False)).double().init_weights(0)
    model = copies(model, taste=[[1.0, 0.0]], down=[[[0.0, 1.0]]], up=[[[1.0], [0.0]]])
    x, y = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[[0.0, 1.0]]]).double()
    assert model.scores(x, x, y).item() == pytest.approx(2 ** -0.5, abs=1e-12)


def plain_score(model, k, start, base, image):
    A = np.eye(model.config.width) + model.up[k].detach().numpy() @ model.down[k].detach().numpy()
    a, b = A @ start, A @ image
    taste = model.taste[k].detach().numpy()
    c = 2 * math.tanh(model.change[k].item()) if model.config.change else 0.0
    close = 2 / (1 + math.exp(-model.closeness[k].item())) if model.config.closeness else 1.0
    return close * (a @ b) / np.linalg.norm(a) / np.linalg.norm(b) + taste @ image / np.linalg.norm(taste) + c * (1 - base @ image)


def plain_utility(model, k, start, base, column):
    s = [plain_score(model, k, start, base, image) for image in column]
    if model.config.agg == "lse":
        t = model.config.lse_temp
        return t * math.log(sum(math.exp(x / t) for x in s) / len(s))
    return max(s) if model.config.agg == "max" else sum(s) / len(s)


@pytest.mark.parametrize("agg, change, same", [("lse", True, "half"), ("max", False, "drop"), ("mean", True, "drop")])
def test_every_likelihood_equals_plain_loops(agg, change, same):
    model, data = model_of(agg=agg, change=change, same=same, rank=2), world()
    data.observations.before[3] = 1                                  # compared with the turn before the last: `before` says with which
    o, p, r = ([column.numpy() for column in part] for part in data[:3])
    o, p, r = Observations(*o), Pairs(*p), Ratings(*r)
    sig = lambda x: 1 / (1 + math.exp(-x))
    tau = {name: model.tau(name).item() for name in um.TAUS}
    for k in range(3):
        R = np.array([[plain_utility(model, k, o.start[n], o.base[n], column) for column in o.images[n]] for n in range(len(o.user))])
        expected = []
        for n in range(len(o.user)):
            logp = tau["choice"] * R[n, o.choice[n]] - math.log(sum(math.exp(tau["choice"] * x) for x in R[n]))
            if o.compare[n] != 2:
                gain = tau["compare"] * (R[n, o.choice[n]] - R[o.before[n], o.choice[o.before[n]]])
                logp += {1: math.log(sig(gain)), -1: math.log(sig(-gain)), 0: (math.log(sig(gain)) + math.log(sig(-gain))) / 2 if same == "half" else 0.0}[o.compare[n]]
            expected.append(logp)
        assert um.log_likelihoods(model, data.observations)[:, k].tolist() == pytest.approx(expected, abs=1e-11)
        expected = []
        for n in range(len(p.user)):
            gain = tau["pair"] * (plain_score(model, k, p.prompt[n], p.prompt[n], p.image_a[n]) - plain_score(model, k, p.prompt[n], p.prompt[n], p.image_b[n]))
            expected.append(p.weight[n] * (p.label[n] * math.log(sig(gain)) + (1 - p.label[n]) * math.log(sig(-gain))))
        assert um.pair_likelihoods(model, data.pairs)[:, k].tolist() == pytest.approx(expected, abs=1e-11)
        slope, offset, sigma = math.exp(model.rating[0].item()), model.rating[1].item(), math.exp(model.rating[2].item())
        expected = [-(slope * plain_score(model, k, r.prompt[n], r.prompt[n], r.image[n]) + offset - r.rating[n]) ** 2 / (2 * sigma ** 2) - math.log(sigma)
                    for n in range(len(r.user))]
        assert um.rating_likelihoods(model, data.ratings)[:, k].tolist() == pytest.approx(expected, abs=1e-11)
    assert set(o.compare.tolist()) == {1, 0, -1, 2}


def test_a_pair_by_hand():
    """Margin tau (s_a - s_b) = 3 x (1 - 0) = 3: log sig(3) = -.0485874, label 1/2 is the mean of -.0485874 and -3.0485874; weight 1/3 a third of it."""
    model = UserModel(UserModelConfig(1, 2, rank=0)).double().init_weights(0, tau=3.0)
    model = copies(model, taste=[[0.0, 1.0]])
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    prompt = unit(np.array([1.0, 1.0]))                              # equally near to both
    pairs = Pairs(np.zeros(3, np.int64), np.stack([prompt] * 3), np.stack([y] * 3), np.stack([x] * 3), np.array([1.0, 0.5, 0.0]), np.array([1.0, 1.0, 1 / 3]))
    data = um.evidence(1, pairs=pairs, dtype=torch.float64)
    assert um.pair_likelihoods(model, data.pairs)[:, 0].tolist() == pytest.approx([-0.0485874, -1.5485874, -1.0161958], abs=1e-6)
    assert um.num_observations(data) == pytest.approx(2 + 1 / 3)


def test_a_rating_by_hand():
    """y = 4, slope 2, score 1, offset 1, sigma .5: -(3 - 4)^2 / (2 x .25) - log .5 = -2 + .6931472."""
    model = copies(UserModel(UserModelConfig(1, 2, rank=0)).double().init_weights(0), taste=[[0.0, 1.0]], rating=[math.log(2), 1.0, math.log(0.5)])
    ratings = Ratings(np.zeros(1, np.int64), np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]), np.array([4.0]))
    assert um.rating_likelihoods(model, um.evidence(1, ratings=ratings, dtype=torch.float64).ratings).item() == pytest.approx(-1.3068528, abs=1e-6)


def test_one_type_is_plain_cross_entropy_and_bradley_terry():
    """Value and gradients: with K = 1 the posterior is 1 and EM is maximum likelihood."""
    model, data = model_of(K=1), world()._replace()
    logps, user = um.all_likelihoods(model, data)
    g = um.posterior(model, logps, user, data.num_users)
    assert torch.equal(g, torch.ones(5, 1).double())
    (g[user] * logps).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    o, p, r = data[:3]
    tau, R = model.log_tau.exp(), model.utilities(o.start, o.base, o.images)[..., 0]
    picked = R[torch.arange(len(R)), o.choice]
    gain = tau[2] * (picked - picked[o.before.clamp(min=0)])
    up, down = F.logsigmoid(gain)[o.compare == 1].sum(), F.logsigmoid(-gain)[o.compare == -1].sum()
    s = model.scores(p.prompt, p.prompt, torch.stack([p.image_a, p.image_b], 1))[..., 0]
    terry = -F.binary_cross_entropy_with_logits(tau[1] * (s[:, 0] - s[:, 1]), p.label, reduction="sum")
    means = model.rating[0].exp() * model.scores(r.prompt, r.prompt, r.image[:, None])[:, 0, 0] + model.rating[1]
    normal = torch.distributions.Normal(means, model.rating[2].exp()).log_prob(r.rating).sum() + len(means) * math.log(2 * math.pi) / 2
    plain = -F.cross_entropy(tau[0] * R, o.choice, reduction="sum") + up + down + terry + normal
    assert abs(logps.sum().item() - plain.item()) < 1e-11
    plain.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (found[name] - p.grad).abs().max() < 1e-11, name
    assert set(found) == {"down", "up", "taste", "change", "closeness", "log_tau", "rating"}


def test_the_unnamed_score_equals_the_made_one_in_float32():
    """A_k I is never made; the shortcut loses nothing."""
    model, data = model_of(width=48, rank=6, spread=0.5), world(width=48)
    o = data.observations
    single = UserModel(model.config)
    single.load_state_dict(model.state_dict())
    exact, found = model.utilities(o.start, o.base, o.images), single.utilities(o.start.float(), o.base.float(), o.images.float())
    assert (exact - found).abs().max() < 2e-6


# -----------------------------------------------------------------------------
# Posteriors


def test_posteriors_by_hand():
    """pi (.6, .4); user 0 saw p = (.5, .1) and (.2, .8): .6 x .1 against .4 x .08; user 1 saw nothing."""
    model = model_of(K=2)
    model = copies(model, log_prior=np.log([0.6, 0.4]))
    logps, user = torch.tensor([[0.5, 0.1], [0.2, 0.8]], dtype=torch.float64).log(), torch.tensor([0, 0])
    g = um.posterior(model, logps, user, 2)
    assert g.flatten().tolist() == pytest.approx([0.06 / 0.092, 0.032 / 0.092, 0.6, 0.4], abs=1e-12)
    assert um.joint(model, logps, user, 2).logsumexp(1).exp().tolist() == pytest.approx([0.092, 1.0], abs=1e-12)
    assert um.posterior(model, logps, user, 2, temp=2.0)[0].tolist() == pytest.approx((np.sqrt([0.06, 0.032]) / np.sqrt([0.06, 0.032]).sum()).tolist(), abs=1e-12)
    assert um.filtered(model, logps, user, 2).flatten().tolist() == pytest.approx([0.6, 0.4, 0.3 / 0.34, 0.04 / 0.34], abs=1e-12)


def test_no_gradient_goes_through_the_posterior():
    model, data = model_of(), world()
    logps, user = um.all_likelihoods(model, data)
    assert not um.posterior(model, logps, user, 5).requires_grad and not um.filtered(model, logps, user, 5).requires_grad
    assert not model.log_prior.requires_grad


def test_500_observations_do_not_underflow():
    """Products of 500 probabilities of 1e-4 are 1e-2000; the posterior is still exact: the types differ by 1e-4 an observation."""
    model = copies(model_of(K=2), log_prior=np.log([0.5, 0.5]))
    logps = torch.full((500, 2), math.log(1e-4)).double()
    logps[:, 1] -= 1e-4
    user = torch.zeros(500, dtype=torch.int64)
    expected = 1 / (1 + math.exp(-500 * 1e-4))
    for x in (logps, logps.float()):
        assert um.posterior(model, x, user, 1)[0, 0].item() == pytest.approx(expected, abs=1e-3 if x.dtype == torch.float32 else 1e-9)
        assert um.filtered(model, x, user, 1).isfinite().all()
    obs, _ = observations(0, 2, 500, width=6)
    data = um.evidence(2, obs)
    big = model_of(K=8).float()
    metrics, g = um.evaluate(big, data)
    assert np.isfinite(metrics["loss"]) and np.allclose(g.sum(1), 1) and len(metrics["by_nth"]["choice_accuracy"]) == 500


def test_permuted_types_change_only_names():
    model, data, order = model_of(K=4), world(), [2, 0, 3, 1]
    other = copies(model, **{name: getattr(model, name)[order] for name in ("down", "up", "taste", "change", "closeness", "log_prior")})
    (a, user), (b, _) = um.all_likelihoods(model, data), um.all_likelihoods(other, data)
    assert torch.allclose(a[:, order], b, atol=1e-13)
    assert torch.allclose(um.posterior(model, a, user, 5)[:, order], um.posterior(other, b, user, 5), atol=1e-13)
    left, right = um.evaluate(model, data)[0], um.evaluate(other, data)[0]
    for name in ("prior", "filtered"):
        assert left[name] == pytest.approx(right[name], abs=1e-12)


def test_filtered_uses_nothing_later():
    """Turn 4 of the second session of user 2 is changed in every way: predictions before it, and of everybody else, are bitwise what they were."""
    model, data = model_of(), world(num_choices=10)
    o = data.observations
    row = 2 * 10 + 5 + 4
    changed = {name: getattr(o, name).clone() for name in ("images", "start", "base", "choice", "compare")}
    changed["choice"][row] = (o.choice[row] + 1) % 3
    changed["compare"][row] = -o.compare[row] if o.compare[row] in (1, -1) else 1
    for name in ("images", "start", "base"):
        changed[name][row] = changed[name][row].flip(-1)
    a, b = (um.predictions(model, d)[0]["filtered"] for d in (data, data._replace(observations=o._replace(**changed))))
    here = np.arange(len(o.user)) == row
    for key in ("choice", "compare"):
        assert (a[key] == b[key])[~here].all() and not np.array_equal(a[key][here], b[key][here])
    for key in ("pair", "rating"):
        assert (a[key] == b[key]).all()
    earlier = o._replace(choice=o.choice.clone())                    # the first turn of user 2 changes what is expected later, of user 2 alone
    earlier.choice[20] = (o.choice[20] + 1) % 3
    c = um.predictions(model, data._replace(observations=earlier))[0]["filtered"]["choice"]
    assert (a["choice"] == c).all(1).tolist() == [n not in range(21, 30) for n in range(len(o.user))]


def test_filtered_equals_a_loop():
    model, data = model_of(), world(num_users=4, num_choices=6)
    logps, user = um.all_likelihoods(model, data)
    occasion = um.occasions(data)
    for group in (None, occasion):
        found = um.filtered(model, logps, user, 4, group)
        for row in range(len(user)):
            before = [i for i in range(row) if user[i] == user[row] and (group is None or group[i] != group[row])]
            total = model.log_prior.log_softmax(0) + sum((logps[i] for i in before), torch.zeros(3).double())
            assert torch.allclose(found[row], total.softmax(0), atol=1e-12)


def test_pairs_of_one_ranking_do_not_predict_one_another():
    """Three pairs about one prompt by one user are one occasion, the fourth about another knows all three; another user's pair knows none."""
    rng = np.random.default_rng(0)
    e = unit(rng.normal(size=(12, 6)))
    prompt = e[[0, 0, 0, 1, 1]]
    pairs = Pairs(np.array([0, 0, 0, 0, 1]), prompt, e[[2, 3, 4, 5, 6]], e[[7, 8, 9, 10, 11]], np.ones(5), np.array([1 / 3, 1 / 3, 1 / 3, 1, 1]))
    data = um.evidence(2, pairs=pairs, dtype=torch.float64)
    model = model_of()
    logps, user = um.all_likelihoods(model, data)
    known = um.filtered(model, logps, user, 2, um.occasions(data))
    prior = model.log_prior.softmax(0)
    assert torch.allclose(known[[0, 1, 2, 4]], prior.expand(4, 3), atol=1e-14)
    assert torch.allclose(known[3], (prior.log() + logps[:3].sum(0)).softmax(0), atol=1e-14)


# -----------------------------------------------------------------------------
# Metrics


def test_filtered_losses_add_up_to_the_likelihood():
    """The chain rule: what each choice was expected with, one after the other, is the likelihood of all of them."""
    obs, _ = observations(0, 6, 9, width=6, turns=1)                 # sessions of one turn, so that there are choices alone
    data, model = um.evidence(6, obs, dtype=torch.float64), model_of()
    metrics, _ = um.evaluate(model, data)
    assert metrics["loss"] == pytest.approx(metrics["filtered"]["choice_loss"], abs=1e-12) and metrics["prior"]["choice_loss"] != metrics["loss"]
    assert "compare_accuracy" not in metrics["filtered"]


def test_metrics_equal_a_loop_and_do_not_depend_on_blocks():
    model, data = model_of(), world(num_users=9)
    metrics, g = um.evaluate(model, data)
    cut, g_cut = um.evaluate(model, data, size=2)
    found, facts = um.predictions(model, data)
    assert np.allclose(g, g_cut, atol=1e-14)
    for name in ("prior", "filtered"):
        assert metrics[name] == pytest.approx(cut[name], abs=1e-12)
        p, o = found[name], data.observations
        hits = [p["choice"][n].argmax() == o.choice[n] for n in range(len(o.user))]
        assert metrics[name]["choice_accuracy"] == pytest.approx(np.mean(hits))
        asked = [n for n in range(len(o.user)) if o.compare[n] in (1, -1)]
        assert metrics[name]["compare_accuracy"] == pytest.approx(np.mean([(p["compare"][n] > 0.5) == (o.compare[n] == 1) for n in asked]))
        clear = [n for n in range(len(data.pairs.user)) if data.pairs.label[n] != 0.5]
        assert metrics[name]["pair_accuracy"] == pytest.approx(np.mean([(p["pair"][n] > 0.5) == (data.pairs.label[n] == 1) for n in clear]))
    for key in ("choice_accuracy", "choice_loss"):
        assert metrics["by_turn"][key] == pytest.approx(cut["by_turn"][key]) and metrics["by_nth"][key] == pytest.approx(cut["by_nth"][key])
    turn_2 = [n for n in range(len(data.observations.user)) if data.observations.turn[n] == 2]
    assert metrics["by_turn"]["choice_loss"][2] == pytest.approx(-np.mean([math.log(found["filtered"]["choice"][n, data.observations.choice[n]]) for n in turn_2]))
    assert metrics["by_nth"]["choice_accuracy"][:8] == [None] * 8              # four pairs and four ratings come first
    assert facts["entropy"].max() <= math.log(3) + 1e-12


def test_a_constant_guess_gets_what_chance_gives():
    """Equal scores: a quarter of four columns, half of the pairs, no correlation."""
    model = UserModel(UserModelConfig(2, 6, rank=0)).double().init_weights(0)
    obs, _ = observations(0, 5, 4, width=6)
    obs = obs._replace(images=np.broadcast_to(obs.images[:, :1, :1], obs.images.shape))
    pairs, ratings, _ = singles(0, 5, 4, width=6)
    data = um.evidence(5, obs, pairs._replace(image_b=pairs.image_a), ratings._replace(image=np.repeat(ratings.image[:1], 20, 0), prompt=np.repeat(ratings.prompt[:1], 20, 0)))
    found = um.evaluate(model.float(), data)[0]["prior"]
    assert found["choice_accuracy"] == pytest.approx(0.25) and found["pair_accuracy"] == 0.5 and found["choice_loss"] == pytest.approx(math.log(4), abs=1e-6)
    assert found["spearman"] is None


def test_spearman():
    assert um.mean_ranks([10, 20, 20, 5]).tolist() == [2, 3.5, 3.5, 1]
    assert um.spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1) and um.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert um.spearman([1, 1, 1], [1, 2, 3]) is None and um.spearman([1], [2]) is None
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 5, 30), rng.normal(size=30).round(1)
        assert um.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


# -----------------------------------------------------------------------------
# Recovery


def test_adjusted_rand_by_hand_and_against_pairs():
    """Hubert & Arabie: (0,0,1,1) and (0,0,1,2): 1 of 6 pairs together in both, 2 and 1 in each: (1 - 2/6) / (1.5 - 2/6) = .571429."""
    assert um.adjusted_rand([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx(0.5714286, abs=1e-6)
    assert um.adjusted_rand([0, 0, 1, 1], [5, 5, 3, 3]) == 1.0 and um.adjusted_rand([0, 0, 0], [1, 1, 1]) == 1.0 and um.adjusted_rand([0], [0]) == 1.0
    rng = np.random.default_rng(0)
    assert abs(np.mean([um.adjusted_rand(rng.integers(0, 4, 200), rng.integers(0, 4, 200)) for _ in range(50)])) < 0.005
    metrics = pytest.importorskip("sklearn.metrics")
    for _ in range(20):
        a, b = rng.integers(0, 4, 25), rng.integers(0, 6, 25)
        assert um.adjusted_rand(a, b) == pytest.approx(metrics.adjusted_rand_score(a, b), abs=1e-12)


def test_assignment_equals_brute_force():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 6):
        for gain in (rng.normal(size=(n, n)), rng.integers(0, 3, (n, n)), np.zeros((n, n))):
            found = um.assignment(gain)
            best = max(sum(gain[i, order[i]] for i in range(n)) for order in itertools.permutations(range(n)))
            assert sorted(found.tolist()) == list(range(n)) and gain[np.arange(n), found].sum() == pytest.approx(best, abs=1e-12)
    optimize = pytest.importorskip("scipy.optimize")
    for n in (12, 40):
        gain = rng.normal(size=(n, n))
        rows, columns = optimize.linear_sum_assignment(gain, maximize=True)
        assert gain[np.arange(n), um.assignment(gain)].sum() == pytest.approx(gain[rows, columns].sum(), abs=1e-9)


def test_recovery_matches_types_by_name_free():
    types = np.array([7, 7, 7, 3, 3, 9])
    g = np.eye(4)[[2, 2, 0, 1, 1, 3]]                                # four found, three true; the third user alone
    found = um.recovery(types, g)
    assert found["accuracy"] == pytest.approx(5 / 6) and found["certainty"] == 1.0 and found["ari"] == pytest.approx(um.adjusted_rand(types, [2, 2, 0, 1, 1, 3]))
    assert um.recovery(types, np.ones((6, 1)))["accuracy"] == 0.5    # one type found: the largest true one


# -----------------------------------------------------------------------------
# Parts of the data, and types that die


def test_select_keeps_users_whole_and_renames_them():
    data = world(num_users=6)
    part = um.select(data, [1, 4])
    o, p = part.observations, data.observations
    rows = [n for n in range(len(p.user)) if p.user[n] in (1, 4)]
    assert part.num_users == 2 and o.user.tolist() == [int(p.user[n] == 4) for n in rows] and torch.equal(o.images, p.images[rows])
    assert all(o.before[i] == (-1 if p.before[n] < 0 else rows.index(int(p.before[n]))) for i, n in enumerate(rows))
    model = model_of()
    whole, user = um.all_likelihoods(model, data)
    half, _ = um.all_likelihoods(model, part)
    assert torch.allclose(whole[(user == 1) | (user == 4)], half, atol=1e-13)
    assert um.select(data, [])[3] == 0 and len(um.select(data, []).pairs.user) == 0


def test_a_reseeded_type_begins_at_the_users_explained_worst():
    obs, types = observations(1, 40, 30, num_types=2, width=8)
    data = um.evidence(40, obs)
    model = UserModel(UserModelConfig(2, 8)).init_weights(0)
    with torch.no_grad():
        model.log_prior.copy_(torch.tensor([0.999, 0.001]).log())
    before = {name: p.clone() for name, p in model.named_parameters()}
    fit = torch.from_numpy(np.where(types == 0, -1.0, -2.0) - np.arange(40) * 1e-6)
    um.reseed(model, 1, data, fit, seed=3)
    worst = um.select(data, np.flatnonzero(types == 1))
    assert F.cosine_similarity(model.taste[1].double(), um.pulls(worst).sum(0), dim=0) > 0.9
    assert model.log_prior.exp().tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    for name in ("down", "up", "taste"):
        assert torch.equal(getattr(model, name)[0], before[name][0]) and not torch.equal(getattr(model, name)[1], before[name][1])


def test_pull_by_hand():
    """One turn, picked (0, 1), beside it (1, 0): half of the difference. A pair with label 0 and weight .5 draws to b by a quarter of the difference."""
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    i = np.zeros(1, np.int64)
    obs = Observations(i, x[None], x[None], np.stack([x, y])[None, :, None], i + 1, i - 1, i + 2, i, i)
    assert um.pulls(um.evidence(1, obs))[0].tolist() == [-0.5, 0.5]
    assert um.pulls(um.evidence(1, pairs=Pairs(i, x[None], x[None], y[None], np.zeros(1), np.full(1, 0.5))))[0].tolist() == [-0.25, 0.25]


def test_tau_is_bounded_and_says_so():
    model = UserModel(UserModelConfig(2, 4)).init_weights(0)
    assert model.at_bound() == []
    with torch.no_grad():
        model.log_tau.copy_(torch.tensor([9.0, 1.0, -9.0]))
        model.taste *= 3
    model.project()
    assert model.at_bound() == ["choice", "compare"] and [model.tau(n).item() for n in um.TAUS] == pytest.approx([100, math.e, 0.1], rel=1e-5)
    assert model.taste.norm(dim=1).tolist() == pytest.approx([1, 1])
    model.tau("choice").backward()
    assert model.log_tau.grad[0] > 0                                 # at the bound it can still come back


# -----------------------------------------------------------------------------
# Folders


def test_a_folder_gives_the_model_back_bitwise(tmp_path):
    model = model_of(K=3, agg="max", same="half", change=False).float()
    checkpoint.save_hf(model, um.Origin("world", "a", "log.jsonl"), tmp_path / "m")
    again, origin = um.load_user_model(tmp_path / "m")
    assert again.config == model.config and origin == um.Origin("world", "a", "log.jsonl")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architectures"] == ["UserModel"]


def test_what_is_no_user_model_is_refused(tmp_path):
    def fresh(name):
        checkpoint.save_hf(model_of().float(), um.Origin("world", "all", "world"), tmp_path / name)
        return tmp_path / name
    path = fresh("cut")
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[:-9])
    with pytest.raises(ValueError, match="truncated or is no safetensors"):
        um.load_user_model(path)
    path = fresh("kind")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | dict(architectures=["Recommender"])))
    with pytest.raises(ValueError, match="another kind of model than a user model"):
        um.load_user_model(path)
    (path / "config.json").write_text(json.dumps(config | dict(width=7)))
    with pytest.raises(ValueError, match="has shape"):
        um.load_user_model(path)
    (path / "config.json").write_text(json.dumps(config | dict(agg="median")))
    with pytest.raises(ValueError, match="agg of lse, max or mean"):
        um.load_user_model(path)
    (path / "config.json").write_text(json.dumps(config | dict(depth=2)))
    with pytest.raises(ValueError, match="depth"):
        um.load_user_model(path)
    path = fresh("less")
    tensors = load_file(path / "model.safetensors")
    tensors.pop("taste")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match="1 missing tensors, among them taste"):
        um.load_user_model(path)
    path = fresh("origin")
    (path / "origin.json").write_text("{}")
    with pytest.raises(ValueError, match="expected embeddings, half, data"):
        um.load_user_model(path)
    with pytest.raises(ValueError, match="expected the checkpoint of a user model"):
        um.load_user_model(tmp_path)


# -----------------------------------------------------------------------------
# What is refused


def bad(**changes):
    obs, _ = observations(0, 3, 4, width=6)
    return obs._replace(**{name: change(np.array(getattr(obs, name))) for name, change in changes.items()})


def put(row, value):
    def change(column):
        column[row] = value
        return column
    return change


@pytest.mark.parametrize("changes, match", [
    (dict(choice=put(3, -1)), "observations, row 3: choice -1, expected a column of 0..3; leave out turns without a pick"),
    (dict(choice=put(2, 4)), "row 2: choice 4"), (dict(images=put((5, 1, 0, 2), np.nan)), "row 5: images has norm nan, expected 1"),
    (dict(start=lambda x: 2 * x), "row 0: start has norm 2, expected 1"), (dict(base=lambda x: x[:, :5]), "base has the shape .12, 5., expected embeddings of width 6"),
    (dict(images=lambda x: x[..., :5]), "images has the shape .12, 4, 4, 5., expected embeddings of width 6"), (dict(user=put(0, 3)), "row 0: user 3, expected a user of 0..2"),
    (dict(user=lambda x: x[::-1]), "rows that are ordered by user"), (dict(before=put(5, 3)), "row 5: before 3, expected a row of the same session"),
    (dict(before=put(2, 2)), "row 2: before 2, expected an earlier row"), (dict(compare=put(1, 5)), "row 1: compare 5, expected"),
    (dict(compare=put(0, 1)), "row 0: compare 1, expected 2, not asked"), (dict(turn=lambda x: x[:5]), "5 rows of turn, 12 of user")])
def test_bad_observations_are_named_by_row(changes, match):
    with pytest.raises(ValueError, match=match):
        um.evidence(3, bad(**changes))


def test_bad_pairs_and_ratings_are_named_by_row():
    pairs, ratings, _ = singles(0, 3, 4, width=6)
    with pytest.raises(ValueError, match="pairs, row 2: label 0.7, expected 1, .5 or 0"):
        um.evidence(3, pairs=pairs._replace(label=put(2, 0.7)(pairs.label.astype(float))))
    with pytest.raises(ValueError, match="pairs, row 1: weight"):
        um.evidence(3, pairs=pairs._replace(weight=put(1, 0.0)(pairs.weight)))
    with pytest.raises(ValueError, match="ratings, row 4: rating nan"):
        um.evidence(3, ratings=ratings._replace(rating=put(4, np.nan)(ratings.rating)))
    with pytest.raises(ValueError, match="no evidence"):
        um.evidence(3)


def test_sessions_of_unequal_length_and_slates_of_another_size():
    """Neither needs padding: turns are rows, and a model of four columns reads two; embeddings of another width are of another encoder."""
    obs, _ = observations(0, 4, 10, width=6)
    keep = np.array([n for n in range(40) if not (n // 10 == 1 and n % 10 >= 3) and not (n // 10 == 2 and n % 5 >= 4)])
    place = {int(n): i for i, n in enumerate(keep)}
    short = Observations(*(column[keep] for column in obs))
    short = short._replace(before=np.array([place[int(b)] if b >= 0 else -1 for b in short.before]))
    data, model = um.evidence(4, short, dtype=torch.float64), model_of()
    metrics, _ = um.evaluate(model, data)
    assert len(metrics["by_nth"]["choice_accuracy"]) == 10 and len(data.observations.user) == 31
    whole = um.evidence(4, obs, dtype=torch.float64)
    (a, _), (b, _) = um.all_likelihoods(model, whole), um.all_likelihoods(model, data)
    assert torch.allclose(a[torch.from_numpy(keep)], b, atol=1e-13)
    two = um.evidence(4, obs._replace(images=obs.images[:, :2, :3], choice=obs.choice % 2))
    assert np.isfinite(um.evaluate(model.float(), two)[0]["loss"])
    with pytest.raises(ValueError, match="width 8, this user model was made for 6"):
        um.all_likelihoods(model.float(), um.evidence(3, observations(0, 3, 4, width=8)[0]))


@pytest.mark.parametrize("changes", [dict(num_types=0), dict(agg="median"), dict(same="maybe"), dict(lse_temp=0.0), dict(rank=-1)])
def test_bad_configs_are_refused(changes):
    with pytest.raises(ValueError, match="expected num_types"):
        replace(UserModelConfig(2, 4), **changes)


def test_types_start_where_users_are_drawn():
    """Clusters of what users take: with three types of taste, each start is nearest to another true one; the seed decides, and one type alone is fine."""
    obs, types = observations(1, 90, 20, num_types=3, width=12)
    data = um.evidence(90, obs)
    model = UserModel(UserModelConfig(3, 12)).init_weights(0)
    um.spread(model, data, 0)
    drawn = um.pulls(data)
    means = torch.stack([drawn[torch.from_numpy(types == k)].mean(0) for k in range(3)])
    common = means - means.mean(0)
    near = (F.normalize(model.taste.double() - F.normalize(means.mean(0), dim=0), dim=1) @ F.normalize(common, dim=1).T).argmax(1)
    assert sorted(near.tolist()) == [0, 1, 2] and (model.taste.norm(dim=1) - 1).abs().max() < 1e-5
    again = UserModel(UserModelConfig(3, 12)).init_weights(0)
    um.spread(again, data, 0)
    assert torch.equal(model.taste, again.taste)
    um.spread(UserModel(UserModelConfig(1, 12)).init_weights(0), data, 0)
