"""The documentation site builds without a warning."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_site(root, tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'blpseg[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme advertises its successor
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "WARNING" not in result.stderr, result.stderr
    page = (tmp_path / "site/reference/data/index.html").read_text()
    assert "register_split" in page and ":func:" not in page
    assert 'href="EXTENDING/"' in (tmp_path / "site/index.html").read_text(), "links of the README lead to pages"
