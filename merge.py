"""Merge checkpoints that were trained from the same start: average, task arithmetic, TIES, RAM, RAM+.

    python merge.py --base=out/sft --models=out/rl_logic,out/rl_chat --how=ties --out=out/merged

With theta_0 the common start and tau_i = theta_i - theta_0 what run i changed (a task vector), tensor by tensor:

    linear     theta_0 + sum_i w_i tau_i with sum w = 1, so sum_i w_i theta_i: the plain average and its weighted forms
    task       theta_0 + lam sum_i tau_i                                                          (task arithmetic, arXiv 2212.04089)
    ties       keep the top `density` of |tau_i|; s = sign of the kept sum; lam times the mean of the kept entries of sign s   (2306.01708)
    ram        an entry that one run changed takes its change, one that several changed the mean of theirs                     (2601.13572)
    ram_plus   ram, what only run i changed times 1 + rescale clip(shared_i / unique_i, 0, alpha)

The result is a checkpoint folder (fp32) for --init of any script, with merge.json: what was merged, how, and how much the runs have in
common. A LoRA run is merged like any other: its model.safetensors holds W + scale BA. Averages of A and of B are not the average of BA.

Differences are taken in float64, where those of fp32 weights are exact, and rounded once: weights 1,0 give back the first model to the bit,
identical models give that model, and the order of models does not matter.
"""
import itertools
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
from common import parse_config, progress, write_atomically
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    base: str = ""                   # the checkpoint that all models were trained from: out/<name>, a step folder, or Hugging Face's
    models: str = ""                 # checkpoints to merge, comma-separated
    how: Literal["ties", "linear", "task", "ram", "ram_plus"] = "ties"      # the method; see the functions of these names
    out: str = ""                    # folder of the merged checkpoint
    weights: str = ""                # linear: one number per model, their sum 1, e.g. .7,.3; empty: equal
    lam: float = 1.0                 # task, ties: scale of the merged change; below 1 stays nearer to the base. Sweep .3 to 1 for task
    density: float = 0.2             # ties: share of each tensor's changes that is kept, the largest
    rescale: float = 0.1             # ram_plus: strength of the rescaling
    alpha: float = 0.2               # ram_plus: bound on shared / unique
    threshold: float = 1e-5          # ram, ram_plus and the printed shares: a weight is active if it changed by more
    any_base: bool = False           # merge although a run recorded that it started from other weights (say, from a successor of --base)
    overwrite: bool = False          # replace an earlier result of merge.py in --out
    dry_run: bool = False            # print what would be merged and how much the runs have in common; write nothing


# -----------------------------------------------------------------------------
# The methods. base: a tensor; models: those of the same name in each model; -> the merged tensor in the base's dtype


def differences(base, models):
    """-> (M, *shape) float64: what each of the M models changed."""
    return torch.stack([m.double() for m in models]) - base.double()


def linear(base, models, weights=None):
    """sum_i w_i theta_i. weights: M numbers with sum 1; default 1/M each."""
    weights = [1 / len(models)] * len(models) if weights is None else weights
    if len(weights) != len(models) or not abs(sum(weights) - 1) < 1e-9:
        raise ValueError(f"--weights: expected {len(models)} numbers with sum 1, one per model, found {', '.join(map(str, weights))}")
    return sum(w * m.double() for w, m in zip(weights, models)).to(base.dtype)


def task(base, models, lam=1.0):
    """theta_0 + lam sum_i tau_i."""
    return (base.double() + lam * differences(base, models).sum(0)).to(base.dtype)


def largest(tau, density):
    """-> mask of the top `density` of |tau|, at least one entry; of equal magnitudes those of lower (row-major) index."""
    size = tau.abs().flatten()
    k = max(1, round(density * len(size)))
    limit = size.kthvalue(len(size) - k + 1).values
    keep = size > limit
    keep[(size == limit).nonzero()[:k - int(keep.sum()), 0]] = True
    return keep.view(tau.shape)


def ties(base, models, density=0.2, lam=1.0):
    """TIES: trim, elect signs, mean of those that agree. An entry whose kept changes cancel stays at the base.

    As in mergekit the top is taken per tensor. The paper's own code takes it over the whole model at once, keeps all of equal magnitude,
    and gives entries that cancel the sign of the whole sum.
    """
    if not 0 < density <= 1:
        raise ValueError(f"--density={density}: expected a share above 0, at most 1")
    kept = torch.stack([tau * largest(tau, density) for tau in differences(base, models)])
    sign = kept.sum(0).sign()
    agree = kept.sign() == sign                                             # where the sum is 0 these are zeros
    mean = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    return (base.double() + lam * mean).to(base.dtype)


def ram(base, models, threshold=1e-5):
    """RAM: ram_plus without rescaling."""
    return ram_plus(base, models, rescale=0.0, threshold=threshold)


def ram_plus(base, models, rescale=0.1, alpha=0.2, threshold=1e-5):
    """RAM+: where one model is active (|tau| > threshold) its change times 1 + rescale clip(shared_i / unique_i, 0, alpha), where several are
    the mean of theirs, elsewhere the base.

    shared_i and unique_i: how many active entries of model i in this tensor are active in another model too, and how many are not. So does
    mergekit's ramplus_tl; the authors' code counts over the whole model.
    """
    tau = differences(base, models)
    active = tau.abs() > threshold
    count = active.sum(0)
    unique, shared = (active & (count == 1)).flatten(1).sum(1), (active & (count > 1)).flatten(1).sum(1)          # (M,)
    scale = 1 + rescale * (shared.double() / unique.clamp(min=1)).clamp(0, alpha)         # without unique entries nothing is scaled
    scale = torch.where(count == 1, scale.view(-1, *[1] * base.ndim), 1.0)
    return (base.double() + (tau * active * scale).sum(0) / count.clamp(min=1)).to(base.dtype)


METHODS = {"linear": (linear, ("weights",)), "task": (task, ("lam",)), "ties": (ties, ("density", "lam")), "ram": (ram, ("threshold",)),
           "ram_plus": (ram_plus, ("rescale", "alpha", "threshold"))}


def merge(base, models, how="ties", **settings):
    """The same for whole models. base: {name: tensor}; models: a list of such; settings: those of the method."""
    for i, model in enumerate(models, 1):
        check_shapes({n: t.shape for n, t in base.items()}, {n: t.shape for n, t in model.items()}, f"model {i}")
    return {name: METHODS[how][0](tensor, [m[name] for m in models], **settings) for name, tensor in base.items()}


# -----------------------------------------------------------------------------
# What the runs have in common


class Overlap:
    """Sums over tensors: how large, how active and how parallel the changes are."""

    def __init__(self, num_models, threshold):
        self.threshold, self.num, self.base_square = threshold, 0, 0.0
        self.products = torch.zeros(num_models + 1, num_models + 1, dtype=torch.float64)      # the last row and column are the merge's
        self.active = torch.zeros(num_models, num_models, dtype=torch.int64)                  # active in both
        self.agree = torch.zeros(num_models, num_models, dtype=torch.int64)                   # and of one sign

    def add(self, base, tau, merged):
        """base: the tensor; tau (M, *shape) and merged (*shape) float64: the changes of the models and of the merge."""
        rows = torch.cat([tau, merged[None]]).flatten(1)
        self.products += rows @ rows.T
        self.num, self.base_square = self.num + base.numel(), self.base_square + float(base.double().square().sum())
        signs = torch.where(tau.abs() > self.threshold, tau.sign(), 0.0).flatten(1)
        for i, j in itertools.combinations_with_replacement(range(len(tau)), 2):
            both = signs[i] * signs[j]
            self.active[i, j] += both.count_nonzero()
            self.agree[i, j] += (both > 0).sum()

    def cosine(self, i, j):
        norms = math.sqrt(self.products[i, i] * self.products[j, j])
        return float(self.products[i, j]) / norms if norms else 0.0

    def of_model(self, i):
        return dict(active=int(self.active[i, i]) / self.num, norm=math.sqrt(self.products[i, i]), cosine_with_merge=self.cosine(i, -1))

    def of_pair(self, i, j):
        """overlap: of the entries active in either, the share active in both. sign_agreement: of those, the share of one sign."""
        both, either = int(self.active[i, j]), int(self.active[i, i] + self.active[j, j] - self.active[i, j])
        return dict(models=[i + 1, j + 1], cosine=self.cosine(i, j), overlap=both / max(1, either),
                    sign_agreement=int(self.agree[i, j]) / max(1, both))


# -----------------------------------------------------------------------------
# Checkpoints


def check_shapes(expected, found, where):
    """{name: shape} twice -> ValueError that names the first differences."""
    for what, names in (("missing", expected.keys() - found.keys()), ("not in the base", found.keys() - expected.keys())):
        if names:
            raise ValueError(f"{where}: {len(names)} tensors are {what}, among them {', '.join(sorted(names)[:3])}")
    for name, shape in expected.items():
        if list(found[name]) != list(shape):
            raise ValueError(f"{where}: {name} has shape {list(found[name])}, that of the base {list(shape)}")


def open_model(folder, base_folder, base, base_tokenizer):
    """-> function from a name to its tensor, and the dtypes in the files. ValueError where the folder is not of the base's kind."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no config.json there; expected a checkpoint folder, of ours (out/<name>/step_...) or of Hugging Face")
    checkpoint.verify(folder)
    config = checkpoint.config_from_hf(checkpoint.read_json(folder / "config.json"), folder / "config.json")
    ours, theirs = asdict(base.config), asdict(config)
    differ = [f"{key} {theirs[key]} (base: {ours[key]})" for key in ours if theirs[key] != ours[key]]
    if differ:
        raise ValueError(f"{folder} is another model than {base_folder}: {', '.join(differ)}")
    if Tokenizer.from_file(folder).fingerprint() != base_tokenizer.fingerprint():
        raise ValueError(f"{folder}: its tokenizer is not that of {base_folder}; the rows of their embeddings mean different tokens")
    files = {n: f for n, f in checkpoint.weight_files(folder).items() if not n.endswith("rotary_emb.inv_freq")}
    if base.config.tie_embeddings:
        files.pop("lm_head.weight", None)                       # some exporters write the tied table twice
    handles = {f: checkpoint.open_safetensors(f) for f in set(files.values())}
    slices = {n: handles[f].get_slice(n) for n, f in files.items()}
    check_shapes({n: p.shape for n, p in base.named_parameters()}, {n: s.get_shape() for n, s in slices.items()}, folder)
    return (lambda name: finite(handles[files[name]].get_tensor(name), name, folder)), {s.get_dtype() for s in slices.values()}


def finite(tensor, name, where):
    if not tensor.isfinite().all():
        raise ValueError(f"{where}: {name} holds NaN or infinity")
    return tensor


def recorded_start(folder):
    """-> (hash of the weights that the run or merge in this folder started from, its --init); None where it left no record."""
    if (folder / "merge.json").exists():
        return checkpoint.read_json(folder / "merge.json").get("base", {}).get("hash"), None
    if not (folder / "train.json").exists():
        return None, None
    record = checkpoint.read_record(folder)
    return record["state"].get("init_hash") or record["config"].get("init_hash"), record["config"].get("init")


def check_start(folder, base_folder, base_hash, any_base):
    """ValueError if the run says that it started from other weights; a printed note where it does not say."""
    start, init = recorded_start(folder)
    if start is None:
        said = "" if init is None else f" (its --init was {init})" if init else " (it had no --init: random weights)"
        print(f"note: {folder} does not record the weights it started from{said}: --base cannot be checked")
    elif start != base_hash and not any_base:
        raise ValueError(f"{folder} started from other weights ({f'--init={init}, ' if init else ''}hash {start}) than those of "
                         f"{base_folder} (hash {base_hash}): give its start as --base, or --any_base=1 if --base is an ancestor of it")


def check_out(out, inputs):
    """--out may be new, empty, or an earlier result of this script; never a folder that holds an input."""
    for folder in inputs:
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"--out={out} holds the checkpoint {folder}, which is to be merged: give another folder")
    return not out.exists() or (out.is_dir() and ((out / "merge.json").exists() or not any(out.iterdir())))


def write(state_dict, config, tokenizer, record, out):
    """A checkpoint folder and merge.json in it, whole or not at all."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        checkpoint.write_hf(state_dict, config, tokenizer, temporary, None)
        write_atomically(temporary / "merge.json", json.dumps(record, indent=1) + "\n")
        checkpoint.put_in_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def settings_of(cfg, num_models):
    """-> what the method is called with. A flag that it does not read is refused rather than ignored."""
    used = METHODS[cfg.how][1]
    for name in ("weights", "lam", "density", "rescale", "alpha"):
        if name not in used and getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"--{name} has no effect on --how={cfg.how}, which reads {', '.join('--' + n for n in used)}")
    settings = {name: getattr(cfg, name) for name in used}
    if cfg.how == "linear":
        try:
            settings["weights"] = [float(w) for w in cfg.weights.split(",")] if cfg.weights else [1 / num_models] * num_models
        except ValueError:
            raise ValueError(f"--weights={cfg.weights}: expected {num_models} numbers, comma-separated") from None
    for name in ("lam", "rescale", "alpha", "threshold"):
        if not (math.isfinite(getattr(cfg, name)) and (name == "lam" or getattr(cfg, name) >= 0)):
            raise ValueError(f"--{name}={getattr(cfg, name)}: expected a finite number, 0 or more")
    METHODS[cfg.how][0](torch.zeros(1), [torch.zeros(1)] * num_models, **settings)          # refuses values before minutes of reading
    return settings


@torch.no_grad()
def main(cfg):
    started = time.monotonic()
    paths = [p for p in cfg.models.split(",") if p]
    if not (cfg.base and paths and (cfg.out or cfg.dry_run)):
        raise ValueError("--base, --models and --out are needed: the common start, checkpoints trained from it (comma-separated), a folder")
    settings = settings_of(cfg, len(paths))
    base_folder, *folders = [checkpoint.newest(p) for p in (cfg.base, *paths)]
    out = Path(cfg.out)
    if not cfg.dry_run:
        if not check_out(out, [base_folder, *folders]):
            raise ValueError(f"--out={out} exists and was not made by merge.py: give another folder")
        if (out / "merge.json").exists() and not cfg.overwrite:
            raise ValueError(f"--out={out} holds an earlier merge: --overwrite replaces it")

    model, tokenizer = checkpoint.load_hf(base_folder)
    params = dict(model.named_parameters())                     # becomes the result, tensor by tensor
    base_hash = checkpoint.weights_hash(params)
    readers, models = [], []
    for path, folder in zip(paths, folders):
        read, dtypes = open_model(folder, base_folder, model, tokenizer)
        check_start(folder, base_folder, base_hash, cfg.any_base)
        if dtypes & {"BF16", "F16"}:
            print(f"note: {folder} is stored in {' and '.join(sorted(dtypes))}: changes finer than that are lost (bf16 rounds a weight to "
                  "1/256 of itself, an RL step at lr 1e-6 is often less), and against an fp32 base the rounding itself looks like a change")
        readers.append(read)
        models.append(dict(path=path, folder=str(folder), hash=checkpoint.weights_hash(folder), start=recorded_start(folder)[0]))

    overlap = Overlap(len(folders), cfg.threshold)
    for name, base in progress(params.items(), len(params), "merge"):
        finite(base, name, base_folder)
        tensors = [read(name).float() for read in readers]
        merged = finite(METHODS[cfg.how][0](base, tensors, **settings), name, f"the result of --how={cfg.how}")
        overlap.add(base, differences(base, tensors), merged.double() - base.double())
        base.copy_(merged)

    merged_norm, base_norm = math.sqrt(overlap.products[-1, -1]), math.sqrt(overlap.base_square)
    print(f"base     {base_folder}  norm {base_norm:.4g}")
    for i, m in enumerate(models):
        m.update(overlap.of_model(i))
        same = " (equal to the base)" * (m["hash"] == base_hash)
        print(f"model {i + 1}  {m['folder']}  active {m['active']:.4f}  norm of change {m['norm']:.4g}  "
              f"cosine with merge {m['cosine_with_merge']:.3f}{same}")
    pairs = [overlap.of_pair(i, j) for i, j in itertools.combinations(range(len(models)), 2)]
    for p in pairs:
        print("models {} and {}  cosine {cosine:.3f}  overlap {overlap:.3f}  sign agreement {sign_agreement:.3f}".format(*p["models"], **p))
    print(f"merged   {cfg.how}({', '.join(f'{k} {v}' for k, v in settings.items())})  norm of change {merged_norm:.4g}")
    record = dict(how=cfg.how, settings=settings, threshold=cfg.threshold, models=models, pairs=pairs,
                  base=dict(path=cfg.base, folder=str(base_folder), hash=base_hash, norm=base_norm),
                  merged=dict(hash=checkpoint.weights_hash(params), norm=merged_norm))
    if not cfg.dry_run:
        write(params, model.config, tokenizer, record, out)
    print(json.dumps(dict(out="" if cfg.dry_run else cfg.out, seconds=round(time.monotonic() - started, 1), **record)), flush=True)
    return record


if __name__ == "__main__":
    try:
        main(parse_config(Config))
    except ValueError as error:
        sys.exit(f"merge.py: {error}")
