#!/usr/bin/env python3
"""Makes a wheel that carries libthinkv.so, with the standard library alone.

    client/python/build_wheel.py [--library build/lib/libthinkv.so] [--out build/wheel]

The wheel is of any CPython >= 3.10 (ctypes) and of this machine's platform. Also a PEP 517 back
end: THINKV_LIBRARY then names the library.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import platform
import re
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE.parents[1]
PACKAGE = HERE / "thinkv"


def version() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (PACKAGE / "_version.py").read_text())
    if found is None:
        raise SystemExit("build_wheel: no version in _version.py")
    return found.group(1)


def tag() -> str:
    return f"py3-none-linux_{platform.machine()}"


def contents(library: Path) -> dict[str, bytes]:
    files = {
        f"thinkv/{path.relative_to(PACKAGE)}": path.read_bytes()
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix in (".py", ".pyi") or path.name == "py.typed"
    }
    files["thinkv/libthinkv.so"] = library.read_bytes()
    return files


def metadata() -> dict[str, bytes]:
    info = f"thinkv-{version()}.dist-info"
    return {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: thinkv\nVersion: {version()}\n"
            "Summary: KV-cache pages from the thinkvd pool, for inference engines\n"
            "License: Apache-2.0\nRequires-Python: >=3.10\n"
        ).encode(),
        f"{info}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: thinkv\nRoot-Is-Purelib: false\nTag: {tag()}\n"
        ).encode(),
        f"{info}/LICENSE": (TREE / "LICENSE").read_bytes(),
    }


def record(files: dict[str, bytes]) -> bytes:
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    lines.append(f"thinkv-{version()}.dist-info/RECORD,,")
    return ("\n".join(lines) + "\n").encode()


def make(library: Path, out: Path) -> Path:
    if not library.is_file():
        raise SystemExit(f"build_wheel: {library} is not there; build the library first")
    files = {**contents(library), **metadata()}
    files[f"thinkv-{version()}.dist-info/RECORD"] = record(files)
    out.mkdir(parents=True, exist_ok=True)
    wheel = out / f"thinkv-{version()}-{tag()}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            # A fixed date: the same input gives the same bytes.
            entry = zipfile.ZipInfo(name, (2024, 1, 1, 0, 0, 0))
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517."""
    default = TREE / "build" / "lib" / "libthinkv.so"
    library = Path(os.environ.get("THINKV_LIBRARY", default))
    return make(library, Path(wheel_directory)).name


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=TREE / "build" / "lib" / "libthinkv.so")
    parser.add_argument("--out", type=Path, default=TREE / "build" / "wheel")
    chosen = parser.parse_args(arguments)
    print(make(chosen.library, chosen.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
