"""Fenced code blocks of a document, and a way to run them in order.

In a section, the text below one ``##`` heading,

- a block with a title (```` ```python title="mine.py" ````) is a file to write,
- a ``python`` block without one is executed in a process of its own,
- a ``bash`` block is executed command by command.

Each process is forked from one that has imported BLPSeg already (tests/conftest.py).
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FENCE = re.compile(r"^```(?P<language>\w+)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", flags=re.M | re.S)
TITLE = re.compile(r'title="([^"]+)"')

_context = multiprocessing.get_context("forkserver")


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text that name a language, in order."""
    found = []
    for match in FENCE.finditer(text):
        title = TITLE.search(match["info"])
        found.append(Block(match["language"], title[1] if title else "", match["text"]))
    return found


def sections(path: Path) -> dict[str, list[Block]]:
    """``##`` heading -> its blocks, of the sections that have any."""
    parts = re.split(r"^## (.+)$", path.read_text(), flags=re.M)
    found = dict(zip(parts[1::2], map(blocks, parts[2::2]), strict=True))
    return {heading: its_blocks for heading, its_blocks in found.items() if its_blocks}


def commands(text: str) -> list[list[str]]:
    """The words of each command of a ``bash`` block; comments are left out, lines that end in a backslash joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(section: list[Block], folder: Path, environment: dict[str, str]) -> str:
    """Write and run a section's blocks in ``folder``.

    Args:
        section: of :func:`sections`.
        folder: working directory.
        environment: variables to set.

    Returns:
        what the processes printed, together.

    Raises:
        AssertionError: a block fails; the message has the block and what it printed.
    """
    printed = ""
    for block in section:
        if block.title:
            target = folder / block.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
        elif block.language == "python":
            (folder / "_block.py").write_text(block.text)
            printed += _python(["_block.py"], folder, environment)
        elif block.language == "bash":
            for words in commands(block.text):
                printed += _command(words, folder, environment)
    return printed


def _command(words: list[str], folder: Path, environment: dict[str, str]) -> str:
    if Path(words[0]).name == "python":
        return _python(words[1:], folder, environment)
    result = subprocess.run(
        words, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}"
    return result.stdout


def _python(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    output = folder / "_output.txt"
    process = _context.Process(target=_child, args=(arguments, str(folder), environment, str(output)))
    process.start()
    process.join()
    printed = output.read_text() if output.exists() else ""
    shown = (folder / arguments[0]).read_text() if arguments[0] == "_block.py" else shlex.join(["python", *arguments])
    assert process.exitcode == 0, f"{shown}\n{printed}"
    return printed


def _child(arguments: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.path.insert(0, folder)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
