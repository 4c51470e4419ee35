# Sourced by the other scripts: makes or reuses a virtual environment, installs the project once, puts it on PATH.
#
#   VIRTUAL_ENV    an active environment is used as it is
#   EVEREST_VENV   where to make one otherwise (default: .venv in the project)
#   PYTHON         the interpreter to make it with (default: the first of python3, python3.13 ... that is 3.11 to 3.13)

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python 3.11, 3.12 or 3.13 found; set PYTHON to one" >&2
  return 1
}

# ensure_environment EXTRAS: EXTRAS is empty or like [dev]. Installs again only when pyproject.toml has changed.
ensure_environment() {
  local extras=$1 environment stamp python
  environment=${VIRTUAL_ENV:-${EVEREST_VENV:-$PWD/.venv}}
  if [ ! -x "$environment/bin/python" ]; then
    python=$(find_python) || return 1
    echo "making a virtual environment in $environment"
    "$python" -m venv "$environment"
  fi
  stamp=$environment/.everest_ds-$( (pwd; cat pyproject.toml) | sha256sum | cut -c1-16)
  if [ ! -f "$stamp$extras" ]; then
    echo "installing everest_ds$extras into $environment (a few minutes the first time)"
    "$environment/bin/python" -m pip install --quiet --upgrade pip
    "$environment/bin/python" -m pip install --quiet --editable ".$extras"
    touch "$stamp" "$stamp$extras"
  fi
  export PATH="$environment/bin:$PATH"
}
