"""Parity with transformers, both ways, on tiny random weights; and what is refused instead of being loaded and silently wrong."""
import json
import os
import shutil
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from model import ModelConfig, RopeScaling, Transformer, add_lora
from tokenizer import Tokenizer

TINY = ModelConfig(vocab_size=272, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
# 512 positions: of the four frequencies the first is kept, the second blended, the others divided by 8
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512)
KINDS = {
    "llama3": replace(TINY, rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 512), norm_eps=1e-5),
    "smollm2": replace(TINY, num_heads=3, num_kv_heads=1, hidden_size=24, rope_theta=1e5, tie_embeddings=True),
    "qwen2": replace(TINY, qkv_bias=True, rope_theta=1e6),
    "qwen2-tied": replace(TINY, qkv_bias=True, tie_embeddings=True, num_kv_heads=4),
    "qwen3": replace(TINY, qk_norm=True, head_dim=12, rope_theta=1e6),
    "qwen3-tied": replace(TINY, qk_norm=True, head_dim=12, tie_embeddings=True, num_kv_heads=1),
}


def randomize(model, seed=0):
    """Every parameter random, norms and biases included, and large enough that a mistake is far above rounding."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.ndim == 1))
    return model


def their_config(c):
    """The config of transformers for a ModelConfig, written apart from config_to_hf."""
    import transformers
    rope = dict(rope_theta=c.rope_theta, rope_type="default")
    if c.rope_scaling:
        rope |= LLAMA3
    kind = transformers.Qwen3Config if c.qk_norm else transformers.Qwen2Config if c.qkv_bias else transformers.LlamaConfig
    own_head_dim = {} if c.qkv_bias else dict(head_dim=c.head_dim)
    return kind(vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_layers,
                num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, max_position_embeddings=c.max_positions,
                rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings, rope_parameters=rope, **own_head_dim)


def their_model(kind):
    transformers = pytest.importorskip("transformers")
    return randomize(transformers.AutoModelForCausalLM.from_config(their_config(KINDS[kind]), dtype=torch.float32)).eval()


def save_theirs(model, path, **options):
    model.save_pretrained(path, **options)
    Tokenizer.bytes().save(path)
    return path


def random_ids(*shape):
    return torch.randint(0, 272, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_equal_logits(ours, theirs):
    # the same bits: what differs here is multiplied by the position
    assert torch.equal(ours.inv_freq, theirs.model.rotary_emb.inv_freq)
    # near the start, and far beyond every context length here
    ids = random_ids(2, 150)
    for offset in (0, 100_000):
        positions = torch.arange(150)[None] + offset
        expected = theirs(ids, position_ids=positions).logits
        found = ours(ids, positions.expand(2, -1)) @ ours.lm_head.weight.T
        assert expected.std() > 0.5
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# -----------------------------------------------------------------------------
# From transformers, and to transformers


@pytest.mark.parametrize("kind", KINDS)
def test_load_what_transformers_saved(kind, tmp_path):
    theirs = their_model(kind)
    ours, tokenizer = checkpoint.load_hf(save_theirs(theirs, tmp_path / "theirs"))
    assert ours.config == KINDS[kind]
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == KINDS[kind].tie_embeddings
    assert all(p.requires_grad and p.dtype == torch.float32 and p.device.type == "cpu" for p in ours.parameters())
    assert tokenizer.fingerprint() == Tokenizer.bytes().fingerprint()
    assert_equal_logits(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_we_saved(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = randomize(Transformer(KINDS[kind]))
    checkpoint.save_hf(ours, Tokenizer.bytes(), tmp_path / "ours")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id == Tokenizer.bytes().end_of_turn_id
    assert_equal_logits(ours, theirs)
    again, _ = checkpoint.load_hf(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))


def test_transformers_loads_merged_lora(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = randomize(add_lora(Transformer(KINDS["qwen3-tied"]), rank=2, alpha=4.0))
    checkpoint.save_hf(ours, Tokenizer.bytes(), tmp_path / "ours")
    assert_equal_logits(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours"))


def test_transformers_loads_our_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.bytes()
    checkpoint.save_hf(Transformer(TINY).init_weights(0), tokenizer, tmp_path / "ours")
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(tmp_path / "ours")
        for text in ("a  b\n\tc", "값은 42.", "naïve 🙂", ""):
            assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
        assert theirs.convert_tokens_to_ids("<|im_end|>") == tokenizer.end_of_turn_id


def test_sharded_index(tmp_path):
    theirs = their_model("qwen3")
    path = save_theirs(theirs, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2 and not (path / "model.safetensors").exists()
    assert_equal_logits(checkpoint.load_hf(path)[0], theirs)


def test_bfloat16_weights(tmp_path):
    path = save_theirs(their_model("llama3").to(torch.bfloat16), tmp_path / "bf16")
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ours, _ = checkpoint.load_hf(path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32} and ours.compute_dtype == torch.float32
    assert ours.inv_freq.dtype == torch.float32
    assert_equal_logits(ours, theirs)

    low, _ = checkpoint.load_hf(path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16} and low.inv_freq.dtype == torch.float32
    checkpoint.save_hf(low, Tokenizer.bytes(), tmp_path / "again")
    ours, theirs = load_file(tmp_path / "again/model.safetensors"), load_file(path / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == torch.bfloat16 for n in ours)


def test_tied_table_written_twice(tmp_path):
    ours = save(tmp_path / "twice", "smollm2")
    tensors = load_file(ours / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                         "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, ours / "model.safetensors")
    model, _ = checkpoint.load_hf(ours)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


# -----------------------------------------------------------------------------
# config.json as transformers 4 and 5 write it; these need no peer


@pytest.mark.parametrize("rope", [
    dict(rope_theta=5e5, rope_scaling=LLAMA3),                                                            # transformers 4
    dict(rope_theta=5e5, rope_scaling={k if k != "rope_type" else "type": v for k, v in LLAMA3.items()}),  # and its first spelling
    dict(rope_parameters=LLAMA3 | dict(rope_theta=5e5)),                                                  # transformers 5
    dict(rope_parameters=LLAMA3, rope_theta=5e5),
])
def test_rope_spellings(rope):
    hf = hf_config("llama3")
    del hf["rope_theta"], hf["rope_scaling"]
    assert checkpoint.config_from_hf(hf | rope) == KINDS["llama3"]


def test_plain_rope_spellings():
    hf = hf_config("qwen3")
    assert hf["rope_theta"] == 1e6 and hf["rope_scaling"] is None
    assert checkpoint.config_from_hf(hf) == KINDS["qwen3"]
    del hf["rope_theta"], hf["rope_scaling"]
    assert checkpoint.config_from_hf(hf | dict(rope_parameters=dict(rope_theta=1e6, rope_type="default"))) == KINDS["qwen3"]
    assert checkpoint.config_from_hf(hf).rope_theta == 10_000.0


def test_released_config_files():
    """The fields that matter of released config.json files, as they were uploaded."""
    llama = checkpoint.config_from_hf(dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, head_dim=64, hidden_act="silu", hidden_size=2048, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8,
        rms_norm_eps=1e-05, rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                                              rope_type="llama3"),
        rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16", vocab_size=128256))
    assert llama == ModelConfig(128256, 2048, 8192, 16, 32, 8, 64, 131072, 5e5, RopeScaling(32.0, 1.0, 4.0, 8192), 1e-5, tie_embeddings=True)
    qwen = checkpoint.config_from_hf(dict(
        architectures=["Qwen2ForCausalLM"], hidden_act="silu", hidden_size=896, intermediate_size=4864, max_position_embeddings=32768,
        max_window_layers=21, num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0,
        sliding_window=32768, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936))
    assert qwen == ModelConfig(151936, 896, 4864, 24, 14, 2, 64, 32768, 1e6, qkv_bias=True, tie_embeddings=True)
    # Qwen3Config's own default: 128 a head, whatever hidden_size is
    assert checkpoint.config_from_hf({k: v for k, v in hf_config("qwen3").items() if k != "head_dim"}).head_dim == 128


def hf_config(kind):
    return checkpoint.config_to_hf(KINDS[kind], Tokenizer.bytes(), torch.float32)


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize("changes, message", [
    (dict(architectures=["MistralForCausalLM"]), "architecture 'MistralForCausalLM' is not one of LlamaForCausalLM, Qwen2ForCausalLM"),
    (dict(architectures=None), "architecture 'none given'"),
    (dict(architectures=["LlamaModel"]), "architecture 'LlamaModel'"),
    (dict(use_sliding_window=True), "use_sliding_window=True is not supported"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types=['full_attention', 'sliding_attention'] is not supported"),
    (dict(attention_bias=True), "attention_bias=True is not supported"),
    (dict(mlp_bias=True), "mlp_bias=True is not supported"),
    (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    (dict(rope_scaling=YARN), "'rope_type': 'yarn'"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "'type': 'linear'"),
    (dict(rope_parameters=YARN), "'rope_type': 'yarn'"),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "'full_attention'"),
    (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    (dict(quantization_config=dict(quant_method="fp8")), "quantization_config={'quant_method': 'fp8'} is not supported"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "'low_freq_factor' is missing"),
    (dict(num_key_value_heads=3), "num_heads (4) must be a multiple of num_kv_heads (3)"),
])
def test_refused_configs(changes, message):
    with pytest.raises(ValueError) as e:
        checkpoint.config_from_hf(hf_config("llama3") | changes, "folder/config.json")
    assert message in str(e.value)
    assert "folder/config.json" in str(e.value) or "num_heads" in message


def test_config_without_a_size():
    hf = hf_config("qwen2")
    del hf["hidden_size"]
    with pytest.raises(ValueError, match="folder/config.json: 'hidden_size' is missing"):
        checkpoint.config_from_hf(hf, "folder/config.json")


def test_model_without_a_hugging_face_name():
    with pytest.raises(ValueError, match="both q/k norm and q/k/v bias"):
        checkpoint.config_to_hf(replace(TINY, qk_norm=True, qkv_bias=True), Tokenizer.bytes(), torch.float32)


# -----------------------------------------------------------------------------
# Damaged folders


def save(path, kind="qwen3"):
    checkpoint.save_hf(randomize(Transformer(KINDS[kind])), Tokenizer.bytes(), path)
    return path


def shard(path):
    """Rewrites the folder with two shards and an index, as other trainers write them."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, path / file)
    (path / "model.safetensors").unlink()
    index = dict(metadata={}, weight_map={n: file for file, part in parts.items() for n in part})
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[:len(content) * 2 // 3])


def refused(path):
    with pytest.raises(ValueError) as e:
        checkpoint.load_hf(path)
    assert str(path) in str(e.value)
    return str(e.value)


def test_missing_files(tmp_path):
    assert "no config.json there" in refused(tmp_path)
    assert "no config.json there" in refused(tmp_path / "nowhere")
    path = save(tmp_path / "m")
    (path / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused(path)
    path = save(tmp_path / "m")
    (path / "tokenizer.json").unlink()
    refused(path)


def test_garbage_config(tmp_path):
    path = save(tmp_path / "m")
    (path / "config.json").write_text('{"architectures": [')
    assert "config.json: not valid JSON" in refused(path)
    (path / "config.json").write_text('["LlamaForCausalLM"]')
    assert "config.json: expected a JSON object, found list" in refused(path)
    (path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json: not valid JSON" in refused(path)


def test_missing_unexpected_and_misshapen_tensors(tmp_path):
    path = save(tmp_path / "m")
    edit_tensors(path, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "1 missing tensors, among them model.layers.1.mlp.up_proj.weight" in refused(path)
    path = save(tmp_path / "m")
    edit_tensors(path, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))
    assert "1 unexpected tensors, among them model.layers.0.self_attn.q_proj.bias" in refused(path)
    path = save(tmp_path / "m")
    edit_tensors(path, lambda t: t.update({"lm_head.weight": torch.zeros(271, 32)}))
    assert "lm_head.weight has shape [271, 32], expected [272, 32] from config.json" in refused(path)
    path = save(tmp_path / "m")                                            # a transposed matrix has as many numbers, in another order
    edit_tensors(path, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].T.contiguous()}))
    assert "model.layers.0.mlp.up_proj.weight has shape [32, 48], expected [48, 32]" in refused(path)


def test_truncated_weights(tmp_path):
    path = save(tmp_path / "m")
    truncate(path / "model.safetensors")
    message = refused(path)
    assert "model.safetensors: cannot be read" in message and "truncated" in message
    (path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: cannot be read" in refused(path)


def test_damaged_shards(tmp_path):
    whole, _ = checkpoint.load_hf(save(tmp_path / "whole"))
    path = shard(save(tmp_path / "m"))
    assert all(torch.equal(a, b) for a, b in zip(checkpoint.load_hf(path)[0].parameters(), whole.parameters()))
    second = path / "model-00002-of-00002.safetensors"
    shutil.copy(second, tmp_path / "good")
    truncate(second)
    assert "model-00002-of-00002.safetensors: cannot be read" in refused(path)
    second.unlink()
    assert "names files that are not there: model-00002-of-00002.safetensors" in refused(path)
    tensors = load_file(tmp_path / "good")
    name = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, second)     # the index promises what the shard does not hold
    message = refused(path)
    assert f"{name} is missing" in message and "model-00002-of-00002.safetensors" in message
    (path / "model.safetensors.index.json").write_text("{}")
    assert "expected a weight_map" in refused(path)
    (path / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: not valid JSON" in refused(path)


def test_save_hf_replaces_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    path = save(tmp_path / "m", "qwen2")
    assert sorted(p.name for p in save(path, "qwen3").parent.iterdir()) == ["m"]       # no temporary folder is left
    assert checkpoint.load_hf(path)[0].config == KINDS["qwen3"]
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.md").write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no checkpoint"):
        save(mine)
    assert (mine / "chapter1.md").read_text() == "years of work"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, "llama3")
    monkeypatch.undo()
    assert checkpoint.load_hf(path)[0].config == KINDS["qwen3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "thesis"]
