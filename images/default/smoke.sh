#!/bin/bash
# Checks a built image from the inside, as a tenant sees it: no network, read-only root, a uid without a name,
# /home/user and /tmp writable. Prints one line per check and fails at the first that does not hold.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

ok() { echo "    ok: $*"; }
fail() {
  echo "    FAILED: $*" >&2
  exit 1
}

[ "$(id -u)" -ge 200000 ] || fail "must run as a tenant's uid, not $(id -u)"

for tool in curl git htop jq less nano rsync rg ssh unzip vim.tiny ps nc python3 pip ipython; do
  case $tool in
  ssh) command=(ssh -V) ;;
  unzip) command=(unzip -v) ;;
  nc) command=(nc -h) ;;
  *) command=("$tool" --version) ;;
  esac
  "${command[@]}" >/dev/null 2>&1 </dev/null || fail "${command[*]}: exit code $?"
done
ok "every command line tool answers"

found=$(find / -xdev -perm /6000 \( -type f -o -type d \) 2>/dev/null | head -3 || true)
[ -z "$found" ] || fail "setuid or setgid: $found"
ok "no setuid, no setgid"

found=$(find / -xdev -name EXTERNALLY-MANAGED 2>/dev/null | head -3 || true)
[ -z "$found" ] || fail "$found keeps pip from installing"
if touch /usr/local/written 2>/dev/null; then fail "the root is writable"; fi
ok "pip is not fenced off; the root is read-only"

python3 -I "$here/smoke.py"
