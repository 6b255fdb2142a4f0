"""Token files: documents as flat arrays on disk, written once by streaming, read a piece at a time.

A source is a folder with meta.json and, for each split (train/, val/), arrays without headers:

    ids.bin      uint16, or uint32 for a vocabulary above 65,536             (tokens,)
    offsets.bin  int64; document d is ids[offsets[d] : offsets[d + 1]]       (docs + 1,)
    mask.bin     uint8, 1 where a token is trained on                        (tokens,)    conversations only
    docs.bin     int64: trained-on tokens, input file, line                  (docs, 3)    conversations only

Plain text has no mask: every token is trained on but a document's first, which nothing predicts. From here on text and conversations are
the same thing. `ids` and `mask` are read by position (pread), not mapped: the pages of a mapping count as resident memory, so a process
that had read a 4 GB file once would be 4 GB large. Only the small arrays, 8 to 24 bytes a document, are mapped.
"""
import fcntl
import hashlib
import json
import os
import shutil
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import progress
from data.chat import first_user_message, open_lines, parse_line

VERSION = 1                    # of the layout above
BLOCK = 1 << 20                # bytes read, checked and tokenized at a time
MAX_VAL_BYTES = 1 << 20        # held out of a single document


class Chunk(NamedTuple):
    """A document on its way to disk; a long text comes in several, the last of which says so."""
    source: str                # folder of the source
    split: str                 # train or val
    ids: list                  # or an array, (n,)
    mask: list | None = None   # (n,) 0 or 1; None: plain text
    last: bool = True
    file: int = 0              # index into `inputs`, and line in that file: for error messages
    line: int = 0


# -----------------------------------------------------------------------------
# Reading inputs


def input_files(path):
    """The file itself, or every file below a folder, sorted. Hidden files and folders (.git, .DS_Store) are not data."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    if not files:
        raise ValueError(f"{path}: expected a folder with text or .jsonl files, found none")
    return sorted(files)


def is_jsonl(path):
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def line_cut(block):
    return block.rfind(b"\n") + 1


def text_cut(block):
    """Where to end a block so that its tokens, followed by those of the rest, are the tokens of the whole text.

    After a newline between a character that is no white space and a letter or digit: the pre-tokenizers of GPT-2, GPT-4, Llama 3 and
    Qwen all end a piece there, whatever stands on the other side. Without such a place in the last 64 KB (one endless line, base64), any
    boundary between characters: the text is the same, and at most a few tokens a megabyte are not those of a single pass.
    """
    floor, at = max(4, len(block) - 65536), len(block) - 4            # 4: the next character must be whole
    while (at := block.rfind(b"\n", floor, at)) != -1:
        before = block[at - 4:at].decode("utf-8", "ignore")[-1:]
        after = block[at + 1:at + 5].decode("utf-8", "ignore")[:1]
        if before and not before.isspace() and after.isalnum():
            return at + 1
    at = len(block) - 1
    while at > 1 and block[at] & 0xC0 == 0x80:                        # back to the first byte of the last character
        at -= 1
    return at


def read_blocks(f, start, stop, cut):
    """Yields (position, bytes, last) of about a megabyte from an open binary file; stop None: to its end."""
    f.seek(start)
    position, rest = start, b""
    while True:
        data = f.read(BLOCK if stop is None else min(BLOCK, stop - position - len(rest)))
        block = rest + data
        last = not data or position + len(block) == stop
        end = len(block) if last else cut(block)            # a file that fits is never cut
        if end or last:                                     # a line longer than a block is collected first
            yield position, block[:end], last
        if last:
            return
        position, rest = position + end, block[end:]


def single_document_cut(path, size, share):
    """Byte at which the last `share` of a single document begins, after a newline if one is near."""
    at = size - min(int(size * share), MAX_VAL_BYTES)
    with open(path, "rb") as f:
        f.seek(at)
        block = f.read(65536)
    newline = block.find(b"\n")
    if newline != -1 and at + newline + 1 < size:
        return at + newline + 1
    return at + next((i for i, byte in enumerate(block) if byte & 0xC0 != 0x80), 0)


def split_of(text, share):
    """train or val by hash of the content, so that a duplicate never sits on both sides and an added document moves no other."""
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return "val" if int.from_bytes(digest, "little") < share * 2**64 else "train"


def encode_text(tokenizer, text):
    """Ids (n,) of a text document, the end-of-text included; of an empty one, none."""
    ids = np.asarray(tokenizer.encode(text), dtype=np.int64)
    return np.append(ids, tokenizer.end_of_text_id) if len(ids) else ids


def encode_block(tokenizer, block, path, position):
    """Ids (n,) of UTF-8 bytes; `position` is theirs in the file."""
    try:
        text = block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text or .jsonl, found byte 0x{block[error.start]:02x} at offset "
                         f"{position + error.start}: convert the file, or take it out of --data") from None
    # encode_bytes is the fast one, but normalizes nothing
    return np.asarray(tokenizer.encode(text) if tokenizer.nfc else tokenizer.encode_bytes(block))


def encode_chat(tokenizer, record, where):
    """-> ids, mask of a conversation; an error begins with `where`."""
    try:
        return tokenizer.render(record["messages"], record.get("tools"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def file_parts(files, val_share):
    """[(file number, split or None, first byte, end or None)]: one part a file, but two where a single document is to be split."""
    sizes = [None if path.name.endswith(".gz") else path.stat().st_size for path in files]
    if len(files) == 1 and val_share > 0 and not is_jsonl(files[0]):
        at = single_document_cut(files[0], sizes[0], val_share)
        return [(0, "train", 0, at), (0, "val", at, sizes[0])]
    return [(number, None, 0, size) for number, size in enumerate(sizes)]


def part_blocks(files, parts):
    """Yields (file number, split or None, position, bytes, first, last) of all parts in order."""
    for number, split, start, stop in parts:
        cut = line_cut if is_jsonl(files[number]) else text_cut
        with open_lines(files[number]) as f:
            for position, block, last in read_blocks(f, start, stop, cut):
                yield number, split, position, block, position == start, last


def file_chunks(files, tokenizer, val_share=0.01, bucket=None):
    """Chunks of text files (source "text", one document a file) and .jsonl files (one a line; conversations: source "chat-BUCKET")."""
    parts = file_parts(files, val_share)
    total = None if any(stop is None for *_, stop in parts) else sum(max(1, -(-(stop - start) // BLOCK)) for *_, start, stop in parts)
    blocks = progress(part_blocks(files, parts), total=total, desc=f"tokenize {files[0].name}")
    line_number = 0
    for number, split, position, block, first, last in blocks:
        path = files[number]
        if not is_jsonl(path):
            if first:
                doc_split, num_ids = split or split_of(block, val_share), 0
            ids = encode_block(tokenizer, block, path, position)
            num_ids += len(ids)
            if last and num_ids:
                ids = np.append(ids, tokenizer.end_of_text_id)
            yield Chunk("text", doc_split, ids, last=last)
            continue
        line_number = 0 if first else line_number
        for line in block.removesuffix(b"\n").split(b"\n"):
            line_number += 1
            if not line.strip():
                continue
            where = f"{path}:{line_number}"
            record = parse_line(line, where, bucket)
            if "text" in record:
                yield Chunk("text", split_of(record["text"], val_share), encode_text(tokenizer, record["text"]))
            else:
                ids, mask = encode_chat(tokenizer, record, where)
                doc_split = split_of(first_user_message(record["messages"]), val_share)
                yield Chunk(f"chat-{record['bucket']}", doc_split, ids, mask, file=number, line=line_number)


# -----------------------------------------------------------------------------
# Writing


class SplitWriter:
    def __init__(self, folder, dtype, chat):
        folder.mkdir(parents=True)
        names = ("ids", "offsets", "mask", "docs") if chat else ("ids", "offsets")
        self.files = {name: open(folder / f"{name}.bin", "wb") for name in names}
        self.dtype, self.chat = dtype, chat
        self.tokens = self.docs = self.targets = self.empty = self.start = 0
        self.write("offsets", [0], np.int64)

    def write(self, name, values, dtype):
        self.files[name].write(np.ascontiguousarray(values, dtype=dtype))

    def add(self, chunk):
        self.write("ids", chunk.ids, self.dtype)
        self.tokens += len(chunk.ids)
        if self.chat:
            mask = np.asarray(chunk.mask, dtype=np.uint8)
            num_targets = int(mask[1:].sum())
            if len(mask) != len(chunk.ids) or mask.max(initial=0) > 1 or not num_targets:
                raise ValueError(f"document {self.docs} (line {chunk.line}): expected a mask of 0 and 1, one per id, that trains on "
                                 f"something; found {len(chunk.ids)} ids, {len(mask)} mask values, {num_targets} to train on")
            self.write("mask", mask, np.uint8)
            self.write("docs", [num_targets, chunk.file, chunk.line], np.int64)
        if not chunk.last:
            return
        if self.tokens == self.start:                       # an empty file or line: nothing to learn, but counted
            self.empty += 1
            return
        self.targets += num_targets if self.chat else self.tokens - self.start - 1
        self.docs, self.start = self.docs + 1, self.tokens
        self.write("offsets", [self.tokens], np.int64)

    def close(self):
        for f in self.files.values():
            f.close()                                       # a full disk may show only here
        return {"docs": self.docs, "tokens": self.tokens, "targets": self.targets, "empty": self.empty}


def write_sources(folder, tokenizer, chunks, inputs=()):
    """Writes one source folder below `folder` for each chunk.source. inputs: names for error messages, see Chunk.file."""
    folder = Path(folder)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    writers = {}
    for chunk in chunks:
        if chunk.source not in writers:
            writers[chunk.source] = {split: SplitWriter(folder / chunk.source / split, dtype, chunk.mask is not None)
                                     for split in ("train", "val")}
        writer = writers[chunk.source][chunk.split]
        if writer.chat != (chunk.mask is not None):
            raise ValueError(f"source {chunk.source}: text and conversations mixed")
        writer.add(chunk)
    if not any(w.docs or w.tokens for splits in writers.values() for w in splits.values()):
        raise ValueError(f"expected text to train on, found none in {', '.join(map(str, inputs[:3])) or folder}")
    for name, splits in writers.items():
        counts = {split: writer.close() for split, writer in splits.items()}
        meta = {"version": VERSION, "kind": "chat" if splits["train"].chat else "text", "tokenizer": tokenizer.fingerprint(),
                "dtype": dtype.name, "inputs": [str(i) for i in inputs], **counts}
        (folder / name / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def cached(cache_dir, label, key, build):
    """The folder that build(folder) fills, made once for each key (JSON-able). Built under a temporary name and renamed.

    Ranks of one machine may all come here: a file lock lets the first build, and the others find the result. The code that cuts, renders
    and encodes is part of the key: whoever edits the renderer trains on what the edited one renders.
    """
    code = [hashlib.sha256(Path(sys.modules[name].__file__).read_bytes()).hexdigest() for name in ("tokenizer", "data.chat", __name__)]
    digest = hashlib.blake2b(json.dumps([code, key]).encode(), digest_size=8).hexdigest()
    folder = Path(cache_dir) / f"{label}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(folder.name + ".tmp")
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(temporary, ignore_errors=True)    # of a build that was killed
            try:
                build(temporary)
                os.rename(temporary, folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)          # a full disk gets its space back
                raise
    return folder


# -----------------------------------------------------------------------------
# Reading pieces


class TokenFile:
    """One split of a source as `len()` pieces, each of at most seq_len + 1 tokens: seq_len inputs and their targets.

    A text longer than that is cut into pieces that overlap by one token, so every token but the document's first is a target exactly once.
    A conversation is never cut: one that does not fit raises (long="error") or is left out and counted (long="drop", .num_dropped).
    .num_targets: trained-on tokens of all pieces. .kind: "text" or "chat".
    """

    def __init__(self, folder, split="train", *, seq_len, long="error", fingerprint=None):
        if long not in ("error", "drop"):
            raise ValueError(f'expected --long=error or --long=drop, found {long!r}')
        self.folder, self.seq_len = Path(folder) / split, seq_len
        self.meta = self._read_meta(Path(folder) / "meta.json", fingerprint)
        counts = self.meta[split]
        self.kind, self.num_docs, self.num_tokens = self.meta["kind"], counts["docs"], counts["tokens"]
        self.dtype = np.dtype(self.meta["dtype"])
        self._ids = self._open("ids", self.num_tokens * self.dtype.itemsize)
        self._offsets = self._map("offsets", np.int64, self.num_docs + 1)
        if self.kind == "chat":
            self._mask = self._open("mask", self.num_tokens)
            self._docs = self._map("docs", np.int64, 3 * self.num_docs).reshape(-1, 3)
        index = self._piece_index()
        self._first_piece, self.num_targets = index[:-1], int(index[-1])              # (docs + 1,): document d starts at that piece
        self.num_pieces = int(self._first_piece[-1])
        self.num_dropped = self.num_docs - self.num_pieces if self.kind == "chat" else 0
        if self.num_dropped and long == "error":
            self._refuse_long()

    def __len__(self):
        return self.num_pieces

    def describe(self):
        dropped = f", {self.num_dropped} too long and left out" if self.num_dropped else ""
        return f"{self.kind}: {self.num_docs} documents, {self.num_tokens} tokens, {self.num_targets} trained on{dropped}"

    def _read_meta(self, path, fingerprint):
        try:
            meta = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: expected a token source, found {error}; delete {path.parent} to build it again") from None
        if meta.get("version") != VERSION:
            raise ValueError(f"{path}: expected version {VERSION}, found {meta.get('version')}; delete {path.parent} to build it again")
        if fingerprint not in (None, meta["tokenizer"]):
            raise ValueError(f"{path}: made with another tokenizer (expected fingerprint {fingerprint[:12]}, found "
                             f"{meta['tokenizer'][:12]}); delete {path.parent} to build it again")
        return meta

    def _check(self, name, num_bytes):
        path = self.folder / f"{name}.bin"
        found = path.stat().st_size if path.exists() else "no file"
        if found != num_bytes:
            raise ValueError(f"{path}: expected {num_bytes} bytes, found {found}: the cache is damaged; delete {self.folder.parent} "
                             "to build it again")
        return path

    def _open(self, name, num_bytes):
        fd = os.open(self._check(name, num_bytes), os.O_RDONLY)
        weakref.finalize(self, os.close, fd)
        return fd

    def _map(self, name, dtype, count):
        path = self._check(name, count * np.dtype(dtype).itemsize)
        return np.memmap(path, dtype, "r").view(np.ndarray) if count else np.zeros(0, dtype)

    def _piece_index(self):
        """int64 (docs + 2,), mapped: pieces before each document, pieces in all, trained-on tokens in all. Kept on disk per seq_len."""
        path = self.folder / f"pieces_{self.seq_len}.bin"
        num_bytes = 8 * (self.num_docs + 2)
        if not path.exists() or path.stat().st_size != num_bytes:
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")             # ranks write the same bytes; the last rename wins
            pieces_before, num_targets = 0, 0
            with open(temporary, "wb") as f:
                f.write(np.zeros(1, np.int64).tobytes())
                for start in range(0, self.num_docs, 1 << 16):                       # bounded memory, however many documents
                    slots = np.diff(self._offsets[start:start + (1 << 16) + 1]) - 1
                    if self.kind == "chat":
                        pieces = (slots <= self.seq_len).astype(np.int64)
                        num_targets += int((self._docs[start:start + (1 << 16), 0] * pieces).sum())
                    else:
                        pieces = -(-slots // self.seq_len)
                        num_targets += int(slots.sum())
                    ends = pieces_before + np.cumsum(pieces)
                    f.write(ends.tobytes())
                    pieces_before = int(ends[-1])
                f.write(np.array([num_targets], np.int64).tobytes())
            os.replace(temporary, path)
        return self._map(path.stem, np.int64, self.num_docs + 2)

    def _refuse_long(self):
        lengths = np.diff(self._offsets)
        doc = int(np.argmax(lengths > self.seq_len + 1))
        _, file, line = self._docs[doc].tolist()
        origin = f"{self.meta['inputs'][file]}:{line}" if self.meta["inputs"] else f"{self.folder}: conversation {doc}"
        raise ValueError(f"{origin}: {lengths[doc]} tokens, expected at most {self.seq_len + 1} (a row and its last target); "
                         f"{self.num_dropped} of {self.num_docs} conversations are too long, the longest has {lengths.max()} tokens: "
                         f"raise --seq_len, or leave them out with --long=drop")

    def locate(self, pieces):
        """pieces (N,) -> int64 (N,) each: first token, slots (inputs that have a target), trained-on tokens."""
        doc = np.searchsorted(self._first_piece, pieces, side="right") - 1
        start, slots = self._offsets[doc], self._offsets[doc + 1] - self._offsets[doc] - 1
        if self.kind == "chat":
            return start, slots, self._docs[doc, 0]
        skip = (pieces - self._first_piece[doc]) * self.seq_len
        slots = np.minimum(slots - skip, self.seq_len)
        return start + skip, slots, slots

    def read(self, start, slots):
        """-> ids (slots + 1,) of the file's dtype, mask (slots + 1,) uint8. start, slots: ints, as locate gives them."""
        ids = self._read(self._ids, start, slots + 1, self.dtype)
        return ids, self._read(self._mask, start, slots + 1, np.dtype(np.uint8)) if self.kind == "chat" else np.ones(len(ids), np.uint8)

    def piece(self, i):
        """-> ids, mask of piece i, see read."""
        if not 0 <= i < self.num_pieces:
            raise IndexError(f"{self.folder}: piece {i} of {self.num_pieces}")
        return self.read(*(int(x) for x in self.locate(i)[:2]))

    def _read(self, fd, start, count, dtype):
        data = os.pread(fd, count * dtype.itemsize, start * dtype.itemsize)
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"{self.folder}: ends before token {start + count}: the file was cut while it was in use")
        return np.frombuffer(data, dtype)
