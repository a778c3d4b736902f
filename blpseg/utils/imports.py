"""Imports that wait: work of ours for another package, and torch.compile for the first who compiles."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader
from types import ModuleType


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


def defer_compiler() -> None:
    """Load ``torch._dynamo``, half of what PyTorch and Detectron2 load, only where something is compiled.

    torchvision imports it for a function that a compiled ``roi_align`` asks, optimisers to be left out of graphs,
    Detectron2's convolutions to ask whether they are being compiled. For these, stand-ins do; any other name and
    any other module of the package loads the real one. Does nothing if that is loaded already.
    """
    when_imported("torch", _place_stand_ins)


def _place_stand_ins() -> None:
    if "torch._dynamo" in sys.modules:
        return
    package, utils = _StandIn("torch._dynamo"), _StandIn("torch._dynamo.utils")
    vars(package).update(
        __path__=[],  # its modules are found by _RealModules
        disable=lambda function, *_, **__: function,
        graph_break=lambda *_, **__: None,
        is_compiling=lambda: False,
    )
    vars(utils).update(is_compile_supported=lambda *args: _real("torch._dynamo.utils").is_compile_supported(*args))
    sys.modules |= {module.__name__: module for module in (package, utils)}
    sys.meta_path.insert(0, _RealModules())


def _real(name: str) -> ModuleType:
    """The module of that name, for which no stand-in stands any more."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _RealModules)]
    for other, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[other]
    importlib.import_module("torch._dynamo")
    return importlib.import_module(name)


class _StandIn(ModuleType):
    """A module that is loaded when more than its own few names are asked for."""

    def __getattr__(self, name: str):
        if name.startswith("__"):  # of those who look through all modules
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


class _RealModules(MetaPathFinder, Loader):
    """Finds the modules of the package whose stand-in has no path."""

    def find_spec(self, name, path, target=None):
        if not name.startswith("torch._dynamo."):
            return None
        _real(name)
        return spec_from_loader(name, self)

    def create_module(self, spec):
        return sys.modules[spec.name]

    def exec_module(self, module):
        """It ran when it was found."""
