"""What every script needs and no paper mentions: flags, process group, random keys, schedules, sums over ranks, and the log.

Nothing here receives a script's config as a whole, calls back into a script, or owns a loop.
"""
import argparse
import ast
import atexit
import dataclasses
import datetime
import difflib
import gc
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import subprocess
import sys
import textwrap
import time
import tokenize
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# Flags: one frozen dataclass per script, one flag per field, the field's trailing comment is its help


def to_bool(text):
    """argparse would read bool("False") as True."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")


def to_int(text):
    """Takes 1_000 and 1e6, refuses 1.5."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number != int(number):
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(number)


def to_float(text):
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return number


def or_auto(parse):
    def number(text):
        return parse("-1" if text == "auto" else text)
    number.__name__ = parse.__name__
    return number


PARSERS = {bool: to_bool, int: to_int, float: to_float, str: str}


def field_comments(config_class):
    """{field: trailing comment} of a dataclass, read from its source.

    A comment alone on its line continues the one above where it starts in the same column; elsewhere it is a heading between fields.
    """
    source = textwrap.dedent(inspect.getsource(config_class))
    fields = {node.end_lineno: node.target.id for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)}
    comments, name, column = {}, None, None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):      # tokens, since a "#" may also stand inside a string
        if token.type != tokenize.COMMENT:
            continue
        text = token.string.removeprefix("#").strip()
        if token.start[0] in fields:
            name, column = fields[token.start[0]], token.start[1]
            comments[name] = text
        elif name and token.start[1] == column:
            comments[name] += " " + text
        else:
            name = None
    return comments


def parse_config(config_class, argv=None):
    """Builds the frozen dataclass from `--flag=value` (or `--flag value`; a bare bool flag means true).

    Unknown flags, abbreviations, repeated flags and badly typed values end the program with exit code 2 and, where one is near, a
    "did you mean". A default of the wrong type raises TypeError: that is a bug of the script, not of its user.
    """
    hints = typing.get_type_hints(config_class)
    comments = field_comments(config_class)
    doc = inspect.getdoc(sys.modules[config_class.__module__]) or ""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    seen = set()

    class Once(argparse.Action):                               # a flag given twice is a mistake in somebody's shell script
        def __call__(self, parser, namespace, value, option_string=None):
            if self.dest in seen:
                parser.error(f"--{self.dest} is given twice")
            seen.add(self.dest)
            setattr(namespace, self.dest, value)

    for field in dataclasses.fields(config_class):
        kind, choices, optional = hints[field.name], None, False
        if typing.get_origin(kind) in (typing.Union, types.UnionType):          # str | None
            kind, = [k for k in typing.get_args(kind) if k is not type(None)]
            optional = True
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
            kind = type(choices[0])
        default = field.default
        if kind not in PARSERS:
            raise TypeError(f"{config_class.__name__}.{field.name}: expected bool, int, float, str or Literal, or that | None, found {kind}")
        if default is dataclasses.MISSING or not (type(default) is kind or (optional and default is None)):
            raise TypeError(f"{config_class.__name__}.{field.name}: default {default!r} is not of type {kind.__name__}")
        if choices and default not in choices:
            raise TypeError(f"{config_class.__name__}.{field.name}: default {default!r} is not one of {choices}")
        help_text = f"{comments.get(field.name, '')} (default: {default!r})".replace("%", "%%")
        bare = dict(nargs="?", const=True) if kind is bool else {}
        parse = PARSERS[kind]
        if kind in (int, float) and "auto:" in comments.get(field.name, ""):        # the script chooses where the flag is auto, or -1
            parse = or_auto(parse)
        parser.add_argument(f"--{field.name}", type=parse, choices=choices, help=help_text, action=Once,
                            metavar=None if choices else kind.__name__, **bare)
    namespace, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag.lstrip("-"), [f.name for f in dataclasses.fields(config_class)], n=1, cutoff=0.5)
        parser.error(f"unknown argument {unknown[0]!r}" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
    return config_class(**vars(namespace))


# -----------------------------------------------------------------------------
# Processes


def setup_distributed():
    """-> (rank, local_rank, world_size, device). Reads torchrun's environment; without it, one process.

    CUDA gives NCCL and one device per rank, else gloo on the CPU, so that two-rank tests run anywhere.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        importlib.import_module("torch._dynamo")                    # DDP would; imported after the group it keeps it, and with it threads, for ever
        # long, since ranks wait while one evaluates or samples more than the others
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6))
        atexit.register(close_distributed)
    return rank, local_rank, world_size, device


def close_distributed():
    """Ends the process group while the interpreter still lives.

    Left to the end of the process, gloo's worker threads ask for the GIL of an interpreter that is gone, and abort the rank
    after its work is done and saved (9 of 60 two-rank runs of a script that ended on an all_reduce). They end with the last
    reference to the group.
    """
    gc.collect()                                # a DDP module holds the group in a reference cycle
    if "torch.distributed.tensor" in sys.modules:                                 # DTensor's caches hold the mesh of FSDP2, and with it the group
        from torch.distributed.tensor import debug
        getattr(debug, "_clear_sharding_prop_cache", lambda: None)()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(value, device=None):
    """Sum over ranks of a number or a tensor, in float64 when it is a number; itself when there is one process."""
    if torch.is_tensor(value):
        value = value.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(value)
        return value
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return type(value)(total.item())


def all_gather_list(values):
    """-> the lists of all ranks in one, by rank. values: a short list of plain values; every rank calls."""
    if not dist.is_initialized():
        return list(values)
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, list(values))
    return [value for part in lists for value in part]


def random_key(*key):
    """63 random bits that are a pure function of the key (ints and strings): randomness never depends on what ran before."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def lr_scale(step, num_steps, warmup_steps, decay_share):
    """The trapezoid: linear from 0 over `warmup_steps`, flat at 1, linear to 0 over the last `decay_share` of the run.

    `step` counts from 0. decay_share 1.0 is linear decay from the start (the warm-up is a cap on top), 0.0 is constant.
    """
    up = (step + 1) / (warmup_steps + 1)
    down = (num_steps - step) / (decay_share * num_steps) if decay_share > 0 else 1.0
    return max(0.0, min(1.0, up, down))


# -----------------------------------------------------------------------------
# What a run leaves behind


def progress(iterable, total=None, desc=""):
    """Yields from `iterable` and draws a bar on stderr, at most four times a second; plain text where stderr is no terminal."""
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    start = shown = time.monotonic()
    terminal, count = sys.stderr.isatty(), 0
    if int(os.environ.get("RANK", 0)) != 0:
        yield from iterable
        return

    def draw(end):
        seconds = time.monotonic() - start
        if total:
            bar = "#" * (24 * count // total)
            left = f" {format_seconds(seconds / count * (total - count))} left" if count < total and count else ""
            text = f"{desc} [{bar:<24}] {count}/{total} {format_seconds(seconds)}{left}"
        else:
            text = f"{desc} {count} {format_seconds(seconds)}"
        print("\r\x1b[K" + text if terminal else text, end=end, file=sys.stderr, flush=True)

    for item in iterable:
        yield item
        count += 1
        now = time.monotonic()
        if now - shown > (0.25 if terminal else 15):
            shown = now
            draw("" if terminal else "\n")
    if time.monotonic() - start > 1:                            # short work needs no line of its own
        draw("\n")
    elif terminal and shown != start:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def format_seconds(seconds):
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}" if seconds >= 3600 else f"{seconds // 60}:{seconds % 60:02d}"


def write_atomically(path, data):
    """Write under a temporary name, flush to the disk, rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def code_patch():
    """The commit and everything that differs from it, scripts not yet added included, so that the code that ran can be had back."""
    def git(*args, exit_codes=(0,)):
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True)
        if done.returncode not in exit_codes:
            raise OSError(done.stderr)
        return done.stdout.decode(errors="replace")
    try:
        new_files = git("ls-files", "-z", "--others", "--exclude-standard").split("\0")[:-1]
        patches = [git("diff", "HEAD")]
        for name in [n for n in new_files if n.endswith((".py", ".sh"))][:100]:
            patches.append(git("diff", "--no-index", "--", os.devnull, name, exit_codes=(0, 1)))        # 1: there are differences
        return "\n".join(["commit " + git("rev-parse", "HEAD").strip(), "untracked:", *("  " + n for n in new_files), "", *patches])
    except OSError:
        return "not a git checkout (or one without a commit)\n"


class Logger:
    """config.json, code.patch and metrics.jsonl in out/<name>/, and wandb as a view of the same keys.

    metrics.jsonl is the truth: one JSON object per line, keys `group/name`, with `step`. After a resume at step s the lines past s are cut
    off, so that the file equals that of a run that was never stopped. Only rank 0 writes. name == "dummy" never opens wandb.
    """

    def __init__(self, cfg, rank, resume_step=None):
        self.out_dir = Path("out") / cfg.name
        self.rank, self.wandb = rank, None
        if rank != 0:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        config = dataclasses.asdict(cfg)
        metrics_path, config_path = self.out_dir / "metrics.jsonl", self.out_dir / "config.json"
        self.rollouts_path = self.out_dir / "rollouts.jsonl"
        if resume_step is None:
            write_atomically(metrics_path, "")
            self.rollouts_path.unlink(missing_ok=True)
        else:
            print_config_differences(config_path, config)
            cut_after(metrics_path, resume_step)
            cut_after(self.rollouts_path, resume_step)
        write_atomically(config_path, json.dumps(config, indent=2) + "\n")
        write_atomically(self.out_dir / "code.patch", code_patch())
        self.metrics = open(metrics_path, "a")
        if cfg.name.partition("/")[0] != "dummy":
            self.wandb = open_wandb(cfg.name, config, self.out_dir, resume_step is not None)

    def log(self, step, **metrics):
        """metrics: {"train/loss": float, ...}; a NaN or infinity is written as a string, since JSON has neither."""
        if self.rank != 0:
            return
        self.metrics.write(json.dumps({"step": step, **finite_or_text(metrics)}) + "\n")
        self.metrics.flush()
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def rollouts(self, step, lines):
        """Samples to look at: lines (dicts) with "step" go to rollouts.jsonl (python chat.py --rollouts=out/<name>), and to wandb as a table."""
        if self.rank != 0 or not lines:
            return
        with open(self.rollouts_path, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(line) + "\n" for line in lines)
        if self.wandb:
            import wandb
            columns = list(lines[0])
            rows = [[line.get(c) if isinstance(line.get(c), (int, float)) else str(line.get(c)) for c in columns] for line in lines]
            self.wandb.log({"rollouts": wandb.Table(columns=columns, data=rows)}, step=step)

    def picture(self, step, name, path):
        """An image file, shown in wandb too."""
        if self.rank == 0 and self.wandb:
            import wandb
            self.wandb.log({name: wandb.Image(str(path))}, step=step)

    def print(self, *args):
        if self.rank == 0:
            print(*args, flush=True)

    def close(self, **summary):
        """The last line of a script's standard output is one JSON object."""
        if self.rank != 0:
            return
        self.metrics.close()
        if self.wandb:
            self.wandb.summary.update(summary)
            self.wandb.finish()
        print(json.dumps(finite_or_text(summary)), flush=True)


def finite_or_text(values):
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def cut_after(path, step):
    """Leaves the lines of a JSONL file up to `step`, so that a resumed run's file equals that of a run that was never stopped."""
    if path.exists():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in read_jsonl(path) if line["step"] <= step))


def read_jsonl(path):
    """Lines of a metrics file; a last line that a crash cut short is left out."""
    lines = Path(path).read_text().split("\n") if Path(path).exists() else []      # not splitlines: strings may hold other line ends
    lines = lines[:-1] if lines and not lines[-1] else lines
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines):
                raise ValueError(f"{path}:{number}: not JSON: {line[:80]!r}") from None
    return records


def print_config_differences(path, config):
    if path.exists():
        old = json.loads(path.read_text())
        for key in sorted(old.keys() | config.keys()):
            if old.get(key) != config.get(key) and key != "resume":
                print(f"resuming with --{key}={config.get(key)} (was {old.get(key)})", flush=True)


def open_wandb(name, config, out_dir, resumed):
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        print("wandb is not installed: metrics go to metrics.jsonl only", flush=True)
        return None
    logged_in = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    run_id = hashlib.blake2b(str(out_dir.resolve()).encode(), digest_size=8).hexdigest()      # one folder, one wandb run
    return wandb.init(project="temper", name=name, config=config, dir=str(out_dir), id=run_id, resume="allow" if resumed else None,
                      mode=os.environ.get("WANDB_MODE", "online" if logged_in else "offline"), settings=wandb.Settings(silent=True))


def check_finite(name, value):
    """A loss or norm that is not finite stops the run: every later step would train on garbage."""
    if not math.isfinite(value):
        raise FloatingPointError(f"{name} is {value}: the run stops before the weights are touched; lower --lr, or look at the last batch")


def peak_flops(device):
    """Dense bf16 FLOP/s of the device by its published figure, for MFU; 0 where unknown, and no MFU is claimed."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in (("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12), ("4090", 165e12))
                 if part in name), 0.0)
