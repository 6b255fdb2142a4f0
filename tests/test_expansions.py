"""Generators: templates, a real HTTP server on the loopback that misbehaves, a model whose replies mean nothing. All that is not as asked is counted."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import checkpoint
from data import expansions, slate
from data.expansions import COUNTS, FAULTS, cells_of, completed, open_generator, read_reply
from data.slate import CATEGORIES
from model import Transformer, config_for_size
from tokenizer import Tokenizer

BASE = "painting of a fox, noir, mist"


def reply_of(num=5, mark="", **changes):
    """A good reply, or one with some categories changed; None takes the category away."""
    found = {name: [f"{name} number {i} {mark}".strip() for i in range(num)] for name in CATEGORIES} | changes
    return json.dumps({k: v for k, v in found.items() if v is not None}, ensure_ascii=False)


def five(first, *rest):
    return [first, *rest, *(f"other {i}" for i in range(4 - len(rest)))]


# -----------------------------------------------------------------------------
# Templates


@pytest.mark.parametrize("text", [BASE, "image of an owl", "view of a castle, cubist, gears, lace, rain, burning", "a cat on a bicycle", "", "watercolor"])
def test_templates_make_five_of_each(text):
    propose = open_generator("template")
    found = propose(text, 0, 7, 2)
    assert [c for c, _ in found] == [c for c in CATEGORIES for _ in range(5)] and len({t for _, t in found}) == 25
    assert found == slate.expansions(text, 0, 7, 2) and propose.name == "template" and not any(propose.counts.values())
    base = slate.parse(text)
    for category, new in found:
        p = slate.parse(new)
        assert str(p) == new and p.subject and len(p.details) <= 3 and text != new
        if base.subject:
            changed = {name for name in p._fields if getattr(p, name) != getattr(base, name)}
            assert changed <= dict(rephrase={"opening"}, detail={"details"}, style={"style"}, subject={"subject", "details", "twist"}, creative={"twist", "details"})[category]
            assert {"detail": "details", "creative": "twist", "rephrase": "opening"}.get(category, category) in changed


def test_templates_are_a_function_of_seed_person_and_turn():
    propose = open_generator("template")
    first = propose(BASE, 0, 7, 2)
    assert propose(BASE, 0, 7, 2) == first and propose.batch(["image of an owl"] * 7 + [BASE], 0, 2)[7] == first
    assert all(propose(BASE, *key) != first for key in ((1, 7, 2), (0, 8, 2), (0, 7, 3)))
    assert len(open_generator("template", num=3)(BASE, 0, 0, 0)) == 15 and open_generator("template", num=3).name == "template x 3"
    with pytest.raises(ValueError, match="templates make 1 to 5 expansions of a category, not 6"):
        slate.expansions(BASE, 0, 0, 0, num=6)


# -----------------------------------------------------------------------------
# Replies


@pytest.mark.parametrize("reply, kind", [
    (reply_of(), None), ("```json\n" + reply_of() + "\n```", None), (" " + reply_of(mark="füchse, 狐") + "\n", None), (reply_of(style=five("w " * 23 + "w")), None),
    ("", "not_json"), ("Here you are: " + reply_of(), "not_json"), (reply_of() + reply_of(), "not_json"), (reply_of()[:-1], "not_json"), ("[" * 50_000, "not_json"),
    (reply_of()[:-1] + ', "style": []}', "not_json"), ('{"rephrase": NaN}', "not_json"), ("```\n" + reply_of() + "\n```\nDone.", "not_json"),
    ("[]", "wrong_shape"), ("3", "wrong_shape"), ("{}", "wrong_shape"), (reply_of(num=4), "wrong_shape"), (reply_of(num=6), "wrong_shape"),
    (reply_of(style=None), "wrong_shape"), (reply_of(mood=["x"] * 5), "wrong_shape"), (reply_of(style="a b c d e"), "wrong_shape"), (reply_of(style=[]), "wrong_shape"),
    (reply_of(detail=five("")), "wrong_text"), (reply_of(detail=five(" a")), "wrong_text"), (reply_of(detail=five("a\nturn 4: b")), "wrong_text"),
    (reply_of(detail=five(3)), "wrong_text"), (reply_of(detail=five(None)), "wrong_text"), (reply_of(detail=five(["a"])), "wrong_text"),
    (reply_of(detail=five("w " * 24 + "w")), "wrong_text"), (reply_of(detail=five("w," * 25)), "wrong_text"), (reply_of(detail=five(",")), "wrong_text"),
    (reply_of(detail=five("a\u2028b")), "wrong_text"), (reply_of().replace("rephrase number 0", "\\ud800"), "wrong_text"),
    (reply_of(detail=five("a", "a")), "doubled"), (reply_of(detail=five("A fox", "a  fox")), "doubled"), (reply_of(detail=five("style number 2")), "doubled"),
])
def test_a_reply_keeps_to_all_rules_or_is_none(reply, kind):
    if kind is None:
        found = read_reply(reply, 5)
        assert list(found) == list(CATEGORIES) and len({t for texts in found.values() for t in texts}) == 25
    else:
        with pytest.raises(expansions.Unreadable) as error:
            read_reply(reply, 5)
        assert error.value.kind == kind and len(str(error.value)) < 300
        assert set(FAULTS) <= set(COUNTS)


def test_what_a_broken_reply_did_fill():
    filled = lambda reply: {k: len(v) for k, v in cells_of(reply, 5).items() if len(v) < 5}
    assert filled(reply_of(num=7)) == {} and filled("no") == filled("[]") == dict.fromkeys(CATEGORIES, 0)
    assert filled(reply_of(style=["a", "A", "", "b\nc", 3, "rephrase number 1"], detail="x", mood=["y"])) == dict(style=1, detail=0)


def test_missing_cells_come_from_templates():
    templates = slate.expansions(BASE, 0, 0, 0)
    of = {c: [t for k, t in templates if k == c] for c in CATEGORIES}
    cells = cells_of(reply_of(style=["a", of["style"][1].upper()], subject=None), 5)
    filled, num = completed(cells, templates, 5)
    assert num == 8 and filled["rephrase"] == cells["rephrase"] and filled["subject"] == of["subject"]
    assert filled["style"] == ["a", of["style"][1].upper(), of["style"][0], of["style"][2], of["style"][3]]         # not the one that stands there
    # a reply that took the templates' texts for another category leaves too few: then none of it is used
    filled, num = completed(cells_of(reply_of(detail=of["style"], style=None), 5), templates, 5)
    assert num == 25 and filled == of


# -----------------------------------------------------------------------------
# Over HTTP


class Server(ThreadingHTTPServer):
    """reply(request as parsed JSON) -> the content of a completion, or bytes for a whole raw answer, or an int for a status, or None to hang up."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.headers, self.release, self.lock = [], [], threading.Event(), threading.Lock()
        self.running, self.most = 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):                 # the client went away: what the tests provoke
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.lock:
            server.requests.append(request), server.headers.append(dict(self.headers))
            server.running += 1
            server.most = max(server.most, server.running)
        reply = server.reply(request)
        with server.lock:
            server.running -= 1
        if reply is None:
            self.close_connection = True
            return
        body = b"" if isinstance(reply, int) else reply if isinstance(reply, bytes) else json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(reply if isinstance(reply, int) else 200)
        if reply == 302:
            self.send_header("Location", f"{server.url}/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("GENERATOR_API_KEY", "JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def counts(propose, **expected):
    """All counts are 0 but these."""
    assert propose.counts == dict.fromkeys(COUNTS, 0) | expected


def text_of(request):
    return json.loads(request["messages"][1]["content"].removeprefix("The prompt: "))


def test_good_replies_over_http(server, monkeypatch):
    """Each base prompt gets its own reply, whoever is answered first; a second call asks nothing; seeds differ by row, turn and run."""
    def reply(request):
        time.sleep(.02 * (5 - int(text_of(request)[-1])))
        return reply_of(mark=text_of(request))
    server.reply = reply
    monkeypatch.setenv("GENERATOR_API_KEY", "s3cret")
    monkeypatch.setenv("JUDGE_API_KEY", "another")
    propose = open_generator(f"url:{server.url}", model="m", concurrency=3, temperature=.5)
    texts = [f'a "fox" {i}' for i in range(5)]
    found = propose.batch(texts, 3, 0)
    assert [row[5] for row in found] == [("detail", f"detail number 0 {t}") for t in texts] and 1 < server.most <= 3
    assert [c for c, _ in found[0]] == [c for c in CATEGORIES for _ in range(5)]
    counts(propose, replies=5, cells=125)
    assert propose.batch(texts, 3, 0) == found and propose(texts[2], 3, 2, 0) == found[2] and len(server.requests) == 5
    propose(texts[2], 3, 2, 1), propose(texts[2], 4, 2, 0), propose(texts[2], 3, 7, 0)
    assert len({r["seed"] for r in server.requests}) == len(server.requests) == 8 and all(0 <= r["seed"] < 2 ** 31 for r in server.requests)
    assert {(r["model"], r["temperature"]) for r in server.requests} == {("m", .5)} and "exactly 5 prompts" in server.requests[0]["messages"][0]["content"]
    assert {h["Authorization"] for h in server.headers} == {"Bearer s3cret"}
    assert propose.name == f"url:{server.url}/v1/chat/completions m at temperature 0.5"
    again = open_generator(f"url:{server.url}/v1/", model="m", temperature=.5)
    again(texts[2], 3, 2, 0)
    first = next(r for r in server.requests if text_of(r) == texts[2])
    assert again.name == propose.name and server.requests[-1]["seed"] == first["seed"]
    found[0].clear()                                                        # what was given away is not what is kept
    assert len(propose(texts[0], 3, 0, 0)) == 25


@pytest.mark.parametrize("bad, kind, cells", [
    ("Sure! Here are 25 ideas.", "not_json", 25), (reply_of(num=4), "wrong_shape", 5), (reply_of(style=None), "wrong_shape", 5),
    (reply_of(style=["a"] * 5), "doubled", 4), (reply_of(style=five("two\nlines")), "wrong_text", 1), (b"<html>busy</html>", "not_json", 25), (b"", "not_json", 25),
    (b'{"choices": [{"message": {"content": null}}]}', "not_json", 25),
])
def test_bad_replies_are_asked_again_and_counted(server, bad, kind, cells):
    """Twice bad, then good: 3 requests, nothing from templates. Never good: tries + 1 requests, and what is missing from the templates."""
    replies = [bad, bad, reply_of()]
    server.reply = lambda request: replies.pop(0)
    propose = open_generator(f"url:{server.url}", tries=2)
    assert dict(propose(BASE, 0, 0, 0))["style"] == "style number 4"
    counts(propose, replies=3, asked_again=2, unparseable=2, cells=25, **{kind: 2})
    assert len({r["seed"] for r in server.requests}) == 3
    server.reply, server.requests = (lambda request: bad), []
    propose = open_generator(f"url:{server.url}", tries=1)
    found, templates = propose(BASE, 0, 0, 0), slate.expansions(BASE, 0, 0, 0)
    counts(propose, replies=2, asked_again=1, unparseable=2, cells=25, cells_from_templates=cells, **{kind: 2})
    assert len(set(found) & set(templates)) == cells and len({t for _, t in found}) == 25 and [c for c, _ in found] == [c for c, _ in templates]
    assert propose(BASE, 0, 0, 0) == found and len(server.requests) == 2


def test_the_best_of_the_bad_replies_is_used(server):
    replies = ["no", reply_of(num=4, mark="kept"), reply_of(num=3), "no"]
    server.reply = lambda request: replies.pop(0)
    propose = open_generator(f"url:{server.url}", tries=3)
    assert [t for _, t in propose(BASE, 0, 0, 0)][:4] == [f"rephrase number {i} kept" for i in range(4)]
    counts(propose, replies=4, asked_again=3, unparseable=4, not_json=2, wrong_shape=2, cells=25, cells_from_templates=5)


def test_only_those_with_bad_replies_are_asked_again(server):
    server.reply = lambda request: reply_of() if text_of(request) == "good" else "bad"
    propose = open_generator(f"url:{server.url}", tries=2)
    propose.batch(["good", "bad", "good", "good"], 0, 0)
    assert sorted(map(text_of, server.requests)) == ["bad"] * 3 + ["good"] * 3
    counts(propose, replies=6, asked_again=2, unparseable=3, not_json=3, cells=100, cells_from_templates=25)


@pytest.mark.parametrize("bad, requests", [(500, 3), (429, 3), (None, 3), (404, 1), (302, 1)])
def test_failures_are_errors_not_replies(server, bad, requests):
    """The server class repeats what may pass; a redirect is not followed. A stand-in is not kept: when the server is back, it is asked."""
    server.reply = lambda request: bad
    propose = open_generator(f"url:{server.url}", tries=4, retries=2, backoff=.01)
    assert propose(BASE, 0, 0, 0) == slate.expansions(BASE, 0, 0, 0) and len(server.requests) == requests
    counts(propose, errors=1, cells=25, cells_from_templates=25)
    server.reply = lambda request: reply_of()
    assert propose(BASE, 0, 0, 0)[0] == ("rephrase", "rephrase number 0")
    counts(propose, errors=1, replies=1, cells=50, cells_from_templates=25)


def test_time_is_bounded(server):
    server.reply = lambda request: server.release.wait(20) and None
    propose = open_generator(f"url:{server.url}", tries=2, retries=1, timeout=.2, backoff=.01)
    begin = time.monotonic()
    found = propose.batch([BASE, "image of an owl"], 0, 0)
    assert time.monotonic() - begin < 5 and found == open_generator("template").batch([BASE, "image of an owl"], 0, 0)
    counts(propose, errors=2, cells=50, cells_from_templates=50)


def test_a_server_that_is_down_is_not_asked_for_each_session(server):
    server.reply = lambda request: 500
    propose = open_generator(f"url:{server.url}", retries=0, concurrency=1, backoff=.01)
    propose.batch([f"fox {i}" for i in range(50)], 0, 0)
    assert len(server.requests) == 8
    counts(propose, errors=50, cells=1250, cells_from_templates=1250)


# -----------------------------------------------------------------------------
# Through the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "nano"
    tokenizer = Tokenizer.bytes()
    checkpoint.save_hf(Transformer(config_for_size("nano", tokenizer.vocab_size)).init_weights(0), tokenizer, path)
    return path


def test_a_model_that_means_nothing(folder, monkeypatch):
    """All cells are templates', and the counts say so. One call of the engine for each try, for the whole crowd."""
    propose = open_generator(f"checkpoint:{folder}", tries=2, max_new_tokens=12)
    calls, generate = [], propose.ask.generate
    propose.ask.generate = lambda model, tokenizer, prompts, **options: calls.append((len(prompts), options)) or generate(model, tokenizer, prompts, **options)
    texts = [BASE, "image of an owl", BASE]
    found = propose.batch(texts, 0, 1)
    assert found == open_generator("template").batch(texts, 0, 1)
    counts(propose, replies=9, asked_again=6, unparseable=9, not_json=9, cells=75, cells_from_templates=75)
    assert [n for n, _ in calls] == [3, 3, 3] and all(o["temperature"] == 1 and o["max_new_tokens"] == 12 for _, o in calls)
    seeds = [s for _, o in calls for s in o["seed"]]
    assert len(set(seeds)) == 9
    propose(BASE, 0, 2, 2), propose("view of a robot", 0, 2, 1)             # another turn: other seeds; another text alone: the same
    assert not set(calls[3][1]["seed"]) & set(seeds) and calls[6][1]["seed"] == [calls[0][1]["seed"][2]]
    assert propose.name.startswith("checkpoint:") and str(folder) not in propose.name


def test_replies_of_a_model_are_a_function_of_seed_row_turn_and_try(folder):
    """Two rows with one text get different replies; alone or in a crowd, a row gets the same."""
    propose = open_generator(f"checkpoint:{folder}", max_new_tokens=8)
    talk = propose.conversation(BASE)
    both = propose.ask([talk, talk], 1.0, [11, 12])
    assert both[0] != both[1] and propose.ask([talk], 1.0, [12]) == both[1:] and propose.ask([talk, talk], 0.0, [11, 12])[0] == propose.ask([talk])[0]


def test_the_name_is_of_the_weights(folder, tmp_path):
    model, tokenizer = checkpoint.load_hf(folder)
    checkpoint.save_hf(model, tokenizer, tmp_path / "moved")
    model.lm_head.weight.data[0, 0] += 1
    checkpoint.save_hf(model, tokenizer, tmp_path / "other")
    checkpoint.save(tmp_path / "run", 3, model, tokenizer, [], state={}, config={})
    name = lambda path, **settings: open_generator(f"checkpoint:{path}", **settings).name
    assert name(folder) == name(tmp_path / "moved") and len({name(folder), name(tmp_path / "other"), name(folder, temperature=.5), name(folder, num=4)}) == 4
    assert name(tmp_path / "run") == name(tmp_path / "other")               # a run's folder means its last step


def test_too_little_room_is_an_error(folder):
    propose = open_generator(f"checkpoint:{folder}", max_new_tokens=4000, tries=3)
    propose(BASE, 0, 0, 0)
    counts(propose, errors=1, cells=25, cells_from_templates=25)


# -----------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize("spec", ["", "templates", "template:", "template:x", "checkpoint", "checkpoint:", "checkpoint:/no/such/folder", "url:", "url:localhost:80", "url:ftp://h",
                                  "http://localhost", "url:http://user:key@host", "url:http://host/?a=1", "url:http://"])
def test_malformed_specs(spec):
    with pytest.raises(ValueError, match="--generator.*expected (template, checkpoint:FOLDER or url:|http.s.://HOST)"):
        open_generator(spec)


@pytest.mark.parametrize("settings, message", [(dict(num=0), "--candidates_per_category=0"), (dict(num=6), "--candidates_per_category=6"), (dict(tries=-1), "--generator_tries"),
                                               (dict(timeout=0), "timeout"), (dict(concurrency=0), "concurrency"), (dict(temperature=-1), "temperature")])
def test_malformed_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        open_generator("template", **settings)


def test_folders_that_are_no_chat_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: "):
        open_generator(f"checkpoint:{tmp_path / 'empty'}")
    plain = json.loads((folder / "tokenizer.json").read_text())
    plain["added_tokens"] = plain["added_tokens"][:1]
    checkpoint.save_hf(checkpoint.load_hf(folder)[0], Tokenizer({"tokenizer.json": json.dumps(plain)}), tmp_path / "plain")
    with pytest.raises(ValueError, match="--generator=.*plain: expected a chat model"):
        open_generator(f"checkpoint:{tmp_path / 'plain'}")
