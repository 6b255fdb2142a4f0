"""How much memory does a large text file take? Makes one, tokenizes it, reads batches from it, and prints the process's resident memory.

    python -m runs.memory_text --gigabytes=2        2.5 GB of disk in the temporary folder per GB of text, all of it deleted again

VmHWM is the peak of resident memory: RssAnon (the process's own) and RssFile (pages of mapped files: libraries, and the small index arrays of
a token file). Tokens are read with pread, which maps nothing, so VmHWM itself must not grow with --gigabytes; what the system keeps of
the file in its page cache belongs to no process and is given back when somebody needs it.
"""
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import parse_config, progress
from data import open_sources
from data.packing import Loader, make_batch
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    gigabytes: float = 0.2           # size of the text, in 1e9 bytes
    num_batches: int = 1000          # batches to read: higher touches more of the file
    rows: int = 16                   # rows per batch
    seq_len: int = 2048              # tokens per row
    tokenizer: str = "bytes"         # bytes, or a Hugging Face tokenizer.json


def resident():
    """{"VmHWM", "RssAnon", "RssFile"} in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: round(int(words[1]) / 1024) for words in lines if words[0] in ("VmHWM:", "RssAnon:", "RssFile:")}


def main(cfg):
    tokenizer = Tokenizer.bytes() if cfg.tokenizer == "bytes" else Tokenizer.from_file(cfg.tokenizer)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(5000)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.txt")
        with open(path, "wb") as f:
            block = "\n".join(" ".join(rng.choice(words, 12)) for _ in range(12_000)).encode()[:999_999] + b"\n"
            for _ in progress(range(round(cfg.gigabytes * 1e9 / len(block))), desc="write"):
                f.write(block)
        size = path.stat().st_size
        seen = {"start": resident()}
        t0 = time.perf_counter()
        sources = open_sources(str(path), tokenizer, seq_len=cfg.seq_len, cache_dir=folder)
        build_seconds = time.perf_counter() - t0
        seen["built"] = resident()
        loader, read = Loader(sources, seq_len=cfg.seq_len), 0
        t0 = time.perf_counter()
        for _ in progress(range(cfg.num_batches), desc="read"):
            read += make_batch(loader.next_rows(cfg.rows), sources, cfg.seq_len).num_tokens
        read_seconds = time.perf_counter() - t0
        seen["read"] = resident()
        for when, memory in seen.items():
            print(f"{when:>6}", "  ".join(f"{k} {v:5d} MB" for k, v in memory.items()))
        result = dict(gigabytes=size / 1e9, tokens=sources["large"].num_tokens, build_mb_per_sec=round(size / build_seconds / 1e6),
                      read_tokens=read, read_tokens_per_sec=round(read / read_seconds), peak_mb=seen["read"]["VmHWM"],
                      grown_mb=seen["read"]["VmHWM"] - seen["start"]["VmHWM"])
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(parse_config(Config))
