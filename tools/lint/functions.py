"""Finds functions and their lengths, well enough for a limit on lines."""

import ast
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Function:
    name: str
    line: int
    lines: int


# What stands before the brace of something that is not a function's body.
NOT_A_FUNCTION = re.compile(r"\b(?:namespace|class|struct|union|enum|extern)\b[^()]*$")
CONTROL = re.compile(r"^(?:else|do|try|if|for|while|switch|catch|return)\b")


def _name_of(head: str) -> str | None:
    """The name of the function that a head such as `int f(int a) const` declares, or None."""
    head = head.strip()
    if "(" not in head or CONTROL.match(head) or NOT_A_FUNCTION.search(head):
        return None
    match = re.search(r"([~\w:]+|operator\s*[^\s(]+)\s*\(", head)
    if not match or head[:match.start()].rstrip().endswith("="):
        return None
    return match.group(1)


def _cpp_functions(code: str) -> list[Function]:
    """Bodies whose enclosing braces are all namespaces or types; lambdas count with their host.

    `code` has no comments and no literals. The preprocessor is read as text: both sides of an #if
    must balance, which the style asks for anyway.
    """
    code = re.sub(r"^[ \t]*#(?:\\\n|[^\n])*", lambda m: re.sub(r"[^\n]", " ", m.group()), code,
                  flags=re.MULTILINE)
    found = []
    open_braces: list[tuple[str | None, int]] = []  # (name of a function or None, line of the head)
    head_start = 0
    for match in re.finditer(r"[{};]", code):
        where = match.start()
        inside = any(name for name, _ in open_braces)
        if match.group() == "{":
            head = code[head_start:where]
            line = code.count("\n", 0, where - len(head.lstrip())) + 1
            open_braces.append((None if inside else _name_of(head), line))
        elif match.group() == "}" and open_braces:
            name, line = open_braces.pop()
            if name:
                found.append(Function(name, line, code.count("\n", 0, where) + 2 - line))
        # Inside a function only its closing brace matters.
        if not any(name for name, _ in open_braces):
            head_start = where + 1
    return found


def _python_functions(text: str) -> list[Function]:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return [Function(f"does not parse: {error.msg}", error.lineno or 0, 10**6)]
    return [Function(node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def long_functions(text: str, language: str, limit: int) -> list[Function]:
    """The functions of more than `limit` lines; `language` is cpp or python."""
    functions = _cpp_functions(text) if language == "cpp" else _python_functions(text)
    return [function for function in functions if function.lines > limit]
