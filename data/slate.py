"""Sessions of a slate agent: a hidden world of people and prompts, the generator of expansions, and the files that sessions are kept in.

A person wants a picture and refines a prompt over turns: the agent shows a slate of expansions as columns of images, the person picks a column, its
prompt is the next turn's base (PASTA, arXiv 2412.10419). What the paper leaves open is decided here, in a world that needs no download:

    prompt      a subject, perhaps a style, up to 3 details, perhaps a twist: "painting of a fox, watercolor, lanterns, mist, melting"
    embedding   unit(1.2 subject + .6 style + .5 sum of details + twist), d = 16; details share an axis g, so that finish is visible; subjects are
                kin in threes; half of the twists are wild (norm 1.3), half mild (.3). A text without a word of the world has a direction by its hash
    image       unit(embedding + .3 n / sqrt d), n ~ N(0, 1)^d
    taste       of type k: the unit sum of the two styles that it likes, which stand at right angles; of a person: unit(taste_k + deviation n / sqrt d)
    utility     of a column: mean over its images of .17 cos(start, I) + .57 taste.I + .73 g.I, + novelty x charm
    charm       what is unlike the prompt before pleases, in that turn alone: 0 up to a distance 1 - cos(base, I) of .25 (details, most styles), 1 from
                .5 on (a subject of other kin). What it costs, details, style and closeness to the start, stays: the quick win is a trap, and nobody who looks
                one turn ahead can see it
    choice      softmax over columns of tau utility (1 - fatigue t) + a habit for some position; with probability lapse, any column
    compare     of two picks in a row: better, worse, or same where they are within `same` of each other, with noise on the difference

Draws are functions of (seed, person, turn, column), so policies meet the same people, candidates and images. `SmallWorld` has 36 states, in which every
policy has an exact value.
"""
import functools
import hashlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import random_key, write_atomically
from tokenizer import load_strict

CATEGORIES = ("rephrase", "detail", "style", "subject", "creative")
WIDTH, MAX_DETAILS, IMAGE_NOISE = 16, 3, .3
OPENINGS = ("picture", "painting", "view", "scene", "study", "image")
SUBJECTS = ("fox", "owl", "whale", "castle", "temple", "lighthouse", "harbor", "garden", "market", "dancer", "robot", "astronaut")       # kin in threes
STYLES = ("watercolor", "cubist", "noir", "baroque", "pixel", "woodcut", "pastel", "neon")
DETAILS = ("lanterns", "mist", "ivy", "feathers", "snow", "ribbons", "mosaic", "embers", "shells", "mirrors", "petals", "lace", "gears", "rain", "stars")
TWISTS = ("miniature", "knitted", "transparent", "floating", "melting", "burning", "inverted", "shattered")                              # mild, then wild
MILD = TWISTS[:4]
END = ("horizon", "quit", "truncated")
COMPARE = {"better": 1, "same": 0, "worse": -1, None: 2}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True).clip(1e-12)


def stream(*key):
    """A random generator that is a function of its key alone."""
    return np.random.default_rng(random_key(*key))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# -----------------------------------------------------------------------------
# Prompts


class Prompt(NamedTuple):
    opening: str
    subject: str
    style: str                  # "" where there is none
    details: tuple
    twist: str                  # "" where there is none

    def __str__(self):
        article = "an" if self.subject[:1] in tuple("aeiou") else "a"
        return ", ".join([f"{self.opening} of {article} {self.subject}", *filter(None, (self.style, *self.details, self.twist))])


KINDS = {word: kind for kind, words in (("opening", OPENINGS), ("subject", SUBJECTS), ("style", STYLES), ("detail", DETAILS), ("twist", TWISTS))
         for word in words}


@functools.lru_cache(maxsize=1 << 17)                                         # a turn reads every text, and many come again
def parse(text):
    """-> Prompt of the words of the world in a text, the last of a kind where it has several, the last three details; "" where it has none."""
    found = {"opening": OPENINGS[0], "subject": "", "style": "", "twist": ""}
    details = []
    for word in text.lower().replace(",", " ").split():
        kind = KINDS.get(word)
        if kind == "detail":
            details = [d for d in details if d != word] + [word]
        elif kind:
            found[kind] = word
    return Prompt(found["opening"], found["subject"], found["style"], tuple(details[-MAX_DETAILS:]), found["twist"])


def start_prompts(n, seed, specific=.5):
    """-> (n texts, (n,) bool: specific). A vague start names a subject alone, a specific one a style and a detail, too."""
    # a stream for each part: what row i gets does not depend on n
    parts = [stream(seed, "starts", k).integers(0, len(words), n) for k, words in enumerate((OPENINGS, SUBJECTS, STYLES, DETAILS))]
    is_specific = stream(seed, "starts", "specific").random(n) < specific
    texts = [str(Prompt(OPENINGS[o], SUBJECTS[s], STYLES[y] if p else "", (DETAILS[d],) if p else (), "")) for o, s, y, d, p in zip(*parts, is_specific)]
    return texts, is_specific


def expansions(text, seed, person, turn, num=5):
    """The template generator -> [(category, text)], num of each category, all different. Which ones is a function of (seed, person, turn)."""
    if not 1 <= num < len(OPENINGS):
        raise ValueError(f"templates make 1 to {len(OPENINGS) - 1} expansions of a category, not {num}: set --candidates_per_category")
    p, rng = parse(text), stream(seed, "expansions", int(person), int(turn))
    other = lambda words, used: [words[i] for i in rng.permutation(len(words)) if words[i] not in used][:num]
    subject = p.subject or SUBJECTS[rng.integers(len(SUBJECTS))]
    p = p._replace(subject=subject)
    found = [("rephrase", p._replace(opening=w)) for w in other(OPENINGS, (p.opening,))]
    found += [("detail", p._replace(details=(*p.details, w)[-MAX_DETAILS:])) for w in other(DETAILS, p.details)]
    found += [("style", p._replace(style=w)) for w in other(STYLES, (p.style,))]
    found += [("subject", p._replace(subject=w, details=(), twist="")) for w in other(SUBJECTS, (p.subject,))]
    found += [("creative", p._replace(twist=w, details=p.details[1:])) for w in other(TWISTS, (p.twist,))]
    return [(category, str(prompt)) for category, prompt in found]


# -----------------------------------------------------------------------------
# The hidden world


class People(NamedTuple):
    kind: np.ndarray              # (n,) type
    taste: np.ndarray             # (n, d)
    habit: np.ndarray             # (n,) the column that is liked for its place, modulo the number of columns


class World:
    """Vectors of all words and types of people, from one seed. Its utilities are what an evaluation in it reads, and nobody else."""
    WEIGHTS = (.17, .57, .73)                                                # of closeness, taste and finish

    def __init__(self, seed=0, *, num_types=4, novelty=.4, deviation=.2, lapse=.02, tau=24.0, fatigue=.03, position=.3, same=.03, width=WIDTH):
        for name, x, low, high in (("novelty", novelty, 0, 10), ("deviation", deviation, 0, 10), ("lapse", lapse, 0, 1), ("tau", tau, 0, 1000),
                                   ("fatigue", fatigue, 0, .2), ("position", position, 0, 10), ("same", same, 0, 10)):
            if not low <= x <= high:
                raise ValueError(f"{name} {x}: expected a number from {low} to {high}")
        if not 1 <= num_types <= 64 or width < 4:
            raise ValueError(f"num_types {num_types}, width {width}: expected 1 to 64 types and a width of at least 4")
        self.name = f"world {seed}"                                          # of its embeddings: those of another seed mean something else
        self.seed, self.num_types, self.novelty, self.deviation, self.lapse = seed, num_types, novelty, deviation, lapse
        self.tau, self.fatigue, self.position, self.same, self.width = tau, fatigue, position, same, width
        rng = stream(seed, "world")
        self.finish = np.eye(width)[0]                                       # apart from everything else, or details would look like some style
        draw = lambda n: np.pad(unit(rng.normal(size=(n, width - 1))), ((0, 0), (1, 0)))
        kin, own, details, twists = draw(len(SUBJECTS) // 3), draw(len(SUBJECTS)), draw(len(DETAILS)), draw(len(TWISTS))
        styles = draw(width - 1)
        styles[:, 1:] = np.linalg.qr(styles[:, 1:])[0]                       # at right angles, so that types have nothing in common
        styles = styles[np.arange(len(STYLES)) % (width - 1)]
        subjects = unit(.75 ** .5 * np.repeat(kin, 3, 0) + .25 ** .5 * own)
        strength = np.where(np.isin(TWISTS, MILD), .3, 1.3)[:, None]
        self.table = np.concatenate([np.zeros((1, width)), 1.2 * subjects, .6 * styles, .5 * unit(.9 * self.finish + .44 * details), strength * twists])
        self.row = {word: i for i, word in enumerate((*SUBJECTS, *STYLES, *DETAILS, *TWISTS), 1)}
        order = np.concatenate([rng.permutation(len(STYLES)) for _ in range(-(-2 * num_types // len(STYLES)))])
        self.tastes = unit(styles[order[:2 * num_types].reshape(num_types, 2)].sum(1))                 # (K, d)

    def embed(self, texts):
        """-> (N, d) float32 of unit norm."""
        rows = np.zeros((len(texts), 3 + MAX_DETAILS), np.int64)
        for i, text in enumerate(texts):
            p = parse(text)
            rows[i, :3 + len(p.details)] = [self.row.get(w, 0) for w in (p.subject, p.style, p.twist, *p.details)]
        x = self.table[rows].sum(1)
        for i in np.flatnonzero(~rows.any(1)):
            x[i] = np.random.default_rng(int.from_bytes(hashlib.blake2b(texts[i].encode(), digest_size=8).digest(), "little")).normal(size=self.width)
        return unit(x).astype(np.float32)

    def people(self, n, seed):
        """-> People, n of them, the first of them the same for every n. seed: another one, other persons of the same types."""
        kind = stream(seed, "people", "kind").integers(0, self.num_types, n)
        noise = stream(seed, "people", "taste").normal(size=(n, self.width)) / self.width ** .5
        return People(kind, unit(self.tastes[kind] + self.deviation * noise), stream(seed, "people", "habit").integers(0, 64, n))

    def utilities(self, people, start, base, images):
        """start, base (n, d), images (n, L, M, d) -> (n, L) float64: what each person gets of each column."""
        close, taste, finish = self.WEIGHTS
        wish = close * start + taste * people.taste + finish * self.finish
        return np.einsum("nd,nlmd->nlm", wish, images).mean(2) + self.novelty * charm(base, images)

    def probabilities(self, people, utilities, turn):
        """(n, L) utilities -> (n, L) probabilities of the picks."""
        habit = self.position * (people.habit[:, None] % utilities.shape[1] == np.arange(utilities.shape[1]))
        attention = max(0.0, 1 - self.fatigue * turn)                        # who is past tired picks blindly, never the worst on purpose
        return (1 - self.lapse) * softmax(self.tau * attention * utilities + habit) + self.lapse / utilities.shape[1]

    def compared(self, gain, noise):
        """gain (n,) of this pick over the last, noise (n,) ~ N(0, 1) -> (n,) of 1 better, 0 same, -1 worse."""
        gain = gain + .1 * noise
        return np.where(np.abs(gain) < self.same, 0, np.sign(gain)).astype(np.int64)


def charm(base, images):
    """base (n, d), images (n, L, M, d) -> (n, L) in [0, 1]: what is new to the eye, from 0 at a distance 1 - cos of .25 to 1 at .5, mean over the images."""
    distance = 1 - np.einsum("nd,nlmd->nlm", base, images)
    return np.clip((distance - .25) / .25, 0, 1).mean(2)


# -----------------------------------------------------------------------------
# The small world: 36 states, one type, every policy exact


class SmallWorld:
    """State (style 0 none, 1, 2; details 0..3; off-topic 0..2). One candidate of each category, two of them shown, 5 turns.

    Utility of a state reached: .25 + .15 details + (.25 for the liked style, -.1 for the other) - .2 off-topic + bonus; rephrase changes nothing, detail
    adds one, style goes on to the next, subject drops the details and leaves the topic for a bonus of novelty, creative drops one for .8 novelty.
    """
    STATES = list(itertools.product(range(3), range(4), range(3)))
    PAIRS = list(itertools.combinations(range(5), 2))

    def __init__(self, novelty=.4, tau=8.0, horizon=5, liked=1):
        self.horizon, self.tau = horizon, tau
        index = {s: i for i, s in enumerate(self.STATES)}
        self.next, self.utility = np.zeros((36, 5), np.int64), np.zeros((36, 5))
        for i, (style, details, off) in enumerate(self.STATES):
            moves = ((style, details, off), (style, min(details + 1, 3), off), (style % 2 + 1, details, off),
                     (style, 0, min(off + 1, 2)), (style, max(details - 1, 0), off))
            for m, (s, d, o) in enumerate(moves):
                self.next[i, m] = index[s, d, o]
                self.utility[i, m] = .25 + .15 * d + (.25 if s == liked else -.1 if s else 0) - .2 * o + (0, 0, 0, novelty, .8 * novelty)[m]
        self.start, self.index = index[0, 0, 0], index
        pairs = np.array(self.PAIRS)
        self.pick = softmax(tau * self.utility[:, pairs])                       # (36, 10, 2)
        self.pair_utility = (self.pick * self.utility[:, pairs]).sum(2)         # (36, 10)
        self.pair_next = self.next[:, pairs]                                    # (36, 10, 2)

    def backup(self, v):
        """(36,) value of the next turn's states -> (36, 10): utility now and value then, of each pair."""
        return self.pair_utility + (self.pick * v[self.pair_next]).sum(2)

    def value(self, policy):
        """policy (H, 36, 10): probabilities of the pairs -> expected utility per turn from the start."""
        v = np.zeros(36)
        for t in reversed(range(self.horizon)):
            v = (policy[t] * self.backup(v)).sum(1)
        return v[self.start] / self.horizon

    def random(self):
        return np.full((self.horizon, 36, 10), .1)

    def greedy(self, gamma=1.0):
        """The best pair by utility + gamma x the value of going on so: the planner; gamma 0 is the myopic agent."""
        v, policy = np.zeros(36), []
        for _ in range(self.horizon):
            q = self.pair_utility + gamma * (self.pick * v[self.pair_next]).sum(2)
            policy.append(np.eye(10)[q.argmax(1)])
            v = q.max(1)
        return np.stack(policy[::-1])

    def mean_form(self, gamma=1.0, expectile=.5):
        """What a slate value that is the mean of its items can know: f fitted to the values of all pairs by least squares, v their expectile over
        random slates, the two best items shown. -> policy (H, 36, 10). The gap to `greedy` is the price of the decomposition, not of learning."""
        design = np.array([[.5 * (m in pair) for m in range(5)] for pair in self.PAIRS])
        v, policy = np.zeros(36), []
        for _ in range(self.horizon):
            q = self.pair_utility + gamma * (self.pick * v[self.pair_next]).sum(2)
            f = np.linalg.lstsq(design, q.T, rcond=None)[0].T                                       # (36, 5)
            best = np.sort(np.argsort(-f, axis=1, kind="stable")[:, :2], axis=1)
            policy.append(np.stack([np.eye(10)[self.PAIRS.index(tuple(b))] for b in best.tolist()]))
            fitted = f @ design.T                                                                   # (36, 10)
            v = fitted.mean(1)
            for _ in range(200):                                                                    # the expectile of ten equally likely values
                w = np.where(fitted < v[:, None], 1 - expectile, expectile)
                v = (w * fitted).sum(1) / w.sum(1)
        return np.stack(policy[::-1])


# -----------------------------------------------------------------------------
# Session files, "human" and simulated alike (data/README.md documents them)


class Log(NamedTuple):
    """S sessions of N turns in all, flat and in order; C candidates at most, L columns, M images. Texts are rows of `texts`."""
    session_ids: list
    user_ids: list                # every user once, in order of appearance
    user: np.ndarray              # (S,) int64
    source: list                  # "human" or "sim:<name>"
    end: np.ndarray               # (S,) int64 of END: horizon and quit are terminal, truncated is not
    prompt: np.ndarray            # (S,) int64: what the session began with
    first: np.ndarray             # (S + 1,) int64: turns first[s] .. first[s + 1] - 1 are session s's
    texts: list
    candidates: np.ndarray        # (N, C) int64, -1 where a turn has fewer
    categories: np.ndarray        # (N, C) int64 of CATEGORIES, -1 where there is no candidate
    slate: np.ndarray             # (N, L) int64: which candidates were shown
    choice: np.ndarray            # (N,) int64: which column was picked
    critique: list                # (N,) "" where none was given
    compare: np.ndarray           # (N,) int64: 1 better, 0 same, -1 worse than the pick of the turn before, 2 not asked
    reward: np.ndarray            # (N,) float64, nan where none is given
    behavior: list                # (N,) the policy that showed the slate, "" where unknown
    image_ids: list
    images: np.ndarray            # (N, L, M) int64: rows of image_ids; M = 0 where a file has none

    @property
    def session(self):
        """(N,) the session of each turn."""
        return np.repeat(np.arange(len(self.user)), np.diff(self.first))

    @property
    def turn(self):
        """(N,) from 0."""
        return np.arange(len(self.choice)) - self.first[self.session]

    @property
    def picked(self):
        """(N,) the text that was picked."""
        rows = np.arange(len(self.choice))
        return self.candidates[rows, self.slate[rows, self.choice]]

    @property
    def base(self):
        """(N,) the text that each turn began with: the session's prompt, then the pick of the turn before."""
        base = np.concatenate([[0], self.picked[:-1]]) if len(self.choice) else np.zeros(0, np.int64)
        base[self.first[:-1]] = self.prompt
        return base

    def take(self, sessions):
        """The Log of some sessions, by index and in their order; texts, users and images are shared."""
        sessions = np.asarray(sessions)
        if sessions.dtype == bool:
            raise ValueError("take wants indices of sessions, found a mask: np.flatnonzero makes the one from the other")
        sessions = sessions.astype(np.int64)
        turns = np.concatenate([np.arange(self.first[s], self.first[s + 1]) for s in sessions]) if len(sessions) else np.zeros(0, np.int64)
        of = lambda values, which: [values[i] for i in which]
        return self._replace(
            session_ids=of(self.session_ids, sessions), user=self.user[sessions], source=of(self.source, sessions), end=self.end[sessions],
            prompt=self.prompt[sessions], first=np.concatenate([[0], np.cumsum(np.diff(self.first)[sessions])]), candidates=self.candidates[turns],
            categories=self.categories[turns], slate=self.slate[turns], choice=self.choice[turns], critique=of(self.critique, turns),
            compare=self.compare[turns], reward=self.reward[turns], behavior=of(self.behavior, turns), images=self.images[turns])


class Observations(NamedTuple):
    """Turns as a user model reads them, flat, ordered by (user, session, turn). Embeddings are float32 of unit norm and width d."""
    user: np.ndarray              # (N,) int64 in 0..U-1
    start: np.ndarray             # (N, d): the prompt that the session began with, what the user wants
    base: np.ndarray              # (N, d): the prompt that this turn began with
    images: np.ndarray            # (N, L, M, d)
    choice: np.ndarray            # (N,) int64
    before: np.ndarray            # (N,) int64: row of the turn before in the same session, -1 at a first turn
    compare: np.ndarray           # (N,) int64: 1 better, 0 same, -1 worse, 2 not asked
    turn: np.ndarray              # (N,) int64
    session: np.ndarray           # (N,) int64: index in the Log


def joined(logs):
    """Logs one after the other as one; users of equal id are one user."""
    texts, users, image_ids = {}, {}, {}
    add = lambda table, values: np.array([table.setdefault(v, len(table)) for v in values], np.int64)
    parts, turns = [], 0
    width = max(log.candidates.shape[1] for log in logs)
    if len({(log.slate.shape[1], log.images.shape[2]) for log in logs}) > 1:
        raise ValueError(f"logs of different slates: {', '.join(f'{log.slate.shape[1]} columns of {log.images.shape[2]} images' for log in logs)}")
    at = lambda table, rows: np.where(rows >= 0, table[rows], -1) if len(table) else rows
    for log in logs:
        t, u, i = add(texts, log.texts), add(users, log.user_ids), add(image_ids, log.image_ids)
        pad = ((0, 0), (0, width - log.candidates.shape[1]))
        parts.append(log._replace(user=u[log.user], prompt=t[log.prompt], candidates=np.pad(at(t, log.candidates), pad, constant_values=-1),
                                  categories=np.pad(log.categories, pad, constant_values=-1), images=at(i, log.images), first=log.first[:-1] + turns))
        turns += len(log.choice)
    merged = {}
    for name in Log._fields:
        values = [getattr(p, name) for p in parts]
        merged[name] = np.concatenate(values) if isinstance(values[0], np.ndarray) else [v for part in values for v in part]
    return Log(**merged | dict(texts=list(texts), user_ids=list(users), image_ids=list(image_ids), first=np.append(merged["first"], turns)))


def write(log, path):
    """A Log as JSON lines, one session each; written in whole or not at all."""
    lines = []
    for s, session_id in enumerate(log.session_ids):
        turns = []
        for t, n in enumerate(range(log.first[s], log.first[s + 1])):
            turn = dict(t=t, candidates=[dict(category=CATEGORIES[c], text=log.texts[x]) for c, x in zip(log.categories[n], log.candidates[n]) if x >= 0],
                        slate=log.slate[n].tolist())
            if log.images.shape[2]:
                turn["images"] = [[log.image_ids[i] for i in column] for column in log.images[n]]
            turn["choice"] = int(log.choice[n])
            optional = dict(critique=log.critique[n], compare={v: k for k, v in COMPARE.items()}[int(log.compare[n])],
                            reward=None if np.isnan(log.reward[n]) else float(log.reward[n]), behavior=log.behavior[n])
            turns.append(turn | {k: v for k, v in optional.items() if v not in ("", None)})
        lines.append(json.dumps(dict(session=session_id, user=log.user_ids[log.user[s]], source=log.source[s], prompt=log.texts[log.prompt[s]],
                                     end=END[log.end[s]], turns=turns), ensure_ascii=False))
    write_atomically(path, "".join(line + "\n" for line in lines))


def read(path, slate_size=None, one_per_category=True):
    """-> Log of a session file. ValueError with file and line: not JSON, not UTF-8, a key that is missing, unknown or of another type, a choice that is missing
    or out of range, a slate of another size than the first (or than slate_size), a candidate shown twice, two of one category (unless allowed),
    turns out of order, a comparison at the first turn, a session without turns, a session id twice. Sessions may differ in length."""
    texts, users, image_ids, seen = {}, {}, {}, {}
    sessions, turns = [], []
    shape = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            try:
                record = load_strict(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not a JSON object: {error}") from None
            if b"\\u" in line:                                           # only an escape can spell half a character, which no file can hold
                try:
                    json.dumps(record, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"{where}: {error.object[error.start]!r} is half of a surrogate pair, no character") from None
            get = fields(record, where, dict(session=str, user=str, source=str, prompt=str, end=str, turns=list))
            if get["session"] in seen:
                raise ValueError(f"{where}: session {get['session']!r} stands on line {seen[get['session']]}, too")
            seen[get["session"]] = number
            if get["end"] not in END:
                raise ValueError(f"{where}: end {get['end']!r}: expected one of {', '.join(END)}")
            if get["source"] != "human" and not get["source"].startswith("sim:"):
                raise ValueError(f"{where}: source {get['source']!r}: expected human or sim:<name>")
            if not get["turns"]:
                raise ValueError(f"{where}: a session without turns")
            sessions.append((get["session"], users.setdefault(get["user"], len(users)), get["source"], END.index(get["end"]),
                             texts.setdefault(get["prompt"], len(texts)), len(get["turns"])))
            for t, turn in enumerate(get["turns"]):
                turns.append(read_turn(turn, t, f"{where}: turn {t}", texts, image_ids, one_per_category))
                found = (len(turns[-1]["slate"]), len(turns[-1]["images"][0]) if turns[-1]["images"] else 0)
                shape = shape or (slate_size or found[0], found[1])
                if found != shape:
                    raise ValueError(f"{where}: turn {t}: {found[0]} columns of {found[1]} images, expected {shape[0]} of {shape[1]} as "
                                     f"{'--slate_size says' if slate_size and found[0] != slate_size else 'in the turns before'}")
    if not sessions:
        raise ValueError(f"{path}: empty, expected one session a line")
    width = max(len(turn["candidates"]) for turn in turns)
    padded = lambda key: np.array([turn[key] + [-1] * (width - len(turn[key])) for turn in turns], np.int64)
    column = lambda key: [turn[key] for turn in turns]
    ids, user, source, end, prompt, lengths = zip(*sessions)
    return Log(list(ids), list(users), np.array(user), list(source), np.array(end), np.array(prompt), np.concatenate([[0], np.cumsum(lengths)]), list(texts),
               padded("candidates"), padded("categories"), np.array(column("slate")), np.array(column("choice")), column("critique"),
               np.array(column("compare")), np.array(column("reward"), np.float64), column("behavior"), list(image_ids),
               np.array(column("images"), np.int64).reshape(len(turns), *shape))


def fields(record, where, required, optional=()):
    """A JSON object's values, checked by name and type. A bool is no number."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
    optional = dict(optional)
    for key in record:
        if key not in required and key not in optional:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join((*required, *optional))}")
    for key, kind in (required | optional).items():
        if key not in record:
            if key in required:
                raise ValueError(f"{where}: {key!r} is missing")
        elif not isinstance(record[key], kind) or isinstance(record[key], bool):
            expected = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise ValueError(f"{where}: {key} is {type(record[key]).__name__}, expected {expected}")
    return record


def read_turn(turn, t, where, texts, image_ids, one_per_category):
    fields(turn, where, dict(t=int, candidates=list, slate=list, choice=int), dict(images=list, critique=str, compare=str, reward=(int, float), behavior=str))
    if turn["t"] != t:
        raise ValueError(f"{where}: t is {turn['t']}, expected {t}: turns count from 0 without a gap")
    candidates, categories = [], []
    for i, c in enumerate(turn["candidates"]):
        fields(c, f"{where}: candidate {i}", dict(category=str, text=str))
        if c["category"] not in CATEGORIES:
            raise ValueError(f"{where}: candidate {i}: category {c['category']!r}: expected one of {', '.join(CATEGORIES)}")
        candidates.append(texts.setdefault(c["text"], len(texts)))
        categories.append(CATEGORIES.index(c["category"]))
    slate, choice = turn["slate"], turn["choice"]
    if not slate or not all(type(i) is int and 0 <= i < len(candidates) for i in slate):
        raise ValueError(f"{where}: slate {slate}: expected indices of {len(candidates)} candidates")
    if len(set(slate)) < len(slate):
        raise ValueError(f"{where}: slate {slate} shows a candidate twice")
    shown = [categories[i] for i in slate]
    if one_per_category and len(set(shown)) < len(shown):
        raise ValueError(f"{where}: slate {slate} shows two of one category: --max_per_category=0 allows it")
    if not 0 <= choice < len(slate):
        raise ValueError(f"{where}: choice {choice}: expected one of {len(slate)} columns, 0 to {len(slate) - 1}")
    images = turn.get("images", [])
    if images:
        if len(images) != len(slate) or not all(isinstance(c, list) and len(c) == len(images[0]) and c and all(isinstance(i, str) for i in c) for c in images):
            raise ValueError(f"{where}: images: expected {len(slate)} columns of equally many ids")
    compare = turn.get("compare")
    if compare not in COMPARE:
        raise ValueError(f"{where}: compare {compare!r}: expected better, same or worse")
    if compare is not None and t == 0:
        raise ValueError(f"{where}: compare at the first turn, which has none before it")
    try:
        reward = float(turn.get("reward", np.nan))
    except OverflowError:
        raise ValueError(f"{where}: reward is beyond the range of a double") from None
    return dict(candidates=candidates, categories=categories, slate=slate, choice=choice, critique=turn.get("critique", ""), compare=COMPARE[compare],
                reward=reward, behavior=turn.get("behavior", ""),
                images=[[image_ids.setdefault(i, len(image_ids)) for i in column] for column in images])


def observations(log, ids, emb):
    """-> Observations of a Log. ids: list of the embedding file's ids (of images, and of prompts by their text), emb (E, d). Turns are put in order of
    (user, session, turn). ValueError: an id without embedding, a table of another shape or with numbers that are none, a log without images."""
    emb = np.asarray(emb)
    if emb.ndim != 2 or len(emb) != len(ids):
        raise ValueError(f"embeddings of shape {emb.shape}, expected one row for each of {len(ids):,} ids")
    if not log.images.shape[2]:
        raise ValueError("the sessions name no images: a user model needs what the users saw")
    row = {x: i for i, x in enumerate(ids)}

    def rows(names, what):
        found = [row.get(name, -1) for name in names]
        if -1 in found:
            raise ValueError(f"{what} {names[found.index(-1)]!r} is not in the embedding file ({sum(f < 0 for f in found):,} of {len(found):,} are not)")
        return np.array(found, np.int64)
    order = np.argsort(log.user, kind="stable")
    log = log.take(order)
    base = log.base
    used = np.unique(np.concatenate([log.prompt, base]))
    text_row = np.zeros(len(log.texts), np.int64)
    text_row[used] = rows([log.texts[i] for i in used], "prompt")
    used = np.unique(log.images)
    image_row = np.zeros(len(log.image_ids), np.int64)
    image_row[used] = rows([log.image_ids[i] for i in used], "image")
    e = unit(emb.astype(np.float32)).astype(np.float32)
    if not np.isfinite(e).all():
        raise ValueError(f"the embedding of {ids[int((~np.isfinite(e).all(1)).argmax())]!r} is not finite")
    session, turn = log.session, log.turn
    before = np.where(turn > 0, np.arange(len(turn)) - 1, -1)
    return Observations(log.user[session], e[text_row[log.prompt]][session], e[text_row[base]], e[image_row[log.images]], log.choice, before, log.compare,
                        turn, order[session])


def write_truth(path, log, kind, utility):
    """What only an evaluation opens: the type of each user (one line a session) and the utility of each column of each turn. utility (N, L)."""
    write_atomically(path, "".join(json.dumps(dict(session=sid, user=log.user_ids[u], type=int(kind[s]),
                                                   utility=utility[log.first[s]:log.first[s + 1]].round(6).tolist())) + "\n"
                                   for s, (sid, u) in enumerate(zip(log.session_ids, log.user))))


def read_truth(path, log):
    """-> ((S,) int64 types, (N, L) float64 utilities) in the order of the log's sessions. ValueError: a session that the file lacks, utilities of
    another shape than its slates."""
    turns = dict(zip(log.session_ids, np.diff(log.first).tolist()))
    lines = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = load_strict(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
        fields(record, f"{path}:{number}", dict(session=str, user=str, type=int, utility=list))
        rows, columns = record["utility"], log.slate.shape[1]
        if not all(isinstance(row, list) and len(row) == columns and all(type(u) in (int, float) for u in row) for row in rows) \
                or len(rows) != turns.get(record["session"], len(rows)):
            raise ValueError(f"{path}:{number}: utility: expected a row of {columns} numbers for each of the session's turns")
        lines[record["session"]] = record
    if missing := [s for s in log.session_ids if s not in lines]:
        raise ValueError(f"{path}: has no truth of {len(missing)} sessions, among them {missing[0]!r}")
    found = [lines[s] for s in log.session_ids]
    return np.array([r["type"] for r in found], np.int64), np.concatenate([np.array(r["utility"], np.float64) for r in found])


def parts_of(user_ids, seed=0, shares=(.7, .15, .15)):
    """-> (U,) int64: 0 fit, 1 validation, 2 test, by a hash of the user: all that a user did is in one part, whatever else a file holds."""
    place = np.array([random_key("part of", seed, u) for u in user_ids], np.float64) / 2**63
    return np.searchsorted(np.cumsum(shares)[:-1], place, side="right")
