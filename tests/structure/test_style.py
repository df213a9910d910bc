"""Rules of style that a linter does not know. An exception is listed by name, with its reason."""

from __future__ import annotations

import ast

import pytest

from .sources import CODE, Source, functions, sample, sources

FILE_LINES = 450
FUNCTION_LINES = 60
POSITIONAL_ARGUMENTS = 8
ARGUMENTS = 12

# "path:function" (or "path" for a file) -> why the rule does not fit there.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
MANY_ARGUMENTS: dict[str, str] = {
    "pipelines/tiny.py:build_sd3": "each argument is one size of the tiny model",
}
EXTRA_KEYWORDS: dict[str, str] = {}
BROAD_HANDLERS: dict[str, str] = {
    "flowrl/scoring/deadlines.py:fulfil": "the future that takes the error raises it in the thread that waits for it",
}


def long_files(source: Source) -> list[str]:
    count = len(source.text.splitlines())
    return [f"{source.path}: {count} lines, at most {FILE_LINES}"] if count > FILE_LINES else []


def long_functions(source: Source) -> list[str]:
    found = []
    for name, node in functions(source):
        count = (node.end_lineno or node.lineno) - node.lineno + 1
        if count > FUNCTION_LINES:
            found.append(f"{source.path}:{name}: {count} lines, at most {FUNCTION_LINES}")
    return found


def many_arguments(source: Source) -> list[str]:
    found = []
    for name, node in functions(source):
        positional = [a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        total = len(positional) + len(node.args.kwonlyargs)
        if len(positional) > POSITIONAL_ARGUMENTS or total > ARGUMENTS:
            found.append(
                f"{source.path}:{name}: {len(positional)} positional arguments (at most {POSITIONAL_ARGUMENTS}), "
                f"{total} in all (at most {ARGUMENTS})"
            )
    return found


def extra_keywords(source: Source) -> list[str]:
    """A function that takes ``**kwargs`` swallows a misspelt name, or hands it to something that may."""
    return [
        f"{source.path}:{name}: takes **{node.args.kwarg.arg}" for name, node in functions(source) if node.args.kwarg
    ]


def prints(source: Source) -> list[str]:
    return [
        f"{source.path}:{node.lineno}: print"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def asserts(source: Source) -> list[str]:
    return [
        f"{source.path}:{n.lineno}: assert, which -O removes; raise"
        for n in ast.walk(source.tree)
        if isinstance(n, ast.Assert)
    ]


def broad_handlers(source: Source) -> list[str]:
    """``except:``, ``except Exception`` and ``except BaseException`` that end without raising."""
    owner = {}
    for name, node in functions(source):  # an inner function comes after its outer one, and takes its nodes over
        owner.update({child: name for child in ast.walk(node)})
    return [
        f"{source.path}:{owner.get(node, '<module>')}: line {node.lineno} swallows every error"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node) and not _raises(node)
    ]


def _is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException") for kind in types)


def _raises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(child, ast.Raise) for statement in handler.body for child in ast.walk(statement))


RULES = {
    "long files": (long_files, CODE, LONG_FILES),
    "long functions": (long_functions, (*CODE, "scripts"), LONG_FUNCTIONS),
    "many arguments": (many_arguments, CODE, MANY_ARGUMENTS),
    "extra keywords": (extra_keywords, CODE, EXTRA_KEYWORDS),
    "prints": (prints, CODE, {}),
    "asserts": (asserts, CODE, {}),
    "broad handlers": (broad_handlers, (*CODE, "scripts"), BROAD_HANDLERS),
}


def excused(line: str, exceptions: dict[str, str]) -> bool:
    return any(line.startswith(f"{name}: ") for name in exceptions)


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds(rule: str) -> None:
    check, folders, exceptions = RULES[rule]
    found = [line for source in sources(*folders) for line in check(source) if not excused(line, exceptions)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("rule", RULES)
def test_every_exception_is_still_needed(rule: str) -> None:
    check, folders, exceptions = RULES[rule]
    found = [line for source in sources(*folders) for line in check(source)]
    stale = [name for name in exceptions if not any(line.startswith(f"{name}: ") for line in found)]
    assert not stale, f"no longer needed: {', '.join(stale)}"
    assert all(exceptions.values())


BODY = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
TEN = ", ".join(f"a{i}" for i in range(10))
THIRTEEN = ", ".join(f"a{i}" for i in range(13))


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("long files", "x = 1\n" * (FILE_LINES + 1), "x = 1\n" * FILE_LINES),
        ("long functions", f"def f():\n{BODY}", f"def f():\n{BODY}".rsplit("\n", 1)[0]),
        ("many arguments", f"def f({TEN}): ...", f"def f(self, *, {TEN}): ..."),
        ("many arguments", f"class A:\n    def f(self, *, {THIRTEEN}): ...", "def f(): ..."),
        ("extra keywords", "def f(**options): g(**options)", "def f(): g(**{})"),
        ("prints", "print('x')", "self.print('x')"),
        ("asserts", "assert x", "raise ValueError"),
        ("broad handlers", "try: f()\nexcept: pass", "try: f()\nexcept OSError: pass"),
        ("broad handlers", "try: f()\nexcept (OSError, Exception): pass", "try: f()\nexcept Exception: raise"),
    ],
)  # fmt: skip
def test_the_rules_see_a_violation(rule: str, bad: str, good: str) -> None:
    check = RULES[rule][0]
    assert len(check(sample(bad, "flowrl/x.py"))) == 1
    assert check(sample(good, "flowrl/x.py")) == []


def test_an_exception_excuses_one_function_only() -> None:
    assert excused("flowrl/x.py:f: 99 lines", {"flowrl/x.py:f": "why"})
    assert not excused("flowrl/x.py:f.g: 99 lines", {"flowrl/x.py:f": "why"})
