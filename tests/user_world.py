"""A small world of user types for tests: who wants what is known, and the utility is not the model's own (the best image, no A_k)."""
import numpy as np

from user_model import Observations, Pairs, Ratings


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def observations(seed=0, num_users=300, num_choices=20, num_types=4, width=16, columns=4, images=4, tau=8.0, deviation=0.0, turns=5, shuffle=False):
    """-> (Observations, types (U,)): sessions of `turns` turns whose base is the prompt of the pick, which is drawn near the base before."""
    rng = np.random.default_rng(seed)
    tastes = unit(rng.normal(size=(num_types, width)))
    types = rng.integers(0, num_types, num_users)
    wanted = unit(tastes[types] + deviation * unit(rng.normal(size=(num_users, width))))
    out = {name: [] for name in Observations._fields}
    last_value = None
    start = base = np.zeros((num_users, width))
    for n in range(num_choices):
        turn = n % turns
        if turn == 0:
            start = base = unit(rng.normal(size=(num_users, width)))
        prompts = unit(base[:, None] + 0.8 * unit(rng.normal(size=(num_users, columns, width))))
        pictures = unit(prompts[:, :, None] + 0.3 * unit(rng.normal(size=(num_users, columns, images, width))))
        value = ((pictures * start[:, None, None]).sum(-1) + (pictures * wanted[:, None, None]).sum(-1)).max(-1)
        choice = (tau * value + rng.gumbel(size=value.shape)).argmax(1)
        mine = value[np.arange(num_users), choice]
        compare = np.full(num_users, 2)
        if turn:
            compare = np.where(rng.random(num_users) < 1 / (1 + np.exp(-tau * (mine - last_value))), 1, -1)
        if shuffle:
            choice = rng.integers(0, columns, num_users)
            compare = np.where(compare == 2, 2, rng.choice([1, -1], num_users))
        for name, column in dict(user=np.arange(num_users), start=start, base=base, images=pictures, choice=choice, compare=compare,
                                 before=np.full(num_users, turn > 0), turn=np.full(num_users, turn), session=np.full(num_users, n // turns)).items():
            out[name].append(column)
        base, last_value = prompts[np.arange(num_users), choice], mine
    stacked = {name: np.stack(columns_, 1).reshape(num_users * num_choices, *columns_[0].shape[1:]) for name, columns_ in out.items()}
    rows = np.arange(num_users * num_choices)
    floats = {name: stacked[name].astype(np.float32) for name in ("start", "base", "images")}
    return Observations(**(stacked | floats | dict(before=np.where(stacked["before"], rows - 1, -1),
                                                   session=stacked["user"] * (num_choices // turns + 1) + stacked["session"]))), types


def singles(seed=0, num_users=120, num=12, num_types=3, width=12, tau=8.0):
    """-> (Pairs, Ratings, types (U,))."""
    rng = np.random.default_rng([seed, 1])
    tastes, types = unit(rng.normal(size=(num_types, width))), rng.integers(0, num_types, num_users)
    user = np.repeat(np.arange(num_users), num)
    prompt, a, b = (unit(rng.normal(size=(len(user), width))).astype(np.float32) for _ in range(3))
    value = lambda image: (image * (prompt + tastes[types[user]])).sum(1)
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-tau * (value(a) - value(b))))).astype(np.float32)
    label[rng.random(len(user)) < 0.05] = 0.5
    rating = 3 + 1.5 * value(a) + 0.5 * rng.normal(size=len(user))
    return Pairs(user, prompt, a, b, label, np.ones(len(user), np.float32)), Ratings(user, prompt, a, rating.astype(np.float32)), types


def small_log(cfg):
    """In place of train_user_model.open_log: turns, pairs and ratings of the same users."""
    obs, types = observations(cfg.seed, cfg.num_users, 5 * cfg.num_sessions, num_types=3, width=12, columns=3, images=2)
    pairs, ratings, _ = singles(cfg.seed, cfg.num_users, 3)
    return [f"u{i}" for i in range(cfg.num_users)], obs, pairs._asdict(), ratings._asdict(), types, "world"
