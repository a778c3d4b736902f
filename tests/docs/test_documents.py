"""The documents' links lead somewhere, and what the code cites exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "datasets/*.md", "research/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
CODE = [
    path
    for folder in ("blpseg", "tools", "research", "datasets", "configs", "tests")
    for suffix in ("py", "yaml")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
]


def anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading: lower case, blanks to hyphens, other punctuation dropped."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    return re.findall(r"^#+ (.+)$", text, flags=re.M)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_resolve(name):
    document = ROOT / name
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (fragment and fragment not in map(anchor, headings(file))):
            broken.append(target)
    assert not broken


def test_every_cited_section_of_the_method_exists():
    sections = set(re.findall(r"^## (\d+)\.", (ROOT / "docs/METHOD.md").read_text(), flags=re.M))
    assert sections == {str(n) for n in range(1, 9)}
    cited = {}
    for path in CODE:
        for group in re.findall(r"METHOD(?:\.md)?(?:'s)? sections? (\d+(?:(?:,| and|, and) \d+)*)", path.read_text()):
            for number in re.findall(r"\d+", group):
                cited.setdefault(number, []).append(path.relative_to(ROOT).as_posix())
    assert cited, "the pattern finds no citation"
    assert not {number: files for number, files in cited.items() if number not in sections}
