#!/usr/bin/env bash
# Makes a relocatable tree of what a machine needs to run ThinKV: any distribution with
# glibc >= 2.36 and the same processor family.
#   bundle.sh [--build BUILD] [FOLDER]      FOLDER: build/bundle by default
# It serves the GPUs of the build; all: -DTHINKV_CUDA_ARCHITECTURES='80-real;90-real;100'.
# FOLDER/thinkv-VERSION/ then holds bin/ lib/ include/ python/ config/. Every library outside glibc
# lies in lib/; the programs find it through DT_RPATH $ORIGIN/../lib, which their libraries inherit.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
build=$root/build
if [ "${1:-}" = --build ]; then
  build=$(realpath "$2")
  shift 2
fi
folder=${1:-$build/bundle}
version=$(sed -n 's/^CMAKE_PROJECT_VERSION:STATIC=//p' "$build/CMakeCache.txt")
tree=$folder/thinkv-$version

# glibc itself: it must match the loader of the machine, so it is never carried.
is_glibc() {
  case $1 in
    linux-vdso.so.* | ld-linux*.so.* | libc.so.6 | libm.so.6 | libmvec.so.1 | libpthread.so.0 | \
      libdl.so.2 | librt.so.1 | libresolv.so.2 | libutil.so.1 | libnss_*.so.2 | libanl.so.1) ;;
    *) return 1 ;;
  esac
}

# The libraries outside glibc that OBJECT needs and those need: one `name path` a line.
needed_libraries() {
  local name path
  ldd "$1" | sed -n 's/^[[:space:]]*\([^ ]*\) => \([^ ]*\).*/\1 \2/p' | while read -r name path; do
    if is_glibc "$name"; then continue; fi
    if [ "$path" = not ]; then
      echo "bundle: $1 needs $name, which is not found" >&2
      exit 1
    fi
    printf '%s %s\n' "$name" "$path"
  done
}

copy_libraries() {
  local object name path list
  for object in "$build/bin/thinkvd" "$build/bin/thinkvctl" "$build/lib/libthinkv.so"; do
    list=$(needed_libraries "$object")
    while read -r name path; do
      # Our own library was copied before, stripped.
      if [ -n "$name" ] && [ ! -e "$tree/lib/$name" ]; then
        install -m 644 "$(realpath "$path")" "$tree/lib/$name"
      fi
    done <<<"$list"
  done
}

for file in bin/thinkvd bin/thinkvctl lib/libthinkv.so; do
  if [ ! -e "$build/$file" ]; then
    echo "bundle: $build/$file is missing; build it first (tools/dev build release)" >&2
    exit 1
  fi
done

rm -rf "$tree"
mkdir -p "$tree/bin" "$tree/lib" "$tree/include/thinkv" "$tree/python"
install -m 755 -s "$build/bin/thinkvd" "$build/bin/thinkvctl" "$tree/bin/"
for library in "$build"/lib/libthinkv.so*; do
  if [ -L "$library" ]; then cp -P "$library" "$tree/lib/"; fi
  if [ ! -L "$library" ]; then install -m 644 -s "$library" "$tree/lib/"; fi
done
copy_libraries
install -m 644 "$root"/include/thinkv/*.h "$tree/include/thinkv/"
if compgen -G "$root/include/thinkv/*.hpp" >/dev/null; then
  install -m 644 "$root"/include/thinkv/*.hpp "$tree/include/thinkv/"
fi
if [ -d "$root/client/python/thinkv" ]; then
  cp -R "$root/client/python/thinkv" "$tree/python/"
  find "$tree/python" -name __pycache__ -prune -exec rm -rf {} +
  # The package looks beside itself first, which makes python/ usable on its own as well.
  install -m 644 "$(realpath "$build/lib/libthinkv.so")" "$tree/python/thinkv/libthinkv.so"
fi
if [ -d "$root/config" ]; then cp -R "$root/config" "$tree/"; fi
install -m 644 "$root/LICENSE" "$root/CHANGELOG.md" "$tree/"
echo "bundle: $tree ($(du -sh "$tree" | cut -f1))"
