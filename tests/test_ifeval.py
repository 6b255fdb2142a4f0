import json
import os
import random

import pytest

from adversarial import assert_bounded, cost
from data import ifeval
from data.grading import Outcome

RIGHT, WRONG, UNGRADABLE, ERROR = Outcome.RIGHT, Outcome.WRONG, Outcome.UNGRADABLE, Outcome.GRADER_ERROR
staged = pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("TEMPER_DATA", ""), "ifeval")),
                            reason="needs TEMPER_DATA=<folder that holds ifeval/>")
EN = "The cat sat on the mat and it was warm"                      # nine words, six of them function words
AT_LEAST, LESS = "at least", "less than"

# (id, kwargs, responses that follow it, responses that do not): strictly
CASES = [
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": AT_LEAST},
     ("I SAID so.", "NASA and ESA", "A B", "X-RAY of the U.S. coast", "É 3D"), ("NASA", "Nasa Esa", "nasa", "X-RAY", "12 34", "A.B", "iOS McD")),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": LESS}, ("none", "ONE", "One Two", "A-B"), ("A B", "ONE TWO", "I AM", "A--B")),
    ("change_case:english_capital", {}, (EN.upper(), "HELLO!", "THIS IS IT: 5 OF THE 7 CATS."), (EN, "THIS IS iT", "123", "DAS IST NICHT DER HUND UND DIE KATZE", "안녕", "ÇA VA")),
    ("change_case:english_lowercase", {}, (EN.lower(), "hello!", "this is it: 5 of the 7 cats."), (EN, "I am here", "123", "das ist nicht der hund und die katze", "안녕하세요", "ça va")),
    ("combination:repeat_prompt", {"prompt_to_repeat": " Say hi to Bob. "}, ("Say hi to Bob. Hi Bob!", "  say hi to bob.\nhi", "Say hi to Bob."), ("Hi Bob!", "Sure! Say hi to Bob.", "Say  hi to Bob.", '"Say hi to Bob." Hi')),
    ("combination:two_responses", {}, ("one ****** two", "\n******\none\n******\ntwo\n******\n", "one******two"), ("one", "one ****** one", "one ***** two", "a ****** b ****** c", "a ****** ****** b", "******")),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ("[a] [b]", "[][]", "x [a] y\n[b] [c]"), ("[a]", "[a\n] [b]", "[[a]]", "(a) (b)", "] [ ]")),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ("Bye.\nP.S. More", "p.s. more", "P. S. x", "x P.P.S. y"), ("PS more", "P.S more", "P.  S.", "post scriptum")),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ("P.P.S x", "p. p. s. x", "x P.P.S. y"), ("P.S. x", "PPS", "P.P S")),
    ("detectable_format:constrained_response", {}, ("My answer is yes.", "Hm. My answer is no.", "My answer is maybe. Ask again."), ("my answer is yes.", "My answer is yes", "Yes.", "My answer is  no.")),
    ("detectable_format:json_format", {}, ('{"a": [1, 2]}', '```json\n{"a": 1}\n```', "[]", "```\n3\n```", '"x"', "9" * 5000), ("{'a': 1}", '{"a": 1,}', 'Here: {"a": 1}', '{"a": 1}\nDone.', "[" * 3000 + "]" * 3000, "```yaml\n1\n```")),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, ("Day 1\nx\nDay 2\ny", "Day1 Day2 Day3", "Day 7 and Day 7"), ("Day 1", "DAY 1 DAY 2", "Day one Day two", "Day  1 Day  2")),
    ("detectable_format:multiple_sections", {"section_spliter": "C.", "num_sections": 1}, ("C. 1", "C.1", "see C.\n12"), ("CC 1", "C1", "C .1")),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, ("- a\n- b", "* a\n  * b", "x\n\n- a\ny\n* b\n", "-a\n---", "*\n- a"), ("- a", "- a\n- b\n- c", "** a\n** b", "a - b\nc - d", "1. a\n2. b", "• a\n• b")),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ("*a* and *b*", "**a** **b**", "*a*\n**b c**", "***a***"), ("*a*", "* * **", "*a\nb* *c*", "****", "_a_ _b_", "**a**")),
    ("detectable_format:title", {}, ("<<A>>\ntext", "x <<a b>> y", "<<<a>>>"), ("<A>", "<<>>", "<< >>", "<<a\nb>>", ">>a<<", "<<a>")),
    ("keywords:existence", {"keywords": ["Tree", "c++"]}, ("a tree in C++", "TREES c++", "street C++"), ("a tree", "C++", "tre e c++", "tree c+")),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", "a.b"]}, ("catalog", "concat", "axb a-b", "cat_s"), ("the cat", "CAT!", "a.b", "a cat's", "x-cat-y")),
    ("keywords:frequency", {"keyword": "ana", "frequency": 2, "relation": AT_LEAST}, ("ana ana", "Ana, BANANA", "anaana"), ("banana", "ananan", "ana", "an a")),
    ("keywords:frequency", {"keyword": "Go", "frequency": 2, "relation": LESS}, ("go", "stay", "Gone"), ("go go", "GO gone", "gogo")),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 3, "let_relation": AT_LEAST}, ("eee", "Even me", "E e E"), ("ee", "x", "é e e")),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": LESS}, ("# x", "x", "?!"), ("##", "# a\n# b", "### ")),
    ("language:response_language", {"language": "ko"}, ("안녕하세요. 반갑습니다.", "네", "AI는 편리한 도구입니다."), ("Hello there.", "こんにちは。", "Yes 네 I will do that.", "12")),
    ("language:response_language", {"language": "de"}, ("Das ist ein Hund und er ist sehr alt.", "ICH WILL NICHT MIT DEM ZUG FAHREN", "- Die Stadt ist auf dem Berg\n- und sie ist alt"),
     (EN, "Ein Hund.", "Il cane è nel giardino e dorme.", "안녕")),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "elm"}, ("One.\n\nElm trees.", "a\n\n'\"elm, b", "a\n\n\nElm"), ("Elm\n\nOak", "a\n\nelms", "a\n\nelm\n\nb", "a\nelm", "a\n\n\n\nelm", "a\n\n(elm) b")),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ("a\n***\nb", "a *** b", "***\na\n***\nb\n***"), ("a", "a\n***\nb\n***\nc", "a\n\nb", "a\n***\n***\nb", "a ** b")),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": AT_LEAST}, ("A. Bus came. It left! Why?", "One is. Two is. Three is", 'He said "no." She left. End.', "하나다. 둘이다. 셋이다.", "一つ。二つ。三つ。"), ("One. Two.", "Mr. Fox met Dr. Hen.", "It cost 3.5 or 4.5 euros. Yes.", "J. R. Ewing. Stop.", "... ... ...", "The U.S. and the E.U. met at 5 p.m. today. Done.")),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": LESS}, ("One. Two.", "1. Milk\n2. Eggs\n3. Flour", "Wait... what", "See e.g. a, b, etc. and so on. End"), ("One. Two. Three.", "Yes! No! So?", "**Bold.** Next. Last.", "So am I. You are. We are.")),
    ("length_constraints:number_words", {"num_words": 4, "relation": AT_LEAST}, ("a b c d", "it's 3.5", "one two_three four\nfive"), ("a b c", "a-b c", "?!... ,, --", "hello_my_dear_friend")),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, ("a b", "word", "가 나", "?"), ("a b c", "it's ok", "1.5 x")),
    ("punctuation:no_comma", {}, ("a b", "a; b", "a، b，c"), ("a, b", ",", "1,000")),
    ("startend:end_checker", {"end_phrase": " So what? "}, ("Yes. So what?", "so WHAT?\n", '"Well. So what?"', "So what?"), ("So what? Bye.", "So what", "So what ?", "'So what?'")),
    ("startend:quotation", {}, ('"Hello"', ' "a" ', '""', '"a" and "b"'), ('"', "Hello", "'Hello'", '“Hello”', '"Hello".')),
]


@pytest.mark.parametrize("name, kwargs, follow, break_it", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_each_instruction(name, kwargs, follow, break_it):
    strict = lambda text: ifeval.grade(text, [name], [kwargs])[0]
    assert [(text, strict(text)) for text in follow] == [(text, [True]) for text in follow]
    assert [(text, strict(text)) for text in break_it] == [(text, [False]) for text in break_it]
    for text in ("", " \n\t", "\u3000"):
        assert ifeval.grade(text, [name], [kwargs]) == ([False], [False]) and ifeval.outcome(text, [name], [kwargs]) == UNGRADABLE


def test_cases_are_three_and_three_of_all_25():
    for name in ifeval.CHECKERS:
        cases = [case for case in CASES if case[0] == name]
        assert sum(len(set(c[2])) for c in cases) >= 3 and sum(len(set(c[3])) for c in cases) >= 3, name
    assert len(ifeval.CHECKERS) == 25 and {case[0] for case in CASES} == set(ifeval.CHECKERS)


# -----------------------------------------------------------------------------
# Strict, loose, scores


@pytest.mark.parametrize("name, kwargs, text, loose", [
    ("punctuation:no_comma", {}, "Sure, here it is:\nOne and two.", True),                        # without its first line
    ("punctuation:no_comma", {}, "One and two.\nBye, friend", True),                              # last
    ("punctuation:no_comma", {}, "Sure, here:\nOne and two.\nBye, friend", True),                 # both
    ("punctuation:no_comma", {}, "Sure, here:\nOne, two.\nBye, friend", False),
    ("punctuation:no_comma", {}, "One, two.", False),                                             # without the line nothing is left
    ("startend:quotation", {}, '**"Hello"**', True),                                              # without asterisks
    ("startend:quotation", {}, 'Here:\n*"Hello"*\nBye', True),
    ("startend:quotation", {}, 'Here: "Hello"', False),
    ("detectable_format:json_format", {}, "Here you are:\n\n{}\n", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "no *stars\nhere*", False),
    ("length_constraints:number_words", {"num_words": 3, "relation": LESS}, "Sure!\nOne two\nBye now, friend", True),
    ("startend:end_checker", {"end_phrase": "bye"}, "Hello bye**", True),
])
def test_loose(name, kwargs, text, loose):
    assert ifeval.grade(text, [name], [kwargs]) == ([False], [loose])
    assert ifeval.outcome(text, [name], [kwargs]) == WRONG                                        # a reward is strict


def test_each_instruction_has_its_own_variant():
    """Loose takes the best variant for each instruction alone, as published: here the two need different ones."""
    ids, kwargs = ["punctuation:no_comma", "startend:end_checker"], [{}, {"end_phrase": "bye, you"}]
    assert ifeval.grade("One and two\nbye, you", ids, kwargs) == ([False, True], [True, True])


def test_outcome():
    ids, kwargs = ["punctuation:no_comma", "keywords:existence"], [{}, {"keywords": ["tree"]}]
    assert [ifeval.outcome(text, ids, kwargs) for text in ("a tree", "a, tree", "a bush", "", "tree " * 13107, "tree " * 13108)] == [
        RIGHT, WRONG, WRONG, UNGRADABLE, RIGHT, UNGRADABLE]
    assert ifeval.grade("tree " * 13108, ids, kwargs) == ([False, False], [False, False])


def test_scores_by_hand():
    rows = [  # strict (T, F), (T,), (F, F, T); loose (T, T), (T,), (F, T, T)
        {"instruction_id_list": ["keywords:existence", "punctuation:no_comma"], "kwargs": [{"keywords": ["a"]}, {}], "response": "Yes, sir:\na b"},
        {"instruction_id_list": ["detectable_format:title"], "kwargs": [{}], "response": "<<x>>"},
        {"instruction_id_list": ["language:response_language", "startend:quotation", "punctuation:no_comma"], "kwargs": [{"language": "de"}, {}, {}],
         "response": '*"Hallo"*'}]
    scores = ifeval.scores(rows)
    by_id = scores.pop("by_id")
    assert scores == {"prompt_strict": 1 / 3, "prompt_loose": 2 / 3, "instruction_strict": 3 / 6, "instruction_loose": 5 / 6, "num_prompts": 3,
                      "num_instructions": 6, "num_undecided": 0}
    assert by_id["punctuation:no_comma"] == (.5, 1.0, 2) and by_id["startend:quotation"] == (0.0, 1.0, 1)
    rows[2]["response"] = "Größe 7"                                                               # two words: nobody knows
    assert ifeval.scores(rows)["num_undecided"] == 1
    with pytest.raises(ValueError, match="at least one row"):
        ifeval.scores([])


@pytest.mark.parametrize("name, kwargs, message", [
    ("punctuation:no_coma", {}, "unknown instruction 'punctuation:no_coma'"), ("punctuation:no_comma", {"x": 1}, r"expected the kwargs \[\], found \['x'\]"),
    ("keywords:existence", {}, r"expected the kwargs \['keywords'\], found \[\]"), ("keywords:existence", {"keywords": []}, "to be texts"),
    ("keywords:existence", {"keywords": "tree"}, "to be texts"), ("keywords:existence", {"keywords": ["a", " "]}, "to be texts"),
    ("length_constraints:number_words", {"num_words": 5, "relation": "at most"}, "relation to be a relation, found 'at most'"),
    ("length_constraints:number_words", {"num_words": True, "relation": AT_LEAST}, "num_words to be a count, found True"),
    ("length_constraints:number_words", {"num_words": 0, "relation": AT_LEAST}, "to be a count"),
    ("length_constraints:number_words", {"num_words": None, "relation": AT_LEAST}, "to be a count"),
    ("language:response_language", {"language": "xx"}, "expected language to be one of ar, bg, "),
    ("detectable_content:postscript", {"postscript_marker": "PS"}, "one of P.S., P.P.S"), ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": LESS}, "one character"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}, "at most num_paragraphs"),
    ("startend:end_checker", {"end_phrase": ""}, "to be a text"),
])
def test_bad_references_are_refused(name, kwargs, message, caplog):
    with pytest.raises(ValueError, match=message):
        ifeval.grade("a tree", [name], [kwargs])
    assert ifeval.outcome("a tree", [name], [kwargs]) == ERROR and "ValueError" in caplog.text


def test_an_exception_is_never_a_score(monkeypatch):
    with pytest.raises(ValueError, match="each of 2 instructions, found 1"):
        ifeval.grade("a", ["punctuation:no_comma"] * 2, [{}])
    assert ifeval.outcome(None, ["punctuation:no_comma"], [{}]) == ERROR
    monkeypatch.setitem(ifeval.CHECKERS, "punctuation:no_comma", (lambda text: 1 / 0, {}))
    assert ifeval.outcome("a", ["punctuation:no_comma"], [{}]) == ERROR


# -----------------------------------------------------------------------------
# Language

TEXTS = {
    "en": "The bus was late again, so we walked to the station and had a cup of tea.",
    "de": "Der Bus war wieder zu spät, und wir sind zum Bahnhof gegangen, um einen Tee zu trinken.",
    "it": "L'autobus era di nuovo in ritardo, così siamo andati alla stazione e abbiamo preso un tè con gli amici.",
    "pt": "O ônibus estava atrasado de novo, então fomos para a estação e tomamos um chá com os amigos.",
    "es": "El autobús llegó tarde otra vez, así que fuimos a la estación y tomamos un té con los amigos.",
    "fr": "Le bus était encore en retard, alors nous sommes allés à la gare et avons bu un thé avec des amis.",
    "vi": "Xe buýt lại đến muộn, nên chúng tôi đã đi bộ đến nhà ga và uống trà với những người bạn.",
    "sw": "Basi lilichelewa tena, kwa hiyo tulitembea hadi kituo cha treni na tukanywa chai pamoja na rafiki zetu wa kazi.",
    "fi": "Bussi oli taas myöhässä, joten kävelimme asemalle ja joimme teetä, kun ei ollut muuta tekemistä.",
    "ru": "Автобус снова опоздал, и мы пошли на вокзал, где выпили чаю с друзьями.",
    "bg": "Автобусът отново закъсня и ние отидохме до гарата, за да пием чай с приятели.",
    "ar": "تأخرت الحافلة مرة أخرى، لذلك ذهبنا إلى المحطة و شربنا الشاي مع الأصدقاء في المقهى.",
    "fa": "اتوبوس دوباره دیر کرد و ما به ایستگاه رفتیم و با دوستان چای خوردیم که خیلی خوب بود.",
    "ur": "بس پھر دیر سے آئی، اس لیے ہم اسٹیشن گئے اور دوستوں کے ساتھ چائے پی۔",
    "hi": "बस फिर से देर से आई, इसलिए हम स्टेशन गए और दोस्तों के साथ चाय पी।",
    "mr": "बस पुन्हा उशिरा आली, म्हणून आम्ही स्टेशनवर गेलो आणि मित्रांबरोबर चहा घेतला, ही गोष्ट खूप छान होती.",
    "ne": "बस फेरि ढिलो आयो, त्यसैले हामी स्टेसन गयौं र साथीहरूसँग चिया खायौं, यो धेरै राम्रो थियो।",
    "ko": "버스가 또 늦어서 우리는 역까지 걸어가 친구들과 차를 마셨다.",
    "bn": "বাস আবার দেরি করল, তাই আমরা স্টেশনে গিয়ে চা খেলাম।",
    "pa": "ਬੱਸ ਫਿਰ ਦੇਰ ਨਾਲ ਆਈ, ਇਸ ਲਈ ਅਸੀਂ ਸਟੇਸ਼ਨ ਗਏ ਅਤੇ ਚਾਹ ਪੀਤੀ।",
    "gu": "બસ ફરી મોડી આવી, તેથી અમે સ્ટેશન ગયા અને ચા પીધી.",
    "ta": "பேருந்து மீண்டும் தாமதமாக வந்தது, எனவே நாங்கள் நிலையத்திற்குச் சென்று தேநீர் குடித்தோம்.",
    "te": "బస్సు మళ్ళీ ఆలస్యంగా వచ్చింది, కాబట్టి మేము స్టేషన్‌కు వెళ్లి టీ తాగాము.",
    "kn": "ಬಸ್ ಮತ್ತೆ ತಡವಾಗಿ ಬಂತು, ಆದ್ದರಿಂದ ನಾವು ನಿಲ್ದಾಣಕ್ಕೆ ಹೋಗಿ ಚಹಾ ಕುಡಿದೆವು.",
    "th": "รถเมล์มาสายอีกแล้ว เราจึงเดินไปที่สถานีและดื่มชากับเพื่อน",
}


def test_languages():
    assert set(TEXTS) == set(ifeval.LANGUAGES)
    for code, text in TEXTS.items():
        assert ifeval.language(text) == ifeval.language(text.upper()) == ifeval.language(text.lower()) == code
        assert ifeval.language(f"1. **{text}**\n\n- {text}") == code
    for undecided in ("", "12 + 3", "これは本です。", "这是一本书", "Γειά σου Κόσμε", "Größe 7", "Да", "नमस्ते दुनिया", "zxq wvb kjh plm qqq", "\ud800\udfff", "😀"):
        assert ifeval.language(undecided) is None, undecided
    for short in ("Yes.", "HELLO WORLD", "My answer is yes."):                                   # below five words, ASCII letters
        assert ifeval.language(short) == "en"
    assert ifeval.language(TEXTS["ko"] + " (bus, station)") == "ko" and ifeval.language(TEXTS["en"] + " 버스") == "en"
    assert ifeval.language(" ".join(["the"] * 3 + ["zxq"] * 17)) == "en" and ifeval.language(" ".join(["the"] * 2 + ["zxq"] * 18)) is None  # .15, .10


# -----------------------------------------------------------------------------
# Time

LARGEST = {"capital_frequency": 20, "capital_relation": AT_LEAST, "prompt_to_repeat": "a" * 500, "num_placeholders": 12, "postscript_marker": "P.P.S",
           "section_spliter": "SECTION", "num_sections": 7, "num_bullets": 10, "num_highlights": 30, "keywords": ["alpha", "beta", "gamma"],
           "forbidden_words": ["alpha", "beta", "a", "the"], "keyword": "alpha", "frequency": 10, "relation": AT_LEAST, "letter": "q", "let_frequency": 60,
           "let_relation": AT_LEAST, "language": "ko", "num_paragraphs": 7, "nth_paragraph": 7, "first_word": "elm", "num_sentences": 100, "num_words": 1200, "end_phrase": "so what?"}


@pytest.mark.parametrize("name", ifeval.CHECKERS)
def test_adversarial_corpus(name):
    kwargs = {key: LARGEST[key] for key in ifeval.CHECKERS[name][1]}
    outcomes = assert_bounded(lambda text: ifeval.grade(text, [name], [kwargs]))
    assert outcomes["empty"] == outcomes["blank"] == outcomes["too long"] == outcomes["deep JSON"] == ([False], [False])


def test_work_is_linear():
    """Twice the text must not take four times as long: steps of the patterns that a careless form of makes quadratic."""
    for name, unit in (("detectable_format:title", "<<a "), ("detectable_content:number_placeholders", "[a "), ("length_constraints:number_sentences", "...a"),
                       ("detectable_format:number_bullet_lists", " \n"), ("detectable_format:number_highlighted_sections", "*a\n"), ("detectable_content:postscript", "p."),
                       ("length_constraints:number_paragraphs", "***"), ("keywords:forbidden_words", "al"), ("detectable_format:json_format", "[")):
        kwargs = {key: LARGEST[key] for key in ifeval.CHECKERS[name][1]}
        best = {size: cost(lambda size=size: ifeval.grade((unit * size)[:size], [name], [kwargs]))[1] for size in (8192, 65536)}
        assert best[65536] < 24 * best[8192] + 0.002, (name, best)  # linear is 8, quadratic 64


# -----------------------------------------------------------------------------
# Data


@staged
def test_all_541():
    rows = ifeval.load()
    assert len(rows) == ifeval.NUM_ROWS and [sum(len(r["kwargs"]) == n for r in rows) for n in (1, 2, 3)] == [305, 179, 57]
    names = [name for row in rows for name in row["instruction_id_list"]]
    counts = {name: names.count(name) for name in ifeval.CHECKERS}
    assert list(counts.values()) == [25, 25, 39, 41, 24, 27, 26, 10, 17, 14, 31, 48, 37, 39, 49, 42, 33, 31, 12, 27, 52, 52, 66, 26, 41] and len(names) == 834
    scores = ifeval.scores([{**row, "response": row["prompt"]} for row in rows])                  # every checker runs with every kwargs
    assert scores["num_prompts"] == 541 and scores["prompt_strict"] < .3 and scores["instruction_strict"] < .4   # the question echoed
    assert scores["prompt_strict"] <= scores["prompt_loose"] and all(strict <= loose for strict, loose, _ in scores["by_id"].values())
    assert sum(ifeval.language(row["prompt"]) == "en" == ifeval.language(row["prompt"].upper()) for row in rows) == 540
    long = [row for row in rows if len(row["kwargs"]) == 3]
    rng = random.Random(0)
    mixed = " ".join(rng.choice(["the", "NASA", "U.S.", "*big*", "[name]", "go.", "why?\n", "\n- item\n", "été", "12.5"]) for _ in range(12000))
    for row in long:                                                                              # three at a time, on text with everything in it
        strict, loose = ifeval.grade(mixed, row["instruction_id_list"], row["kwargs"])
        assert all(s <= x for s, x in zip(strict, loose))


@staged
def test_problems():
    some, every = ifeval.problems(5, seed=1), ifeval.problems(seed=1)
    assert some == every[:5] and len(every) == 541 and every != ifeval.problems(seed=2)
    assert all(p.prompt[0]["role"] == "user" and ifeval.outcome("x", **p.hidden) in (RIGHT, WRONG) for p in every[:50])


def test_wrong_or_missing_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import data.gsm8k

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(data.gsm8k.urllib.request, "urlopen", offline)
    with pytest.raises(ConnectionError, match="expected ifeval/input_data.jsonl.*no network.*put the file at"):
        ifeval.load()
    (tmp_path / "ifeval").mkdir()
    row = {"key": 1, "prompt": "?", "instruction_id_list": ["x"], "kwargs": [{}]}
    (tmp_path / "ifeval/input_data.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="input_data.jsonl: expected sha256"):
        ifeval.load()
    import hashlib
    monkeypatch.setattr(ifeval, "SHA256", hashlib.sha256(json.dumps(row).encode()).hexdigest())
    with pytest.raises(ValueError, match="input_data.jsonl:1: unknown instruction 'x'"):
        ifeval.load()
