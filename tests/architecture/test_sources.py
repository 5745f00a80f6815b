"""Rules of the tree that no linter knows. Each reads the sources, not the running program."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("sandboxd", "agent/e80_agent", "sdk/e80_sdk", "sdk/e80_cli")
MAX_LINES = 600
MAX_TEST_LINES = 800
MAX_FUNCTION_LINES = 80
ENVIRONMENT_READER = Path("sandboxd/kit/settings.py")
ENVIRONMENT_CALLS = {"getenv", "putenv", "environb"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def shown(path: Path, node: ast.AST | None = None) -> str:
    name = str(path.relative_to(ROOT))
    return f"{name}:{node.lineno}" if node is not None else name


def imported_roots(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [(node.module or "").partition(".")[0]]
    return []


def test_the_tree_is_where_these_tests_look():
    assert [folder for folder in PACKAGES[:3] if not sources(folder)] == []


def test_the_agent_uses_the_standard_library_only():
    allowed = sys.stdlib_module_names | {"e80_agent"}
    # Runs in sandboxes whose image has IPython, and nowhere else.
    beyond = {"notebook.py": {"IPython", "traitlets"}}
    wrong = [
        f"{shown(path, node)} imports {root}"
        for path in sources("agent/e80_agent")
        for node in ast.walk(tree_of(path))
        for root in imported_roots(node)
        if root not in allowed | beyond.get(path.name, set())
    ]
    assert wrong == []


def test_the_agent_is_python_3_8():
    for path in sources("agent/e80_agent"):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 8))


def test_files_stay_readable():
    long = [
        f"{shown(path)}: {lines} lines"
        for folders, limit in ((PACKAGES, MAX_LINES), (("tests",), MAX_TEST_LINES))
        for path in sources(*folders)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > limit
    ]
    assert long == []


def test_functions_stay_readable():
    long = [
        f"{shown(path, node)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in sources(*PACKAGES)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_only_the_settings_read_the_environment_of_the_daemon():
    readers = [
        shown(path, node)
        for path in sources("sandboxd")
        if path.relative_to(ROOT) != ENVIRONMENT_READER
        for node in ast.walk(tree_of(path))
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and node.attr in {"environ", *ENVIRONMENT_CALLS}
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {alias.name for alias in node.names} & {"environ", *ENVIRONMENT_CALLS}
        )
    ]
    assert readers == []


def swallows(handler: ast.ExceptHandler) -> bool:
    """Whether a handler takes everything and says nothing."""
    names = (
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else set()
    )
    broad = handler.type is None or bool(names & {"Exception", "BaseException"})
    silent = all(isinstance(step, ast.Pass | ast.Continue) for step in handler.body)
    return broad and silent


def test_no_handler_swallows_everything_in_silence():
    silent = [
        shown(path, node)
        for path in sources("sandboxd", "sdk/e80_sdk", "sdk/e80_cli")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and swallows(node)
    ]
    assert silent == []


def test_every_module_says_what_it_owns():
    silent = [
        shown(path)
        for path in sources("sandboxd", "agent/e80_agent", "sdk/e80_sdk", "sdk/e80_cli")
        if not ast.get_docstring(tree_of(path))
    ]
    assert silent == []


def is_bare_task(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"create_task", "ensure_future"}
        and not (isinstance(node.func.value, ast.Name) and "group" in node.func.value.id)
    )


def cancelled_in_finally(function: ast.AST) -> set[str]:
    return {
        call.func.value.id
        for block in ast.walk(function)
        if isinstance(block, ast.Try)
        for step in block.finalbody
        for call in ast.walk(step)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "cancel"
        and isinstance(call.func.value, ast.Name)
    }


def test_no_task_without_an_owner():
    """A task is started by kit/tasks.py, by a TaskGroup, or by a function that cancels it in a `finally`."""
    bare = []
    for path in sources("sandboxd"):
        if path == ROOT / "sandboxd/kit/tasks.py":
            continue
        tree = tree_of(path)
        owned = {
            id(step.value)
            for function in ast.walk(tree)
            if isinstance(function, ast.AsyncFunctionDef | ast.FunctionDef)
            for step in ast.walk(function)
            if isinstance(step, ast.Assign)
            and isinstance(step.targets[0], ast.Name)
            and step.targets[0].id in cancelled_in_finally(function)
        }
        bare += [shown(path, node) for node in ast.walk(tree) if is_bare_task(node) and id(node) not in owned]
    assert bare == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("try: f()\nexcept Exception: pass", True),
        ("try: f()\nexcept: pass", True),
        ("try: f()\nexcept (OSError, BaseException): pass", True),
        ("try: f()\nexcept OSError: pass", False),
        ("try: f()\nexcept Exception: log()", False),
    ],
)
def test_the_rule_about_silence_itself(source, expected):
    (handler,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler))
    assert swallows(handler) is expected
