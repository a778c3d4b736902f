"""Every command in the documents is one that the command lines accept: flags, positions, config keys and values."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from blpseg import get_cfg
from blpseg.utils.cli import _CONSOLE

from .snippets import commands

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "datasets/README.md")),
    *sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("research/*.md")]),
]
FENCED = re.compile(r"^```(?:bash|sh)\n(.*?)^```", flags=re.M | re.S)
INDENTED = re.compile(r"(?:^ {4}.*\n|^\n(?= {4}))+", flags=re.M)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


class Parsed(BaseException):
    """Raised instead of running the command."""


def found_commands(document: Path) -> list[list[str]]:
    """Commands of ours in a document's code blocks, without the interpreter and variables before them."""
    text = document.read_text()
    code = FENCED.findall(text)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    code += [re.sub(r"^ {4}", "", block, flags=re.M) for block in INDENTED.findall(rest)]
    found = []
    for block in code:
        try:
            lines = commands(block)
        except ValueError:  # a formula or a tree, with an apostrophe
            continue
        for words in lines:
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            while words and Path(words[0]).name in ("python", "python3", "torchrun", "-W", "ignore"):
                words = words[1:]
            usage = any(word.startswith("[-") or word in ("...", "...]") or "$(" in word for word in words)
            if words and not usage and (script(words) or words[0] == "make"):
                found.append(words)
    return found


def script(words: list[str]) -> str:
    """The path of the script that a command runs, "" if it is none of ours."""
    if words[0] == "-m" and len(words) > 1:
        name = words[1].removeprefix("blpseg.").replace("prepare.", "datasets.")
        return f"{name.replace('.', '/')}.py" if words[1].startswith("blpseg.") else ""
    if words[0] in _CONSOLE:
        return _CONSOLE[words[0]].replace("prepare.", "datasets.").replace(".", "/") + ".py"
    return words[0] if re.fullmatch(r"(tools|datasets|research)/\w+\.py", words[0]) else ""


CASES = [(document, words) for document in DOCUMENTS for words in found_commands(document)]


@pytest.mark.parametrize(
    ("document", "words"), CASES, ids=[f"{document.name}: {shlex.join(words)[:70]}" for document, words in CASES]
)
def test_command_is_accepted(document, words, monkeypatch, capsys):
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        assert set(targets) <= TARGETS
        return
    arguments = words[2:] if words[0] == "-m" else words[1:]
    options = parse(script(words), arguments, monkeypatch, capsys)
    file = getattr(options, "config_file", None) or ""
    pairs = getattr(options, "opts", None) or []
    if not (ROOT / file).is_file():
        file = ""  # the reader's own
    get_cfg(str(ROOT / file) if file else "", pairs)


def parse(name, arguments, monkeypatch, capsys) -> argparse.Namespace:
    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, stop_after(getattr(argparse.ArgumentParser, method)))
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises((Parsed, SystemExit)) as end:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert end.type is Parsed, capsys.readouterr().err
    return end.value.args[0]


def stop_after(method):
    def parse_and_stop(self, *args, **kwargs):
        raise Parsed(method(self, *args, **kwargs))

    return parse_and_stop


def test_there_are_commands_in_every_guide():
    names = {document.name for document, _ in CASES}
    assert {"README.md", "GETTING_STARTED.md", "TRAINING.md", "EVALUATION.md", "DATA.md"} <= names
    assert len(CASES) > 40


def test_a_wrong_flag_is_found(monkeypatch, capsys):
    with pytest.raises(AssertionError, match="unrecognized arguments: --rew"):
        parse("tools/demo.py", ["--config-file", "C", "--input", "a", "--output", "b", "--rew"], monkeypatch, capsys)
