import json
import os
import re
import zlib
from itertools import combinations

import pytest

from adversarial import cost
from data import ifeval, instructions
from data.grading import Outcome

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR
staged = pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), "ifeval")),
                            reason="needs TEMPER_DATA=<folder that holds ifeval/>")
SPLITS = ("train", "test")

# -----------------------------------------------------------------------------
# A writer that keeps any set of constraints and says nothing: proof that each set can be kept

FILL = {"en": "the mist is on the lake and it is grey", "ko": "안개가 낮은 산을 천천히 덮었다", "de": "der Nebel ist auf dem See und er ist grau",
        "it": "la nebbia è sul lago e non si muove", "pt": "a névoa não é mais do que uma nuvem", "ru": "туман и дождь на озере и в лесу",
        "vi": "sương mù là của hồ và không có gió"}


def write(hidden):
    given = {name.partition(":")[2]: kwargs for name, kwargs in zip(hidden["instruction_id_list"], hidden["kwargs"])}
    get = lambda name, key: given.get(name, {}).get(key)
    if "json_format" in given:
        return json.dumps({"text": " ".join(get("existence", "keywords") or ["mist"])}, ensure_ascii=False)
    fill = FILL[get("response_language", "language") or hidden["lang"]]
    extra = list(get("existence", "keywords") or [])
    for name, count, relation, unit in (("frequency", "frequency", "relation", get("frequency", "keyword")),
                                        ("letter_frequency", "let_frequency", "let_relation", get("letter_frequency", "letter")),
                                        ("capital_word_frequency", "capital_frequency", "capital_relation", "MIST")):
        if get(name, relation) == "at least":
            extra += [unit * get(name, count)] if name == "letter_frequency" else [unit] * get(name, count)
    extra += ["[mist]"] * (get("number_placeholders", "num_placeholders") or 0)
    extra += ["*mist*"] * (get("number_highlighted_sections", "num_highlights") or 0)
    words = [*fill.split(), *extra]
    if get("number_words", "relation") == "at least":
        words += fill.split() * (get("number_words", "num_words") // 4)
    num = get("number_sentences", "num_sentences") if get("number_sentences", "relation") == "at least" else 1
    sentences = [" ".join(words) + "."] + [fill.split()[1] + "."] * (num - 1)
    text = " ".join(sentences)
    if "nth_paragraph_first_word" in given:
        parts = [f"{get('nth_paragraph_first_word', 'first_word')} mist"] * (get("nth_paragraph_first_word", "num_paragraphs") - 1)
        text = "\n\n".join([f"{get('nth_paragraph_first_word', 'first_word')} {text}", *parts])
    if "number_paragraphs" in given:
        text = "\n***\n".join([text] + [fill] * (get("number_paragraphs", "num_paragraphs") - 1))
    for i in range(get("multiple_sections", "num_sections") or 0):
        text += f"\n{get('multiple_sections', 'section_spliter')} {i + 1}\nmist"
    if "number_bullet_lists" in given:
        text += "".join("\n- " + fill for _ in range(get("number_bullet_lists", "num_bullets")))
    if "title" in given:
        text = f"<<{fill}>>\n{text}"
    if "postscript" in given:
        text += f"\n{get('postscript', 'postscript_marker')} mist"
    if "end_checker" in given:
        text += "\n" + get("end_checker", "end_phrase")
    if "repeat_prompt" in given:
        text = get("repeat_prompt", "prompt_to_repeat") + "\n" + text
    if "two_responses" in given:
        text = f"{text}\n******\n{fill} {text}"
    if "quotation" in given:
        text = f'"{text}"'
    return text.upper() if "english_capital" in given else text.lower() if "english_lowercase" in given else text


@pytest.mark.parametrize("split", SPLITS)
def test_every_set_can_be_kept(split):
    followed = {}
    for index in range(2000):
        problem = instructions.problem(split, 0, index)
        response = write(problem.hidden)
        assert instructions.grade(problem, response) == RIGHT, (problem.hidden, response, ifeval.grade(response, *list(problem.hidden.values())[:2]))
        plain = ifeval.grade(FILL[problem.hidden["lang"]] + ", and so on", problem.hidden["instruction_id_list"], problem.hidden["kwargs"])[0]
        for name, kept in zip(problem.hidden["instruction_id_list"], plain):
            followed.setdefault(name, []).append(kept)
        assert instructions.grade(problem, " ") == UNGRADABLE and instructions.grade(problem, "." * 65537) == UNGRADABLE
    never = {name for name, kept in followed.items() if not any(kept)}                          # what text about nothing keeps by chance
    by_chance = {"keywords:forbidden_words", "keywords:frequency", "keywords:letter_frequency", "length_constraints:number_words",
                 "length_constraints:number_sentences", "change_case:capital_word_frequency", "language:response_language", "change_case:english_lowercase"}
    assert len(followed) == 24 and set(followed) - never <= by_chance


def test_the_sets_that_are_possible_are_all_kept():
    """Not only those that were drawn: each pair and triple of the table, once."""
    for lang, splits in instructions._SETS.items():
        for split, sets in splits.items():
            for names in (names for of_size in sets.values() for names in of_size):
                draw = instructions._Draw(f"{lang}/{names}", lang)
                hidden = {"instruction_id_list": [instructions._IDS[name] for name in names], "lang": lang,
                          "kwargs": [instructions._KWARGS[name](draw, instructions._REQUESTS[lang][split][0]) for name in names]}
                assert ifeval.outcome(write(hidden), hidden["instruction_id_list"], hidden["kwargs"]) == RIGHT, names


# -----------------------------------------------------------------------------
# Problems


def sample(split, num=3000, seed=0):
    return [instructions.problem(split, seed, index) for index in range(num)]


def test_pure_and_fast():
    first, seconds = cost(lambda: sample("train"), enough=1.5)
    assert 3000 / seconds > 2000
    assert first[1234] == instructions.problem("train", 0, 1234) and first[7] != instructions.problem("train", 1, 7)
    # fixed for good: whoever changes draws or tables changes what a seed stands for, and should know
    assert zlib.crc32(repr([(p.prompt, p.hidden) for p in first[:100]]).encode()) == 3345295492
    assert len({p.prompt[0]["content"] for p in first}) > 2500
    assert sum(p.hidden["lang"] == "ko" for p in first) == 1000
    sizes = [len(p.hidden["kwargs"]) for p in first]
    assert all(800 < sizes.count(n) < 1200 for n in (1, 2, 3))
    with pytest.raises(ValueError, match="expected split train or test, found 'val'"):
        instructions.problem("val", 0, 0)


def test_splits_share_no_request_and_no_held_out_pair():
    pairs, requests = {}, {}
    for split in SPLITS:
        drawn = sample(split)
        sets = [set(combinations(sorted(p.hidden["instruction_id_list"]), 2)) for p in drawn]
        pairs[split], requests[split] = sets, {re.split(r"(?<=\.)\s", p.prompt[0]["content"])[0] for p in drawn}
        assert all(len(p.hidden["instruction_id_list"]) >= 2 for p in drawn) == (split == "test")
    seen = set().union(*pairs["train"])
    assert all(one - seen for one in pairs["test"]) and len(seen) > 130
    assert not requests["train"] & requests["test"] and len(requests["train"]) == 72 and len(requests["test"]) == 18
    # every constraint is trained on alone, and in pairs
    assert {name for p in sample("train") for name in p.hidden["instruction_id_list"]} == {f for f in ifeval.CHECKERS if "constrained" not in f}


def test_tables():
    for lang, wording in instructions._WORDING.items():
        assert set(wording) <= set(instructions._KWARGS) and all(len(set(texts)) == len(texts) == (3 if lang == "en" else 2) for texts in wording.values())
        words = [word.lower() for kind in ("keyword", "repeated", "forbidden") for word in instructions._WORDS[lang][kind]]
        assert not [(a, b) for a in words for b in words if a != b and a in b] and len(set(words)) == len(words)
    assert not set("jqxz") & set("".join(word for values in instructions._WORDS["en"].values() for word in values).lower())
    assert len(instructions._WORDING["en"]) == 24
    for a, b in (("english_capital", "english_lowercase"), ("no_comma", "json_format"), ("two_responses", "number_paragraphs"), ("title", "title"),
                 ("repeat_prompt", "quotation"), ("response_language", "existence"), ("number_bullet_lists", "multiple_sections")):
        assert not instructions.compatible(a, b) and not instructions.compatible(b, a)
    for a, b in (("no_comma", "title"), ("json_format", "existence"), ("response_language", "no_comma"), ("number_words", "number_sentences")):
        assert instructions.compatible(a, b) and instructions.compatible(b, a)


def test_all_wordings_occur_and_say_their_numbers():
    texts = [p.prompt[0]["content"] for split in SPLITS for p in sample(split, 2500)]
    for lang, wording in instructions._WORDING.items():
        for name, forms in wording.items():
            for form in forms:
                pattern = ".+".join(map(re.escape, re.split(r"\{\w+\}", form)))
                assert any(re.search(pattern, text) for text in texts), (lang, name, form)
    assert not any("{" in text or "'" in text for text in texts)
    for p in sample("train", 1000):
        text = p.prompt[0]["content"]
        for kwargs in p.hidden["kwargs"]:
            for key, value in kwargs.items():
                values = value if isinstance(value, list) else [value]
                assert all(str(v) in text or key == "language" or "relation" in key and p.hidden["lang"] == "ko" for v in values), (key, value, text)


def test_problems_and_grade():
    some, more = instructions.problems("train", 5, seed=3), instructions.problems("train", 50, seed=3)
    assert some == more[:5] and len({p.prompt[0]["content"] for p in more}) == 50 and all(p.gold == [] and p.answer == "" for p in more)
    assert instructions.grade(some[0], None) == ERROR
    some[0].hidden["kwargs"][0]["unknown"] = 1
    assert instructions.grade(some[0], "text") == ERROR


@staged
def test_no_prompt_of_ifeval():
    """No shared prompt and no 13 words in a row."""
    def grams(text, n=13):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))}                # a shorter text is one piece

    real = set().union(*(grams(row["prompt"]) for row in ifeval.load()))
    assert grams(ifeval.load()[0]["prompt"]) & real
    for split in SPLITS:
        for seed in (0, 1):
            for p in sample(split, 1500, seed):
                assert not grams(p.prompt[0]["content"]) & real, p.prompt
