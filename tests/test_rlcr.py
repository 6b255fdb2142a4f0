"""RLCR: the confidence an answer states is read and never guessed, graders do not see it, its reward is the paper's, and no group's std divides it."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rollouts
from adversarial import cost
from data.grading import MAX_CHARS, Outcome, Problem, stated_confidence, without_confidence
from data.rewards import Sample, grader_reward, open_rewards, parse_rewards, rlcr_reward, weighted
from engine import Rollout
from tokenizer import Tokenizer
from train_rl import Config, group_advantages, resolve

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR


def tag(q):
    return f"<confidence>{q}</confidence>"


def score(outcome, q=None):
    said = [dict(role="assistant", content="#### 4" if q is None else f"#### 4\n{tag(q)}")]
    return rlcr_reward([Sample("0/0", Problem("gsm8k", "2 + 2?", "", "4"), said, outcome)])[0]


# -----------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("text, answer, q", [
    (f"#### 72\n{tag('0.85')}", "#### 72", .85), (f"72 {tag('.5')} \n\t", "72", .5), (tag("1"), "", 1), (f"72{tag('0')}", "72", 0),
    (f"a\n\nb\n\n{tag('1.00')}", "a\n\nb", 1), (f"72\n{tag(' 0.30' + chr(10))}", "72", .3),
    (f"{tag('.8')} so 72 {tag('0.80')}", f"{tag('.8')} so 72", .8),                  # they agree; the last one is the answer's
    (f"7 < 8 </b> {tag('0.1')}", "7 < 8 </b>", .1),
])
def test_a_confidence_is_read(text, answer, q):
    """.7 stays float64: as float32 it would fall in another bin."""
    assert stated_confidence(text) == (answer, q) and type(stated_confidence(text)[1]) is float
    assert stated_confidence(tag("0.7"))[1] == .7


@pytest.mark.parametrize("inside", [
    "", " ", "85%", "85", "0.85%", "high", "1.01", "1.5", "2", "-0.1", "-0", "+0.5", "nan", "inf", "8e-1", "1e0", "0,85", "0.8 5", "0.", "1.", ".", "00.5",
    "01", "1/2", "0.5/1", "0_1", "0.8.5", "\u0660.\u0665", "\uff10.5", "\u0660", "0.5 <b>", "0.\n5", "1.0000001", "~0.5", "<confidence>", "0." + "1" * 1000,
])
def test_what_is_no_plain_decimal_is_not_guessed_at(inside):
    assert stated_confidence(f"72 {tag(inside)}") == (f"72 {tag(inside)}", None)


@pytest.mark.parametrize("text", [
    "", "72", "72 0.85", "confidence: 0.85", "72 <confidence>0.85", "72 0.85</confidence>", "72 <confidence>0.85<confidence>",
    "72 <confidence>0.85</confidence", f"{tag('.8')} is what I would say", f"{tag('.8')}.", f"72 {tag('.8')} 73", f"72 **{tag('.8')}**",
    f"72 {tag('.8')} {tag('.9')}", f"72 <confidence>{tag('.8')}", f"<confidence>high {tag('.8')}", f"72 {tag('.8')}</confidence>",
    f"{tag('80%')} 72 {tag('.8')}", f"{tag('.8')} 72 {tag('80%')}",
    "72 <Confidence>0.8</Confidence>", "72 < confidence>0.8</confidence>", "72 <confidence>0.8</ confidence>", "72 <confidence q=1>0.8</confidence>",
    "x" * MAX_CHARS + tag(".8"),
])
def test_what_does_not_end_in_one_tag_states_nothing_and_stays(text):
    assert stated_confidence(text) == (text, None)


@given(st.text(max_size=30), st.floats(0, 1), st.integers(1, 20), st.sampled_from(["", " ", "\n", "\n\n "]), st.sampled_from(["", "\n", "  "]))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(text, q, digits, before, after):
    number = f"{q:.{digits}f}"
    assert stated_confidence(text + before + tag(number) + after) == (text.rstrip(), float(number))


@given(st.lists(st.sampled_from([tag(".8"), tag("0.8"), tag("1.2"), "<confidence>", "</confidence>", "0.9", "1", "%", " ", "x"]), max_size=8).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_a_number_in_range_or_stays(text):
    answer, q = stated_confidence(text)
    assert answer == text if q is None else 0 <= q <= 1 and text.startswith(answer) and text.rstrip().endswith("</confidence>")


@pytest.mark.parametrize("piece", ["<confidence>", "<confidence>0.8", "<confidence>0.", "<confidence> ", " ", "0", tag(".8"), "</confidence>"])
def test_reading_is_linear(piece):
    """The longest text that is read, made of what could make a search start over: under a second here, minutes where it is quadratic in a large part."""
    texts = piece * (MAX_CHARS // len(piece)), ("<confidence>0." + piece * MAX_CHARS)[:MAX_CHARS]
    assert cost(lambda: [stated_confidence(text) for text in texts], enough=1)[1] <= 1


def test_of_a_conversation_the_last_message_of_the_assistant_counts():
    said = [dict(role="assistant", content=f"so {tag('.1')}"), dict(role="user", content="Sure?"), dict(role="assistant", content=f"4 {tag('.9')}")]
    graded, q = without_confidence(said)
    assert q == .9 and graded == [*said[:2], dict(role="assistant", content="4")] and said[2]["content"] == f"4 {tag('.9')}"
    assert without_confidence(said[:2]) == ([dict(role="assistant", content="so"), said[1]], .1)
    assert without_confidence([]) == ([], None) and without_confidence([dict(role="tool", content=tag(".5"))])[1] is None


# -----------------------------------------------------------------------------
# Grading with the tag off


def test_play_grades_without_the_tag_and_keeps_it(monkeypatch):
    """A task whose grader wants the whole line: right with a tag behind it, ungradable where the tag is none, wrong stays wrong; messages and
    tokens are as they were sampled; RLCR reads its q from them."""
    tokenizer = Tokenizer.bytes()
    problem = Problem("gsm8k", [dict(role="user", content="70 + 2?")], [], "#### 72")
    texts = [f"#### 72 {tag('0.75')}", f"#### 72 {tag('75%')}", f"#### 73 {tag('0.5')}", "#### 72"]

    def generate(model, tokenizer, prompts, **options):
        groups = []
        for text in texts:
            ids = tokenizer.encode(text) + [tokenizer.end_of_turn_id]
            groups.append([Rollout(ids=ids, logps=[0.0] * len(ids), mask=[1] * len(ids), finish_reason="stop")])
        return groups
    monkeypatch.setattr(rollouts, "generate", generate)
    played = [group[0] for group in rollouts.play(None, tokenizer, [problem] * 4)]
    assert [p.outcome for p in played] == [RIGHT, UNGRADABLE, WRONG, RIGHT]
    assert [p.messages for p in played] == [[dict(role="assistant", content=text)] for text in texts]
    (rewards,) = open_rewards("rlcr", ["all"])
    answers = rollouts.play_for_rewards(None, tokenizer, [(0, problem)] * 4, [rewards], [0] * 4, num_samples=1)
    assert [a.reward for (a,) in answers] == [1 - .25 ** 2, -2, -.25, -2]
    assert answers[0][0].parts == {"rlcr/stated": 1, "rlcr/confidence": .75, "rlcr/brier": .0625, "rlcr/value": .9375} and answers[3][0].outcome == RIGHT


# -----------------------------------------------------------------------------
# The reward


def test_the_reward_by_hand():
    sure = score(RIGHT, "0.85")
    assert sure.value == pytest.approx(1 - .0225, abs=1e-15) and sure.outcome == RIGHT
    assert sure.metrics == dict(stated=1, confidence=.85, brier=pytest.approx(.0225, abs=1e-15))
    assert score(WRONG, "0")[:2] == (0, WRONG) and score(WRONG, "1")[:2] == (-1, WRONG) and score(RIGHT, "0")[:2] == (0, RIGHT)
    assert score(UNGRADABLE, "0.5")[:2] == (-.25, UNGRADABLE)                        # no answer is not right
    for outcome in (RIGHT, WRONG, UNGRADABLE):
        for q in (None, "85%", "1.2"):
            assert score(outcome, q)[:2] == (-2, outcome) and score(outcome, q).metrics == dict(stated=0)


def test_a_grader_s_error_stays_one():
    error = score(ERROR, "0.85")
    assert error.value is None and error.outcome == ERROR and error.note.startswith("gsm8k (sample 0/0): ") and error == score(ERROR)
    total = weighted(dict(grader=grader_reward([Sample("0", Problem("gsm8k", "", "", ""), [], RIGHT)])[0], rlcr=error), dict(grader=1.0, rlcr=1.0))
    assert total.value is None


def test_right_beats_wrong_and_honesty_is_best():
    """No wrong answer beats a right one, whatever either says, and they tie at q = 0 alone. At p, the best q is p and worth p^2."""
    grid = [f"{i / 20:.2f}" for i in range(21)]
    right, wrong = ([score(outcome, q).value for q in grid] for outcome in (RIGHT, WRONG))
    for (i, a), (j, b) in itertools.product(enumerate(right), enumerate(wrong)):
        assert a > b or a == b and i == j == 0
    assert min(wrong) > score(RIGHT).value == score(WRONG).value == -2
    for i in (0, 2, 7, 12, 16, 20):
        p = i / 20
        expected = [p * a + (1 - p) * b for a, b in zip(right, wrong)]
        assert expected.index(max(expected)) == i and expected[i] == pytest.approx(p * p, abs=1e-12)
    assert 1 + math.log(.2) < math.log(1 - 0)                                       # why the log score is none: right with q = .2, wrong with q = 0


@pytest.mark.parametrize("outcome", [RIGHT, WRONG])
@pytest.mark.parametrize("q", [None, "0", "0.3", "0.85", "1"])
def test_it_is_the_authors_reward_on_another_scale(outcome, q):
    """.5 format + .5 accuracy + .5 (1 - (c - q)^2), 0 without the format: 1 + value / 2."""
    c = float(outcome == RIGHT)
    theirs = 0.0 if q is None else .5 + .5 * c + .5 * (1 - (c - float(q)) ** 2)
    assert 1 + score(outcome, q).value / 2 == pytest.approx(theirs, abs=1e-15)


# -----------------------------------------------------------------------------
# No division by the group's standard deviation


@pytest.mark.parametrize("rewards", ["rlcr", "grader:1,rlcr:.5", "logic/rlcr,chat/judge"])
@pytest.mark.parametrize("method", ["grpo", "dapo", "gspo", "cispo"])
def test_division_by_the_group_s_std_is_refused(method, rewards):
    with pytest.raises(ValueError, match=r"--adv_scale=group.*standard deviation.*over-confident \(arXiv 2508.11800\).*--adv_scale=none"):
        resolve(Config(init="x", method=method, rewards=rewards), 1e6, 100, 112)
    assert resolve(Config(init="x", method=method, rewards=rewards, adv_scale="none"), 1e6, 100, 112).adv_scale == "none"
    assert resolve(Config(init="x", method=method), 1e6, 100, 112).adv_scale == "group"
    assert resolve(Config(init="x", method=method, rewards="grader,rlcr:0"), 1e6, 100, 112).adv_scale == "group"        # logged, not paid


@pytest.mark.parametrize("method", ["grpo_mean", "rloo", "ppo", "reinforce++", "dr_grpo"])
def test_other_methods_pass(method):
    assert resolve(Config(init="x", method=method, rewards="rlcr"), 1e6, 100, 112).adv_scale in ("none", "batch")
    assert parse_rewards("rlcr:2") == {"": {"rlcr": 2}}


def learned(p, scale, group=8, steps=100):
    """The mean q a softmax policy over {0, .1, ..., 1} learns where answers are right with probability p whatever q, from the reward -(q - c)^2.

    Exact, nothing is sampled: a reward is one of 11 values, so one sees every multiset of the other samples' rewards (19,448 at G 8) with its
    probability, and the advantage that train_rl gives each own reward among them.
    """
    values = -(torch.arange(11) / 10).double().square()                              # of |q - c| = 0, .1, ..., 1
    others = torch.tensor(list(itertools.combinations_with_replacement(range(11), group - 1)))                      # (M, G - 1)
    counts = torch.nn.functional.one_hot(others, 11).sum(1).double()                # (M, 11)
    log_ways = math.lgamma(group) - torch.lgamma(counts + 1).sum(1)
    rewards = torch.cat([values.repeat_interleave(len(others))[:, None], values[others].repeat(11, 1)], 1)          # (11 M, G)
    table = group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), "mean", scale)[:, 0].view(11, -1)
    logits = torch.zeros(11, dtype=torch.float64)
    for _ in range(steps):
        policy = logits.softmax(0)
        chances = p * policy.flip(0) + (1 - p) * policy                             # of each reward: |q - c| is 1 - q where right, q where wrong
        advantages = table @ (log_ways + counts @ chances.clamp(min=1e-300).log()).exp()                            # of each own reward
        advantages = p * advantages.flip(0) + (1 - p) * advantages                  # of each q
        logits += (10 if scale == "group" else 100) * policy * (advantages - policy @ advantages)
    return float(logits.softmax(0) @ torch.arange(11).double()) / 10


def test_the_bandit_learns_its_probability_without_the_std_and_over_confidence_with_it():
    """Measured: .600 and .800; with the std .696 and 1.000 (arXiv 2508.11800 has the reason)."""
    for p in (.6, .8):
        assert abs(learned(p, "none") - p) < .02
    assert learned(.8, "group") > .8 + .1 and learned(.6, "group") > .6 + .05
