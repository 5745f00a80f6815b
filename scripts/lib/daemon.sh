# shellcheck shell=bash
# sandboxd as a background process: start, restart, stop. Needs lib/engine.sh to have found the engine.

DAEMON_LOG=$STATE_DIR/sandboxd.log
# What the running daemon was started from: a hash of its code and settings.
DAEMON_STAMP=$STATE_DIR/sandboxd.started-from

base_url() {
  case $SANDBOXD_HOST in
  0.0.0.0 | ::) echo "http://127.0.0.1:$SANDBOXD_PORT" ;;
  *:*) echo "http://[$SANDBOXD_HOST]:$SANDBOXD_PORT" ;;
  *) echo "http://$SANDBOXD_HOST:$SANDBOXD_PORT" ;;
  esac
}

# The pid of this state folder's daemon, if it lives.
daemon_pid() {
  local pid
  pid=$(as_root cat "$STATE_DIR/sandboxd.pid" 2>/dev/null) || return 1
  lives_as "$pid" && tr '\0' ' ' <"/proc/$pid/cmdline" | grep -q sandboxd && echo "$pid"
}

daemon_version() {
  (
    cd "$REPO" || exit
    pwd
    compgen -e | grep '^SANDBOXD_' | while read -r name; do echo "$name=${!name}"; done
    find sandboxd agent/e80_agent pyproject.toml -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
  ) | sha256sum
}

daemon_ready() {
  "$VENV/bin/python" - "$(base_url)/readyz" 2>/dev/null <<'PYTHON'
import sys
import urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
sys.exit(opener.open(sys.argv[1], timeout=5).status != 200)
PYTHON
}

ensure_daemon() {
  local version pid
  version=$(daemon_version)
  if pid=$(daemon_pid); then
    if [[ $(as_root cat "$DAEMON_STAMP" 2>/dev/null) == "$version" ]] && daemon_ready; then
      say "sandboxd runs already (pid $pid)"
      return
    fi
    say "sandboxd (pid $pid) runs other code or settings, or is not ready: restarting it"
    stop_daemon
  fi
  check_port
  start_daemon "$version"
}

check_port() {
  [[ $SANDBOXD_PORT =~ ^[0-9]{1,5}$ && $SANDBOXD_PORT -gt 0 && $SANDBOXD_PORT -lt 65536 ]] ||
    die "SANDBOXD_PORT=$SANDBOXD_PORT is no port" "Use a number from 1 to 65535."
  local fault
  fault=$(as_root "$VENV/bin/python" - "$SANDBOXD_HOST" "$SANDBOXD_PORT" <<'PYTHON'
import socket
import sys

host, port = sys.argv[1], int(sys.argv[2])
try:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
except OSError as error:
    print(error.strerror)
PYTHON
  )
  [[ -z $fault ]] ||
    die "sandboxd cannot listen on $SANDBOXD_HOST port $SANDBOXD_PORT: $fault" \
      "Another program may have the port (ss -ltnp shows which). Stop it, or choose: SANDBOXD_PORT=8090 scripts/up"
}

start_daemon() {
  local version=$1 deadline pid=""
  say "starting sandboxd (log: $DAEMON_LOG) ..."
  state_folder
  as_root rm -f "$STATE_DIR/sandboxd.pid" "$DAEMON_STAMP"
  begin_log "$DAEMON_LOG"
  # Compiled here, so that root leaves no files of its own in a user's checkout.
  "$VENV/bin/python" -m compileall -q "$REPO/sandboxd" "$REPO/agent"
  # Descriptor 9 is the lock of only_one.
  sandboxd_as_root setsid --fork sh -c \
    'umask 022; cd /; exec </dev/null >>"$1" 2>&1 9>&-; echo $$ >"$2"; exec "$3" serve' \
    sandboxd "$DAEMON_LOG" "$STATE_DIR/sandboxd.pid" "$VENV/bin/sandboxd"
  deadline=$((SECONDS + 60))
  until daemon_ready; do
    pid=$(as_root cat "$STATE_DIR/sandboxd.pid" 2>/dev/null || true)
    if ((SECONDS >= deadline)) || { [[ -n $pid ]] && ! lives_as "$pid"; }; then
      as_root tail -n 15 "$DAEMON_LOG" >&2
      die "sandboxd did not become ready at $(base_url)" "The end of $DAEMON_LOG is above."
    fi
    sleep 0.1
  done
  echo "$version" | as_root tee "$DAEMON_STAMP" >/dev/null
  say "sandboxd is ready at $(base_url)"
}

# A command with root rights, this shell's settings of sandboxd (sudo drops them) and no marks in the checkout.
sandboxd_as_root() {
  local name settings=()
  while read -r name; do
    settings+=("$name=${!name}")
  done < <(compgen -e | grep '^SANDBOXD_')
  as_root env "${settings[@]}" PYTHONDONTWRITEBYTECODE=1 "$@"
}

# SIGTERM: running requests get their time, sandboxes are kept.
stop_daemon() {
  local pid deadline
  pid=$(daemon_pid) || return 0
  as_root kill "$pid" || true
  deadline=$((SECONDS + ${SANDBOXD_DRAIN_TIMEOUT_S:-20} + 15))
  while lives_as "$pid"; do
    if ((SECONDS >= deadline)); then
      warn "sandboxd (pid $pid) does not end; killing it. Sandboxes are kept all the same."
      as_root kill -KILL "$pid" || true
      deadline=$((SECONDS + 15))
    fi
    sleep 0.1
  done
}

# The command, for the server that scripts/up started, whatever the caller's shell has exported.
cli() {
  env -u _8080_API_KEY -u _8080_BASE_URL "$VENV/bin/8080" --base-url "$(base_url)" "$@"
}

# A stored key that still works is kept.
ensure_key() {
  local key
  cli apikey list --json >/dev/null 2>&1 </dev/null && return
  say "creating a project and an API key, stored for the 8080 command ..."
  key=$(sandboxd_as_root "$VENV/bin/sandboxd" create-key --name "scripts/up by ${SUDO_USER:-$(id -un)}" </dev/null) ||
    die "sandboxd create-key failed" "Its own words are above."
  cli apikey set - <<<"$key" >&2
}
