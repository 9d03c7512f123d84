#!/usr/bin/env bash
# Checks C and C++ sources against .clang-format.
#   check_format.sh [--fix] [FILE...]     without files: every source that is or could be committed
# Exit 77 (skipped) without clang-format 14: another version formats differently.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mode=(--dry-run --Werror)
if [ "${1:-}" = --fix ]; then
  mode=(-i)
  shift
fi
tool=$(command -v clang-format-14 || true)
if [ -z "$tool" ]; then
  echo "skipped: clang-format-14 is not installed (tools/setup --check installs it)"
  exit 77
fi
if [ $# -gt 0 ]; then
  files=("$@")
else
  mapfile -t files < <(find include kernels client daemon tools tests -type f \
    -regex '.*\.\(h\|hpp\|c\|cpp\|cu\|cuh\)' 2>/dev/null | sort)
fi
if [ "${#files[@]}" -eq 0 ]; then
  echo "no sources found"
  exit 1
fi
status=0
# One line a finding: the rest of what clang-format prints repeats the source.
findings=$(printf '%s\0' "${files[@]}" | xargs -0 -n 8 "$tool" --style=file:.clang-format \
  "${mode[@]}" 2>&1) || status=1
grep -E ': (error|warning): ' <<<"$findings" | cut -d: -f1 | sort | uniq -c |
  awk '{print $2 ": " $1 " place(s) (tools/dev format)"}' || true
if [ "$status" -ne 0 ] && ! grep -q ': error: ' <<<"$findings"; then echo "$findings"; fi
echo "format: ${#files[@]} files"
exit "$status"
