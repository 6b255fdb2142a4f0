import gzip
import os
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adversarial import cost
from data import interactions
from data.interactions import TEST, TRAIN, VAL, Log, baselines, batch, full_matrix, half, load, rewards, seen, split, target_rows, train_rows

staged = pytest.mark.skipif(not os.path.exists(os.path.join(os.environ.get("TEMPER_DATA", ""), "ml_latest_small", "ratings.csv")),
                            reason="needs TEMPER_DATA=<folder that holds ml_latest_small/>")
NAMES = dict(col_user="u", col_item="i", col_reward="r", col_time="t")
NUMBERS = dict(col_user="0", col_item="1", col_reward="2", col_time="3")


@pytest.fixture
def read(tmp_path):
    def read(text, name="log.csv", **more):
        """text or bytes of a file -> Log"""
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(f"csv:{path}", **(NAMES | more))
    return read


def made(*users, play=None, **signals):
    """Log of users, each a list of (item, reward, time); ids are the numbers as text."""
    events = [(u, *event) for u, mine in enumerate(users) for event in mine]
    user, item, reward, times = (np.array(column) for column in zip(*events))
    return Log(user.astype(np.int64), item.astype(np.int64), reward.astype(np.float64), times.astype(np.int64), np.arange(len(user)),
               {name: np.array(values, float) for name, values in (signals | ({"play": play} if play else {})).items()},
               [str(u) for u in range(len(users))], [str(i + 1) for i in range(item.max())], [], [])


LOGS = st.lists(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=12), min_size=1, max_size=6).map(
    lambda users: made(*[sorted(mine, key=lambda event: event[2]) for mine in users]))


# -----------------------------------------------------------------------------
# Reading


SMALL = "u,i,r,t\n10,a,1,5\n9,b,2.5,7\n10,b,3,5\n10,c,4,1\n"


def test_events_are_sorted_by_user_and_time_and_ties_keep_the_order_of_the_file(read):
    log = read(SMALL)
    assert log.user_ids == ["9", "10"] and log.item_ids == ["a", "b", "c"]                 # as numbers; as words
    assert log.user.tolist() == [0, 1, 1, 1] and log.item.tolist() == [2, 3, 1, 2]
    assert log.time.tolist() == [7, 1, 5, 5] and log.reward_raw.tolist() == [2.5, 4, 1, 3] and log.row.tolist() == [1, 3, 0, 2]
    assert [column.dtype for column in log[:5]] == [np.int64, np.int64, np.float64, np.int64, np.int64]
    assert log.titles == [] and log.signals == {}
    text = "\n".join(log.report)
    assert "50.0% of a user's neighbouring events" in text and "1 users have one event" in text and "1970-01-01" in text


@pytest.mark.parametrize("change", [
    lambda text: text.replace("\n", "\r\n"), lambda text: "\ufeff" + text, lambda text: text[:-1], lambda text: text.replace("\n", "\n\n"),
    lambda text: text.replace(",a,", ',"a",'), lambda text: text.replace(",", "::"), lambda text: text.replace(",", "\t"), lambda text: text.replace(",", " , "),
    lambda text: text.replace("u,i,r,t", "u:token,i:token,r:float,t:float"), lambda text: text.replace(",5\n", ",5.0\n"),
    lambda text: gzip.compress(text.encode(), mtime=0)])
def test_forms_of_a_file_that_say_the_same(read, change):
    found, log = read(change(SMALL)), read(SMALL)
    assert all(np.array_equal(a, b) for a, b in zip(found[:5], log[:5])) and found.item_ids == log.item_ids and found.user_ids == log.user_ids


def test_quoted_fields_may_hold_separators_quotes_and_line_breaks(read):
    log = read('u,i,r,t\n1,"a, ""b""",2,3\n1,"c\nd",2,4\n')
    assert log.item_ids == ['a, "b"', "c\nd"]
    with pytest.raises(ValueError, match=r"log.csv:4: expected a finite number in column r, found 'x'"):       # the line, not the record
        read('u,i,r,t\n1,"c\nd",2,4\n1,e,x,5\n')


def test_columns_by_number_and_whether_line_1_is_a_header(read):
    log = read(SMALL, **NUMBERS)
    bare = read(SMALL.partition("\n")[2], **NUMBERS)
    assert np.array_equal(log.item, bare.item) and len(bare.item) == 4
    assert "    user 10, item a, reward 1, time 5" in bare.report and "    user 10, item b, reward 3, time 5" in log.report
    assert len([line for line in log.report if line.startswith("    ")]) == 3
    with pytest.raises(ValueError, match=r"log.csv:1: expected a finite number in column 2, found 'r'"):
        read(SMALL, header=0, **NUMBERS)
    assert len(read(SMALL.partition("\n")[2], header=1, **NUMBERS).item) == 3
    with pytest.raises(ValueError, match=r"expected one column '4' for --col_time, found the columns 'u', 'i', 'r', 't'"):
        read(SMALL, **NUMBERS | dict(col_time="4"))


@pytest.mark.parametrize("text, message", [
    (b"", r"log.csv:1: empty"),
    (b"\n\n", r"log.csv:1: empty"),
    (b"u,i,r,t\n", r"log.csv:2: no event"),
    (b"1,2,3,4\n1,3,3,4\n", r"log.csv:1: .*'u' for --col_user, found the columns '1', '2', '3', '4'.*header"),
    (b"uu,item,r,t\n1,2,3,4\n", r"'u' for --col_user, found the columns 'uu', 'item', 'r', 't'; did you mean uu\?"),
    (b"u,i,r,t,t\n1,2,3,4,4\n", r"one column 't' for --col_time"),
    (b"u,i,r,t\n1,2,3,4\n1,3,3\n", r"log.csv:3: expected 4 fields, found 3"),
    (b"u,i,r,t\n1,2,3,4\n1,3,3,4,5\n", r"log.csv:3: expected 4 fields, found 5"),
    (b"u,i,r,t\n1,2,3\n1,3,3,4,5\n", r"log.csv:2: expected 4 fields, found 3"),           # as many fields as two good lines
    (b"u,i,r,t\n1,2,3,4\n\n1,3,,4\n", r"log.csv:4: expected a finite number in column r, found ''"),
    (b"u,i,r,t\n1,2,good,4\n", r"log.csv:2: expected a finite number in column r, found 'good'"),
    (b"u,i,r,t\n1,2,nan,4\n", r"log.csv:2: expected a finite number in column r, found 'nan'"),
    (b"u,i,r,t\n1,2,-inf,4\n", r"log.csv:2: expected a finite number in column r, found '-inf'"),
    (b"u,i,r,t\n1,2,1_0,4\n", r"log.csv:2: expected a finite number in column r, found '1_0'"),
    (b"u,i,r,t\n1, ,1,4\n", r"log.csv:2: expected an id in column i, found nothing"),
    (b"u,i,r,t\n1,2,3,4\n1,3,3,\n", r"log.csv:3: no time in column t; --missing_time=drop"),
    (b"u,i,r,t\n1,2,3,4\n1,3,3,NaN\n", r"log.csv:3: no time"),
    (b"u,i,r,t\n1,2,3,noon\n", r"log.csv:2: expected a time in column t, found 'noon'"),
    (b"u,i,r,t\n1,2,3,inf\n", r"log.csv:2: expected a time in column t, found 'inf'"),
    (b"u,i,r,t\n1,2,3,-4\n", r"log.csv:2: expected a time from 1970 to 2100 in column t, found -4, .*time_unit"),
    (b"u,i,r,t\n1,2,3,1600000000000\n", r"log.csv:2: .*found 1600000000000, read as seconds: is it --time_unit=ms\?"),
    (b"u,i,r,t\n1,2,3,4\n1,\xff,3,4\n", r"log.csv:3: not UTF-8 at byte 2 of the line"),
    (b"\xff,i,r,t\n1,2,3,4\n", r"log.csv:1: not UTF-8 at byte 0"),
    (b'u,i,r,t\n1,2,3,4\n1,"3,3,4\n1,4,3,4\n', r"log.csv:3: unexpected end of data"),
    (b"u,i,r,t,is_like\n1,2,3,4,\n", r"log.csv:2: expected a finite number in column is_like, found ''"),
    (gzip.compress(SMALL.encode() * 99, mtime=0)[:-20], r"log.csv: truncated or damaged gzip"),
])
def test_bad_files_are_named_with_their_line(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


@pytest.mark.parametrize("more, message", [
    (dict(col_user=""), r"needs --col_user, .* found none for user"),
    (dict(ties="random"), r"--ties: expected one of 'row', 'shuffle', found 'random'"),
    (dict(dedup="yes"), "--dedup"), (dict(core="double"), "--core"), (dict(missing_time="ignore"), "--missing_time"), (dict(time_unit="us"), "--time_unit"),
    (dict(header=2), "--header"), (dict(min_user=5), "no event is left"),
])
def test_bad_settings(read, more, message):
    with pytest.raises(ValueError, match=message):
        read(SMALL, **more)


def test_a_fault_far_into_a_file_is_found_in_its_line(read, monkeypatch):
    monkeypatch.setattr(interactions, "BLOCK", 64)
    lines = [f"{k},{k % 7},1,{k}" for k in range(500)]
    log = read("\n".join(["u,i,r,t", *lines]))
    assert log.row.tolist() == list(range(500)) and log.item_ids == list("0123456")
    lines[400] = "400,1,x,400"
    with pytest.raises(ValueError, match=r"log.csv:402: .*'x'"):
        read("\n".join(["u,i,r,t", *lines]))
    lines[400], lines[100] = "400,1,1,y", '100,"2",1,100'                                  # from 102 on csv reads
    with pytest.raises(ValueError, match=r"log.csv:402: .*'y'"):
        read("\n".join(["u,i,r,t", *lines]))
    lines[400] = "400,1,1,400"
    assert np.array_equal(read("\n".join(["u,i,r,t", *lines])).item, log.item)


def test_times_in_milliseconds_order_within_a_second(read):
    log = read("u,i,r,t\n1,a,1,1600000000900\n1,b,1,1600000000100\n", time_unit="ms")
    assert log.time.tolist() == [1600000000] * 2 and log.item.tolist() == [2, 1] and "0.0% of a user's" in "\n".join(log.report)


def test_events_without_a_time_can_be_dropped(read):
    log = read("u,i,r,t\n1,a,1, \n1,b,1,7\n2,c,1,nan\n", missing_time="drop")
    assert log.item_ids == ["b"] and log.user_ids == ["1"] and log.row.tolist() == [1] and any(line.startswith("2 events without a time") for line in log.report)


@pytest.mark.parametrize("dedup, rewards_left, dropped", [("first", [1, 2], "1 events dropped"), ("last", [2, 3], "1 events dropped"), ("none", [1, 2, 3], "are kept")])
def test_repeated_items(read, dedup, rewards_left, dropped):
    log = read("u,i,r,t\n1,a,3,9\n1,a,1,1\n1,b,2,2\n", dedup=dedup)
    assert log.reward_raw.tolist() == rewards_left and any(dropped in line and f"dedup={dedup}" in line for line in log.report)


def test_small_users_and_items_are_left_out_once_or_until_none_is_left(read):
    # item c has one event; without it user 3 has one; without that, item b has one; and then user 2 has one
    text = "u,i,r,t\n1,a,1,1\n1,d,1,1\n2,a,1,2\n2,d,1,2\n3,b,1,3\n3,c,1,3\n4,a,1,1\n4,b,1,1\n"
    once, until = read(text, min_user=2, min_item=2), read(text, min_user=2, min_item=2, core="iterative")
    assert once.user_ids == ["1", "2", "3", "4"] and once.item_ids == ["a", "b", "d"] and len(once.item) == 7
    assert until.user_ids == ["1", "2"] and until.item_ids == ["a", "d"]
    assert any("1 events dropped of users with fewer than 2" in line and "3 items left" in line for line in once.report)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4)), min_size=2, max_size=20, unique_by=lambda event: event[:2]), st.randoms())
def test_shuffling_the_file_changes_nothing_but_ties(tmp_path_factory, events, random):
    path = tmp_path_factory.mktemp("shuffled") / "log.csv"

    def found(events, **more):
        path.write_text("u,i,r,t\n" + "".join(f"{u},{i},{u + i},{t}\n" for u, i, t in events))
        return load(f"csv:{path}", **NAMES, **more)

    shuffled = events[:]
    random.shuffle(shuffled)
    log, other = found(events), found(shuffled)
    assert other.user_ids == log.user_ids and other.item_ids == log.item_ids and np.array_equal(other.user, log.user) and np.array_equal(other.time, log.time)
    key = lambda log: Counter(zip(log.user, log.time, log.item, log.reward_raw))
    assert key(log) == key(other) == key(drawn := found(events, ties="shuffle", seed=1))
    for mine in (log, other):                                                              # ties are in the order of the file
        assert (order := list(zip(mine.user, mine.time, mine.row))) == sorted(order)
    assert np.array_equal(drawn.row, found(events, ties="shuffle", seed=1).row)


def test_shuffled_ties_depend_on_the_seed(read):
    text = "u,i,r,t\n" + "".join(f"1,{k},1,5\n" for k in range(30))
    orders = [read(text, ties="shuffle", seed=seed).row.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(30)) != orders[0]


def test_signals_come_in_seconds(read):
    log = read("u,i,r,t,play_time_ms,duration_ms,is_like,comment\n1,a,1,5,1500,60000,1,x\n1,b,0,4,10,5000,0,y\n")
    assert {name: values.tolist() for name, values in log.signals.items()} == {"play": [.01, 1.5], "duration": [5, 60], "is_like": [0, 1]}
    text = "u,i,r,t,depth\n1,a,1,5,7\n"
    assert read(text).signals == {} and read(text, signals="depth").signals["depth"].tolist() == [7] == read(text, signals="4", **NUMBERS).signals["4"].tolist()
    with pytest.raises(ValueError, match="expected one column 'dept' for --signals, .*; did you mean depth"):
        read(text, signals="dept")
    with pytest.raises(ValueError, match="expected one column for each signal, found play, play_time_ms"):
        read("u,i,r,t,play,play_time_ms\n1,a,1,5,7,7\n")


# -----------------------------------------------------------------------------
# Presets


def test_presets_are_found_where_archives_unpack(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPER_DATA", str(tmp_path))
    files = {"ml-1m/ml-1m/ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n", "ml-1m/ml-1m/movies.dat": "1193::Cuckoo::x\n661::Am\u00e9lie::y\n",
             "ml-100k/u.data": "196\t242\t3\t881250949\n", "ml_20m/ratings.csv": "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n",
             "kuairec/KuaiRec 2.0/data/big_matrix.csv":
                 "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n0,3649,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.273\n",
             "kuairand/data/log_random.csv": "user_id,video_id,time_ms,is_click,long_view,is_rand\n0,7,1650600000000,1,0,1\n",
             "kuairand/data/log_standard.csv": "user_id,video_id,time_ms,is_click,long_view,is_rand\n0,8,1650500000000,1,1,0\n",
             "amazon/ratings_Books.csv": "AH2L,0000000116,4.0,1019865600\n",
             "amazon-2023/Books.csv": "user_id,parent_asin,rating,timestamp\nAF,1B,5.0,1642399598485\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    log = load("ml-1m")
    assert log.item_ids == ["661", "1193"] and log.titles == ["Am\u00e9lie", "Cuckoo"] and log.reward_raw.tolist() == [5, 3]
    assert load("ml-100k").time.tolist() == [881250949] and load("ml-20m").reward_raw.tolist() == [3.5]
    log = load("kuairec")
    assert log.time.tolist() == [1593878903] and log.signals["play"].tolist() == [13.838] and log.signals["watch_ratio"].tolist() == [1.273]
    log = load("kuairand")
    assert log.item_ids == ["7", "8"] and log.time.tolist() == [1650500000, 1650600000] and log.row.tolist() == [1, 0] and log.signals["is_rand"].tolist() == [0, 1]
    assert load("kuairand", col_reward="is_click").reward_raw.tolist() == [1, 1]
    log = load("amazon")
    assert log.user_ids == ["AH2L"] and log.item_ids == ["0000000116"] and "    user AH2L, item 0000000116, reward 4.0, time 1019865600" in log.report
    assert load("amazon-2023").time.tolist() == load(f"amazon-2023:{tmp_path}/amazon-2023/Books.csv").time.tolist() == [1642399598]
    (tmp_path / "amazon" / "ratings_Music.csv").write_text("A,B,4.0,1\n")
    with pytest.raises(ValueError, match="expected one log below .*ratings_Books.csv, .*ratings_Music.csv; name one"):
        load("amazon")
    (tmp_path / "ml-100k" / "u.data").unlink()
    (tmp_path / "ml-100k" / "ml-100k.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n")
    assert load("ml-100k").item_ids == ["242"]
    (tmp_path / "ml_20m" / "ratings.csv").write_text("user,movie,stars,when\n1,2,3,4\n")
    with pytest.raises(ValueError, match=r"ratings.csv:1: expected one column 'userId' for --col_user, found the columns 'user', 'movie'"):
        load("ml-20m")


def test_what_is_missing_is_named_with_its_page(tmp_path, monkeypatch):
    monkeypatch.delenv("TEMPER_DATA", raising=False)
    with pytest.raises(ValueError, match=rf"found no ratings.dat or ml-1m.inter in {tmp_path}/ml-1m .*not set.* from https://grouplens.org.*unpack it to {tmp_path}/ml-1m"):
        load("ml-1m", cache=tmp_path)
    with pytest.raises(ValueError, match="expected csv:FILE or a preset; did you mean ml-20m"):
        load("ml-20n")
    with pytest.raises(ValueError, match="expected csv:FILE, found no file"):
        load(f"csv:{tmp_path}/x.csv")


# -----------------------------------------------------------------------------
# Splits


def test_leave_last_out():
    log = made([(1, 1, 1), (2, 1, 2), (3, 1, 2), (1, 1, 9)], [(1, 1, 1), (2, 1, 2)], [(4, 1, 0)], [(1, 1, 5), (2, 1, 6), (5, 1, 7)])
    same, part = split(log)
    assert part.tolist() == [TRAIN, TRAIN, VAL, TEST, TRAIN, TRAIN, TRAIN, TRAIN, VAL, TEST] and part.dtype == np.int8
    assert same.item is log.item and log.report == []
    assert "2 of 4 users have fewer than 3 events" in same.report[0] and "2 validation and test events are of items without a train event: kept" in same.report[1]


def test_cuts_in_time():
    users = [(1, 1, 1), (2, 1, 5), (3, 1, 9)], [(1, 1, 4), (2, 1, 6), (1, 1, 10)], [(3, 1, 7), (1, 1, 9)]
    log, part = split(made(*users), "time", t_val=5, t_test=9)
    assert log.item.tolist() == [1, 1, 1, 1] and part.tolist() == [TRAIN, TRAIN, TEST, TEST] and log.time.tolist() == [1, 4, 10, 9]     # items 2, 3: after 5 alone
    assert "4 validation and test events are of items without a train event: dropped" in log.report[-2] and log.row.tolist() == [0, 3, 5, 7]
    log, part = split(made(*users), "time", t_val=5, t_test=9, cold="miss")
    assert part.tolist() == [TRAIN, VAL, TEST, TRAIN, VAL, TEST, VAL, TEST] and "kept" in log.report[-2]
    for t_val, t_test in ((0, 5), (5, 5), (6, 5), (5, 11), (1, 5)):
        with pytest.raises(ValueError, match="split=time: expected 1 .* 10"):
            split(made(*users), "time", t_val=t_val, t_test=t_test)


@settings(max_examples=100, deadline=None)
@given(LOGS, st.integers(1, 8), st.integers(1, 8), st.integers(1, 5), st.sampled_from(["end", "all"]))
def test_splits_share_no_target_and_batches_agree_with_a_loop(log, a, b, max_length, windows):
    splits = [split(log)]
    if log.time.min() < min(a, b) < max(a, b) <= log.time.max():
        splits += [split(log, "time", t_val=min(a, b), t_test=max(a, b), cold=cold) for cold in ("drop", "miss")]
    for log, part in splits:
        reward = rewards(log, part)
        events = {}
        for which, rows in ((TRAIN, train_rows(log, part, max_length, windows)), (VAL, target_rows(log, part, VAL, max_length)), (TEST, target_rows(log, part, TEST, max_length))):
            assert rows.dtype == np.int64 and rows.shape[1] == 3
            if not len(rows):
                continue
            found = batch(log, reward, rows, range(len(rows)))
            events[which] = found.events[found.events >= 0].tolist()
            assert all(part[event] == which for event in events[which])
            naive(log, reward, rows, found, max_length)
        everything = [event for mine in events.values() for event in mine]
        assert len(everything) == len(set(everything))                                     # each decision once
        place = np.arange(len(part)) - np.searchsorted(log.user, log.user)
        decisions = np.flatnonzero(place > 0) if windows == "all" else np.flatnonzero((place > 0) & (part != TRAIN))
        assert set(decisions) <= set(everything)                                           # and none is missing


def naive(log, reward, rows, found, max_length):
    width = max(end - start for start, end, _ in rows)
    assert [tuple(x.shape) for x in found] == [(len(rows), width), (len(rows), width), (len(rows),)] + [(len(rows), width)] * 4 + [(len(rows),)]
    assert [x.dtype for x in found] == [torch.int64] * 4 + [torch.float32] * 2 + [torch.int64] * 2
    for k, (start, end, first) in enumerate(rows):
        n = end - start - 1
        assert 1 <= n <= max_length and found.lengths[k] == n and found.users[k] == log.user[start] == log.user[end - 1]
        for j in range(width):
            here = start + j
            decided = j < n and here + 1 >= first
            expected = (log.item[here] if j < n else 0, log.time[min(here, end - 1)], log.item[here + 1] if decided else 0,
                        reward[here + 1] if decided else 0, reward[here] if j < n else 0, here + 1 if decided else -1)
            assert expected == tuple(getattr(found, name)[k, j].item() for name in ("items", "times", "targets", "rewards", "past_rewards", "events"))


def test_rows_by_hand():
    log = made([(1, 1, t) for t in range(12)], [(1, 1, 0), (2, 1, 1)], [(3, 1, 0)])
    part = np.array([TRAIN] * 10 + [VAL, TEST] + [TRAIN] * 3, np.int8)
    assert train_rows(log, part, 4).tolist() == [[5, 10, 6], [12, 14, 13]]
    assert train_rows(log, part, 4, "all").tolist() == [[0, 5, 1], [2, 7, 5], [4, 9, 7], [5, 10, 9], [12, 14, 13]]
    assert train_rows(log, part, 100, "all").tolist() == train_rows(log, part, 100).tolist() == [[0, 10, 1], [12, 14, 13]]
    assert target_rows(log, part, VAL, 4).tolist() == [[6, 11, 10]] and target_rows(log, part, TEST, 100).tolist() == [[0, 12, 11]]
    with pytest.raises(ValueError, match="max_length of at least 1"):
        train_rows(log, part, 0, "all")
    found = batch(log, np.arange(15, dtype=np.float32), target_rows(log, part, TEST, 3), [0])
    assert found.times.tolist() == [[8, 9, 10, 11]] and found.targets.tolist() == [[0, 0, 1, 0]] and found.rewards.tolist() == [[0, 0, 11, 0]]
    assert found.past_rewards.tolist() == [[8, 9, 10, 0]] and found.events.tolist() == [[-1, -1, 11, -1]]


def test_seen_items_are_all_before_the_target_but_the_target():
    log = made([(1, 1, 0), (2, 1, 1), (3, 1, 2), (2, 1, 3), (5, 1, 4)], [(4, 1, 0), (1, 1, 1)])
    rows = np.array([[2, 4, 3], [3, 5, 4], [5, 7, 6]])                                     # the histories begin later than the users do
    assert seen(log, rows, [0, 1, 2], 5).tolist() == [[True, False, True, False, False], [True, True, True, False, False], [False, False, False, True, False]]
    assert seen(log, rows, [2], 5).tolist() == [[False, False, False, True, False]]


def test_a_batch_is_cheap():
    log = made(*[[(1 + k % 9, 1, k) for k in range(300)] for _ in range(128)])
    part = np.zeros(len(log.user), np.int8)
    reward, rows = rewards(log, part), train_rows(log, part, 200)

    assert cost(lambda: batch(log, reward, rows, np.arange(128)), enough=5e-3)[1] <= 5e-3                                           # .6 ms on an idle core


# -----------------------------------------------------------------------------
# Rewards


def test_rewards_by_hand():
    log = made([(1, 2, 0), (2, 4, 1), (3, 6, 2)], play=[1, 30, 20], duration=[2, 3, 40], is_like=[1, 0, 1], is_hate=[0, 1, 0])
    part = np.array([TRAIN, TRAIN, TEST], np.int8)
    assert rewards(log, part).tolist() == [2, 4, 6] and rewards(log, part).dtype == np.float32
    assert log.report[-1] == "reward=raw: train mean 3.0000, standard deviation 1.0000"
    assert rewards(log, part, "watch_ratio").tolist() == [.5, 5, .5]
    assert rewards(log, part, "signals:is_like=1,is_hate=-.5").tolist() == [1, -.5, 1]
    assert rewards(log, part, "signals:is_like=4", scale="std").tolist() == [2, 0, 2] and log.report[-1].endswith("2.0000, divided by it")
    for how, message in (("stars", "expected raw, centered, watch_ratio"), ("signals:is_lik=1", "did you mean is_like"), ("signals:is_like", "expected NAME=WEIGHT"),
                         ("signals:is_like=1,is_like=2", "each name once")):
        with pytest.raises(ValueError, match=message):
            rewards(log, part, how)
    with pytest.raises(ValueError, match="all train rewards are 2"):
        rewards(made([(1, 2, 0), (2, 2, 1)]), np.zeros(2, np.int8), scale="std")
    with pytest.raises(ValueError, match="no signal 'play'"):
        rewards(made([(1, 2, 0)]), np.zeros(1, np.int8), "percentile")
    with pytest.raises(ValueError, match="durations above 0, found 0 s in record 2"):
        rewards(made([(1, 2, 0), (2, 2, 0)], play=[1, 1], duration=[1, 0]), np.zeros(2, np.int8), "percentile")


def test_centered_rewards_by_hand():
    """Less the mean of what the same user gave before; the train mean, (5 + 1 + 2) / 3, stands in for a user's first."""
    log = made([(1, 5, 0), (2, 1, 1), (3, 3, 2)], [(1, 2, 0), (2, 4, 1)])
    part = np.array([TRAIN, TRAIN, TEST, TRAIN, TEST], np.int8)
    assert rewards(log, part, "centered").tolist() == pytest.approx([5 - 8 / 3, 1 - 5, 3 - 3, 2 - 8 / 3, 4 - 2])


def test_percentiles_by_hand():
    # bucket 3 (8 to 16 s): user 0 has 2, 4, 4 in train and 3 in test; user 1 has 6. bucket 5: user 1 alone. bucket 7: no train event
    log = made([(1, 0, t) for t in range(5)], [(1, 0, t) for t in range(2)], play=[2, 4, 4, 3, 9, 6, 1], duration=[8, 15.9, 9, 10, 200, 12, 32],
               is_hate=[0, 1, 0, 0, 0, 0, 0])
    part = np.array([TRAIN, TRAIN, TRAIN, TEST, TEST, TRAIN, TRAIN], np.int8)
    own, all_users = np.array([.5 / 3, 2 / 3, 2 / 3, 1 / 3]), np.array([.5 / 4, 2 / 4, 2 / 4, 1 / 4])
    expected = [*((3 * own + 5 * all_users) / 8), .5, (1 * .5 + 5 * 3.5 / 4) / 6, .5]
    assert rewards(log, part, "percentile").tolist() == pytest.approx(expected)
    assert "1 events in buckets of duration without a train event" in log.report[0]
    assert expected[5] > .75 and rewards(log, part, "top25").tolist() == [0, -1, 0, 0, 0, 1, 0]


@settings(max_examples=50, deadline=None)
@given(LOGS, st.data())
def test_percentiles_of_equal_values_are_a_half_and_the_future_changes_none(log, data):
    num = len(log.user)
    draw = lambda: data.draw(st.lists(st.integers(1, 40), min_size=num, max_size=num))
    log, part = split(log._replace(signals={"play": np.full(num, 7.0), "duration": np.array(draw(), float)}))
    assert (rewards(log, part, "percentile") == .5).all()
    play = np.array(draw(), float)
    later = np.where(part == TRAIN, play, play + data.draw(st.integers(-50, 50)))
    for how in ("percentile", "top25", "raw", "centered", "watch_ratio"):
        one, other = (log._replace(signals=log.signals | {"play": values}, reward_raw=values, report=[]) for values in (play, later))
        assert np.array_equal(rewards(one, part, how)[part == TRAIN], rewards(other, part, how)[part == TRAIN]) and one.report[-1] == other.report[-1]
        if (part == TRAIN).any() and rewards(one, part, how)[part == TRAIN].std() > 0:
            assert np.array_equal(rewards(one, part, how, "std")[part == TRAIN], rewards(other, part, how, "std")[part == TRAIN])


def test_a_full_matrix_by_hand():
    """Ids meet by their raw names; what is an event of the log is left out; unknown users and items are counted."""
    log = made([(1, 1, 0), (2, 1, 1)], [(3, 1, 0)])._replace(user_ids=["a", "b"], item_ids=["x", "y", "z"])
    other = made([(2, 1, 0)], [(1, 7, 0), (2, 4, 1), (3, 5, 2), (4, 9, 3)], [(4, 2, 0)])._replace(user_ids=["c", "b", "a"], item_ids=["w", "x", "y", "z"])
    row, table = full_matrix(log, other, other.reward_raw)
    assert row.tolist() == [0, 1] and np.array_equal(table, np.array([[np.nan, np.nan, 2], [4, 5, np.nan]], np.float32), equal_nan=True)
    assert "2 of 6 cells are of users or items that the log has not, 1 are events of the log and left out; 3 are left, of 2 users and 3 items" in log.report[-1]
    row, table = full_matrix(log, made([(1, 7, 0)])._replace(user_ids=["b"], item_ids=["x"]), np.array([7.0]))
    assert row.tolist() == [-1, 0] and np.array_equal(table, np.array([[7, np.nan, np.nan]], np.float32), equal_nan=True)
    for nobody in (dict(user_ids=["q"], item_ids=["x"]), dict(user_ids=["a"], item_ids=["x"])):
        with pytest.raises(ValueError, match="no cell is left"):
            full_matrix(log, made([(1, 7, 0)])._replace(**nobody), np.array([7.0]))


def test_halves_are_stable_and_nested():
    users = [str(k) for k in range(4000)]
    found = half(users, .5)
    assert found.dtype == bool and abs(found.mean() - .5) < .03 and np.array_equal(half(users[::-1], .5)[::-1], found)
    assert not half(users, 0).any() and half(users, 1).all() and (half(users, .3) <= found).all() and not np.array_equal(half(users, .5, salt="folds"), found)
    assert half(list("123456"), .5).tolist() == [True, True, True, False, False, False]            # these users stay where they are, in any version
    with pytest.raises(ValueError, match="share from 0 to 1, found 1.5"):
        half(users, 1.5)


# -----------------------------------------------------------------------------
# Baselines


def test_baselines_by_hand():
    log = made([(1, 1, 0), (2, 5, 1), (1, 2, 2), (3, 4, 3)], [(1, 3, 0), (3, 3, 1)])
    part = np.array([TRAIN, TRAIN, VAL, TEST, TRAIN, TEST], np.int8)
    found, truth = baselines(log, part, rewards(log, part), TEST)
    mean, bias = 3, {1: -2 / 7, 2: 2 / 6, 3: 0}
    assert truth.tolist() == [4, 3] and found["global"].tolist() == [mean, mean] and found["item"].tolist() == [mean, mean]
    assert found["user"].tolist() == pytest.approx([8 / 3, 3])                             # the validation event is in the past of the test event
    past = (1 - mean - bias[1]) + (5 - mean - bias[2]) + (2 - mean - bias[1])
    assert found["user+item"].tolist() == pytest.approx([mean + past / 8, mean + (3 - mean - bias[1]) / 6])
    found, truth = baselines(log, part, rewards(log, part), VAL)
    assert truth.tolist() == [2] and found["item"].tolist() == [2] and found["user"].tolist() == [3]


@staged
def test_latest_small():
    log = load("ml-latest-small")
    assert (len(log.user_ids), len(log.item_ids), len(log.item)) == (610, 9724, 100_836) and log.titles[log.item_ids.index("11")] == "American President, The (1995)"
    same = log.user[1:] == log.user[:-1]
    assert (log.time[1:] == log.time[:-1])[same].mean() == pytest.approx(.158, abs=.0005)
    log, part = split(log)
    reward = rewards(log, part)
    found, truth = baselines(log, part, reward, TEST)
    assert len(truth) == 610 and (truth >= 4.5).sum() == 186
    rmse = {name: np.sqrt(((values - truth) ** 2).mean()) for name, values in found.items()}
    assert rmse == pytest.approx({"global": 1.117, "user": 1.022, "item": 1.054, "user+item": .964}, abs=.002)
    rows = target_rows(log, part, TEST, 200)
    assert np.array_equal(truth, reward[rows[:, 2]]) and seen(log, rows, range(610), 9724).sum() == 100_836 - 610
