"""Files of embeddings: vectors of prompts and images by id, and the name of the model that made them.

An uncompressed .npz with ids (N,) of str, emb (N, d) of float16 or float32, model (a str) and normalized (a bool). Any program with numpy can write
one; data/clip.py does. No pickle is ever loaded.
"""
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoint import sync


class Embeddings(NamedTuple):
    ids: list              # N different str
    emb: np.ndarray        # (N, d) float16 or float32
    model: str             # what made them: embeddings of two models cannot be compared
    normalized: bool       # rows have length 1


def _checked(e, where):
    """e, or ValueError that begins with `where`."""
    ids, emb = e.ids, e.emb
    if emb.ndim != 2 or emb.dtype not in (np.float16, np.float32) or not emb.size:
        raise ValueError(f"{where}: expected emb (N, d) of float16 or float32, not empty, found shape {emb.shape} of {emb.dtype}")
    if len(ids) != len(emb):
        raise ValueError(f"{where}: {len(ids)} ids for {len(emb)} rows of emb")
    if len(set(ids)) < len(ids):
        seen = set()
        raise ValueError(f"{where}: the id {next(i for i in ids if i in seen or seen.add(i))!r} occurs twice")
    if not isinstance(e.model, str) or not e.model or not isinstance(e.normalized, bool):
        raise ValueError(f"{where}: expected the model's name and normalized true or false, found {e.model!r} and {e.normalized!r}")
    for start in range(0, len(emb), 4096):                      # in blocks: the file may be larger than memory
        norms = np.linalg.norm(emb[start:start + 4096].astype(np.float64), axis=1)
        bad = ~np.isfinite(norms) | (e.normalized & (abs(norms - 1) > 0.01))
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"{where}: the row of {ids[start + row]!r} has length {norms[row]:.4g}, expected " + ("1" if e.normalized else "finite numbers"))
    return e


def save_embeddings(path, ids, emb, model, normalized):
    """Writes an uncompressed .npz under a temporary name and renames it. See Embeddings; emb may be a memory map. The same input gives the same bytes."""
    path = Path(path)
    if path.suffix != ".npz" or any(not isinstance(i, str) or i.endswith("\0") for i in ids):          # numpy drops a NUL at the end
        raise ValueError(f"{path}: expected a name that ends in .npz, and str ids")
    _checked(Embeddings(list(ids), emb, model, normalized), path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        np.savez(f, ids=np.array(ids, dtype=np.str_), emb=emb, model=np.array(model), normalized=np.array(normalized))
    sync(temporary)
    os.replace(temporary, path)


def load_embeddings(path):
    """-> Embeddings, emb memory-mapped (read-only) unless the .npz is compressed. Everything is read once, to check sums and numbers.

    ValueError: truncated or damaged, missing members, objects (no pickle is ever loaded), doubled ids, NaN, rows that are not of length 1 though
    `normalized` says so.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} is damaged")
            lacking = {"ids.npy", "emb.npy", "model.npy", "normalized.npy"} - set(archive.namelist())
            if lacking:
                raise ValueError(f"expected ids, emb, model and normalized, found no {', '.join(sorted(lacking))}")

            def read(name):
                with archive.open(f"{name}.npy") as member:
                    return np.lib.format.read_array(member, allow_pickle=False)
            ids, model, normalized = read("ids"), read("model"), read("normalized")
            if ids.ndim != 1 or ids.dtype.kind != "U" or model.shape != () or model.dtype.kind != "U" or normalized.shape != () or normalized.dtype != bool:
                raise ValueError(f"expected ids (N,) of str, model a str, normalized a bool, found {ids.dtype}, {model.dtype}, {normalized.dtype}")
            info = archive.getinfo("emb.npy")
            emb = read("emb") if info.compress_type != zipfile.ZIP_STORED else _mapped(path, info.header_offset)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        raise ValueError(f"{path}: cannot be read as a file of embeddings: {e}") from None
    return _checked(Embeddings(ids.tolist(), emb, model.item(), normalized.item()), path)


def _mapped(path, position):
    """The .npy inside a zip whose local header (30 bytes, a name, extra fields) begins at `position`, mapped."""
    with open(path, "rb") as f:
        f.seek(position + 26)
        f.seek(sum(struct.unpack("<HH", f.read(4))), 1)
        version = np.lib.format.read_magic(f)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(f)
        if dtype.hasobject or not math.prod(shape):
            raise ValueError(f"expected numbers in emb, found {dtype} of shape {shape}")
        return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C")


def check_same(a, b):
    """ValueError unless two Embeddings can be compared: of one model, in one width, both normalised or both not."""
    for what in ("model", "normalized"):
        if getattr(a, what) != getattr(b, what):
            raise ValueError(f"two files of embeddings differ in {what}: {getattr(a, what)} and {getattr(b, what)}; embed prompts and images alike")
    if a.emb.shape[1] != b.emb.shape[1]:
        raise ValueError(f"two files of embeddings of {a.model} differ in width: {a.emb.shape[1]} and {b.emb.shape[1]}")
