#!/usr/bin/env bash
# Checks that a shared library exports the C ABI and nothing else.
#   check_symbols.sh LIBRARY [HEADER]
# Every exported symbol is named thinkv_*. With HEADER, every function that it declares is exported.
set -euo pipefail

library=$1
header=${2:-}
# The dynamic table: what another object can bind to. Version definitions (type A) are not code.
exported=$(nm --dynamic --defined-only "$library" | awk '$2 != "A" {print $3}' | sed 's/@.*//' |
  sort -u)
status=0

foreign=$(grep -vE '^thinkv_[a-z0-9_]+$' <<<"$exported" || true)
if [ -n "$foreign" ]; then
  echo "exported, but not part of the C ABI:"
  c++filt <<<"$foreign" | sed 's/^/  /'
  status=1
fi
ours=$(grep -cE '^thinkv_' <<<"$exported" || true)
if [ "$ours" -eq 0 ]; then
  echo "no thinkv_* symbol is exported"
  status=1
fi
if [ -n "$header" ]; then
  declared=$(sed -e 's://.*$::' "$header" | tr '\n' ' ' |
    sed -e 's:/\*[^*]*\*\+\([^/*][^*]*\*\+\)*/: :g' |
    grep -oE 'THINKV_API[^;(]*\bthinkv_[a-z0-9_]+ *\(' | grep -oE 'thinkv_[a-z0-9_]+ *\($' |
    tr -d ' (' | sort -u)
  if [ -z "$declared" ]; then
    echo "no function marked THINKV_API found in $header"
    status=1
  fi
  absent=$(comm -23 <(printf '%s\n' "$declared") <(printf '%s\n' "$exported"))
  if [ -n "$absent" ]; then
    echo "declared in ${header##*/}, but not exported:"
    sed 's/^/  /' <<<"$absent"
    status=1
  fi
fi
echo "symbols: $ours exported"
exit "$status"
