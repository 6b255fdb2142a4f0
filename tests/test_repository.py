"""What the README says exists, imports go down only, and nothing runs code that it read."""
import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for folder in (".", "data", "kernels", "runs") for p in (ROOT / folder).glob("*.py"))
# a module may import from its own level and from lower ones
LEVELS = {"common": 0, "kernels": 0, "model": 1, "tokenizer": 1, "engine": 2, "data": 2, "checkpoint": 2}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = path.stem if path.parent == ROOT else path.parent.name
    local = {p.stem for p in ROOT.glob("*.py")} | {"data", "kernels"}
    for name in set(imports(path)) & local - {own}:
        assert LEVELS.get(name, 3) <= LEVELS.get(own, 3), f"{own} imports {name}"
        assert not name.startswith("train_") or own == "bench", f"{own} imports a train script"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_what_it_read(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "compile"), called
            if called == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords)


def test_readme_names_files_and_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`([\w./]+\.(?:py|sh|md))`", text) + re.findall(r"\]\(([\w./]+)\)", text):
        if not name.startswith("out/") and name not in ("report.md", "train_x.py"):
            assert (ROOT / name).exists(), name
    commands = [line.strip().rstrip("\\") for line in text.splitlines() if re.match(r"    .*python\S* \w+\.py", line)]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.partition("#")[0])
        script = next(w for w in words if w.endswith(".py"))
        fields = set(re.findall(r"^    (\w+): ", (ROOT / script).read_text(), re.M))
        for word in words[words.index(script) + 1:]:
            if word.startswith("--"):
                assert word[2:].partition("=")[0] in fields, f"{script} has no {word}"
    make = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in make for target in re.findall(r"make (\w+)  ", text))


def test_no_top_level_file_hides_a_standard_module():
    import sys
    assert not {p.stem for p in ROOT.glob("*.py")} & set(sys.stdlib_module_names)
