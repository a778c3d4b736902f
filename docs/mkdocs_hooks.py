"""Hooks of mkdocs: documents outside docs/ become pages too, and links between all of them go on working."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "datasets/README.md": "DATASETS.md",
    "research/README.md": "RESEARCH.md",
    "research/RESULTS.md": "RESEARCH_RESULTS.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CODE_OF_CONDUCT.md": "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_config(config):
    """Leave out of the navigation what this version does not have."""
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} | {*PAGES.values()}
    for section in config.nav:
        for title, entries in section.items():
            if isinstance(entries, list):
                section[title] = [entry for entry in entries if next(iter(entry.values())) in there]
    return config


def on_files(files, config):
    """Add PAGES and the pictures that pages show from elsewhere."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    for name in (*PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        for image, _, link, _ in LINK.findall((ROOT / name).read_text()):
            path = _in_repository(name, link)
            if image and not path.startswith("docs/") and (ROOT / path).is_file():
                if _in_site(path) not in files.src_uris:
                    files.append(File.generated(config, _in_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at pages of the site; a link to a file that is no page becomes plain text."""
    at = {target: source for source, target in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def replace(match):
        image, text, link, fragment = match.groups()
        target = _in_site(_in_repository(at, link))
        if target not in files.src_uris:
            return text
        relative = posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({relative}{fragment or ''})"

    return LINK.sub(replace, markdown)


def _in_repository(document: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(document), link))


def _in_site(path: str) -> str:
    return PAGES.get(path, path.removeprefix("docs/"))
