#!/usr/bin/env bash
# Runs the tests that start no processes on each Python that is found, and once with the oldest torch that is supported.
#   PYTHONS: the interpreters to look for       OLDEST_TORCH: the release in pyproject.toml's lower bound
# Environments are kept in .venv-compat/. Prints one line for each combination; exits with 1 if one of them failed.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHONS="${PYTHONS:-python3.11 python3.12 python3.13 python3.14}"
OLDEST_TORCH="${OLDEST_TORCH:-2.4.0}"
TORCH="${TORCH:-2.13.0}"
results=()
failed=0

check() { # interpreter, torch release
  local version name log
  version="$("$1" -c 'import platform; print(platform.python_version())')"
  name="$version-torch-$2"
  log=".venv-compat/$name.log"
  mkdir -p .venv-compat
  echo "Python $version, torch $2: output in $log"
  if make test VENV=".venv-compat/$name" PYTHON="$1" TORCH="$2" ARGS='-q -m "not process"' >"$log" 2>&1; then
    results+=("Python $version  torch $2  $(tail -n 1 "$log")")
  else
    results+=("Python $version  torch $2  FAILED: $(tail -n 1 "$log")")
    failed=1
  fi
}

oldest=""
for python in $PYTHONS; do
  if "$python" -c '' 2>/dev/null; then
    oldest="${oldest:-$python}"
    check "$python" "$TORCH"
  else
    results+=("$python  not found")
  fi
done
[ -n "$oldest" ] && check "$oldest" "$OLDEST_TORCH"
printf '%s\n' "${results[@]}"
[ -n "$oldest" ] || { echo "none of these interpreters was found: $PYTHONS" >&2; exit 1; }
exit "$failed"
