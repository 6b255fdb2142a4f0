"""Simulated sessions: functions of their arguments, the same luck for every policy, and a log that says what happened."""
import numpy as np
import pytest
import torch

from data import expansions, slate
from data.slate import CATEGORIES, STYLES, World, start_prompts
from sessions import Facts, WorldCrowd, agent_policy, base_policy, behavior_policy, oracle_greedy, parse_behavior, random_policy, simulate, stranger
from slate_agent import SlateAgentConfig, Texts, View, new_agent, rectangles, select

WORLD = World(0)
STARTS, _ = start_prompts(200, 1)


def play(policy=random_policy, n=30, world=WORLD, crowd=None, **settings):
    crowd = WorldCrowd(world, n, seed=2) if crowd is None else crowd
    return simulate(crowd, STARTS[:n], policy, **dict(seed=3, horizon=4) | settings)


def lines_of(log, tmp_path, name="log.jsonl"):
    slate.write(log, tmp_path / name)
    return (tmp_path / name).read_text(encoding="utf-8").splitlines()


# -----------------------------------------------------------------------------
# Functions of their arguments


def test_the_same_arguments_give_the_same_sessions(tmp_path):
    a, b, c = play(critique=.3), play(critique=.3), play(critique=.3, seed=4)
    assert lines_of(a.log, tmp_path) == lines_of(b.log, tmp_path) != lines_of(c.log, tmp_path)
    assert np.array_equal(a.utility, b.utility) and np.array_equal(a.emb, b.emb) and a.ids == b.ids and np.array_equal(a.kind, b.kind)
    # a table of texts that others have used, or none: the same sessions
    assert lines_of(play(critique=.3, texts=Texts(["something", *STARTS])).log, tmp_path) == lines_of(a.log, tmp_path)


@pytest.mark.parametrize("policy", [random_policy, behavior_policy(dict(random=1, myopic=1, noisy=1)), oracle_greedy, base_policy])
def test_a_row_does_not_depend_on_the_others(policy):
    """The first 7 of 30 sessions are the sessions of a crowd of 7: people, starts, candidates, images, picks and comparisons."""
    many, few = play(policy, 30, critique=.5), play(policy, 7, critique=.5)
    assert np.allclose(many.utility[:7], few.utility, atol=1e-12) and np.allclose(many.picked[:7], few.picked, atol=1e-12)
    part = many.log.take(np.arange(7))
    for name in ("slate", "choice", "compare", "categories"):
        assert np.array_equal(getattr(part, name), getattr(few.log, name)), name
    assert part.critique == few.log.critique and part.behavior == few.log.behavior
    assert [part.texts[i] for i in part.candidates.ravel()] == [few.log.texts[i] for i in few.log.candidates.ravel()]


def test_policies_meet_the_same_luck():
    """Same people, starts, candidates of the first turn, images in the first column, draws; a policy that shows the same slates lives the same session."""
    a, b = play(random_policy), play(base_policy)
    first = lambda s: [s.log.texts[i] for i in s.log.candidates[s.log.first[:-1]].ravel()]
    assert np.array_equal(a.kind, b.kind) and first(a) == first(b) and not np.array_equal(a.log.slate, b.log.slate)
    copy = iter([a.log.slate[a.log.turn == t] for t in range(4)])
    again = play(lambda view, facts: (next(copy), "copy"))
    assert np.array_equal(a.utility, again.utility) and np.array_equal(a.log.choice, again.log.choice)
    # noise belongs to (session, turn, column, image), whatever the column shows: images are unit(prompt + .3 noise / 4), to the precision of a file
    noise = slate.IMAGE_NOISE * slate.stream(3, "images", 0).standard_normal((30, 4, 4, 16)) / 4
    for s in (a, b):
        start = s.log.first[:-1]
        shown = WORLD.embed([s.log.texts[i] for i in s.log.candidates[start[:, None], s.log.slate[start]].ravel()]).reshape(30, 4, 1, 16)
        images = s.emb[-s.log.images.size:].reshape(30, 4, 4, 4, 16)[:, 0]
        assert np.abs(slate.unit(shown + noise) - images).max() < 1e-3


def test_people_with_several_sessions():
    crowd = WorldCrowd(WORLD, 4, seed=2, persons=[1, 0, 1, 2])
    assert np.array_equal(crowd.people.taste[0], crowd.people.taste[2]) and np.array_equal(crowd.people.taste[1], WorldCrowd(WORLD, 1, seed=2).people.taste[0])
    s = simulate(crowd, STARTS[:4], random_policy, seed=3, horizon=2)
    assert s.log.user.tolist() == [0, 1, 0, 2] and len(set(s.log.user_ids)) == 3 and len(set(s.log.session_ids)) == 4


# -----------------------------------------------------------------------------
# What the log says


def test_the_log_is_what_happened(tmp_path):
    s = play(behavior_policy(dict(random=1, noisy=1)), critique=.4, horizon=5, slate_size=3, images_per_prompt=2, source="sim:probe")
    log, n = s.log, 30
    assert (len(log.choice), log.slate.shape, log.images.shape) == (150, (150, 3), (150, 3, 2)) and s.utility.shape == (n, 5, 3)
    assert [log.texts[i] for i in log.prompt] == STARTS[:n] and set(log.source) == {"sim:probe"} and (log.end == 0).all()
    # the picked text is the next base, and the base's expansions are the candidates
    picked, base = log.picked.reshape(n, 5), log.base.reshape(n, 5)
    assert np.array_equal(base[:, 1:], picked[:, :-1]) and np.array_equal(base[:, 0], log.prompt)
    for row, (i, t) in enumerate((i, t) for i in range(n) for t in range(5)):
        found = slate.expansions(log.texts[base[i, t]], 3, i, t)
        assert [(CATEGORIES[c], log.texts[x]) for c, x in zip(log.categories[row], log.candidates[row])] == found
        assert len({log.categories[row, j] for j in log.slate[row]}) == 3
    # utilities are those of the images in the file, rewards those of the picked column
    emb = dict(zip(s.ids, s.emb.astype(np.float32)))
    crowd = WorldCrowd(WORLD, n, seed=2)
    for t in range(5):
        at = np.arange(n) * 5 + t
        texts = [[log.texts[log.candidates[r, j]] for j in log.slate[r]] for r in at]
        images = np.stack([[[emb[log.image_ids[i]] for i in column] for column in log.images[r]] for r in at])
        assert np.allclose(s.utility[:, t], crowd.utilities(WORLD.embed(STARTS[:n]), WORLD.embed([log.texts[b] for b in base[:, t]]), None, texts, images), atol=1e-6)
    assert np.array_equal(s.picked, np.take_along_axis(s.utility, log.choice.reshape(n, 5, 1), 2)[..., 0]) and np.array_equal(log.reward, s.picked.ravel())
    # comparisons: asked from the second turn on; noise of .1 leaves clear gains as they are
    gain, compare = np.diff(s.picked, axis=1), log.compare.reshape(n, 5)
    assert (compare[:, 0] == 2).all() and set(compare[:, 1:].ravel()) <= {-1, 0, 1}
    clear = np.abs(gain) > .3
    assert clear.sum() > 5 and np.array_equal(np.sign(gain)[clear], compare[:, 1:][clear])
    # and a file gives it back, with embeddings for all that a user model reads
    again = slate.read((tmp_path / "log.jsonl") if lines_of(log, tmp_path) else None, slate_size=3)
    assert lines_of(again, tmp_path, "b.jsonl") == lines_of(log, tmp_path)
    o = slate.observations(again, s.ids, s.emb)
    assert len(o.choice) == 150 and np.allclose(o.start[o.turn == 0], WORLD.embed(STARTS[:n]), atol=1e-3) and o.images.shape == (150, 3, 2, 16)


def test_choices_are_drawn_from_the_probabilities():
    """How often the likeliest column is picked, to 3.3 standard errors; always where nothing else counts, and no more often than others by lapses alone."""
    s = play(n=200, horizon=1)
    crowd = WorldCrowd(WORLD, 200, seed=2)
    p = crowd.probabilities(s.utility[:, 0], 0)
    best = p.argmax(1)
    hit = (s.log.choice == best).mean()
    assert hit == pytest.approx(p.max(1).mean(), abs=3.3 * (p.max(1) * (1 - p.max(1))).mean() ** .5 / 200 ** .5)
    sure = play(n=60, horizon=2, world=World(0, tau=1000, lapse=0, position=0, fatigue=0))
    assert (sure.picked > sure.utility.max(2) - .01).all()
    lapsed = play(n=200, horizon=2, world=World(0, lapse=1))
    assert np.bincount(lapsed.log.choice, minlength=4) / 400 == pytest.approx(np.full(4, .25), abs=.07)


def test_rewards_and_what_is_kept():
    got = play()
    for where, expected in (("chosen", got.picked), ("mean", got.utility.mean(2)), ("best", got.utility.max(2))):
        s = play(reward_at=where)
        assert np.array_equal(s.log.reward, expected.ravel()) and np.array_equal(s.utility, got.utility) and np.array_equal(s.picked, got.picked)
    assert np.isnan(play(reward_at="none").log.reward).all()
    bare = play(keep=False)
    assert bare.log is None and bare.ids == [] and len(bare.emb) == 0 and np.allclose(bare.utility[:, 0], got.utility[:, 0], atol=2e-3)


def test_critiques():
    s = play(n=100, critique=.3)
    said = [c for c in s.log.critique if c]
    assert len(said) / 400 == pytest.approx(.3, abs=.07) and not any(play(n=5).log.critique) and all(play(n=5, critique=1.).log.critique)
    wish = WorldCrowd(WORLD, 100, seed=2).wish()
    assert all(c in ("", f"more {wish[i // 4]}") for i, c in enumerate(s.log.critique)) and set(wish) <= set(STYLES)
    likes = {k: set(np.array(wish)[s.kind == k]) for k in range(4)}
    assert all(len(x) <= 4 for x in likes.values()) and len(set.union(*likes.values())) > 4


def test_ragged_candidates(tmp_path):
    """A generator that makes fewer for some: padding is never shown, scored as absent, and not written."""
    propose = lambda text, seed, row, turn: slate.expansions(text, seed, row, turn)[:25 - row % 3]
    for policy in (random_policy, base_policy, oracle_greedy, behavior_policy(dict(noisy=1))):
        s = play(policy, propose=propose)
        lengths = 25 - np.arange(30).repeat(4) % 3
        assert ((s.log.candidates >= 0).sum(1) == lengths).all() and (s.log.slate < lengths[:, None]).all()
        slate.read((tmp_path / "log.jsonl") if lines_of(s.log, tmp_path) else None)


def test_a_generator_with_batches_is_asked_for_whole_crowds():
    calls = []

    class Propose:
        def batch(self, texts, seed, turn):
            calls.append((len(texts), seed, turn))
            return [slate.expansions(text, seed, i, turn) for i, text in enumerate(texts)]
    s, plain = play(propose=Propose()), play()
    assert calls == [(30, 3, t) for t in range(4)] and np.array_equal(s.utility, plain.utility)
    assert np.array_equal(play(propose=expansions.open_generator("template")).utility, plain.utility)


# -----------------------------------------------------------------------------
# Policies


def test_policies_are_worth_what_they_know():
    """Utility over 200 people: who knows the person shows better columns at once and leads to better picks over the session, a stranger's guess half so."""
    first = lambda policy: play(policy, 200, horizon=1, keep=False).utility.mean()
    chance, oracle = first(random_policy), first(oracle_greedy)
    assert oracle > chance + .1
    mean = lambda policy: play(policy, 200, horizon=5, keep=False).picked.mean()
    assert mean(oracle_greedy) > mean(random_policy) + .03
    assert mean(oracle_greedy) > mean(behavior_policy(dict(myopic=1))) + .01 > mean(random_policy) + .02


def view_and_facts(n=2000, C=25):
    """What behaviours see, with scores that name who chose: myopic picks the last of each category, noisy the same but for .3."""
    categories = np.repeat(np.arange(5), C // 5)[None].repeat(n, 0)
    view = View(Texts(["x"]), 0, np.zeros(n, int), np.zeros(n, int), *[np.zeros((n, 0, 4), int)] * 2, *[np.zeros((n, 0), int)] * 2, np.zeros((n, C), int), categories, np.zeros(n, int))
    rng = np.random.default_rng(0)
    scores = np.tile(np.arange(C, dtype=float), (n, 1))
    return view, Facts(expected=lambda: -scores, other=lambda: scores, draws=rng.random((n, C)), coin=rng.random(n), slate_size=4, max_per_category=1)


def test_shares_of_behaviours():
    view, facts = view_and_facts()
    slates, names = behavior_policy(dict(random=.5, myopic=.3, noisy=.2))(view, facts)
    names = np.array(names)
    assert [(names == x).mean() for x in ("random", "myopic", "noisy")] == pytest.approx([.5, .3, .2], abs=.04)
    assert (slates[names == "myopic"] == [24, 19, 14, 9]).all() and not (slates[names == "random"] == [24, 19, 14, 9]).all(1).any()
    assert behavior_policy(dict(random=5, myopic=3, noisy=2))(view, facts)[1] == names.tolist()
    # random slates are random: every candidate as often as every other
    shown = np.bincount(slates[names == "random"].ravel(), minlength=25) / (names == "random").sum()
    assert shown == pytest.approx(np.full(25, 4 / 25), abs=.055)
    assert (oracle_greedy(view, facts)[0] == [0, 5, 10, 15]).all() and (base_policy(view, facts)[0] == [0, 5, 10, 15]).all()
    s = play(behavior_policy(dict(random=.5, myopic=.5)), n=200, horizon=2)
    assert np.mean([b == "random" for b in s.log.behavior]) == pytest.approx(.5, abs=.1) and set(s.log.behavior) == {"random", "myopic"}


def test_noise_of_the_noisy():
    """Scores a tenth apart: noise of +-.3 changes slates, but seldom by much."""
    view, facts = view_and_facts()
    far = facts._replace(other=lambda: np.tile(np.arange(25.), (2000, 1)))
    near = facts._replace(other=lambda: np.tile(np.arange(25.) / 10, (2000, 1)))
    noisy = behavior_policy(dict(noisy=1))
    assert (noisy(view, far)[0] == [24, 19, 14, 9]).all() and .05 < (noisy(view, near)[0] == [24, 19, 14, 9]).all(1).mean() < .9


def test_strangers_are_others():
    """Another person's taste: independent of one's own, the same for each policy of a turn, not the same at the next turn; the crowd stays as it was."""
    crowd = WorldCrowd(WORLD, 300, seed=2)
    taste = crowd.people.taste.copy()
    other, again, later = stranger(crowd, 3, 0), stranger(crowd, 3, 0), stranger(crowd, 3, 1)
    assert np.array_equal(other.people.taste, again.people.taste) and not np.array_equal(other.people.taste, later.people.taste)
    assert np.array_equal(crowd.people.taste, taste) and not (other.people.taste == taste).all(1).any()
    assert (other.people.kind == crowd.kind).mean() == pytest.approx(.25, abs=.08)
    start = WORLD.embed(STARTS[:1] * 300)
    texts = [[f"picture of a fox, {w}" for w in STYLES]] * 300
    e = WORLD.embed(texts[0]).reshape(1, 8, 1, 16).repeat(300, 0)
    mine, theirs = (c.utilities(start, start, None, texts, e) for c in (crowd, other))
    assert abs(np.corrcoef((mine - mine.mean(0)).ravel(), (theirs - theirs.mean(0)).ravel())[0, 1]) < .1


def test_an_agent_is_asked_with_what_it_was_trained_to_read():
    """The slates that an agent shows in a simulation are the best by its scores on the log of that simulation, turn for turn."""
    agent = new_agent(SlateAgentConfig(hidden_size=32, num_kinds=4)).init_weights(0).eval()
    with torch.no_grad():
        agent.score.down.normal_(generator=torch.Generator().manual_seed(0))
    for critique in (0., .5):
        s = play(agent_policy(agent, name="agent"), critique=critique)
        assert set(s.log.behavior) == {"agent"}
        data = rectangles(s.log, s.log.reward, kind=s.kind)
        with torch.no_grad():
            f = agent(data.batch, data.candidates, data.categories)[1].amin(0).double().numpy()
        scores = f.reshape(120, 25)
        expected = select(scores, s.log.categories, 4)
        worth = lambda slates: np.take_along_axis(scores, slates, 1).mean(1)
        assert np.allclose(worth(s.log.slate), worth(expected), atol=1e-5) and (s.log.slate == expected).mean() > .99
        assert len(np.unique(s.log.slate, axis=0)) > 10


# -----------------------------------------------------------------------------
# Settings


def test_parse_behavior():
    assert parse_behavior("random:.5,myopic:.3,noisy:.2") == dict(random=.5, myopic=.3, noisy=.2) and parse_behavior("noisy") == dict(noisy=1.)
    for text, message in (("", "'': expected random, myopic or noisy"), ("random:.5,best:.5", "'best': expected"), ("random:x", "'x' is no number"), ("random:0", "above 0"),
                          ("random:-1", "above 0"), ("random:nan", "above 0"), ("random:inf", "above 0"), ("random:.5,random:.5", "random stands there twice")):
        with pytest.raises(ValueError, match=f"--behavior={text}: .*{message}"):
            parse_behavior(text)


@pytest.mark.parametrize("settings, message", [
    (dict(reward_at="picked"), "--reward_at=picked: expected chosen, mean, best or none"), (dict(n=0), "0 start prompts for a crowd"), (dict(horizon=0), "--horizon"),
    (dict(crowd=WorldCrowd(WORLD, 4, 0)), "30 start prompts for a crowd of 4"), (dict(critique=1.5), "--critique from 0 to 1"), (dict(images_per_prompt=0), "--images_per_prompt"),
    (dict(slate_size=6), "make a slate of 5, expected 6: more categories, or --max_per_category=0"),
])
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        play(**settings)


def test_more_than_one_of_a_category():
    s = play(slate_size=6, max_per_category=2)
    most = max(np.bincount(s.log.categories[r, row]).max() for r, row in enumerate(s.log.slate))
    assert most == 2 and s.log.slate.shape == (120, 6)
