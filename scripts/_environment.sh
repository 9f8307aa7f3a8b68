# Sourced by the other scripts: finds a Python, makes the environment, installs what has changed.
# Settings: PYTHON (interpreter), JAXSERVE_VENV (default .venv), JAXSERVE_JAX (e.g. "jax==0.10.2"; default: newest allowed).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${JAXSERVE_VENV:-$root/.venv}
pyenv=${PYENV_ROOT:-~/.pyenv} # its interpreters count even where none of them is the active one

usable() { # usable PYTHON: it is at least 3.11 and can make environments (Debian packs that part separately)
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() { # the interpreter to use
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && command -v "$PYTHON" && return
    echo "PYTHON=$PYTHON is not a Python of at least 3.11 with the modules venv and ensurepip." >&2
    return 1
  fi
  for candidate in python3.12 python3.11 python3.13 python3 "$pyenv"/versions/3.1[1-9]*/bin/python3; do
    usable "$candidate" && command -v "$candidate" && return
  done
  echo "jaxserve needs Python 3.11 or newer with the modules venv and ensurepip (Debian, Ubuntu: apt install" \
    "python3-venv); none was found. Set PYTHON=/path/to/python3 if there is one elsewhere." >&2
  return 1
}

version_of() { # version_of PYTHON: such as 3.11, or nothing
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
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

make_environment() { # unless there is one, of the version that was asked for
  local python clear=""
  if "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    [ -n "${PYTHON:-}" ] && [ "$(version_of "$venv/bin/python")" != "$(version_of "$PYTHON")" ] || return 0
    clear=--clear
  fi
  python=$(find_python)
  echo "Making an environment in $venv with $("$python" --version) …" >&2
  quietly "$python" -m venv $clear "$venv"
}

prepare_environment() { # prepare_environment EXTRAS: the environment with the package and its extras, if not up to date
  local extras=$1 stamp=$venv/.jaxserve-installed wanted
  make_environment
  # the checkout's place is part of it: an environment that was copied along with it still points to the original
  wanted="$extras ${JAXSERVE_JAX:-} $root $(sha256sum <"$root/pyproject.toml")"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "Installing jaxserve and what it needs (about a minute) …" >&2
  quietly "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable "$root$extras" ${JAXSERVE_JAX:+"$JAXSERVE_JAX"}
  echo "$wanted" >"$stamp"
}
