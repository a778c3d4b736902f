"""The command lines as modules: ``python -m blpseg.tools.train_net``. A clone has them in tools/, a wheel here."""

from pathlib import Path

_clone = Path(__file__).resolve().parents[2]
if (_clone / "pyproject.toml").is_file():
    __path__.append(str(_clone / "tools"))
