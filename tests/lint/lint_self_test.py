"""Shows that each lint accepts a good tree and reports each kind of bad one."""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

LINT = Path(__file__).resolve().parents[2] / "tools" / "lint"
sys.path.insert(0, str(LINT))
import check_layers  # noqa: E402
import count_results  # noqa: E402
import lint  # noqa: E402
from functions import long_functions  # noqa: E402


class Tree(unittest.TestCase):
    """A small tree in a temporary folder, without git."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.root = Path(folder.name)
        self.write("include/thinkv/result.h", "#pragma once\n")
        self.write("daemon/core/ledger.h", "#pragma once\n#include <cstdint>\n"
                   '#include "thinkv/result.h"\n')
        self.write("daemon/ipc/server.cpp", '#include "daemon/core/ledger.h"\n'
                   "#include <boost/asio.hpp>\n")
        self.write("client/client.cpp", '#include "kernels/kernels.h"\n#include <thread>\n')
        self.write("kernels/kernels.h", "#pragma once\n#include <thinkv/result.h>\n")

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def assert_reported(self, problems: list, path: str, text: str) -> None:
        found = [str(problem) for problem in problems]
        self.assertTrue(any(p.startswith(path) and text in p for p in found),
                        f"{path}: '{text}' expected among {found}")


class Layers(Tree):
    def test_accepts_the_good_tree(self) -> None:
        self.assertEqual(check_layers.check(self.root), [])

    def test_reports_what_crosses_a_layer(self) -> None:
        cases = {
            "daemon/core/a.cpp": ('#include "daemon/ipc/b.h"', "layer core must not include"),
            "daemon/core/b.cpp": ("#include <chrono>", "must not include <chrono>"),
            "daemon/core/c.cpp": ("#  include <thread>", "must not include <thread>"),
            "daemon/core/d.cpp": ("#include <sys/socket.h>", "must not include <sys/socket.h>"),
            "daemon/core/e.cpp": ("#include <boost/asio.hpp>", "must not include <boost/asio.hpp>"),
            "daemon/core/f.cpp": ("#include <yaml-cpp/yaml.h>", "must not include <yaml-cpp"),
            "daemon/core/g.cpp": ("#include <prometheus/gauge.h>", "must not include <prometheus"),
            "daemon/core/h.cpp": ("#include <cuda.h>", "must not include <cuda.h>"),
            "daemon/core/i.cpp": ('#include "../../kernels/kernels.h"', "include layer kernels"),
            "daemon/j.cpp": ('#include "client/x.h"', "must not include layer client"),
            "client/k.cpp": ('#include "daemon/core/ledger.h"', "must not include layer core"),
            "client/l.cpp": ("#include <yaml-cpp/yaml.h>", "must not include <yaml-cpp/yaml.h>"),
            "kernels/m.cpp": ('#include "daemon/core/ledger.h"', "must not include layer core"),
            "include/thinkv/n.h": ('#include "kernels/kernels.h"', "not include layer kernels"),
            "include/thinkv/o.h": ("#include <fmt/format.h>", "must not include <fmt/format.h>"),
            "daemon/core/p.cpp": ('#include "nowhere.h"', "is not a file of this tree"),
            "extra/q.cpp": ("#include <vector>", "outside every layer"),
        }
        self.write("daemon/ipc/b.h", "#pragma once\n")
        self.write("client/x.h", "#pragma once\n")
        for path, (text, _) in cases.items():
            self.write(path, text + "\n")
        problems = check_layers.check(self.root)
        for path, (_, message) in cases.items():
            with self.subTest(path):
                self.assert_reported(problems, path, message)
        self.assertEqual(len(problems), len(cases))

    def test_the_table_has_no_cycle(self) -> None:
        done: set[str] = set()
        for _ in check_layers.ALLOWED:
            done |= {layer for layer, below in check_layers.ALLOWED.items() if below <= done}
        self.assertEqual(done, set(check_layers.ALLOWED))


class Text(Tree):
    def test_accepts_the_good_tree(self) -> None:
        self.write("tools/run", "#!/bin/sh\n", 0o755)
        self.write("daemon/ok.cpp", "// throw, strcpy( and system( are fine in a comment.\n"
                   'const char* kText = "rand()";\nusing namespace std::chrono_literals;\n'
                   "// TO" "DO(#7): later\n"
                   "std::shared_ptr<int> a;  // shared: the library takes no other\n")
        self.write("doc.md", "[a](daemon/ok.cpp#x) [b](https://a.b) `[c](nowhere)`\n")
        self.assertEqual(lint.check(self.root), [])

    def test_reports_each_rule(self) -> None:
        cases = {
            "a.cpp": ("int a;" + " " * 95 + "int b;\n", "107 columns"),
            "b.cpp": ("int a; \n", "white space"),
            "c.cpp": ("\tint a;\n", "a tab"),
            "d.cpp": ("int a;\n" * 501, "501 lines"),
            "e.cpp": ("void f() { throw 1; }\n", "errors are values"),
            "f.cpp": ("void f(char* a) { std::strcpy(a, a); }\n", "banned call"),
            "g.cpp": ("int f() { return rand(); }\n", "banned call"),
            "h.cpp": ("using namespace std;\n", "name what is used"),
            "i.cpp": ("// TO" "DO: later\n", "without an issue"),
            "j.cpp": ("// FIX" "ME\n", "left over"),
            "k.cpp": ("void f() {\n" + "  g();\n" * 70 + "}\n", "f: 72 lines"),
            "l.py": ("def f():\n" + "    g()\n" * 70, "f: 71 lines"),
            "m.md": ("see [this](nowhere.md)\n", "link to nothing"),
            "n.txt": ("in /wor" "k/main\n", "a path of one machine"),
            "o.txt": ("#!/bin/sh\n", "not executable"),
            "q.txt": ("x" * (512 * 1024 + 1), "bytes (at most"),
            "r.h": ("int a;\n", "without a guard"),
            "s.cpp": ("std::shared_ptr<int> a;\n", "one owner here"),
            "t.sh": ("x" * 101 + "\n", "101 columns"),
        }
        for path, (text, _) in cases.items():
            self.write("daemon/" + path, text)
        self.write("daemon/p.txt", "plain\n", 0o755)
        problems = lint.check(self.root)
        self.assert_reported(problems, "daemon/p.txt", "executable, but no script")
        for path, (_, message) in cases.items():
            with self.subTest(path):
                self.assert_reported(problems, "daemon/" + path, message)
        self.assertEqual(len(problems), len(cases) + 1)

    def test_the_ratchet_only_goes_down(self) -> None:
        body = "void {}() {{\n" + "  g();\n" * 55 + "}}\n"
        self.write("daemon/one.cpp", body.format("one"))
        self.write("tools/lint/ratchet.json", '{"functions_over_50_lines": 1}\n')
        self.assertEqual(lint.check(self.root), [])
        self.write("daemon/two.cpp", body.format("two"))
        self.assert_reported(lint.check(self.root), "tools/lint/ratchet.json", "2, at most 1")
        lint.check(self.root, lower=True)  # must not record the higher number
        self.assert_reported(lint.check(self.root), "tools/lint/ratchet.json", "2, at most 1")


class Functions(unittest.TestCase):
    def names(self, code: str) -> list[str]:
        return [function.name for function in long_functions(code, "cpp", 0)]

    def test_finds_functions_and_nothing_else(self) -> None:
        code = ("namespace a {\nstruct S : B<int> {\n  S() : x_{1} {}\n  int get() const { if (x_)"
                " { return 1; } return x_; }\n  int x_;\n};\nenum class E { kA };\n"
                "constexpr int kTable[] = {1, 2};\nauto f(int a) -> int {\n"
                "  auto l = [](int b) { return b; };\n  return l(a);\n}\n}\n")
        self.assertEqual(self.names(code)[-2:], ["get", "f"])
        self.assertNotIn("l", self.names(code))

    def test_counts_lines_from_head_to_brace(self) -> None:
        found = long_functions("int f(int a,\n      int b) {\n  return a;\n}\n", "cpp", 0)
        self.assertEqual([(f.name, f.line, f.lines) for f in found], [("f", 1, 4)])


class Scripts(Tree):
    def run_symbols(self, source: str, *more: str) -> subprocess.CompletedProcess[str]:
        self.write("lib.c", source)
        library = self.root / "lib.so"
        subprocess.run([os.environ.get("THINKV_CC", "cc"), "-shared", "-fPIC", "-o", library,
                        self.root / "lib.c"], check=True)
        return subprocess.run([LINT / "check_symbols.sh", library, *more], text=True,
                              capture_output=True, check=False)

    def test_symbols_accepts_the_c_abi_alone(self) -> None:
        self.write("api.h", "/* THINKV_API int thinkv_old(void); */\n"
                   "THINKV_API int thinkv_open(int a,\n  int b);\n")
        answer = self.run_symbols("int thinkv_open(int a, int b) { return a + b; }\n"
                                  "__attribute__((visibility(\"hidden\"))) int h(void) "
                                  "{ return 1; }\n", str(self.root / "api.h"))
        self.assertEqual(answer.returncode, 0, answer.stdout + answer.stderr)

    def test_symbols_reports_a_leak_an_absence_and_an_empty_library(self) -> None:
        leak = self.run_symbols("int thinkv_a(void) { return 1; }\nint leaked;\n")
        self.assertEqual(leak.returncode, 1)
        self.assertIn("leaked", leak.stdout)
        self.write("api.h", "THINKV_API void thinkv_b(void);\n")
        absent = self.run_symbols("int thinkv_a(void) { return 1; }\n", str(self.root / "api.h"))
        self.assertEqual(absent.returncode, 1)
        self.assertIn("thinkv_b", absent.stdout)
        self.assertEqual(self.run_symbols("static int a;\n").returncode, 1)

    def test_format_reports_a_badly_formatted_file(self) -> None:
        self.write("bad.cpp", "int   f( ){return 1;}\n")
        self.write("good.cpp", "int f() {\n  return 1;\n}  // f\n")
        expected = {"bad.cpp": 1, "good.cpp": 0}
        for name, status in expected.items():
            answer = subprocess.run([LINT / "check_format.sh", self.root / name], text=True,
                                    capture_output=True, check=False)
            if answer.returncode == 77:
                self.skipTest(answer.stdout)
            self.assertEqual(answer.returncode, status, name + answer.stderr)

    def test_a_case_that_did_not_start_is_a_failure(self) -> None:
        self.write("r.xml", '<testsuite><testcase status="run"/><testcase status="fail"/>'
                   '<testcase status="notrun"><skipped message="SKIP_RETURN_CODE=77"/></testcase>'
                   '<testcase status="notrun"><skipped message="Unable to find executable"/>'
                   "</testcase></testsuite>")
        for path, counts in {"r.xml": "1 2 1", "absent.xml": "0 1 0"}.items():
            answer = subprocess.run([sys.executable, count_results.__file__, self.root / path],
                                    text=True, capture_output=True, check=True)
            self.assertEqual(answer.stdout.strip(), counts)


if __name__ == "__main__":
    unittest.main()
