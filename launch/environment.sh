# Sourced by the other scripts: makes or reuses a virtual environment, installs the project once, puts it on PATH.
#
#   VIRTUAL_ENV        an active environment is used as it is, and a torch that is in it stays
#   EVEREST_VENV       where to make one otherwise (default: .venv in the project)
#   EVEREST_NEWEST=1   the newest version of every package, instead of the tested ones of constraints.txt
#   PYTHON             the interpreter to make it with (default: the first of python3, python3.13 ... that is 3.11 to 3.13)

# find_python VERSIONS: the first interpreter of one of these versions (3.11 3.12 ...), python3 before the others.
find_python() {
  local candidate version candidates=("${PYTHON:-python3}")
  if [ -z "${PYTHON:-}" ]; then
    for version in "$@"; do
      candidates+=("python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python)
    done
  fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in sys.argv[1:])' "$@" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python ${*} found; install one, or set PYTHON to its path" >&2
  return 1
}

# kept_versions ENVIRONMENT: constraints.txt; where the environment has a torch, that one in place of the tested one.
kept_versions() {
  local torch
  if torch=$("$1/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null); then
    grep -vE '^(torch|torchvision|torchcodec|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' constraints.txt
    echo "torch==$torch"
  else
    cat constraints.txt
  fi
}

# ensure_environment EXTRAS: EXTRAS is empty or like [dev]. Installs again only when what is to be installed has changed.
ensure_environment() {
  local extras=$1 stamp python versions
  environment=${VIRTUAL_ENV:-${EVEREST_VENV:-$PWD/.venv}}
  if [ -z "${VIRTUAL_ENV:-}" ] && ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python 3.13 3.12 3.11) || return 1
    echo "making a virtual environment in $environment"
    "$python" -m venv --clear "$environment" || return 1
  fi
  stamp=$environment/.everest_ds-$( (pwd; cat pyproject.toml constraints.txt; echo "${EVEREST_NEWEST:-}") | sha256sum | cut -c1-16)
  if [ ! -f "$stamp$extras" ]; then
    echo "installing everest_ds$extras into $environment (a few minutes the first time)"
    versions=$environment/.everest_ds-constraints
    if [ -n "${EVEREST_NEWEST:-}" ]; then
      "$environment/bin/python" -m pip install --quiet --upgrade pip || return 1
      "$environment/bin/python" -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".$extras" || return 1
    else
      if [ -n "${VIRTUAL_ENV:-}" ]; then kept_versions "$environment" >"$versions"; else cp constraints.txt "$versions"; fi
      "$environment/bin/python" -m pip install --quiet --constraint "$versions" --upgrade pip || return 1
      "$environment/bin/python" -m pip install --quiet --constraint "$versions" --build-constraint "$versions" \
        --editable ".$extras" || return 1
    fi
    touch "$stamp" "$stamp$extras"
  fi
  export PATH="$environment/bin:$PATH"
}
