r"""Logs of (user, item, reward, time) for a generative recommender: read, split, rewards, rows and batches.

    log = load("ml-latest-small")                     # or "csv:FILE" with the col_ settings; log.report is to be printed
    log, part = split(log)                            # leave-last-out; or how="time"
    reward = rewards(log, part, "raw")
    rows = train_rows(log, part, max_length=50)
    batch(log, reward, rows, indices)                 # items, times, targets, ... as torch tensors

Events are sorted by (user, time, place in the file); statistics of rewards and items come from TRAIN events alone.
Item 0 is padding. A row is the events [start, end) of one user, an int64 triple (start, end, first): all but its last event are inputs, and the
event after each input is a decision if it is `first` or a later one.
"""
import csv
import datetime
import difflib
import gzip
import io
import itertools
import os
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import random_key
from data import _did_you_mean

TRAIN, VAL, TEST = 0, 1, 2
SHRINK = 5                     # k of means and percentiles: n / (n + k) is the weight of what was observed
BLOCK = 1 << 22                # bytes that are parsed at once: their Python strings take ten times that
YEAR_2100 = 4_102_444_800      # seconds


class Log(NamedTuple):         # N events sorted by (user, time, row)
    user: np.ndarray           # (N,) int64, 0..U-1
    item: np.ndarray           # (N,) int64, 1..I
    reward_raw: np.ndarray     # (N,) float64
    time: np.ndarray           # (N,) int64, seconds; events are ordered by the fractions too, if the file has them
    row: np.ndarray            # (N,) int64, place among the records of the file (of several files: one after the other)
    signals: dict              # name -> (N,) float64: play and duration (seconds), is_like, ...
    user_ids: list             # raw ids as text; user_ids[u]
    item_ids: list             # item_ids[i - 1] is the raw id of item i
    titles: list               # titles[i - 1] ("": none), or [] where none are known
    report: list               # lines for people


# -----------------------------------------------------------------------------
# Where the presets are, and their columns


def _columns(user, item, reward, time, **more):
    return dict(col_user=user, col_item=item, col_reward=reward, col_time=time, **more)


_PLAIN = _columns("0", "1", "2", "3", header=0)
_RECBOLE = _columns("user_id", "item_id", "rating", "timestamp", sep="\t")
_MOVIELENS = _columns("userId", "movieId", "rating", "timestamp", sep=",")
_GROUPLENS = "https://grouplens.org/datasets/movielens/"
# name -> (download page, [(files, settings, titles: (file, separator, encoding, has a header))]); the first whose files are there is taken
PRESETS = {
    "ml-latest-small": (_GROUPLENS, [("ratings.csv", _MOVIELENS, ("movies.csv", ",", "utf-8", True))]),
    "ml-20m": (_GROUPLENS, [("ratings.csv", _MOVIELENS, ("movies.csv", ",", "utf-8", True))]),
    "ml-1m": (_GROUPLENS, [("ratings.dat", _PLAIN | dict(sep="::"), ("movies.dat", "::", "latin-1", False)), ("ml-1m.inter", _RECBOLE, ())]),
    "ml-100k": (_GROUPLENS, [("u.data", _PLAIN | dict(sep="\t"), ("u.item", "|", "latin-1", False)), ("ml-100k.inter", _RECBOLE, ())]),
    "kuairec": ("https://kuairec.com", [("big_matrix.csv", _columns("user_id", "video_id", "watch_ratio", "timestamp", sep=","), ())]),
    "kuairec-small": ("https://kuairec.com", [("small_matrix.csv", _columns("user_id", "video_id", "watch_ratio", "timestamp", sep=","), ())]),
    # reward_raw is long_view: a click is habit, the long view is nearer to satisfaction
    "kuairand": ("https://kuairand.com", [("log_*.csv", _columns("user_id", "video_id", "long_view", "time_ms", sep=",", time_unit="ms"), ())]),
    "amazon": ("https://jmcauley.ucsd.edu/data/amazon/", [("ratings_*.csv*", _PLAIN | dict(sep=","), ())]),
    "amazon-2023": ("https://amazon-reviews-2023.github.io", [
        ("*.csv*", _columns("user_id", "parent_asin", "rating", "timestamp", sep=",", time_unit="ms"), ())]),
}
# columns that become signals wherever a header has them -> name of the signal, and what it is divided by (milliseconds become seconds)
SIGNALS = {"play_duration": ("play", 1000), "play_time_ms": ("play", 1000), "video_duration": ("duration", 1000), "duration_ms": ("duration", 1000),
           **{name: (name, 1) for name in ("play", "duration", "watch_ratio", "long_view", "is_click", "is_like", "is_follow", "is_comment",
                                           "is_forward", "is_hate", "is_profile_enter", "is_rand")}}


def _find(data, cache):
    """-> (files, settings, titles file and its form or ()) of csv:FILE, a preset's name, or preset:PATH."""
    name, colon, given = data.partition(":")
    if name == "csv":
        path = Path(given).expanduser()
        if not given or not path.is_file():
            raise ValueError(f"--data={data}: expected csv:FILE, found no file {given!r}")
        return [path], {}, ()
    if name not in PRESETS:
        raise ValueError(f"--data={data}: expected csv:FILE or a preset{_did_you_mean(name, ['csv', *PRESETS])}")
    page, forms = PRESETS[name]
    root, cache = os.environ.get("TEMPER_DATA"), Path(cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "temper"))
    folders = [Path(given).expanduser()] if colon else [*([Path(root, name), Path(root, name.replace("-", "_"))] if root else []), cache / name]
    for folder in folders:
        if folder.is_file():                               # one of several categories; its name need not be the official one
            return [folder], forms[0][1], ()
        for pattern, settings, titles in forms:
            files = sorted(folder.glob(f"**/{pattern}"))   # archives unpack to a folder of their own, some with data/ in it
            if files:
                if len({file.parent for file in files}) > 1 or len(files) > 1 and name != "kuairand":
                    raise ValueError(f"--data={data}: expected one log below {folder}, found {', '.join(map(str, files))}; name one: {name}:PATH")
                beside = files[0].with_name(titles[0]) if titles else None
                return files, settings, (beside, *titles[1:]) if beside and beside.exists() else ()
    raise ValueError(f"--data={data}: found no {' or '.join(form[0] for form in forms)} in {' or '.join(map(str, folders))} "
                     f"(TEMPER_DATA is {root or 'not set'}). Download {name} from {page}, whose terms you accept by that, and unpack it to "
                     f"{folders[-1]}, or say where it is: --data={name}:FOLDER")


# -----------------------------------------------------------------------------
# Reading


def _open(path):
    with open(path, "rb") as file:
        start = file.read(2)
    return gzip.open(path, "rb") if start == b"\x1f\x8b" else open(path, "rb")


def _records(file, path, sep, encoding="utf-8", line=0):
    """Yields (line where it begins, list of fields) of a binary file after `line` lines; blank lines are skipped. Quotes mean something where
    commas or semicolons separate: titles between tabs or :: hold bare ones. ValueError with file and line: another encoding, an open quote."""
    def texts():
        for number, data in enumerate(file, line + 1):
            try:
                yield data.decode(encoding).replace(sep, mark)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not {encoding.upper()} at byte {error.start} of the line") from None

    mark = sep if len(sep) == 1 else "\x1f"                # csv takes one character
    reader = csv.reader(texts(), delimiter=mark, strict=True, quoting=csv.QUOTE_MINIMAL if sep in ",;" else csv.QUOTE_NONE)
    while True:
        begin = line + reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{begin}: {error}") from None
        if record is None:
            return
        if record:
            yield begin, record


def _chunks(file, path, sep, width, line):
    """Yields (columns, lines, records) of a binary file after `line` lines; columns are tuples or lists of texts, () if a record has another width.

    A block of plain lines is split at once, which is twice as fast; from the first that has quotes, blank lines or a fault on, csv reads.
    """
    while block := file.read(BLOCK) + file.readline():
        text = "" if b'"' in block else block.decode(errors="replace").replace("\r\n", "\n").removesuffix("\n")
        num = text.count("\n") + 1
        fields = text.replace("\n", f"{sep}\n{sep}").split(sep)
        if "\ufffd" in text or "\r" in text or len(fields) != num * (width + 1) - 1 or fields[width::width + 1] != ["\n"] * (num - 1):
            break
        columns = [fields[place::width + 1] for place in range(width)]
        yield columns, range(line + 1, line + 1 + num), zip(*columns)
        line += num
    records = _records(itertools.chain(io.BytesIO(block), file), path, sep, line=line)
    while pairs := list(itertools.islice(records, 500)):   # with 5,000 lists alive Python's garbage collector takes three times as long as csv
        lines, full = zip(*pairs)
        yield list(zip(*full)) if set(map(len, full)) == {width} else (), lines, full


def _numbers(texts):
    if "_" in "".join(texts):
        raise ValueError                                   # Python reads 1_000 as a number
    return np.fromiter(map(float, texts), np.float64, len(texts))


def _header(first, path, wanted, signals, header):
    """-> ({what: place}, {signal's column: place}, whether the first line is a header). wanted: {"user": column's name or number, ...}."""
    typed = all(re.fullmatch(r"\w+:(token|float)(_seq)?", text) for text in first)      # RecBole: user_id:token
    names = [text.strip().partition(":")[0] if typed else text.strip() for text in first]
    numeric = all(text.isdecimal() for text in wanted.values())

    def place(text, flag):
        name = text.partition(":")[0] if typed else text
        if numeric and name.isdecimal() and int(name) < len(first):
            return int(name)
        if header == 0 or names.count(name) != 1 or numeric and flag != "signals":
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"{path}:1: expected one column {text!r} for --{flag}, found the columns {', '.join(map(repr, names))}"
                             + (f"; did you mean {near[0]}?" if near else "") + " (where no header is, columns are numbers from 0)")
        return names.index(name)

    places = {what: place(text, f"col_{what}") for what, text in wanted.items()}
    has_header = not numeric or header == 1 or header == -1 and not any(_is_number(first[places[what]]) for what in ("reward", "time"))
    known = [name for name in names if name in SIGNALS and has_header]
    found = {name: place(name, "signals") for name in dict.fromkeys(known + signals)}
    if len({SIGNALS.get(name, (name,))[0] for name in found}) < len(found):
        raise ValueError(f"{path}:1: expected one column for each signal, found {', '.join(found)}")
    return places, found, has_header


def _is_number(text):
    try:
        return bool(np.isfinite(_numbers([text])[0]))
    except ValueError:
        return False


class _Form(NamedTuple):       # of a file's records
    width: int
    ids: dict                  # "user", "item" -> place
    numbers: dict              # name -> place of a column of finite numbers
    time: int
    latest: float              # times in [0, latest) are believed
    missing_time: str


def _parse(columns, form, index):
    """-> (codes of users, of items, times with NaN where missing, [numbers of each column]). ValueError: one of the records has a fault."""
    if len(columns) != form.width:
        raise ValueError
    codes = [np.fromiter(map(index[what].__getitem__, map(str.strip, columns[place])), np.int32) for what, place in form.ids.items()]
    numbers = [_numbers(columns[place]) for place in form.numbers.values()]
    try:
        times = _numbers(columns[form.time])
    except ValueError:
        times = _numbers([text.strip() or "nan" for text in columns[form.time]])
    missing = np.isnan(times)
    if "" in index["user"] or "" in index["item"] or not all(np.isfinite(column).all() for column in numbers) or (
            not (missing | (times >= 0) & (times < form.latest)).all() or missing.any() and form.missing_time == "stop"):
        raise ValueError
    return *codes, times, numbers


def _fault(record, form, header):
    """What is wrong with a record, or None. header: names of its columns."""
    if len(record) != form.width:
        return f"expected {form.width} fields, found {len(record)}: {record}"
    for place in form.ids.values():
        if not record[place].strip():
            return f"expected an id in column {header[place]}, found nothing"
    for place in form.numbers.values():
        if not _is_number(record[place]):
            return f"expected a finite number in column {header[place]}, found {record[place]!r}"
    text = record[form.time].strip()
    if text.lower() in ("", "nan"):
        return f"no time in column {header[form.time]}; --missing_time=drop leaves such events out" if form.missing_time == "stop" else None
    if not _is_number(text):
        return f"expected a time in column {header[form.time]}, found {text!r}"
    if not 0 <= float(text) < form.latest:
        return (f"expected a time from 1970 to 2100 in column {header[form.time]}, found {text}, read as "
                f"{'seconds: is it --time_unit=ms?' if form.latest == YEAR_2100 else 'milliseconds: is it --time_unit=s?'}")


def _read(path, wanted, signals, sep, header, unit, missing_time, index):
    """-> ([(user codes, item codes, times, [reward, *signals]) of each chunk], names of the signals, lines of report); times and signals are as
    in the file, codes are places in index["user"] and index["item"]."""
    try:
        with _open(path) as file:
            start = file.readline().removeprefix(b"\xef\xbb\xbf")
            sep = sep or next((mark for mark in ("\t", "::", ",", ";", "|") if mark.encode() in start), ",")
            _, first = next(_records([start], path, sep), (1, []))
            if not any(first):
                raise ValueError(f"{path}:1: empty, expected a header or an event")
            places, signals, has_header = _header(first, path, wanted, signals, header)
            names = first if has_header else range(len(first))
            form = _Form(len(first), {what: places[what] for what in ("user", "item")}, {"reward": places["reward"], **signals}, places["time"],
                         YEAR_2100 * unit, missing_time)
            notes = [f"{path}: separator {sep!r}, {'a header' if has_header else 'no header'}; "
                     + ", ".join(f"{what} = column {names[place]}" for what, place in places.items()) + f" ({'ms' if unit > 1 else 's'})"]
            chunks = _chunks(file, path, sep, form.width, 1)
            if not has_header:
                chunks = itertools.chain([([[text] for text in first], [1], [first])], chunks)
            parts = []
            for columns, lines, records in chunks:
                try:
                    parts.append(_parse(columns, form, index))
                except ValueError:
                    for line, record in zip(lines, records):
                        if fault := _fault(record, form, names):
                            raise ValueError(f"{path}:{line}: {fault}") from None
                    raise
                if len(notes) < 4 and all(text.isdecimal() for text in wanted.values()):    # columns by number: people see what they hold
                    notes += ["    " + ", ".join(f"{what} {columns[place][at]}" for what, place in places.items())
                              for at in range(min(4 - len(notes), len(columns[0])))]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or damaged gzip: {error}") from None
    if not parts:
        raise ValueError(f"{path}:2: no event, expected one a line")
    return parts, list(signals), notes


def _ranks(raw):
    """-> (sorted raw ids, place of each among them). Sorted as numbers if all are whole numbers, else as text."""
    raw = list(raw)
    numbers = all(re.fullmatch(r"-?[0-9]{1,30}", text) for text in raw)
    order = sorted(range(len(raw)), key=(lambda at: (int(raw[at]), raw[at])) if numbers else raw.__getitem__)
    ranks = np.empty(len(raw), np.int64)
    ranks[order] = np.arange(len(raw))
    return [raw[at] for at in order], ranks


def _counter():
    """A dictionary that numbers its keys in the order in which they are first asked for."""
    index = defaultdict()
    index.default_factory = index.__len__
    return index


def load(data, *, col_user="", col_item="", col_reward="", col_time="", signals="", sep="", header=-1, time_unit="", ties="row",
         dedup="first", missing_time="stop", min_user=0, min_item=0, core="single", cache="", seed=0) -> Log:
    """A log, from csv:FILE (.csv, .tsv, any text with one event a line; gzipped or not), a preset of PRESETS, or preset:FOLDER.

    col_user, col_item, col_reward, col_time: names of the header's columns, or numbers from 0. A setting that is given wins over a preset's.
    signals: names of more columns, "a,b"; those of SIGNALS are read wherever a header has them.
    sep: tab, or the character or characters; "": the first of tab :: , ; | that is in line 1.
    header: 1 yes, 0 no, -1: yes if columns are named, or if line 1 has words where the reward and the time should be.
    time_unit: s or ms. ties: events of a user at the same time keep the order of the file (row) or are in an order drawn by seed (shuffle).
    dedup: of a user's events with the same item keep the first, the last or all (none). missing_time: stop, or drop the event.
    min_user, min_item: users and items with fewer events are left out, after dedup; both counted once before either is left out (core=single),
        or again until none is left with fewer (iterative).
    ValueError with file and line: a line with another number of fields, no id, a reward, signal or time that is not a finite number, a time
        before 1970 or after 2100, text that is not UTF-8.
    """
    _expect_one_of(ties=(ties, "row", "shuffle"), dedup=(dedup, "first", "last", "none"), missing_time=(missing_time, "stop", "drop"),
                   core=(core, "single", "iterative"), time_unit=(time_unit, "", "s", "ms"), header=(header, -1, 0, 1))
    files, settings, titles_form = _find(data, cache)
    given = dict(col_user=col_user, col_item=col_item, col_reward=col_reward, col_time=col_time, header=header, time_unit=time_unit,
                 sep="\t" if sep in ("tab", "\\t") else sep)
    settings = dict(header=-1, sep="") | settings | {name: value for name, value in given.items() if value not in ("", -1)}
    more = [name.strip() for name in signals.split(",") if name.strip()]
    wanted = {what: str(settings.get(f"col_{what}", "")) for what in ("user", "item", "reward", "time")}
    if not all(wanted.values()):
        raise ValueError(f"--data={data}: needs --col_user, --col_item, --col_reward and --col_time (names, or numbers from 0 where no header is), "
                         f"found none for {', '.join(what for what in wanted if not wanted[what])}")
    unit = 1000 if settings.get("time_unit") == "ms" else 1
    index, parts, report, names = dict(user=_counter(), item=_counter()), [], [], None
    for file in files:
        found, columns, notes = _read(file, wanted, more, settings["sep"], settings["header"], unit, missing_time, index)
        if names not in (None, columns):
            raise ValueError(f"{file}: expected the signals of {files[0].name}, {', '.join(names)}, found {', '.join(columns)}")
        names, parts, report = columns, parts + found, report + notes
    user, item, time = (np.concatenate([part[at] for part in parts]) for at in range(3))
    columns = [np.concatenate([part[3][at] for part in parts]) for at in range(1 + len(names))]
    del parts
    user_ids, ranks = _ranks(index["user"])
    user = ranks[user]
    item_ids, ranks = _ranks(index["item"])
    item = ranks[item]
    report.append(f"{len(user):,} events of {len(user_ids):,} users and {len(item_ids):,} items read")

    tie = np.random.default_rng(random_key("ties", seed)).permutation(len(user)) if ties == "shuffle" else np.arange(len(user))
    row = np.lexsort((tie, time, user))
    missing = np.isnan(time[row])                          # they are at the end of each user
    if missing.any():
        row = row[~missing]
        report.append(f"{missing.sum():,} events without a time dropped (missing_time=drop)")
    if dedup != "none":
        pair = user[row] * np.int64(len(item_ids)) + item[row]
        firsts = np.unique(pair, return_index=True)[1] if dedup == "first" else len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1]
        report.append(f"{len(row) - len(firsts):,} events dropped that repeat a user and item; the {dedup} of them is kept (dedup={dedup})")
        row = row[np.sort(firsts)]
    else:
        report.append("events that repeat a user and item are kept (dedup=none)")
    before = len(row)
    while min_user > 0 or min_item > 0:
        few = (np.bincount(user[row])[user[row]] < min_user) | (np.bincount(item[row])[item[row]] < min_item)
        row = row[~few]
        if core == "single" or not few.any():
            report.append(f"{before - len(row):,} events dropped of users with fewer than {min_user} or items with fewer than {min_item} events "
                          f"(core={core}), {len(np.unique(user[row])):,} users and {len(np.unique(item[row])):,} items left")
            break
    if not len(row):
        raise ValueError(f"--data={data}: no event is left: " + "; ".join(report[-4:]))

    users, user = np.unique(user[row], return_inverse=True)
    items, item = np.unique(item[row], return_inverse=True)
    time, columns = time[row], [column[row] for column in columns]
    signals = {SIGNALS.get(name, (name, 1))[0]: column / SIGNALS.get(name, (name, 1))[1] for name, column in zip(names, columns[1:])}
    item_ids = [item_ids[i] for i in items]
    same = user[1:] == user[:-1]
    tied = (same & (time[1:] == time[:-1])).sum() / max(same.sum(), 1)
    seconds = (time // unit).astype(np.int64)
    day = lambda second: datetime.datetime.fromtimestamp(int(second), datetime.UTC).date()
    report += [f"{len(row):,} events of {len(users):,} users and {len(items):,} items, {day(seconds.min())} to {day(seconds.max())}, "
               f"reward {columns[0].min():g} to {columns[0].max():g}, mean {columns[0].mean():.4f}; signals: {', '.join(signals) or 'none'}",
               f"ties: {tied:.1%} of a user's neighbouring events have the same time; "
               + ("they keep the order of the file (ties=row)" if ties == "row" else f"their order is drawn (ties=shuffle, seed={seed})"),
               f"{(np.bincount(user) == 1).sum():,} users have one event, which is no decision"]
    titles = []
    if titles_form:
        known = _titles(*titles_form)
        titles = [known.get(raw, "") for raw in item_ids]
        report.append(f"{titles_form[0]}: titles of {sum(map(bool, titles)):,} of {len(titles):,} items")
    return Log(user, item + 1, columns[0], seconds, row, signals, [user_ids[u] for u in users], item_ids, titles, report)


def _titles(path, sep, encoding, has_header):
    """{raw id: title} of a file whose first two columns they are."""
    found = {}
    with _open(path) as file:
        for line, record in itertools.islice(_records(file, path, sep, encoding), int(has_header), None):
            if len(record) < 2:
                raise ValueError(f"{path}:{line}: expected item{sep}title, found {record}")
            found[record[0]] = record[1]
    return found


def _expect_one_of(**settings):
    for name, (value, *known) in settings.items():
        if value not in known:
            raise ValueError(f"--{name}: expected one of {', '.join(map(repr, known))}, found {value!r}")


# -----------------------------------------------------------------------------
# Splits, rewards, halves


def split(log, how="loo", *, t_val=0, t_test=0, cold="drop"):
    """-> (log, part): part (N,) int8 of the returned log's events: TRAIN, VAL or TEST.

    loo: of a user with at least three events the last is TEST and the one before VAL; all else is TRAIN.
    time: TRAIN before t_val <= VAL before t_test <= TEST (seconds). cold: VAL and TEST events of an item that no TRAIN event has are dropped,
        from histories too, or kept, to be missed.
    """
    _expect_one_of(split=(how, "loo", "time"), cold=(cold, "drop", "miss"))
    count = np.bincount(log.user)
    if how == "loo":
        left = np.cumsum(count)[log.user] - 1 - np.arange(len(log.user))               # events of the user after this one
        part = np.select([(count[log.user] < 3) | (left > 1), left == 1], [TRAIN, VAL], TEST).astype(np.int8)
        lines = [f"split=loo: {(count < 3).sum():,} of {len(count):,} users have fewer than 3 events and are train only; "
                 "item statistics see what other users do after a target"]
    else:
        if not log.time.min() < t_val < t_test <= log.time.max():
            raise ValueError(f"--split=time: expected {log.time.min()} (the first event) < t_val < t_test <= {log.time.max()} (the last), in seconds, "
                             f"found t_val={t_val}, t_test={t_test}")
        part = np.select([log.time < t_val, log.time < t_test], [TRAIN, VAL], TEST).astype(np.int8)
        lines = [f"split=time: cuts at {t_val} and {t_test}"]
    unseen = (part != TRAIN) & ~np.isin(log.item, log.item[part == TRAIN])
    if how == "time" and cold == "drop" and unseen.any():
        keep = ~unseen
        log = log._replace(**{name: getattr(log, name)[keep] for name in ("user", "item", "reward_raw", "time", "row")},
                           signals={name: values[keep] for name, values in log.signals.items()})
        part = part[keep]
    lines += [f"{unseen.sum():,} validation and test events are of items without a train event: {'dropped' if how == 'time' and cold == 'drop' else 'kept'}",
              ", ".join(f"{(part == which).sum():,} {name}" for which, name in enumerate(("train", "validation", "test"))) + " events"]
    return log._replace(report=log.report + lines), part


def rewards(log, part, how="raw", scale="none"):
    """(N,) float32; lines about it are added to log.report.

    raw: the reward column. centered: less the mean of the user's earlier events (a first event: of train events).
    watch_ratio: play / duration, at most 5. signals:NAME=WEIGHT,...: the weighted sum.
    percentile: of play time, for durations of one power of two: mid-rank (below + half of equal) among the user's train events, shrunk to that
        among all users' by SHRINK / (n + SHRINK); .5 where a bucket has no train event. top25: +1 from percentile .75 on, -1 where is_hate, else 0.
    scale=std: divided by the standard deviation of train events (nothing is subtracted: zero keeps its meaning).
    """
    _expect_one_of(reward_scale=(scale, "none", "std"))
    train = part == TRAIN
    kind, _, weights = how.partition(":")
    if how == "raw":
        value = log.reward_raw
    elif how == "centered":
        value = log.reward_raw - earlier_means(log, log.reward_raw, log.reward_raw[train].mean())
    elif how == "watch_ratio":
        value = np.minimum(_signal(log, "watch_ratio") if "watch_ratio" in log.signals else _signal(log, "play") / _durations(log), 5)
    elif kind == "signals":
        value = np.zeros(len(log.user))
        for name, weight in _weights(weights).items():
            value = value + weight * _signal(log, name)
    elif how in ("percentile", "top25"):
        value, unknown = _percentiles(log, train)
        log.report.append(f"reward={how}: {unknown:,} events in buckets of duration without a train event get .5")
        if how == "top25":
            hated = log.signals.get("is_hate", np.zeros(len(value))) > 0
            value = np.where(hated, -1.0, value >= .75)
            log.report.append(f"reward=top25: {hated.sum():,} events are disliked" if "is_hate" in log.signals else "reward=top25: no is_hate, so no -1")
    else:
        raise ValueError(f"--reward={how}: expected raw, centered, watch_ratio, percentile, top25 or signals:NAME=WEIGHT,..."
                         f"{_did_you_mean(kind, ['raw', 'centered', 'watch_ratio', 'signals', 'percentile', 'top25'])}")
    mean, std = value[train].mean(), value[train].std()
    log.report.append(f"reward={how}: train mean {mean:.4f}, standard deviation {std:.4f}" + (", divided by it" if scale == "std" else ""))
    if scale == "std":
        if not std > 0:
            raise ValueError(f"--reward_scale=std: all train rewards are {mean:g}")
        value = value / std
    return value.astype(np.float32)


def earlier_means(log, values, first):
    """(N,): mean of values (N,) over the same user's earlier events; `first` for a user's first."""
    total, place = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    start = np.searchsorted(log.user, log.user)
    return np.where(place > start, (total[place] - total[start]) / np.maximum(place - start, 1), first)


def _signal(log, name):
    if name not in log.signals:
        raise ValueError(f"--reward: the log has no signal {name!r}{_did_you_mean(name, log.signals or ['none'])}")
    return log.signals[name]


def _durations(log):
    durations = _signal(log, "duration")
    if not (durations > 0).all():
        at = np.argmin(durations)
        raise ValueError(f"--reward: expected durations above 0, found {durations[at]:g} s in record {log.row[at] + 1} of the log")
    return durations


def _weights(text):
    found = {}
    for item in text.split(","):
        name, _, weight = item.partition("=")
        if not _is_number(weight) or name.strip() in found:
            raise ValueError(f"--reward=signals:{text}: expected NAME=WEIGHT, each name once, found {item!r}")
        found[name.strip()] = float(weight)
    return found


def _percentiles(log, train):
    play, bucket = _signal(log, "play"), np.floor(np.log2(_durations(log))).astype(np.int64)
    bucket -= bucket.min()
    own, num_own = _mid_ranks(log.user * (bucket.max() + 1) + bucket, play, train)
    all_users, num = _mid_ranks(bucket, play, train)
    all_users = np.where(num > 0, all_users, .5)
    return (num_own * own + SHRINK * all_users) / (num_own + SHRINK), (num == 0).sum()


def _mid_ranks(group, value, train):
    """(share of the group's train events that are below, plus half of those that are equal; how many train events: 0 gives 0)."""
    order = np.lexsort((value, group))
    group, value = group[order], value[order]
    before = np.concatenate([[0], np.cumsum(train[order])])                             # train events among the first i
    new_group = np.concatenate([[True], group[1:] != group[:-1]])
    new_value = new_group | np.concatenate([[True], value[1:] != value[:-1]])

    def span(new):                                         # train events before the run of each place, and within it
        ends = np.concatenate([np.flatnonzero(new), [len(new)]])
        run = np.cumsum(new) - 1
        return before[ends[run]], before[ends[run + 1]] - before[ends[run]]

    (first, num), (below, equal) = span(new_group), span(new_value)
    rank, counts = np.empty(len(order)), np.empty(len(order), np.int64)
    rank[order], counts[order] = (below - first + equal / 2) / np.maximum(num, 1), num
    return rank, counts


def half(user_ids, share, salt="judges", flag="judge_share"):
    """(U,) bool, True: the judges' half. A hash of the raw id, so it is the same in every file; a smaller share is part of a larger one."""
    if not 0 <= share <= 1:
        raise ValueError(f"--{flag}: expected a share from 0 to 1, found {share}")
    return np.array([random_key(salt, user) < share * 2 ** 63 for user in user_ids], bool)


# -----------------------------------------------------------------------------
# Rows and batches


def _starts(log):
    """(U + 1,) where each user's events start; the last is N."""
    return np.concatenate([[0], np.cumsum(np.bincount(log.user, minlength=len(log.user_ids)))])


def train_rows(log, part, max_length, windows="end"):
    """(R, 3) int64 rows of train events with at most max_length inputs, of users with at least two.

    windows=end: one row a user, the end of longer histories. all: as many as it takes; a row after the first adds max_length / 2 decisions
    (rounded up, the last row fewer), so those of long histories see at least half of max_length; each decision is in one row.
    """
    _expect_one_of(windows=(windows, "end", "all"))
    if max_length < 1:
        raise ValueError(f"expected a max_length of at least 1, found {max_length}")
    start = _starts(log)[:-1]
    count = np.bincount(log.user[part == TRAIN], minlength=len(start))
    users = np.flatnonzero(count >= 2)
    start, count = start[users], count[users]
    first_val = start + count - 1
    assert (part[start] == TRAIN).all() and (part[first_val] == TRAIN).all(), "a user's train events are the first ones"
    if windows == "end":
        low = np.maximum(start, start + count - max_length - 1)
        return np.stack([low, start + count, low + 1], 1)
    step = (max_length + 1) // 2
    more = np.maximum(0, -(-(count - max_length - 1) // step))                          # rows after the first
    user = np.repeat(np.arange(len(users)), more + 1)
    number = np.arange(len(user)) - (np.cumsum(more + 1) - more - 1)[user]
    stop, origin = (start + count)[user], start[user]
    end = np.minimum(origin + max_length + 1 + number * step, stop)
    first = np.where(number > 0, origin + max_length + 1 + (number - 1) * step, origin + 1)
    return np.stack([np.maximum(origin, end - max_length - 1), end, first], 1)


def target_rows(log, part, which, max_length):
    """(R, 3) int64: a row for each event of part `which` that has an earlier one. Its one decision is that event, its inputs are the at most
    max_length events before it, of whatever part."""
    start = _starts(log)[log.user]
    target = np.flatnonzero((part == which) & (np.arange(len(start)) > start))
    return np.stack([np.maximum(start[target], target - max_length), target + 1, target], 1)


class Batch(NamedTuple):       # B rows, T = most inputs + 1; torch tensors
    items: torch.Tensor        # (B, T) int64, 0 from lengths on
    times: torch.Tensor        # (B, T) int64; column lengths has the time at which the last target is asked for, later ones repeat it
    lengths: torch.Tensor      # (B,) int64
    targets: torch.Tensor      # (B, T) int64: the item after each input, 0: no decision
    rewards: torch.Tensor      # (B, T) float32, of the targets
    past_rewards: torch.Tensor # (B, T) float32, of the items
    events: torch.Tensor       # (B, T) int64, the target's place in the log, -1: no decision
    users: torch.Tensor        # (B,) int64


def batch(log, reward, rows, indices) -> Batch:
    start, end, first = rows[np.asarray(indices)].T[:, :, None]                         # (B, 1) each
    lengths = end - start - 1
    column = np.arange(lengths.max() + 1)
    event = np.minimum(start + column, end - 1)                                         # (B, T)
    following = np.minimum(event + 1, end - 1)
    is_input = column < lengths
    decides = is_input & (following >= first)
    return Batch(*map(torch.from_numpy, (
        log.item[event] * is_input, log.time[event], lengths[:, 0], log.item[following] * decides, reward[following] * decides,
        reward[event] * is_input, np.where(decides, following, -1), log.user[start[:, 0]])))


def seen(log, rows, indices, num_items):
    """(B, I) bool: what the user had before the row's last event, in column i - 1 for item i; that event's own item is never marked."""
    start, end, _ = rows[np.asarray(indices)].T
    origin = np.searchsorted(log.user, log.user[start])
    count = end - 1 - origin
    line = np.repeat(np.arange(len(start)), count)
    event = np.arange(len(line)) - np.repeat(np.cumsum(count) - count - origin, count)
    marked = torch.zeros(len(start), num_items, dtype=torch.bool)
    marked[torch.from_numpy(line), torch.from_numpy(log.item[event] - 1)] = True
    marked[torch.arange(len(start)), torch.from_numpy(log.item[end - 1] - 1)] = False
    return marked


def full_matrix(log, other, values):
    """What another log, fully observed, says of the users and items of this one -> (row (U,) int64, -1: says nothing of the user; table (R, I) float32,
    nan: says nothing of the item). values (N,) are the rewards of `other`. Cells that are events of `log` are left out, since a policy may have learned
    them; that, and what has no counterpart, is added to log.report. ValueError if nothing is left."""
    users, items = ({raw: place for place, raw in enumerate(ids)} for ids in (log.user_ids, log.item_ids))
    user = np.array([users.get(raw, -1) for raw in other.user_ids])[other.user]
    item = np.array([items.get(raw, -1) for raw in other.item_ids])[other.item - 1]
    both = (user >= 0) & (item >= 0)
    row, found = np.full(len(log.user_ids), -1), np.unique(user[both])
    row[found] = np.arange(len(found))
    table = np.full((len(found), len(log.item_ids)), np.nan, np.float32)
    table[row[user[both]], item[both]] = values[both]
    mine = row[log.user] >= 0
    cells = row[log.user[mine]], log.item[mine] - 1
    known = np.unique(np.ravel_multi_index(cells, table.shape)[~np.isnan(table[cells])]) if table.size else np.zeros(0)
    table[cells] = np.nan
    log.report.append(f"full matrix: {(~both).sum():,} of {len(both):,} cells are of users or items that the log has not, {len(known):,} are events of the "
                      f"log and left out; {(~np.isnan(table)).sum():,} are left, of {len(found):,} users and {(~np.isnan(table)).any(0).sum():,} items")
    if np.isnan(table).all():
        raise ValueError(f"--full_matrix: no cell is left to value policies on ({log.report[-1]})")
    return row, table


# -----------------------------------------------------------------------------
# What a reward head has to beat


def baselines(log, part, reward, which):
    """-> ({name: (n,) float64 predictions}, truth (n,)) for the events of part `which`, in the order of target_rows.

    global: mean of train rewards. user: mean of all the user's strictly earlier events. item: mean of the item's train events, global if none.
    user+item: global + item bias + user bias, the item's sum of (reward - global) over train events / (n + SHRINK), the user's sum of
    (reward - global - item bias) over earlier events / (n + SHRINK).
    """
    reward, train, place = reward.astype(np.float64), part == TRAIN, np.arange(len(part))
    start = _starts(log)[log.user]
    events = np.flatnonzero((part == which) & (place > start))
    mean = reward[train].mean()
    size = len(log.item_ids) + 1
    sums = np.bincount(log.item[train], (reward - mean)[train], minlength=size)
    count = np.bincount(log.item[train], minlength=size)

    def past(values):                                      # sum over the strictly earlier events of the same user
        total = np.concatenate([[0], np.cumsum(values)])
        return total[events] - total[start[events]]

    item, bias, num = log.item[events], sums / (count + SHRINK), (events - start[events])
    return {"global": np.full(len(events), mean), "user": mean + past(reward - mean) / num, "item": mean + (sums / np.maximum(count, 1))[item],
            "user+item": mean + bias[item] + past(reward - mean - bias[log.item]) / (num + SHRINK)}, reward[events]
