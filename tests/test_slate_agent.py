"""Agents of slates: what they read and what they cannot read, two scores that must be one, the exact selector, folders."""
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

import checkpoint
from data import slate
from data.slate import CATEGORIES
from model import ModelConfig, RopeScaling, Transformer, config_for_size
from slate_agent import (Deployment, SlateAgent, SlateAgentConfig, TextSlateAgent, Texts, View, candidate_scores, load_agent, new_agent, rectangles, select)
from tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
TRUNK = vars(config_for_size("nano", TOKENIZER.vocab_size)) | dict(hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8)


def make(encoder="pooled", seed=0, **settings):
    """An agent of which every parameter is random: heads that start at 0 would pass any test of equality."""
    config = SlateAgentConfig(encoder=encoder, hidden_size=32, **settings, trunk=TRUNK if encoder == "text" else {})
    agent = new_agent(config, TOKENIZER if encoder == "text" else None).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * .1)
        if encoder == "pooled":
            agent.word.weight[0] = 0
    return agent.eval()


def sessions(n=3, turns=4, columns=3, seed=0, critique=.5, lengths=None, kind=None, texts=None):
    """Sessions of templates, and the rectangles that an agent reads."""
    rng, lines = np.random.default_rng(seed), []
    starts, _ = slate.start_prompts(n, seed)
    for s in range(n):
        base, rows = starts[s], []
        for t in range(turns if lengths is None else lengths[s]):
            found = slate.expansions(base, seed, s, t, num=2)
            shown = [int(2 * c + rng.integers(2)) for c in rng.permutation(5)[:columns]]
            turn = dict(t=t, candidates=[dict(category=c, text=x) for c, x in found], slate=shown, choice=int(rng.integers(columns)))
            if rng.random() < critique:
                turn["critique"] = f"more {slate.STYLES[rng.integers(8)]}"
            rows.append(turn)
            base = found[shown[turn["choice"]]][1]
        lines.append(dict(session=f"s{seed}-{s}", user=f"u{s}", source="human", prompt=starts[s], end="horizon", turns=rows))
    return lines


def read(lines, tmp_path, **settings):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    log = slate.read(path)
    return rectangles(log, np.zeros(len(log.choice)), **settings)


def run(agent, data, rows=None):
    """-> v (B, T + 1), f (num_q, B, T, C) of all candidates."""
    data = data if rows is None else data.take(rows)
    if isinstance(agent, TextSlateAgent):
        agent.texts = data.texts
    with torch.no_grad():
        return agent(data.batch, data.candidates, data.categories)


def changed(lines, turn, **values):
    """The sessions with values of one turn of each changed."""
    lines = json.loads(json.dumps(lines))
    for line in lines:
        line["turns"][turn] |= values
    return lines


def close(a, b, atol=1e-6):
    return torch.allclose(a, b, atol=atol, rtol=1e-5)


BOTH = pytest.mark.parametrize("encoder", ["pooled", "text"])


# -----------------------------------------------------------------------------
# From scores to a slate


LEGAL = [s for categories in itertools.combinations(range(5), 4) for s in itertools.product(*(range(5 * c, 5 * c + 5) for c in categories))]


def best_slate(scores, legal):
    """By the words of the rule: of the slates with the highest mean, the one whose items, best first, have the lowest indices."""
    total = scores[legal].sum(1)
    ties = legal[total >= total.max() - 1e-12]
    return min(tuple(sorted(s, key=lambda i: (-scores[i], i))) for s in ties.tolist())


def test_the_selector_is_exact():
    """1,000 cases against all 3,125 legal slates; in half of them scores are small whole numbers, so that most of the best slates are tied."""
    legal, rng = np.array(LEGAL), np.random.default_rng(0)
    assert legal.shape == (3125, 4)
    scores = np.concatenate([rng.normal(size=(500, 25)), rng.integers(0, 4, (500, 25)).astype(float)])
    categories = np.repeat(np.arange(5), 5)[None].repeat(1000, 0)
    found = select(scores, categories, 4)
    for row in range(1000):
        assert tuple(found[row]) == best_slate(scores[row], legal), row
    # whatever the order of the candidates: the same worth, and the lowest indices of that order
    order = rng.permuted(np.arange(25)[None].repeat(1000, 0), axis=1)
    moved = select(np.take_along_axis(scores, order, 1), np.take_along_axis(categories, order, 1), 4)
    worth = lambda slates, table: np.take_along_axis(table, slates, 1).mean(1)
    assert np.allclose(worth(moved, np.take_along_axis(scores, order, 1)), worth(found, scores))


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_the_selector_with_other_limits_and_missing_candidates(most):
    rng = np.random.default_rng(most)
    for case in range(60):
        n = int(rng.integers(5, 10))
        categories, scores = rng.integers(-1, 5, n), rng.integers(-2, 3, n).astype(float)
        legal = [s for s in itertools.combinations(range(n), 3) if (categories[list(s)] >= 0).all()
                 and (not most or np.bincount(categories[list(s)]).max() <= most)]
        if legal:
            assert tuple(select(scores[None], categories[None], 3, most)[0]) == best_slate(scores, np.array(legal)), case
        else:
            with pytest.raises(ValueError, match="expected 3: more categories, or --max_per_category=0"):
                select(scores[None], categories[None], 3, most)


def test_ties_go_to_the_lowest_index_and_nan_to_nobody():
    categories = np.repeat(np.arange(5), 5)[None]
    assert select(np.zeros((1, 25)), categories, 4).tolist() == [[0, 5, 10, 15]] and select(np.zeros((1, 25)), categories, 4, 2).tolist() == [[0, 1, 5, 6]]
    assert select(np.zeros((1, 25)), categories, 4, 0).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="candidates of row 1 make a slate of 2, expected 3"):
        select(np.zeros((2, 3)), np.array([[0, 1, 2], [0, 1, 1]]), 3)
    bad = np.zeros((2, 25))
    bad[1, 3] = np.nan
    with pytest.raises(ValueError, match="scores of row 1 are not numbers"):
        select(bad, categories.repeat(2, 0), 4)
    assert select(np.where(np.arange(25) == 24, np.nan, 0.)[None], np.where(np.arange(25) == 24, -1, categories), 4)[0, 0] == 0        # of no candidate


# -----------------------------------------------------------------------------
# What is read


def test_words():
    texts = Texts(["a Fox, noir", "a fox noir", "owl", "a Fox, noir"])
    assert len(texts.texts) == 3 and texts.add(["owl", "new"]).tolist() == [2, 3] and texts.texts[3] == "new"
    assert np.array_equal(texts.words[0], texts.words[1]) and (texts.words[0] > 0).sum() == 3 and (texts.words[2] > 0).sum() == 1
    long = Texts([" ".join(f"w{i}" for i in range(30)), " ".join(f"w{i}" for i in range(24)) + " else"])
    assert np.array_equal(long.words[0], long.words[1])
    many = Texts()
    assert many.add([f"text {i}" for i in range(3000)]).tolist() == list(range(3000)) and (many.words[2999] > 0).sum() == 2
    agent = make()
    assert agent.text(torch.from_numpy(Texts([""]).words[:1]), torch.tensor([0])).abs().max() == 0


def test_rectangles(tmp_path):
    lines = sessions(3, lengths=[1, 3, 2], critique=1)
    for line, end in zip(lines, ("horizon", "truncated", "quit")):
        line["end"] = end
    lines[1]["turns"][1]["candidates"] = lines[1]["turns"][1]["candidates"][:8]
    lines[1]["turns"][1] |= dict(slate=[0, 2, 5])
    data = read(lines, tmp_path, kind=[2, 0, 1])
    assert data.batch.length.tolist() == [1, 3, 2] and data.valid.sum(1).tolist() == [1, 3, 2] and data.batch.kind.tolist() == [2, 0, 1]
    assert data.terminal.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]] and (data.categories[1, 1] < 0).sum() == 2 and (data.batch.critique >= 0).sum() == 6
    for s, line in enumerate(lines):
        assert data.texts.texts[data.batch.start[s]] == line["prompt"]
        for t, turn in enumerate(line["turns"]):
            at = lambda i: data.texts.texts[data.candidates[s, t, i]]
            assert [at(i) for i in range(len(turn["candidates"]))] == [c["text"] for c in turn["candidates"]] and data.slate[s, t].tolist() == turn["slate"]
            assert [data.texts.texts[i] for i in data.batch.shown[s, t]] == [at(i) for i in turn["slate"]]
            assert [CATEGORIES[c] for c in data.batch.shown_category[s, t]] == [turn["candidates"][i]["category"] for i in turn["slate"]]
            assert data.batch.picked[s, t] == turn["choice"] and data.texts.texts[data.batch.critique[s, t]] == turn["critique"]
    some = data.take(torch.tensor([2, 0]))
    assert some.batch.length.tolist() == [2, 1] and some.terminal.tolist() == [[0, 1, 0], [1, 0, 0]] and some.batch.words is data.batch.words


@BOTH
def test_shapes_and_heads(encoder, tmp_path):
    data = read(sessions(2, turns=3), tmp_path)
    v, f = run(make(encoder, num_q=3), data)
    assert v.shape == (2, 4) and f.shape == (3, 2, 3, 10) and v.dtype == f.dtype == torch.float32 and torch.isfinite(f).all()
    assert f.std(0).min() > 1e-4 and f.std(-1).min() > 1e-4 and v.std() > 1e-4
    v, f = run(new_agent(make(encoder).config, TOKENIZER if encoder == "text" else None).init_weights(0), data)
    assert v.abs().max() == 0 == f.abs().max()                              # a fresh agent says 0


@BOTH
def test_a_state_reads_nothing_of_its_own_turn_or_later(encoder, tmp_path):
    """Everything of turn 2 is changed: states 0 to 2 and their scores stay, state 3 does not. Each part of it alone moves state 3, too."""
    lines, agent = sessions(2, turns=4, critique=0), make(encoder)
    v, f = run(agent, read(lines, tmp_path))
    data = read(lines, tmp_path)
    candidates = [[dict(category=c, text=x) for c, x in slate.expansions("image of a robot, neon", 9, s, 0, num=2)] for s in range(2)]
    for change in (dict(slate=[9, 0, 5]), dict(choice=2), dict(critique="more ivy"), dict(candidates=None)):
        new = changed(lines, 2, **change) if "candidates" not in change else json.loads(json.dumps(lines))
        for s, line in enumerate(new):
            if "candidates" in change:
                line["turns"][2]["candidates"] = candidates[s]
            line["turns"][2]["choice"] = (lines[s]["turns"][2]["choice"] + 1) % 3 if "choice" in change else line["turns"][2]["choice"]
        other = read(new, tmp_path)
        # the candidates to be scored are those of the old sessions
        rows = torch.from_numpy(other.texts.add([data.texts.texts[i] for i in data.candidates.flatten().tolist()])).view_as(data.candidates)
        other = other._replace(candidates=rows, categories=data.categories, batch=other.batch._replace(words=torch.from_numpy(other.texts.words[:len(other.texts.texts)])))
        new_v, new_f = run(agent, other)
        assert close(v[:, :3], new_v[:, :3]) and close(f[:, :, :3], new_f[:, :, :3])
        assert ((v[:, 3:] - new_v[:, 3:]).abs().amin(0) > 1e-5).all() and not close(f[:, :, 3], new_f[:, :, 3], 1e-5), change


@BOTH
def test_candidates_do_not_see_each_other(encoder, tmp_path):
    data, agent = read(sessions(turns=2), tmp_path), make(encoder)
    v, f = run(agent, data)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    new_v, new_f = run(agent, data._replace(candidates=data.candidates[..., order], categories=data.categories[..., order]))
    assert close(v, new_v) and close(f[..., order], new_f)
    few = run(agent, data._replace(candidates=data.candidates[..., 3:5], categories=data.categories[..., 3:5]))[1]
    assert close(few, f[..., 3:5])
    # the value of a slate is the mean of its items: whatever their order, and the best of them by `select` is the best slate
    q = f.gather(3, data.slate.expand(2, -1, -1, -1)).mean(3)
    assert close(q, run(agent, data._replace(candidates=data.candidates.gather(2, data.slate.flip(2)), categories=data.categories.gather(2, data.slate.flip(2))))[1].mean(3))
    scores = f.amin(0).flatten(0, 1).double().numpy()
    chosen = select(scores, data.categories.flatten(0, 1).numpy(), 3)
    logged = np.take_along_axis(scores, data.slate.flatten(0, 1).numpy(), 1).mean(1)
    assert (np.take_along_axis(scores, chosen, 1).mean(1) >= logged - 1e-9).all()


def test_columns_have_no_order(tmp_path):
    lines, agent = sessions(), make()
    v, f = run(agent, read(lines, tmp_path))
    for line in lines:
        for turn in line["turns"]:
            turn["slate"], turn["choice"] = turn["slate"][::-1], 2 - turn["choice"]
    new_v, new_f = run(agent, read(lines, tmp_path))
    assert close(v, new_v) and close(f, new_f)


@BOTH
def test_padding_and_company_change_nothing(encoder, tmp_path):
    """Sessions of 1 to 4 turns in one batch, and each alone, at its own length."""
    lengths = [3, 1, 4, 2]
    lines, agent = sessions(4, lengths=lengths), make(encoder)
    v, f = run(agent, read(lines, tmp_path))
    for s, length in enumerate(lengths):
        alone_v, alone_f = run(agent, read(lines[s:s + 1], tmp_path))
        assert close(v[s, :length + 1], alone_v[0], 2e-6) and close(f[:, s, :length], alone_f[:, 0], 2e-6)
    data = read(lines, tmp_path)
    some_v, some_f = run(agent, data, torch.tensor([2, 0]))
    assert close(some_v, v[[2, 0]], 2e-6) and close(some_f, f[:, [2, 0]], 2e-6)


@BOTH
def test_what_was_said_is_read(encoder, tmp_path):
    """A session in which nobody speaks reads the same beside one in which somebody does."""
    lines, agent = sessions(2, critique=0), make(encoder)
    v, _ = run(agent, read(lines, tmp_path))
    lines[1]["turns"][1]["critique"] = "more neon"
    some, _ = run(agent, read(lines, tmp_path))
    lines[1]["turns"][1]["critique"] = "more noir"
    other, _ = run(agent, read(lines, tmp_path))
    assert close(v[0], some[0]) and close(v[1, :2], some[1, :2]) and close(some[1, :2], other[1, :2])
    assert all((a[1, 2:] - b[1, 2:]).abs().min() > 1e-5 for a, b in ((v, some), (some, other)))


@BOTH
def test_the_turn_number(encoder, tmp_path):
    """A window of one turn, and the same turn three times over: states 1, 2 and 3 read the same but for their number."""
    lines = sessions(1, critique=0)
    lines[0]["turns"] = [json.loads(json.dumps(lines[0]["turns"][0])) | dict(t=t) for t in range(4)]
    last = lambda **settings: run(make(encoder, **settings), read(lines, tmp_path))[0][0, 1:].diff()
    assert close(last(max_turns=1, turn_number=False), torch.zeros(3))
    assert (last(max_turns=3).abs() > 1e-5).all() and (encoder == "pooled" or (last(max_turns=1).abs() > 1e-5).all())      # pooled: numbers up to max_turns
    # pooled: a table by turn, of the state and of what it starts from
    if encoder == "pooled":
        for known in (True, False):
            agent = make(turn_number=known)
            v, f = run(agent, read(lines, tmp_path))
            with torch.no_grad():
                agent.turn.weight[1:] += 1
                agent.offset[1:] += 1
            new_v, new_f = run(agent, read(lines, tmp_path))
            assert close(v[:, 0], new_v[:, 0]) and close(v, new_v) != known and close(f, new_f) != known


@BOTH
def test_the_type_is_read_by_an_oracle_alone(encoder, tmp_path):
    lines = sessions(2, turns=2)
    kinds = lambda agent, *kind: run(agent, read(lines, tmp_path, kind=kind))
    agent = make(encoder, num_kinds=3)
    (v, f), (new_v, new_f) = kinds(agent, 0, 1), kinds(agent, 0, 2)
    assert close(v[0], new_v[0]) and (v[1] - new_v[1]).abs().min() > 1e-5 and close(f[:, 0], new_f[:, 0]) and not close(f[:, 1], new_f[:, 1], 1e-5)
    agent = make(encoder)
    assert close(kinds(agent, 0, 1)[0], kinds(agent, 0, 2)[0]) and close(kinds(agent, 0, 1)[0], run(agent, read(lines, tmp_path))[0])
    a, b = (new_agent(make(encoder, num_kinds=3).config, TOKENIZER if encoder == "text" else None).init_weights(s) for s in (4, 4))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


@BOTH
def test_the_oldest_turns_are_forgotten_and_the_start_is_not(encoder, tmp_path):
    """Three turns are remembered: turn 0 is read by states 1 to 3 and by no later one, through no other turn either."""
    lines, agent = sessions(1, turns=6), make(encoder, max_turns=3)
    v, f = run(agent, read(lines, tmp_path))
    new = json.loads(json.dumps(lines))
    for line in new:
        first = line["turns"][0]
        first |= dict(slate=[(i + 1) % 10 for i in first["slate"]][::-1], choice=2 - first["choice"], critique="something else")
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in new))
    log = slate.read(path, one_per_category=False)
    new_v, new_f = run(agent, rectangles(log, np.zeros(len(log.choice))))
    assert close(v[:, [0, 4, 5, 6]], new_v[:, [0, 4, 5, 6]]) and ((v - new_v)[:, 1:4].abs() > 1e-5).all()
    assert close(f[:, :, 4:], new_f[:, :, 4:]) and not close(f[:, :, 3], new_f[:, :, 3], 1e-5)
    for line in new:
        line["prompt"] = "view of a temple, pastel, gears"
    path.write_text("".join(json.dumps(line) + "\n" for line in new))
    log = slate.read(path, one_per_category=False)
    assert ((new_v - run(agent, rectangles(log, np.zeros(len(log.choice))))[0]).abs() > 1e-5).all()
    # up to max_turns, the limit is not there: with the same tables a longer one says the same
    if encoder == "pooled":
        longer = make(max_turns=6)
        shared = {k: p for k, p in agent.state_dict().items() if k not in ("turn.weight", "offset")}
        longer.load_state_dict(shared, strict=False)
        with torch.no_grad():
            longer.turn.weight[:4], longer.offset[:4] = agent.turn.weight, agent.offset
        assert close(run(longer, read(lines, tmp_path))[0][:, :4], v[:, :4], 2e-6)


# -----------------------------------------------------------------------------
# The scores at deployment are those of training


@BOTH
@pytest.mark.parametrize("turn", [0, 1, 3])
def test_candidate_scores_are_those_of_forward(encoder, turn, tmp_path):
    """The view that a simulation makes turn by turn, with a missing candidate and in parts of 2 rows: the smaller head of forward, number by number."""
    lines, agent = sessions(3, turns=4, critique=.5), make(encoder, max_turns=2, num_kinds=2)
    data = read(lines, tmp_path, kind=[1, 0, 1])
    b = data.batch
    categories = data.categories.clone()
    categories[1, turn, -1] = -1
    view = View(data.texts, turn, b.start.numpy(), b.start.numpy(), b.shown[:, :turn].numpy(), b.shown_category[:, :turn].numpy(), b.picked[:, :turn].numpy(),
                b.critique[:, :turn].numpy(), data.candidates[:, turn].numpy(), categories[:, turn].numpy(), b.kind.numpy())
    scores = candidate_scores(agent, view, size=2 if encoder == "pooled" else 64)
    expected = run(agent, data)[1].amin(0)[:, turn].double().numpy()
    present = categories[:, turn].numpy() >= 0
    assert scores.shape == (3, 10) and np.allclose(scores[present], expected[present], atol=3e-6)
    assert len(candidate_scores(agent, view)) == 3 and np.allclose(candidate_scores(agent, view)[present], expected[present], atol=3e-6)


# -----------------------------------------------------------------------------
# Folders


@BOTH
def test_a_saved_agent_comes_back(encoder, tmp_path):
    data, agent = read(sessions(turns=2), tmp_path, kind=[0, 1, 1]), make(encoder, num_kinds=2, max_turns=3, turn_number=False)
    deployed = Deployment("template", 4, 5, 1, TOKENIZER if encoder == "text" else None)
    checkpoint.save_hf(agent, deployed, tmp_path / "agent")
    back, found = load_agent(tmp_path / "agent")
    assert back.config == agent.config and type(back) is type(agent) and found[:4] == deployed[:4] and (found.tokenizer is None) == (encoder == "pooled")
    for a, b in zip(run(agent, data), run(back, data)):
        assert torch.equal(a, b)
    step = checkpoint.save(tmp_path / "run", 7, agent, deployed, [], state={}, config={}, extra={"target": torch.ones(2)})
    back, _ = load_agent(step)
    assert torch.equal(run(agent, data)[0], run(back, data)[0])
    if encoder == "text":
        assert found.tokenizer.fingerprint() == TOKENIZER.fingerprint()


def test_a_text_agent_of_another_trunk(tmp_path):
    """Settings of a trunk are nested once more where a model stretches its rotations; left out, they are the smallest model's."""
    trunk = TRUNK | dict(rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64))
    agent = new_agent(SlateAgentConfig("text", trunk=trunk), TOKENIZER).init_weights(0)
    checkpoint.save_hf(agent, Deployment("template", 4, 5, 1, TOKENIZER), tmp_path / "agent")
    back, _ = load_agent(tmp_path / "agent")
    assert back.lm.config == agent.lm.config == ModelConfig(**trunk) and torch.equal(back.lm.inv_freq, agent.lm.inv_freq)
    assert TextSlateAgent(SlateAgentConfig("text"), TOKENIZER).lm.config == config_for_size("nano", TOKENIZER.vocab_size)


def test_folders_that_are_refused(tmp_path):
    agent, deployed = make(), Deployment("template", 4, 5, 1)

    def spoiled(change):
        shutil.rmtree(tmp_path / "agent", ignore_errors=True)
        checkpoint.save_hf(agent, deployed, tmp_path / "agent")
        change(tmp_path / "agent")
        with pytest.raises(ValueError, match="agent") as error:
            load_agent(tmp_path / "agent")
        return str(error.value)

    def edit(name, **values):
        def changed(path):
            record = json.loads((path / name).read_text()) | values
            (path / name).write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
        return changed
    cut = lambda name, size: lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])
    assert "truncated" in spoiled(cut("model.safetensors", 1000)) and "not valid JSON" in spoiled(cut("config.json", 50)) and "not valid JSON" in spoiled(cut("deployment.json", 9))
    assert "no config.json and deployment.json" in spoiled(lambda path: (path / "deployment.json").unlink())
    assert "no config.json and deployment.json" in spoiled(lambda path: (path / "config.json").unlink())
    assert "model.safetensors" in spoiled(lambda path: (path / "model.safetensors").unlink())
    assert "another kind of model" in spoiled(edit("config.json", architectures=["Recommender"]))
    assert "unexpected" in spoiled(edit("config.json", num_layers=1)) and "missing" in spoiled(edit("config.json", num_layers=3))
    assert "has shape" in spoiled(edit("config.json", max_turns=9)) and "colour" in spoiled(edit("config.json", colour=3)) and "horizon" in spoiled(edit("deployment.json", horizon=None))
    step = checkpoint.save(tmp_path / "run", 1, agent, deployed, [], state={}, config={})
    cut("model.safetensors", 5000)(step)
    with pytest.raises(ValueError, match="5000 bytes, expected"):
        load_agent(step)
    checkpoint.save_hf(Transformer(config_for_size("nano", TOKENIZER.vocab_size)).init_weights(0), TOKENIZER, tmp_path / "lm")
    with pytest.raises(ValueError, match="lm: no config.json and deployment.json there"):
        load_agent(tmp_path / "lm")
    with pytest.raises(ValueError):
        checkpoint.load_hf(tmp_path / "agent")
    assert isinstance(new_agent(agent.config), SlateAgent)


@pytest.mark.parametrize("settings", [dict(encoder="words"), dict(hidden_size=30), dict(max_turns=0), dict(num_q=0)])
def test_settings_that_are_refused(settings):
    with pytest.raises(ValueError, match="expected an encoder of pooled or text"):
        SlateAgentConfig(**settings)
