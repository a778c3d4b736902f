"""What mkdocstrings shows of our docstrings: Sphinx's roles as code, and names that share a description apart."""

import re

import griffe

ROLE = re.compile(r":\w+:`~?([^`]+)`")
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): ", flags=re.M)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value).replace("::\n", ":\n")
            obj.docstring.value = SHARED.sub(_apart, text)


def _apart(match):
    indent, names = match[1], match[2].split(", ")
    return "".join(f"{indent}{name}: like `{names[-1]}`.\n" for name in names[:-1]) + f"{indent}{names[-1]}: "
