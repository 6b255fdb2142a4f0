"""
tokenizer.py against the `tokenizers` library: equal ids for every kind of file that is read, a reason for every other.

The BPEs are trained here, on the standard library's sources and on Korean and English text made here, so nothing is
downloaded. TEMPER_DATA, where set, adds the texts of gsm8k, korean_chatbot and mbpp.
"""

import copy
import csv
import functools
import json
import os
import random
import unicodedata
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tokenizer import BYTE_TO_CHAR, Tokenizer

KOREAN = ("민수는 사과 열두 개를 가지고 있었고, 동생에게 세 개를 주었습니다. 남은 사과는 몇 개일까요? 답은 9개입니다.\n"
          "오늘 날씨가 참 좋네요! 산책하러 갈까요?\r\n\r\n\t그래요, 3시 30분에 만나요… ㅋㅋㅋ\u3000끝。 ")
ENGLISH = "Tom's got 12 pens; he'll buy 3 bags of 4.  I've 24, we'd say — that's it!\n\n  * (a+b)/2 == 3.14 \n"
CODE = Path(json.__file__).with_name("decoder.py").read_text() + Path(os.__file__).read_text()[:60_000]

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
LLAMA = QWEN.replace(r"\p{N}| ", r"\p{N}{1,3}| ")
STYLES = ["gpt2", "llama3", "qwen2", "smollm2", "digit_runs", "odd_split", "no_split"]
SPECIAL, PLAIN_ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>", "<think>"]


def train(style):
    """A tokenizer.json of the given style as a dict, trained in a second."""
    pytest.importorskip("tokenizers", reason="parity with the tokenizers library needs it (requirements-peers.txt)")
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer
    hf = HFTokenizer(models.BPE())
    with_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.pre_tokenizer = {
        "gpt2": with_regex,
        "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA), "isolated"), plain]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), plain]),
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), with_regex]),
        "digit_runs": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), with_regex]),
        # matches letters only: everything between is a piece too, and tiktoken alone would drop it
        "odd_split": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{L}+(?=[aeiou가])"), "isolated"), plain]),
        "no_split": plain,
    }[style]
    hf.decoder = decoders.ByteLevel()
    if style == "qwen2":
        hf.normalizer = normalizers.NFC()
    # SmolLM2 has its special tokens before the bytes, the others after the merges
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, max_token_length=40,
                                  special_tokens=SPECIAL if style == "smollm2" else [],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = CODE.splitlines(keepends=True) if style in ("no_split", "odd_split") else [CODE]
    hf.train_from_iterator([*texts, KOREAN * 50, ENGLISH * 20], trainer)
    hf.add_special_tokens(SPECIAL)
    hf.add_tokens([AddedToken(t, normalized=False) for t in PLAIN_ADDED])
    spec = json.loads(hf.to_str())
    if style == "llama3":
        spec = llama3(spec)
    return spec


def llama3(spec):
    """What the conversion of Meta's files makes: every split of every token is a merge, and whole pieces go first."""
    vocab, merges = spec["model"]["vocab"], []
    for token in sorted(vocab, key=vocab.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    assert len(merges) > len(spec["model"]["merges"])
    spec["model"] |= {"merges": merges, "ignore_merges": True}
    return spec


@pytest.fixture(scope="module")
def specs():
    return {style: train(style) for style in STYLES}


def both(spec):
    """-> (ours, theirs) of one tokenizer.json."""
    from tokenizers import Tokenizer as HFTokenizer
    text = json.dumps(spec)
    return Tokenizer({"tokenizer.json": text}), HFTokenizer.from_str(text)


@functools.cache
def random_strings(num, seed=0):
    """Strings over all assigned characters, and others dense in what decides a split: space, digits, marks, quotes."""
    rng = random.Random(seed)
    assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    hangul = [chr(c) for c in range(0xac00, 0xd7a4)] + [chr(c) for c in range(0x1100, 0x1200)]
    dense = ["  ", "\r\n", "'ll", "'S", "e\u0301", *" \t\n\r\v\u00a0\u3000\u200b"]
    dense += "0123456789½٣Ⅷ'’aeiouLlSsTt.,!?()_-가나다"
    alphabets = [assigned, dense, hangul + dense, [chr(c) for c in range(128)], assigned[:3000] + dense]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(24))) for _ in range(num)]


def assert_equal_ids(spec, texts):
    ours, theirs = both(spec)
    differ = 0
    for text, encoding in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)):
        if ours.nfc and theirs.normalizer.normalize_str(text) != unicodedata.normalize("NFC", text):
            differ += 1                       # their Unicode tables are older: stacks of rare combining marks
            continue
        assert ours.encode(text) == encoding.ids, repr(text)
        assert ours.decode_bytes(encoding.ids).decode() == (unicodedata.normalize("NFC", text) if ours.nfc else text)
    assert differ <= len(texts) // 500, f"NFC differs on {differ} of {len(texts)} texts"


@pytest.mark.parametrize("style", STYLES)
def test_equal_ids_on_random_unicode(specs, style):
    assert_equal_ids(specs[style], random_strings(10_000)[:10_000 if style in ("gpt2", "qwen2", "smollm2") else 2_500])


@pytest.mark.parametrize("style", STYLES)
def test_equal_ids_on_korean_and_code(specs, style):
    other_code = Path(json.__file__).with_name("encoder.py").read_text()
    texts = [KOREAN, unicodedata.normalize("NFD", KOREAN), ENGLISH, CODE[:20_000], KOREAN + other_code + ENGLISH]
    assert_equal_ids(specs[style], texts)
    assert len(both(specs[style])[0].encode(KOREAN)) < len(KOREAN)             # and the merges are at work


@pytest.mark.parametrize("style", ["qwen2", "smollm2"])
def test_equal_ids_on_real_data(specs, style):
    if "TEMPER_DATA" not in os.environ:
        pytest.skip("TEMPER_DATA is not set: the folder that holds gsm8k, korean_chatbot and mbpp")
    folder = Path(os.environ["TEMPER_DATA"])
    gsm8k = [json.loads(line) for line in (folder / "gsm8k/test.jsonl").open()]
    mbpp = [json.loads(line) for line in (folder / "mbpp/mbpp.jsonl").open()]
    with (folder / "korean_chatbot/ChatbotData.csv").open(newline="") as file:
        korean = [row[0] + "\n" + row[1] for row in csv.reader(file)]
    texts = [r["question"] + "\n" + r["answer"] for r in gsm8k] + [r["code"] for r in mbpp] + korean
    assert len(texts) > 10_000
    assert_equal_ids(specs[style], texts)


def test_ids_that_do_not_ascend_with_the_merges(specs):
    spec = copy.deepcopy(specs["qwen2"])
    ids = list(spec["model"]["vocab"].values())
    random.Random(0).shuffle(ids)
    spec["model"]["vocab"] = dict(zip(spec["model"]["vocab"], ids))
    assert_equal_ids(spec, [*random_strings(500), KOREAN, ENGLISH])
    tokenizer = both(spec)[0]
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(bytes(range(256)))) == bytes(range(256))


def test_merges_as_pairs_or_as_strings(specs):
    spec = copy.deepcopy(specs["gpt2"])
    pairs = [m if isinstance(m, list) else m.split(" ") for m in spec["model"]["merges"]]
    made = []
    for merges in (pairs, [" ".join(pair) for pair in pairs]):
        spec["model"]["merges"] = merges
        made.append(Tokenizer({"tokenizer.json": json.dumps(spec)}))
    assert made[0].encode(CODE) == made[1].encode(CODE)
    assert made[0].fingerprint() == made[1].fingerprint()


def random_merges(rng):
    """A BPE nobody trained: merges in random order, used before they are made, made twice, never made."""
    tokens, pairs = rng.choice([["a", "b"], ["a", "b", "c"]]), set()
    for _ in range(rng.randrange(2, 24)):
        pair = (rng.choice(tokens), rng.choice(tokens))
        if len(pair[0] + pair[1]) < 9:
            pairs.add(pair)
            tokens.append(pair[0] + pair[1])
    merges = sorted(pairs)
    rng.shuffle(merges)
    vocab = {c: b for b, c in BYTE_TO_CHAR.items()}
    unmade = rng.sample(["cc", "abcab", "bcabc", "aaaaaaa"], k=rng.randrange(2))     # perhaps without any merge
    for token in [a + b for a, b in merges] + unmade:
        vocab.setdefault(token, len(vocab))
    return vocab, merges


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_ranks_by_token_equal_ranks_by_pair_for_any_merges(ignore_merges):
    pytest.importorskip("tokenizers")
    rng, byte_level, refused, longest = random.Random(1), json.loads(Tokenizer.bytes().files["tokenizer.json"]), 0, 0
    for _ in range(300):
        vocab, merges = random_merges(rng)
        spec = copy.deepcopy(byte_level)
        spec["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
        spec["added_tokens"] = []
        texts = ["".join(rng.choices(rng.choice(["ab", "abc"]), k=rng.randrange(1, 16))) for _ in range(50)]
        texts += ["cc", "abcab", "bcabc", "aaaaaaa"]
        try:
            ours, theirs = both(spec)
        except ValueError as error:
            assert ignore_merges and "no merge makes the token" in str(error)
            refused += 1
            continue
        for text in texts:
            ids = ours.encode(text)
            assert ids == theirs.encode(text).ids, (text, merges)
            longest = max([longest, *(len(ours.decode([i])) for i in ids)])
    assert longest >= 5 and (0 < refused < 200) == ignore_merges, (longest, refused)


# -----------------------------------------------------------------------------
# Refusals

def refuse(change, spec):
    spec = copy.deepcopy(spec)
    change(spec)
    with pytest.raises(ValueError) as error:
        Tokenizer({"tokenizer.json": json.dumps(spec)})
    return str(error.value)


def test_what_cannot_be_represented_is_refused_with_the_reason(specs):
    spec, split = specs["gpt2"], specs["qwen2"]["pre_tokenizer"]
    model, byte_level = spec["model"], spec["pre_tokenizer"]

    def pre(*steps):
        return lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": list(steps)})
    one_split = split["pretokenizers"][0]
    for change, reason in [
        (lambda s: s["model"].update(type="WordPiece"), "expected a BPE"),
        (lambda s: s.update(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "expected a BPE"),
        (lambda s: s["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda s: s["model"].update(dropout=0.1), "dropout"),
        (lambda s: s["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda s: s.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}]}), "NFKC"),
        (lambda s: s.update(pre_tokenizer=None), "pre_tokenizer"),
        (lambda s: s.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
        (pre(one_split, one_split, byte_level), "Split"),
        (pre(one_split, byte_level), "use_regex"),
        (pre({**one_split, "behavior": "Removed"}, split["pretokenizers"][1]), "Isolated"),
        (pre({**one_split, "pattern": {"String": " "}}, split["pretokenizers"][1]), "Regex"),
        (pre({**one_split, "pattern": {"Regex": r"\h+"}}, split["pretokenizers"][1]), "syntax"),
        (pre({**one_split, "pattern": {"Regex": r"(?<=a)b"}}, split["pretokenizers"][1]), "syntax"),
        (lambda s: s.update(decoder={"type": "Fuse"}), "decoder"),
        (lambda s: s["model"]["vocab"].pop("!"), "0x21"),
        (lambda s: s["model"]["vocab"].update({"한국": 99_999}), "alphabet"),
        (lambda s: s["model"]["vocab"].update({"!": 5}), "same"),
        (lambda s: s["model"]["merges"].append(["Q", "QQQ"]), f"merge {len(model['merges']) + 1}"),
        (lambda s: s["model"]["merges"].append("a b c"), "merge"),
        (lambda s: s["added_tokens"].append({"id": 99_999, "content": "    ", "special": False}), "ordinary text"),
    ]:
        assert reason in refuse(change, spec), reason


def test_from_file_names_the_file(tmp_path):
    with pytest.raises(ValueError, match="no_such"):
        Tokenizer.from_file(tmp_path / "no_such")
    for text in ("{", "[]", "{}", '{"model": {"type": "BPE", "vocab": 3, "merges": 1}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="tokenizer.json"):
            Tokenizer.from_file(tmp_path)


# -----------------------------------------------------------------------------
# Special tokens, bytes, files

@pytest.mark.parametrize("style", ["bytes", "gpt2", "qwen2", "smollm2"])
def test_text_never_becomes_an_added_token(specs, style):
    tokenizer = Tokenizer.bytes() if style == "bytes" else both(specs[style])[0]
    assert {*SPECIAL, *PLAIN_ADDED} <= set(tokenizer.specials)
    for name in tokenizer.specials:
        text = f"a {name}{name} b\n{name}"
        for ids in (tokenizer.encode(text), tokenizer.encode_bytes(text.encode()).tolist()):
            assert not set(ids) & set(tokenizer.specials.values())
            assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.specials[name]]) == name


def test_byte_ids():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.vocab_size == 265 and tokenizer.end_of_text_id == 256 and tokenizer.end_of_turn_id == 258
    assert tokenizer.specials["</think>"] == 264
    assert tokenizer.encode("a가") == [97, 0xea, 0xb0, 0x80]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == "" and len(tokenizer.encode_bytes(b"")) == 0
    assert tokenizer.encode_bytes(bytes(range(256))).tolist() == list(range(256))


@pytest.mark.parametrize("style", ["bytes", "gpt2", "llama3", "qwen2", "smollm2", "odd_split"])
def test_bytes_round_trip(specs, style):
    tokenizer = Tokenizer.bytes() if style == "bytes" else both(specs[style])[0]

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(st.lists(st.binary(max_size=8) | st.text("az 7\n.가é\u0301", max_size=8).map(str.encode)).map(b"".join))
    def check(data):
        ids = tokenizer.encode_bytes(data)
        assert ids.dtype == np.int32 and tokenizer.decode_bytes(ids) == data
        assert tokenizer.decode_bytes(torch.from_numpy(ids)) == data
    check()
    data = KOREAN.encode()
    assert tokenizer.encode_bytes(data).tolist() == tokenizer.encode(KOREAN)   # which is NFC already


def test_decode_of_ids_that_are_no_tokens():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.decode([0xea, 0xb0]) == "\ufffd"
    for bad in (-1, 265):
        with pytest.raises(ValueError, match="0 to 264"):
            tokenizer.decode([65, bad])


@pytest.mark.parametrize("style", ["bytes", "gpt2", "qwen2"])
def test_surrogates(specs, style):
    tokenizer = Tokenizer.bytes() if style == "bytes" else both(specs[style])[0]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


@pytest.mark.parametrize("style", ["gpt2", "qwen2", "smollm2"])
def test_huge_runs(specs, style):
    """tiktoken alone gives up on white space: 'Max stack size exceeded' from half a million characters on."""
    ours, theirs = both(specs[style])
    for unit, num in ((" ", 1_048_576), ("\n", 700_000), ("a", 1_000_000), ("7", 100_000), ("가", 100_000)):
        text = "x" + unit * num + "y"
        assert ours.decode(ours.encode(text)) == text
    rng = random.Random(0)
    for _ in range(200):                      # runs around the blocks that white space is matched in
        run = "".join(rng.choices(" \t\n\u3000" if rng.random() < 0.5 else " ", k=rng.randrange(200, 1100)))
        text = rng.choice(["", "x", "!", "1"]) + run + rng.choice(["", "x", "!", "1", " x"])
        assert ours.encode(text) == theirs.encode(text).ids


def test_save_and_load(specs, tmp_path):
    for style, spec in {"bytes": None, **specs}.items():
        tokenizer = both(spec)[0] if spec else Tokenizer.bytes()
        tokenizer.save(tmp_path / style)
        for path in (tmp_path / style, tmp_path / style / "tokenizer.json"):
            again = Tokenizer.from_file(path)
            assert again.fingerprint() == tokenizer.fingerprint() and again.specials == tokenizer.specials
            assert again.encode(KOREAN + CODE) == tokenizer.encode(KOREAN + CODE)
    prints = [Tokenizer.from_file(tmp_path / style).fingerprint() for style in ["bytes", *specs]]
    assert len(set(prints)) == len(prints) and all(len(p) == 64 for p in prints)


def test_fingerprint_sees_every_change(specs):
    spec = specs["qwen2"]
    def swap(s):
        merges = s["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]
    changes = [lambda s: None, swap, lambda s: s.update(normalizer=None), lambda s: s["added_tokens"].pop(),
               lambda s: s.update(pre_tokenizer=specs["gpt2"]["pre_tokenizer"])]
    prints = []
    for change in changes:
        changed = copy.deepcopy(spec)
        change(changed)
        prints.append(Tokenizer({"tokenizer.json": json.dumps(changed)}).fingerprint())
    prints.append(Tokenizer({"tokenizer.json": json.dumps(spec), "chat_template.jinja":
                             "'<|im_start|>system\\nBe kind.<|im_end|>'"}).fingerprint())
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("style", ["bytes", "gpt2", "qwen2", "smollm2"])
def test_transformers_loads_what_save_writes(specs, tmp_path, style):
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-peers.txt)")
    tokenizer = Tokenizer.bytes() if style == "bytes" else both(specs[style])[0]
    tokenizer.save(tmp_path)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [KOREAN, ENGLISH, CODE[:5000], *random_strings(200, seed=3)]:
        if not tokenizer.nfc:
            assert fast.encode(text, add_special_tokens=False) == tokenizer.encode(text)
        ids = tokenizer.encode(text)
        assert fast.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids)
    for name, i in tokenizer.specials.items():
        assert fast.convert_tokens_to_ids(name) == i


def test_end_of_text(specs):
    assert both(specs["gpt2"])[0].end_of_text_id == specs["gpt2"]["added_tokens"][0]["id"]
    spec = copy.deepcopy(specs["gpt2"])
    spec["added_tokens"] = [{"id": 9000, "content": "<eos>", "special": True}]
    with_config = {"tokenizer.json": json.dumps(spec), "tokenizer_config.json": json.dumps({"eos_token": "<eos>"})}
    assert Tokenizer(with_config).end_of_text_id == 9000
    assert Tokenizer(with_config).end_of_turn_id is None and Tokenizer(with_config).vocab_size == 9001
    with pytest.raises(ValueError, match="end-of-text"):
        _ = Tokenizer({"tokenizer.json": json.dumps(spec)}).end_of_text_id
