"""A peer that computes something else would make a ratio of speeds meaningless."""
import json
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import bench
from model import RECOMMENDER_SIZES, Recommender, RecommenderConfig


def test_plain_sasrec_computes_what_the_recommender_computes():
    config = RecommenderConfig(num_items=30, max_length=8, backbone="sasrec", **RECOMMENDER_SIZES["ml-1m"])
    model = Recommender(config, torch.float64).init_weights(0).double().eval()
    peer = bench.PlainSASRec(config).double().eval()
    with torch.no_grad():                                                   # init_weights leaves biases and norms at 0 and 1
        for p in model.layers.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
    peer.copy_weights(model)
    lengths = torch.tensor([3, 8, 1])
    items = torch.randint(1, 31, (3, 8), generator=torch.Generator().manual_seed(1)) * (torch.arange(8) < lengths[:, None])
    left = torch.stack([row.roll(8 - int(n)) for row, n in zip(items, lengths)])
    assert left[0].tolist()[:5] == [0] * 5
    ours, theirs = model(items, lengths, torch.zeros_like(items))[items > 0], peer(left)[left > 0]
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)

    targets = torch.arange(len(ours)) % 30                                  # the same loss, and the same gradient of the table that both ends share
    logits = model.users(ours) @ model.catalogue().t() / config.temperature, peer.logits(theirs)
    losses = [F.cross_entropy(x, targets) for x in logits]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(loss, m.items.weight)[0][1:] for loss, m in zip(losses, (model, peer))]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9)


def test_plain_evaluation_by_hand():
    class Fixed(bench.PlainSASRec):
        def forward(self, ids):
            return torch.zeros(len(ids), 1, 1)

        def logits(self, hidden):                                           # item 1 is liked best, item 20 least
            return torch.arange(20.0, 0.0, -1.0).repeat(len(hidden), 1)

    config = RecommenderConfig(num_items=20, max_length=3, backbone="sasrec", hidden_size=4, num_layers=1, num_heads=1, head_dim=4, value_dim=4)
    histories = torch.tensor([[0, 1, 2], [0, 0, 20], [7, 8, 9]])
    found = Fixed(config).evaluate(histories, torch.tensor([5, 11, 1]))     # places 5 - 2 = 3, 11 and 1
    assert abs(found["hr@10"] - 2 / 3) < 1e-12
    assert abs(found["ndcg@10"] - (1 / 2 + 0 + 1) / 3) < 1e-6


def test_iql_weights_of_the_peer_are_copied_head_by_head():
    """With networks of CORL's layout: V, Q and policy of the copy say what theirs say."""
    generator = torch.Generator().manual_seed(0)
    net = lambda inputs, outputs, *last: SimpleNamespace(net=torch.nn.Sequential(
        torch.nn.Linear(inputs, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, outputs), *last))
    O, A = bench.IQL_OBS, bench.IQL_ACTIONS
    twins = lambda: SimpleNamespace(q1=net(O + A, 1), q2=net(O + A, 1))
    peer = SimpleNamespace(vf=SimpleNamespace(v=net(O, 1)), qf=twins(), q_target=twins(), actor=SimpleNamespace(net=net(O, A, torch.nn.Tanh()),
                                                                                                                log_std=torch.linspace(-1, 1, A)))
    _, agent, target, _ = bench.iql_temper()
    bench.iql_copy(agent, target, peer)
    obs, actions = torch.randn(9, O, generator=generator), torch.rand(9, A, generator=generator)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    close(agent.values(obs), peer.vf.v.net(obs)[:, 0])
    both = torch.cat([obs, actions], 1)
    close(agent.qs(agent.q, obs, actions), torch.stack([peer.qf.q1.net(both)[:, 0], peer.qf.q2.net(both)[:, 0]]))
    close(agent.qs(target, obs, actions), torch.stack([peer.q_target.q1.net(both)[:, 0], peer.q_target.q2.net(both)[:, 0]]))
    want = torch.distributions.Normal(peer.actor.net.net(obs), peer.actor.log_std.exp()).log_prob(actions).sum(1)
    close(agent.logps(obs, actions), want)


def test_kernel_groups_run_and_flag_what_is_wrong(monkeypatch, capsys):
    """Every group at small shapes; a method whose entropy has no gradient, and one that drops mass, are named."""
    import bench_kernels
    cfg, methods = bench.Config(steps=2, warmup=0), bench_kernels.head_methods

    def with_broken_ones(entropy):
        def no_entropy_gradient(*x):
            logp, H = bench_kernels.full_logits(*x, entropy)
            return logp, H.detach() if entropy else None

        def drops_mass(hidden, weight, targets):
            logits = F.linear(hidden, weight)
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) - 3, -1e9).scatter(1, targets[:, None], logits.gather(1, targets[:, None]))
            logps = logits.log_softmax(-1)
            return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1) if entropy else None
        return methods(entropy) | dict(flat=no_entropy_gradient, cut=drops_mass)

    monkeypatch.setattr(bench_kernels, "HEAD_SHAPES", ((64, 16, 272),))
    monkeypatch.setattr(bench_kernels, "head_methods", with_broken_ones)
    found = bench_kernels.bench_head(cfg)
    plain, entropy = (found[f"N=64 D=16 V=272 {mode}"] for mode in ("per token", "per token, with entropy"))
    assert plain["temper"]["wrong"] == entropy["temper"]["wrong"] == plain["full logits"]["wrong"] == []
    assert plain["flat"]["wrong"] == [] and entropy["flat"]["wrong"] == ["dh", "dw"] and set(plain["cut"]["wrong"]) == {"logp", "dh", "dw"}
    assert "WRONG: dh, dw" in capsys.readouterr().out
    for group in ("gemm", "hstu", "decode"):
        found = bench_kernels.GROUPS[group](cfg)
        assert found and json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["gap"] < 1e-5 and found["engine, window default"]["logp_gap"] < 1e-4
