# shellcheck shell=bash
# Shared by every script: messages, root rights, Debian packages, folders. Sourced, never run.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
STATE_DIR=${SANDBOXD_STATE_DIR:-/var/lib/sandboxd}
export SANDBOXD_HOST=${SANDBOXD_HOST:-127.0.0.1} SANDBOXD_PORT=${SANDBOXD_PORT:-8080}
STARTED_MS=$(date +%s%3N)

# One line of progress, with the seconds since the script began.
say() { printf '[%3ds] %s\n' $((($(date +%s%3N) - STARTED_MS) / 1000)) "$*" >&2; }

warn() { printf 'warning: %s\n' "$*" >&2; }

# Ends the script. Each further argument is a line: what to do about it.
die() {
  printf 'error: %s\n' "$1" >&2
  shift
  (($# == 0)) || printf '  %s\n' "$@" >&2
  exit 1
}

as_root() {
  if ((EUID == 0)); then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "this needs root: $1" "Run the script as root, or install sudo."
  fi
}

# apt-get with its chatter in a log, which is shown when it fails.
apt_get() {
  mkdir -p "$REPO/build"
  # RUNLEVEL=1 keeps a package's own start script from starting its daemon where systemd does not run.
  as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get -qq -y --no-install-recommends \
    -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@" </dev/null >"$REPO/build/apt.log" 2>&1 && return
  tail -n 15 "$REPO/build/apt.log" >&2
  return 1
}

APT_UPDATED=
apt_update() {
  command -v apt-get >/dev/null ||
    die "this machine has no apt-get, so nothing can be installed for you" \
      "Install by hand: a Docker Engine, mmdebstrap, e2fsprogs and Python 3.11 or newer with venv."
  [[ -z $APT_UPDATED ]] || return 0
  say "apt-get update ..."
  apt_get update || warn "apt-get update failed; going on with the package lists at hand"
  APT_UPDATED=1
}

apt_install() {
  apt_update
  say "installing Debian packages: $*"
  apt_get install "$@" || die "apt-get could not install: $*" "Its own words are above."
}

# need_command COMMAND PACKAGE: installs the package when the command is not there.
need_command() {
  PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null || apt_install "$2"
}

# One run of the scripts that start and stop things at a time, for as long as this script lives.
only_one() {
  mkdir -p "$REPO/build"
  exec 9>"$REPO/build/up.lock"
  flock --nonblock 9 || {
    say "waiting for another scripts/up or scripts/down ..."
    flock 9
  }
}

# lives_as PID [PROGRAM]: a process that is no zombie (those have no command line) and runs this program.
lives_as() {
  [[ $1 =~ ^[0-9]+$ && (-z ${2:-} || $(cat "/proc/$1/comm" 2>/dev/null) == "$2") ]] && grep -qs . "/proc/$1/cmdline"
}

# begin_log FILE: a large log becomes FILE.1 before a program starts to write it.
begin_log() { as_root find "$1" -size +50M -exec mv {} {}.1 \; 2>/dev/null || true; }

state_folder() { as_root install -d -m 0700 "$STATE_DIR"; }
