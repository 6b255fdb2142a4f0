"""Training data by name: open_sources("toy,mine=chats.jsonl", tokenizer, seq_len=384) -> {name: TokenFile}. Formats: data/README.md."""
import difflib
import hashlib
import re
import sys
from pathlib import Path

from common import progress
from data import tokens
from data.tokens import Chunk, TokenFile

NUM_TOY = 10_000               # documents of a toy task; small tasks (96 facts) repeat
NUM_TOY_VAL = 500
NUM_EPISODES = 2_000           # of the tool environment: those that call Python run it


def open_sources(spec, tokenizer, *, seq_len, cache_dir="out/cache", split="train", long="error", seed=0, num=None, val_share=0.01):
    """-> {name: TokenFile} of `split`, in the order of `spec`; builds what is not in the cache yet.

    spec: comma-separated `toy` (its six chat tasks), `toy/TASK`, `stdlib`, `gsm8k`, `mbpp`, `tools`, a path, or `NAME=` any one of these. A path gives one
        source for its texts, named after the file, and one for each bucket of its conversations; NAME= puts them under one name.
    long: a conversation over seq_len + 1 tokens: "error", or "drop" (counted in .num_dropped).
    seed, num: of generated toy documents. val_share: held out where a source has no split of its own, 0 to below 1.
    A source without held-out documents has length 0 with split="val"; with split="train" it is an error.
    """
    if split not in ("train", "val"):
        raise ValueError(f"expected split train or val, found {split!r}")
    if not 0 <= val_share < 1:
        raise ValueError(f"expected a held-out share of at least 0 and below 1, found {val_share}")
    key = [tokenizer.fingerprint(), val_share]              # common part of the cache keys; a fingerprint takes a quarter of a second
    sources = {}
    for item in spec.split(","):
        for name, folder in _folders(item.strip(), tokenizer, cache_dir, key, seed, num, val_share):
            if name in sources:
                raise ValueError(f"--data={spec}: two sources are named {name}: rename one as NAME=..., or put the files in one folder")
            source = TokenFile(folder, split, seq_len=seq_len, long=long, fingerprint=key[0])
            if split == "train" and not len(source):
                raise ValueError(f"--data={item}: nothing to train on in {name} ({source.describe()}; val_share {val_share}): {folder}")
            sources[name] = source
    return sources


def parse_shares(text, sources):
    """--mix "math:.6,code:.4" -> {"math": .6, "code": .4}; "" -> None, which is: as large as the sources are."""
    shares = {}
    for item in filter(None, text.split(",")):
        name, _, share = item.rpartition(":")
        name = name.strip()
        if name not in sources:
            raise ValueError(f"--mix={text}: no source is named {name!r}{_did_you_mean(name, sources)}")
        if name in shares:
            raise ValueError(f"--mix={text}: {name} is given twice")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ValueError(f"--mix={text}: expected a number for {name}, found {share!r}") from None
    return shares or None


def _did_you_mean(name, names):
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else f", expected one of {', '.join(names)}"


def _folders(item, tokenizer, cache_dir, key, seed, num, val_share):
    """[(source name, folder)] of one item of --data."""
    from data import toy  # here, since it imports this package on its way in
    prefix, equals, rest = item.partition("=")
    given = prefix if equals and re.fullmatch(r"[\w.-]+", prefix) and not Path(item).exists() else None
    item = rest if given else item
    tasks = [f"toy/{task}" for task in toy.TEXT_TASKS + toy.CHAT_TASKS]
    names = ["toy", "stdlib", "gsm8k", "mbpp", "tools", *tasks]
    if item == "toy":
        if given:
            raise ValueError(f"--data={given}=toy: toy is six sources; name one of them: {given}=toy/{toy.CHAT_TASKS[0]}")
        return [pair for task in toy.MIXTURE for pair in _folders(f"toy/{task}", tokenizer, cache_dir, key, seed, num, val_share)]
    if item in names:
        name = given or item.removeprefix("toy/")
        return [(name, _generated(item, tokenizer, cache_dir, key, seed, num, val_share))]
    path = Path(item).expanduser()
    if not item or not path.exists():
        near = difflib.get_close_matches(item, names, n=1)
        raise ValueError(f"--data: no source and no file is called {item!r}, expected a path or one of {', '.join(names)}"
                         + (f"; did you mean {near[0]}?" if near else ""))
    return _from_path(path, given, tokenizer, cache_dir, key, val_share)


def _from_path(path, given, tokenizer, cache_dir, key, val_share):
    stem = re.sub(r"[^\w.-]", "_", path.resolve().stem)     # a source's name is part of flags and of metric names
    files = [file.resolve() for file in tokens.input_files(path)]
    stats = [file.stat() for file in files]
    key = key + [[str(f) for f in files], [[s.st_size, s.st_mtime_ns] for s in stats], given]
    root = tokens.cached(cache_dir, stem, key, lambda folder: tokens.write_sources(
        folder, tokenizer, tokens.file_chunks(files, tokenizer, val_share, given), inputs=files))
    folders = sorted(f for f in root.iterdir() if f.is_dir())
    if given and len(folders) > 1:
        raise ValueError(f"--data={given}={path}: texts and conversations cannot share a name; give them one path each")
    return [(given or (stem if f.name == "text" else f.name.removeprefix("chat-")), f) for f in folders]


def _generated(item, tokenizer, cache_dir, key, seed, num, val_share):
    """Folder of a source that code in data/ makes."""
    from data import episodes, gsm8k, mbpp, stdlib, toy
    task = item.removeprefix("toy/")
    code = hashlib.sha256()                                 # whoever edits a generator trains on what the edited one generates
    helpers = ("data.episodes", "data.episode_tasks", "data.episode_words") if item == "tools" else ()
    for module in (f"data.{item.partition('/')[0]}", "data.calculator", *helpers):
        code.update(Path(sys.modules[module].__file__).read_bytes())

    def documents():                                        # (split, text or record)
        if item == "stdlib":
            for split in ("train", "val"):
                yield from ((split, text) for _, text in stdlib.files(split))
        elif item == "gsm8k":                               # its test rows are for evaluation alone
            for record in gsm8k.conversations("train"):
                yield tokens.split_of(record["messages"][0]["content"], val_share), record
        elif item == "mbpp":
            yield from (("train", record) for record in mbpp.conversations("train"))
            yield from (("val", record) for record in mbpp.conversations("validation"))
        elif item == "tools":
            yield from (("train", record) for record in episodes.conversations("train", seed, num or NUM_EPISODES))
            yield from (("val", record) for record in episodes.conversations("test", seed, min(num or NUM_TOY_VAL, NUM_TOY_VAL)))
        else:
            make = toy.documents if task in toy.TEXT_TASKS else toy.conversations
            yield from (("train", document) for document in make(task, "train", seed, num or NUM_TOY))
            yield from (("val", document) for document in make(task, "test", seed, min(num or NUM_TOY_VAL, NUM_TOY_VAL)))

    def chunks():
        for number, (split, document) in enumerate(progress(documents(), desc=f"make {item}")):
            if isinstance(document, str):
                yield Chunk("source", split, tokens.encode_text(tokenizer, document))
            else:
                ids, mask = tokens.encode_chat(tokenizer, document, f"{item}: document {number}")
                yield Chunk("source", split, ids, mask, line=number)

    key = key + [item, code.hexdigest(), sys.version, seed, num]
    root = tokens.cached(cache_dir, item.replace("/", "-"), key,
                         lambda folder: tokens.write_sources(folder, tokenizer, chunks(), inputs=[item]))
    return root / "source"
