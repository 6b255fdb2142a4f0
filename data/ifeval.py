"""IFEval: 541 prompts with 834 instructions that a program can check (arXiv 2311.07911; Google, Apache-2.0), and their checkers.

    load() -> [{"key": 1001, "prompt": "...", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}, ...]
    grade(response, instruction_id_list, kwargs) -> (strict, loose)     one bool per instruction in each

Strict reads the response as it is. Loose is the published leniency: an instruction is followed if any of eight variants follows it: as
it is, without its first line (an introduction), its last (a farewell), or both; and each of these without asterisks. A blank response
follows nothing. Neither does one of more than MAX_CHARS characters: it is not read, all is False, and outcome() calls it ungradable.

The rules are those of google-research's published checkers, with three differences. They use two packages whose answers change with
their versions, and we count with what stands below:
    capital words    runs of letters and digits, joined by single - or . ; theirs are NLTK's tokens
    sentences        see _SENTENCE_END; theirs are NLTK's punkt
    language         see language(); theirs is langdetect, which takes a text that it cannot name for one in the right language
"""
import functools
import hashlib
import json
import re
from collections import Counter
from itertools import islice

import numpy as np

from data.grading import MAX_CHARS, Outcome, Problem, never_raises
from data.gsm8k import fetch

URL = ("https://raw.githubusercontent.com/google-research/google-research/19638399cc9e03623c5b9087a1d6fa8813974ce9/"
       "instruction_following_eval/data/input_data.jsonl")
SHA256 = "67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49"
NUM_ROWS = 541

# -----------------------------------------------------------------------------
# Language: by script; where a script is shared, by the share of words that are function words of a language

# script: (ranges of its letters, its languages). Scripts without a language of ours count too: such a text is in none of them.
_SCRIPTS = {
    "latin": ("41-5a 61-7a c0-d6 d8-f6 f8-24f 1e00-1eff", "en de it pt vi sw fi es fr"),
    "cyrillic": ("400-52f", "ru bg"), "arabic": ("620-64a 671-6d3", "ar fa ur"), "devanagari": ("900-963 970-97f", "hi mr ne"),
    "hangul": ("1100-11ff 3131-318e ac00-d7a3", "ko"), "bengali": ("980-9e3", "bn"), "gurmukhi": ("a00-a65 a70-a75", "pa"),
    "gujarati": ("a80-ae3", "gu"), "tamil": ("b80-bd7", "ta"), "telugu": ("c00-c63", "te"), "kannada": ("c80-ce3", "kn"),
    "thai": ("e01-e3a e40-e4e", "th"), "kana": ("3041-30ff", ""), "han": ("4e00-9fff", ""), "greek": ("370-3ff", ""),
    "hebrew": ("5d0-5ea", ""),
}
_FUNCTION_WORDS = {
    "en": """the of and to a in is it you that for on are with as was be this have from or by but not your can will an at we they their
             has which if all more our do so my he she his who these them its i what""",
    "de": """der die das und ist in zu den nicht von mit sich auf für ein eine einen dem des im auch es an als wie wir ich sie er du hat
             war sind werden wird oder aber bei nach aus um noch nur kann über wenn dass""",
    "it": """il lo la i gli le di e è che in un una per con non del della dei delle al alla nel nella sono si da come più ma anche questo
             questa ha o se tuo mio ci ti suo loro dal ogni molto quando""",
    "pt": """o a os as de do da dos das e é que em um uma para com não no na nos nas por se mais como mas ao são seu sua foi ou ser
             quando muito há também já eu você ele ela isso este esta""",
    "vi": """và của là có không được cho trong với các một những này để người đã khi từ tôi bạn đó như về cũng nhưng thì ra vào nhiều rất
             sẽ hay hoặc đến nên trên phải chúng ta mỗi lại""",
    "sw": """na ya wa kwa ni katika la za cha ili kuwa hii yake sana pia kama hiyo si au watu lakini huo huu vya yetu yangu wetu mimi sisi
             wewe kila baada hilo hayo hizo kutoka hadi wake wao yao""",
    "fi": """ja on ei että se oli hän ovat kun mutta niin myös tai kuin joka jos sen hänen minä sinä me te he mitä voi ole olla tämä
             tämän jotka kanssa sitä minun vain nyt siitä kaikki ne en vielä hyvin""",
    "es": """el la los las de y es que en un una para con no por se más como pero al del lo su sus son o le me si mi ya este esta está
             muy también ser hay cuando""",
    "fr": """le la les de des et est un une du en que qui pour pas dans ce il elle au aux avec sur ne se plus par je vous nous sont mais
             ou cette son sa ses à l d""",
    "ru": """и в не на что с по это как я он она они мы вы то но а из за от для к у же все так его её или если был была было есть также
             когда только при до о мне""",
    "bg": """и на да се в за от с не е са по как това що като но или до си ще той тя те ние вие много има при след може един една бе беше
             съм което които който ми ни""",
    "ar": """في من على إلى أن هذا هذه التي الذي ما لا هو هي كان كانت مع عن كل أو و ثم قد لم لن بعد قبل بين عند إذا كما ذلك تلك هناك نحن
             أنا حتى غير أي إن يمكن""",
    "fa": """و در به از که را این با است آن برای یک تا هم ها های می بر شود شد یا هر ما من شما او نیز خود کند کرد بود باید اما اگر
             هستند دارد""",
    "ur": """کے کی کا میں ہے ہیں اور سے کو نے پر یہ وہ اس ایک نہیں بھی کہ تھا تھی تھے ہو کر لیے جو تو ہی یا اپنے ہم آپ گیا""",
    "hi": """है हैं का के की में और को से ने पर यह वह एक नहीं भी कि था थी थे हो कर लिए इस उस तो ही जो या अपने हम आप मैं होता करने""",
    "mr": """आहे आहेत आणि या ही हे तो ती ते मध्ये नाही एक हा मी आम्ही तुम्ही होते होता असे की पण साठी आपल्या त्या आपण केले खूप व आम्हाला
             मला तर अनेक""",
    "ne": """छ छन् र हो यो पनि लागि गर्न गर्ने भएको थियो हुन्छ हामी तपाईं मेरो हाम्रो एक धेरै सबै तर भने गरेको रूपमा अनि उनी त्यो जब यस
             कुनै थिए छैन हुन् म""",
}
_FUNCTION_WORDS = {code: set(words.split()) for code, words in _FUNCTION_WORDS.items()}
LANGUAGES = sorted({code for _, codes in _SCRIPTS.values() for code in codes.split()})
# punctuation that stands between words: ASCII, Latin-1, general, Arabic and Indic marks (a danda, a zero-width non-joiner)
_GAP = re.compile(r"[\s!-/:-@\[-`{-~\u00a1-\u00bf\u2000-\u206f،؛؟۔।]+")
_MAX_READ = 16384  # characters whose words are counted
_ASCII_GAP = bytes(c if chr(c).isalnum() else 32 for c in range(128)) + bytes(128)


def _script_table():
    """code point -> number of its script, 0 for none; (0xD800,) uint8, for what lies above there is no letter of ours"""
    table = np.zeros(0xD800, np.uint8)
    for number, (ranges, _) in enumerate(_SCRIPTS.values(), 1):
        for first, last in (span.split("-") for span in ranges.split()):
            table[int(first, 16):int(last, 16) + 1] = number
    return table


_SCRIPT_OF = _script_table()
_LETTERS_PER_CHAR = np.array([0] + [2 if name == "hangul" else 1 for name in _SCRIPTS])  # a syllable block is two or three letters


def _codes(text):
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def language(text: str) -> str | None:
    """Code of the language that a text is written in, one of LANGUAGES; None: undecided, which follows no instruction.

    The script with the most letters decides. Where several languages share it, that with the largest share of function words among the
    words of the first 16,384 characters, in any case: English needs a share of .15, the others .05. Below five words a share says
    nothing: then Latin letters are English if they are ASCII, and anything else is undecided.
    """
    counts = np.bincount(_SCRIPT_OF[np.minimum(_codes(text), len(_SCRIPT_OF) - 1)], minlength=len(_SCRIPTS) + 1) * _LETTERS_PER_CHAR
    if not counts.any():
        return None
    script = list(_SCRIPTS)[counts.argmax() - 1]
    candidates = _SCRIPTS[script][1].split()
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    text = text[:_MAX_READ].casefold()
    if text.isascii():
        words = Counter(word.decode() for word in text.encode().translate(_ASCII_GAP).split())
    else:
        words = Counter(filter(None, _GAP.split(text)))
    total = words.total()
    if total < 5:
        return "en" if script == "latin" and all(map(str.isascii, words)) else None
    share = {code: sum(words[word] for word in _FUNCTION_WORDS[code]) / total for code in candidates}
    best = max(candidates, key=share.get)  # of equals the first: English, where it is a candidate
    return best if share[best] >= (0.15 if best == "en" else 0.05) else None


# -----------------------------------------------------------------------------
# Counting. Where "at least n" is the question, a scan stops at the n-th match.


def _reaches(found, num):
    return sum(1 for _ in islice(found, num)) >= num


def _related(reached, relation):
    """Was 'at least n' (relation "at least") or 'less than n' (relation "less than") asked for?"""
    return reached == (relation == "at least")


_WORD = re.compile(r"\w+")
# code point -> 0 neither letter nor digit, 1 without case, 2 capital, 3 other case; (65536,) uint8, the rest of Unicode counts as 0
_CASE = np.array([c.isalnum() and (2 if c.isupper() else 3 if c.islower() or c.istitle() else 1) for c in map(chr, range(65536))], np.uint8)
# . ? ! right behind something, and what closes a quotation or an emphasis, before white space or at the end; CJK full stops anywhere. Not
# behind abbreviations, initials (I is a word), the last letter of U.S. or a.m., or the number of an item at the start of its line.
_ABBREVIATIONS = ("mr ms dr sr jr st mt vs co lt", "mrs etc inc ltd est fig vol gen col sgt rev hon jan feb aug oct nov dec",
                  "prof corp dept capt sept", "approx")  # of equal length: what a lookbehind can take
_NO_WORD_END = r"(?<!\.[A-Za-z]\.)(?<!\b[A-HJ-Z]\.)" + "".join(rf"(?<!\b(?i:{words.replace(' ', '|')})\.)" for words in _ABBREVIATIONS)
_NO_ITEM = "".join(rf"(?<!^{' ' * indent}{digits}\.)" for indent in range(4) for digits in (r"\d", r"\d\d"))
_SENTENCE_END = re.compile(rf"[.?!…](?<=[^\s.?!…].)(?:(?<=[?!…])|(?<=\W\.)|(?<=\d\.){_NO_ITEM}|(?<=[^\W\d]\.){_NO_WORD_END})"
                           r"[.?!…]*+[\"'”’»)\]*_]*+(?=\s|\Z)|[。？！]", re.M)
_PLACEHOLDER = re.compile(r"\[[^\n\]]*+(\]?)")  # an open bracket takes the rest of its line along: nothing there can close another
_HIGHLIGHT = re.compile(r"\*([^\n*]*)\*"), re.compile(r"\*\*([^\n*]*)\*\*")
_TITLE = re.compile(r"^(?>[^\n]*?<<)([^\n]+)>>", re.M)  # the widest pair of a line: had the first << no partner, no later one has
_POSTSCRIPT = {"P.S.": re.compile(r"p\.\s?s\."), "P.P.S": re.compile(r"p\.\s?p\.\s?s")}
_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCES = ("```json", "```Json", "```JSON", "```")


def _capital_words(text, capital_frequency, capital_relation):
    """Words are letters and digits joined by single - or . ; a capital word has a capital and no other case. Arrays, as a loop over words
    eight times takes too long."""
    codes = _codes(f" {text} ")
    case = _CASE[np.minimum(codes, 65535)]
    inside = case > 0
    inside[1:-1] |= ((codes == ord("-")) | (codes == ord(".")))[1:-1] & inside[:-2] & inside[2:]
    start = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
    has = [np.logical_or.reduceat(case == kind, start) if len(start) else start for kind in (2, 3)]  # up to the next word: spaces are 0
    return _related(np.count_nonzero(has[0] > has[1]) >= capital_frequency, capital_relation)


def _two_responses(text):
    parts = text.split("******")
    full = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(full) == 2 and full[0] != full[1]


def _highlights(text, num_highlights):
    return sum(bool(inside.strip()) for pattern in _HIGHLIGHT for inside in pattern.findall(text)) >= num_highlights


def _is_json(text):
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    text = text.removesuffix("```").strip()
    try:
        json.loads(text, parse_int=str)  # the conversion to int is quadratic, and nothing looks at the value
    except (ValueError, RecursionError):  # of about a thousand levels, deeper than any reader of JSON will take
        return False
    return True


def _sections(text, section_spliter, num_sections):
    return _reaches(re.finditer(re.escape(section_spliter) + r"\s?\d+", text), num_sections)


def _bullets(text, num_bullets):
    # counted apart, because * at the end of a line takes the next line for its other character
    stars, dashes = re.finditer(r"^[^\S\n]*+\*[^*].*$", text, re.M), re.finditer(r"^[^\S\n]*+-.*$", text, re.M)
    return sum(1 for found in (stars, dashes) for _ in islice(found, num_bullets + 1)) == num_bullets


def _title(text):
    return any(match[1].lstrip("<").rstrip(">").strip() for match in _TITLE.finditer(text))


def _forbidden(text, forbidden_words):
    return not re.search(rf"\b(?:{'|'.join(map(re.escape, forbidden_words))})\b", text, re.I)


def _first_word(text, num_paragraphs, nth_paragraph, first_word):
    parts = text.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split(None, 1)[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == first_word.lower()


def _paragraphs(text, num_paragraphs):
    parts = [bool(part.strip()) for part in _DIVIDER.split(text)]
    return all(parts[1:-1]) and sum(parts) == num_paragraphs


def _sentences(text, num_sentences, relation):
    ends = [match.end() for match in islice(_SENTENCE_END.finditer(text), num_sentences)]
    unfinished = _WORD.search(text, ends[-1] if ends else 0) is not None
    return _related(len(ends) + unfinished >= num_sentences, relation)


def _quoted(text):
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


# id: (checker(text, **kwargs) of a text that is not blank, {its kwargs: what they may be})
_COUNT, _TEXT, _TEXTS, _RELATION = "a count", "a text", "texts", "a relation"
CHECKERS = {
    "change_case:capital_word_frequency": (_capital_words, {"capital_frequency": _COUNT, "capital_relation": _RELATION}),
    "change_case:english_capital": (lambda text: text.isupper() and language(text) == "en", {}),
    "change_case:english_lowercase": (lambda text: text.islower() and language(text) == "en", {}),
    "combination:repeat_prompt": (lambda text, prompt_to_repeat: text.strip().lower().startswith(prompt_to_repeat.strip().lower()),
                                  {"prompt_to_repeat": _TEXT}),
    "combination:two_responses": (_two_responses, {}),
    "detectable_content:number_placeholders": (
        lambda text, num_placeholders: _PLACEHOLDER.findall(text).count("]") >= num_placeholders, {"num_placeholders": _COUNT}),
    "detectable_content:postscript": (lambda text, postscript_marker: bool(_POSTSCRIPT[postscript_marker].search(text.lower())),
                                      {"postscript_marker": _POSTSCRIPT}),
    "detectable_format:constrained_response": (lambda text: any(answer in text for answer in _ANSWERS), {}),
    "detectable_format:json_format": (_is_json, {}),
    "detectable_format:multiple_sections": (_sections, {"section_spliter": _TEXT, "num_sections": _COUNT}),
    "detectable_format:number_bullet_lists": (_bullets, {"num_bullets": _COUNT}),
    "detectable_format:number_highlighted_sections": (_highlights, {"num_highlights": _COUNT}),
    "detectable_format:title": (_title, {}),
    "keywords:existence": (lambda text, keywords: all(word.lower() in text.lower() for word in keywords), {"keywords": _TEXTS}),
    "keywords:forbidden_words": (_forbidden, {"forbidden_words": _TEXTS}),
    "keywords:frequency": (lambda text, keyword, frequency, relation: _related(text.lower().count(keyword.lower()) >= frequency, relation),
                           {"keyword": _TEXT, "frequency": _COUNT, "relation": _RELATION}),
    "keywords:letter_frequency": (
        lambda text, letter, let_frequency, let_relation: _related(text.lower().count(letter.lower()) >= let_frequency, let_relation),
        {"letter": "one character", "let_frequency": _COUNT, "let_relation": _RELATION}),
    "language:response_language": (lambda text, language: _language(text) == language, {"language": LANGUAGES}),
    "length_constraints:nth_paragraph_first_word": (_first_word, {"num_paragraphs": _COUNT, "nth_paragraph": _COUNT, "first_word": _TEXT}),
    "length_constraints:number_paragraphs": (_paragraphs, {"num_paragraphs": _COUNT}),
    "length_constraints:number_sentences": (_sentences, {"num_sentences": _COUNT, "relation": _RELATION}),
    "length_constraints:number_words": (
        lambda text, num_words, relation: _related(_reaches(_WORD.finditer(text), num_words), relation),
        {"num_words": _COUNT, "relation": _RELATION}),
    "punctuation:no_comma": (lambda text: "," not in text, {}),
    "startend:end_checker": (lambda text, end_phrase: text.strip().strip('"').lower().endswith(end_phrase.strip().lower()),
                             {"end_phrase": _TEXT}),
    "startend:quotation": (_quoted, {}),
}
_language = language  # a kwarg of that name hides it above
LANGUAGE_IDS = ("change_case:english_capital", "change_case:english_lowercase", "language:response_language")


# -----------------------------------------------------------------------------
# Grading


def _fits(value, kind):
    if kind == _COUNT:
        return type(value) is int and value >= 1
    if kind == _TEXT:
        return isinstance(value, str) and bool(value.strip())
    if kind == _TEXTS:
        return isinstance(value, list) and bool(value) and all(_fits(item, _TEXT) for item in value)
    if kind == "one character":
        return isinstance(value, str) and len(value) == 1
    return value in (("at least", "less than") if kind == _RELATION else tuple(kind))


def check_reference(instruction_id_list: list[str], kwargs: list[dict]) -> None:
    """ValueError unless there is a checker for each instruction, and its kwargs are complete, no more than that, and make sense."""
    if len(instruction_id_list) != len(kwargs):
        raise ValueError(f"expected kwargs for each of {len(instruction_id_list)} instructions, found {len(kwargs)}")
    for name, given in zip(instruction_id_list, kwargs):
        if name not in CHECKERS:
            raise ValueError(f"unknown instruction {name!r}, expected one of {', '.join(CHECKERS)}")
        expected = CHECKERS[name][1]
        if set(given) != set(expected):
            raise ValueError(f"{name}: expected the kwargs {sorted(expected)}, found {sorted(given)}")
        for key, kind in expected.items():
            if not _fits(given[key], kind):
                kind = kind if isinstance(kind, str) else f"one of {', '.join(kind)}"
                raise ValueError(f"{name}: expected {key} to be {kind}, found {given[key]!r}")
        if given.get("nth_paragraph", 0) > given.get("num_paragraphs", 0):
            raise ValueError(f"{name}: expected nth_paragraph of at most num_paragraphs, found {given}")


def _variants(text):
    """Loose variants other than the text itself, without repeats and blank ones."""
    lines = text.split("\n")
    parts = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    variants = dict.fromkeys([*parts, *(part.replace("*", "") for part in parts)])
    return [variant for variant in variants if variant != text and variant.strip()]


def grade(response: str, instruction_id_list: list[str], kwargs: list[dict]) -> tuple[list[bool], list[bool]]:
    """(strict, loose): is each instruction followed? ValueError if ids or kwargs are not IFEval's (check_reference).

    All False for a blank response and for one of more than MAX_CHARS characters.
    """
    check_reference(instruction_id_list, kwargs)
    if len(response) > MAX_CHARS or not response.strip():
        return [False] * len(kwargs), [False] * len(kwargs)
    checks = [functools.partial(CHECKERS[name][0], **given) for name, given in zip(instruction_id_list, kwargs)]
    strict = [bool(check(response)) for check in checks]
    variants = [] if all(strict) else _variants(response)
    return strict, [kept or any(map(check, variants)) for kept, check in zip(strict, checks)]


@never_raises
def outcome(response: str, instruction_id_list: list[str], kwargs: list[dict]) -> Outcome:
    """As a reward: RIGHT if every instruction is followed, strictly. UNGRADABLE if the response is blank or too long to be read."""
    strict, _ = grade(response, instruction_id_list, kwargs)
    if len(response) > MAX_CHARS or not response.strip():
        return Outcome.UNGRADABLE
    return Outcome.RIGHT if all(strict) else Outcome.WRONG


def scores(rows: list[dict]) -> dict:
    """rows: those of load(), each with its "response" -> the four scores as they are reported, and what they consist of.

    prompt_strict, prompt_loose             share of prompts whose instructions are all followed
    instruction_strict, instruction_loose   share of all instructions
    by_id                                   {id: (strict share, loose share, number of instructions)}
    num_prompts, num_instructions           the denominators
    num_undecided                           instructions that ask for a language, on a response whose language cannot be told: false
    """
    graded = [(row, *grade(row["response"], row["instruction_id_list"], row["kwargs"])) for row in rows]
    if not graded:
        raise ValueError("expected at least one row to score, found none")
    flat = [item for row, strict, loose in graded for item in zip(row["instruction_id_list"], strict, loose)]
    undecided = sum(name in LANGUAGE_IDS for row in rows for name in row["instruction_id_list"]
                    if len(row["response"]) <= MAX_CHARS and language(row["response"]) is None)
    by_id = {}
    for name in sorted({name for name, _, _ in flat}):
        own = [item for item in flat if item[0] == name]
        by_id[name] = (sum(s for _, s, _ in own) / len(own), sum(x for _, _, x in own) / len(own), len(own))
    return {"prompt_strict": sum(all(strict) for _, strict, _ in graded) / len(graded),
            "prompt_loose": sum(all(loose) for _, _, loose in graded) / len(graded),
            "instruction_strict": sum(strict for _, strict, _ in flat) / len(flat),
            "instruction_loose": sum(loose for _, _, loose in flat) / len(flat),
            "num_prompts": len(graded), "num_instructions": len(flat), "num_undecided": undecided, "by_id": by_id}


# -----------------------------------------------------------------------------
# Files


def load() -> list[dict]:
    """The 541 rows {"key", "prompt", "instruction_id_list", "kwargs"} in the order of the file. For evaluation only."""
    path = fetch("ifeval/input_data.jsonl", URL, SHA256)
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = json.loads(line)
        try:
            check_reference(row["instruction_id_list"], row["kwargs"])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        rows.append({key: row[key] for key in ("key", "prompt", "instruction_id_list", "kwargs")})
    return rows


def problems(num: int | None = None, seed: int = 0) -> list[Problem]:
    """`num` problems (all, if None or more than there are) in an order that the seed alone decides: a larger num only adds to the end.
    hidden: {"instruction_id_list", "kwargs"}. There is no gold response."""
    order = sorted(load(), key=lambda row: hashlib.blake2b(b"%d/%d" % (seed, row["key"]), digest_size=8).digest())
    return [Problem("ifeval", [{"role": "user", "content": row["prompt"]}], [], "",
                    {"instruction_id_list": row["instruction_id_list"], "kwargs": row["kwargs"]}) for row in order[:num]]
