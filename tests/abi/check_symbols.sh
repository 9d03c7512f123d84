#!/bin/sh
# usage: check_symbols.sh LIBRARY LIST: the exported functions are exactly those of the list.
# A name that disappears breaks engines; a new one is a promise: add it to the list on purpose.
set -eu
exported=$(nm -D --defined-only "$1" |
  awk '$2 != "A" {sub(/@.*/, "", $3); print $3}' | LC_ALL=C sort)
expected=$(LC_ALL=C sort "$2")
if [ "$exported" = "$expected" ]; then
  echo "$(echo "$exported" | wc -l) symbols"
  exit 0
fi
echo "exported:"; echo "$exported"
echo "expected:"; echo "$expected"
exit 1
