"""Bounds on pickles: what a file would cost to unpickle, found from its opcodes before anything is built.

The unpicklers of :mod:`.weights_files` decide what may be called. They do not bound time and memory: 128 bytes can hash
a tuple of 2^60 nodes, a long chain of tuples overflows C's stack, integers of equal hash make a dict quadratic, and a
memo index of 2^32 allocates a table of that size.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterable
from typing import IO, Any

from .errors import BLPSegError, describe

MAX_OPCODES = 500_000  # the checkpoint of a ResNet-101 has 60,000
MAX_DEPTH = 100
LARGE = 1 << 31  # smaller integers do not share a hash

_SCALAR = object()  # text, bytes, a small number, True, None: a cheap key
_LARGE_INTEGER = object()
_PAIRED = {"OrderedDict", "dict", "defaultdict"}  # calls that hash the first of each pair
_HASHED = _PAIRED | {"Counter", "set", "frozenset"}


class _TooMuch(Exception):
    pass


class _Node:
    """A container, a global (with its ``name``), or what a call gives; ``items`` are its values."""

    __slots__ = ("items", "depth", "name")

    def __init__(self, items: Iterable = (), name: str = ""):
        self.items: list = []
        self.depth = 1
        self.name = name
        self.add(items)

    def add(self, items: Iterable) -> None:
        self.items += items
        self.depth = max(self.depth, 1 + max((x.depth for x in items if isinstance(x, _Node)), default=0))
        if self.depth > MAX_DEPTH:
            raise _TooMuch(f"nested deeper than {MAX_DEPTH}")


def check_pickle(file: IO[bytes], path: str) -> None:
    """Read the opcodes of one pickle from ``file``, which is left behind its end.

    Raises:
        BLPSegError: it is no pickle, cut short, or costs more than weights can. The message begins with ``path``.
    """
    try:
        _Machine().run(file)
    except _TooMuch as error:
        raise BLPSegError(f"{path}: refused, no weights file is made like this ({error})") from error
    except (ValueError, LookupError, AttributeError, OverflowError, MemoryError) as error:
        raise BLPSegError(
            f"{path}: not a weights file, or cut short ({describe(error)[:80]}); fetch it again"
        ) from error


def _check_keys(keys) -> None:
    for key in keys:
        if key is not _SCALAR and not isinstance(key, str):
            raise _TooMuch("a key that is neither text nor a small number")


class _Machine:
    """Pickle's stack machine over :class:`_Node` and scalars: nothing is imported, called or hashed."""

    def __init__(self) -> None:
        self.stack: list = []
        self.marks: list[list] = []  # the stacks below each mark
        self.memo: dict[int, object] = {}

    def run(self, file: IO[bytes]) -> None:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count > MAX_OPCODES:
                raise _TooMuch(f"more than {MAX_OPCODES} pickle operations")
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
                raise _TooMuch(f"memo index {argument}")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"pickle operation {opcode.name}")
            step(self, argument)

    def items(self, count: int | None = None) -> list:
        """Take the last ``count`` values, or those since the mark, from the stack."""
        if count is None:
            items, self.stack = self.stack, self.marks.pop()
            return items
        return [self.stack.pop() for _ in range(count)][::-1]

    def mark(self, _) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def scalar(self, value) -> None:
        if isinstance(value, str) and len(value) <= 200:
            self.stack.append(value)  # it may name a global
        else:
            self.stack.append(_LARGE_INTEGER if isinstance(value, int) and abs(value) >= LARGE else _SCALAR)

    def put(self, index) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def add(self, items: list, keys=()) -> None:
        _check_keys(keys)
        self.stack[-1].add(items)

    def set_items(self, pairs: list) -> None:
        self.add(pairs[1::2], pairs[::2])

    def add_members(self, _) -> None:
        members = self.items()
        self.add(members, members)

    def sequence(self, _, count: int | None = None) -> None:
        items = self.items(count)  # before the stack is looked at: taking them changes it
        self.stack.append(_Node(items))

    def dict(self, _) -> None:
        pairs = self.items()
        self.stack.append(_Node())
        self.set_items(pairs)

    def frozenset(self, _) -> None:
        items = self.items()
        _check_keys(items)
        self.stack.append(_Node(items))

    def stack_global(self, _) -> None:
        _, name = self.items(2)
        self.stack.append(_Node(name=str(name)))

    def call(self, _) -> None:
        function, arguments = self.items(2)
        if function.name in _HASHED:
            for item in (item for iterable in arguments.items for item in getattr(iterable, "items", ())):
                pair = function.name in _PAIRED and isinstance(item, _Node)
                _check_keys(item.items[:1] if pair else [item])
        self.stack.append(_Node([arguments]))

    def storage(self, _) -> None:
        """A tensor's storage, which torch looks up by the items of a tuple."""
        (identity,) = self.items(1)
        if any(isinstance(item, _Node) and not item.name for item in getattr(identity, "items", ())):
            raise _TooMuch("a storage named by more than plain values")
        self.stack.append(_Node())


_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2"), _Machine.scalar),
    **dict.fromkeys(("LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"), _Machine.scalar),
    **dict.fromkeys(("SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"), _Machine.scalar),
    **dict.fromkeys(("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.scalar),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_DICT", "EMPTY_SET"), lambda m, _: m.stack.append(_Node())),
    **dict.fromkeys(("LIST", "TUPLE"), _Machine.sequence),
    "TUPLE1": lambda m, _: m.sequence(_, 1),
    "TUPLE2": lambda m, _: m.sequence(_, 2),
    "TUPLE3": lambda m, _: m.sequence(_, 3),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.stack.append(m.memo[index])),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    **dict.fromkeys(("APPEND", "BUILD"), lambda m, _: m.add(m.items(1))),
    "APPENDS": lambda m, _: m.add(m.items()),
    "ADDITEMS": _Machine.add_members,
    "SETITEM": lambda m, _: m.set_items(m.items(2)),
    "SETITEMS": lambda m, _: m.set_items(m.items()),
    "DICT": _Machine.dict,
    "FROZENSET": _Machine.frozenset,
    "MARK": _Machine.mark,
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.items(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "GLOBAL": lambda m, name: m.stack.append(_Node(name=name.rsplit(" ", 1)[-1])),
    "STACK_GLOBAL": _Machine.stack_global,
    "BINPERSID": _Machine.storage,
}
