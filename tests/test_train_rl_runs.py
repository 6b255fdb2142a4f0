"""train_rl.py as its user runs it: files and rewards in, equal gradients however the batch is cut, exact resume, nothing lost when rewards fail."""
import gzip
import json
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_judge import Server
from test_train_sft import kill_9, run

import checkpoint
import train_rl
from data import tasks
from model import Transformer, config_for_size
from tokenizer import Tokenizer
from train_rl import Config, cold_start

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "train_rl.py")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A nano model with random weights, and one that half knows eight word problems with their calculator calls."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.bytes()
    model = Transformer(config_for_size("nano", tokenizer.vocab_size)).init_weights(1)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, .05, generator=torch.Generator().manual_seed(2))
    checkpoint.save_hf(model, tokenizer, folder / "random")
    problems = tasks.problems("math_en@train", 8, train_rl.random_key(0, "prompts", "math_en"))
    cold_start(model, tokenizer, problems, Config(cold_start=110, device_batch_size=32), torch.device("cpu"))
    checkpoint.save_hf(model, tokenizer, folder / "tools")
    return {name: str(folder / name) for name in ("random", "tools")}


REWARD = '''
import json, os, sys
def lambda_handler(event, context):
    """The share of letters in the answer: dense, and a pure function of the text."""
    out = []
    for sample in event:
        text = sample["messages"][-1]["content"]
        out.append({"id": sample["id"], "aggregate_reward_score": sum(c.isalpha() for c in text) / max(1, len(text)),
                    "metrics_list": [{"name": "letters", "value": float(sum(c.isalpha() for c in text)), "type": "Metric"}]})
    return out
'''


def prompt_file(path="prompts.jsonl", num=24):
    """Rows of two tracks, and the reward."""
    if path == "prompts.jsonl":
        prompt_file("other.jsonl", 10)
    rows = [{"id": f"row-{i}", "messages": [{"role": "user", "content": f"Say {i}."}], "reference_answer": {"n": i}} for i in range(num)]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("reward.py").write_text(REWARD)
    return path


def settings(models, **more):
    common = dict(init=models["random"], data="prompts.jsonl", rewards="file", reward_file="reward.py", group_size=4, prompts_per_step=4, max_new_tokens=12, num_steps=3,
                  eval_every=0, preflight=0, warmup_steps=0, lr=1e-3, eval_problems=4, critic_warmup=0)
    return common | more


def flags(**values):
    return [f"--{key}={value}" for key, value in values.items()]


def metrics(name="dummy"):
    lines = [json.loads(line) for line in Path(f"out/{name}/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


# -----------------------------------------------------------------------------
# From files to checkpoints


def test_a_bedrock_file_with_its_reward_function(models):
    """AWS's documented contract, unchanged: rows in, {id, aggregate_reward_score, metrics_list} back; metrics and samples are kept."""
    prompt_file()
    summary = train_rl.main(Config(**settings(models, reward_check=4, preflight=4)))
    lines = [line for line in metrics() if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3] and summary["samples"] == 48
    first = lines[0]
    assert first["rollout/engine_gap_max"] <= 1e-5
    assert abs(first["rewards/file/value"] - first["rollout/score"]) < 1e-9 and "rewards/file/letters" in first and 0 < first["rollout/score"] < 1
    rollouts = [json.loads(line) for line in Path("out/dummy/rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 3 * 16 and rollouts[0]["messages"][-1]["role"] == "assistant" and rollouts[0]["task"] == "rows/none"
    model, _ = checkpoint.load_hf(summary["checkpoint"])
    start, _ = checkpoint.load_hf(models["random"])
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)


def test_an_invocation_log_with_the_logged_response_as_reference(models):
    rows = [{"schemaType": "ModelInvocationLog", "schemaVersion": "1.0", "requestId": f"r{i}", "operation": "Converse", "modelId": "m", "requestMetadata": {"team": "a" if i % 2 else "b"},
             "input": {"inputBodyJson": {"messages": [{"role": "user", "content": [{"text": f"What is {i}?"}]}]}},
             "output": {"outputBodyJson": {"output": {"message": {"role": "assistant", "content": [{"text": str(i)}]}}}}} for i in range(40)]
    with gzip.open("log.json.gz", "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    Path("reward.py").write_text(REWARD.replace("event:", "(check(s) for s in event):") + '''
def check(sample):
    assert sample["reference_answer"] == sample["messages"][0]["content"].split()[-1].rstrip("?"), sample
    assert int(sample["reference_answer"]) % 2 == 1, "the filter keeps team a, the odd ones"
    return sample
''')
    values = settings(models, data="log.json.gz", use_prompt_response=True, log_filter='{"equals": {"team": "a"}}', num_steps=1)
    train_rl.main(Config(**values))
    assert metrics()[-1]["step"] == 1 and metrics()[-2]["rollout/samples"] == 16


def test_from_nothing(capsys):
    summary = train_rl.main(Config(data="toy", size="nano", cold_start=3, num_steps=1, num_prompts=20, group_size=2, prompts_per_step=2, preflight=2, eval_problems=2, eval_every=0))
    assert Path("out/dummy/step_000000/model.safetensors").exists() and Path(summary["checkpoint"]).name == "step_000001"
    assert "SFT comes first" in capsys.readouterr().out


def test_dry_run_prints_every_resolved_setting(models, capsys):
    prompt_file()
    train_rl.main(Config(**settings(models, dry_run=True, lr=-1.0, num_steps=-1, device_batch_size=-1, method="ppo")))
    out = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines() if len(line.split(None, 1)) == 2)
    assert float(out["lr"]) == 5e-4 and float(out["critic_lr"]) == pytest.approx(5e-3) and out["adv_scale"] == "batch" and int(out["num_steps"]) > 0
    assert int(out["device_batch_size"]) >= 1 and "critic" in out["memory_estimate_mb"] and not Path("out/dummy").exists()


# -----------------------------------------------------------------------------
# The gradient does not depend on how the batch is cut

PROBE = """
import json, sys, torch, train_rl
clip, grads, out = train_rl.clip_grad_norm, [], {}
def probe(model, max_norm):
    grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return clip(model, max_norm)
train_rl.clip_grad_norm = probe
for name, settings in json.loads(sys.argv[1]).items():
    train_rl.main(train_rl.Config(**settings))
    out[name], grads = grads, []
torch.save(out, sys.argv[2])
"""

CASES = {
    "grpo_mean": {},
    "gspo": dict(method="gspo"),
    "cispo": dict(method="cispo", is_mode="seq_mask"),
    "dr_grpo": dict(method="dr_grpo", kl_coef=.1, kl_form="k3_rho_loss"),
    "rloo": dict(method="rloo", kl_coef=.1),
    "grpo_batch": dict(adv_scale="batch", entropy_coef=.01),
    "reinforce++": {"method": "reinforce++", "kl_coef": .1},
    "ppo": dict(method="ppo", num_minibatches=1, truncated="bootstrap", lam=.95),
    "ppo_minibatches": dict(method="ppo", num_minibatches=2, device_batch_size=3),          # ranks with unequal numbers of micro-batches
    "masked": dict(truncated="mask"),
    "tracks": dict(data="logic=prompts.jsonl,chat=other.jsonl", track_weight="logic:2,chat:1", num_minibatches=2, adv_scale="batch"),
    "lora": dict(lora_rank=2, kl_coef=.1, kl_form="k2_loss"),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_equal_for_every_micro_batch_and_packing(models, case, monkeypatch):
    prompt_file()
    found = []
    clip = train_rl.clip_grad_norm
    for more in (dict(device_batch_size=16), dict(device_batch_size=3), dict(device_batch_size=1), dict(device_batch_size=5, pack=True)):
        grads = []
        monkeypatch.setattr(train_rl, "clip_grad_norm", lambda model, norm: grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None]) or clip(model, norm))
        train_rl.main(Config(**settings(models, num_steps=1, max_new_tokens=24, **CASES[case] | more)))
        found.append([torch.cat([g.flatten() for g in grad]) for grad in grads[:2 if case.startswith("ppo") else 1]])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert a.abs().max() > 1e-5 and (a - b).abs().max() <= min(1e-6 * max(1.0, float(a.abs().max())), 1e-4 * float(a.abs().max()))


def test_gradient_is_equal_for_two_ranks(models, tmp_path):
    prompt_file()
    (tmp_path / "probe.py").write_text(PROBE)
    cases = {name: settings(models, **dict(num_steps=1, max_new_tokens=24, device_batch_size=4) | case) for name, case in CASES.items()}
    found = []
    for ranks in (1, 2):
        run(str(tmp_path / "probe.py"), json.dumps(cases), str(tmp_path / f"{ranks}.pt"), ranks=ranks)
        found.append(torch.load(tmp_path / f"{ranks}.pt", weights_only=True))
    for name in cases:
        one, two = (f[name][:2 if name.startswith("ppo") else 1] for f in found)            # of the first update, before weights differ by rounding
        for a, b in zip(one, two):
            largest = max(float(g.abs().max()) for g in a.values())
            assert a.keys() == b.keys() and largest > 1e-5, name
            assert all((a[n] - b[n]).abs().max() <= min(1e-6 * max(1.0, largest), 1e-4 * largest) for n in a), name


# -----------------------------------------------------------------------------
# On policy, with tools


def test_a_judge_over_http_through_a_whole_run(models):
    """500s and late answers come right at the second try; garbage is no reward, counted, and no end of the run until there is too much of it."""
    prompt_file()
    server, seen = Server(), Counter()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def reply(request):
        text = json.dumps(request["messages"])
        with server.lock:
            seen[text] += 1
        number = int(re.search(r"Say (\d+)\.", text)[1])
        if number % 4 == 1 and seen[text] == 1:
            return 500
        if number % 4 == 2 and seen[text] == 1:
            time.sleep(4)
        return "This deserves 8/10." if number % 4 == 3 else json.dumps({"score": (len(text) % 7) / 2})
    server.reply = reply
    values = settings(models, rewards="judge", judge=server.url, judge_timeout=2.5, judge_range="0:3", num_steps=2, prompts_per_step=8, max_grader_error=.9, log_rollouts=64)
    try:
        train_rl.main(Config(**values))
        for line, rows in zip([line for line in metrics() if "train/loss" in line], steps_of("dummy"), strict=True):
            failed = [row for row in rows if row["outcome"] == "grader_error"]
            garbage = [row for row in rows if int(row["prompt"][-1]["content"][4:-1]) % 4 == 3]
            assert failed and [row for row in garbage if row["outcome"] != "ungradable"] == failed        # no answer: the judge is not asked
            assert line["rollout/grader_error"] == len(failed) and line["rewards/judge/judge_parse_failure"] == len(failed) / len(rows)
            assert {row["reward"] for row in failed} == {None} and None not in {row["reward"] for row in rows if row not in failed}
        assert max(row["reward"] for rows in steps_of("dummy") for row in rows if row["reward"] is not None) > 1
        with pytest.raises(RuntimeError, match="judge"):
            train_rl.main(Config(**values | dict(overwrite=True, max_grader_error=.02)))
    finally:
        server.shutdown()


def steps_of(name):
    """The kept samples of each step."""
    rows = [json.loads(line) for line in Path(f"out/{name}/rollouts.jsonl").read_text().splitlines()]
    return [[row for row in rows if row["step"] == step] for step in sorted({row["step"] for row in rows})]


def test_the_first_ratio_is_1_with_tools_cache_and_packing(models):
    """Calls are executed between sampled turns; the trainer's log-probabilities, packed and at a temperature, are the sampler's: to 1e-5 on an Intel Xeon, and
    1.22e-5 at the worst of a thousand tokens on an AMD EPYC, whose matrix products round otherwise. Another temperature or mask would be off by 1e-2."""
    values = settings(models, init=models["tools"], data="math_en", rewards="grader", num_prompts=8, max_new_tokens=112, num_steps=1, temperature=.9, pack=True)
    train_rl.main(Config(**values))
    line = metrics()[-2]
    assert line["rollout/tool_calls"] > .3 and line["rollout/engine_gap_max"] <= 2e-5 and line["rollout/engine_kl"] < 1e-9
    # with several updates old is a forward pass of its own: at a rate of almost 0 its ratios to the policy are 1, too
    train_rl.main(Config(**values | dict(num_minibatches=2, lr=1e-8, device_batch_size=3)))
    line = metrics()[-2]
    assert line["train/clip_frac"] == 0 and abs(line["train/approx_kl"]) < 1e-9 and line["rollout/engine_gap_max"] <= 2e-5


def test_the_critic_learns_what_the_prompt_says(models):
    """A reward that the prompt alone decides: the critic must come to predict it, before the policy has moved."""
    prompt_file(num=8)
    Path("reward.py").write_text(REWARD.replace("sum(c.isalpha() for c in text) / max(1, len(text))", 'float(sample["reference_answer"]["n"] < 4)'))
    train_rl.main(Config(**settings(models, method="ppo", num_steps=16, critic_warmup=15, critic_lr=3e-3, prompts_per_step=8, group_size=2, preflight=0)))
    lines = [line for line in metrics() if "critic/value" in line]
    assert abs(lines[0]["critic/value"]) < 1e-6 and lines[-1]["critic/explained_variance"] > .5


def test_critic_warmup_leaves_the_policy_alone(models):
    prompt_file()
    train_rl.main(Config(**settings(models, method="ppo", critic_warmup=2, num_steps=3, save_every=1)))
    before, warm, after = (load_file(Path(p) / "model.safetensors") for p in (models["random"], "out/dummy/step_000002", "out/dummy/step_000003"))
    assert all(torch.equal(before[n], warm[n]) for n in before) and not all(torch.equal(before[n], after[n]) for n in before)
    assert metrics()[0]["critic/loss"] > 0 and "train/loss" not in metrics()[0]


@pytest.mark.parametrize("method", ["ppo", "grpo_mean"])
def test_target_kl_ends_a_step_s_updates(models, method):
    """A rate that moves far: of eight updates the first is made, whatever follows it is measured and left out; the critic makes all of its own."""
    prompt_file()
    values = settings(models, method=method, num_epochs_per_step=2, num_minibatches=4, num_steps=1, lr=1e-2, kl_coef=0.0)
    train_rl.main(Config(**values | dict(name="dummy/free")))
    train_rl.main(Config(**values | dict(name="dummy/bound", target_kl=1e-4)))
    train_rl.main(Config(**values | dict(name="dummy/loose", target_kl=10.0)))
    free, bound, loose = (metrics(f"dummy/{name}")[-2] for name in ("free", "bound", "loose"))
    assert 1 <= bound["train/updates"] <= 3 and loose["train/updates"] == 8 and "train/updates" not in free
    assert bound["train/approx_kl"] <= 1e-4 < free["train/approx_kl"] == loose["train/approx_kl"]
    if method == "ppo":
        a, b = (load_file(f"out/dummy/{name}/step_000001/extra.safetensors") for name in ("free", "bound"))
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_an_answer_out_of_tokens_gets_the_penalty_in_place_of_its_reward(models):
    prompt_file()
    train_rl.main(Config(**settings(models, num_steps=2, missing_eos=-1.0, dynamic_sampling="off")))
    lines = [json.loads(line) for line in Path("out/dummy/rollouts.jsonl").read_text().splitlines()]
    cut = [line["reward"] for line in lines if line["finish_reason"] == "length"]
    assert cut and set(cut) == {-1} and all(line["reward"] >= 0 for line in lines if line["finish_reason"] != "length")
    assert metrics()[0]["rollout/score_min"] == -1 and "train/loss" in metrics()[0]


def test_lora_with_kl_starts_at_its_reference(models):
    prompt_file()
    summary = train_rl.main(Config(**settings(models, lora_rank=4, kl_coef=.1, num_steps=2, lr=1e-3)))
    lines = [line for line in metrics() if "rollout/ref_kl" in line]
    assert lines[0]["rollout/ref_kl"] < 1e-9 < lines[1]["rollout/ref_kl"]
    again = train_rl.main(Config(**settings(models, init=summary["checkpoint"], name="more", lora_rank=2, num_steps=1)))          # continue customization
    assert Path(again["checkpoint"]).exists()


def test_two_tracks_have_their_own_means_and_denominators(models):
    prompt_file()
    prompt_file("other.jsonl", 10)
    train_rl.main(Config(**settings(models, data="logic=prompts.jsonl,chat=other.jsonl", track_mix="logic:.75,chat:.25", adv_scale="batch", num_steps=1)))
    line = metrics()[0]
    assert {"rollout/score_logic", "rollout/score_chat"} <= line.keys() and line["rollout/samples"] == 16
    with pytest.raises(ValueError, match="tracks are logic, chat"):
        train_rl.main(Config(**settings(models, data="logic=prompts.jsonl,chat=other.jsonl", rewards="logic/file,code/file")))


def test_a_run_does_not_delete_its_own_start(models):
    prompt_file()
    train_rl.main(Config(**settings(models, num_steps=1)))
    with pytest.raises(ValueError, match="would delete its own start"):
        train_rl.main(Config(**settings(models, init="out/dummy", num_steps=1)))
    assert Path("out/dummy/step_000001/model.safetensors").exists()
    with pytest.raises(ValueError, match="no worked answers"):
        train_rl.main(Config(**settings(models, init="", size="nano", name="other")))


def test_refill_samples_others_in_place_of_groups_without_spread(models):
    """A reward that pays every other prompt nothing: those groups leave, others are drawn until the step is full or tries run out."""
    prompt_file()
    Path("reward.py").write_text(REWARD.replace("sum(c.isalpha() for c in text) / max(1, len(text))",
                                                "0.0 if int(sample['id'].split('/')[0]) % 2 else sum(map(ord, text)) % 97 / 97"))
    train_rl.main(Config(**settings(models, dynamic_sampling="refill", num_steps=1)))
    full = metrics()[0]
    train_rl.main(Config(**settings(models, dynamic_sampling="drop", num_steps=1)))
    dropped = metrics()[0]
    assert dropped["rollout/kept_groups"] == 2 and dropped["rollout/samples"] == 16
    assert full["rollout/kept_groups"] > 2 and full["rollout/samples"] > 16


def test_resume_refuses_settings_that_change_the_run(models):
    prompt_file()
    values = settings(models, num_steps=2, save_every=1)
    train_rl.main(Config(**values))
    with pytest.raises(ValueError, match=r"group_size was 4, found 2; .*lr was 0.001, found 0.01"):
        train_rl.main(Config(**(values | dict(lr=1e-2, group_size=2, resume="latest", num_steps=3))))
    assert train_rl.main(Config(**values | dict(num_steps=3, device_batch_size=2, resume="latest")))["steps"] == 3


def test_perfectible_prompts_alone(models, capsys):
    values = settings(models, init=models["tools"], data="math_en", rewards="grader", num_prompts=8, max_new_tokens=112, num_steps=1, solve_samples=8, solve_range=".05:.95")
    train_rl.main(Config(**values))
    shares = checkpoint.read_record("out/dummy/step_000001")["state"]["solved"]
    assert len(shares) == 8 and f"perfectible: {sum(.05 <= s <= .95 for s in shares)} of 8" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Stop, resume


@pytest.mark.parametrize("method, ranks", [("grpo_mean", 1), ("ppo", 1), ("grpo_mean", 2), ("ppo", 2)])
def test_kill_9_and_resume_is_exact(models, method, ranks):
    """Weights, critic, optimizers, metrics and samples of a run that was killed twice are bitwise those of one that never stopped."""
    prompt_file()
    values = settings(models, method=method, num_steps=6, save_every=2, group_size=2, dynamic_sampling="refill" if method != "ppo" else "off", kl_coef=.05,
                      num_minibatches=2, reward_norm=True, eval_every=3, critic_warmup=1)
    run(SCRIPT, *flags(name="whole", **values), ranks=ranks)
    for step in (2, 4):
        more = ["--resume=latest"] if step > 2 else []
        process = run(SCRIPT, *flags(name="killed", **values), *more, ranks=ranks, wait=False)
        deadline = time.monotonic() + 600
        while not Path(f"out/killed/step_{step:06d}").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()[-3000:] if process.poll() is not None else "too slow"
            time.sleep(.01)
        kill_9(process)
    run(SCRIPT, *flags(name="killed", **values), "--resume=latest", ranks=ranks)
    assert metrics("killed") == metrics("whole")
    assert Path("out/killed/rollouts.jsonl").read_text() == Path("out/whole/rollouts.jsonl").read_text()
    for file in ["model.safetensors"] + ["extra.safetensors"] * (method == "ppo"):
        a, b = (load_file(f"out/{name}/step_000006/{file}") for name in ("whole", "killed"))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    a, b = (torch.load(f"out/{name}/step_000006/optim_rank0.pt", weights_only=True) for name in ("whole", "killed"))
    for x, y in zip(a, b):
        assert all(torch.equal(x["state"][i][k], y["state"][i][k]) for i in x["state"] for k in x["state"][i])


RANKS = """
import os, sys, train_rl
from common import parse_config
play, what = train_rl.play_for_rewards, sys.argv.pop()
def changed(*args, **options):
    groups = play(*args, **options)
    if os.environ["RANK"] == "1":
        change = {"right": dict(reward=1.0), "cut": dict(finish_reason="length"), "ungradable": dict(reward=0.0, outcome="ungradable")}[what]
        groups = [[a._replace(**change) for a in g] for g in groups]
    else:
        groups = [[a._replace(finish_reason="stop") for a in g] for g in groups]
    return groups
train_rl.play_for_rewards = changed
train_rl.main(parse_config(train_rl.Config, sys.argv[1:]))
"""


@pytest.mark.parametrize("what, method", [("right", "grpo_mean"), ("ungradable", "grpo_mean"), ("cut", "ppo")])
def test_a_rank_with_nothing_to_train_on_finishes(models, tmp_path, what, method):
    """Rank 1's samples are all right, or all ungradable, so its groups leave; or all are cut, and cut ones have no loss. It takes part all the same."""
    prompt_file()
    (tmp_path / "ranks.py").write_text(RANKS)
    run(str(tmp_path / "ranks.py"), *flags(**settings(models, num_steps=2, truncated="mask", method=method)), what, ranks=2)
    assert [line["step"] for line in metrics() if "train/loss" in line] == [1, 2]
    line = metrics()[0]
    assert dict(right=line["rollout/kept_groups"] == 2, ungradable=line["rollout/ungradable"] == .5, cut=line["rollout/truncated"] == .5)[what]


# -----------------------------------------------------------------------------
# Bad rewards


BAD = {"None": ("return None", "None"), "NaN": ("out[1]['aggregate_reward_score'] = float('nan')", "NaN|nan|finite"), "a wrong id": ("out[0]['id'] = 'nobody'", "nobody|id"),
       "too few": ("out.pop()", "missing|no result|result"), "an exception": ("raise KeyError('no such column')", "no such column")}


@pytest.mark.parametrize("kind", BAD)
def test_a_reward_that_fails_stops_the_run_and_names_the_row(models, kind):
    """From the second step on. The checkpoint of step 1 stays whole, and the repaired run continues from it."""
    prompt_file()
    line, match = BAD[kind]
    counter = "p = 'calls.txt'; n = len(open(p).read()) if os.path.exists(p) else 0; open(p, 'a').write('x' * len(event))\n"
    Path("reward.py").write_text(REWARD.replace("    return out\n", f"    {counter}    if n >= 16:\n        {line}\n    return out\n"))
    values = settings(models, num_steps=3, save_every=1)
    with pytest.raises(RuntimeError, match=rf"step 1: .*have no reward.*prompts\.jsonl:\d+.*({match})"):
        train_rl.main(Config(**values))
    assert checkpoint.find("out/dummy", "latest").name == "step_000001"
    Path("reward.py").write_text(REWARD)
    assert train_rl.main(Config(**values, resume="latest"))["steps"] == 3


def test_a_reward_without_spread_is_refused_before_training(models, capsys):
    prompt_file()
    Path("reward.py").write_text(REWARD.replace("sum(c.isalpha() for c in text) / max(1, len(text))", "0.0"))
    with pytest.raises(ValueError, match="preflight: mean reward 0.000"):
        train_rl.main(Config(**settings(models, preflight=4)))
    train_rl.main(Config(**settings(models, preflight=4, force=True, num_steps=1)))
    assert "there is no update" in capsys.readouterr().out and "train/loss" not in metrics()[0]


def test_bad_settings_and_files_are_refused(models):
    prompt_file()
    for more, match in ((dict(max_prompt_tokens=3), "max_prompt_tokens"), (dict(data="math_ne"), "did you mean"), (dict(reward_file=""), "reward_file"), (dict(rewards="judge"), "--judge"),
                        (dict(max_new_tokens=9000), "context"), (dict(rewards="graderr"), "did you mean"), (dict(solve_samples=2, solve_range=".4:.6"), "solve_range")):
        with pytest.raises(ValueError, match=match):
            train_rl.main(Config(**settings(models, **more)))
    Path("prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [\n')
    with pytest.raises(ValueError, match="prompts.jsonl:2"):
        train_rl.main(Config(**settings(models)))


def test_minibatches_hold_whole_groups(models, monkeypatch):
    """Four updates on four prompts: each sees the answers to one prompt, so that what they share is computed once."""
    seen, cut = [], train_rl.micro_batches

    def recorded(lengths, size, unit=1, groups=None):
        seen.append(sorted(groups))
        return cut(lengths, size, unit, groups)
    monkeypatch.setattr(train_rl, "micro_batches", recorded)
    train_rl.main(Config(**settings(models, data="math_en", rewards="grader", num_prompts=16, num_steps=1, max_new_tokens=8, method="rloo", dynamic_sampling="off", num_minibatches=4, prompts_per_step=4, group_size=3)))
    updates = [groups for groups in seen if len(groups) == 3]
    assert sorted(updates) == [[i] * 3 for i in range(4)]
