"""The networks of plain implicit Q-learning on logged steps (train_iql.py --task=offline): Q, V and a policy.

    N steps   H heads of Q   A width of an action
"""
import math
from dataclasses import dataclass

import torch
from torch import nn

from common import random_key


class MLP(nn.Module):
    """num_heads networks side by side, ReLU between layers. x (N, sizes[0]) float, or (N,) int64, a row of the identity each -> (H, N, sizes[-1])."""

    def __init__(self, sizes, num_heads=1):
        super().__init__()
        shapes = list(zip(sizes, sizes[1:]))
        self.weights = nn.ParameterList(torch.empty(num_heads, i, o) for i, o in shapes)
        self.biases = nn.ParameterList(torch.empty(num_heads, 1, o) for _, o in shapes)

    def init_weights(self, generator):
        for w, b in zip(self.weights, self.biases):                   # uniform within 1 / sqrt(inputs), as torch.nn.Linear has it
            for p in (w, b):
                p.data.uniform_(-w.shape[1] ** -0.5, w.shape[1] ** -0.5, generator=generator)

    def forward(self, x):
        w, b = self.weights[0], self.biases[0]
        x = torch.baddbmm(b, x.expand(len(w), *x.shape), w) if x.is_floating_point() else w[:, x] + b
        for w, b in zip(list(self.weights)[1:], list(self.biases)[1:]):
            x = x.relu_()
            # one output: a batched product by a column has a slow path on CPUs (two heads of 256, both ways: 446 us, so 110 us)
            x = (x * w.mT).sum(-1, keepdim=True) + b if w.shape[-1] == 1 else torch.baddbmm(b, x, w)
        return x


@dataclass(frozen=True)
class OfflineAgentConfig:
    num_states: int                  # 0: states are vectors of obs_size
    obs_size: int
    num_actions: int                 # 0: actions are vectors of action_size
    action_size: int
    width: int
    depth: int
    num_heads: int = 2               # of Q


class OfflineAgent(nn.Module):
    """Q with H heads, V and the policy: three multilayer perceptrons that share nothing.

    Numbered actions: Q has one output for each and the policy is categorical. Vectors: Q reads [s, a], the policy is Gaussian with mean tanh and a deviation
    that does not depend on the state, not squashed.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        inputs, outputs, hidden = c.num_states or c.obs_size, c.num_actions or c.action_size, [c.width] * c.depth
        self.v = MLP([inputs, *hidden, 1])
        self.q = MLP([inputs, *hidden, c.num_actions] if c.num_actions else [inputs + c.action_size, *hidden, 1], c.num_heads)
        self.policy = MLP([inputs, *hidden, outputs])
        self.log_std = nn.Parameter(torch.empty(c.action_size), requires_grad=not c.num_actions)     # DDP waits for whatever asks for a gradient
        self.mean, self.std = (nn.Parameter(torch.empty(c.obs_size), requires_grad=False) for _ in range(2))      # of the data, kept with the weights

    def init_weights(self, seed):
        generator = torch.Generator().manual_seed(random_key(seed, "weights"))
        for part in (self.v, self.q, self.policy):
            part.init_weights(generator)
        self.log_std.data.zero_()
        self.mean.data.zero_(), self.std.data.fill_(1.0)
        return self

    def encode(self, obs):
        return obs if self.config.num_states else (obs - self.mean) / self.std

    def values(self, obs):
        """-> (N,)."""
        return self.v(self.encode(obs))[0, :, 0]

    def qs(self, net, obs, actions):
        """net: self.q or its target -> (H, N), of the given actions."""
        if self.config.num_actions:
            return net(self.encode(obs)).gather(2, actions[None, :, None].expand(self.config.num_heads, -1, 1))[..., 0]
        return net(torch.cat([self.encode(obs), actions], 1))[..., 0]

    def logps(self, obs, actions):
        """-> (N,) log pi(a|s)."""
        out = self.policy(self.encode(obs))[0]
        if self.config.num_actions:
            return out.log_softmax(-1).gather(1, actions[:, None])[:, 0]
        log_std = self.log_std.clamp(-5.0, 2.0)                       # as the authors' code
        z = (actions - out.tanh()) * (-log_std).exp()
        return -0.5 * z.square().sum(1) - (log_std + 0.5 * math.log(2 * math.pi)).sum()

    @torch.no_grad()
    def greedy(self, obs):
        """-> the likeliest action: (N,) int64 or (N, A)."""
        out = self.policy(self.encode(obs))[0]
        return out.argmax(-1) if self.config.num_actions else out.tanh()

    def forward(self, obs, actions, next_obs, method):
        """-> log pi(a|s) (N,), v(s) (N,), v(s') (N,) without gradient, q(s, a) (H, N); method bc: the first, and None."""
        logps = self.logps(obs, actions)
        if method == "bc":
            return logps, None, None, None
        with torch.no_grad():
            v_next = self.values(next_obs)
        return logps, self.values(obs), v_next, self.qs(self.q, obs, actions)
