# Sourced by the other scripts: finds a Python, makes the environment, installs what has changed.
# Settings: PYTHON (interpreter), JAXSERVE_VENV (default .venv), JAXSERVE_JAX (e.g. "jax==0.10.2"; default: newest allowed).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JAXSERVE_VENV:-$root/.venv}

find_python() { # the interpreter to use; at least 3.11
  local candidate
  for candidate in ${PYTHON:-} python3.12 python3.11 python3.13 python3 "$HOME"/.pyenv/versions/3.1[1-3]*/bin/python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "jaxserve needs Python 3.11 or newer; none was found (set PYTHON=/path/to/python3)." >&2
  return 1
}

quietly() { # run a command; show its output only if it fails
  local log
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    return 1
  fi
  rm -f "$log"
}

prepare_environment() { # prepare_environment EXTRAS: the environment with the package and its extras, if not up to date
  local extras=$1 stamp=$venv/.jaxserve-installed wanted python
  wanted="$extras ${JAXSERVE_JAX:-} $(sha256sum <"$root/pyproject.toml")"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "Making an environment in $venv with $("$python" --version) …" >&2
    "$python" -m venv "$venv"
  fi
  echo "Installing jaxserve and what it needs (about a minute) …" >&2
  quietly "$venv/bin/python" -m pip install --quiet --upgrade pip
  quietly "$venv/bin/python" -m pip install --quiet --editable "$root$extras" ${JAXSERVE_JAX:+"$JAXSERVE_JAX"}
  echo "$wanted" >"$stamp"
}
