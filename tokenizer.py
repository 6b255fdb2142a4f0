"""
Text to token ids and back, chat messages to ids with a loss mask, and a model's text back to tool calls.

Every tokenizer here is a byte-level BPE that runs on tiktoken; the byte tokenizer is the one with no merges. A file is
a Hugging Face tokenizer.json; GPT-2, Llama-3, Qwen2/2.5/3 and SmolLM2 are of the kinds read. One that tiktoken cannot
represent exactly is refused with the reason, so ids are those of the `tokenizers` library or there are none.

Three rules hold the rest together:
- Only the renderer emits special ids. `encode` takes ordinary text: <|im_end|> typed by a user becomes the ids of its
  letters. This covers every added token of a file, also those not marked special (Qwen's <tool_call> and <think>),
  which `tokenizers` would pick out of plain text. In the text of an assistant turn, and there alone, <think> and
  </think> become their ids.
- The mask is made beside the ids, by position: 1 for an assistant's content, calls and its one <|im_end|>, 0 for all
  else, the newline after <|im_end|> included.
- History is never rendered again. Each segment is encoded apart, so render(messages + [reply]) starts with the ids of
  render_prompt(messages), and prompt + sampled ids + render_tool_results(...) is the next prompt.

The format is Hermes as Qwen2.5 and Qwen3 speak it, text byte-equal to their templates. Qwen3 with thinking off opens a
reply with an empty <think> block; it is part of the prompt (mask 0) and stays on every turn. Qwen3's own template drops
it from earlier turns, which would change ids that were sampled behind it; ours is the text of a template that does not
(trl ships one as qwen3_training), equal to Qwen3's own wherever only the last message is an assistant's. A reply whose
text opens with <think> brings its own block and gets no empty one: that is data for a prompt with thinking on.

    >>> tokenizer = Tokenizer.bytes()
    >>> ids, mask = tokenizer.render([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])
    >>> tokenizer.decode(ids)
    '<|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n'
    >>> tokenizer.decode([i for i, m in zip(ids, mask) if m])
    '4<|im_end|>'
"""

import hashlib
import itertools
import json
import math
import re
import unicodedata
from pathlib import Path

import numpy as np
import tiktoken

# -----------------------------------------------------------------------------
# Reading a tokenizer.json

# GPT-2 wrote bytes as printable characters: itself where printable, else the next free one from U+0100 on
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in BYTE_TO_CHAR)}
# for str.translate, to latin-1; what is not of this alphabet becomes a character that latin-1 lacks
CHAR_TO_BYTE = dict.fromkeys(range(256), "\uffff") | {ord(c): chr(b) for b, c in BYTE_TO_CHAR.items()}

CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits cuts the text at numbers before GPT-2's pattern sees it, so white space before a number ends its stretch
DIGITS_GPT2 = CONTRACTIONS + r"| ?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# the regular-expression syntax on which the engines of `tokenizers` (Oniguruma) and tiktoken (fancy-regex) agree
COMMON_SYNTAX = re.compile(r"(?:\\[pP]\{\^?\w+\}|\\[sSrnt]|\\[^\w]|\((?:\?(?:i?:|[=!>])|(?!\?))|\[\^?|[^\\.$^&~#\[(])+")


def split_pattern(pre_tokenizer):
    """The one regular expression that cuts text as the file's pre_tokenizer does; ValueError where there is none."""
    def flatten(step):
        return [s for inner in step["pretokenizers"] for s in flatten(inner)] if step["type"] == "Sequence" else [step]
    steps = flatten(pre_tokenizer) if pre_tokenizer else []
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"], ["Digits", "ByteLevel"]):
        raise ValueError(f"pre_tokenizer: expected ByteLevel, alone or after one Split or Digits, found {kinds}")
    if steps[-1].get("add_prefix_space", True):
        raise ValueError("pre_tokenizer: ByteLevel with add_prefix_space is not supported, expected false")
    use_regex = steps[-1].get("use_regex", True)
    if (kinds[0] == "Split" and use_regex) or (kinds[0] == "Digits" and not use_regex):
        raise ValueError(f"pre_tokenizer: {kinds[0]} before ByteLevel with use_regex={use_regex} is not supported")
    if kinds == ["ByteLevel"]:
        return GPT2 if use_regex else r"[\s\S]+"
    if kinds[0] == "Digits":
        return DIGITS_GPT2 % ("" if steps[0].get("individual_digits") else "+")
    pattern, behavior, invert = steps[0]["pattern"].get("Regex"), steps[0]["behavior"], steps[0].get("invert")
    if pattern is None or behavior != "Isolated" or invert:
        raise ValueError(f"pre_tokenizer: Split must be by Regex, Isolated, not inverted; found {steps[0]}")
    if not COMMON_SYNTAX.fullmatch(pattern) or "--" in pattern:
        raise ValueError(f"pre_tokenizer: pattern {pattern!r} has syntax that tiktoken's engine may read differently")
    # text between two matches is a piece for `tokenizers`; tiktoken would drop it
    return pattern + rf"|(?:(?!{pattern})[\s\S])+"


def parse_model(spec):
    """Checks the parsed tokenizer.json. -> vocab {bytes: id}, pair_rank {(bytes, bytes): rank}, added {str: id}."""
    model = spec["model"]
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict) or "merges" not in model:
        raise ValueError(f"model: expected a BPE with vocab and merges, found {model.get('type')}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"model.{key} = {model[key]!r} is not supported")
    if (spec.get("decoder") or {}).get("type") != "ByteLevel":
        raise ValueError(f"decoder: expected ByteLevel, found {(spec.get('decoder') or {}).get('type')}")
    for token in spec.get("added_tokens") or []:
        # GPT-NeoX adds runs of spaces: `tokenizers` finds them in ordinary text, where we never look for added tokens
        if not token.get("special") and not re.fullmatch(r"<.+>|\[.+\]", token["content"]):
            raise ValueError(f"added token {token['content']!r} is neither special nor a <tag>: ordinary text needs it")

    def to_bytes(text):
        try:
            return text.translate(CHAR_TO_BYTE).encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"vocab: token {text!r} has characters outside the byte-level alphabet") from None
    vocab = {to_bytes(text): i for text, i in model["vocab"].items() if text not in added}
    missing = [b for b in range(256) if bytes([b]) not in vocab]
    if missing:
        raise ValueError(f"vocab: expected all 256 single bytes, {len(missing)} are missing, 0x{missing[0]:02x} first")
    all_ids = [*vocab.values(), *added.values()]
    if len(set(all_ids)) < len(all_ids) or min(all_ids) < 0:
        raise ValueError("vocab: an id is negative, or two tokens have the same one")
    pair_rank = {}
    for rank, merge in enumerate(model["merges"]):
        pair = tuple(map(to_bytes, merge.split(" ") if isinstance(merge, str) else merge))
        if len(pair) != 2 or any(token not in vocab for token in (*pair, b"".join(pair))):
            raise ValueError(f"merge {rank + 1} ({merge!r}): expected two tokens of the vocab that join to a third")
        pair_rank[pair] = rank
    return vocab, pair_rank, added


def token_ranks(vocab, pair_rank, ignore_merges):
    """
    Ranks by token, for tiktoken, that merge exactly as the file's ranks by pair. -> {bytes: rank} of the longer tokens.

    tiktoken joins neighbours X Y if XY has a rank; the file joins them if the pair has one. Whenever X Y stand side by
    side in any text, the merges so far inside them are those of the string XY alone (a merge never looks past its two
    tokens, and none has crossed the outer borders). So the string XY, merged alone, passes through [X, Y]; merging is
    deterministic, hence each token has at most one pair that can ever make it. That pair's rank is the token's rank. A
    token whose last pair has no rank is never made and gets none. (Llama-3 lists all splits of a token: one is used.)
    """
    singles, ranks = [bytes([b]) for b in range(256)], {}
    for token in vocab:
        parts = [singles[b] for b in token]
        costs = [pair_rank.get(pair, math.inf) for pair in zip(parts, parts[1:])]
        while len(parts) > 2:
            best = min(costs)
            if best == math.inf:
                break
            at = costs.index(best)                                 # the leftmost, as everywhere
            parts[at] += parts.pop(at + 1)
            del costs[at]
            if at > 0:
                costs[at - 1] = pair_rank.get((parts[at - 1], parts[at]), math.inf)
            if at < len(costs):
                costs[at] = pair_rank.get((parts[at], parts[at + 1]), math.inf)
        if len(parts) == 2 and costs[0] < math.inf:
            ranks[token] = costs[0]
        elif ignore_merges and len(parts) > 1:
            # such a token stands only for a whole piece; tiktoken looks whole pieces up first, so any rank will do as
            # long as merging cannot arrive at it
            if len(parts) == 2:
                raise ValueError(f"ignore_merges: no merge makes the token {token!r}, but tiktoken would make it")
            ranks[token] = len(pair_rank) + len(ranks)
    return ranks


# -----------------------------------------------------------------------------
# The tokenizer

class Tag(str):
    """Text that the renderer emits as one special id, or as ordinary text if the tokenizer has no such token."""


IM_START, IM_END = Tag("<|im_start|>"), Tag("<|im_end|>")
CALL, CALL_END, RESPONSE, RESPONSE_END, THINK, THINK_END = map(Tag, (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"))
TOOLS_HEAD = ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
              "You are provided with function signatures within <tools></tools> XML tags:\n<tools>")
TOOLS_TAIL = ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within ",
              CALL, CALL_END, " XML tags:\n", CALL,
              '\n{"name": <function-name>, "arguments": <args-json-object>}\n', CALL_END)


def to_json(value):
    return json.dumps(value, ensure_ascii=False)


def utf8(text):
    """UTF-8 bytes of any str. Surrogate pairs are joined, lone surrogates (json.loads makes them) become U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


class Tokenizer:
    """
    Ids 0 .. vocab_size - 1. specials: {text: id} of all added tokens; end_of_turn_id is None without ChatML.
    default_system and empty_think are read from the chat template that lies beside a tokenizer.json.
    """

    def __init__(self, files: dict[str, str]):
        """files: name -> text of tokenizer.json and, if there, tokenizer_config.json and chat_template.jinja."""
        self.files = files
        spec, config = json.loads(files["tokenizer.json"]), json.loads(files.get("tokenizer_config.json", "{}"))
        normalizer = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
        normalizers = [n["type"] for n in normalizer.get("normalizers", [normalizer])]
        if normalizers not in ([], ["NFC"]):
            raise ValueError(f"normalizer: expected none or NFC, found {normalizers}")
        self.nfc = normalizers == ["NFC"]
        self.pattern = split_pattern(spec.get("pre_tokenizer"))
        vocab, pair_rank, self.specials = parse_model(spec)
        ranks = token_ranks(vocab, pair_rank, spec["model"].get("ignore_merges", False))

        names = {v: k.encode() for k, v in self.specials.items()} | {v: k for k, v in vocab.items()}
        self.vocab_size = max(names) + 1
        self._bytes_of = [names.get(i) for i in range(self.vocab_size)]
        self._id_of_byte = np.array([vocab[bytes([b])] for b in range(256)], dtype=np.int32)
        self._byte_is_id = (self._id_of_byte == np.arange(256)).all()
        self._order = [*(bytes([b]) for b in range(256)), *sorted(ranks, key=ranks.get)]
        self._bpe, self._id_of_rank = None, None
        if ranks:
            # Ranks need only be in order: ids serve where they ascend with the merges (GPT-2, Llama-3, Qwen). Where
            # they do not, ranks are counted, and translated to ids after encoding.
            ids = [vocab[token] for token in self._order]
            merged = ids[256:256 + sum(rank < len(pair_rank) for rank in ranks.values())]
            if merged != sorted(merged):
                self._id_of_rank, ids = ids, range(len(ids))
            # tiktoken backtracks over white space and fails on a run of half a million; in blocks of 256 the same match
            # (a run less its last character, or all of it if the text ends there) needs 256 times less of its stack
            pattern = re.sub(r"(?<![^|])\\s\+(\(\?!(?:\\S|\[\^\\s\\p\{N\}\])\))(?![^|)])",
                             r"(?:\\s{256}(?=\\s))++\\s*\1|\g<0>", self.pattern)
            self._bpe = tiktoken.Encoding("temper", pat_str=pattern, mergeable_ranks=dict(zip(self._order, ids)),
                                          special_tokens={})

        template = files.get("chat_template.jinja") or config.get("chat_template") or ""
        if isinstance(template, list):
            template = next((t["template"] for t in template if t["name"] == "default"), "")
        system = re.search(r"<\|im_start\|>system\\n([^'\"<{]+)<\|im_end\|>", template)
        self.default_system = system[1] if system else None
        self.empty_think = "enable_thinking" in template and r"<think>\n\n</think>\n\n" in template
        self.end_of_turn_id = self.specials.get(IM_END) if IM_START in self.specials else None
        eos = config.get("eos_token") or ""
        self._end_of_text = ("<|endoftext|>", "<|end_of_text|>", eos["content"] if isinstance(eos, dict) else eos)

    @classmethod
    def bytes(cls):
        """Ids 0..255 are the bytes, 256 <|endoftext|>, then <|im_start|>, <|im_end|>, six tags. No file needed."""
        added = ["<|endoftext|>", IM_START, IM_END, CALL, CALL_END, RESPONSE, RESPONSE_END, THINK, THINK_END]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        spec = {"version": "1.0", "truncation": None, "padding": None,
                "added_tokens": [{"id": 256 + i, "content": text, **flags, "special": text.startswith("<|")}
                                 for i, text in enumerate(added)],
                "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
                "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                          "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                          "ignore_merges": False, "vocab": {BYTE_TO_CHAR[b]: b for b in range(256)}, "merges": []}}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": IM_END, "pad_token": added[0],
                  "clean_up_tokenization_spaces": False}
        return cls({"tokenizer.json": to_json(spec), "tokenizer_config.json": to_json(config)})

    @classmethod
    def from_file(cls, path):
        """path: a tokenizer.json or its folder. ValueError with the reason if it cannot be represented."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: expected a tokenizer.json (the tokenizers library's format), found no such file")
        beside = [path.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja")]
        files = {p.name: p.read_text(encoding="utf-8") for p in beside if p.is_file()}
        try:
            return cls(files | {"tokenizer.json": path.read_text(encoding="utf-8")})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library ({error!r})") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder):
        """Writes the files it was made from, unchanged, so `tokenizers`, transformers and from_file read equal ids."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        plain = {"tokenizer_config.json": to_json({"tokenizer_class": "PreTrainedTokenizerFast"})}
        for name, text in (plain | self.files).items():
            (Path(folder) / name).write_text(text, encoding="utf-8")

    def fingerprint(self):
        """sha256 (hex) of all that decides ids: tokens, merge order, splitting, added tokens, chat style."""
        what = (self.pattern, self.nfc, self._bytes_of, self._order, sorted(self.specials.items()), self.default_system,
                self.empty_think)
        return hashlib.sha256(repr(what).encode()).hexdigest()

    @property
    def end_of_text_id(self):
        """The id that ends a document."""
        for name in self._end_of_text:
            if name in self.specials:
                return self.specials[name]
        raise ValueError(f"this tokenizer has no end-of-text token: expected one of {self._end_of_text} as added token")

    def encode(self, text):
        """str -> list[int]. Ordinary text only: no added token ever comes out, and no start or end token is added."""
        if self.nfc and not text.isascii():
            # Python's Unicode tables may be newer than those of `tokenizers`: stacks of rare combining marks can differ
            text = unicodedata.normalize("NFC", utf8(text).decode())
        return self._encode(text)

    def _encode(self, text):
        if self._bpe is None:
            data = utf8(text)
            return list(data) if self._byte_is_id else self._id_of_byte[np.frombuffer(data, np.uint8)].tolist()
        ids = self._bpe.encode(text, disallowed_special=())        # our Encoding has no special tokens to disallow
        return ids if self._id_of_rank is None else [self._id_of_rank[i] for i in ids]

    def encode_bytes(self, data):
        """
        bytes -> (T,) int32 array, and decode_bytes of it is data, whatever data is: bytes that are not UTF-8 go one by
        one, and nothing is normalized, so that with an NFC tokenizer ids can differ from encode(data.decode()).
        """
        if self._bpe is None:
            return self._id_of_byte[np.frombuffer(data, np.uint8)]
        ids = []
        for n, part in enumerate(re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))):
            ids += self._id_of_byte[[ord(c) - 0xdc00 for c in part]].tolist() if n % 2 else self._encode(part)
        return np.array(ids, dtype=np.int32)

    def decode_bytes(self, ids):
        """ids: list, array or tensor (T,) -> bytes. Special ids come out as their text."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size or self._bytes_of[i] is None:
                raise ValueError(f"id {i} is no token: expected 0 to {self.vocab_size - 1} (a model's vocabulary can "
                                 "be padded to a larger size: mask the logits of such ids when sampling)")
        return b"".join([self._bytes_of[i] for i in ids])

    def decode(self, ids):
        """ids: list, array or tensor (T,) -> str. Bytes that are not UTF-8 come out as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    # -------------------------------------------------------------------------
    # Messages to ids

    def _encode_parts(self, parts):
        """Ordinary text between two special ids is encoded as one string, as it would be read in a whole document."""
        ids, text = [], ""
        for part in parts:
            if isinstance(part, Tag) and part in self.specials:
                ids += self.encode(text) if text else []
                ids.append(self.specials[part])
                text = ""
            else:
                text += part
        return ids + self.encode(text) if text else ids

    def _join(self, segments):
        return [i for parts in segments for i in self._encode_parts(parts)]

    def _generation_prompt(self, empty_think=True):
        think = [THINK, "\n\n", THINK_END, "\n\n"] if self.empty_think and empty_think else []
        return [IM_START, "assistant\n", *think]

    def _tool_turn(self, results):
        """A run of results is one user turn."""
        parts = [p for n, r in enumerate(results)
                 for p in ("\n" if n else "", RESPONSE, "\n" + r + "\n", RESPONSE_END)]
        return [[IM_START, "user\n"], [*parts, IM_END, "\n"]]

    def _segments(self, messages, tools):
        """Yields (parts, trained): the conversation in order, each item encoded apart; trained is the mask, 0 or 1."""
        if self.end_of_turn_id is None:
            raise ValueError("this tokenizer has no <|im_start|> and <|im_end|>, which messages are rendered with")
        system = messages[0]["content"] if messages[0]["role"] == "system" else self.default_system
        if tools:
            signatures = "".join("\n" + to_json(tool) for tool in tools)
            head = TOOLS_HEAD if system is None else system + "\n\n" + TOOLS_HEAD
            body = [head, signatures, *TOOLS_TAIL]
        else:
            body = [system]
        if tools or system is not None:
            yield [IM_START, "system\n"], 0
            yield [*body, IM_END, "\n"], 0
        for i, message in enumerate(messages):
            role, content = message["role"], message.get("content") or ""
            if role == "user":
                yield [IM_START, "user\n"], 0
                yield [content, IM_END, "\n"], 0
            elif role == "tool" and messages[i - 1]["role"] != "tool":
                run = itertools.takewhile(lambda m: m["role"] == "tool", messages[i:])
                yield from ((parts, 0) for parts in self._tool_turn([m["content"] for m in run]))
            elif role == "assistant":
                yield self._generation_prompt(not content.startswith(THINK)), 0
                parts = [Tag(p) if p in (THINK, THINK_END) else p for p in re.split("(</?think>)", content)]
                for n, call in enumerate(message.get("tool_calls") or []):
                    parts += ["\n" if content or n else "", CALL, "\n" + call_json(call) + "\n", CALL_END]
                yield [*parts, IM_END], 1
                yield ["\n"], 0

    def render(self, messages, tools=None):
        """-> (ids, mask), both list[int] of one length; mask is 1 where a token is trained on, 0 elsewhere."""
        validate_messages(messages, tools)
        ids, mask = [], []
        for parts, trained in self._segments(messages, tools):
            new = self._encode_parts(parts)
            ids += new
            mask += [trained] * len(new)
        assert 0 < sum(mask) < len(mask), f"expected a mask of both 0 and 1, found {sum(mask)} of {len(mask)} at 1"
        return ids, mask

    def render_prompt(self, messages, tools=None):
        """-> ids of messages that end with a user's or a tool's, and of the generation prompt after them."""
        validate_messages(messages, tools, prompt=True)
        segments = [parts for parts, _ in self._segments(messages, tools)]
        return self._join([*segments, self._generation_prompt()])

    def render_tool_results(self, results):
        """
        results: list[str], one per call in order -> ids to put behind a sampled turn that ended in <|im_end|>: its
        newline, the user turn with the results, the next generation prompt.
        """
        return self._join([["\n"], *self._tool_turn(results), self._generation_prompt()])

    def render_user_turn(self, content):
        """Like render_tool_results, for a user's next message."""
        return self._join([["\n"], [IM_START, "user\n"], [content, IM_END, "\n"], self._generation_prompt()])


# -----------------------------------------------------------------------------
# Tool calls

MAX_BODY, MAX_DEPTH = 16 * 1024, 32                                # bytes and nesting of one call's JSON
SPACE = re.compile(r"\s*")
# what matters when looking for a body's end: a string (closed or not) as a whole, brackets, the closing tag
JSON_SCAN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]|</tool_call>', re.DOTALL)
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
         "null": type(None)}


class ToolCallError(ValueError):
    """The text of a tool call is malformed or does not fit its tool; the message is fit to be shown to the model."""


def call_json(call):
    return f'{{"name": {to_json(call["name"])}, "arguments": {to_json(call["arguments"])}}}'


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"duplicate key in {[key for key, _ in pairs]}")
    return found


def _finite(text):
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)


def load_strict(body):
    """json.loads that also refuses duplicate keys, NaN and Infinity (1e999 too)."""
    return STRICT.decode(body)


def check_value(value, schema, where):
    """ToolCallError unless value fits schema: type, enum, required, properties (no others), items; nothing else."""
    if not isinstance(schema, dict):
        return                                                     # JSON schema: true fits all
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    unknown = [kind for kind in kinds if kind not in TYPES]
    if unknown:
        raise ValueError(f"schema of {where}: unknown type {unknown[0]!r}, expected one of {', '.join(TYPES)}")
    # bool is a subclass of int in Python, and equal to 0 or 1
    fits = [isinstance(value, TYPES[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds]
    if kinds and not any(fits):
        raise ToolCallError(f"{where}: expected {' or '.join(kinds)}, found {to_json(value)[:100]}")
    allowed = schema.get("enum", [value])
    if not any(e == value and isinstance(e, bool) == isinstance(value, bool) for e in allowed):
        raise ToolCallError(f"{where}: expected one of {to_json(allowed)}, found {to_json(value)[:100]}")
    if isinstance(value, dict):
        missing = [key for key in schema.get("required", []) if key not in value]
        if missing:
            raise ToolCallError(f"{where}: missing {', '.join(missing)}")
        properties, others = schema.get("properties"), schema.get("additionalProperties", False)
        for key, item in value.items():
            if properties is not None and key not in properties and others is False:
                raise ToolCallError(f"{where}: unknown {key!r}, expected {', '.join(properties) or 'nothing'}")
            check_value(item, (properties or {}).get(key, others), f"{where}.{key}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            check_value(item, schema.get("items"), f"{where}[{i}]")


def parse_tool_calls(text, tools=None):
    """
    A turn's text without its <|im_end|> -> (content, calls), calls a list of {"name": str, "arguments": dict}.

    Strict, with no repair: each <tool_call> holds one JSON object with exactly name and arguments, at most 16 KB and
    32 deep; after a call come only white space and calls. With tools given the name must be known and the arguments fit
    (check_value). A tag within a JSON string is text. Anything else raises ToolCallError. Time is linear in len(text).
    """
    functions = None if tools is None else {tool["function"]["name"]: tool["function"] for tool in tools}
    start, calls = text.find(CALL), []
    content = text if start < 0 else text[:start].removesuffix("\n")
    if CALL_END in content:
        raise ToolCallError("</tool_call> without <tool_call>")
    while start >= 0:
        start, depth, end = start + len(CALL), 0, None
        for match in JSON_SCAN.finditer(text, start):
            depth += (match[0] in "[{") - (match[0] in "]}")
            if depth > MAX_DEPTH:
                raise ToolCallError(f"JSON is nested deeper than {MAX_DEPTH}")
            if match[0] == CALL_END:
                end = match.start()
                break
        if end is None:
            raise ToolCallError("<tool_call> is not closed")
        body = text[start:end]
        if len(utf8(body)) > MAX_BODY:
            raise ToolCallError(f"call is longer than {MAX_BODY} bytes")
        try:
            call = load_strict(body)
        except ValueError as error:                                # JSONDecodeError, or an integer of 5,000 digits
            raise ToolCallError(f"not one JSON object: {error}") from None
        if not isinstance(call, dict) or set(call) != {"name", "arguments"}:
            raise ToolCallError("expected a JSON object with exactly name and arguments")
        if not isinstance(call["name"], str) or not call["name"] or not isinstance(call["arguments"], dict):
            raise ToolCallError("expected name to be a string and arguments to be an object")
        if functions is not None:
            if call["name"] not in functions:
                raise ToolCallError(f"unknown tool {call['name']!r}, expected one of {', '.join(functions)}")
            parameters = {"properties": {}, **functions[call["name"]].get("parameters", {})}
            check_value(call["arguments"], parameters, "arguments")
        calls.append(call)
        start = SPACE.match(text, end + len(CALL_END)).end()       # not lstrip of the rest, which copies it for every call
        if start == len(text):
            break
        if not text.startswith(CALL, start):
            raise ToolCallError(f"text after a call: {text[start:start + 100]!r}")
    return content, calls


# -----------------------------------------------------------------------------
# What a conversation may hold

KEYS = {"system": ["role", "content"], "user": ["role", "content"], "assistant": ["role", "content", "tool_calls"],
        "tool": ["role", "content"]}


def expect(condition, message, *values):
    """message is put together only when it is needed: this runs for every message of every conversation."""
    if not condition:
        raise ValueError(message.format(*(v if isinstance(v, (str, int)) else str(v)[:200] for v in values)))


def validate_messages(messages, tools=None, prompt=False):
    """
    ValueError, with the message's number and what is wrong, unless messages can be trained on (prompt=False: some turn
    is an assistant's) or answered (prompt=True: the last is a user's or a tool's).

    messages: [{"role", "content"}], content a str; an assistant may have "tool_calls": [{"name", "arguments": dict}],
    and then no content. tools: [{"type": "function", "function": {"name", "parameters", ...}}]. A call need not fit the
    tools: a wrong call and the error that it got are something to learn from.
    """
    names = []
    for n, tool in enumerate(tools or []):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        ok = isinstance(name, str) and name not in ["", *names] and isinstance(function.get("parameters", {}), dict)
        expect(ok, 'tool {}: expected {{"type": "function", "function": {{"name": STRING, "parameters": OBJECT, ...}}}}'
               ", each name once, found {}", n, tool)
        names.append(name)
    expect(isinstance(messages, list) and messages, "expected a list of messages, found {}", messages)
    before, due = None, 0                                          # role of the message before; tool results still due
    for n, message in enumerate(messages):
        expect(isinstance(message, dict), "message {}: expected an object, found {}", n, message)
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls") or []
        expect(isinstance(role, str) and role in KEYS, "message {}: expected role {}, found {}", n, [*KEYS], role)
        where = f"message {n} ({role})"
        extra = [key for key in message if key not in KEYS[role]]
        expect(not extra, "{}: unknown key {}, expected {}", where, extra, KEYS[role])
        expect(isinstance(calls, list), "{}: expected tool_calls to be a list, found {}", where, calls)
        expect(isinstance(content, str) or (content is None and calls), "{}: expected content to be a string, found {}",
               where, content)
        expect(role != "system" or n == 0, "{}: only the first message may be the system's", where)
        expect(role != "tool" or due, "{}: a result without a call, each call has exactly one", where)
        expect(role == "tool" or not due, "{}: {} tool results are missing before it", where, due)
        due += len(calls) - (role == "tool")
        if role == "assistant":
            expect(before != "assistant", "{}: two assistant turns in a row", where)
            expect(content or calls, "{}: expected content or tool_calls, found neither", where)
            expect(CALL not in (content or "") and CALL_END not in (content or ""),
                   "{}: content has <tool_call> or </tool_call>, move the call to tool_calls", where)
        for call in calls:
            ok = isinstance(call, dict) and set(call) == {"name", "arguments"} and isinstance(call["arguments"], dict)
            expect(ok, '{}: expected a call {{"name": STRING, "arguments": OBJECT}}, found {}', where, call)
            try:                                                   # what is trained on must be what the parser reads
                same = parse_tool_calls(f"{CALL}{call_json(call)}{CALL_END}") == ("", [call])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where}: call {str(call)[:200]}: {error}") from None
            expect(same, "{}: call {} is not read back as it was: JSON has string keys and lists only", where, call)
        before = role
    if prompt:
        expect(before in ("user", "tool") and not due,
               "{}: expected a prompt to end with a user's message or all tool results ({} are missing)", where, due)
    else:
        expect(any(m["role"] == "assistant" for m in messages), "no assistant turn, so nothing to train on")
