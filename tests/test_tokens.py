"""Token files: nothing lost, nothing twice, bounded memory, and every bad input named."""
import json
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import regex

from data import open_sources, parse_shares, tokens
from data.tokens import Chunk, TokenFile
from tokenizer import Tokenizer

TOK = Tokenizer.bytes()
EOT = TOK.end_of_text_id
PAIR = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]


def jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


def build(tmp_path, files, val_share=0.0):
    files = [files] if not isinstance(files, list) else files
    tokens.write_sources(tmp_path / "built", TOK, tokens.file_chunks(files, TOK, val_share), inputs=files)
    return tmp_path / "built"


def ids_of(file):
    return np.fromfile(file.folder / "ids.bin", file.dtype).tolist()


# -----------------------------------------------------------------------------
# Pieces


@pytest.mark.parametrize("seq_len", [1, 4, 7, 100])
def test_every_token_but_the_first_is_a_target_once(tmp_path, seq_len):
    texts = ["a", "abcd", "abcde", "abcdefgh", "x" * 50, "", "last"]            # lengths around multiples of seq_len, one empty
    built = build(tmp_path, jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]))
    file = TokenFile(built / "text", seq_len=seq_len)
    documents, inputs = [], 0
    for i in range(len(file)):
        ids, mask = file.piece(i)
        ids = ids.tolist()
        start, slots, trained = (int(v) for v in file.locate(np.array(i)))
        assert mask.all() and slots == trained == len(ids) - 1 and 1 <= slots <= seq_len
        if start in file._offsets:
            documents.append(ids)
        else:
            assert documents[-1][-1] == ids[0]              # pieces overlap by one token
            documents[-1] += ids[1:]
        inputs += slots
    assert documents == [TOK.encode(t) + [EOT] for t in texts if t]
    assert inputs == file.num_targets == file.num_tokens - file.num_docs
    assert file.meta["train"]["empty"] == 1


def test_locate_is_vectorised_and_bounds_are_checked(tmp_path):
    file = TokenFile(build(tmp_path, jsonl(tmp_path / "a.jsonl", [{"text": "abcdefgh"}, {"text": "ij"}])) / "text", seq_len=5)
    start, slots, trained = file.locate(np.arange(len(file)))
    assert (start.tolist(), slots.tolist(), trained.tolist()) == ([0, 5, 9], [5, 3, 2], [5, 3, 2])
    for i in (-1, 3):
        with pytest.raises(IndexError):
            file.piece(i)


def test_conversations_keep_the_renderers_ids_and_mask(tmp_path):
    records = [{"messages": PAIR, "bucket": "chat"}, {"messages": PAIR + PAIR, "bucket": "math"}]
    built = build(tmp_path, jsonl(tmp_path / "a.jsonl", records))
    for record in records:
        file = TokenFile(built / f"chat-{record['bucket']}", seq_len=200)
        ids, mask = file.piece(0)
        assert (ids.tolist(), mask.tolist()) == tuple(map(list, TOK.render(record["messages"])))
        assert file.num_targets == sum(mask) and file.locate(np.array([0]))[2].tolist() == [sum(mask)]
        assert len(file) == 1


def test_a_long_conversation_is_refused_by_line_or_dropped_and_counted(tmp_path):
    long = [PAIR[0], {"role": "assistant", "content": "y" * 60}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": m, "bucket": "chat"} for m in (PAIR, long, PAIR)])
    folder = build(tmp_path, path) / "chat-chat"
    length = len(TOK.render(long)[0])
    assert len(TokenFile(folder, seq_len=length - 1)) == 3                      # exactly fits: its last token is a target only
    with pytest.raises(ValueError, match=rf"a.jsonl:2: {length} tokens, expected at most {length - 1}.*--long=drop"):
        TokenFile(folder, seq_len=length - 2)
    file = TokenFile(folder, seq_len=length - 2, long="drop")
    assert (len(file), file.num_dropped) == (2, 1) and "1 too long" in file.describe()
    short = list(TOK.render(PAIR)[0])
    assert [file.piece(i)[0].tolist() for i in range(2)] == [short, short]
    assert file.num_targets == 2 * sum(TOK.render(PAIR)[1])
    with pytest.raises(ValueError, match="--long=error or --long=drop"):
        TokenFile(folder, seq_len=9, long="cut")


def test_a_document_without_a_trained_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trains on something; found 3 ids, 3 mask values, 0 to train on"):
        tokens.write_sources(tmp_path / "x", TOK, [Chunk("chat", "train", [1, 2, 3], [1, 0, 0])])       # the first is never a target


def test_large_vocabularies_get_wider_ids(tmp_path):
    class Large:
        vocab_size, end_of_text_id = 70_000, 69_999
        fingerprint = staticmethod(lambda: "large")
    tokens.write_sources(tmp_path / "x", Large, [Chunk("text", "train", np.array([3, 65_536, 69_999]))])
    file = TokenFile(tmp_path / "x" / "text", seq_len=8)
    assert file.dtype == np.uint32 and file.piece(0)[0].tolist() == [3, 65_536, 69_999]


# -----------------------------------------------------------------------------
# Streaming

PRETOKENIZERS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
             r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}{1,3}|"
             r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("name", PRETOKENIZERS)
def test_a_cut_between_blocks_changes_no_token(name):
    pattern, rng, cuts = regex.compile(PRETOKENIZERS[name]), random.Random(0), 0
    for _ in range(3000):
        text = "".join(rng.choice(["a", "B", "한", "7", "'s", "!", "/", " ", "  ", "\n", "\n", "\r\n", "\t", "\u3000", "é", "\u0301"])
                       for _ in range(30))
        block = text.encode()
        cut = tokens.text_cut(block)
        left, right = block[:cut].decode(), block[cut:].decode()                # never inside a character
        assert right
        if any(text[i] == "\n" and not text[i - 1].isspace() and text[i + 1].isalnum() for i in range(5, 22)):     # a good place is used
            cuts += 1
            assert pattern.findall(left) + pattern.findall(right) == pattern.findall(text), repr(text)
    assert cuts > 500


@pytest.mark.parametrize("text", ["word " * 200 + "\n", "한글은 세 바이트 " * 90, "line\nnext line\n" * 60, "é" * 999, "\r\n" * 400 + "x"])
def test_blocks_add_up_to_the_file(tmp_path, monkeypatch, text):
    monkeypatch.setattr(tokens, "BLOCK", 64)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    file = TokenFile(build(tmp_path, path) / "text", seq_len=16)
    assert file.num_docs == 1 and ids_of(file) == list(text.encode()) + [EOT]


def test_text_is_normalized_as_the_tokenizer_does(tmp_path):
    """encode_bytes keeps bytes as they are; a tokenizer with NFC has to see the text through encode."""
    import unicodedata

    class Normalizing:
        nfc, vocab_size, end_of_text_id = True, 300, 256
        encode = staticmethod(lambda text: list(unicodedata.normalize("NFC", text).encode()))
        fingerprint = staticmethod(lambda: "nfc")
    (tmp_path / "a.txt").write_text(unicodedata.normalize("NFD", "한글"))
    tokens.write_sources(tmp_path / "x", Normalizing, tokens.file_chunks([tmp_path / "a.txt"], Normalizing, 0))
    assert ids_of(TokenFile(tmp_path / "x" / "text", seq_len=8)) == list("한글".encode()) + [256]


def test_lines_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "BLOCK", 64)
    texts = ["short", "x" * 500, "y", "한" * 100]
    path = jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))       # the last line may lack its newline
    file = TokenFile(build(tmp_path, path) / "text", seq_len=1000)
    assert [TOK.decode(file.piece(i)[0].tolist()[:-1]) for i in range(len(file))] == texts
    path.write_text(path.read_text() + "\n\n{bad\n")
    with pytest.raises(ValueError, match="a.jsonl:6: not valid JSON"):
        list(tokens.file_chunks([path], TOK))


def test_gzipped_lines(tmp_path):
    import gzip
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as f:
        f.write('{"text": "one", "id": 1}\n{"text": "two", "id": 2}\n')
    assert TokenFile(build(tmp_path, tmp_path / "a.jsonl.gz") / "text", seq_len=8).num_docs == 2


@pytest.mark.parametrize("at", [0, 70, 200])
def test_bytes_that_are_not_utf8_are_named(tmp_path, monkeypatch, at):
    monkeypatch.setattr(tokens, "BLOCK", 64)
    (tmp_path / "bad.txt").write_bytes(b"a\n" * (at // 2) + b"\xff" + b"b" * 40)
    with pytest.raises(ValueError, match=f"bad.txt: expected UTF-8 .*found byte 0xff at offset {at}:"):
        list(tokens.file_chunks([tmp_path / "bad.txt"], TOK))


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Peak resident memory after 4 MB, and after 30 MB that are built and read to the end."""
    script = """if True:
        import resource, sys
        import numpy as np
        from pathlib import Path
        from data.packing import Loader, make_batch
        from data.tokens import TokenFile, file_chunks, write_sources
        from tokenizer import Tokenizer
        tok, line = Tokenizer.bytes(), b"the quick brown fox jumps over the lazy dog, again\\n"
        for size in (4_000_000, 30_000_000):
            path = Path(sys.argv[1], f"{size}.txt")
            with open(path, "wb") as f:
                for _ in range(size // 1_000_000):
                    f.write(line * (1_000_000 // len(line)))
            write_sources(path.with_suffix(".out"), tok, file_chunks([path], tok))
            sources = {"a": TokenFile(path.with_suffix(".out") / "text", seq_len=65536)}
            loader = Loader(sources, seq_len=65536, epochs=1)
            while rows := loader.next_rows(1):
                make_batch(rows, sources, 65536)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    """
    out = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True,
                         env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}).stdout.split()
    small, large = map(int, out)
    assert large - small < 15, out


# -----------------------------------------------------------------------------
# Validation split


def test_a_single_document_holds_out_its_end(tmp_path):
    text = "".join(f"line number {i}\n" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    built = build(tmp_path, tmp_path / "a.txt", val_share=0.01)
    train, val = (ids_of(TokenFile(built / "text", split, seq_len=9)) for split in ("train", "val"))
    assert train[-1] == val[-1] == EOT and bytes(train[:-1]) + bytes(val[:-1]) == text.encode()
    assert train[-2] == ord("\n") and 0.005 * len(text) < len(val) <= 0.01 * len(text) + 1


def test_share_zero_holds_out_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    built = build(tmp_path, tmp_path / "a.txt", val_share=0.0)
    assert len(TokenFile(built / "text", "val", seq_len=9)) == 0 and TokenFile(built / "text", seq_len=9).num_tokens == 1001


def test_many_documents_are_held_out_by_content(tmp_path):
    texts = [f"document {i}" for i in range(3000)]
    built = build(tmp_path, jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts + texts]), val_share=0.05)
    files = [TokenFile(built / "text", split, seq_len=50) for split in ("train", "val")]
    train, val = ([TOK.decode(f.piece(i)[0].tolist()[:-1]) for i in range(len(f))] for f in files)
    assert sorted(train + val) == sorted(texts + texts) and not set(train) & set(val)       # a duplicate is on the side of its twin
    assert 0.03 < len(val) / 6000 < 0.07
    assert set(val) == {t for t in texts if tokens.split_of(t, 0.05) == "val"}              # whatever else is in the file


def test_one_question_is_on_one_side(tmp_path):
    records = [{"messages": [{"role": "system", "content": f"s{i}"}, {"role": "user", "content": f"q{i % 40}"},
                             {"role": "assistant", "content": f"a{i}"}], "bucket": "chat"} for i in range(400)]
    built = build(tmp_path, jsonl(tmp_path / "a.jsonl", records), val_share=0.3)
    sides = {}
    for split in ("train", "val"):
        file = TokenFile(built / "chat-chat", split, seq_len=200)
        for i in range(len(file)):
            question = TOK.decode(file.piece(i)[0].tolist()).split("user\n")[1].split("<|im_end|>")[0]
            sides.setdefault(question, set()).add(split)
    assert len(sides) == 40 and all(len(s) == 1 for s in sides.values()) and {"val"} in sides.values()


# -----------------------------------------------------------------------------
# The cache


def test_damaged_and_foreign_sources_are_named(tmp_path):
    folder = build(tmp_path, jsonl(tmp_path / "a.jsonl", [{"messages": PAIR, "bucket": "chat"}] * 3)) / "chat-chat"
    TokenFile(folder, seq_len=99, fingerprint=TOK.fingerprint())
    with pytest.raises(ValueError, match="another tokenizer"):
        TokenFile(folder, seq_len=99, fingerprint="f" * 64)
    for name in ("ids", "mask", "offsets", "docs"):
        path = folder / "train" / f"{name}.bin"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=rf"{name}.bin: expected {len(whole)} bytes, found {len(whole) - 1}: the cache is damaged"):
            TokenFile(folder, seq_len=99)
        path.unlink()
        with pytest.raises(ValueError, match=f"{name}.bin: expected {len(whole)} bytes, found no file"):
            TokenFile(folder, seq_len=99)
        path.write_bytes(whole)
    file = TokenFile(folder, seq_len=99)
    (folder / "train" / "ids.bin").write_bytes(b"")         # under a running program
    with pytest.raises(ValueError, match="cut while it was in use"):
        file.piece(2)
    meta = folder / "meta.json"
    for text, reason in (("{", "expected a token source"), (meta.read_text().replace('"version": 1', '"version": 99'), "found 99")):
        meta.write_text(text)
        with pytest.raises(ValueError, match=f"{reason}.*delete"):
            TokenFile(folder, seq_len=99)


def test_piece_index_is_kept_and_repaired(tmp_path):
    folder = build(tmp_path, jsonl(tmp_path / "a.jsonl", [{"text": "x" * n} for n in range(1, 60)])) / "text"
    pieces = [TokenFile(folder, seq_len=7).piece(i)[0].tolist() for i in range(30)]
    index = folder / "train" / "pieces_7.bin"
    written = index.stat().st_mtime_ns
    TokenFile(folder, seq_len=7)
    assert index.stat().st_mtime_ns == written
    index.write_bytes(b"123")
    assert [TokenFile(folder, seq_len=7).piece(i)[0].tolist() for i in range(30)] == pieces
    assert len(TokenFile(folder, seq_len=59)) == 59


def test_cache_is_built_once_and_follows_the_file(tmp_path):
    path, cache = tmp_path / "a.txt", tmp_path / "cache"

    def text():
        file, = open_sources(str(path), TOK, seq_len=9, cache_dir=cache, val_share=0).values()
        return bytes(ids_of(file)[:-1]).decode(), file.folder.parent, (file.folder / "ids.bin").stat().st_mtime_ns

    path.write_text("first\n")
    before = text()
    assert text() == before and before[0] == "first\n"
    path.write_text("second\n")
    assert text()[0] == "second\n" and text()[1] != before[1]
    os.utime(path, ns=(1, 1))                               # same size, other time
    assert text()[1] not in (before[1], None) and len({p.name for p in cache.iterdir() if p.is_dir()}) == 3


def test_a_failed_build_leaves_nothing_and_a_killed_one_is_replaced(tmp_path):
    def fail(folder):
        folder.mkdir(parents=True)
        (folder / "half").write_text("x")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        tokens.cached(tmp_path, "a", 1, fail)
    assert not any(p.is_dir() for p in tmp_path.iterdir())
    with pytest.raises(OSError):
        tokens.cached(tmp_path, "a", 1, lambda folder: (folder.mkdir(), os.kill, fail(folder / "x")))
    lock, = tmp_path.iterdir()
    (tmp_path / lock.name.replace(".lock", ".tmp")).mkdir()                     # what kill -9 leaves
    (tmp_path / lock.name.replace(".lock", ".tmp") / "half").write_text("x")
    folder = tokens.cached(tmp_path, "a", 1, lambda folder: (folder.mkdir(), (folder / "whole").write_text("y")))
    assert [p.name for p in folder.iterdir()] == ["whole"]


def test_ranks_build_once(tmp_path):
    builds, results = [], []

    def build_slowly(folder):
        builds.append(folder)
        threading.Event().wait(0.05)
        folder.mkdir()

    threads = [threading.Thread(target=lambda: results.append(tokens.cached(tmp_path, "a", 1, build_slowly))) for _ in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(builds) == 1 and len(set(results)) == 1 and results[0].is_dir()


# -----------------------------------------------------------------------------
# --data


@pytest.mark.parametrize("make, reason", [
    (lambda p: p.write_text(""), "expected text to train on, found none in .*input"),
    (lambda p: p.mkdir(), "input: expected a folder with text or .jsonl files, found none"),
    (lambda p: (p.mkdir(), (p / ".hidden").write_text("x")), "found none"),
    (lambda p: (p.mkdir(), (p / "a.jsonl").write_text("\n\n"), (p / "b.txt").write_text("")), "found none in .*a.jsonl, .*b.txt"),
    (lambda p: None, "no source and no file is called"),
])
def test_nothing_to_train_on(tmp_path, make, reason):
    make(tmp_path / "input")
    with pytest.raises(ValueError, match=reason):
        open_sources(str(tmp_path / "input"), TOK, seq_len=9, cache_dir=tmp_path / "cache")


def test_names(tmp_path):
    def names(spec):
        return {n: (f.kind, f.num_docs) for n, f in open_sources(spec, TOK, seq_len=99, cache_dir=tmp_path / "cache", val_share=0).items()}

    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": PAIR, "bucket": b} for b in ("math", "chat", "math")])
    bare = jsonl(tmp_path / "bare.jsonl", [{"messages": PAIR}])
    folder = tmp_path / "books"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "one.txt").write_text("one")
    (folder / "two.py").write_text("two = 2")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("x")
    assert names(f"{folder},{chats}") == {"books": ("text", 2), "chat": ("chat", 1), "math": ("chat", 2)}
    assert list(names(f"old={folder}, mine={bare},all={chats}")) == ["old", "mine", "all"]
    assert names(f"all={chats}") == {"all": ("chat", 3)}
    with pytest.raises(ValueError, match="bare.jsonl:1: no bucket"):
        names(str(bare))
    with pytest.raises(ValueError, match="two sources are named chat"):
        names(f"{chats},{chats}")
    with pytest.raises(ValueError, match="called 'toy/math_em'.*did you mean toy/math_e"):
        names("toy/math_em")
    with pytest.raises(ValueError, match="toy is six sources"):
        names("x=toy")
    (folder / "c.jsonl").write_text(bare.read_text())
    with pytest.raises(ValueError, match="cannot share a name"):
        names(f"x={folder}")
    with pytest.raises(ValueError, match="expected split train or val"):
        open_sources(str(chats), TOK, seq_len=99, cache_dir=tmp_path / "cache", split="test")


def test_everything_held_out_or_too_long_is_an_error(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": PAIR, "bucket": "chat"}])
    with pytest.raises(ValueError, match="nothing to train on in chat .*1 too long"):
        open_sources(str(path), TOK, seq_len=9, cache_dir=tmp_path / "cache", val_share=0, long="drop")
    with pytest.raises(ValueError, match="nothing to train on in chat .*val_share 0.99999"):
        open_sources(str(path), TOK, seq_len=99, cache_dir=tmp_path / "cache", val_share=0.99999)
    assert len(open_sources(str(path), TOK, seq_len=99, cache_dir=tmp_path / "cache", split="val", val_share=0)["chat"]) == 0


def test_generated_sources(tmp_path):
    options = dict(seq_len=400, cache_dir=tmp_path / "cache", num=40)
    sources = open_sources("toy,facts=toy/facts_en", TOK, **options)
    assert list(sources) == ["math_en", "math_ko", "code", "tool", "chat_en", "chat_ko", "facts"]
    assert all(f.num_docs == 40 and f.kind == "chat" for n, f in sources.items() if n != "facts") and sources["facts"].kind == "text"
    val = open_sources("toy", TOK, split="val", **options)
    for name, file in val.items():                          # generators have a split of their own
        train = {bytes(sources[name].piece(i)[0]) for i in range(40)}
        assert len(file) == 40 and not train & {bytes(file.piece(i)[0]) for i in range(40)}


def test_standard_library(tmp_path):
    options = dict(seq_len=400, cache_dir=tmp_path / "cache")
    train, val = (open_sources("stdlib", TOK, split=split, **options)["stdlib"] for split in ("train", "val"))
    assert train.kind == "text" and train.num_tokens > 5_000_000 and 0.01 < val.num_tokens / train.num_tokens < 0.15
    assert train.piece(0)[0].tolist() != val.piece(0)[0].tolist()


def test_gsm8k(tmp_path, monkeypatch):
    from data import gsm8k
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"#### {i}"}], "bucket": "math"}
            for i in range(300)]
    monkeypatch.setattr(gsm8k, "conversations", lambda split: iter(rows if split == "train" else []))
    options = dict(seq_len=99, cache_dir=tmp_path / "cache", val_share=0.1)
    sizes = [len(open_sources("gsm8k", TOK, split=split, **options)["gsm8k"]) for split in ("train", "val")]
    assert sum(sizes) == 300 and 10 < sizes[1] < 60


def test_parse_shares():
    assert parse_shares("math:.6, code:4e-1", {"math": 0, "code": 0}) == {"math": 0.6, "code": 0.4}
    assert parse_shares("", {"math": 0}) is None
    for text, reason in (("maht:1", "did you mean math"), ("math:1,math:2", "twice"), ("math:x", "expected a number"), ("math", "''")):
        with pytest.raises(ValueError, match=reason):
            parse_shares(text, {"math": 0})
