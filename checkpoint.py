"""Checkpoints that survive a crash, and Hugging Face folders in and out.

Every step folder of ours *is* a Hugging Face folder (config.json, model.safetensors, tokenizer.json) plus what resuming needs:

    out/<name>/step_000400/
        config.json  model.safetensors  tokenizer.json  tokenizer_config.json     loads anywhere, transformers included
        optim_rank0.pt ...                                                        optimizer state (one per rank under FSDP)
        unmerged.safetensors                                                      LoRA only: the base and A, B apart
        extra.safetensors                                                         only if the script has more tensors (a target network)
        train.json                                                                written last: step, data position, config, file sizes

A folder is written under a temporary name and renamed once every byte is on the disk. A folder whose files differ from train.json is
refused by name and never loaded in part.
"""
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import write_atomically
from model import ModelConfig, Recommender, RecommenderConfig, RopeScaling, Transformer, inverse_frequencies, merged_state_dict
from tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# Hugging Face config.json <-> ModelConfig

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}     # SmolLM2 says Llama


def config_from_hf(hf, path="config.json"):
    """The parsed config.json of a Llama, Qwen2, Qwen2.5, Qwen3 or SmolLM2 checkpoint -> ModelConfig. Anything this model would compute
    differently is refused here, by name, rather than loaded and silently wrong."""
    architecture = (hf.get("architectures") or ["none given"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})      # transformers 4 and 5 spell it differently
    rope_given = dict(rope)
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "hidden_act": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
        "use_sliding_window": bool(hf.get("use_sliding_window")),
        "layer_types": any(kind != "full_attention" for kind in hf.get("layer_types") or ()),
        "partial_rotary_factor": rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) not in (None, 1.0),
        "quantization_config": bool(hf.get("quantization_config")),
        "rope_parameters": kind not in ("default", "llama3") or any(isinstance(v, dict) for v in rope.values()),
    }
    for key, bad in refused.items():
        if bad:
            raise ValueError(f"{path}: {key}={hf.get(key) or rope_given!r} is not supported")
    try:
        scaling = RopeScaling(*(float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor")),
                              int(rope["original_max_position_embeddings"])) if kind == "llama3" else None
        heads = hf["num_attention_heads"]
        # where it is left out, the Qwen3 classes of transformers take 128, the others what is left per head
        head_dim = hf.get("head_dim") or (128 if architecture == "Qwen3ForCausalLM" else hf["hidden_size"] // heads)
        return ModelConfig(
            vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"], num_heads=heads, num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=head_dim, max_positions=hf.get("max_position_embeddings", 4096),
            rope_theta=float(theta), rope_scaling=scaling, norm_eps=hf.get("rms_norm_eps", 1e-6),
            qkv_bias=architecture == "Qwen2ForCausalLM", qk_norm=architecture == "Qwen3ForCausalLM",
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)))
    except KeyError as e:
        raise ValueError(f"{path}: {e.args[0]!r} is missing") from None


def config_to_hf(c, tokenizer, dtype):
    """ModelConfig -> the dict of a config.json that transformers 4 and 5 read alike."""
    if not isinstance(c, ModelConfig):
        return dict(architectures=[type(c).__name__.removesuffix("Config")], **asdict(c))
    stop_id = tokenizer.end_of_text_id if tokenizer.end_of_turn_id is None else tokenizer.end_of_turn_id
    architecture = "Qwen3ForCausalLM" if c.qk_norm else "Qwen2ForCausalLM" if c.qkv_bias else "LlamaForCausalLM"
    if c.qk_norm and c.qkv_bias:
        raise ValueError("a model with both q/k norm and q/k/v bias has no Hugging Face architecture to be saved as")
    scaling = None
    if c.rope_scaling:
        s = c.rope_scaling
        scaling = dict(rope_type="llama3", factor=s.factor, low_freq_factor=s.low_freq_factor, high_freq_factor=s.high_freq_factor,
                       original_max_position_embeddings=s.original_max_positions)
    return dict(
        architectures=[architecture], model_type=ARCHITECTURES[architecture], vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim, max_position_embeddings=c.max_positions, rope_theta=c.rope_theta,
        rope_scaling=scaling, rms_norm_eps=c.norm_eps, hidden_act="silu", attention_bias=False, mlp_bias=False, attention_dropout=0.0,
        tie_word_embeddings=c.tie_embeddings, bos_token_id=None, eos_token_id=stop_id,
        torch_dtype=str(dtype).removeprefix("torch."), use_cache=True)


# -----------------------------------------------------------------------------
# Hugging Face folders


def weight_files(path):
    """-> {tensor name: file} of a folder with model.safetensors or a sharded index."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.exists():                                         # first, as in transformers: an index beside it is a leftover
        with open_safetensors(single) as f:
            return dict.fromkeys(f.keys(), single)
    if not index.exists():
        raise ValueError(f"{path}: neither model.safetensors nor model.safetensors.index.json is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: expected a weight_map of tensor names and files, found none")
    gone = sorted({f for f in weight_map.values() if not (path / f).exists()})
    if gone:
        raise ValueError(f"{index}: names files that are not there: {', '.join(gone)}")
    return {name: path / f for name, f in weight_map.items()}


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: cannot be read ({e}); the file is truncated or is no safetensors file") from None


def load_hf(path, device="cpu", dtype=torch.float32):
    """-> (model, tokenizer) from a Hugging Face folder, ours included; parameters and compute in `dtype`.

    Every name and shape is checked before anything is copied. ValueError: unknown architecture or setting, missing, unexpected or
    misshapen tensor, truncated file.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(f"{path}: no config.json there; expected a checkpoint folder, of ours (out/<name>/step_...) or of Hugging Face")
    verify(path)
    config = config_from_hf(read_json(path / "config.json"), path / "config.json")
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=dtype)
    files = {n: f for n, f in weight_files(path).items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        files.pop("lm_head.weight", None)                       # some exporters write the tied table twice
    handles = checked(path, files, model)
    tokenizer = Tokenizer.from_file(path)                       # before the long copy: it may be what is wrong
    model = model.to_empty(device=device).to(dtype)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # to_empty makes one parameter per name, which unties them
    model.inv_freq = inverse_frequencies(config).to(device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(handles[files[name]].get_tensor(name))
    return model, tokenizer


def checked(path, files, model):
    """files {tensor name: file} against the model's names and shapes -> {file: open file}."""
    wanted = {name: p.shape for name, p in model.named_parameters()}
    for what, names in (("missing", wanted.keys() - files.keys()), ("unexpected", files.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{path}: {len(names)} {what} tensors, among them {', '.join(sorted(names)[:3])}")
    handles = {f: open_safetensors(f) for f in set(files.values())}
    inside = {f: set(handle.keys()) for f, handle in handles.items()}
    for name, shape in wanted.items():
        if name not in inside[files[name]]:
            raise ValueError(f"{files[name]}: {name} is missing, though the index names this file for it")
        found = handles[files[name]].get_slice(name).get_shape()
        if list(shape) != list(found):
            raise ValueError(f"{files[name]}: {name} has shape {list(found)}, expected {list(shape)} from config.json")
    return handles


class Catalogue(NamedTuple):
    """What a recommender's items are, in the place where a language model has its tokenizer."""
    item_ids: list          # raw id of item i at i - 1
    titles: list            # title of item i at i - 1; [] where none are known

    def save(self, path):
        write_atomically(Path(path) / "catalogue.json", json.dumps(self._asdict(), ensure_ascii=False) + "\n")


def load_recommender(path, device="cpu"):
    """-> (Recommender in fp32, Catalogue) from a folder that save or save_hf wrote. ValueError: another kind of model, a damaged file."""
    path = Path(path)
    if not (path / "config.json").exists() or not (path / "catalogue.json").exists():
        raise ValueError(f"{path}: no config.json and catalogue.json there; expected the checkpoint of a recommender (out/<name>/step_..., out/<name>/bc)")
    verify(path)
    settings = read_json(path / "config.json")
    if settings.pop("architectures", None) != ["Recommender"]:
        raise ValueError(f"{path}: holds another kind of model than a recommender")
    try:
        config = RecommenderConfig(**settings)
    except TypeError as e:
        raise ValueError(f"{path}/config.json: {e}") from None
    catalogue = read_json(path / "catalogue.json")
    if catalogue.keys() != set(Catalogue._fields) or len(catalogue["item_ids"]) != config.num_items:
        raise ValueError(f"{path}/catalogue.json: expected item_ids and titles of {config.num_items} items")
    with torch.device("meta"):
        model = Recommender(config)
    files = weight_files(path)
    handles = checked(path, files, model)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(handles[files[name]].get_tensor(name))
    return model, Catalogue(**catalogue)


def save_hf(model, tokenizer, path):
    """Writes config.json, model.safetensors and the tokenizer's files; transformers loads the folder and computes the same logits.

    LoRA is merged. The folder appears whole or not at all, and replaces a checkpoint of that name, but nothing else. Call on one process,
    with unsharded parameters.
    """
    path = Path(path)
    is_checkpoint = (path / "config.json").exists() and not any(path.glob("step_*"))         # a run's folder has a config.json too
    if path.exists() and not is_checkpoint and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is no checkpoint: saving there would delete it; give another path")
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_hf(dict(model.named_parameters()), model.config, tokenizer, temporary, lora_scale(model))
        put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_hf(state_dict, config, tokenizer, path, scale):
    if scale is not None:
        state_dict = merged_state_dict(state_dict, scale)
    dtype = next(iter(state_dict.values())).dtype
    write_atomically(path / "config.json", json.dumps(config_to_hf(config, tokenizer, dtype), indent=2) + "\n")
    write_tensors(state_dict, path / "model.safetensors")
    tokenizer.save(path)


def write_tensors(state_dict, path):
    save_file({n: t.detach().cpu().contiguous() for n, t in state_dict.items()}, path, metadata={"format": "pt"})


def put_in_place(temporary, final):
    """Every byte to the disk, then the rename. What was at `final` is moved aside first and deleted last."""
    for path in (*temporary.iterdir(), temporary):
        sync(path)
    aside = final.with_name(final.name + ".old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        os.replace(final, aside)
    try:
        os.replace(temporary, final)
    except OSError:
        if aside.exists():
            os.replace(aside, final)
        raise
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def whole(tensor):
    """The full tensor of an FSDP shard (a collective call), any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(model):
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def lora_scale(model):
    return next((m.scale for m in model.modules() if hasattr(m, "lora_A")), None)


# -----------------------------------------------------------------------------
# Step folders


def save(out_dir, step, model, tokenizer, optimizers, *, state, config, rank=0, world_size=1, extra=None):
    """Writes out_dir/step_NNNNNN. All ranks call it. Raises OSError on every rank when any rank cannot write; what was there before stays.

    state: plain values that continue the run (data position, counters). config: the flags, for the record. extra: {name: tensor} beside
    the model, e.g. a target network. model: the Transformer or Recommender itself, not its DDP wrapper; a Recommender's Catalogue stands in the
    tokenizer's place.
    """
    final = Path(out_dir) / f"step_{step:06d}"
    temporary = final.with_name(final.name + ".tmp")
    sharded = is_sharded(model)
    # gathering is collective, so it comes before anything that may fail on one rank only
    tensors = {n: whole(p) for n, p in model.named_parameters()}
    extra = {n: whole(t) for n, t in (extra or {}).items()}
    try:
        with together():
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with together():
            if rank == 0:
                write_hf(tensors, model.config, tokenizer, temporary, lora_scale(model))
                if lora_scale(model) is not None:
                    write_tensors(tensors, temporary / "unmerged.safetensors")
                if extra:
                    write_tensors(extra, temporary / "extra.safetensors")
            if rank == 0 or sharded:
                torch.save([local_state(o) for o in optimizers], temporary / f"optim_rank{rank}.pt")
        with together():
            if rank == 0:
                sizes = {f.name: f.stat().st_size for f in sorted(temporary.iterdir())}
                record = dict(step=step, world_size=world_size, sharded=sharded, state=state, config=config, files=sizes)
                write_atomically(temporary / "train.json", json.dumps(record, indent=1) + "\n")
                put_in_place(temporary, final)
    except OSError as e:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} could not be saved: {e}; earlier checkpoints are untouched") from e
    return final


@contextmanager
def together():
    """If any rank fails inside, all raise OSError: a rank that went on alone would wait forever in the next collective."""
    failure = None
    try:
        yield
    except Exception as e:                                       # torch and safetensors wrap "no space left" in errors of their own
        failure = e
    failures = [f"{type(failure).__name__}: {failure}" if failure else None]
    if dist.is_initialized():
        failures = failures * dist.get_world_size()
        dist.all_gather_object(failures, failures[0])
    if any(failures):
        raise OSError("; ".join(f"rank {i}: {f}" for i, f in enumerate(failures) if f)) from failure


def step_folders(out_dir):
    """The finished step folders, oldest first, by number: as text, step_1000000 comes before step_999999."""
    numbered = {p.name.removeprefix("step_"): p for p in Path(out_dir).glob("step_*")}
    return [numbered[n] for n in sorted((n for n in numbered if n.isdecimal()), key=int)]


def find(out_dir, resume):
    """--resume: "" starts anew (None), "latest" the newest finished step of out_dir (error if there is none), else a step folder."""
    if not resume:
        return None
    if resume != "latest":
        path = Path(resume)
    else:
        steps = step_folders(out_dir)
        if not steps:
            raise ValueError(f"--resume=latest: {out_dir} holds no checkpoint; start without --resume, or check --name")
        path = steps[-1]
    if not (path / "train.json").exists():
        raise ValueError(f"--resume={resume}: {path} has no train.json, so it is no finished checkpoint of this repository")
    verify(path)
    return path


def verify(path):
    """A step folder of ours must hold the files that train.json lists, in full. Folders from elsewhere have no such list."""
    if not (Path(path) / "train.json").exists():
        return
    for name, size in read_record(path)["files"].items():
        file = Path(path) / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            raise ValueError(f"{file}: " + ("missing" if found is None else f"{found} bytes, expected {size}") +
                             ": the checkpoint is damaged; resume from an earlier step")


def read_record(path):
    file = Path(path) / "train.json"
    record = read_json(file)
    gone = {"step", "world_size", "sharded", "state", "config", "files"} - record.keys()
    if gone:
        raise ValueError(f"{file}: {', '.join(sorted(gone))} missing: not a checkpoint of this repository, or a damaged one")
    return record


def read_json(path):
    try:
        content = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def newest(path):
    """The folder to load for --init: itself if it is a checkpoint, else the last step inside out/<name>."""
    path = Path(path)
    steps = step_folders(path)
    return steps[-1] if steps and not any(path.glob("model.safetensors*")) else path


def restore(path, model, optimizers, rank=0, world_size=1):
    """Optimizer state back into place -> the `state` given to save. Call after sharding.

    Moments and step counts are the checkpoint's; rates, decay and betas are this run's flags.
    """
    record = read_record(path)
    here, there = is_sharded(model) and world_size, record["sharded"] and record["world_size"]
    if here != there:
        found, expected = (f"{n} FSDP shards" if n else "whole weights" for n in (there, here))
        raise ValueError(f"{path} holds {found}, this run has {expected}: resume with the same --parallel and number of processes, "
                         "or start from it with --init")
    file = Path(path) / f"optim_rank{rank if record['sharded'] else 0}.pt"
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:                                       # OSError, RuntimeError, UnpicklingError: by where the damage is
        raise ValueError(f"{file}: cannot be read ({str(e).splitlines()[0]}); resume from an earlier step") from None
    differ = "the flags of the two runs differ (--muon_lr, --lora_rank, --size); start from it with --init instead"
    kinds, expected = [s["optimizer"] for s in saved], [type(o).__name__ for o in optimizers]
    if kinds != expected:
        raise ValueError(f"{file}: holds the state of {' and '.join(kinds)}, this run has {' and '.join(expected)}: {differ}")
    try:
        states = [sharded_state(s, o) for s, o in zip(saved, optimizers)]
    except ValueError as e:
        raise ValueError(f"{file}: {e}: {differ}") from None
    for optimizer, state_dict in zip(optimizers, states):
        optimizer.load_state_dict(state_dict)
    return record["state"]


def restore_lora(path, model):
    """After add_lora and before sharding: the unmerged base and A, B of a LoRA run, exact where unmerging could not be."""
    file = Path(path) / "unmerged.safetensors"
    if not file.exists():
        raise ValueError(f"{path} was saved without LoRA: resume with --lora_rank=0, or start from it with --init")
    with open_safetensors(file) as f, torch.no_grad():
        found = {name: f.get_slice(name).get_shape() for name in f.keys()}
        wanted = {name: list(p.shape) for name, p in model.named_parameters()}
        name = next((n for n in wanted | found if found.get(n) != wanted.get(n)), None)
        if name:
            raise ValueError(f"{file}: {name} has shape {found.get(name)}, expected {wanted.get(name)}: --lora_rank differs, or the model")
        for name, p in model.named_parameters():
            p.copy_(f.get_tensor(name))


def load_extra(path):
    """-> {name: tensor} as given to save."""
    with open_safetensors(Path(path) / "extra.safetensors") as f:
        return {name: f.get_tensor(name) for name in f.keys()}


def local_state(optimizer):
    """Optimizer state, sharded tensors (DTensor) as this rank's plain part, which torch.load(weights_only=True) can read back."""
    state_dict = optimizer.state_dict()
    state = {i: {k: v.to_local() if hasattr(v, "to_local") else v for k, v in s.items()} for i, s in state_dict["state"].items()}
    return dict(optimizer=type(optimizer).__name__, state=state, num_params=[len(g["params"]) for g in state_dict["param_groups"]])


def sharded_state(saved, optimizer):
    """The reverse of local_state, by the placement of the parameter that each entry belongs to; every shape is checked."""
    from torch.distributed.tensor import DTensor
    params = [p for group in optimizer.param_groups for p in group["params"]]
    num_params = [len(group["params"]) for group in optimizer.param_groups]
    if saved["num_params"] != num_params:
        raise ValueError(f"holds {saved['num_params']} parameters in its groups, this run has {num_params}")
    state = {}
    for i, entries in saved["state"].items():
        p, sharded = params[i], isinstance(params[i], DTensor)
        shape = p.to_local().shape if sharded else p.shape
        for k, v in entries.items():
            if v.ndim and v.shape != shape:
                raise ValueError(f"{k} of parameter {i} has shape {list(v.shape)}, this run expects {list(shape)}")
        # counters have no dimension and are whole on every rank
        state[i] = {k: DTensor.from_local(v.to(p.device), p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
                    if sharded and v.ndim else v for k, v in entries.items()}
    return dict(state=state, param_groups=optimizer.state_dict()["param_groups"])


def clear(out_dir, allowed):
    """A fresh run in a folder that holds checkpoints: refused unless the user asked for it, so that no result is lost to a repeated name."""
    old = step_folders(out_dir)
    if old and not allowed:
        raise ValueError(f"{out_dir} already holds {old[-1].name}: --resume=latest continues it, --overwrite deletes it, --name starts another")
    for path in [*old, *Path(out_dir).glob("step_*.tmp")]:
        shutil.rmtree(path)


def weights_hash(weights):
    """128 bits (hex) that name a set of weights, to tell later what a run started from.

    weights: a checkpoint folder, or {name: tensor}, whole tensors: a folder and what load_hf makes of it have one hash. It depends on
    names, shapes and values, not on the precision or the files they are stored in (fp32 holds every bf16 and fp16 number). An lm_head
    that is the embedding again is left out, as tied models may or may not write it.
    """
    tied = False
    if isinstance(weights, dict):
        names, read = set(weights), weights.__getitem__
    else:
        verify(weights)
        tied = read_json(Path(weights) / "config.json").get("tie_word_embeddings", False)
        files = weight_files(Path(weights))
        handles = {f: open_safetensors(f) for f in set(files.values())}
        names = {n for n in files if not n.endswith("rotary_emb.inv_freq")}
        read = lambda name: handles[files[name]].get_tensor(name)
    head, table = "lm_head.weight", "model.embed_tokens.weight"
    if head in names and table in names and (tied or torch.equal(read(head), read(table))):
        names.remove(head)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(names):
        tensor = read(name).detach().cpu().float().contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy())
    return digest.hexdigest()
