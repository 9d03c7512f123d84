#!/usr/bin/env python3
"""Rules on the text of the tree that no compiler checks.

    lint.py [ROOT] [--lower-ratchet]

Limits that the tree still exceeds are ratchets (tools/lint/ratchet.json): the recorded number may
fall, never rise. --lower-ratchet records the present numbers when they are lower.
"""

import json
import os
import re
import stat
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from functions import long_functions  # noqa: E402
from tree import Problem, files_of, report, text_of  # noqa: E402

LINE_COLUMNS_MAX = 100
FUNCTION_LINES_GOAL = 50
FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 500
BLOB_BYTES_MAX = 512 * 1024

CPP = {".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh", ".inc"}
CODE = CPP | {".py", ".sh", ".cmake"}

# Some patterns are written in two halves so that this file does not match itself.
MARKER_NO_ISSUE = re.compile(r"\bTO" r"DO\b(?!\(#\d+\))")
MARKER_FIX = re.compile(r"\bFIX" r"ME\b|\bXX" r"X\b")
BANNED_CALLS = re.compile(
    r"(?<![\w.>])(?:std::|::)?(strcpy|strcat|sprintf|vsprintf|gets|rand|srand|system|atoi|atol|"
    r"strtok|alloca|tmpnam|mktemp)\s*\(")
THROW = re.compile(r"\bthrow\b(?!\(\))")
USING_NAMESPACE = re.compile(r"\busing\s+namespace\s+(?!(?:std::)?(?:\w+::)*\w*literals\s*;)")
SHARED_PTR = re.compile(r"\bstd::(?:shared_ptr|make_shared)\b")
SHARED_PTR_TEXT = "{}: one owner here, or a reason on the line (// shared: ...)"
# Places that exist on one machine only.
MACHINE_PATHS = re.compile(
    r"(?<![\w.-])/(?:wor" r"k/|tmp/b" r"-|tmp/bri" r"ef|opt/whe" r"els|srv/" r"w/|ro" r"ot/|"
    r"ho" r"me/\w)")
MARKDOWN_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def blank_comments_and_strings(text: str) -> str:
    """C++ text of the same shape in which comments and literals are spaces."""
    pattern = re.compile(
        r'//[^\n]*|/\*.*?\*/|R"(?P<d>[^(\s]{0,16})\(.*?\)(?P=d)"|"(?:\\.|[^"\\\n])*"|'
        r"(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'", re.DOTALL)
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def matches(path: Path, text: str, pattern: re.Pattern[str], message: str) -> list[Problem]:
    return [Problem(str(path), text.count("\n", 0, match.start()) + 1,
                    message.format(match.group().strip())) for match in pattern.finditer(text)]


def check_lines(path: Path, text: str) -> list[Problem]:
    problems = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if len(line) > LINE_COLUMNS_MAX:
            problems.append(Problem(str(path), number,
                                    f"{len(line)} columns (at most {LINE_COLUMNS_MAX})"))
        if line != line.rstrip():
            problems.append(Problem(str(path), number, "white space at the end of the line"))
        if "\t" in line:
            problems.append(Problem(str(path), number, "a tab"))
    if len(lines) > FILE_LINES_MAX:
        problems.append(Problem(str(path), 0, f"{len(lines)} lines (at most {FILE_LINES_MAX})"))
    return problems


def check_cpp(path: Path, text: str) -> list[Problem]:
    code = blank_comments_and_strings(text)
    problems = matches(path, code, BANNED_CALLS, "banned call: {}")
    problems += matches(path, code, THROW, "errors are values here: {}")
    problems += matches(path, code, USING_NAMESPACE, "{}: name what is used")
    if path.parts[0] not in ("tests", "tools"):
        problems += [problem for problem in matches(path, code, SHARED_PTR, SHARED_PTR_TEXT)
                     if "// shared:" not in text.splitlines()[problem.line - 1]]
    if path.suffix in (".h", ".hpp") and "#pragma once" not in text and "#ifndef" not in text:
        problems.append(Problem(str(path), 1, "a header without a guard"))
    return problems


def check_text(path: Path, text: str) -> list[Problem]:
    problems = matches(path, text, MARKER_NO_ISSUE, "{} without an issue: write it with (#N)")
    problems += matches(path, text, MARKER_FIX, "{} left over")
    return problems + matches(path, text, MACHINE_PATHS, "a path of one machine: {}")


def check_links(root: Path, path: Path, text: str) -> list[Problem]:
    prose = re.sub(r"```.*?```", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", lambda match: " " * len(match.group()), prose)
    problems = []
    for match in MARKDOWN_LINK.finditer(prose):
        target = (match.group(1) or match.group(2)).split("#")[0]
        if not target or re.match(r"[a-z]+:", target):
            continue
        if not (root / path.parent / target).exists():
            line = prose.count("\n", 0, match.start()) + 1
            problems.append(Problem(str(path), line, f"link to nothing: {target}"))
    return problems


def check_file(root: Path, path: Path) -> list[Problem]:
    """Mode and size, which concern files of every kind."""
    full = root / path
    state = full.lstat()
    problems = []
    if state.st_size > BLOB_BYTES_MAX:
        problems.append(Problem(str(path), 0, f"{state.st_size} bytes (at most {BLOB_BYTES_MAX})"))
    if stat.S_ISREG(state.st_mode):
        with full.open("rb") as file:
            script = file.read(2) == b"#!"
        executable = bool(state.st_mode & stat.S_IXUSR)
        if script != executable:
            what = "a script that is not executable" if script else "executable, but no script"
            problems.append(Problem(str(path), 1, what))
    return problems


def ratchet(root: Path, counts: dict[str, int], lower: bool) -> list[Problem]:
    file = root / "tools/lint/ratchet.json"
    allowed = json.loads(file.read_text()) if file.exists() else {}
    if lower:
        allowed = {name: min(count, allowed.get(name, count)) for name, count in counts.items()}
        file.write_text(json.dumps(allowed, indent=2, sort_keys=True) + "\n")
    return [Problem("tools/lint/ratchet.json", 0,
                    f"{name}: {count}, at most {allowed.get(name, 0)}")
            for name, count in counts.items() if count > allowed.get(name, 0)]


def check(root: Path, lower: bool = False) -> list[Problem]:
    problems: list[Problem] = []
    over_goal = []
    for path in files_of(root):
        problems += check_file(root, path)
        text = text_of(root / path)
        if text is None or path.name == "LICENSE":
            continue
        problems += check_text(path, text)
        script = text.startswith("#!")
        if path.suffix in CODE or path.name == "CMakeLists.txt" or script:
            problems += check_lines(path, text)
        if path.suffix in CPP:
            problems += check_cpp(path, text)
        if path.suffix == ".md":
            problems += check_links(root, path, text)
        language = "cpp" if path.suffix in CPP else "python" if path.suffix == ".py" else None
        if language:
            code = blank_comments_and_strings(text) if language == "cpp" else text
            for function in long_functions(code, language, FUNCTION_LINES_GOAL):
                note = Problem(str(path), function.line,
                               f"{function.name}: {function.lines} lines")
                (problems if function.lines > FUNCTION_LINES_MAX else over_goal).append(note)
    raised = ratchet(root, {"functions_over_50_lines": len(over_goal)}, lower)
    return problems + (over_goal + raised if raised else [])


def main(arguments: list[str]) -> int:
    lower = "--lower-ratchet" in arguments
    places = [argument for argument in arguments if not argument.startswith("--")]
    root = Path(places[0] if places else Path(__file__).parents[2]).resolve()
    return report("lint", check(root, lower))


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(sys.argv[1:]))
