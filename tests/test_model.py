"""The Transformer, its heads, LoRA and optimizer groups, on shapes small enough to work by hand."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import model as model_module
from model import (SIZES, ModelConfig, Muon, RMSNorm, RopeScaling, ScalarHead, Transformer, add_lora, clip_grad_norm, config_for_size,
                   flops_per_token, inverse_frequencies, make_optimizers, memory_estimate, merged_state_dict, num_params, rms_norm, rotate,
                   rotations)

TINY = ModelConfig(vocab_size=48, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
KINDS = {"llama": TINY, "qwen2": replace(TINY, qkv_bias=True, tie_embeddings=True), "qwen3": replace(TINY, qk_norm=True, head_dim=12)}


def random_model(config, seed=0, **options):
    """Every parameter random, norms and biases included: a model from init_weights has identity blocks, which would hide mistakes."""
    model = Transformer(config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1))
    return model


def random_ids(*shape, seed=0, vocab_size=48):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(model, ids, **where):
    return F.linear(model(ids, **where), model.lm_head.weight)


def loss_of(model, ids, **where):
    return F.cross_entropy(logits_of(model, ids[:, :-1], **where).flatten(0, 1), ids[:, 1:].flatten())


# -----------------------------------------------------------------------------
# Arithmetic by hand


def test_rotate_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)                # pairs (1, 3) and (2, 4)
    cos, sin = rotations(torch.tensor([math.pi / 2, 0.0]), torch.float32)                  # a quarter turn, none
    assert rotate(x, cos, sin).flatten().tolist() == pytest.approx([-3.0, 2.0, 1.0, 4.0], abs=1e-6)


def test_rms_norm_by_hand():
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0])
    assert norm(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)], rel=1e-6)
    # statistics in fp32: 300² and its mean are beyond fp16's range
    assert norm(torch.tensor([300.0, 400.0], dtype=torch.float16)).tolist() == pytest.approx([0.8485, 2.2627], rel=1e-3)


def test_frequencies_by_hand():
    c = replace(TINY, head_dim=4, rope_theta=10_000.0)
    assert inverse_frequencies(c).tolist() == pytest.approx([1.0, 0.01])
    # over 64 positions the first pair turns 10.2 times (more than 4: kept), the second 0.1 times (less than 1: slowed by 8)
    assert inverse_frequencies(replace(c, rope_scaling=RopeScaling(8, 1, 4, 64))).tolist() == pytest.approx([1.0, 0.00125])
    # over 1571 positions the second turns 2.5003 times: half way between, 0.01 * (0.5001 + 0.4999 / 8)
    assert inverse_frequencies(replace(c, rope_scaling=RopeScaling(8, 1, 4, 1571)))[1].item() == pytest.approx(0.0056260, rel=1e-4)


def test_untrained_model_is_the_identity_and_pinned():
    model = Transformer(replace(TINY, qk_norm=True)).init_weights(seed=1)
    ids = random_ids(2, 5)
    torch.testing.assert_close(model(ids), model.model.norm(model.model.embed_tokens(ids)), rtol=0, atol=0)
    assert torch.equal(model.lm_head.weight, Transformer(replace(TINY, qk_norm=True)).init_weights(seed=1).lm_head.weight)
    assert not torch.equal(model.lm_head.weight, Transformer(replace(TINY, qk_norm=True)).init_weights(seed=2).lm_head.weight)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.model.layers[0].mlp.gate_proj.weight.std().item() == pytest.approx(24 ** -0.5, rel=0.1)


@pytest.mark.parametrize("changes, message", [
    (dict(num_heads=3), "num_heads (3) must be a multiple of num_kv_heads (2)"), (dict(head_dim=7), "head_dim (7) must be even")])
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError) as e:
        replace(TINY, **changes)
    assert message in str(e.value)


def test_sizes():
    config = config_for_size("tiny", vocab_size=265)
    assert config.vocab_size == 265 and config.qk_norm                     # exactly: every id that can be sampled is a token
    with pytest.raises(ValueError, match="--size=huge is unknown; the sizes are nano, tiny"):
        config_for_size("huge", 265)
    for size in SIZES:
        with torch.device("meta"):
            Transformer(config_for_size(size, 265))


# -----------------------------------------------------------------------------
# Packing and positions


@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_per_document(kind):
    model = random_model(KINDS[kind])
    documents = [random_ids(1, n, seed=n) for n in (5, 1, 9, 3)]
    ids = torch.cat(documents, dim=1)
    lengths = torch.tensor([d.shape[1] for d in documents])
    doc_ids = torch.arange(4).repeat_interleave(lengths)[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits_of(model, ids, positions=positions, doc_ids=doc_ids)
    alone = torch.cat([model.logits(d) for d in documents], dim=1)
    assert alone.abs().max() > 1
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-6 * alone.abs().max().item())
    # the mask is of documents, not of ids' values: other labels, same logits; and without it the logits differ
    torch.testing.assert_close(logits_of(model, ids, positions=positions, doc_ids=7 - doc_ids), packed, rtol=0, atol=0)
    assert (logits_of(model, ids, positions=positions)[:, 5:] - alone[:, 5:]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_across_documents_or_from_the_future(kind):
    model = random_model(KINDS[kind])
    inputs = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: inputs.append(out) or out.retain_grad())
    doc_ids = torch.tensor([[0] * 4 + [1] * 5 + [2] * 3])
    positions = torch.tensor([[*range(4), *range(5), *range(3)]])
    hidden = model(random_ids(1, 12), positions, doc_ids)
    hidden[0, 6].square().sum().backward()                                 # the third token of the second document
    reach = inputs[0].grad[0].abs().sum(-1)
    assert (reach[4:7] > 0).all()
    assert (reach[:4] == 0).all() and (reach[7:] == 0).all()               # exactly


def test_rows_are_independent():
    model = random_model(TINY)
    ids = random_ids(3, 7)
    torch.testing.assert_close(model.logits(ids)[1:2], model.logits(ids[1:2]), rtol=1e-5, atol=1e-5)


def test_positions():
    model = random_model(TINY)
    ids = random_ids(2, 9)
    plain = model(ids)
    count = torch.arange(9).expand(2, 9)
    assert torch.equal(model(ids, count), plain)
    # rotary embeddings see differences only: an offset changes nothing but rounding, another spacing changes much
    torch.testing.assert_close(model(ids, count + 100), plain, rtol=1e-4, atol=1e-4)
    assert (model(ids, count * 2) - plain).abs().max() > 0.05


# -----------------------------------------------------------------------------
# Precision and memory


def test_bfloat16_compute_keeps_fp32_masters():
    model = random_model(KINDS["qwen3"], compute_dtype=torch.bfloat16)
    ids = random_ids(2, 9)
    hidden = model(ids)
    assert hidden.dtype == torch.bfloat16 and model.logits(ids).dtype == torch.float32
    hidden.float().sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for n, p in model.named_parameters() if n != "lm_head.weight"} == {torch.float32}
    exact = random_model(KINDS["qwen3"])(ids)
    error = (hidden.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_activations_changes_nothing_but_memory(dtype):
    ids = random_ids(2, 10)
    doc_ids = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    results = []
    for recompute in (False, True):
        model = random_model(KINDS["qwen3"], compute_dtype=dtype)
        model.recompute_activations = recompute
        calls = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = F.cross_entropy(F.linear(model(ids[:, :-1], doc_ids=doc_ids).float(), model.lm_head.weight).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        assert len(calls) == 1 + recompute
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    (loss, grads), (loss_again, grads_again) = results
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(grads, grads_again))


def saved_bytes(model, ids):
    """-> bytes that the forward pass keeps for its backward, beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        keep = model(ids)                                                  # held, so that no address is used twice
    return sum(s.nbytes() for s in storages.values()) + 0 * keep.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_memory_estimate_against_what_is_kept(size, dtype):
    config = config_for_size(size, 265)
    model = Transformer(config, compute_dtype=dtype).init_weights(0)
    measured = saved_bytes(model, random_ids(2, 128, vocab_size=265))
    options = dict(compute_bytes=dtype.itemsize, head_chunk=0)
    estimate = memory_estimate(config, 2, 128, **options)
    assert estimate["activations"] == pytest.approx(measured, rel=0.15)
    model.recompute_activations = True
    held = saved_bytes(model, random_ids(2, 128, vocab_size=265))
    one_block = memory_estimate(replace(config, num_layers=1), 2, 128, **options)["activations"]
    assert memory_estimate(config, 2, 128, recompute_activations=True, **options)["activations"] == pytest.approx(held + one_block, rel=0.3)


def test_memory_estimate_against_parameter_counts():
    config = config_for_size("small", 265)
    with torch.device("meta"):
        count = num_params(Transformer(config))
    estimate = memory_estimate(config, 4, 100)
    assert estimate["weights"] == pytest.approx(4 * count, rel=0.01) and estimate["gradients"] == estimate["weights"]
    assert estimate["optimizer"] == 2 * estimate["weights"]
    assert estimate["total"] == sum(v for k, v in estimate.items() if k != "total")
    tables = 2 * config.vocab_size * config.hidden_size * 4
    assert memory_estimate(config, 4, 100, muon=True)["optimizer"] == 2 * tables + (estimate["weights"] - tables)
    quarter = memory_estimate(config, 4, 100, shards=4)
    assert [quarter[k] * 4 for k in ("weights", "gradients", "optimizer")] == [estimate[k] for k in ("weights", "gradients", "optimizer")]
    lora = memory_estimate(config, 4, 100, trainable_share=0.01)
    assert lora["weights"] == estimate["weights"] and lora["optimizer"] == pytest.approx(0.01 * estimate["optimizer"], rel=1e-3)
    head = memory_estimate(config, 4, 100, head_chunk=200)["activations"] - memory_estimate(config, 4, 100, head_chunk=100)["activations"]
    assert head == 400 * 100 * 8


def test_flops_per_token():
    config = ModelConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
    # q and o 8*8 each, k and v 8*4 each, mlp 3*8*16: 576 a block; attention 2*(2*4)*10/2 = 80; head 8*32 = 256
    assert flops_per_token(config, seq_len=10) == 6 * (2 * (576 + 80) + 256) == 9408
    model, ids = random_model(config), random_ids(3, 11, vocab_size=32)
    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids).backward()
    matmul = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert matmul / (3 * 10) == flops_per_token(config, seq_len=10) - 6 * 2 * 80


# -----------------------------------------------------------------------------
# Heads and LoRA


def test_scalar_head():
    head = ScalarHead(2)
    hidden = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]], dtype=torch.bfloat16, requires_grad=True)
    assert head(hidden).tolist() == [[0.0, 0.0]]
    head.weight.data, head.bias.data = torch.tensor([1.0, 2.0]), torch.tensor(0.5)
    out = head(hidden)
    assert out.dtype == torch.float32 and out.shape == (1, 2) and out.tolist() == [[11.5, 1.5]]
    out[0, 0].backward()
    assert head.weight.grad.tolist() == [3.0, 4.0] and hidden.grad[0, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_lora(kind):
    base, ids = random_model(KINDS[kind]), random_ids(2, 9)
    before, names = base.logits(ids), list(base.state_dict())
    model = add_lora(random_model(KINDS[kind]), rank=3, alpha=6.0, seed=5)
    assert torch.equal(model.logits(ids), before)                          # B is 0
    assert [n for n in model.state_dict() if "lora" not in n] == names     # a base checkpoint fits

    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    linears = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert trainable == {f"model.layers.{i}.{n}.lora_{x}" for i in range(2) for n in linears for x in "AB"}

    for optimizer in make_optimizers(model, lr=0.05) + make_optimizers(model, lr=0.05, muon_lr=0.05):     # Muon alone has groups here
        for _ in range(2):
            loss_of(model, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    frozen = dict(base.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, frozen[name]) if name not in trainable else p.abs().sum() > 0, name
    adapted = model.logits(ids)
    assert (adapted - before).abs().max() > 0.1

    merged = merged_state_dict(dict(model.named_parameters()), scale=2.0)
    plain = Transformer(KINDS[kind])
    plain.load_state_dict(merged, strict=not KINDS[kind].tie_embeddings)
    torch.testing.assert_close(plain.logits(ids), adapted, rtol=1e-5, atol=1e-5 * adapted.abs().max().item())


def test_lora_by_hand():
    model = add_lora(Transformer(TINY).init_weights(0), rank=2, alpha=6.0)
    layer = model.model.layers[0].mlp.down_proj                            # 40 -> 24
    layer.weight.data.fill_(0.0)
    layer.lora_A.data, layer.lora_B.data = torch.full((2, 40), 0.5), torch.arange(24.0)[:, None].expand(24, 2).contiguous()
    assert layer(torch.ones(1, 40))[0].tolist() == [6 / 2 * 2 * 20.0 * i for i in range(24)]       # alpha / rank * B (A x)


def test_lora_is_seeded():
    bases = [Transformer(TINY).init_weights(0) for _ in range(3)]
    state = torch.get_rng_state()
    a, b, c = (add_lora(base, 2, 4.0, seed=seed).state_dict() for base, seed in zip(bases, (1, 1, 2)))
    assert torch.equal(torch.get_rng_state(), state)                       # nobody else's random numbers depend on it
    name = "model.layers.1.mlp.up_proj.lora_A"
    assert torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
    with pytest.raises(ValueError, match="lora_rank must be at least 1, found 0"):
        add_lora(Transformer(TINY), 0, 1.0)


# -----------------------------------------------------------------------------
# Optimizers


def owners(model, optimizers):
    """-> {parameter name: (optimizer, weight_decay)}; fails where a parameter has two owners or none."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[id(p)] not in found, f"{names[id(p)]} twice"
                found[names[id(p)]] = (type(optimizer).__name__, group["weight_decay"])
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_optimizer_groups(kind, muon_lr):
    model = random_model(KINDS[kind])
    optimizers = make_optimizers(model, lr=0.003, muon_lr=muon_lr, weight_decay=0.1)
    parameters = dict(model.named_parameters())
    for name, (optimizer, decay) in owners(model, optimizers).items():
        in_block_matrix = name.startswith("model.layers.") and parameters[name].ndim == 2
        assert optimizer == ("Muon" if in_block_matrix and muon_lr else "AdamW"), name
        assert decay == (0.1 if parameters[name].ndim == 2 else 0.0), name
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert group["initial_lr"] == group["lr"] == (muon_lr if type(optimizer).__name__ == "Muon" else 0.003)


def test_optimizer_groups_of_a_partly_frozen_model():
    model = random_model(TINY)
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in owners(model, make_optimizers(model, lr=0.1, muon_lr=0.1))
    lora = add_lora(random_model(TINY), 2, 4.0)
    assert {optimizer for optimizer, _ in owners(lora, make_optimizers(lora, lr=0.1, muon_lr=0.1)).values()} == {"Muon"}


def test_weight_decay_shrinks_matrices_only():
    model = random_model(KINDS["qwen2"])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in make_optimizers(model, lr=0.1, muon_lr=0.2, weight_decay=0.5):
        optimizer.step()
    for name, p in model.named_parameters():
        rate = 0.0 if p.ndim != 2 else 0.2 if "layers." in name else 0.1
        torch.testing.assert_close(p, before[name] * (1 - rate * 0.5), rtol=1e-6, atol=0)


def test_muon_is_torchs_muon_without_the_rounding():
    shapes = [(24, 40), (40, 24), (24, 40), (32, 32), (64, 8)]
    options = dict(lr=0.5, weight_decay=0.1, momentum=0.9)
    ours, theirs = ([torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(sum(s)))) for s in shapes] for _ in range(2))
    unused = torch.nn.Parameter(torch.ones(3, 3))
    optimizers = Muon([*ours, unused], **options), torch.optim.Muon([*theirs, unused], **options)
    for step in range(3):
        before = [p.detach().clone() for p in ours]
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            q.grad, q.data = p.grad.clone(), p.data.clone()                # each step from the same weights
        for optimizer in optimizers:
            optimizer.step()
        for p, q, old in zip(ours, theirs, before):
            assert 0 < (p - q).norm() < 0.03 * (p - old).norm()            # bfloat16 has 8 bits
    assert all(torch.equal(optimizers[0].state[p]["momentum_buffer"], optimizers[1].state[q]["momentum_buffer"]) for p, q in zip(ours, theirs))
    assert unused.tolist() == [[1.0] * 3] * 3
    a, b = (o.state_dict() for o in optimizers)                            # what one saved, the other continues
    assert a["param_groups"] == b["param_groups"]
    assert {i: s.keys() for i, s in a["state"].items()} == {i: s.keys() for i, s in b["state"].items()}

    # a diagonal gradient stays diagonal: each entry goes five times through x -> 3.4445 x - 4.775 x³ + 2.0315 x⁵, from g / |g|
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.diag(torch.tensor([3.0, 4.0]))
    Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0).step()
    expected = [0.6, 0.8]
    for _ in range(5):
        expected = [3.4445 * x - 4.775 * x**3 + 2.0315 * x**5 for x in expected]
    torch.testing.assert_close(weight.detach(), -torch.diag(torch.tensor(expected)), rtol=1e-5, atol=1e-6)


def test_clip_grad_norm():
    model = add_lora(random_model(TINY), 2, 4.0)
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.grad = torch.zeros_like(p)
        if i < 2:
            p.grad[0, 0] = 3.0 + i                                         # 3 and 4: the norm is 5
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert clip_grad_norm(model, 10.0).item() == 5.0 and grads[1][0, 0] == 4.0
    assert clip_grad_norm(model, 1.0).item() == 5.0 and grads[1][0, 0].item() == pytest.approx(0.8, rel=1e-5)


def test_it_learns():
    """Gradients have the right sign everywhere: one batch is learned by heart, by AdamW and by Muon."""
    ids = random_ids(4, 12)
    for muon_lr in (0.0, 0.02):
        model = Transformer(replace(TINY, qk_norm=True)).init_weights(0)
        optimizers = make_optimizers(model, lr=0.01, muon_lr=muon_lr)
        first = loss_of(model, ids).item()
        for _ in range(60):
            loss_of(model, ids).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert first == pytest.approx(math.log(48), rel=0.02) and loss_of(model, ids).item() < 0.3


def test_attention_by_document_is_attention_under_the_mask(monkeypatch):
    """Both ways to keep documents apart: hidden states and gradients agree in float64, with grouped heads, one-token documents and filler."""
    model, ids = random_model(TINY).double(), random_ids(2, 12)
    model.compute_dtype = torch.float64
    doc_ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3], [0] * 7 + [1] * 5])
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1, 2], [*range(7), *range(5)]])
    assert model_module.document_lengths(doc_ids) == [3, 1, 5, 3, 7, 5]
    found = []
    for min_length in (1, 1000):
        monkeypatch.setattr(model_module, "MIN_LENGTH", min_length)
        model.zero_grad()
        hidden = model(ids, positions, doc_ids)
        hidden.pow(3).sum().backward()
        found.append([hidden.detach()] + [p.grad.clone() for p in model.model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    alone = model(ids[:1, 4:9])[0]
    torch.testing.assert_close(found[0][0][0, 4:9], alone.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 7, 32), (3, 2, 4, 8), (6, 128)])
def test_the_norm_on_cpus_is_torchs_with_a_gradient_of_its_own(shape):
    """Forward F.rms_norm's but for rounding, the same bits with and without gradients, which are those of the formula in float64, also where only one
    of the two is wanted."""
    generator = torch.Generator().manual_seed(0)
    x, weight, up = (torch.randn(s, generator=generator) * 3 for s in (shape, shape[-1:], shape))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = rms_norm(x, weight, 1e-5)
    with torch.no_grad():
        assert torch.equal(out, rms_norm(x, weight, 1e-5))
        torch.testing.assert_close(out, weight * F.rms_norm(x, shape[-1:], eps=1e-5), rtol=1e-6, atol=0)
    dx, dw = torch.autograd.grad(out, (x, weight), up)
    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    oracle = torch.autograd.grad(w64 * x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt(), (x64, w64), up.double())
    for found, expected in zip((dx, dw), oracle):
        assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5 * expected.abs().max()
    only_x, = torch.autograd.grad(rms_norm(x, weight.detach(), 1e-5), x, up)
    only_w, = torch.autograd.grad(rms_norm(x.detach(), weight, 1e-5), weight, up)
    assert torch.equal(only_x, dx) and torch.equal(only_w, dw)
