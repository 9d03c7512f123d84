#!/usr/bin/env bash
# The bundle runs from another place with an empty library path, takes nothing from the system but
# glibc, and knows no path of the machine that built it.
#   bundle_test.sh BUILD
set -euo pipefail

build=$1
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failures=0
fail() {
  echo "FAILED: $*"
  failures=$((failures + 1))
}

"$root/tools/package/bundle.sh" --build "$build" "$scratch/first"
mkdir "$scratch/moved here"
mv "$scratch"/first/thinkv-* "$scratch/moved here/thinkv"
tree="$scratch/moved here/thinkv"

# foreign_libraries OBJECT: what it takes from outside the bundle, glibc aside.
foreign_libraries() {
  local glibc='(linux-vdso|ld-linux[^ ]*|lib(c|m|mvec|pthread|dl|rt|resolv|util|anl))\.so'
  env -i ldd "$1" | grep -vF "$tree/" | grep -vE "$glibc|statically linked" || true
}

for program in thinkvd thinkvctl; do
  env -i "$tree/bin/$program" --version || fail "$program --version"
  foreign=$(foreign_libraries "$tree/bin/$program")
  if [ -n "$foreign" ]; then fail "$program takes from the system: $foreign"; fi
done
foreign=$(foreign_libraries "$tree/lib/libthinkv.so")
if [ -n "$foreign" ]; then fail "libthinkv.so takes from the system: $foreign"; fi

for object in "$tree"/bin/* "$tree"/lib/libthinkv.so; do
  if readelf -d "$object" | grep -E 'R(UN)?PATH' | grep -qF "$root"; then
    fail "$object looks for libraries in the tree that built it"
  fi
done
newest=$(objdump -T "$tree"/bin/* "$tree"/lib/*.so* |
  grep -oE 'GLIBC_2\.[0-9]+' | sort -uV | tail -1)
if [ "$(printf '%s\nGLIBC_2.36\n' "$newest" | sort -V | tail -1)" != GLIBC_2.36 ]; then
  fail "needs $newest"
fi

# The check above can fail: a bundle without its libraries is reported and does not run.
if [ -n "$(ls "$tree"/lib/libstdc++.so.6 2>/dev/null)" ]; then
  mv "$tree/lib/libstdc++.so.6" "$scratch/"
  if [ -z "$(foreign_libraries "$tree/bin/thinkvd")" ]; then
    fail "a missing library went unseen"
  fi
  mv "$scratch/libstdc++.so.6" "$tree/lib/"
fi

if [ -d "$tree/python/thinkv" ]; then
  env -i PATH=/usr/bin:/bin PYTHONPATH="$tree/python" PYTHONDONTWRITEBYTECODE=1 \
    python3 -c 'import thinkv; print("python package", getattr(thinkv, "__version__", ""))' ||
    fail "import thinkv"
fi
echo "bundle: $failures failure(s), newest glibc symbol $newest"
[ "$failures" -eq 0 ]
