"""CLIP (Radford et al., arXiv 2103.00020) in plain PyTorch, and files of embeddings. Texts and images in, one .npz out:

    python -m data.clip --clip=clip-vit-base-patch32 --images=photos/ --texts=prompts.jsonl --out=prompts_and_photos.npz

FOLDER of --clip: model.safetensors (or its sharded index), config.json, and tokenizer.json or vocab.json with merges.txt.
Parameter names are those of transformers; OpenAI's own spelling of a state dict is converted. Sizes come from the tensors, what they cannot tell
(heads, activation, eps) from config.json; a key that it lacks has OpenAI's value: width / 64 heads, quick_gelu, 1e-5. Vision Transformers only,
not the ResNets. Where published configs err, the tokenizer is believed: the text's vector is read at the first end token, not at their eos_token_id 2.

Two things differ from transformers on purpose. <|endoftext|> typed by a user is ordinary text here. Images of more than 8 bits a channel are refused:
PIL would clip them to white. As there, what is transparent is blended with white (OpenAI's code and older versions of transformers drop the alpha
channel), and the rotation in EXIF data is not applied.
"""
import hashlib
import json
import math
import os
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np
import regex
import tiktoken
import torch
import torch.nn.functional as F
from torch import nn

from checkpoint import open_safetensors, read_json, weight_files, weights_hash
from common import parse_config, progress, write_atomically
from data.chat import _parse_json, _short, open_lines
from data.embeddings import save_embeddings
from tokenizer import CHAR_TO_BYTE, token_ranks, utf8

# -----------------------------------------------------------------------------
# The two towers

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass(frozen=True)
class Tower:
    width: int
    num_layers: int
    num_heads: int
    hidden: int                        # width of the MLP
    activation: str = "quick_gelu"
    eps: float = 1e-5


@dataclass(frozen=True)
class ClipConfig:
    text: Tower
    vision: Tower
    projection: int                    # width of an embedding
    patch: int                         # pixels
    image_size: int                    # pixels, a multiple of patch
    vocab_size: int = 49408
    context: int = 77                  # tokens of a text, start and end included
    end_id: int = 49407


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(c.width, c.width) for name in ("k", "v", "q", "out")})
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(c.width, c.eps), nn.LayerNorm(c.width, c.eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(c.width, c.hidden), "fc2": nn.Linear(c.hidden, c.width)})

    def forward(self, x, causal):
        """x: (B, T, D) -> the same."""
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](h).unflatten(-1, (self.c.num_heads, -1)).transpose(1, 2) for name in "qkv")     # (B, H, T, K)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.self_attn.out_proj(h.transpose(1, 2).flatten(2))
        h = ACTIVATIONS[self.c.activation](self.mlp.fc1(self.layer_norm2(x)))
        return x + self.mlp.fc2(h)


class Clip(nn.Module):
    """.name says which model embeddings are of: sizes for people, then 64 bits that depend on every weight and setting."""

    def __init__(self, config):
        super().__init__()
        self.config, self.name, t, v = config, None, config.text, config.vision
        self.text_model, self.vision_model = nn.Module(), nn.Module()
        for model, c in ((self.text_model, t), (self.vision_model, v)):
            model.embeddings = nn.Module()
            model.encoder = nn.ModuleDict({"layers": nn.ModuleList(Block(c) for _ in range(c.num_layers))})
        self.text_model.embeddings.token_embedding = nn.Embedding(config.vocab_size, t.width)
        self.text_model.embeddings.position_embedding = nn.Embedding(config.context, t.width)
        self.text_model.final_layer_norm = nn.LayerNorm(t.width, t.eps)
        self.vision_model.embeddings.class_embedding = nn.Parameter(torch.randn(v.width) / v.width ** 0.5)
        self.vision_model.embeddings.patch_embedding = nn.Conv2d(3, v.width, config.patch, config.patch, bias=False)
        self.vision_model.embeddings.position_embedding = nn.Embedding((config.image_size // config.patch) ** 2 + 1, v.width)
        self.vision_model.pre_layrnorm = nn.LayerNorm(v.width, v.eps)                    # spelt so in every checkpoint
        self.vision_model.post_layernorm = nn.LayerNorm(v.width, v.eps)
        self.text_projection = nn.Linear(t.width, config.projection, bias=False)
        self.visual_projection = nn.Linear(v.width, config.projection, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text_features(self, ids):
        """ids: (B, T <= context) int64, an end token in every row -> (B, d), not normalised. What follows the first end token has no influence."""
        model, is_end = self.text_model, ids == self.config.end_id
        if ids.shape[1] > self.config.context or not is_end.any(1).all():
            raise ValueError(f"expected rows of at most {self.config.context} ids with the end token {self.config.end_id} in each, found {tuple(ids.shape)}")
        x = model.embeddings.token_embedding(ids) + model.embeddings.position_embedding.weight[:ids.shape[1]]
        for block in model.encoder.layers:
            x = block(x, causal=True)
        x = x[torch.arange(len(ids), device=ids.device), is_end.int().argmax(1)]                        # (B, D); argmax gives the first
        return self.text_projection(model.final_layer_norm(x))

    def image_features(self, pixels):
        """pixels: (B, 3, image_size, image_size), as load_pixels makes them -> (B, d), not normalised."""
        e, size = self.vision_model.embeddings, self.config.image_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"expected pixels of shape (B, 3, {size}, {size}), found {tuple(pixels.shape)}")
        # as a matrix product, since a convolution would run in TF32 on CUDA, by default and unlike all else here
        x = F.unfold(pixels, self.config.patch, stride=self.config.patch).transpose(1, 2) @ e.patch_embedding.weight.flatten(1).T
        x = torch.cat([e.class_embedding.expand(len(x), 1, -1), x], dim=1) + e.position_embedding.weight
        x = self.vision_model.pre_layrnorm(x)
        for block in self.vision_model.encoder.layers:
            x = block(x, causal=False)
        return self.visual_projection(self.vision_model.post_layernorm(x[:, 0]))


def score(images, texts, logit_scale):
    """images: (N, d), texts: (M, d), normalised or not -> (N, M) exp(logit_scale) * cosine. logit_scale: scalar tensor, a log."""
    return logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


# -----------------------------------------------------------------------------
# Loading

STARTS = (("visual.transformer.resblocks.", "vision_model.encoder.layers."), ("transformer.resblocks.", "text_model.encoder.layers."),
          ("visual.conv1.", "vision_model.embeddings.patch_embedding."), ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
          ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"), ("visual.ln_pre.", "vision_model.pre_layrnorm."),
          ("visual.ln_post.", "vision_model.post_layernorm."), ("token_embedding.", "text_model.embeddings.token_embedding."),
          ("positional_embedding", "text_model.embeddings.position_embedding.weight"), ("ln_final.", "text_model.final_layer_norm."),
          ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"))
PARTS = ((".attn.", ".self_attn."), (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".c_fc.", ".fc1."), (".c_proj.", ".fc2."))
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
# what every CLIP of OpenAI's line was trained on; another value in preprocessor_config.json is refused
PREPROCESSOR = dict(do_resize=True, do_center_crop=True, do_rescale=True, do_normalize=True, resample=3,
                    image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])


def from_original(weights):
    """{name: tensor} as OpenAI and open_clip spell it -> as transformers does: q, k, v apart, projections transposed."""
    converted = {}
    for name, tensor in weights.items():
        if name in NO_WEIGHTS:
            continue
        new = next((to + name.removeprefix(start) for start, to in STARTS if name.startswith(start)), name)
        for part, to in PARTS:
            new = new.replace(part, to)
        head, packed, kind = new.rpartition("in_proj_")
        if packed:
            converted |= {f"{head}{letter}_proj.{kind}": part for letter, part in zip("qkv", tensor.chunk(3))}
        else:
            converted[new] = tensor.T if name in ("visual.proj", "text_projection") else tensor
    return converted


def read_weights(path):
    """-> ({name: tensor}, the file or folder to name in errors)."""
    files = weight_files(path)
    handles = {f: open_safetensors(f) for f in set(files.values())}
    gone = next((n for n, f in files.items() if n not in handles[f].keys()), None)
    if gone:
        raise ValueError(f"{files[gone]}: {gone} is missing, though the index names this file for it")
    # old versions of transformers stored position ids
    weights = {n: handles[f].get_tensor(n) for n, f in files.items() if not n.endswith("position_ids")}
    where = next(iter(handles)) if len(handles) == 1 else path
    return (from_original(weights) if any(n.startswith("visual.") for n in weights) else weights), where


def config_from(shapes, hf, path):
    """shapes: {name: list}; hf: parsed config.json of the folder `path` -> ClipConfig. ValueError where the two, or the tensors, do not fit."""
    def shape(name, ndim):
        if len(shapes.get(name, ())) != ndim:
            raise ValueError(f"{path}: expected a tensor {name} of {ndim} dimensions, found " +
                             (f"shape {shapes[name]}" if name in shapes else f"none among {len(shapes)} tensors; is this a CLIP checkpoint?"))
        return shapes[name]

    def check(given, key, found, of):
        if given.get(key, found) != found:
            raise ValueError(f"{path}/config.json: {of}{key} is {given[key]}, but the tensors have {found}")

    def tower(name):
        of = f"{name.removesuffix('model')}config"
        given = (hf.get(of) or {}) | (hf.get(f"{of}_dict") or {})               # old files have both, and the second wins
        hidden, width = shape(f"{name}.encoder.layers.0.mlp.fc1.weight", 2)
        layers = {int(n.split(".")[3]) for n in shapes if regex.match(rf"{name}\.encoder\.layers\.\d+\.", n)}
        for key, found in (("hidden_size", width), ("intermediate_size", hidden), ("num_hidden_layers", len(layers))):
            check(given, key, found, f"{of}.")
        heads, activation = given.get("num_attention_heads") or max(1, width // 64), given.get("hidden_act", "quick_gelu")
        if width % heads or activation not in ACTIVATIONS:
            raise ValueError(f"{path}/config.json: expected {of}.num_attention_heads to divide {width} and hidden_act to be one of "
                             f"{', '.join(ACTIVATIONS)}, found {heads} and {activation!r}")
        return given, Tower(width, len(layers), heads, hidden, activation, given.get("layer_norm_eps", 1e-5))

    (given, text), (given_vision, vision) = tower("text_model"), tower("vision_model")
    vocab_size, _ = shape("text_model.embeddings.token_embedding.weight", 2)
    context, _ = shape("text_model.embeddings.position_embedding.weight", 2)
    projection, _ = shape("text_projection.weight", 2)
    *_, patch = shape("vision_model.embeddings.patch_embedding.weight", 4)
    positions, _ = shape("vision_model.embeddings.position_embedding.weight", 2)
    size = math.isqrt(positions - 1) * patch
    if (size // patch) ** 2 + 1 != positions:
        raise ValueError(f"{path}: {positions} positions of the vision model are no square of patches and a class token")
    for settings, key, found, of in ((given, "vocab_size", vocab_size, "text_config."), (given, "max_position_embeddings", context, "text_config."),
                                     (given_vision, "patch_size", patch, "vision_config."), (given_vision, "image_size", size, "vision_config."),
                                     (hf, "projection_dim", projection, "")):
        check(settings, key, found, of)
    return ClipConfig(text, vision, projection, patch, size, vocab_size, context, vocab_size - 1)


def load_clip(path, device="cpu", dtype=torch.float32):
    """-> (Clip in eval mode, ClipTokenizer) from a folder, see the top of this file. ValueError: a missing, unexpected or misshapen tensor,
    a truncated file, a setting that would be computed differently here."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(f"{path}: no config.json there; expected the folder of a CLIP checkpoint (for OpenAI's own weights, one that says {{}} will do)")
    hf = read_json(path / "config.json")
    weights, where = read_weights(path)
    config = config_from({n: list(t.shape) for n, t in weights.items()}, hf, path)
    settings = read_json(path / "preprocessor_config.json") if (path / "preprocessor_config.json").exists() else {}
    for key, expected in {**PREPROCESSOR, "size": config.image_size, "crop_size": config.image_size}.items():
        found = settings.get(key, expected)
        if isinstance(found, dict):                             # a height and width as size would squash the image
            found = found.get("shortest_edge" if key == "size" else "height")
        if found != expected and not (isinstance(expected, list) and np.allclose(found, expected, atol=1e-6)):
            raise ValueError(f"{path}/preprocessor_config.json: {key} is {settings[key]}, only {expected} is supported")
    tokenizer = ClipTokenizer.from_folder(path, config.context)
    largest = max(*tokenizer.id_of_rank, tokenizer.start_id, tokenizer.end_id)
    if largest >= config.vocab_size:
        raise ValueError(f"{path}: the tokenizer has ids up to {largest}, the model has {config.vocab_size} token embeddings")
    with torch.device("meta"):
        model = Clip(replace(config, end_id=tokenizer.end_id))
    wanted = {n: list(p.shape) for n, p in model.named_parameters()}
    for what, names in (("missing", wanted.keys() - weights.keys()), ("unexpected", weights.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{where}: {len(names)} {what} tensors, among them {', '.join(sorted(names)[:3])}")
    for name, shape in wanted.items():
        if list(weights[name].shape) != shape:
            raise ValueError(f"{where}: {name} has shape {list(weights[name].shape)}, expected {shape} by the shapes of the others")
    settings = repr(model.config) + weights_hash(weights)
    model.name = f"clip-{config.vision.width}-{config.patch}-{config.image_size}-{hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()}"
    model.load_state_dict({n: t.to(device, dtype).contiguous() for n, t in weights.items()}, assign=True)
    return model.eval().requires_grad_(False), tokenizer


# -----------------------------------------------------------------------------
# Texts

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """The lower-casing BPE of CLIP on tiktoken. start_id, end_id: of <|startoftext|> and <|endoftext|>.

    A word's last letter is a symbol of its own, written x</w>. White space never reaches the BPE, so a newline can stand for </w>: "x\\n" is
    the two symbols x and newline, joined before anything else. From there on the ranks are the file's, by token as token_ranks gives them.
    """

    def __init__(self, vocab, merges, context=77):
        """vocab: {token: id} in GPT-2's printable alphabet; merges: "a b" or [a, b], best first. ValueError: no CLIP vocabulary."""
        self.context = context
        try:
            self.start_id, self.end_id = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        except KeyError as e:
            raise ValueError(f"expected the tokens <|startoftext|> and <|endoftext|> in the vocabulary, found no {e}") from None

        def to_bytes(token):
            stem = token.removesuffix("</w>")
            try:
                return stem.translate(CHAR_TO_BYTE).encode("latin-1") + b"\n" * (stem != token)
            except UnicodeEncodeError:
                raise ValueError(f"token {token!r} has characters outside the byte-level alphabet") from None
        newline = chr(0x10A)                                    # a newline in that alphabet; no text has one left when it gets here
        ids = {to_bytes(t): i for t, i in vocab.items() if newline not in t and t not in ("<|startoftext|>", "<|endoftext|>")}
        letters = [bytes([b]) for b in range(256) if b != 10]
        lacking = [token for b in letters for token in (b, b + b"\n") if token not in ids]
        if lacking:
            raise ValueError(f"expected every byte in the vocabulary, alone and with </w>; {len(lacking)} are missing, {lacking[0]!r} first")
        ranks = {(b, b"\n"): n for n, b in enumerate(letters)}
        for n, merge in enumerate(merges):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if any(newline in part for part in pair):
                continue
            pair = tuple(map(to_bytes, pair))
            if len(pair) != 2 or any(token not in ids for token in (*pair, b"".join(pair))):
                raise ValueError(f"merge {n + 1} ({merge!r}): expected two tokens of the vocabulary that join to a third")
            ranks[pair] = 256 + n
        ranks = token_ranks(ids, ranks, ignore_merges=False)
        order = [*(bytes([b]) for b in range(256)), *sorted(ranks, key=ranks.get)]
        self.id_of_rank = [ids.get(token, self.end_id) for token in order]               # the newline alone, which never comes out
        self.bpe = tiktoken.Encoding("clip", pat_str=r"[^\n]+\n", mergeable_ranks={t: n for n, t in enumerate(order)}, special_tokens={})

    @classmethod
    def from_folder(cls, path, context=77):
        """Reads tokenizer.json, else vocab.json and merges.txt. ValueError that names the file and what it has that CLIP's have not."""
        path, file = Path(path), Path(path) / "tokenizer.json"
        try:
            if not file.exists():
                file = path / "vocab.json"
                if not (file.exists() and (path / "merges.txt").exists()):
                    raise ValueError("not there; expected it, or both vocab.json and merges.txt")
                lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
                return cls(read_json(file), [line for line in lines[lines[0].startswith("#"):] if line], context)
            spec = read_json(file)
            normalizers = [n["type"] for n in (spec["normalizer"] or {}).get("normalizers", [])]
            split, *rest = spec["pre_tokenizer"].get("pretokenizers", [spec["pre_tokenizer"]])
            pattern = split.get("pattern", {}).get("Regex", "").removeprefix(r"<\|startoftext\|>|<\|endoftext\|>|")
            found = (spec["model"].get("end_of_word_suffix"), normalizers, pattern, split.get("behavior"), split.get("invert"), [r["type"] for r in rest])
            expected = ("</w>", ["NFC", "Replace", "Lowercase"], PATTERN, "Removed", True, ["ByteLevel"])
            if found != expected:
                different = next((f, e) for f, e in zip(found, expected) if f != e)
                raise ValueError(f"not the tokenizer of a CLIP: expected {different[1]!r}, found {different[0]!r}")
            added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
            return cls(spec["model"]["vocab"] | added, spec["model"]["merges"], context)
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{file}: not a tokenizer file of the tokenizers library ({e!r})") from None
        except ValueError as e:
            raise ValueError(str(e) if str(e).startswith(str(path)) else f"{file}: {e}") from None

    def ids(self, text):
        """str -> list[int] of any length, without start and end."""
        text = unicodedata.normalize("NFC", utf8(text).decode())
        text = text.replace("Σ", "σ").lower()                   # `tokenizers` lower-cases letter by letter; Python knows the final sigma
        return [self.id_of_rank[n] for n in self.bpe.encode("".join(piece + "\n" for piece in regex.findall(PATTERN, text)), disallowed_special=())]

    def encode(self, texts):
        """list of str -> (B, context) int64: start, the first context - 2 ids of the text, end, and end again as padding."""
        batch = torch.full((len(texts), self.context), self.end_id)
        batch[:, 0] = self.start_id
        for row, text in zip(batch, texts):
            ids = self.ids(text)[:self.context - 2]
            row[1:len(ids) + 1] = torch.tensor(ids, dtype=torch.int64)
        return batch


# -----------------------------------------------------------------------------
# Images


def load_pixels(path, size):
    """An image file -> (3, size, size) float32: RGB, short side to `size` (bicubic with antialiasing), centre crop, CLIP's mean and deviation.

    ValueError that names the file: no image, a truncated one, more than 8 bits a channel, one side 100 times the other.
    """
    from PIL import Image
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"more than 8 bits a channel (mode {image.mode}): convert it")
            width, height = image.size
            short = min(width, height)
            if max(width, height) > 100 * short:                # would be scaled to a side of 22,400 and more
                raise ValueError(f"{width} x {height} pixels: too long to be scaled and cropped")
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("RGB").resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    except Exception as e:                                      # PIL's decoders raise whatever they stumble over
        raise ValueError(f"{path}: cannot be read as an image: {e}") from None
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    pixels = (pixels - np.float32(PREPROCESSOR["image_mean"])) / np.float32(PREPROCESSOR["image_std"])
    return torch.from_numpy(pixels).permute(2, 0, 1)


# -----------------------------------------------------------------------------
# Embedding

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read_texts(path, key="text"):
    """A JSONL file of {"id": str, key: str} -> {id: str}. ValueError with file and line."""
    found = {}
    with open_lines(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                record = _parse_json(line, f"{path}:{number}")
                if not isinstance(record, dict) or not all(isinstance(record.get(k), str) for k in ("id", key)):
                    raise ValueError(f'{path}:{number}: expected an object with the strings "id" and "{key}", found {_short(record)}')
                if record["id"] in found:
                    raise ValueError(f"{path}:{number}: the id {record['id']!r} is there already")
                found[record["id"]] = record[key]
    return found


def image_files(path):
    """-> {id: Path}. Of a folder: every image in it by suffix, hidden ones left out, ids are relative paths; or a JSONL of {"id", "image"}, with
    paths relative to that file."""
    path = Path(path)
    if not path.is_dir():
        return {i: path.parent / image for i, image in read_texts(path, "image").items()}
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and not any(part.startswith(".") for part in f.relative_to(path).parts)]
    images = {f.relative_to(path).as_posix(): f for f in files if f.suffix.lower() in SUFFIXES}
    if len(images) < len(files):
        print(f"{path}: {len(files) - len(images)} files without the suffix of an image ({' '.join(SUFFIXES)}) are left out", file=sys.stderr)
    return images


@torch.no_grad()
def embed(model, tokenizer, out, images=None, texts=None, *, batch_size=64, dtype="float32", normalize=True):
    """images {id: path} and texts {id: str} -> the file `out`, and a summary: num_images, num_texts, num_cut (texts longer than the context), num_resumed.

    Rows are appended to OUT.rows as they come, OUT.rows.json says whose they are. A later call with the same arguments goes on behind the whole
    batches that are there, and ends in the same bytes as one that was never stopped; if items were changed (a broken image taken out), behind the
    whole batches before the first change. ValueError: doubled ids, a broken image, a vector that is not finite, an `out` that exists.
    """
    out, images, texts = Path(out), images or {}, texts or {}
    if out.exists() or out.suffix != ".npz":
        raise ValueError(f"{out}: " + ("exists; delete it, or give another --out" if out.exists() else "expected a name that ends in .npz"))
    both = sorted(images.keys() & texts.keys())
    if not images and not texts or both:
        raise ValueError(f"expected images or texts, all with ids of their own, found {len(images)} and {len(texts)}, with the same ids: {both[:3]}")
    ids, items = [*images, *texts], [*map(Path, images.values()), *texts.values()]
    starts = [*range(0, len(images), batch_size), *range(len(images), len(ids), batch_size)]         # no batch has both kinds
    batches = list(zip(starts, [*starts[1:], len(ids)]))
    width, device = model.config.projection, model.logit_scale.device

    def signature(i, item):
        if isinstance(item, Path):
            if not item.is_file():
                raise ValueError(f"{item}: no such image")
            item = [str(item.resolve()), item.stat().st_size, item.stat().st_mtime_ns]
        return hashlib.blake2b(json.dumps([i, item]).encode(), digest_size=8).hexdigest()
    record = dict(model=model.name, dtype=dtype, normalize=normalize, batch_size=batch_size, device=device.type,
                  items=[signature(i, item) for i, item in zip(ids, items)])
    rows, key = out.with_name(out.name + ".rows"), out.with_name(out.name + ".rows.json")
    row_bytes, old = width * np.dtype(dtype).itemsize, read_json(key) if key.exists() and rows.exists() else {}
    same = all(old.get(k) == v for k, v in record.items() if k != "items")
    num_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old["items"], record["items"]))) if same else 0
    there = min(num_same, rows.stat().st_size // row_bytes) if same else 0
    done = max((stop for _, stop in batches if stop <= there), default=0)
    if old:
        print(f"{rows}: {there} rows are there, going on behind {done} of {len(ids)}" + ("" if same else " (of another model or setting)"), file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "ab") as f, ThreadPoolExecutor() as pool:
        f.truncate(done * row_bytes)                            # before the record: what is left is right by the old one and the new
        write_atomically(key, json.dumps(record) + "\n")
        for start, stop in progress([b for b in batches if b[1] > done], desc=f"embed {out.name}"):
            if start < len(images):
                features = model.image_features(torch.stack(list(pool.map(lambda p: load_pixels(p, model.config.image_size), items[start:stop]))).to(device))
            else:
                features = model.text_features(tokenizer.encode(items[start:stop]).to(device))
            with np.errstate(over="ignore"):                    # to infinity, and to the error below
                features = (F.normalize(features, dim=-1) if normalize else features).cpu().numpy().astype(dtype)
            bad = ~np.isfinite(features).all(1)
            if bad.any():
                raise ValueError(f"the embedding of {ids[start + int(bad.argmax())]!r} is not finite in {dtype}")
            f.write(features.tobytes())
            f.flush()
            os.fsync(f.fileno())
    save_embeddings(out, ids, np.memmap(rows, dtype, "r", shape=(len(ids), width)), model.name, normalize)
    rows.unlink()
    key.unlink()
    num_cut = sum(len(tokenizer.ids(text)) > tokenizer.context - 2 for text in texts.values())
    return dict(num_images=len(images), num_texts=len(texts), num_cut=num_cut, num_resumed=done)


@dataclass(frozen=True)
class Config:
    clip: str = ""                     # folder of a CLIP checkpoint
    images: str = ""                   # folder of images, or JSONL of {"id", "image"}
    texts: str = ""                    # JSONL of {"id", "text"}
    out: str = ""                      # the .npz to write
    device_batch_size: int = 64        # images or texts at a time
    dtype: Literal["float32", "float16"] = "float32"   # of the file; computed in float32
    normalize: bool = True             # rows of length 1


def main(cfg):
    """Returns the summary, and prints it as one line of JSON."""
    if not cfg.clip or not cfg.out or not (cfg.images or cfg.texts) or cfg.device_batch_size < 1:
        raise ValueError(f"expected --clip, --out, --images or --texts, and --device_batch_size from 1 on, found {asdict(cfg)}")
    images, texts = image_files(cfg.images) if cfg.images else {}, read_texts(cfg.texts) if cfg.texts else {}
    model, tokenizer = load_clip(cfg.clip, "cuda" if torch.cuda.is_available() else "cpu")
    summary = embed(model, tokenizer, cfg.out, images, texts, batch_size=cfg.device_batch_size, dtype=cfg.dtype, normalize=cfg.normalize)
    summary = dict(out=cfg.out, model=model.name, width=model.config.projection, **summary)
    print(json.dumps(summary), flush=True)
    return summary


if __name__ == "__main__":
    try:
        main(parse_config(Config))
    except ValueError as error:
        sys.exit(f"data.clip: {error}")
