"""Tools with state, for models to call: calculator, python, sql, search, and stores of keys, files and bookings.

    TOOLS[name][0](world, **arguments) -> a JSON object, or ToolError with a message for the model that made the call
    schema(name, *names)               -> what a prompt shows of it, under any names

A World is all that the tools see and change. What they do is a function of the world and the call: no clock, no network, no chance.
Nothing that a model writes can make them slow or large; only a sandbox that does not start is our fault (BoxError).
"""
import functools
import itertools
import json
import math
import re
import sqlite3
from collections import Counter

from data import calculator, sandbox

MAX_RESPONSE = 2000  # characters
MAX_STEPS, MAX_ROWS = 1_000_000, 200  # of a query: steps of SQLite's virtual machine, rows of the result
MAX_FILES, MAX_FILE_BYTES = 64, 1 << 20  # that python may leave behind, all together
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
HOURS = range(8, 19)


class ToolError(ValueError):
    """The call cannot be carried out; the message is written for the model that made it."""


class BoxError(RuntimeError):
    """The sandbox did not start: our fault, not the model's."""


class World:
    """All that the tools see and change. copy() only before the first query: rows live in SQLite from then on."""

    def __init__(self, salt=(1, 1)):
        self.kv = {}  # key -> text
        self.files = {}  # name -> bytes; the folder in which python runs
        self.tables = {}  # name -> rows (name, maker, price, stock)
        self.documents = {}  # id -> (title, text)
        self.events = {}  # 24 * day + hour -> title
        self.busy = set()  # tools that refuse their next call
        self.salt = salt  # two numbers that turn an hour of the week into the number of its booking
        self.db = None

    def copy(self):
        other = World(self.salt)
        other.kv, other.files, other.events = dict(self.kv), dict(self.files), dict(self.events)
        other.tables, other.documents, other.busy = dict(self.tables), self.documents, set(self.busy)
        return other

    def snapshot(self):
        """What two worlds must agree in to be the same to a grader; the order in which rows were written is not part of it."""
        tables = self.tables
        if self.db is not None:
            self.db.set_progress_handler(None, 0)
            tables = {name: self.db.execute(f"SELECT * FROM {name}").fetchall() for name in tables}
        return self.kv, self.files, self.events, {name: Counter(map(repr, rows)) for name, rows in tables.items()}

    def event_id(self, slot):
        """One number per hour of the week, since 8999 is prime: a booking's number does not tell what was booked before."""
        return f"E{1000 + (self.salt[0] + self.salt[1] * slot) % 8999}"


# -----------------------------------------------------------------------------
# Tools: functions of (world, arguments that fit the schema), which return a JSON object or raise ToolError


def run_calculator(world, expression):
    try:
        return {"value": calculator.calculate(expression)}
    except calculator.CalculatorError as error:
        raise ToolError(str(error)) from None


def run_python(world, code):
    """A fresh process for each call. What it leaves in its folder is there for the next one, and for the file tools."""
    try:
        result = sandbox.run(code.encode("utf-8", "replace").decode(), files=dict(world.files))
    except Exception as error:
        raise BoxError(f"the sandbox failed: {error}") from error
    kept = {name: content for name, content in result.files.items() if not name.startswith("__pycache__/")}
    sizes = [len(content) for content in kept.values()]
    if result.files_left_out or len(sizes) > MAX_FILES or sum(sizes) > MAX_FILE_BYTES or not all(map(_FILE_NAME.fullmatch, kept)):
        raise ToolError(f"files were not kept: expected at most {MAX_FILES}, of {MAX_FILE_BYTES} bytes together and with names of "
                        "letters, digits and _.-")
    world.files = kept
    answer = {"stdout": result.stdout} if result.status == "ok" else {"error": result.status, "stdout": result.stdout[:500]}
    return {**answer, "stderr": result.stderr[-1000:]} if result.stderr else answer  # the end of a traceback says most


# what has one value for all time and all machines (no random(), no date('now')), at once (printf('%.*c', 1e9, 'x') is a minute in one step)
_FUNCTIONS = set("""abs avg cast char coalesce concat count dense_rank glob group_concat hex ifnull iif instr lag lead length like
    lower ltrim max min nullif rank replace round row_number rtrim sign substr substring sum total trim typeof unicode upper""".split())
_WRITES = (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE)


def _database(tables):
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.text_factory = lambda raw: raw.decode("utf-8", "replace")
    db.execute("PRAGMA max_page_count=1024")  # 4 MB
    for name, rows in tables.items():
        db.execute(f"CREATE TABLE {name} (name TEXT, maker TEXT, price INTEGER, stock INTEGER)")
        db.executemany(f"INSERT INTO {name} VALUES (?, ?, ?, ?)", rows)
    # strings of a megabyte would take one step each, and a pattern of many % is slow
    for limit, value in ((sqlite3.SQLITE_LIMIT_LENGTH, 4096), (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 64),
                         (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 64), (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 64)):
        db.setlimit(limit, value)

    def authorize(action, first, second, *_):
        allowed = (action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)
                   or action == sqlite3.SQLITE_READ and (first in tables or first in ("sqlite_master", "sqlite_schema"))
                   or action == sqlite3.SQLITE_FUNCTION and second.lower() in _FUNCTIONS
                   or action in _WRITES and first in tables)
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY

    db.set_authorizer(authorize)
    return db


def run_sql(world, query):
    if world.db is None:
        world.db = _database(world.tables)
    left = itertools.repeat(0, MAX_STEPS // 1000)
    world.db.set_progress_handler(lambda: next(left, 1), 1000)
    try:
        cursor = world.db.execute(query)
        columns, rows = [column[0] for column in cursor.description or ()], cursor.fetchmany(MAX_ROWS + 1)
        num_changed = cursor.rowcount
        cursor.close()
    except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: NUL or a lone surrogate in the query
        raise ToolError(f"sql: {error}") from None
    if not columns:
        return {"rows_changed": max(num_changed, 0)}
    cut = {"cut": f"more than {MAX_ROWS} rows"} if len(rows) > MAX_ROWS else {}
    return {"columns": columns, "rows": rows[:MAX_ROWS], **cut}


def terms(text):
    """Words as BM25 counts them. Hangul by pairs of syllables, since particles are written onto the word."""
    words = re.findall(r"[a-z0-9]+|[가-힣]+", text.casefold())
    return [word[i:i + 2] if word[0] >= "가" else word for word in words
            for i in range(max(1, len(word) - 1) if word[0] >= "가" else 1)]


def run_search(world, query, k1=1.2, b=.75):
    """The five best documents by BM25 (Robertson and Zaragoza 2009, with the idf that is never negative)."""
    bags = {id: Counter(terms(f"{title} {text}")) for id, (title, text) in world.documents.items()}
    mean = sum(bag.total() for bag in bags.values()) / max(1, len(bags))
    scores = Counter()
    for word in dict.fromkeys(terms(query)):
        num = sum(word in bag for bag in bags.values())
        idf = math.log(1 + (len(bags) - num + .5) / (num + .5))
        for id, bag in bags.items():
            if word in bag:
                scores[id] += idf * bag[word] * (k1 + 1) / (bag[word] + k1 * (1 - b + b * bag.total() / mean))
    best = sorted(scores, key=lambda id: (-scores[id], id))[:5]
    return {"results": [{"id": id, "title": world.documents[id][0]} for id in best]}


def run_open(world, id):
    title, text = _find(world.documents, id, "document")
    return {"title": title, "text": text}


def _find(known, name, what):
    if name not in known:
        raise ToolError(f"not found: no {what} {name[:100]!r}")
    return known[name]


def kv_get(world, key):
    return {"value": _find(world.kv, key, "key")}


def kv_set(world, key, value):
    previous, world.kv[key] = world.kv.get(key), value
    return {"previous": previous}


def kv_delete(world, key):
    _find(world.kv, key, "key")
    return {"deleted": world.kv.pop(key)}


def kv_add(world, key, amount):
    previous = _find(world.kv, key, "key")
    if not re.fullmatch(r"-?[0-9]{1,12}", previous):
        raise ToolError(f"wrong type: expected {key[:100]!r} to hold an integer of at most 12 digits, found {previous[:100]!r}")
    if abs(amount) >= 10**12:
        raise ToolError("wrong type: expected an integer of at most 12 digits")
    world.kv[key] = str(int(previous) + amount)
    return {"value": world.kv[key], "previous": previous}


def kv_list(world, prefix=""):
    return {"keys": sorted(key for key in world.kv if key.startswith(prefix))}


_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def file_read(world, path):
    return {"text": _find(world.files, path, "file")}


def file_write(world, path, text):
    if not _FILE_NAME.fullmatch(path):
        raise ToolError("expected a file name of at most 64 letters, digits and _.-")
    if path not in world.files and len(world.files) >= MAX_FILES:
        raise ToolError(f"expected at most {MAX_FILES} files")
    previous, world.files[path] = world.files.get(path), text.encode("utf-8", "replace")
    return {"previous": previous}


def file_delete(world, path):
    _find(world.files, path, "file")
    return {"deleted": world.files.pop(path)}


def file_list(world, prefix=""):
    return {"files": sorted(path for path in world.files if path.startswith(prefix))}


def calendar_list(world, day):
    slots = sorted(slot for slot in world.events if slot // 24 == DAYS.index(day))
    return {"bookings": [{"id": world.event_id(s), "hour": s % 24, "title": world.events[s]} for s in slots]}


def _free_slot(world, day, hour):
    if hour not in HOURS:
        raise ToolError(f"expected an hour from {HOURS[0]} to {HOURS[-1]}")
    slot = 24 * DAYS.index(day) + hour
    if slot in world.events:
        raise ToolError(f"conflict: {day} {hour}:00 is taken by {world.events[slot][:100]!r}")
    return slot


def calendar_add(world, day, hour, title):
    slot = _free_slot(world, day, hour)
    world.events[slot] = title
    return {"id": world.event_id(slot)}


def calendar_move(world, id, day, hour):
    old = _find({world.event_id(slot): slot for slot in world.events}, id, "booking")
    slot = _free_slot(world, day, hour)
    world.events[slot] = world.events.pop(old)
    return {"id": world.event_id(slot)}


def calendar_cancel(world, id):
    slot = _find({world.event_id(slot): slot for slot in world.events}, id, "booking")
    return {"title": world.events.pop(slot)}


# -----------------------------------------------------------------------------
# Schemas. A tool's own name and parameters are those below; a model sees them under the names that an episode gives them.

_TEXT = {"type": "string"}
PARAMETERS = {
    "expression": {**_TEXT, "description": "for example 12+3*4"},
    "code": {**_TEXT, "description": "a program; what it prints is the result"},
    "query": _TEXT, "key": _TEXT, "value": _TEXT, "path": {**_TEXT, "description": "name of the file"}, "text": _TEXT,
    "id": {**_TEXT, "description": "such as D1234 or E1234"}, "amount": {"type": "integer"}, "prefix": _TEXT, "title": _TEXT,
    "day": {**_TEXT, "enum": list(DAYS)}, "hour": {"type": "integer", "description": f"full hour, {HOURS[0]} to {HOURS[-1]}"},
}
TOOLS = {  # name -> (function, description, parameters); optional ones in brackets
    "calculator": (run_calculator, "Evaluates an arithmetic expression exactly.", "expression"),
    "python": (run_python, "Runs a Python program in the folder of the files.", "code"),
    "sql": (run_sql, "Runs one SQL statement on the database: select, insert, update or delete.", "query"),
    "search": (run_search, "Finds documents by words.", "query"),
    "open": (run_open, "Shows a document.", "id"),
    "kv_get": (kv_get, "Reads the value of a key of the store.", "key"),
    "kv_set": (kv_set, "Writes the value of a key of the store; returns the previous one.", "key value"),
    "kv_delete": (kv_delete, "Deletes a key of the store; returns its value.", "key"),
    "kv_add": (kv_add, "Adds to the number under a key of the store; returns the new one and the previous one.", "key amount"),
    "kv_list": (kv_list, "Lists the keys of the store that start with a prefix.", "[prefix]"),
    "file_read": (file_read, "Reads a file.", "path"),
    "file_write": (file_write, "Writes a file; returns its previous text.", "path text"),
    "file_delete": (file_delete, "Deletes a file; returns its text.", "path"),
    "file_list": (file_list, "Lists the files whose names start with a prefix.", "[prefix]"),
    "calendar_list": (calendar_list, "Lists the bookings of a day in the calendar.", "day"),
    "calendar_add": (calendar_add, "Books an hour in the calendar; returns the number of the booking.", "day hour title"),
    "calendar_move": (calendar_move, "Moves a booking in the calendar to another hour; returns its new number.", "id day hour"),
    "calendar_cancel": (calendar_cancel, "Cancels a booking in the calendar; returns its title.", "id"),
}


READERS = {"calculator", "search", "open", "kv_get", "kv_list", "file_read", "file_list", "calendar_list"}  # change nothing, ever


def parameters(tool):
    return TOOLS[tool][2].replace("[", "").replace("]", "").split()


@functools.cache
def schema(tool, name, *names):
    """OpenAI schema of `tool` under another name and with other names of its parameters. Shared by all who ask: not to be changed."""
    properties = {new: PARAMETERS[old] for new, old in zip(names, parameters(tool), strict=True)}
    required = [new for new, old in zip(names, TOOLS[tool][2].split(), strict=True) if old[0] != "["]
    return {"type": "function", "function": {"name": name, "description": TOOLS[tool][1], "parameters": {
        "type": "object", "properties": properties, "required": required}}}


def to_json(payload):
    """Bytes, the only values of a response that are not JSON, are text: UTF-8 with what is none of it replaced."""
    return json.dumps(payload, ensure_ascii=False, default=lambda raw: raw.decode("utf-8", "replace"))


def to_response(payload):
    """The text that a model gets: at most 2,000 characters, the cut marked, lone surrogates replaced."""
    text = to_json(payload)
    text = text.encode("utf-8", "replace").decode()
    mark = f"... [cut: {len(text)} characters]"
    return text if len(text) <= MAX_RESPONSE else text[:MAX_RESPONSE - len(mark)] + mark
