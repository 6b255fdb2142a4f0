"""Requests with constraints that a program can check, in the manner of IFEval and without its prompts, for sampling and RL.

    problem("train", seed, index) -> Problem    "Describe a rainy day in a small town. Do not use commas. Mention: winter, bridge."
    grade(problem, response) -> Outcome         RIGHT if every constraint is kept, strictly (ifeval.outcome)

One to three constraints of IFEval's, worded by us, on a request in English or Korean. A problem is a pure function of (split, seed,
index). Held out for the test split, under any seed: one request in five, and one pair of constraints in six. Every test problem has such
a pair and no training problem has one. What is named in ONLY_WITH and CLASHES never meets, so that each problem has an answer and reads
as if it had one. Of the 25 constraints 24 are used, all but constrained_response, which needs questions to say yes to.

There are no gold responses: that the constraints are kept can be checked, that the request is answered cannot. A text that keeps them and
says nothing is right here, so mix this reward with others.
"""
import random
import re
import zlib
from collections.abc import Callable
from itertools import combinations

from data import ifeval
from data.grading import Outcome, Problem, never_raises

# -----------------------------------------------------------------------------
# Constraints: how the numbers and words are drawn, and how they are asked for

_WORDS = {  # disjoint, none part of another, and the English ones without j q x z, which may be asked to be rare
    "en": {"keyword": "morning river budget window garden ticket teacher bridge market winter letter camera".split(),
           "repeated": "time people work home water light".split(),
           "forbidden": "very really important however good great many always never simply".split(),
           "first": "today first usually imagine because sometimes".split(),
           "splitter": ("Section", "Part", "Step", "Chapter"),
           "end": ("That is all for now.", "Thank you for reading.", "I hope this helps.", "Let me know what you think.", "See you soon.")},
    "ko": {"keyword": "아침 호수 예산 창문 정원 기차표 선생님 다리 시장 겨울 편지 사진기".split(),
           "repeated": "시간 사람 일상 음악 여행 약속".split(),
           "forbidden": "매우 정말 중요한 하지만 좋은 항상 절대 그냥 많이 아주".split(),
           "splitter": ("항목", "단계", "부분"),
           "end": ("이상입니다.", "읽어 주셔서 감사합니다.", "도움이 되길 바랍니다.", "의견을 들려주세요.")},
}
_SPOKEN = {"ko": "Korean", "de": "German", "it": "Italian", "pt": "Portuguese", "ru": "Russian", "vi": "Vietnamese"}
_RELATIONS = ("at least", "less than")


class _Draw:
    """Choices of one problem. Only random() of the standard library's generator is promised to stay as it is."""

    def __init__(self, key, lang):
        self.random, self.words = random.Random(key).random, _WORDS[lang]

    def pick(self, values):
        return values[int(self.random() * len(values))]

    def number(self, low, high):
        return low + int(self.random() * (high - low + 1))

    def some(self, kind, most):
        values = self.words[kind]
        start, num = self.number(0, len(values) - 1), self.number(1, most)
        return [values[(start + 5 * i) % len(values)] for i in range(num)]

    def relation(self, key, least, most, relation="relation"):
        """A number in the range `least` for "at least", or in the range `most` for "less than"."""
        chosen = self.pick(_RELATIONS)
        return {relation: chosen, key: self.number(*(least if chosen == "at least" else most))}


def _letter(draw):
    rare = draw.pick((True, False))
    return {"letter": draw.pick("jqxz" if rare else "aeinorst"), "let_relation": _RELATIONS[rare],
            "let_frequency": draw.number(1, 3) if rare else draw.number(5, 20)}


def _first_word(draw):
    num = draw.number(2, 4)
    return {"num_paragraphs": num, "nth_paragraph": draw.number(1, num), "first_word": draw.pick(draw.words["first"])}


# name, the last part of IFEval's id: what draws its kwargs from (draw, request). One that has no wording in a language is not used in it.
_KWARGS: dict[str, Callable] = {
    "capital_word_frequency": lambda d, _: d.relation("capital_frequency", (2, 6), (4, 9), "capital_relation"),
    "english_capital": lambda d, _: {}, "english_lowercase": lambda d, _: {}, "two_responses": lambda d, _: {}, "title": lambda d, _: {},
    "json_format": lambda d, _: {}, "no_comma": lambda d, _: {}, "quotation": lambda d, _: {},
    "repeat_prompt": lambda d, request: {"prompt_to_repeat": request},
    "number_placeholders": lambda d, _: {"num_placeholders": d.number(2, 5)},
    "postscript": lambda d, _: {"postscript_marker": d.pick(("P.S.", "P.P.S"))},
    "multiple_sections": lambda d, _: {"section_spliter": d.pick(d.words["splitter"]), "num_sections": d.number(2, 5)},
    "number_bullet_lists": lambda d, _: {"num_bullets": d.number(2, 6)},
    "number_highlighted_sections": lambda d, _: {"num_highlights": d.number(1, 4)},
    "existence": lambda d, _: {"keywords": d.some("keyword", 3)},
    "forbidden_words": lambda d, _: {"forbidden_words": d.some("forbidden", 3)},
    "frequency": lambda d, _: {"keyword": d.pick(d.words["repeated"]), **d.relation("frequency", (2, 4), (2, 4))},
    "letter_frequency": lambda d, _: _letter(d),
    "response_language": lambda d, _: {"language": d.pick(list(_SPOKEN))},
    "nth_paragraph_first_word": lambda d, _: _first_word(d),
    "number_paragraphs": lambda d, _: {"num_paragraphs": d.number(2, 5)},
    "number_sentences": lambda d, _: d.relation("num_sentences", (3, 8), (8, 15)),
    "number_words": lambda d, _: d.relation("num_words", (40, 120), (100, 200)),
    "end_checker": lambda d, _: {"end_phrase": d.pick(d.words["end"])},
}
_WORDING = {"en": """
capital_word_frequency: Write {capital_relation} {capital_frequency} words in all capitals. |
    The number of fully capitalised words must be {capital_relation} {capital_frequency}. |
    Emphasise by capitals: {capital_relation} {capital_frequency} words.
english_capital: Use English and capital letters only. | WRITE IT ALL IN UPPER CASE, in English. |
    No lower-case letter may appear; write English.
english_lowercase: Use English and small letters only. | write in English without a single capital letter. |
    Keep all of it in lower case, in English.
repeat_prompt: Open with an exact copy of this sentence, then answer it: {prompt_to_repeat} |
    Before the answer, copy this line word by word: {prompt_to_repeat} |
    The reply has to start with the unchanged request, that is: {prompt_to_repeat}
two_responses: Give two different answers with a line of six asterisks, ******, between them. |
    I want two versions. Separate them by ****** and nothing else. | Answer twice, differently, and put ****** between the two.
number_placeholders: Leave at least {num_placeholders} placeholders in square brackets, like [date]. |
    Put {num_placeholders} or more slots such as [place] into it. |
    It is a template: at least {num_placeholders} blanks in brackets, as in [name].
postscript: Add a postscript that begins with {postscript_marker} | After the text comes a note marked {postscript_marker} |
    Do not forget a last remark, introduced by {postscript_marker}
json_format: Reply with one JSON value and nothing around it. | The whole output has to parse as JSON; a code fence is fine. |
    Format everything as a single JSON object.
multiple_sections: Divide it into at least {num_sections} numbered parts, headed {section_spliter} 1, {section_spliter} 2 and so on. |
    Use headings of the form {section_spliter} 1 for {num_sections} or more sections. |
    Structure: {num_sections} sections or more, each starting with {section_spliter} and its number.
number_bullet_lists: Include exactly {num_bullets} bullet points that start with a dash or an asterisk. |
    There should be {num_bullets} markdown bullets, not more and not fewer. |
    Make a list of {num_bullets} items, each on a line that begins with a dash.
number_highlighted_sections: Highlight at least {num_highlights} phrases in *italics* or **bold**. |
    Mark {num_highlights} or more places with asterisks, as in *this one*. |
    Markdown emphasis (*like so*) should appear {num_highlights} times or more.
title: Give it a title in double angle brackets, as in <<A Title>>. | Put a heading between << and >>. |
    It needs a <<title>> in exactly that form.
existence: Mention: {keywords}. | These words have to occur: {keywords}. | Work in the following: {keywords}.
forbidden_words: Avoid these words: {forbidden_words}. | Not allowed anywhere: {forbidden_words}. |
    Do without the following: {forbidden_words}.
frequency: The word "{keyword}" should occur {relation} {frequency} times. | Use "{keyword}" {relation} {frequency} times. |
    Say "{keyword}" {relation} {frequency} times.
letter_frequency: The letter {letter} should occur {let_relation} {let_frequency} times. |
    Count your {letter}s: {let_relation} {let_frequency} of that letter. | Write the letter {letter} {let_relation} {let_frequency} times.
response_language: Answer in {language} only. | The whole reply must be in {language}. | Write in {language}, without any other language.
nth_paragraph_first_word:
    Write {num_paragraphs} paragraphs with blank lines between them; paragraph {nth_paragraph} begins with "{first_word}". |
    Exactly {num_paragraphs} paragraphs, set apart by an empty line. The first word of number {nth_paragraph} is {first_word}. |
    Make it {num_paragraphs} paragraphs (empty line between two), number {nth_paragraph} of which opens with the word {first_word}.
number_paragraphs: Write {num_paragraphs} paragraphs and separate them by lines of three asterisks: *** |
    Exactly {num_paragraphs} paragraphs with *** between them. | Make {num_paragraphs} paragraphs of it. The divider is ***
number_sentences: Use {relation} {num_sentences} sentences. | The number of sentences has to be {relation} {num_sentences}. |
    Length: {relation} {num_sentences} sentences.
number_words: Use {relation} {num_words} words. | Length: {relation} {num_words} words. |
    The reply should have {relation} {num_words} words.
no_comma: Do not use commas. | Write it without any comma. | The comma key is broken, so do without.
end_checker: Close with exactly these words: {end_phrase} | The very last sentence is: {end_phrase} |
    Nothing may follow this ending: {end_phrase}
quotation: Put double quotation marks around the whole reply. | Start and end the reply with a double quote. |
    Everything you say goes between two " signs.
""", "ko": """
repeat_prompt: 먼저 다음 문장을 그대로 옮긴 뒤 답해 줘: {prompt_to_repeat} | 답변의 첫머리에 이 요청을 바꾸지 말고 적어: {prompt_to_repeat}
two_responses: 서로 다른 답 두 개를 ****** 로 나누어 써 줘. | 두 가지 답을 주고 그 사이에는 별표 여섯 개(******)만 넣어.
number_placeholders: [이름]처럼 대괄호로 된 빈칸을 {num_placeholders}개 이상 넣어. |
    [날짜] 같은 자리표시자가 적어도 {num_placeholders}개 있어야 해.
postscript: 마지막에 {postscript_marker} 로 시작하는 추신을 붙여. | 추신을 {postscript_marker} 표시와 함께 덧붙여 줘.
json_format: 답 전체를 JSON 하나로 출력해. | JSON 형식으로만 답하고 다른 글은 쓰지 마.
multiple_sections: {section_spliter} 1, {section_spliter} 2처럼 번호를 붙여 {num_sections}개 이상으로 나누어 써. |
    각 부분은 "{section_spliter} 번호"로 시작하고 모두 {num_sections}개 이상이어야 해.
number_bullet_lists: "- "로 시작하는 항목을 정확히 {num_bullets}개 넣어. | 글머리표 항목은 꼭 {num_bullets}개여야 해.
number_highlighted_sections: *이렇게* 별표로 강조한 곳을 {num_highlights}군데 이상 만들어. |
    마크다운 강조(*강조*)를 적어도 {num_highlights}번 써.
title: <<제목>> 형태의 제목을 달아. | 이중 꺾쇠 << >> 안에 제목을 써 줘.
existence: 다음 낱말을 꼭 넣어: {keywords}. | 이 말들이 들어가야 해: {keywords}.
forbidden_words: 다음 낱말은 쓰지 마: {forbidden_words}. | 이 말들은 금지야: {forbidden_words}.
frequency: "{keyword}"(이)라는 말을 {frequency}번 {relation} 써. | 낱말 "{keyword}"의 횟수는 {frequency}번 {relation}이어야 해.
response_language: 답은 {language}로만 써. | 다른 언어 없이 {language}로 답해.
number_paragraphs: *** 로 나눈 문단 {num_paragraphs}개로 써. | 문단은 정확히 {num_paragraphs}개, 사이에는 *** 를 넣어.
number_sentences: {num_sentences}문장 {relation}으로 써. | 문장 수는 {num_sentences}개 {relation}이어야 해.
number_words: 띄어쓰기 기준 {num_words}단어 {relation}으로 써. | 길이는 {num_words}단어 {relation}.
no_comma: 쉼표는 쓰지 마. | 쉼표 없이 써 줘.
end_checker: 마지막은 꼭 이 말로 끝내: {end_phrase} | 맨 끝 문장은 다음과 같아야 해: {end_phrase}
quotation: 답 전체를 큰따옴표로 감싸. | 큰따옴표(")로 시작하고 큰따옴표로 끝내.
"""}
_WORDING = {lang: {name: " ".join(rest.split()).split(" | ") for name, rest in re.findall(r"^(\w+):(.*(?:\n .*)*)", text, re.M)}
            for lang, text in _WORDING.items()}
_SPOKEN_KO = dict(zip(_SPOKEN, "한국어 독일어 이탈리아어 포르투갈어 러시아어 베트남어".split()))
_SHOWN = {"en": _SPOKEN, "ko": {"at least": "이상", "less than": "미만", **_SPOKEN_KO}}

# these go with few others
ONLY_WITH = {
    "json_format": "existence forbidden_words",
    "repeat_prompt": "number_placeholders postscript end_checker number_highlighted_sections multiple_sections",
    "two_responses": "existence forbidden_words no_comma english_capital english_lowercase number_placeholders",
    "response_language": "no_comma title number_bullet_lists number_highlighted_sections number_paragraphs quotation",
    "nth_paragraph_first_word": "existence forbidden_words frequency no_comma number_placeholders number_highlighted_sections number_words "
                                "number_sentences",
}
# and these do not go with a few: contradictions, and counts that would depend on how one reads the request
CLASHES = {
    "english_capital": "english_lowercase capital_word_frequency postscript multiple_sections end_checker",
    "english_lowercase": "capital_word_frequency postscript multiple_sections end_checker",
    "capital_word_frequency": "multiple_sections postscript", "postscript": "end_checker",
    "number_bullet_lists": "multiple_sections number_sentences number_paragraphs",
    "multiple_sections": "number_paragraphs number_sentences",
    "number_paragraphs": "number_highlighted_sections",
}


def compatible(a: str, b: str) -> bool:
    """May constraints a and b (last parts of two ids) stand in one problem?"""
    if a in ONLY_WITH or b in ONLY_WITH:
        return b in ONLY_WITH.get(a, "").split() or a in ONLY_WITH.get(b, "").split()
    return a != b and b not in CLASHES.get(a, "").split() and a not in CLASHES.get(b, "").split()


def _sets(lang):
    """{split: {number of constraints: [sets that are possible]}}"""
    found = {"train": {1: [(name,) for name in _WORDING[lang]], 2: [], 3: []}, "test": {2: [], 3: []}}
    held_out = {pair for pair in combinations(sorted(_WORDING[lang]), 2) if zlib.crc32("/".join(pair).encode()) % 6 == 0}
    for num in (2, 3):
        for names in combinations(sorted(_WORDING[lang]), num):
            pairs = list(combinations(names, 2))
            if all(compatible(*pair) for pair in pairs):
                found["test" if held_out & set(pairs) else "train"][num].append(names)
    return found


_SETS = {lang: _sets(lang) for lang in _WORDING}
_IDS = {name.partition(":")[2]: name for name in ifeval.CHECKERS}

# -----------------------------------------------------------------------------
# Requests. Of five the last is held out.

_REQUESTS = {"en": """
Describe a rainy day in a small town. | Explain how a bicycle stays upright. | Write a note to a new neighbour.
Invent a dish made of leftovers. | Tell a short tale about a lost key. | Compare trains and buses for a daily commute.
Give advice to someone who starts to run. | Write a product text for a wooden chair. | Explain photosynthesis to a child.
Plan a weekend by the sea. | Describe your ideal library. | Write a speech for a retiring gardener. | Explain why the sky is blue.
Suggest names for a small bakery. | Write a message that cancels a dinner. | Explain what a budget is for.
Describe a painting that does not exist. | Write a diary entry of a lighthouse keeper. | Give tips for moving to another city.
Explain the rules of a card game you made up. | Write about a dog that is afraid of snow. | Describe how bread is baked.
Write an email that asks for a day off. | Explain how vaccines work. | Tell what a museum guard sees at night.
Recommend a hobby for long evenings. | Write a review of an imaginary hotel. | Explain how to repair a flat tyre.
Describe the sounds of a harbour. | Write a letter to your future self. | Explain what makes a fair vote.
Write an advert for a second-hand piano. | Describe a school of the year 2100. | Give a recipe for vegetable soup.
Write a poem about an empty station. | Explain the difference between weather and climate.
Write a short biography of an invented explorer. | Describe a market early in the day. | Give reasons to learn a second language.
Write an apology for a late parcel. | Explain how a lock works. | Describe a walk through a forest after a storm.
Write a toast for a friend who moves abroad. | Suggest ways to save water at home. | Explain why people tell stories.
Write a job posting for a beekeeper. | Describe a kitchen from the point of view of a spoon. | Explain how to prepare for an exam.
Write the opening of a detective story. | Give feedback on a talk that was too long. | Explain what an operating system does.
Describe a city without cars. | Write a thank-you card to a nurse. | Suggest questions for an interview with a baker.
Explain how tides come about. | Write about the last tram of the night. | Describe a holiday that almost went wrong.
Explain how compost is made. | Write house rules for a shared flat. | Tell the story of a very old tree.
""", "ko": """
비 오는 날의 작은 마을을 묘사해 줘. | 자전거가 넘어지지 않는 까닭을 설명해 줘. | 새로 온 이웃에게 쪽지를 써 줘.
남은 음식으로 만드는 요리를 하나 생각해 줘. | 잃어버린 열쇠에 관한 짧은 이야기를 써 줘.
출퇴근에는 버스와 지하철 가운데 무엇이 나은지 알려 줘. | 달리기를 시작하는 사람에게 조언해 줘. | 나무 의자의 소개 글을 써 줘.
광합성을 아이에게 설명해 줘. | 바닷가에서 보낼 주말 계획을 세워 줘. | 네가 바라는 도서관을 그려 줘. | 하늘이 파란 이유를 알려 줘.
작은 빵집의 이름을 지어 줘. | 저녁 약속을 미루는 문자를 써 줘. | 가계부를 쓰는 까닭을 설명해 줘. | 등대지기의 일기를 써 줘.
이사를 앞둔 사람에게 요령을 알려 줘. | 눈을 무서워하는 강아지 이야기를 써 줘. | 빵을 굽는 과정을 설명해 줘. | 휴가를 신청하는 메일을 써 줘.
백신이 어떻게 작용하는지 알려 줘. | 긴 밤에 어울리는 취미를 추천해 줘. | 상상 속 호텔의 후기를 써 줘. | 항구에서 들리는 소리를 묘사해 줘.
미래의 나에게 보내는 글을 써 줘. | 된장국 끓이는 법을 알려 줘. | 날씨와 기후의 차이를 설명해 줘. | 외국어를 배울 까닭을 말해 줘.
늦은 배송을 사과하는 글을 써 줘. | 아주 오래된 나무의 이야기를 들려줘.
"""}
_REQUESTS = {lang: re.split(r" \| |\n", text.strip()) for lang, text in _REQUESTS.items()}
_REQUESTS = {lang: {"train": [r for i, r in enumerate(requests) if i % 5 != 4], "test": requests[4::5]}
             for lang, requests in _REQUESTS.items()}


# -----------------------------------------------------------------------------
# Problems


def problem(split: str, seed: int, index: int) -> Problem:
    """Problem `index` of the endless stream (split "train" or "test", seed): two in three English, the rest Korean.
    hidden: {"instruction_id_list", "kwargs", "lang"}."""
    if split not in ("train", "test"):
        raise ValueError(f"instructions: expected split train or test, found {split!r}")
    lang = "ko" if index % 3 == 2 else "en"
    draw = _Draw(f"instructions/{split}/{seed}/{index}", lang)
    request = draw.pick(_REQUESTS[lang][split])
    sets = _SETS[lang][split]
    names = sorted(draw.pick(sets[draw.pick(sorted(sets))]), key=lambda _: draw.random())
    kwargs = [_KWARGS[name](draw, request) for name in names]
    asked = [draw.pick(_WORDING[lang][name]).format(**{key: _show(value, lang) for key, value in given.items()})
             for name, given in zip(names, kwargs)]
    layout = draw.number(0, 2)
    if layout == 2:
        asked = [f"{i}. {text}" for i, text in enumerate(asked, 1)]
        asked.insert(0, "조건:" if lang == "ko" else "Rules:")
    text = request + (" " if layout == 0 else "\n\n") + (" " if layout == 0 else "\n").join(asked)
    return Problem("instructions", [{"role": "user", "content": text}], [], "",
                   {"instruction_id_list": [_IDS[name] for name in names], "kwargs": kwargs, "lang": lang})


def _show(value, lang):
    if isinstance(value, list):
        return ", ".join(value)
    return _SHOWN[lang].get(value, value)


def problems(split: str = "train", num: int = 300, seed: int = 0) -> list[Problem]:
    """Up to `num` problems with different prompts, in order of index: fixed for a given seed, and a prefix of what a larger `num` gives."""
    found = {}
    for index in range(20 * num):
        if len(found) == num:
            break
        new = problem(split, seed, index)
        found.setdefault(new.prompt[0]["content"], new)
    return list(found.values())


@never_raises
def grade(problem: Problem, response: str) -> Outcome:
    """RIGHT if every constraint is kept, strictly; UNGRADABLE if the response is blank or too long. Takes IFEval's problems too."""
    return ifeval.outcome(response, problem.hidden["instruction_id_list"], problem.hidden["kwargs"])
