import sysconfig

import pytest

from data import stdlib


def test_splits_cover_the_library_and_do_not_overlap():
    train, val = (dict(stdlib.files(split)) for split in ("train", "val"))
    assert not set(train) & set(val) and "argparse.py" in train and list(train) == sorted(train)
    share = sum(map(len, val.values())) / sum(map(len, train.values()))
    assert 0.01 < share < 0.12 and sum(map(len, train.values())) > 5_000_000
    for name, text in (train | val).items():
        assert text.strip() and "\r" not in text and not {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))


def test_same_again():
    assert list(stdlib.files("val")) == list(stdlib.files("val"))


def test_split_is_a_hash_of_the_name_alone():
    # pinned: a change would move files between train and val of models that exist
    assert [name for name in ("argparse.py", "json/decoder.py", "_sitebuiltins.py", "distutils/dist.py")
            if stdlib.split_of(name) == "val"] == ["_sitebuiltins.py", "distutils/dist.py"]
    share = sum(stdlib.split_of(f"{i}.py") == "val" for i in range(20_000)) / 20_000
    assert abs(share - 0.05) < 0.006


def test_encodings_by_pep_263(tmp_path):
    for content, text in ((b"# caf\xc3\xa9\r\nx = 1\r", "# café\nx = 1\n"),
                          (b"\xef\xbb\xbfx = 1\n", "x = 1\n"),
                          (b"# -*- coding: latin-1 -*-\n# caf\xe9\n", "# -*- coding: latin-1 -*-\n# café\n"),
                          (b"#!/usr/bin/python\n# vim: set fileencoding=euc-kr :\n# \xb0\xa1\n",
                           "#!/usr/bin/python\n# vim: set fileencoding=euc-kr :\n# 가\n")):
        (tmp_path / "a.py").write_bytes(content)
        assert stdlib.read_source(tmp_path / "a.py") == text
    for content in (b"# caf\xe9\n", b"# coding: no-such-codec\n", b"\n\n# coding: latin-1\n# \xe9\n"):  # line 3 declares nothing
        (tmp_path / "a.py").write_bytes(content)
        with pytest.raises((SyntaxError, UnicodeDecodeError)):
            stdlib.read_source(tmp_path / "a.py")


def test_skips_what_is_not_the_library(tmp_path, monkeypatch):
    for name in ("b.py", "a/c.py", "a/tests/d.py", "site-packages/e.py", "config-3.11/f.py", "g.txt", "empty.py", "encodings/h.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.py" else "x\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(stdlib, "split_of", lambda name: "train")
    assert list(stdlib.files("train")) == [("a/c.py", "x\n"), ("b.py", "x\n")] and list(stdlib.files("val")) == []


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected split train or val, found 'test'"):
        list(stdlib.files("test"))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="expected Python sources"):
        list(stdlib.files("train"))
