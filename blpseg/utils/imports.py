"""Work that waits until another package is imported, so that importing ours does not load it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def when_imported(name: str, callback: Callable[[], object]) -> None:
    """Call ``callback`` once the module ``name`` has been imported: now if it has been, else right after its code ran.
    What it raises ends the import."""
    if name in sys.modules:
        callback()
    else:
        _FINDER.waiting.setdefault(name, []).append(callback)
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and makes its loader run the callbacks after the module's own code."""

    def __init__(self):
        self.waiting: dict[str, list[Callable[[], object]]] = {}

    def find_spec(self, name, path, target=None):
        if name not in self.waiting:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_call(module):
                run(module)
                for callback in self.waiting.pop(name, ()):
                    callback()

            spec.loader.exec_module = run_then_call
        return spec


_FINDER = _Finder()
