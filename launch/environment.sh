# Sourced by the other scripts: makes or reuses a virtual environment, installs the project once, adds it to PATH.
#
#   VIRTUAL_ENV        the active environment; it is used, and its torch is kept
#   EVEREST_VENV       otherwise, the folder of the environment to make (default: .venv in the project)
#   EVEREST_NEWEST=1   install the newest versions instead of the tested ones of constraints.txt
#   PYTHON             the interpreter (default: the first of python3, python3.13 ... that is version 3.11 to 3.13)

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

# stamp_of EXTRAS: the file that marks the current project and versions as installed.
stamp_of() {
  local wanted
  wanted=$( (pwd; cat pyproject.toml constraints.txt; echo "${EVEREST_NEWEST:-}") | sha256sum | cut -c1-16)
  echo "$environment/.everest_ds-$wanted$1"
}

# kept_versions ENVIRONMENT: constraints.txt, with the environment's own torch if it has one.
kept_versions() {
  local torch
  if torch=$("$1/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null); then
    grep -vE '^(torch|torchvision|torchcodec|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' constraints.txt
    echo "torch==$torch"
  else
    cat constraints.txt
  fi
}

# ensure_environment EXTRAS: EXTRAS is empty or like [dev]. Installs again only if the project or versions have changed.
ensure_environment() {
  local extras=$1 python
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    environment=$VIRTUAL_ENV
  else
    environment=$(realpath --canonicalize-missing --no-symlinks "${EVEREST_VENV:-.venv}")
    if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
      python=$(find_python 3.13 3.12 3.11) || return 1
      echo "making a virtual environment in $environment"
      "$python" -m venv --clear "$environment" || return 1
    fi
  fi
  if [ ! -f "$(stamp_of "$extras")" ]; then
    echo "installing everest_ds$extras into $environment (a few minutes the first time)"
    install_versions "$extras" || return 1
    touch "$(stamp_of "")" "$(stamp_of "$extras")"
  fi
  caller_path=$PATH
  export PATH="$environment/bin:$PATH"
}

install_versions() {
  local extras=$1 versions=$environment/.everest_ds-versions install
  install=("$environment/bin/python" -m pip install --quiet)
  if [ -n "${EVEREST_NEWEST:-}" ]; then
    "${install[@]}" --upgrade pip || return 1
    "${install[@]}" --upgrade --upgrade-strategy eager --editable ".$extras"
  else
    if [ -n "${VIRTUAL_ENV:-}" ]; then kept_versions "$environment" >"$versions"; else cp constraints.txt "$versions"; fi
    "${install[@]}" --constraint "$versions" --upgrade pip || return 1
    "${install[@]}" --constraint "$versions" --build-constraint "$versions" --editable ".$extras"
  fi
}

# from_caller PATH: the path relative to $caller, the folder in which the script was started.
from_caller() {
  local path
  path=$(realpath --canonicalize-missing --no-symlinks --relative-to="$caller" "$1")
  if [[ $path == ../* ]]; then path=$(realpath --canonicalize-missing --no-symlinks "$1"); fi
  printf '%q' "$path"
}

# program NAME: how to start a program of the environment from there: its name if it is on the PATH, else its path.
program() {
  if [ "$(PATH=$caller_path command -v "$1")" = "$environment/bin/$1" ]; then echo "$1"; else from_caller "$environment/bin/$1"; fi
}
