"""CLIP beside transformers on tiny random weights, its BPE, its pixels, files of embeddings, and every bad input by name."""
import json
import os
import unicodedata
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common import parse_config
from data import clip
from data.clip import Clip, ClipConfig, ClipTokenizer, Tower, embed, load_clip, load_pixels
from data.embeddings import Embeddings, check_same, load_embeddings, save_embeddings
from tokenizer import BYTE_TO_CHAR

MERGES = ["t h", "th e</w>", "a t</w>", "c at</w>", "i n", "in g</w>", "h e", "l l", "he ll", "hell o</w>", "p h", "ph o", "pho t", "phot o</w>",
          "í ķ", "íķ ľ", "l l</w>", "' s</w>", "! !", "!! !</w>", "a a", "aa aa", "aaaa a</w>", "Î ½", "o f</w>", "d o", "g s</w>"]
# widths apart, heads that are not width / 64, odd patches
TINY = ClipConfig(Tower(32, 2, 4, 80), Tower(48, 3, 3, 64), projection=24, patch=5, image_size=20, vocab_size=0)


def vocabulary():
    tokens = [*BYTE_TO_CHAR.values(), *(c + "</w>" for c in BYTE_TO_CHAR.values()), *(m.replace(" ", "") for m in MERGES), "<|startoftext|>", "<|endoftext|>"]
    return {t: i for i, t in enumerate(tokens)}


def tokenizer_json(vocab, merges):
    """What the hub's tokenizer.json of CLIP says, with a small vocabulary."""
    added = [dict(id=vocab[t], content=t, single_word=False, lstrip=False, rstrip=False, normalized=normalized, special=True)
             for t, normalized in (("<|startoftext|>", True), ("<|endoftext|>", False))]
    split = dict(type="Split", pattern=dict(Regex=clip.PATTERN), behavior="Removed", invert=True)
    normalizers = [dict(type="NFC"), dict(type="Replace", pattern=dict(Regex=r"\s+"), content=" "), dict(type="Lowercase")]
    model = dict(type="BPE", dropout=None, unk_token="<|endoftext|>", continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False,
                 vocab=vocab, merges=merges)
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=dict(type="Sequence", normalizers=normalizers),
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)]),
                post_processor=dict(type="RobertaProcessing", sep=["<|endoftext|>", vocab["<|endoftext|>"]], cls=["<|startoftext|>", vocab["<|startoftext|>"]],
                                    trim_offsets=False, add_prefix_space=False), decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True), model=model)


def write_tokenizer(folder):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocabulary(), MERGES), ensure_ascii=False))


def randomize(model, seed=0):
    """Norms and biases included, and large enough that a mistake is far above rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.ndim == 1))
    return model


def config_json(c):
    towers = {name: dict(hidden_size=t.width, num_hidden_layers=t.num_layers, num_attention_heads=t.num_heads, intermediate_size=t.hidden,
                         hidden_act=t.activation) for name, t in (("text_config", c.text), ("vision_config", c.vision))}
    towers["text_config"] |= dict(eos_token_id=2, vocab_size=c.vocab_size)             # 2, as the hub's say
    return dict(architectures=["CLIPModel"], projection_dim=c.projection, **towers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of random weights, as transformers would write it."""
    path = tmp_path_factory.mktemp("clip")
    config = replace(TINY, vocab_size=len(vocabulary()))
    write_tokenizer(path)
    (path / "config.json").write_text(json.dumps(config_json(config)))
    save_file(dict(randomize(Clip(config)).named_parameters()), path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_clip(folder)


def changed(folder, tmp_path, weights=None, **files):
    """A copy of the checkpoint with other weights (a function of the dict) or other files (text)."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if weights:
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t.contiguous() for n, t in weights(tensors).items()}, tmp_path / "model.safetensors")
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def images(folder, num=5, seed=0):
    from PIL import Image
    rng, found = np.random.default_rng(seed), {}
    folder.mkdir(exist_ok=True)
    for n in range(num):
        path = folder / f"{n}.png"
        Image.fromarray(rng.integers(0, 256, (30 + 7 * n, 41, 3), dtype=np.uint8)).save(path)
        found[path.name] = path
    return found


# -----------------------------------------------------------------------------
# Towers


@pytest.mark.parametrize("name, width, layers, patch, size, text_width, projection, tokens, parameters", [
    ("B/32", 768, 12, 32, 224, 512, 512, 50, 151_277_313), ("B/16", 768, 12, 16, 224, 512, 512, 197, 149_620_737),
    ("L/14", 1024, 24, 14, 224, 768, 768, 257, 427_616_513), ("L/14-336", 1024, 24, 14, 336, 768, 768, 577, 427_944_193)])
def test_parameters_of_the_published_models(name, width, layers, patch, size, text_width, projection, tokens, parameters):
    config = ClipConfig(Tower(text_width, 12, text_width // 64, 4 * text_width), Tower(width, layers, width // 64, 4 * width), projection, patch, size)
    with torch.device("meta"):
        model = Clip(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.vision_model.embeddings.position_embedding.num_embeddings == tokens
    # the sizes are found again from shapes alone, the heads as width / 64
    assert clip.config_from({n: list(p.shape) for n, p in model.named_parameters()}, {}, "x") == config


def their_model(tmp_path, activation, end_id, eps=1e-5):
    transformers = pytest.importorskip("transformers")
    vocab = vocabulary()
    common = dict(hidden_act=activation, layer_norm_eps=eps, projection_dim=24)
    config = transformers.CLIPConfig(
        text_config=dict(vocab_size=len(vocab), hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, eos_token_id=end_id,
                         bos_token_id=0, pad_token_id=1, **common),
        vision_config=dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3, image_size=20, patch_size=5, **common),
        projection_dim=24)
    model = randomize(transformers.CLIPModel(config)).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    return model


@pytest.mark.parametrize("activation, wrong_end, eps", [("quick_gelu", True, 1e-5), ("gelu", False, 1e-5), ("quick_gelu", False, 0.1)])
def test_both_towers_are_those_of_transformers(tmp_path, activation, wrong_end, eps):
    theirs = their_model(tmp_path, activation, 2 if wrong_end else vocabulary()["<|endoftext|>"], eps)
    ours, tokenizer = load_clip(tmp_path)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    ids = tokenizer.encode(["the cat", "", "hello " * 100, "photo of the cat!!!"])
    pixels = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text, image = ours.text_features(ids), ours.image_features(pixels)
        expected = theirs(input_ids=ids, pixel_values=pixels)
        for mine, other in ((text, theirs.get_text_features(ids).pooler_output), (image, theirs.get_image_features(pixels).pooler_output)):
            assert mine.std() > 0.1                             # parity of zeros would say nothing
            assert (mine - other).abs().max() < 1e-5 * other.abs().max()
        assert (clip.score(image, text, ours.logit_scale) - expected.logits_per_image).abs().max() < 1e-5 * expected.logits_per_image.abs().max()


def test_text_is_read_at_the_first_end_token_and_padding_has_no_influence(loaded):
    model, tokenizer = loaded
    ids = tokenizer.encode(["the cat"])
    length = int((ids[0] == tokenizer.end_id).int().argmax()) + 1
    with torch.no_grad():
        expected = model.text_features(ids)
        for padding in (0, 1, 7, tokenizer.end_id):
            padded = ids.clone()
            padded[0, length:] = padding
            assert torch.equal(model.text_features(padded), expected)
        assert (model.text_features(ids[:, :length]) - expected).abs().max() < 1e-5
        ids[0, 1] = 5
        assert (model.text_features(ids) - expected).abs().max() > 1e-2
    ids[ids == tokenizer.end_id] = 0
    with pytest.raises(ValueError, match=f"the end token {tokenizer.end_id} in each"):
        model.text_features(ids)
    with pytest.raises(ValueError, match="at most 77 ids"):
        model.text_features(torch.full((1, 78), tokenizer.end_id))


def test_activation_and_score_in_numbers():
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch.testing.assert_close(clip.ACTIVATIONS["quick_gelu"](x), torch.tensor([0.8457957659, -0.0643413769], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(clip.ACTIVATIONS["gelu"](x), torch.tensor([0.8413447461, -0.0455002639], dtype=torch.float64), atol=1e-9, rtol=0)
    initial = float(np.log(1 / 0.07))
    scores = clip.score(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, -1.0]]), torch.tensor(initial))
    assert scores.shape == (1, 2) and torch.allclose(scores, torch.tensor([[0.6, -0.8]]) / 0.07)


def to_original(weights):
    """The inverse of from_original, written apart from it: OpenAI's spelling of {name: tensor}."""
    original = dict(input_resolution=torch.tensor(20), context_length=torch.tensor(77), vocab_size=torch.tensor(1))
    for prefix, there in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        layers = sorted({n.split(".")[3] for n in weights if n.startswith(f"{prefix}.encoder")})
        for n in layers:
            old, new = f"{prefix}.encoder.layers.{n}", f"{there}.resblocks.{n}"
            for kind in ("weight", "bias"):
                original[f"{new}.attn.in_proj_{kind}"] = torch.cat([weights[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
                original[f"{new}.attn.out_proj.{kind}"] = weights[f"{old}.self_attn.out_proj.{kind}"]
                original[f"{new}.ln_1.{kind}"], original[f"{new}.ln_2.{kind}"] = (weights[f"{old}.layer_norm{i}.{kind}"] for i in (1, 2))
                original[f"{new}.mlp.c_fc.{kind}"], original[f"{new}.mlp.c_proj.{kind}"] = (weights[f"{old}.mlp.fc{i}.{kind}"] for i in (1, 2))
    for kind in ("weight", "bias"):
        original[f"ln_final.{kind}"] = weights[f"text_model.final_layer_norm.{kind}"]
        original[f"visual.ln_pre.{kind}"] = weights[f"vision_model.pre_layrnorm.{kind}"]
        original[f"visual.ln_post.{kind}"] = weights[f"vision_model.post_layernorm.{kind}"]
    return original | {
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": weights["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": weights["visual_projection.weight"].T, "text_projection": weights["text_projection.weight"].T, "logit_scale": weights["logit_scale"]}


def test_original_spelling_is_converted(folder, loaded, tmp_path):
    converted, _ = load_clip(changed(folder, tmp_path, to_original))
    for name, p in loaded[0].named_parameters():
        assert torch.equal(converted.get_parameter(name), p), name
    assert converted.name == loaded[0].name


def test_position_ids_are_dropped_and_half_precision_is_widened(folder, loaded, tmp_path):
    path = changed(folder, tmp_path, lambda w: {n: t.half() for n, t in w.items()} | {"text_model.embeddings.position_ids": torch.arange(77)[None]})
    model, _ = load_clip(path)
    assert model.logit_scale.dtype == torch.float32 and torch.equal(model.text_projection.weight, loaded[0].text_projection.weight.half().float())
    assert model.name != loaded[0].name                         # other numbers, another name


def test_sharded_folders(folder, loaded, tmp_path):
    path, weights = changed(folder, tmp_path), load_file(folder / "model.safetensors")
    (path / "model.safetensors").unlink()
    where = {n: f"model-0000{1 + n.startswith('vision')}-of-00002.safetensors" for n in weights}
    for file in set(where.values()):
        save_file({n: t for n, t in weights.items() if where[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    assert load_clip(path)[0].name == loaded[0].name
    where["logit_scale"] = "model-00002-of-00002.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=where)))
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: logit_scale is missing"):
        load_clip(path)


def test_the_name_depends_on_settings_that_the_weights_do_not_show(folder, loaded, tmp_path):
    other = config_json(replace(TINY, vocab_size=len(vocabulary()), text=replace(TINY.text, num_heads=2)))
    assert load_clip(changed(folder, tmp_path, config=other))[0].name != loaded[0].name


@pytest.mark.parametrize("weights, error", [
    (lambda w: {n: t for n, t in w.items() if n != "text_model.encoder.layers.1.mlp.fc2.bias"},
     r"model.safetensors: 1 missing tensors, among them text_model.encoder.layers.1.mlp.fc2.bias"),
    (lambda w: w | {"text_model.extra": torch.ones(1)}, r"model.safetensors: 1 unexpected tensors, among them text_model.extra"),
    (lambda w: w | {"vision_model.post_layernorm.bias": torch.ones(7)},
     r"model.safetensors: vision_model.post_layernorm.bias has shape \[7\], expected \[48\]"),
    (lambda w: {"a": torch.ones(1)}, r"expected a tensor text_model.encoder.layers.0.mlp.fc1.weight of 2 dimensions, found none among 1"),
    (lambda w: w | {"text_projection.weight": torch.ones(24)}, r"expected a tensor text_projection.weight of 2 dimensions, found shape \[24\]"),
    (lambda w: w | {"vision_model.embeddings.position_embedding.weight": torch.ones(16, 48)}, "16 positions of the vision model are no square"),
])
def test_tensors_that_do_not_fit_are_named(folder, tmp_path, weights, error):
    with pytest.raises(ValueError, match=error):
        load_clip(changed(folder, tmp_path, weights))


@pytest.mark.parametrize("change, error", [
    (dict(hidden_act="silu"), r"config.json: .*hidden_act to be one of quick_gelu, gelu, found 4 and 'silu'"),
    (dict(num_attention_heads=5), r"text_config.num_attention_heads to divide 32 .*found 5"),
    (dict(hidden_size=64), "text_config.hidden_size is 64, but the tensors have 32"),
    (dict(num_hidden_layers=12), "text_config.num_hidden_layers is 12, but the tensors have 2"),
    (dict(vocab_size=49408), "text_config.vocab_size is 49408"),
])
def test_settings_that_do_not_fit_are_named(folder, tmp_path, change, error):
    config = config_json(replace(TINY, vocab_size=len(vocabulary())))
    config["text_config"] |= change
    with pytest.raises(ValueError, match=error):
        load_clip(changed(folder, tmp_path, config=config))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder, tmp_path):
    name, config = "text_model.embeddings.token_embedding.weight", config_json(replace(TINY, vocab_size=100))
    with pytest.raises(ValueError, match=f"the tokenizer has ids up to {len(vocabulary()) - 1}, the model has 100 token embeddings"):
        load_clip(changed(folder, tmp_path, lambda w: w | {name: w[name][:100]}, config=config))


def test_damaged_folders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no config.json there"):
        load_clip(tmp_path / "nowhere")
    for change, error in ((dict(resample=2), "resample is 2, only 3 is supported"), (dict(image_mean=[0.5] * 3), "image_mean is"), (dict(crop_size=24), "crop_size is 24, only 20"),
                          (dict(size=dict(height=20, width=20)), "size is .*only 20 is supported")):
        path = changed(folder, tmp_path, preprocessor_config=dict(size=20, crop_size=20, resample=3) | change)
        with pytest.raises(ValueError, match=f"preprocessor_config.json: {error}"):
            load_clip(path)
    (path / "preprocessor_config.json").write_text(json.dumps(dict(size=dict(shortest_edge=20), crop_size=dict(height=20, width=20), resample=3)))
    load_clip(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json: not there; expected it, or both vocab.json and merges.txt|vocab.json: not there"):
        load_clip(path)
    data = (path / "model.safetensors").read_bytes()
    for cut in (5, 300, len(data) - 1):
        (path / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="model.safetensors: cannot be read .*truncated"):
            load_clip(path)


# -----------------------------------------------------------------------------
# Texts

TEXTS = ["a photo of the cat", "Hello, THE Photo's!!!  it'S", "한국어 문장, 한국!", "😀👩‍👩‍👧‍👦 ok", "", "  \t\n", "a" * 300, "ΟΔΟΣ Σ ΑΣ. İstanbul ǅ ß ẞ", "don't I'll we've 'sup 12345 １２３ ½",
         "é e\u0301 \u0344\u1100\u1161 \x00\x01\x1c\x85\xa0b\u3000c\u200b", "the cat " * 60, "\n\n#!!!'s", "\ud800 lone", "x\ufffd\U0010fffd", "<|startofTEXT", "a</w> </w>"]


def tokens_of(tokenizer, text):
    names = {i: t for t, i in vocabulary().items()}
    return [names[i] for i in tokenizer.ids(text)]


def test_merges_and_words_by_hand(loaded):
    tokenizer = loaded[1]
    assert tokens_of(tokenizer, "The CAT") == ["the</w>", "cat</w>"]
    assert tokens_of(tokenizer, "hello hell") == ["hello</w>", "he", "ll</w>"]           # "he ll" joins inside a word only
    assert tokens_of(tokenizer, "cat's!!!") == ["cat</w>", "'s</w>", "!!!</w>"]
    assert tokens_of(tokenizer, "12") == ["1</w>", "2</w>"]                             # every digit is a word
    assert tokens_of(tokenizer, "aaaaa") == ["aaaaa</w>"] and tokens_of(tokenizer, "aaaa") == ["aa", "a", "a</w>"]
    assert tokens_of(tokenizer, "\n") == [] and tokens_of(tokenizer, "") == []


def test_rows_are_cut_and_padded_and_keep_their_end(loaded):
    tokenizer = loaded[1]
    start, end = tokenizer.start_id, tokenizer.end_id
    assert (start, end) == (vocabulary()["<|startoftext|>"], vocabulary()["<|endoftext|>"])
    rows = tokenizer.encode(["", "the cat", "cat " * 75, "cat " * 76, "cat " * 9999])
    assert rows.shape == (5, 77) and rows.dtype == torch.int64
    assert rows[0].tolist() == [start] + [end] * 76
    assert rows[1].tolist() == [start, *tokenizer.ids("the cat")] + [end] * 74
    for row in rows[2:]:
        assert row.tolist() == [start, *tokenizer.ids("cat") * 75, end]
    typed = tokenizer.ids("<|endoftext|> cat")                  # a user's text cannot end the text
    assert end not in typed and typed[-1] == vocabulary()["cat</w>"]


def test_a_megabyte_is_read_in_time(loaded):
    assert len(loaded[1].ids("a" * 1_000_000)) > 100_000 and loaded[1].ids(" " * 1_000_000) == []


def test_ids_are_those_of_transformers(folder, tmp_path, loaded):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    theirs_backend, ours = theirs.backend_tokenizer, loaded[1]
    rng = np.random.default_rng(0)
    for text in TEXTS + ["".join(map(chr, rng.choice([*range(32, 127), *range(0xA0, 0x250), 10, 0x3A3, 0x20AC], 80))) for _ in range(200)]:
        clean = text.encode("utf-8", "replace").decode() if "\ud800" not in text else "\ufffd lone"
        assert [ours.start_id, *ours.ids(text), ours.end_id] == theirs_backend.encode(clean).ids, repr(text)
    # every character of Unicode 3.2: the tables of one library may be newer than those of the other
    known = [c for c in map(chr, range(0x30000)) if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs", "Co")]
    text = "".join(f"a{c}b " for c in known)
    assert len(known) > 90_000 and ours.ids(text) == theirs_backend.encode(text).ids[1:-1]
    batch = theirs(TEXTS[:12], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(batch["input_ids"], ours.encode(TEXTS[:12]))
    theirs.save_pretrained(tmp_path)                            # as today's transformers write the file
    assert [ClipTokenizer.from_folder(tmp_path).ids(t) for t in TEXTS] == [ours.ids(t) for t in TEXTS]


def test_vocab_and_merges_files(tmp_path, loaded):
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    tokenizer = ClipTokenizer.from_folder(tmp_path)
    assert [tokenizer.ids(t) for t in TEXTS] == [loaded[1].ids(t) for t in TEXTS]


def test_other_tokenizers_are_refused(tmp_path):
    def refused(error, change):
        spec = tokenizer_json(vocabulary(), MERGES)
        change(spec)
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(ValueError, match="tokenizer.json: " + error):
            ClipTokenizer.from_folder(tmp_path)
    refused("not the tokenizer of a CLIP: expected '</w>', found None", lambda s: s["model"].update(end_of_word_suffix=None))
    refused(r"not the tokenizer of a CLIP: expected \['NFC'.*found \['NFC'\]", lambda s: s.update(normalizer=dict(normalizers=[dict(type="NFC")])))
    refused("not the tokenizer of a CLIP", lambda s: s["pre_tokenizer"]["pretokenizers"].pop(0))
    refused("expected every byte in the vocabulary", lambda s: s["model"]["vocab"].pop("k</w>"))
    refused(r"merge 28 \('q q'\): expected two tokens", lambda s: s["model"]["merges"].append("q q"))
    refused("expected the tokens <|startoftext|>".replace("|", r"\|"), lambda s: (s["added_tokens"].pop(0), s["model"]["vocab"].pop("<|startoftext|>")))
    refused("not a tokenizer file of the tokenizers library", lambda s: s.pop("model"))


# -----------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
@pytest.mark.parametrize("shape", [(50, 37), (37, 50), (20, 20), (7, 9), (200, 33)])
def test_pixels_are_those_of_transformers(tmp_path, mode, shape):
    transformers = pytest.importorskip("transformers")
    from PIL import Image
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    theirs = transformers.models.clip.CLIPImageProcessorPil(size=dict(shortest_edge=20), crop_size=dict(height=20, width=20))
    expected = torch.as_tensor(np.array(theirs(Image.open(path))["pixel_values"][0]))
    ours = load_pixels(path, 20)
    assert ours.shape == (3, 20, 20) and ours.dtype == torch.float32 and (ours - expected).abs().max() < 1e-6


def test_pixels_of_a_flat_image_and_of_stripes(tmp_path):
    from PIL import Image
    Image.new("RGB", (64, 32), (255, 128, 0)).save(tmp_path / "flat.png")
    pixels = load_pixels(tmp_path / "flat.png", 16)
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(pixels, expected[:, None, None].expand(3, 16, 16), atol=1e-6)
    # columns of one pixel, black and white: with antialiasing eight of them are one grey, without they are black or white
    Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (128, 64))).save(tmp_path / "stripes.png")
    grey = load_pixels(tmp_path / "stripes.png", 16)[:, 2:-2, 2:-2] * 0.27 + 0.45
    assert grey.std() < 0.05 and (grey - 0.5).abs().max() < 0.1


def test_images_that_cannot_be_read_are_named(tmp_path):
    from PIL import Image
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for name in ("a.png", "a.jpg", "a.gif", "a.bmp"):
        image.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for cut in (0, 3, len(whole) // 2):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=f"{name}: cannot be read as an image"):
                load_pixels(tmp_path / name, 20)
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(rng.integers(0, 65536, (9, 9), dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (1, 101)).save(tmp_path / "long.png")
    for name, error in (("text.png", "cannot identify"), ("gone.png", "No such file"), ("deep.png", "more than 8 bits a channel"), ("long.png", "1 x 101 pixels: too long")):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an image: .*{error}"):
            load_pixels(tmp_path / name, 20)


# -----------------------------------------------------------------------------
# Files of embeddings


def unit_rows(n=6, d=4, dtype=np.float32):
    emb = np.random.default_rng(0).standard_normal((n, d))
    return (emb / np.linalg.norm(emb, axis=1, keepdims=True)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_written_read_and_written_again(tmp_path, dtype):
    ids, emb = ["a", "b/ü.png", "한", "", "e e", "f"], unit_rows(dtype=dtype)
    save_embeddings(tmp_path / "a.npz", ids, emb, "some model", True)
    e = load_embeddings(tmp_path / "a.npz")
    assert e.ids == ids and e.model == "some model" and e.normalized is True
    assert isinstance(e.emb, np.memmap) and e.emb.dtype == dtype and np.array_equal(e.emb, emb)
    save_embeddings(tmp_path / "b.npz", *e)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    np.savez_compressed(tmp_path / "c.npz", ids=np.array(ids), emb=np.asfortranarray(emb), model="some model", normalized=True)   # not by us
    c = load_embeddings(tmp_path / "c.npz")
    assert c.ids == ids and np.array_equal(c.emb, emb) and not isinstance(c.emb, np.memmap)
    np.savez(tmp_path / "d.npz", ids=np.array(ids), emb=np.asfortranarray(emb), model="some model", normalized=True)
    assert np.array_equal(load_embeddings(tmp_path / "d.npz").emb, emb)
    check_same(e, c)


@pytest.mark.parametrize("change, error", [
    (dict(ids=["a", "b", "a", "c", "d", "e"]), "the id 'a' occurs twice"), (dict(ids=["a", "b"]), "2 ids for 6 rows"),
    (dict(emb=unit_rows() * 2), "the row of 'a' has length 2, expected 1"), (dict(emb=unit_rows()[0]), r"found shape \(4,\)"),
    (dict(emb=unit_rows().astype(np.float64)), "of float64"), (dict(emb=unit_rows()[:0], ids=[]), r"shape \(0, 4\)"),
    (dict(emb=np.where(np.arange(24).reshape(6, 4) == 9, np.nan, unit_rows())), "the row of 'c' has length nan, expected 1"),
    (dict(emb=np.where(np.arange(24).reshape(6, 4) == 9, np.inf, unit_rows()), normalized=False), "the row of 'c' has length inf, expected finite"),
    (dict(model=""), "expected the model's name"),
])
def test_wrong_embeddings_are_neither_written_nor_read(tmp_path, change, error):
    right = dict(ids=list("abcdef"), emb=unit_rows(), model="m", normalized=True)
    wrong = right | change
    if wrong["emb"].dtype == np.float64 and "float64" not in error:
        wrong["emb"] = wrong["emb"].astype(np.float32)
    with pytest.raises(ValueError, match=rf"a.npz: .*{error}"):
        save_embeddings(tmp_path / "a.npz", **wrong)
    assert not list(tmp_path.iterdir())
    np.savez(tmp_path / "a.npz", **wrong | dict(ids=np.array(wrong["ids"], dtype=np.str_)))
    with pytest.raises(ValueError, match="a.npz: "):
        load_embeddings(tmp_path / "a.npz")


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    right = dict(ids=np.array(list("abcdef")), emb=unit_rows(), model=np.array("m"), normalized=np.array(True))
    for change, error in ((dict(ids=np.array(list("abcdef"), dtype=object)), "allow_pickle=False"), (dict(emb=unit_rows().astype(object)), "expected numbers in emb, found object"),
                          (dict(ids=np.arange(6)), "ids .* of str"), (dict(model=np.array(3)), "model a str"), (dict(normalized=np.array(1)), "normalized a bool")):
        np.savez(path, **right | change)
        with pytest.raises(ValueError, match=f"a.npz: cannot be read as a file of embeddings: .*{error}"):
            load_embeddings(path)
    np.savez(path, **{k: v for k, v in right.items() if k != "model"})
    with pytest.raises(ValueError, match="a.npz: .*found no model.npy"):
        load_embeddings(path)
    np.savez(path, **right)
    load_embeddings(path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="a.npz: cannot be read"):
            load_embeddings(path)
    at = whole.index(unit_rows().tobytes()) + 7
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])               # one bit of one number
    with pytest.raises(ValueError, match="a.npz: .*emb.npy"):
        load_embeddings(path)
    with pytest.raises(ValueError, match="gone.npz"):
        load_embeddings(tmp_path / "gone.npz")
    with pytest.raises(ValueError, match="ends in .npz"):
        save_embeddings(tmp_path / "a.npy", list("abcdef"), unit_rows(), "m", True)


def test_files_of_two_models_are_not_compared():
    a = Embeddings(["a"], unit_rows(1), "one", True)
    check_same(a, a)
    for change, error in ((dict(model="two"), "differ in model: one and two"), (dict(normalized=False), "differ in normalized"), (dict(emb=unit_rows(1, 5)), "in width: 4 and 5")):
        with pytest.raises(ValueError, match=error):
            check_same(a, a._replace(**change))


# -----------------------------------------------------------------------------
# Embedding


def test_embeddings_are_the_models_by_id(tmp_path, loaded):
    model, tokenizer = loaded
    files, texts = images(tmp_path / "images"), {"t1": "the cat", "t2": "", "t3": "hello " * 99}
    summary = embed(model, tokenizer, tmp_path / "a.npz", files, texts, batch_size=2)
    assert summary == dict(num_images=5, num_texts=3, num_cut=1, num_resumed=0)
    e = load_embeddings(tmp_path / "a.npz")
    assert e.ids == [*files, *texts] and (e.model, e.normalized) == (model.name, True)
    with torch.no_grad():
        expected = torch.cat([model.image_features(torch.stack([load_pixels(f, 20) for f in files.values()])), model.text_features(tokenizer.encode([*texts.values()]))])
    assert np.abs(e.emb - F.normalize(expected, dim=-1).numpy()).max() < 1e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "images"]             # nothing temporary is left
    embed(model, tokenizer, tmp_path / "b.npz", files, texts, dtype="float16", normalize=False)
    half = load_embeddings(tmp_path / "b.npz")
    assert half.emb.dtype == np.float16 and not half.normalized and np.allclose(half.emb, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="a.npz: exists"):
        embed(model, tokenizer, tmp_path / "a.npz", files, texts)


def stop_after(monkeypatch, num_images):
    """The process dies when it reads image `num_images`; returns the list of images read."""
    read, real = [], load_pixels

    def dying(path, size):
        if len(read) == num_images:
            raise KeyboardInterrupt
        read.append(path.name)
        return real(path, size)
    monkeypatch.setattr(clip, "load_pixels", dying)
    return read


@pytest.mark.parametrize("torn", [b"", b"part of a row"])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(tmp_path, loaded, monkeypatch, torn):
    files, texts = images(tmp_path / "images", 7), {f"t{n}": "the cat " * n for n in range(5)}
    embed(*loaded, tmp_path / "whole.npz", files, texts, batch_size=2)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)                                    # within the third batch
        with pytest.raises(KeyboardInterrupt):
            embed(*loaded, tmp_path / "a.npz", files, texts, batch_size=2)
    assert not (tmp_path / "a.npz").exists() and (tmp_path / "a.npz.rows").stat().st_size == 4 * 24 * 4
    with open(tmp_path / "a.npz.rows", "ab") as f:
        f.write(torn)
    with monkeypatch.context() as patch:
        read = stop_after(patch, 99)
        assert embed(*loaded, tmp_path / "a.npz", files, texts, batch_size=2)["num_resumed"] == 4
    assert sorted(read) == ["4.png", "5.png", "6.png"]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


def test_a_broken_image_costs_nothing_but_its_removal(tmp_path, loaded):
    files = images(tmp_path / "images", 8)
    whole = files["5.png"].read_bytes()
    files["5.png"].write_bytes(whole[:200])
    with pytest.raises(ValueError, match="5.png: cannot be read as an image"):
        embed(*loaded, tmp_path / "a.npz", files, batch_size=2)
    rest = {i: f for i, f in files.items() if i != "5.png"}
    assert embed(*loaded, tmp_path / "a.npz", rest, batch_size=2)["num_resumed"] == 4
    embed(*loaded, tmp_path / "b.npz", rest, batch_size=2)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("change", ["image", "batch_size", "dtype", "model", "texts"])
def test_rows_of_other_inputs_are_not_taken_over(tmp_path, loaded, monkeypatch, change):
    files, texts, options = images(tmp_path / "images", 4), {"t1": "cat", "t2": "dog"}, dict(batch_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(clip, "save_embeddings", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            embed(*loaded, tmp_path / "a.npz", files, texts, **options)
    model, expected = loaded[0], 0
    if change == "image":
        files["2.png"].write_bytes(files["3.png"].read_bytes())
        expected = 2
    elif change == "texts":
        texts["t2"], expected = "pig", 4
    elif change == "model":
        model = randomize(Clip(loaded[0].config), seed=1)
        model.name = "another"
    else:
        options[change] = {"batch_size": 3, "dtype": "float16"}[change]
    assert embed(model, loaded[1], tmp_path / "a.npz", files, texts, **options)["num_resumed"] == expected
    embed(model, loaded[1], tmp_path / "b.npz", files, texts, **options)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_inputs_that_cannot_be_embedded_are_named(tmp_path, loaded):
    files = images(tmp_path / "images", 2)
    with pytest.raises(ValueError, match="ids of their own.*0.png"):
        embed(*loaded, tmp_path / "a.npz", files, {"0.png": "cat"})
    with pytest.raises(ValueError, match="found 0 and 0"):
        embed(*loaded, tmp_path / "a.npz")
    with pytest.raises(ValueError, match="9.png: no such image"):
        embed(*loaded, tmp_path / "a.npz", files | {"9": tmp_path / "9.png"})
    model = randomize(Clip(loaded[0].config))
    model.text_projection.weight.data *= 1e6
    with pytest.raises(ValueError, match="the embedding of 't' is not finite in float16"):
        embed(model, loaded[1], tmp_path / "a.npz", texts={"t": "cat"}, dtype="float16", normalize=False)
    for line, error in (('{"id": 3, "text": "a"}', "expected an object with the strings"), ('{"id": "a"}', '"text"'), ("[]", "expected an object"),
                        ("{", "not valid JSON"), ('{"id": "x", "text": "a"}', "'x' is there already")):
        (tmp_path / "t.jsonl").write_text('{"id": "x", "text": "b"}\n\n' + line + "\n")
        with pytest.raises(ValueError, match=f"t.jsonl:3: .*{error}"):
            clip.read_texts(tmp_path / "t.jsonl")


def test_images_of_a_folder_or_a_list(tmp_path, capsys):
    files = images(tmp_path / "images", 2)
    (tmp_path / "images" / "notes.txt").write_text("x")
    (tmp_path / "images" / ".hidden.png").write_text("x")
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "sub" / "c.JPG").write_text("x")
    assert clip.image_files(tmp_path / "images") == files | {"sub/c.JPG": tmp_path / "images" / "sub" / "c.JPG"}
    assert "1 files without the suffix" in capsys.readouterr().err
    (tmp_path / "list.jsonl").write_text('{"id": "first", "image": "images/0.png"}\n')
    assert clip.image_files(tmp_path / "list.jsonl") == {"first": tmp_path / "images" / "0.png"}


def test_command_line(tmp_path, folder, capsys):
    files = images(tmp_path / "images", 2)
    (tmp_path / "t.jsonl").write_text('{"id": "t1", "text": "the cat"}\n')
    clip.main(parse_config(clip.Config, [f"--clip={folder}", f"--images={tmp_path}/images", f"--texts={tmp_path}/t.jsonl", f"--out={tmp_path}/a.npz", "--dtype=float16"]))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    e = load_embeddings(tmp_path / "a.npz")
    assert e.ids == [*files, "t1"] and summary["num_texts"] == 1 and summary["model"] == e.model and summary["width"] == 24 and e.emb.dtype == np.float16
    with pytest.raises(ValueError, match="expected --clip, --out, --images or --texts"):
        clip.main(clip.Config(out="b.npz"))


# -----------------------------------------------------------------------------
# Whole runs on CLIP's embeddings: people whose types are fitted to them, and an agent of slates


def test_an_agent_in_a_user_model_of_clip(folder, loaded, tmp_path, monkeypatch):
    import checkpoint
    import train_iql
    from user_model import Origin, UserModel, UserModelConfig
    monkeypatch.chdir(tmp_path)
    model, _ = loaded
    people = UserModel(UserModelConfig(num_types=2, width=24)).init_weights(0)
    (tmp_path / "users").mkdir()
    checkpoint.save_hf(people, Origin(model.name, "all", "made up"), tmp_path / "users" / "clip")
    checkpoint.save_hf(people, Origin("another encoder", "all", "made up"), tmp_path / "users" / "other")
    settings = dict(method="iql", num_steps=2, sim_sessions=30, hidden_size=16, num_layers=1, eval_people=6, val_people=4, eval_every=0, log_every=1)
    run = lambda simulator, evaluate: train_iql.main(train_iql.Config(simulator=simulator, evaluate=evaluate, embeddings=f"clip:{folder}", overwrite=True, **settings))
    found = run("users/clip", "users/clip")
    assert {"clip iql", "clip random"} <= found.keys() and np.isfinite(found["clip iql"]["mean"])
    with pytest.raises(ValueError, match="fitted to embeddings of another encoder"):
        run("users/other", "users/clip")
    with pytest.raises(ValueError, match="the hidden world has embeddings of its own"):
        run("users/clip", "world")
