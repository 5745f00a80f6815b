# shellcheck shell=bash
# The project's own Python environment in .venv.

VENV=$REPO/.venv

python_fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local python
  for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
    if python_fits "$python"; then
      echo "$python"
      return
    fi
  done
  return 1
}

make_venv() {
  local python
  if ! python=$(find_python); then
    apt_install python3 python3-venv
    python=$(find_python) || { apt_install python3.11 python3.11-venv && python=$(find_python); } ||
      die "no Python 3.11 or newer was found" "Install one and name it: PYTHON=/path/to/python3 $0"
  fi
  say "creating .venv with $("$python" --version) ..."
  rm -rf "$VENV"
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian splits venv off, per version; python3-venv belongs to /usr/bin/python3.
    apt_install "$("$python" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}-venv")')"
  fi
  "$python" -m venv "$VENV" || die "$python -m venv $VENV failed" "Its own words are above."
}

# ensure_venv EXTRAS: installs the project with these extras, again only when pyproject.toml has changed.
# An environment with more (server,dev) also serves for less (server).
ensure_venv() {
  local extras=$1 stamp wanted
  python_fits "$VENV/bin/python" || make_venv
  wanted=$({
    echo "$REPO"
    cat "$REPO/pyproject.toml"
  } | sha256sum)
  for stamp in "$VENV/.e80-$extras" "$VENV/.e80-server,dev"; do
    [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && return
  done
  say "installing the project and what it needs into .venv ..."
  "$VENV/bin/python" -m pip install -qq --disable-pip-version-check -e "${REPO}[$extras]" ||
    die "pip could not install the project" "Its own words are above; it uses your pip settings (pip config list)."
  echo "$wanted" >"$VENV/.e80-$extras"
}
