"""confidence.py: a q read from the model equals one worked by hand, and a checkpoint says about itself what its training run measured."""
import json
import math

import numpy as np
import pytest
import torch

import calibration as cal
import checkpoint
import confidence
from confidence import Confidence, Item
from model import LoRALinear, Transformer, add_lora, config_for_size, lora_off, lora_scaled
from tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()
START, END, END_OF_TEXT = 257, 258, 256
ASKED = b"Is this answer right?\n0: no\n1: yes"


def random_model(seed=1):
    """No matrix is 0, and logits are far from equal: nothing that is tested vanishes."""
    model = Transformer(config_for_size("nano", TOKENIZER.vocab_size)).init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, .05, generator=torch.Generator().manual_seed(seed))
        model.lm_head.weight *= 10
    return model


@pytest.fixture(scope="module")
def model():
    return random_model()


def conversation(question, answer, ended=True):
    prompt = TOKENIZER.render_prompt([dict(role="user", content=question)])
    ids = TOKENIZER.encode(answer) + [END] * ended
    return Item(prompt + ids, [0] * len(prompt) + [1] * len(ids), True, answer, question)


def plain(question, answer, ended=True):
    prompt, ids = TOKENIZER.encode(question), TOKENIZER.encode(answer) + [END_OF_TEXT] * ended
    return Item(prompt + ids, [0] * len(prompt) + [1] * len(ids), False, answer, question)


ITEMS = [conversation("2+2?", "4"), conversation("2+2?", "5, as I think", ended=False), conversation("Is it so that seven is odd?", "yes"), plain("one, two,", " three"),
         conversation("2+2?", "4")]


# -----------------------------------------------------------------------------
# The query


def test_the_query_s_sequence_by_hand():
    """Token by token: bytes are their own ids. Mask 1 stands on the label alone, or on the sampled tokens too."""
    before = [START, *b"user\n2+2?", END, 10, START, *b"assistant\n", *b"4"]
    after = [10, START, *b"user\n", *ASKED, END, 10, START, *b"assistant\n", *b"0"]
    ended, cut = conversation("2+2?", "4"), conversation("2+2?", "4", ended=False)
    for item in (ended, cut):                                                                   # a turn that was cut is ended, and only such a one
        ids, mask = confidence.query_sequence(TOKENIZER, item, confidence.QUERY)
        assert ids == before + [END] + after and mask == [0] * (len(ids) - 1) + [1]
        ids, mask = confidence.query_sequence(TOKENIZER, item, confidence.QUERY, with_answer=True)
        assert ids == before + [END] + after                                                    # END was sampled in one of them
        assert mask == [0] * (len(before) - 1) + [1, int(item is ended)] + [0] * (len(after) - 1) + [1]
    ids, _ = confidence.query_sequence(TOKENIZER, ended, "{no}/{yes}", swapped=True)
    assert ids == before + [END, 10, START, *b"user\nyes/no", END, 10, START, *b"assistant\n", *b"0"]


@pytest.mark.parametrize("ended", [True, False])
def test_the_query_s_sequence_of_a_text_by_hand(ended):
    item = plain("ab", "cd", ended)
    ids, mask = confidence.query_sequence(TOKENIZER, item, confidence.QUERY, with_answer=True)
    assert ids == [*b"abcd\n", *ASKED, *b"\n0"]                                                 # a document that ended would hide what came before
    assert mask == [0, 0, 1, 1] + [0] * (len(ids) - 5) + [1]


@pytest.mark.parametrize("text", ["Is it right?", "{no} or {yes} or {no}", "only {yes}", "{0} {1}", "{no} {yes} {maybe}", "{no} {yes", "{no.x} {yes}", "{no[a]} {yes}", "{no!r} {yes}"])
def test_a_query_without_both_options_is_refused(text):
    confidence.check_query(confidence.QUERY)
    confidence.check_query("{{yes}, or not}} {yes}: 1, {no}: 0".replace("{{yes}, or not}}", "{{}}"))
    with pytest.raises(ValueError, match="--query=.*once each"):
        confidence.check_query(text)


def test_labels_are_one_token_each_and_differ():
    class Fake:
        def __init__(self, **ids):
            self.encode = lambda text: ids[f"t{text}"]
    assert confidence.label_ids(TOKENIZER) == [48, 49] and confidence.label_ids(Fake(t0=[7], t1=[5])) == [7, 5]
    for ids in (dict(t0=[1, 7], t1=[1, 8]), dict(t0=[7], t1=[1, 8]), dict(t0=[3], t1=[3]), dict(t0=[], t1=[])):
        with pytest.raises(ValueError, match="one token each"):
            confidence.label_ids(Fake(**ids))


def test_query_logits_by_hand():
    """z_1 - z_0 of the label rows alone; where options changed places label 0 says yes, so the sign turns."""
    weight = torch.tensor([[9., 9.], [1., 0.], [9., 9.], [0., 2.]])
    z = confidence.query_logits(torch.tensor([[1., 2.], [1., 2.], [3., 0.]]), weight, [1, 3], torch.tensor([False, True, False]))
    assert z.tolist() == [4 - 1, 1 - 4, -3]


@pytest.mark.parametrize("swapped", [False, True])
def test_asking_is_reading_two_logits(model, swapped):
    """Against model.logits of each sequence by itself; whatever the number of sequences in a forward pass, with answers that stand there twice."""
    with torch.no_grad():
        rows = [model.logits(torch.tensor([confidence.query_sequence(TOKENIZER, item, confidence.QUERY, swapped)[0][:-1]]))[0, -1].double() for item in ITEMS]
    expected = torch.stack([row[49] - row[48] for row in rows]) * (-1 if swapped else 1)
    assert expected.abs().min() > 1e-3 and expected.unique().numel() == 4
    for size in (1, 2, 16):
        found = confidence.ask(model, TOKENIZER, ITEMS, confidence.QUERY, size, swapped)
        assert found.dtype == torch.float64 and (found - expected).abs().max() < 1e-5
    assert confidence.ask(model, TOKENIZER, [], confidence.QUERY).shape == (0,)


def test_both_orders_are_averaged(model):
    one, other = (torch.sigmoid(confidence.ask(model, TOKENIZER, ITEMS, confidence.QUERY, 16, swapped)) for swapped in (False, True))
    assert (one - other).abs().max() > 1e-3
    assert confidence.by_query(model, TOKENIZER, ITEMS, confidence.QUERY) == pytest.approx(one.tolist(), abs=1e-6)
    assert confidence.by_query(model, TOKENIZER, ITEMS, confidence.QUERY, both_orders=True) == pytest.approx(((one + other) / 2).tolist(), abs=1e-6)


# -----------------------------------------------------------------------------
# Other sources


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_the_log_probability_is_the_sampler_s(model, temperature):
    """exp of the mean over the tokens with mask 1, those of a tool's result between them left out; greedy answers are read at temperature 1."""
    tool = ITEMS[1]._replace(mask=[m * (i % 3 > 0) for i, m in enumerate(ITEMS[1].mask)])
    items, expected = [*ITEMS, tool], []
    for item in items:
        with torch.no_grad():
            logps = (model.logits(torch.tensor([item.ids]))[0].double() / (temperature or 1)).log_softmax(-1)
        expected.append(math.exp(np.mean([logps[i - 1, item.ids[i]].item() for i, m in enumerate(item.mask) if m])))
    for size in (1, 4, 16):
        assert confidence.by_logprob(model, items, temperature, size) == pytest.approx(expected, rel=1e-5)
    assert expected[1] != pytest.approx(expected[-1], rel=1e-3)


def said(text, prompt="a"):
    return Item([1, 2], [0, 1], True, text, prompt)


def test_votes_by_hand():
    """Samples to one prompt agree if their last lines do, whatever came before and whatever confidence they state."""
    items = [said("So 3 + 4\n#### 7"), said("#### 7\n<confidence>0.9</confidence>"), said("#### 8"), said(" #### 7 \n\n"), said("#### 7", "b"), said("", "c"), said("\n", "c"), said("x", "c")]
    shares = confidence.by_vote(items)
    assert shares.pop(4) is None                                                                # alone: no vote
    assert shares == pytest.approx([3 / 4, 3 / 4, 1 / 4, 3 / 4, 2 / 3, 2 / 3, 1 / 3])


def test_words_are_read_or_there_is_no_confidence():
    assert confidence.by_words([said("7\n<confidence>0.25</confidence>"), said("7"), said("<confidence>90%</confidence>"), said("<confidence>1</confidence>")]) == [.25, None, None, 1.0]


# -----------------------------------------------------------------------------
# What a checkpoint knows about itself


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint as train_calibration.py leaves it, its q with the adapter on, and its Confidence."""
    folder, model = tmp_path_factory.mktemp("trained"), random_model()
    add_lora(model, 2, 6.0, seed=3)
    with torch.no_grad():
        for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
            layer.lora_B.normal_(0, .1, generator=torch.Generator().manual_seed(4))
    with lora_off(model):
        saved = checkpoint.save(folder, 1, model, TOKENIZER, [], state={}, config={})
    known = Confidence({"query": 1.0}, threshold=.25, query="{no}|{yes}", both_orders=True, lora_rank=2, lora_alpha=6.0)
    known.save(saved)
    return saved, confidence.by_query(model, TOKENIZER, ITEMS, "{no}|{yes}", True), known


def test_an_adapter_for_the_query_leaves_answers_as_they_were(trained, model):
    """After load, with the adapter in place and off, every logit is bitwise that of the plain weights; `of` switches it on, and off again."""
    folder, q, known = trained
    loaded, _ = checkpoint.load_hf(folder)
    found = confidence.load(folder, loaded)
    assert found == known
    ids = torch.tensor([ITEMS[1].ids])
    with torch.no_grad():
        expected = model.logits(ids)
        assert torch.equal(loaded.logits(ids), expected)
        assert found.of(loaded, TOKENIZER, ITEMS) == q
        assert torch.equal(loaded.logits(ids), expected)
        with lora_scaled(loaded, 3.0):
            assert not torch.equal(loaded.logits(ids), expected)
    plain_q = confidence.by_query(model, TOKENIZER, ITEMS, "{no}|{yes}", True)
    assert np.abs(np.array(q) - plain_q).max() > 1e-3                                           # the adapter says something


def test_log_probabilities_are_read_without_the_adapter(trained, model):
    folder, q, known = trained
    loaded, _ = checkpoint.load_hf(folder)
    confidence.load(folder, loaded)
    both = known._replace(slopes={"query": 1.5, "logprob": -.5}, offset=.2, temperature=.7).of(loaded, TOKENIZER, ITEMS)
    expected = cal.sigmoid(1.5 * cal.logit(q) - .5 * cal.logit(confidence.by_logprob(model, ITEMS, .7)) + .2)
    assert both == pytest.approx(expected.tolist(), rel=1e-6)


def test_one_source_as_it_is_is_stated_as_it_is(model):
    """Not clamped, not rounded; and where none was stated there is none, also after rescaling."""
    items = [said("<confidence>1</confidence>"), said("7"), said("<confidence>0.5</confidence>")]
    assert Confidence({"verbal": 1.0}).of(model, TOKENIZER, items) == [1.0, None, .5]
    assert Confidence({"verbal": 2.0}, 1.0).of(model, TOKENIZER, items) == [pytest.approx(cal.sigmoid(2 * cal.logit(1.0) + 1)), None, pytest.approx(1 / (1 + math.exp(-1)))]
    assert Confidence({"vote": 1.0}).of(model, TOKENIZER, items) == pytest.approx([2 / 3, 1 / 3, 2 / 3])


GARBAGE = ["", "[]", "{}", '{"slopes": {}}', '{"slopes": {"guess": 1.0}}', '{"slopes": ["query"]}', '{"slopes": {"query": "1"}}', '{"slopes": {"query": NaN}}', '{"slopes": {"query": 1.0}, "heat": 2}',
           '{"slopes": {"query": 1.0}, "query": "right?"}', '{"slopes": {"query": 1.0}, "query": 3}', '{"slopes": {"query": 1.0}, "offset": null}',
           '{"slopes": {"query": 1.0}, "lora_rank": "8"}', '{"slopes": {"query": 1.0}, "temperature": 0}', '{"slopes": {"query": 1.0}, "lora_rank": -1}', '{"slopes": {"query": 1.0}, "lora_rank": 2, "lora_alpha": "x"}']


@pytest.mark.parametrize("text", GARBAGE)
def test_a_foreign_calibration_file_is_refused_by_name(tmp_path, model, text):
    assert confidence.load(tmp_path, model) is None
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ValueError, match=r"calibration\.json"):
        confidence.load(tmp_path, model)


def test_an_adapter_that_is_gone_or_of_another_rank_is_refused(trained, tmp_path):
    folder, _, known = trained
    for rank, match, where in ((2, "unmerged|without LoRA", tmp_path), (4, "shape", folder)):
        record, before = where / "calibration.json", known._asdict()
        record.write_text(json.dumps(before | dict(lora_rank=rank)))
        with pytest.raises(ValueError, match=match):
            confidence.load(where, random_model())
        known.save(where)


# -----------------------------------------------------------------------------
# Several confidences at once


def test_fits_together_recover_what_made_the_data():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (40_000, 2))
    z[:, 1] += .8 * z[:, 0]                                                                     # what each says given the other, not alone
    q = cal.sigmoid(z)
    c = (rng.random(len(q)) < cal.sigmoid(z @ [1.2, -.4] + .3)).astype(int).tolist()
    slopes, offset = cal.fit_together([*q.T.tolist()], c)
    assert slopes == pytest.approx([1.2, -.4], abs=.05) and offset == pytest.approx(.3, abs=.05)
    slopes, offset = cal.fit_together([q[:, 0].tolist()], c)
    assert (slopes[0], offset) == pytest.approx(cal.fit_platt(q[:, 0].tolist(), c), rel=1e-6)
    some = [None if i % 3 == 0 else x for i, x in enumerate(q[:, 0].tolist())]                  # left out are items that lack any of them
    kept = [i for i in range(len(c)) if i % 3]
    assert cal.fit_together([some, q[:, 1].tolist()], c) == cal.fit_together([q[kept, 0].tolist(), q[kept, 1].tolist()], [c[i] for i in kept])


def unfittable():
    rng = np.random.default_rng(1)
    q, other = rng.random(60), rng.random(60).tolist()
    c, split = (rng.random(60) < q).astype(int).tolist(), (q > .5).astype(int).tolist()
    return {"separable": ([q.tolist()], split), "separable by one of two": ([other, q.tolist()], split), "separable by both": ([q.tolist(), other], (q + other > 1).astype(int).tolist()),
            "separable but for ties": ([[.2] * 10 + [.5] * 10 + [.8] * 10], [0] * 10 + [0] * 7 + [1] * 3 + [1] * 10), "constant": ([q.tolist(), [.3] * 60], c),
            "twice the same": ([q.tolist(), q.tolist()], c), "a function of another": ([q.tolist(), cal.sigmoid(2 * cal.logit(q) + 1).tolist()], c),
            "one class": ([q.tolist(), other], [1] * 60), "none stated by all": ([[.1, None], [None, .1]], [0, 1])}


@pytest.mark.parametrize("name", unfittable())
def test_fits_together_without_an_answer_are_refused(name):
    columns, c = unfittable()[name]
    with pytest.raises(ValueError):
        cal.fit_together(columns, c)


def test_combined_by_hand():
    """sig(2 logit(.8) - logit(.5) + ln 2) = 32 / 33: the odds are 4^2 / 1 * 2."""
    columns = [[.8, None, .5, .5], [.5, .5, None, 2 / 3]]
    assert cal.combine(columns, [2.0, -1.0], math.log(2)) == [pytest.approx(32 / 33), None, None, pytest.approx(1 / 2)]
