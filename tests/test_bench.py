"""A peer that computes something else would make a ratio of speeds meaningless."""
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
