"""The hidden world by hand, the small world against enumeration, session files read, written and refused."""
import json
import math

import numpy as np
import pytest

from data import slate
from data.slate import CATEGORIES, DETAILS, MILD, OPENINGS, STYLES, SUBJECTS, TWISTS, People, SmallWorld, World, charm, parse, softmax, start_prompts, unit

# -----------------------------------------------------------------------------
# The small world


@pytest.mark.parametrize("novelty, numbers", [(0, (.4798, .7515, .7549, .7207, .7207)), (.4, (.5080, .5470, .7840, .6362, .7334))])
def test_utility_per_turn_of_the_small_world(novelty, numbers):
    """The table of the specification: random, myopic, planner, and the two agents whose slate value is a mean, without and with a look ahead."""
    w = SmallWorld(novelty)
    policies = (w.random(), w.greedy(0), w.greedy(), w.mean_form(0), w.mean_form())
    assert [w.value(p) for p in policies] == pytest.approx(numbers, abs=1e-4)
    for expectile in (.7, .9):                                              # what the decomposition costs, no expectile brings back
        assert w.value(w.mean_form(expectile=expectile)) == pytest.approx(numbers[4], abs=.01)


@pytest.mark.parametrize("novelty", [0, .4, 1.])
def test_nobody_beats_the_planner(novelty):
    w = SmallWorld(novelty)
    best, rng = w.value(w.greedy()), np.random.default_rng(0)
    others = [rng.dirichlet(np.full(10, a), (5, 36)) for a in (.05, .3, 1.) for _ in range(10)] + [w.greedy(g) for g in (0, .3, .7)] + [w.mean_form(), w.random()]
    assert all(w.value(p) <= best + 1e-12 for p in others)
    assert best > w.value(w.greedy(0)) + (.1 if novelty else .001)


@pytest.mark.parametrize("horizon", [1, 2])
def test_value_is_the_sum_over_all_paths(horizon):
    """Written again from the rules, path by path, in plain numbers."""
    def move(state, m):
        style, details, off = state
        new = [state, (style, min(3, details + 1), off), (1 if style in (0, 2) else 2, details, off), (style, 0, min(2, off + 1)), (style, max(0, details - 1), off)][m]
        bonus = [0, 0, 0, .4, .32][m]
        return new, .25 + .15 * new[1] + {0: 0, 1: .25, 2: -.1}[new[0]] - .2 * new[2] + bonus

    def total(state, t):
        if t == horizon:
            return 0.0
        value = 0.0
        for k, pair in enumerate(SmallWorld.PAIRS):
            reached = [move(state, m) for m in pair]
            weights = [math.exp(8 * u) for _, u in reached]
            value += policy[t, w.STATES.index(state), k] * sum(x / sum(weights) * (u + total(new, t + 1)) for x, (new, u) in zip(weights, reached))
        return value
    w = SmallWorld(.4, horizon=horizon)
    policy = np.random.default_rng(horizon).dirichlet(np.ones(10), (horizon, 36))
    assert w.value(policy) == pytest.approx(total((0, 0, 0), 0) / horizon, abs=1e-12)


# -----------------------------------------------------------------------------
# Words and vectors


def test_prompts_are_read_and_written():
    text = "painting of an owl, noir, mist, ivy, snow, melting"
    assert str(parse(text)) == text and parse(text.upper()) == parse(text)
    assert parse("owl mist ivy snow rain").details == ("ivy", "snow", "rain")          # the last three
    assert parse("fox or owl").subject == "owl" and parse("a cat") == ("picture", "", "", (), "")
    assert len({*OPENINGS, *SUBJECTS, *STYLES, *DETAILS, *TWISTS}) == sum(map(len, (OPENINGS, SUBJECTS, STYLES, DETAILS, TWISTS)))     # no word of two kinds


def test_embeddings_are_a_function_of_the_words():
    w = World(3)
    text = "view of a castle, cubist, gears, lace, burning"
    e = w.embed([text, "burning lace gears Cubist CASTLE", "view of a castle, cubist, gears, lace, melting", "a cat", "a cat", "a dog", ""])
    assert e.dtype == np.float32 and e.shape == (7, 16) and np.allclose(np.linalg.norm(e, axis=1), 1, atol=1e-6)
    assert np.allclose(e[0], e[1], atol=1e-6) and not np.allclose(e[0], e[2], atol=.01)
    row = lambda word: w.table[w.row[word]]
    assert np.allclose(e[0], unit(row("castle") + row("cubist") + row("gears") + row("lace") + row("burning")), atol=1e-6)
    # a text without a word of the world: its own direction, the same in every world and in any company
    assert np.array_equal(e[3], e[4]) and abs(e[3] @ e[5]) < .9 and np.array_equal(World(8).embed(["a cat"])[0], e[3])
    assert w.embed([]).shape == (0, 16) and not np.allclose(World(4).embed([text]), e[:1], atol=.1)


def test_lengths_and_kinship_of_the_words():
    w = World(0)
    norm = lambda words: [np.linalg.norm(w.table[w.row[x]]) for x in words]
    assert np.allclose(norm(STYLES), .6) and np.allclose(norm(DETAILS), .5)
    assert np.allclose(norm(MILD), .3) and np.allclose(norm(TWISTS[4:]), 1.3) and w.table[0].sum() == 0
    assert np.allclose([w.table[w.row[d]] @ w.finish for d in DETAILS], .5 * .9 / math.hypot(.9, .44))
    assert not w.table[1:1 + len(SUBJECTS) + len(STYLES), 0].any()            # neither subject nor style looks finished
    cos = unit(w.table[1:13]) @ unit(w.table[1:13]).T
    kin = np.equal.outer(np.arange(12) // 3, np.arange(12) // 3)
    assert cos[kin & ~np.eye(12, dtype=bool)].mean() > cos[~kin].mean() + .4


def test_start_prompts():
    texts, specific = start_prompts(400, 5)
    again, _ = start_prompts(7, 5)
    assert again == texts[:7] and .4 < specific.mean() < .6 and start_prompts(7, 6)[0] != again
    for text, p in zip(texts, specific):
        found = parse(text)
        assert str(found) == text and found.subject and not found.twist and (bool(found.style), len(found.details)) == ((True, 1) if p else (False, 0))
    assert not start_prompts(50, 5, specific=0)[1].any() and start_prompts(50, 5, specific=1)[1].all()


# -----------------------------------------------------------------------------
# People and what they get


def test_people_are_common_random_numbers():
    w = World(0, num_types=4, deviation=.2)
    people, fewer = w.people(200, 3), w.people(5, 3)
    assert all(np.array_equal(a[:5], b) for a, b in zip(people, fewer)) and not np.array_equal(w.people(5, 4).taste, fewer.taste)
    assert set(people.kind) == {0, 1, 2, 3} and np.allclose(np.linalg.norm(people.taste, axis=1), 1)
    assert ((people.taste @ w.tastes.T).argmax(1) == people.kind).mean() > .95
    assert np.allclose(World(0, deviation=0).people(200, 3).taste, w.tastes[people.kind])
    # types differ in the styles that they like: two each, and with four types no style is liked twice
    liked = np.sort((w.tastes @ w.embed(list(STYLES)).T).argsort(1)[:, -2:].ravel())
    assert np.array_equal(liked, np.arange(8))


def test_charm():
    """Distances 1 - cos of 0, .25, .375, .5 and 1 are worth 0, 0, .5, 1, 1; images of a column count by their mean."""
    at = lambda d: [1 - d, (1 - (1 - d) ** 2) ** .5]
    images = np.array([[[at(0), at(0)], [at(.25), at(.25)], [at(.375), at(.375)], [at(.5), at(1)], [at(0), at(1)]]])
    assert charm(np.array([[1.0, 0]]), images) == pytest.approx(np.array([[0, 0, .5, 1, .5]]), abs=1e-12)
    # what the words do: a detail is nothing new, another subject of the same kin less than one of another
    w = World(0)
    base = w.embed(["painting of a fox, noir, mist"])
    e = w.embed(["study of a fox, noir, mist", "painting of a fox, noir, mist, ivy", "painting of an owl", "painting of a castle"])
    same, detail, kin, far = charm(base, e[None, :, None])[0]
    assert same == 0 == detail and kin < far and far > .9


def test_utility_by_hand():
    """Images along the axes show the weights .73 of finish, .57 of taste, .17 of closeness to the start; two images count by their mean. All but those of the
    base are at a distance of 1 or more from it, so new to the full."""
    w = World(0, novelty=.4)
    e = np.eye(16)
    person = People(np.zeros(1, int), e[1:2], np.zeros(1, int))
    images = np.array([[[e[0], e[1]], [e[2], e[2]], [e[3], -e[1]]]])
    found = w.utilities(person, e[2:3], e[2:3], images)
    assert found == pytest.approx(np.array([[.65 + .4, .17, -.285 + .4]]), abs=1e-12)


def test_probabilities():
    """Two columns of .1 and .3: at tau 10 the odds are e^2. Fatigue .1 makes of it e^1.6 at turn 2. A habit of .5 adds to its column, a lapse mixes in 1/2."""
    u = np.array([[.1, .3]])
    person = lambda habit: People(np.zeros(1, int), np.eye(16)[:1], np.array([habit]))
    p = lambda habit=0, turn=0, **settings: World(0, **dict(tau=10, lapse=0, fatigue=0, position=0) | settings).probabilities(person(habit), u, turn)[0, 1]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert p() == pytest.approx(sigmoid(2)) and p(fatigue=.1, turn=2) == pytest.approx(sigmoid(1.6)) and p(fatigue=.1) == pytest.approx(sigmoid(2))
    assert p(1, position=.5) == pytest.approx(sigmoid(2.5)) == p(63, position=.5) and p(2, position=.5) == pytest.approx(sigmoid(1.5))
    assert p(lapse=.1) == pytest.approx(.9 * sigmoid(2) + .05) and p(lapse=1) == .5
    assert p(fatigue=.2, turn=9) == .5                                        # past tired: blind, not perverse
    w = World(0)
    many = w.probabilities(w.people(50, 0), np.random.default_rng(0).normal(size=(50, 4)), 3)
    assert np.allclose(many.sum(1), 1) and (many >= w.lapse / 4).all()


def test_comparisons():
    w = World(0, same=.03)
    assert w.compared(np.array([.5, -.5, .02, .1, .0]), np.array([0, 0, 0, -1.0, 1.0])).tolist() == [1, -1, 0, 0, 1]


@pytest.mark.parametrize("settings", [dict(novelty=-1), dict(lapse=1.5), dict(tau=math.nan), dict(fatigue=.3), dict(deviation=-.1), dict(num_types=0), dict(width=3),
                                      dict(num_types=65), dict(same=-1), dict(position=11)])
def test_a_world_that_cannot_be(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} .*: expected"):
        World(0, **settings)


# -----------------------------------------------------------------------------
# Session files


def turn_of(t, rng, columns=2, images=2):
    """A turn of 3 categories with 1 to 2 candidates each, non-ASCII texts among them."""
    candidates = [dict(category=c, text=f"{c} {rng.integers(5)} {word}") for c in CATEGORIES[:3] for word in ("fuchs", "füchsin – 狐")[:1 + int(rng.integers(2))]]
    of = {c: [i for i, x in enumerate(candidates) if x["category"] == c] for c in CATEGORIES[:3]}
    slate = [int(rng.choice(of[CATEGORIES[c]])) for c in rng.permutation(3)[:columns]]
    turn = dict(t=t, candidates=candidates, slate=slate, images=[[f"im-{rng.integers(99)}" for _ in range(images)] for _ in slate], choice=int(rng.integers(columns)))
    if not images:
        del turn["images"]
    if rng.random() < .5:
        turn["critique"] = "wärmer, bitte \u2028 now"
    if t and rng.random() < .7:
        turn["compare"] = str(rng.choice(["better", "same", "worse"]))
    if rng.random() < .7:
        turn["reward"] = float(rng.normal())
    if rng.random() < .7:
        turn["behavior"] = "random"
    return turn


def records(n=9, seed=0, images=2):
    rng = np.random.default_rng(seed)
    return [dict(session=f"s{seed}-{i}", user=f"user {rng.integers(4)}", source="human" if i % 2 else "sim:modell", prompt=f"prompt {rng.integers(3)} é",
                 end=("horizon", "quit", "truncated")[i % 3], turns=[turn_of(t, rng, images=images) for t in range(1 + i % 4)]) for i in range(n)]


def save(path, lines):
    path.write_bytes(b"".join((x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)).encode()) + b"\n" for x in lines))
    return path


@pytest.mark.parametrize("images", [2, 0])
def test_files_come_back_as_they_were(tmp_path, images):
    given = records(images=images)
    log = slate.read(save(tmp_path / "a.jsonl", given))
    slate.write(log, tmp_path / "b.jsonl")
    slate.write(slate.read(tmp_path / "b.jsonl"), tmp_path / "c.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert log.images.shape == (sum(len(r["turns"]) for r in given), 2, images) and np.diff(log.first).tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert (log.candidates >= 0).sum(1).tolist() == [len(t["candidates"]) for r in given for t in r["turns"]] and ((log.candidates < 0) == (log.categories < 0)).all()
    # whole numbers are rewards, too, and escapes are what they spell
    odd = json.dumps(given[0] | dict(turns=[given[0]["turns"][0] | dict(reward=1)], prompt="füchse 🦊"))
    log = slate.read(save(tmp_path / "d.jsonl", [odd]))
    assert log.reward.tolist() == [1.0] and log.texts[log.prompt[0]] == "füchse 🦊"


def test_properties_of_a_log(tmp_path):
    given = records()
    log = slate.read(save(tmp_path / "a.jsonl", given))
    picked = [[t["candidates"][t["slate"][t["choice"]]]["text"] for t in r["turns"]] for r in given]
    assert [log.texts[i] for i in log.picked] == [x for row in picked for x in row]
    assert [log.texts[i] for i in log.base] == [x for r, row in zip(given, picked) for x in [r["prompt"], *row[:-1]]]
    assert log.turn.tolist() == [t for r in given for t in range(len(r["turns"]))] and log.session.tolist() == [i for i, r in enumerate(given) for _ in r["turns"]]
    assert [log.user_ids[u] for u in log.user] == [r["user"] for r in given] and [slate.END[e] for e in log.end] == [r["end"] for r in given]
    assert np.array_equal(np.isnan(log.reward), ["reward" not in t for r in given for t in r["turns"]])
    assert [log.image_ids[i] for i in log.images[-1].ravel()] == [i for column in given[-1]["turns"][-1]["images"] for i in column]


def test_take_and_joined(tmp_path):
    given, more = records(), records(5, seed=1)
    for r in more:
        r["turns"] = [t | dict(candidates=t["candidates"] + [dict(category="creative", text="one more")] * 3) for t in r["turns"]]
    log, other = slate.read(save(tmp_path / "a.jsonl", given)), slate.read(save(tmp_path / "b.jsonl", more))

    def written(log):
        slate.write(log, tmp_path / "x.jsonl")
        return [json.loads(line) for line in (tmp_path / "x.jsonl").read_bytes().split(b"\n") if line]
    assert written(log.take([7, 0, 3])) == [given[7], given[0], given[3]] and written(log.take(np.arange(9))) == given
    assert len(log.take([]).choice) == 0 and len(log.take([]).base) == 0
    with pytest.raises(ValueError, match="indices of sessions, found a mask"):
        log.take(log.end == 0)
    both = slate.joined([log, other])
    assert written(both) == given + more and written(slate.joined([both.take([2]), log.take([0])])) == [given[2], given[0]]
    assert len(set(both.user_ids)) == len(both.user_ids) and len(set(both.texts)) == len(both.texts)
    assert [both.user_ids[u] for u in both.user] == [r["user"] for r in given + more]
    with pytest.raises(ValueError, match="different slates: 2 columns of 2 images, 2 columns of 0"):
        slate.joined([log, slate.read(save(tmp_path / "c.jsonl", records(images=0)))])


def change(**values):
    """A record's or, by t_, its last turn's values; None takes the key away."""
    def changed(record):
        record = json.loads(json.dumps(record))
        for key, value in values.items():
            place = record["turns"][-1] if key.startswith("t_") else record
            place[key.removeprefix("t_")] = value
            if value is None:
                del place[key.removeprefix("t_")]
        return record
    return changed


RAW = lambda text: lambda record: text
CANDIDATES = [dict(category="rephrase", text="a"), dict(category="rephrase", text="b"), dict(category="style", text="c")]


@pytest.mark.parametrize("wrong, message", [
    (RAW("{"), "not a JSON object"), (RAW(""), "not a JSON object"), (RAW("[" * 100_000), "not a JSON object"), (RAW("[]"), "expected an object, found list"),
    (RAW(b'{"session": "\xff"}'), "not UTF-8 at byte 13"), (RAW('{"session": "a", "session": "b"}'), "duplicate key"),
    (RAW('{"session": NaN}'), "nan is not a finite|NaN is not a finite"), (RAW('{"session": 1e999}'), "not a finite number"),
    (change(user=None), "'user' is missing"), (change(prompt=None), "'prompt' is missing"), (change(mood="x"), "unknown key 'mood'"),
    (change(user=3), "user is int, expected str"), (change(turns={}), "turns is dict, expected list"), (change(turns=[]), "a session without turns"),
    (change(turns=[3]), "turn 0: expected an object, found int"), (change(session="s0-0"), "session 's0-0' stands on line 1, too"),
    (change(prompt="\ud83e"), "half of a surrogate pair"),
    (change(end="stop"), "end 'stop': expected one of horizon, quit, truncated"), (change(source="bot"), "source 'bot': expected human or sim:<name>"),
    (change(t_choice=None), "turn 1: 'choice' is missing"), (change(t_choice=2), "turn 1: choice 2: expected one of 2 columns, 0 to 1"), (change(t_choice=-1), "choice -1"),
    (change(t_choice=True), "choice is bool, expected int"), (change(t_choice=1.0), "choice is float, expected int"), (change(t_choice="1"), "choice is str"),
    (change(t_t=2), "turn 1: t is 2, expected 1: turns count from 0 without a gap"), (change(t_look="x"), "turn 1: unknown key 'look'"),
    (change(t_slate=[0, 3], t_candidates=CANDIDATES), "slate .0, 3.: expected indices of 3 candidates"), (change(t_slate=[]), "expected indices"),
    (change(t_slate=[0, -1]), "expected indices"), (change(t_slate=[0, True]), "expected indices"), (change(t_slate=[0, 0]), "slate .0, 0. shows a candidate twice"),
    (change(t_slate=[0, 1], t_candidates=CANDIDATES), "shows two of one category: --max_per_category=0 allows it"),
    (change(t_slate=[2], t_candidates=CANDIDATES, t_images=[["a", "b"]], t_choice=0), "turn 1: 1 columns of 2 images, expected 2 of 2 as in the turns before"),
    (change(t_images=None), "2 columns of 0 images, expected 2 of 2"), (change(t_images=[["a", "b"], ["c"]]), "images: expected 2 columns of equally many ids"),
    (change(t_images=[["a", "b"]]), "images: expected 2 columns"), (change(t_images=[["a"], "b"]), "images: expected 2 columns"),
    (change(t_images=[["a", 1], ["c", "d"]]), "images: expected 2 columns"), (change(t_images=[[], []]), "images: expected 2 columns"),
    (change(t_images=[["a"], ["b"]]), "2 columns of 1 images, expected 2 of 2"),
    (change(t_candidates=[dict(category="colour", text="a")]), "candidate 0: category 'colour': expected one of rephrase"),
    (change(t_candidates=[dict(category="style")]), "candidate 0: 'text' is missing"), (change(t_candidates=["a"]), "candidate 0: expected an object, found str"),
    (change(t_candidates=[dict(category="style", text=None)]), "candidate 0: text is NoneType"),
    (change(t_compare="good"), "compare 'good': expected better, same or worse"), (change(t_compare=1), "compare is int"), (change(t_critique=["x"]), "critique is list"),
    (change(t_reward="1"), "reward is str, expected int or float"), (change(t_reward=False), "reward is bool"), (change(t_reward=10 ** 400), "reward is beyond"),
    (lambda r: r | dict(turns=[r["turns"][0] | dict(compare="same")]), "turn 0: compare at the first turn"),
])
def test_what_is_wrong_with_a_line_is_said(tmp_path, wrong, message):
    given = records(4)
    raw = wrong(given[1])
    path = save(tmp_path / "log.jsonl", [given[0], raw if not isinstance(raw, dict) else json.dumps(raw), given[2]])
    with pytest.raises(ValueError, match=message) as error:
        slate.read(path)
    assert str(error.value).startswith(f"{path}:2: ") and len(str(error.value)) < 500


def test_more_that_is_refused_or_allowed(tmp_path):
    given = records(3)
    path = save(tmp_path / "a.jsonl", given)
    with pytest.raises(ValueError, match="a.jsonl:1: turn 0: 2 columns of 2 images, expected 4 of 2 as --slate_size says"):
        slate.read(path, slate_size=4)
    assert slate.read(path, slate_size=2).slate.shape[1] == 2
    with pytest.raises(ValueError, match="empty.jsonl: empty"):
        slate.read(save(tmp_path / "empty.jsonl", []))
    two = change(t_slate=[0, 1], t_candidates=CANDIDATES)(given[1])
    assert slate.read(save(tmp_path / "b.jsonl", [two]), one_per_category=False).slate[-1].tolist() == [0, 1]


# -----------------------------------------------------------------------------
# What a user model and an evaluation read


def two_users(tmp_path):
    given = records(6, seed=2)
    for i, r in enumerate(given):
        r["user"] = ("b", "a")[i % 2]
    return given, slate.read(save(tmp_path / "log.jsonl", given))


def embeddings(log, d=5):
    ids = [*log.image_ids, *log.texts]
    return ids, np.random.default_rng(0).normal(size=(len(ids), d)).astype(np.float16)


def test_observations_stand_in_order_of_the_users(tmp_path):
    given, log = two_users(tmp_path)
    ids, emb = embeddings(log)
    o = slate.observations(log, ids, emb)
    vector = lambda name: unit(emb[ids.index(name)].astype(np.float32))
    flat = [(s, t) for s in (0, 2, 4, 1, 3, 5) for t in range(len(given[s]["turns"]))]
    assert list(zip(o.session.tolist(), o.turn.tolist())) == flat and o.user.tolist() == [s % 2 for s, _ in flat]
    for row, (s, t) in enumerate(flat):
        turn, before = given[s]["turns"][t], given[s]["turns"][t - 1]
        base = before["candidates"][before["slate"][before["choice"]]]["text"] if t else given[s]["prompt"]
        assert np.allclose(o.start[row], vector(given[s]["prompt"]), atol=1e-6) and np.allclose(o.base[row], vector(base), atol=1e-6)
        assert all(np.allclose(o.images[row, l, m], vector(turn["images"][l][m]), atol=1e-6) for l in range(2) for m in range(2))
        assert o.choice[row] == turn["choice"] and o.compare[row] == slate.COMPARE[turn.get("compare")] and o.before[row] == (row - 1 if t else -1)
    assert o.images.dtype == np.float32 and np.allclose(np.linalg.norm(o.images, axis=-1), 1, atol=1e-6)


def test_observations_refuse_what_does_not_fit(tmp_path):
    _, log = two_users(tmp_path)
    ids, emb = embeddings(log)
    gone = log.image_ids[log.images[3, 0, 1]]
    keep = [i for i, name in enumerate(ids) if name != gone]
    with pytest.raises(ValueError, match=f"image '{gone}' is not in the embedding file .1 of {len(log.image_ids)} are not"):
        slate.observations(log, [ids[i] for i in keep], emb[keep])
    prompt = log.texts[log.prompt[0]]
    keep = [i for i, name in enumerate(ids) if name != prompt]
    with pytest.raises(ValueError, match=f"prompt '{prompt}' is not"):
        slate.observations(log, [ids[i] for i in keep], emb[keep])
    for bad in (emb[:-1], emb[0], emb[:, :, None]):
        with pytest.raises(ValueError, match=f"expected one row for each of {len(ids)} ids"):
            slate.observations(log, ids, bad)
    emb[4, 2] = np.nan
    with pytest.raises(ValueError, match=f"the embedding of '{ids[4]}' is not finite"):
        slate.observations(log, ids, emb)
    bare = slate.read(save(tmp_path / "bare.jsonl", records(2, images=0)))
    with pytest.raises(ValueError, match="name no images"):
        slate.observations(bare, ids, emb)
    # candidates that nobody was led on from need no embedding
    used = {*log.image_ids, *(log.texts[i] for i in (*log.base, *log.prompt))}
    keep = [i for i, name in enumerate(ids) if name in used and i != 4]
    assert len(keep) < len(ids)
    slate.observations(log.take([0]), ids, np.nan_to_num(emb))


def test_the_truth_comes_back(tmp_path):
    _, log = two_users(tmp_path)
    rng = np.random.default_rng(0)
    kind, utility = rng.integers(0, 4, 6), rng.normal(size=(len(log.choice), 2)).round(6)
    path = tmp_path / "log.truth.jsonl"
    slate.write_truth(path, log, kind, utility)
    found = slate.read_truth(path, log)
    assert np.array_equal(found[0], kind) and np.array_equal(found[1], utility)
    some = slate.read_truth(path, log.take([4, 1]))
    assert some[0].tolist() == kind[[4, 1]].tolist() and np.array_equal(some[1], utility[np.isin(log.session, [4])].tolist() + utility[np.isin(log.session, [1])].tolist())
    lines = path.read_text().splitlines()
    for bad, message in ((lines[:-1], "has no truth of 1 sessions, among them 's2-5'"), ([*lines[:2], lines[2].replace('"type"', '"kind"')], ":3: unknown key 'kind'"),
                         ([lines[0].replace("[[", "[[1.0, ")], ":1: utility: expected a row of 2 numbers"), ([lines[0], "{"], ":2: not a JSON object"),
                         ([lines[1].replace('"utility": [', '"utility": [[1.0, 2.0], ')], ":1: utility: expected a row")):
        path.write_text("\n".join(bad) + "\n")
        with pytest.raises(ValueError, match=message):
            slate.read_truth(path, log)


def test_parts_are_of_users():
    users = [f"u{i}" for i in range(4000)]
    parts = slate.parts_of(users)
    assert np.bincount(parts) / 4000 == pytest.approx([.7, .15, .15], abs=.02)
    order = np.random.default_rng(0).permutation(4000)
    assert np.array_equal(slate.parts_of([users[i] for i in order]), parts[order])        # whoever else is there
    assert not np.array_equal(slate.parts_of(users, seed=1), parts) and slate.parts_of(["u17"]).tolist() == parts[17:18].tolist()
    assert np.bincount(slate.parts_of(users, shares=(.5, .5))) / 4000 == pytest.approx([.5, .5], abs=.03) and len(slate.parts_of([])) == 0


def test_softmax_and_unit():
    assert softmax(np.array([[1000., 1000 + math.log(3)]])) == pytest.approx(np.array([[.25, .75]])) and unit(np.array([3., 4.])).tolist() == [.6, .8]
    assert unit(np.zeros(3)).tolist() == [0, 0, 0]
