"""The standard library of the running interpreter: about 10 MB of Python that is already on every machine.

    for name, text in files("train"): ...        # ("argparse.py", "# Author: Steven J. Bethard ..."), ...

Enough text to pre-train a toy base on, with code in it, and no download. What it holds depends on the Python version
(so do not compare losses across versions); which split a file is in does not: that is a hash of its name.
"""
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# tests, programs and installed packages are not the library; encodings is mostly character tables
SKIP = {"__pycache__", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "encodings", "ensurepip",
        "site-packages", "dist-packages"}
VAL_ONE_IN = 20  # 5 % of the files


def files(split: str = "train") -> Iterator[tuple[str, str]]:
    """(path relative to the library, source text) of "train" or "val", in order of path; no file is empty."""
    if split not in ("train", "val"):
        raise ValueError(f"stdlib: expected split train or val, found {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = _names(root)
    if not names:
        raise FileNotFoundError(f"expected Python sources under {root}, found none: this interpreter ships without "
                                "them; use one that has them, or another --data")
    for name in names:
        if split_of(name) == split:
            text = read_source(root / name)
            if text.strip():
                yield name, text


def split_of(name: str) -> str:
    """"train" or "val" by a hash of the relative path: adding or removing files moves no other file."""
    return "val" if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % VAL_ONE_IN == 0 else "train"


def _names(root):
    names = []
    for folder, folders, filenames in os.walk(root):
        # pruned in place, so that a large site-packages is never walked; config-* holds the build, not the library
        folders[:] = [f for f in folders if f not in SKIP and not f.startswith("config-")]
        names += [Path(folder, f).relative_to(root).as_posix() for f in filenames if f.endswith(".py")]
    return sorted(names)


def read_source(path: Path) -> str:
    """Source text by the rules of PEP 263: a byte-order mark or a coding line in the first two lines, else UTF-8; every
    line ends in a single newline character. A file that breaks its own declaration raises, as importing it would."""
    with tokenize.open(path) as file:
        return file.read()
