"""What the tool environment asks for: first states, requests in English and Korean, the programs that carry them out.

A single call or a chain of calls is one function of a Scene. It puts things into the scene's world and returns what the wording needs,
the calls, and the answer, which is in the world and nowhere in the request. data/episodes.py makes episodes of them.
"""
import random
import re

from data.episode_words import ARTICLE, DAY_NAMES, NAMES
from data.tools import DAYS, HOURS, TOOLS, World, parameters

FAMILIES = ("calc", "python", "sql", "search", "kv", "file", "calendar")
FAMILY = {tool: {"calculator": "calc", "open": "search"}.get(tool, tool.partition("_")[0]) for tool in TOOLS}

class Draw(random.Random):
    """Draws made of random() alone: the one method whose sequence Python promises to keep."""

    def below(self, n):
        return int(self.random() * n)

    def pick(self, values):
        return values[self.below(len(values))]

    def shuffled(self, values):
        return sorted(values, key=lambda _: self.random())


# -----------------------------------------------------------------------------
# Scenes


class Scene:
    """The first state of an episode while it is made, and the names in it: no two things share one."""

    def __init__(self, draw, lang, held):
        self.draw, self.lang, self.held, self.used = draw, lang, held, set()
        self.world = World(salt=(draw.below(8999), 1 + draw.below(8998)))
        self.table = draw.pick(("items", "goods", "parts", "products"))

    def fresh(self, make):
        while (value := make()) in self.used:
            pass
        self.used.add(value)
        return value

    def name(self, lang=None):
        return self.fresh(lambda: self.draw.pick(NAMES[lang or self.lang][self.held]))

    def number(self, low=100, high=9999):
        return self.fresh(lambda: str(low + self.draw.below(high - low + 1)))

    def value(self):
        """A number, or a code such as KT-4821."""
        letters = self.draw.pick("BCDFGHJKLM") + self.draw.pick("NPQRSTVWXZ")
        return self.number() if self.draw.below(2) else f"{letters}-{self.number()}"

    def key(self, value=None):
        """A name for a key of the store, which holds `value` if there is one."""
        key = self.name().replace(" ", "_")
        if value is not None:
            self.world.kv[key] = value
        return key

    def path(self, text=None):
        """A name for a file, which holds `text` if there is one. ASCII in either language, since files meet the file system."""
        path = self.name("en").replace(" ", "_") + ".txt"
        if text is not None:
            self.world.files[path] = text.encode()
        return path

    def slot(self, title=None):
        """An hour of the week, booked as `title` if there is one."""
        slot = self.fresh(lambda: 24 * self.draw.below(7) + self.draw.pick(HOURS))
        if title is not None:
            self.world.events[slot] = title
        return slot

    def row(self, maker=None):
        """A new row of the table: (name, maker, price, stock)."""
        row = (self.name(), maker or self.name(), int(self.number()), int(self.number()))
        self.world.tables.setdefault(self.table, []).append(row)
        return row

    def document(self, name):
        """A document about `name`; -> (its id, the access code in it)."""
        id, code = self.fresh(lambda: f"D{1000 + self.draw.below(9000)}"), self.number(1000)
        title, text = ARTICLE[self.lang]
        text = text.format(name=name, year=1900 + self.draw.below(99), gates=2 + self.draw.below(8), keeper=self.name(), code=code)
        self.world.documents[id] = (title.format(name=name), text)
        return id, code

    def fill(self, family):
        """Things that no request is about, in a store that the offered tools see."""
        for _ in range(3 + self.draw.below(3)):
            if family == "kv":
                self.key(self.value())
            elif family == "file":
                self.path(self.value())
            elif family == "calendar":
                self.slot(self.name())
            elif family == "sql":
                self.row()
            elif family == "search":
                self.document(self.name())


# -----------------------------------------------------------------------------
# Single calls: (scene, kind) -> slots of the wording, call, answer, how to read the answer off the response


def _in_store(s, tool):
    old, new, amount = s.number() if tool == "kv_add" else s.value(), s.value(), int(s.number(2, 99))
    name = s.key(old) if tool.startswith("kv") else s.path(old)
    values = {"key": name, "path": name, "value": new, "text": new, "amount": amount}
    slots = {p: values[p] for p in parameters(tool)}
    field = {"kv_get": "value", "kv_add": "value", "kv_delete": "deleted", "file_read": "text"}.get(tool, "previous")
    return slots, (tool, *slots.values()), str(int(old) + amount) if tool == "kv_add" else old, lambda response: response[field]


def _in_calendar(s, tool):
    title, slot = s.name(), s.slot()
    values = {"title": title, **when(s.lang, slot)}
    if tool != "calendar_add":
        values["id"] = s.world.event_id(s.slot(title))
    slots = {p: values[p] for p in parameters(tool)}
    call = (tool, *(DAYS[slot // 24] if p == "day" else value for p, value in slots.items()))
    if tool == "calendar_cancel":
        return slots, call, title, lambda response: response["title"]
    return slots, call, s.world.event_id(slot), lambda response: response["id"]


def when(lang, slot):
    return {"day": DAY_NAMES[lang][slot // 24], "hour": slot % 24}


def _in_table(s, kind):
    names, column = ("price", "stock"), s.draw.below(2)
    maker, number = (s.name(), 2 + s.draw.below(3)) if kind == "sql_sum" else (None, 1)
    rows = [s.row(maker) for _ in range(number)]
    what, where = (f"SUM({names[column]})", f"maker = '{maker}'") if maker else (names[column], f"name = '{rows[0][0]}'")
    slots = {"table": s.table, "column": names[column], "maker": maker, "item": rows[0][0]}
    return slots, ("sql", f"SELECT {what} FROM {s.table} WHERE {where}"), str(sum(row[2 + column] for row in rows)), _cell


def _cell(response):
    return str(response["rows"][0][0])


def _in_document(s, kind):
    id, code = s.document(s.name())
    return {"id": id}, ("open", id), code, _code


def _code(response):
    return re.search(r"(?:access code is|출입 코드는) ([0-9]+)", response["text"])[1]


_MEASURES = (  # of integers xs: in words, as a program says it, as we compute it
    ({"en": "the sum of the numbers", "ko": "모든 수의 합"}, "sum(xs)", sum),
    ({"en": "the sum of their squares", "ko": "모든 수의 제곱의 합"}, "sum(x*x for x in xs)", lambda xs: sum(x * x for x in xs)),
    ({"en": "the largest minus the smallest number", "ko": "가장 큰 수에서 가장 작은 수를 뺀 값"}, "max(xs) - min(xs)",
     lambda xs: max(xs) - min(xs)),
)


def _by_program(s, kind):
    xs = [100 + s.draw.below(9900) for _ in range(20 + s.draw.below(20))]
    path, (what, expression, measure) = s.path("\n".join(map(str, xs))), s.draw.pick(_MEASURES)
    code = f"xs = [int(line) for line in open('{path}')]\nprint({expression})"
    return {"path": path, "what": what[s.lang]}, ("python", code), str(measure(xs)), lambda response: response["stdout"].strip()


SINGLES = {**dict.fromkeys(("kv_get", "kv_set", "kv_delete", "kv_add", "file_read", "file_write"), _in_store),
           **dict.fromkeys(("calendar_add", "calendar_move", "calendar_cancel"), _in_calendar),
           "sql_one": _in_table, "sql_sum": _in_table, "open": _in_document, "python": _by_program}
# what the requests of level 5 leave out. Nobody guesses it: a day and an hour together are one of 77.
MISSING = {"kv_set": ("value",), "kv_add": ("amount",), "file_write": ("text",), "calendar_add": ("day", "hour"),
           "calendar_move": ("day", "hour")}

# -----------------------------------------------------------------------------
# Chains: scene -> slots of the wording, tools, gold program, answer. A program yields a turn's calls, is sent their responses, and
# returns the answer as it found it there.


def _pointers(s):
    value, num = s.number(), 2 + s.draw.below(4)
    key = value
    for _ in range(num):
        key = s.key(key)

    def program(key=key):
        while not key.isdecimal():
            key = (yield [("kv_get", key)])[0]["value"]
        return key
    return {"key": key}, ["kv_get"], program, value


def _scaled(s):
    value, m, c = s.number(), s.number(12, 99), s.number(12, 99)
    key, other = s.key(value), s.key()

    def program():
        read = (yield [("kv_get", key)])[0]["value"]
        result = (yield [("calculator", f"{read}*{m}+{c}")])[0]["value"]
        yield [("kv_set", other, result)]
        return result
    return {"key": key, "other": other, "m": m, "c": c}, ["kv_get", "calculator", "kv_set"], program, str(int(value) * int(m) + int(c))


def _fallback(s):
    value, amount = s.number() if s.draw.below(2) else s.name(), s.number(12, 99)
    key = s.key(s.key(value))

    def program():
        other = (yield [("kv_get", key)])[0]["value"]
        response = (yield [("kv_add", other, int(amount))])[0]
        if "error" in response:
            response = (yield [("kv_set", other, amount)])[0]
        return response["previous"]
    return {"key": key, "amount": amount}, ["kv_get", "kv_add", "kv_set"], program, value


def _research(s):
    name = s.name()
    _, code = s.document(name)
    near = [n for n in NAMES[s.lang][s.held] if n != name and set(n.split()) & set(name.split())]
    for other in s.draw.shuffled(near)[:4]:
        s.document(other)

    def program():
        found = (yield [("search", name)])[0]["results"]
        id = next(f["id"] for f in found if f["title"].startswith(name + " "))
        return _code((yield [("open", id)])[0])
    return {"name": name}, ["search", "open"], program, code


def _invoice(s):
    row, num = s.row(), s.number(12, 99)
    path = s.path(row[0])

    def program():
        item = (yield [("file_read", path)])[0]["text"]
        price = _cell((yield [("sql", f"SELECT price FROM {s.table} WHERE name = '{item}'")])[0])
        return (yield [("calculator", f"{price}*{num}")])[0]["value"]
    return {"path": path, "table": s.table, "num": num}, ["file_read", "sql", "calculator"], program, str(row[2] * int(num))


def _transfer(s):
    a, b = s.row(), s.row()

    def program():
        stock = _cell((yield [("sql", f"SELECT stock FROM {s.table} WHERE name = '{b[0]}'")])[0])
        yield [("sql", f"UPDATE {s.table} SET stock = {stock} WHERE name = '{a[0]}'")]
        return stock
    return {"table": s.table, "a": a[0], "b": b[0]}, ["sql"], program, str(b[3])


def _booking(s):
    first, num, title = 24 * s.draw.below(7) + 8 + s.draw.below(7), 1 + s.draw.below(3), s.name()
    slots = range(first, first + num + 1)
    s.used.update(slots)
    s.world.events.update((slot, s.name()) for slot in slots[:-1])

    def program():
        for slot in slots:
            response = (yield [("calendar_add", DAYS[slot // 24], slot % 24, title)])[0]
            if "id" in response:
                return response["id"]
    return {**when(s.lang, first), "title": title}, ["calendar_add"], program, s.world.event_id(slots[-1])


def _cleanup(s):
    text, key = s.value(), s.key()
    paths = [s.path(text), s.path()]
    path, other = s.draw.shuffled(paths)

    def program():
        response = (yield [("file_delete", path)])[0]
        if "error" in response:
            response = (yield [("file_delete", other)])[0]
        yield [("kv_set", key, response["deleted"])]
        return response["deleted"]
    return {"path": path, "other": other, "key": key}, ["file_delete", "kv_set"], program, text


CHAINS = {"pointers": _pointers, "scaled": _scaled, "fallback": _fallback, "research": _research, "invoice": _invoice,
          "transfer": _transfer, "booking": _booking, "cleanup": _cleanup}
CHAIN_FAMILIES = {"pointers": "kv", "scaled": "kv calc", "fallback": "kv", "research": "search", "invoice": "file sql calc",
                  "transfer": "sql", "booking": "calendar", "cleanup": "file kv"}
