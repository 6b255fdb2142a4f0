"""Flags, schedules, random keys and the log; and what the flags of all scripts have in common."""
import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.distributed.run import get_args_parser

import common
from common import Logger, lr_scale, parse_config, progress, random_key, read_jsonl, write_atomically

ROOT = Path(__file__).resolve().parents[1]


# -----------------------------------------------------------------------------
# Flags


@dataclass(frozen=True)
class Config:
    name: str = "dummy"              # results go to out/<name>
    # model
    num_steps: int = 400             # optimizer steps, up to 100 % of them
                                     # (a whole number; 1e6 is one)
    lr: float = 3e-3                 # peak rate: higher learns faster  # until it does not
    text: str = "a  # b: c"          # the default holds a "#"
    mark: str = '#'                  # and this one is one
    # a heading
    # of two lines
    long: str = ("one "
                 "two")              # over two lines
    pack: bool = True                # isolated: documents
    bare: int = 0
    kind: Literal["ddp", "fsdp"] = "ddp"        # one of two
    init: str | None = None          # a folder, or none
    limit: int | None = 5            # at most so many, or none


def test_defaults():
    assert parse_config(Config, []) == Config()
    assert parse_config(Config, ["--init=x", "--limit=7"]) == Config(init="x", limit=7)


@pytest.mark.parametrize("flag, field, value", [
    ("--num_steps=1e6", "num_steps", 1_000_000), ("--num_steps=1_000", "num_steps", 1000), ("--num_steps=-3", "num_steps", -3),
    ("--num_steps=2.0", "num_steps", 2), ("--num_steps=9007199254740993", "num_steps", 2**53 + 1),
    ("--lr=1e-5", "lr", 1e-5), ("--lr=1", "lr", 1.0), ("--lr=inf", "lr", math.inf),
    ("--pack=false", "pack", False), ("--pack=False", "pack", False), ("--pack=0", "pack", False), ("--pack=no", "pack", False),
    ("--pack=True", "pack", True), ("--pack", "pack", True), ("--kind=fsdp", "kind", "fsdp"),
    ("--text=", "text", ""), ("--text=a=b --c", "text", "a=b --c"), ("--init=latest", "init", "latest"),
])
def test_values(flag, field, value):
    found = getattr(parse_config(Config, [flag]), field)
    assert found == value and type(found) is type(value)
    if "=" in flag:
        assert parse_config(Config, flag.split("=", 1)) == parse_config(Config, [flag])


@pytest.mark.parametrize("argv, message", [
    (["--num_steps=1.5"], "argument --num_steps: expected a whole number, found '1.5'"),
    (["--num_steps=many"], "expected a whole number, found 'many'"),
    (["--num_steps=inf"], "expected a whole number, found 'inf'"),
    (["--lr=fast"], "argument --lr: expected a number, found 'fast'"),
    (["--lr=nan"], "expected a number, found 'nan'"),
    (["--pack=maybe"], "argument --pack: expected true or false, found 'maybe'"),
    (["--kind=dp"], "argument --kind: invalid choice: 'dp'"),
    (["--num_step=3"], "unknown argument '--num_step=3'; did you mean --num_steps?"),        # an abbreviation
    (["--num-steps=3"], "unknown argument '--num-steps=3'; did you mean --num_steps?"),
    (["--nmae", "x"], "unknown argument '--nmae'; did you mean --name?"),
    (["lr=3"], "unknown argument 'lr=3'; did you mean --lr?"),
    (["--quantum=3"], "unknown argument '--quantum=3'; see --help"),
    (["--lr=1", "--lr=1"], "--lr is given twice"),
    (["--pack", "--lr", "1", "--pack=false"], "--pack is given twice"),
    (["--name"], "argument --name: expected one argument"),
])
def test_mistakes_end_the_program(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Config, argv)
    assert e.value.code == 2 and message in capsys.readouterr().err


def test_comments_become_help(capsys, monkeypatch):
    comments = common.field_comments(Config)
    assert comments == {
        "name": "results go to out/<name>", "num_steps": "optimizer steps, up to 100 % of them (a whole number; 1e6 is one)",
        "lr": "peak rate: higher learns faster  # until it does not", "text": 'the default holds a "#"', "mark": "and this one is one",
        "long": "over two lines", "pack": "isolated: documents", "kind": "one of two", "init": "a folder, or none",
        "limit": "at most so many, or none"}
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as e:
        parse_config(Config, ["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and __doc__ in out
    for name, comment in comments.items():
        assert " ".join(f"{comment} (default: {getattr(Config, name)!r})".split()) in " ".join(out.split())


def test_badly_typed_defaults_are_bugs_of_the_script():
    def config(kind, **default):
        return dataclasses.make_dataclass("Bad", [("x", kind, *default.values())], frozen=True)
    for kind, default in ((float, 1), (bool, 3e-5), (int, True), (int, 1.5), (str, None), (str | None, 3), (Literal["a", "b"], "c")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError, match=r"Bad\.x: default .* is not"):
            patch.setattr(common, "field_comments", lambda config_class: {})            # made without source
            parse_config(config(kind, default=default), [])
    for kind, default in ((list, ()), (Path, Path(".")), (dict, None)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError, match=r"Bad\.x: expected bool, int, float, str or Literal"):
            patch.setattr(common, "field_comments", lambda config_class: {})
            parse_config(config(kind, default=default), [])

    @dataclass(frozen=True)
    class Bad:
        x: int
    with pytest.raises(TypeError, match=r"Bad\.x: default .* is not of type int"):
        parse_config(Bad, [])


# -----------------------------------------------------------------------------
# All scripts


def scripts():
    """-> {script: its Config} of every script in the repository root."""
    found = {}
    for path in sorted(ROOT.glob("*.py")):
        if "\nclass Config:" in path.read_text():
            found[path.stem] = importlib.import_module(path.stem).Config
    return found


def base_kind(config, name):
    kind = typing.get_type_hints(config)[name]
    return type(typing.get_args(kind)[0]) if typing.get_origin(kind) is Literal else kind


def disagreements(configs):
    """Where flags of one name differ between scripts: in type everywhere; in meaning (the comment up to its first ; : or bracket) and in
    relative order between train scripts."""
    problems = []
    for first, second in ((a, b) for a in configs for b in configs if a < b):
        one, two = configs[first], configs[second]
        fields = [[f.name for f in dataclasses.fields(c)] for c in (one, two)]
        shared = [n for n in fields[0] if n in fields[1]]
        problems += [f"--{n} is {base_kind(one, n)} in {first}, {base_kind(two, n)} in {second}" for n in shared
                     if base_kind(one, n) != base_kind(two, n)]
        if first.startswith("train_") and second.startswith("train_"):
            meanings = [{n: c.replace(":", ";").replace("(", ";").split(";")[0].strip() for n, c in common.field_comments(x).items()}
                        for x in (one, two)]
            problems += [f"--{n} means {meanings[0].get(n)!r} in {first}, {meanings[1].get(n)!r} in {second}" for n in shared
                         if n in PLUMBING and meanings[0].get(n) != meanings[1].get(n)]
            if shared != [n for n in fields[1] if n in shared]:
                problems.append(f"order of shared flags: {shared} in {first}, {[n for n in fields[1] if n in shared]} in {second}")
    return problems


# flags that are no algorithm's (a step is: of the optimizer here, a round of samples there); the comment of, say, --data or --lr may say what it is in that script
PLUMBING = {"name", "device_batch_size", "max_grad_norm", "parallel", "dtype", "recompute", "compile", "save_every", "resume",
            "overwrite", "dry_run"}


def prefixes_of_torchrun(names):
    """torchrun reads its own options first, abbreviated too, and refuses what may be two of them, even behind the script's name."""
    options = [o.removeprefix("--").replace("-", "_") for action in get_args_parser()._actions for o in action.option_strings]
    return [n for n in names if any(o.startswith(n) and o != n for o in options)]


def test_there_are_scripts():
    assert {"train_sft", "eval", "chat"} <= scripts().keys()


@pytest.mark.parametrize("script", sorted(p.stem for p in ROOT.glob("*.py") if "\nclass Config:" in p.read_text()))
def test_config_of(script):
    config = scripts()[script]
    assert parse_config(config, []) == config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), dataclasses.fields(config)[0].name, "changed")
    names = [f.name for f in dataclasses.fields(config)]
    assert [n for n in names if n not in common.field_comments(config)] == []            # every flag says what it is
    assert prefixes_of_torchrun(names) == []
    for name in names:
        assert get_args_parser().parse_args(["script.py", f"--{name}=1"]).training_script_args == [f"--{name}=1"]
    if script.startswith("train_"):
        assert {"name", "seed", "num_steps", "save_every", "resume"} <= set(names) and config().name == "dummy"


def test_scripts_agree():
    assert disagreements(scripts()) == []


def test_auto_is_minus_1_where_the_flag_says_so():
    config = scripts()["train_rl"]
    assert parse_config(config, ["--device_batch_size=auto", "--lr=auto"]).device_batch_size == -1
    with pytest.raises(SystemExit):
        parse_config(config, ["--num_prompts=auto"])


def test_the_rules_above_can_fail(capsys):
    refused = ["run", "log", "start", "max", "master", "n"]
    assert prefixes_of_torchrun([*refused, "name", "data", "role"]) == refused
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["script.py", "--run=x"])

    @dataclass(frozen=True)
    class One:
        name: str = "dummy"          # results go to out/<name>; more
        lr: float = 1e-3             # a rate
        resume: str = ""             # continue (exactly)

    @dataclass(frozen=True)
    class Two:
        name: str = "dummy"          # results go to out/<name>: less
        resume: bool = False         # go on
        lr: float = 1e-3             # another rate
    assert [p.split()[0] for p in disagreements({"train_a": One, "train_b": Two})] == ["--resume", "--resume", "order"]
    assert disagreements({"train_a": One, "train_b": One, "eval": One}) == []


# -----------------------------------------------------------------------------
# Schedules, keys, sums


def test_lr_scale_by_hand():
    # 4 steps of warm-up: 1/5 2/5 3/5 4/5, then 1; the last 4 of 10 steps: 1 3/4 2/4 1/4
    assert [lr_scale(s, 10, 4, 0.4) for s in range(10)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [lr_scale(s, 4, 0, 1.0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert [lr_scale(s, 4, 0, 0.0) for s in range(4)] == [1.0] * 4
    assert lr_scale(10, 10, 0, 0.4) == 0.0
    assert all(0 < lr_scale(s, 5, 100, 0.5) <= 0.06 for s in range(5))     # warm-up longer than the run


def test_random_key_is_stable():
    # absolute numbers: a change here changes every run that anyone would want to repeat
    assert random_key(0) == 5621864261735219286
    assert random_key(1, "weights", 3) == 4021576303339001957
    keys = {random_key(seed, step, rank) for seed in range(5) for step in range(20) for rank in range(4)} | {random_key(1), random_key("1")}
    assert len(keys) == 402 and all(0 <= k < 2**63 for k in keys)
    assert random_key(12, 3) != random_key(1, 23)
    torch.Generator().manual_seed(max(keys))                               # fits


def test_one_process(monkeypatch):
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    rank, local_rank, world_size, device = common.setup_distributed()
    assert (rank, local_rank, world_size, device.type) == (0, 0, 1, "cuda" if torch.cuda.is_available() else "cpu")
    assert common.all_reduce_sum(3) == 3
    x = torch.ones(2, requires_grad=True)
    y = common.all_reduce_sum(x)
    y += 1
    assert x.tolist() == [1.0, 1.0] and not y.requires_grad
    assert common.peak_flops(torch.device("cpu")) == 0.0


def test_check_finite():
    common.check_finite("train/loss", 3.0)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(FloatingPointError, match="train/loss is .*--lr"):
            common.check_finite("train/loss", bad)


# -----------------------------------------------------------------------------
# Files and progress


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "값")
    assert path.read_bytes() == "값".encode()
    write_atomically(str(path), b"\xff\x00")
    assert path.read_bytes() == b"\xff\x00" and [p.name for p in tmp_path.iterdir()] == ["a.json"]

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_bytes() == b"\xff\x00"


def test_read_jsonl(tmp_path):
    path = tmp_path / "m.jsonl"
    assert read_jsonl(path) == []
    path.write_text("")
    assert read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"step": 2, "text": "a\u2028b\x85c"}\n{"step": 3, "tr')                # cut short by a crash
    assert read_jsonl(path) == [{"step": 1}, {"step": 2, "text": "a\u2028b\x85c"}]
    path.write_text('{"step": 1}\n{"step": 2, "tr\n{"step": 3}\n')
    with pytest.raises(ValueError, match="m.jsonl:2: not JSON"):
        read_jsonl(path)


def test_progress(capsys, monkeypatch):
    assert list(progress(range(3), desc="quick")) == [0, 1, 2]
    assert list(progress(iter("ab"))) == ["a", "b"]
    assert capsys.readouterr().err == ""                                   # short work needs no line
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(common, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(progress(iter("abcd"), total=4, desc="slow")) == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[0].startswith("slow [######                  ] 1/4 0:40 2:00 left") and "4/4" in lines[-1]
    monkeypatch.setenv("RANK", "1")
    assert list(progress(range(3), desc="slow")) == [0, 1, 2] and capsys.readouterr().err == ""
    assert [common.format_seconds(s) for s in (5, 65, 3600 + 61)] == ["0:05", "1:05", "1:01:01"]


def test_code_patch_gives_the_code_back(tmp_path, monkeypatch):
    repo, copy = tmp_path / "repo", tmp_path / "copy"
    repo.mkdir()

    def git(*args, cwd=repo, **options):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=cwd, check=True, capture_output=True, **options)
    git("init", "-q")
    monkeypatch.setattr(common, "__file__", str(repo / "common.py"))
    assert common.code_patch() == "not a git checkout (or one without a commit)\n"
    (repo / "common.py").write_text("a = 1\n")
    git("add", "."), git("commit", "-qm", "first")
    git("clone", "-q", repo, copy, cwd=tmp_path)
    (repo / "common.py").write_text("a = 2\n")
    (repo / "train_mine.py").write_text("b = 3\n")
    (repo / "weights.bin").write_bytes(b"\0" * 1000)
    patch = common.code_patch()
    assert patch.startswith("commit ") and "  weights.bin\n" in patch and len(patch) < 2000
    git("apply", "-", cwd=copy, input=patch.encode())
    assert (copy / "common.py").read_text() == "a = 2\n" and (copy / "train_mine.py").read_text() == "b = 3\n"
    assert b"train_mine" in git("status", "--short").stdout                # and nothing was added to the index


# -----------------------------------------------------------------------------
# The log


@dataclass(frozen=True)
class RunConfig:
    name: str = "dummy"
    lr: float = 0.1
    resume: str = ""


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def write_steps(logger, steps):
    for step in steps:
        logger.log(step, **{"train/loss": 1 / (step + 3), "train/tokens": 7 * step})


def test_logger_writes_what_a_run_leaves(out, capsys):
    logger = Logger(RunConfig("run"), rank=0)
    logger.log(1, **{"train/loss": math.nan, "train/grad_norm": -math.inf, "train/tokens": 3, "note": "값"})
    logger.print("a", 1)
    assert read_jsonl(out / "run/metrics.jsonl")[0]["step"] == 1           # flushed: a crash does not lose it
    logger.close(name="run", loss=math.nan)
    lines = (out / "run/metrics.jsonl").read_text().splitlines()

    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [strict(line) for line in lines] == [{"step": 1, "train/loss": "nan", "train/grad_norm": "-inf", "train/tokens": 3, "note": "값"}]
    assert json.loads((out / "run/config.json").read_text()) == dataclasses.asdict(RunConfig("run"))
    assert (out / "run/code.patch").read_text().startswith(("commit ", "not a git checkout"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "a 1" and strict(printed[-1]) == {"name": "run", "loss": "nan"}


def test_other_ranks_write_nothing(out, capsys):
    logger = Logger(RunConfig("run"), rank=1)
    logger.log(1, **{"train/loss": 1.0}), logger.print("hello"), logger.close(name="run")
    assert not out.exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("lost", ["", '{"step": 5, "train/lo', '{"step": 5}'])
def test_resumed_metrics_equal_those_of_a_run_never_stopped(lost, out, capsys):
    logger = Logger(RunConfig("whole"), rank=0)
    write_steps(logger, range(1, 8)), logger.close()
    logger = Logger(RunConfig("cut"), rank=0)
    write_steps(logger, range(1, 5))                                       # killed at step 4 or 5; the last checkpoint is of step 3
    with open(out / "cut/metrics.jsonl", "a") as f:
        f.write(lost)
    capsys.readouterr()
    logger = Logger(RunConfig("cut", lr=0.2, resume="latest"), rank=0, resume_step=3)
    assert capsys.readouterr().out == "resuming with --lr=0.2 (was 0.1)\n"
    write_steps(logger, range(4, 8)), logger.close()
    assert (out / "cut/metrics.jsonl").read_bytes() == (out / "whole/metrics.jsonl").read_bytes()
    assert json.loads((out / "cut/config.json").read_text())["lr"] == 0.2


def test_a_fresh_run_starts_an_empty_log_and_resume_at_zero_does_not_keep_it(out):
    logger = Logger(RunConfig("run"), rank=0)
    write_steps(logger, range(3)), logger.close()
    Logger(RunConfig("run"), rank=0, resume_step=0).close()
    assert [r["step"] for r in read_jsonl(out / "run/metrics.jsonl")] == [0]
    Logger(RunConfig("run"), rank=0).close()
    assert read_jsonl(out / "run/metrics.jsonl") == []


def fake_wandb(api_key=None):
    """-> (module, list of what was called). wandb itself would ask, or call home."""
    calls = []
    run = types.SimpleNamespace(log=lambda metrics, step: calls.append(("log", step, metrics)), finish=lambda: calls.append(("finish",)),
                                summary=types.SimpleNamespace(update=lambda values: calls.append(("summary", values))))
    module = types.ModuleType("wandb")
    module.api, module.Settings = types.SimpleNamespace(api_key=api_key), lambda **settings: settings
    module.init = lambda **options: calls.append(("init", options)) or run
    return module, calls


@pytest.fixture
def wandb_allowed(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def test_wandb_sees_the_same_keys(out, monkeypatch, wandb_allowed):
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    logger = Logger(RunConfig("run"), rank=0)
    logger.log(2, **{"train/loss": 0.5}), logger.close(best=0.5)
    options = calls[0][1]
    assert (options["project"], options["name"], options["mode"], options["resume"]) == ("temper", "run", "offline", None)
    assert options["config"] == dataclasses.asdict(RunConfig("run")) and options["dir"] == "out/run"
    assert calls[1:] == [("log", 2, {"train/loss": 0.5}), ("summary", {"best": 0.5}), ("finish",)]

    # the same folder is the same wandb run; a login makes it online, WANDB_MODE decides over both
    module, again = fake_wandb(api_key="key")
    monkeypatch.setitem(sys.modules, "wandb", module)
    Logger(RunConfig("run"), rank=0, resume_step=2).close()
    assert (again[0][1]["id"], again[0][1]["mode"], again[0][1]["resume"]) == (options["id"], "online", "allow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    Logger(RunConfig("other"), rank=0).close()
    assert again[-3][1]["mode"] == "offline" and again[-3][1]["id"] != options["id"]


def test_wandb_is_not_opened_for_dummy_nor_when_disabled_nor_by_other_ranks(out, monkeypatch, wandb_allowed):
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    Logger(RunConfig("dummy"), rank=0).close()
    Logger(RunConfig("run"), rank=1).close()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    Logger(RunConfig("run"), rank=0).close()
    assert calls == []


def test_without_wandb_metrics_go_to_the_file(out, monkeypatch, wandb_allowed, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)                        # import raises ImportError
    logger = Logger(RunConfig("run"), rank=0)
    write_steps(logger, range(2)), logger.close()
    assert "wandb is not installed: metrics go to metrics.jsonl only" in capsys.readouterr().out
    assert len(read_jsonl(out / "run/metrics.jsonl")) == 2


RANK = """
import os, sys, torch
import common
from model import Transformer, config_for_size
rank, local_rank, world_size, device = common.setup_distributed()
def train():
    model = Transformer(config_for_size("nano", 259)).init_weights(0)
    wrapped = WRAP
    wrapped(torch.zeros(1, 8, dtype=torch.long)).float().sum().backward()
def threads():
    return [name for t in os.listdir("/proc/self/task") if "gloo" in (name := open(f"/proc/self/task/{t}/comm").read().strip())]
train()
assert threads()
common.close_distributed()
assert not threads(), threads()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("wrap", ["torch.nn.parallel.DistributedDataParallel(model)",
                                  "__import__('torch.distributed.fsdp', fromlist=['x']).fully_shard(model)"])
def test_closing_the_process_group_ends_its_threads(tmp_path, wrap):
    """A thread of gloo that outlives the interpreter may abort a rank whose work is done."""
    (tmp_path / "rank.py").write_text(RANK.replace("WRAP", wrap))
    env = os.environ | {"PYTHONPATH": str(Path(common.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                           "--rdzv_endpoint=localhost:0", tmp_path / "rank.py"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
