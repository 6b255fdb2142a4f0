"""Single-turn preferences from files: pairs, ratings and rankings of images that a prompt gave, one JSON object a line, mixed as they come.

    {"prompt": "a fox", "image_a": "img1", "image_b": "img2", "label": 1, "user": "ann"}          1: a is preferred, 0: b, 0.5: neither
    {"prompt": "a fox", "image": "img1", "rating": 3.5, "user": "ann"}                            any scale, higher is better
    {"prompt": "a fox", "images": ["img1", "img2", "img3"], "rank": [2, 1, 2], "user": "ann"}     1 is best, equal ranks are ties

Prompts and images are ids of an embedding file (data/embeddings.py), a prompt's id is its text. A ranking becomes all its pairs, which weigh 1 together: it is
one opinion. A record without "user" counts as a user of its own, about whom nothing else is known.
"""
import itertools
import math
from typing import NamedTuple

import numpy as np

from data.slate import fields
from tokenizer import load_strict

KINDS = {"image_a": dict(prompt=str, image_a=str, image_b=str, label=(int, float)), "image": dict(prompt=str, image=str, rating=(int, float)),
         "images": dict(prompt=str, images=list, rank=list)}


class Preferences(NamedTuple):
    """In the order of the files. where: "file:line"."""
    pairs: list                 # (user, prompt, image_a, image_b, label, weight, where)
    ratings: list               # (user, prompt, image, rating, where)


def read(paths):
    """Files -> Preferences. ValueError with file and line: not JSON, not UTF-8, no kind or two kinds of record, a key that is unknown, missing or of another
    type, a label that is none, a rating that is not finite, a ranking of one image, of an image twice, or with ranks that do not count from 1."""
    found = Preferences([], [])
    for path in paths:
        before = len(found.pairs) + len(found.ratings)
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    read_record(line, f"{path}:{number}", found)
        if len(found.pairs) + len(found.ratings) == before:
            raise ValueError(f"{path}: empty, expected one pair, rating or ranking a line")
    return found


def read_record(line, where, found):
    try:
        record = load_strict(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object: {error}") from None
    kinds = [kind for kind in KINDS if isinstance(record, dict) and kind in record]
    if len(kinds) != 1:
        raise ValueError(f"{where}: expected image_a and image_b (a pair), image (a rating) or images (a ranking), found "
                         f"{', '.join(kinds) or 'none of them'}")
    fields(record, where, KINDS[kinds[0]], dict(user=str))
    user, prompt = record.get("user", where), record["prompt"]               # nobody else has this name: a file and a line
    if kinds[0] == "image_a":
        if record["label"] not in (0, 0.5, 1):
            raise ValueError(f"{where}: label {record['label']}: expected 1 (a), 0 (b) or 0.5 (neither)")
        found.pairs.append((user, prompt, record["image_a"], record["image_b"], float(record["label"]), 1.0, where))
    elif kinds[0] == "image":
        try:
            rating = float(record["rating"])
        except OverflowError:
            rating = math.inf
        if not math.isfinite(rating):
            raise ValueError(f"{where}: rating {record['rating']!s:.20}: expected a finite number")
        found.ratings.append((user, prompt, record["image"], rating, where))
    else:
        images, rank = record["images"], record["rank"]
        if len(images) < 2 or not all(isinstance(image, str) for image in images) or len(set(images)) < len(images):
            raise ValueError(f"{where}: images: expected at least 2 different ids")
        if len(rank) != len(images) or not all(type(x) is int and 1 <= x <= len(images) for x in rank) or 1 not in rank:
            raise ValueError(f"{where}: rank {rank}: expected {len(images)} whole numbers from 1, the best")
        both = list(itertools.combinations(range(len(images)), 2))
        found.pairs.extend((user, prompt, images[i], images[j], 0.5 if rank[i] == rank[j] else float(rank[i] < rank[j]), 1 / len(both), where)
                           for i, j in both)


def arrays(preferences, ids, emb, users):
    """-> (pairs, ratings): dicts of the columns of user_model.Pairs and Ratings, None where there are none, ordered by user.

    ids: of the rows of emb (E, d). users: {user id: number}, to which new ones are added. ValueError with file and line: an id without embedding.
    """
    place = {name: row for row, name in enumerate(ids)}

    def rows(records, column, what):
        found = [place.get(record[column], -1) for record in records]
        if -1 in found:
            record = records[found.index(-1)]
            raise ValueError(f"{record[-1]}: {what} {record[column]!r} is not in the embedding file ({sum(f < 0 for f in found):,} of {len(found):,} are not)")
        vectors = np.asarray(emb[np.array(found, np.int64)], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    tables = []
    for records, names in ((preferences.pairs, ("prompt", "image_a", "image_b", "label", "weight")), (preferences.ratings, ("prompt", "image", "rating"))):
        if not records:
            tables.append(None)
            continue
        numbers = np.array([users.setdefault(record[0], len(users)) for record in records], np.int64)
        order = np.argsort(numbers, kind="stable")
        records = [records[i] for i in order]
        tables.append(dict(user=numbers[order]) | {
            name: np.array([record[i] for record in records], np.float32) if name in ("label", "weight", "rating") else rows(records, i, name)
            for i, name in enumerate(names, 1)})
    return tuple(tables)
