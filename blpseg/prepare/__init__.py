"""The commands that prepare data: ``python -m blpseg.prepare.make_synthetic``. A clone has them in datasets/."""

from pathlib import Path

_clone = Path(__file__).resolve().parents[2]
if (_clone / "pyproject.toml").is_file():
    __path__.append(str(_clone / "datasets"))
