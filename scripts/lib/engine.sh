# shellcheck shell=bash
# The Docker Engine: finds one that shares this host's file system, else installs and starts one.
# Sets and exports SANDBOXD_DOCKER_URL.

DEFAULT_ENGINE=unix:///var/run/docker.sock
# All of an engine of our own in one folder instead of Docker's usual places (the tests use it).
E80_DOCKERD_DIR=${E80_DOCKERD_DIR:-}
DOCKERD_LOG=$STATE_DIR/dockerd.log
DOCKERD_STARTED=$STATE_DIR/dockerd.started

# docker, told which engine; with root rights where its socket needs them.
engine() { on_engine "$SANDBOXD_DOCKER_URL" "$@"; }

on_engine() {
  local url=$1 socket=${1#unix://}
  shift
  if [[ $url == unix://* && ! -w $socket ]]; then
    as_root docker -H "$url" "$@"
  else
    docker -H "$url" "$@"
  fi
}

engine_answers() {
  [[ $1 != unix://* || -S ${1#unix://} ]] && command -v docker >/dev/null &&
    on_engine "$1" version --format '{{.Server.Version}}' >/dev/null 2>&1 </dev/null
}

# A remote engine cannot serve sockets and loop mounts of this host. A container that binds a marker file shows
# it; `docker cp` reads it without running anything, so an empty image will do.
engine_shares_files() {
  local url=$1 marker image=e80/probe:empty container="" seen=""
  marker=$(mktemp -d /var/tmp/e80-marker.XXXXXX)
  echo "$marker" >"$marker/marker"
  chmod 0755 "$marker"
  tar -c --files-from /dev/null | on_engine "$url" import - "$image" >/dev/null 2>&1 || true
  if container=$(on_engine "$url" create --network none \
    --mount "type=bind,src=$marker,dst=/probe,readonly" "$image" none 2>/dev/null); then
    seen=$(on_engine "$url" cp "$container:/probe/marker" - 2>/dev/null | tar -xO 2>/dev/null || true)
    on_engine "$url" rm "$container" >/dev/null 2>&1 || true
  fi
  on_engine "$url" rmi "$image" >/dev/null 2>&1 || true
  rm -rf "$marker"
  [[ $seen == "$marker" ]]
}

ensure_engine() {
  local url candidates=("${SANDBOXD_DOCKER_URL:-$DEFAULT_ENGINE}")
  [[ -n ${SANDBOXD_DOCKER_URL:-} || -z ${DOCKER_HOST:-} ]] || candidates=("$DOCKER_HOST" "$DEFAULT_ENGINE")
  for url in "${candidates[@]}"; do
    engine_answers "$url" || continue
    if engine_shares_files "$url"; then
      export SANDBOXD_DOCKER_URL=$url
      check_live_restore
      return
    fi
    warn "the Docker Engine at $url does not share this host's file system (a remote engine?): not used"
    # A socket that is taken cannot be given to an engine of our own.
    [[ $url != "${candidates[-1]}" ]] ||
      die "no usable Docker Engine at $url" "Name a local one: SANDBOXD_DOCKER_URL=unix:///path/to/docker.sock $0"
  done
  export SANDBOXD_DOCKER_URL=${candidates[-1]}
  [[ $SANDBOXD_DOCKER_URL == unix://* ]] ||
    die "the Docker Engine at $SANDBOXD_DOCKER_URL does not answer" \
      "Start it, or unset SANDBOXD_DOCKER_URL to have one installed on this machine."
  start_engine
  engine_shares_files "$SANDBOXD_DOCKER_URL" ||
    die "the Docker Engine at $SANDBOXD_DOCKER_URL started but cannot bind a folder of this host" \
      "Is this script itself in a container, without the engine's /var/tmp? See $DOCKERD_LOG."
}

check_live_restore() {
  [[ $(engine info --format '{{.LiveRestoreEnabled}}' 2>/dev/null) != false ]] ||
    warn "the Docker Engine runs without live-restore: its restart would end all sandboxes." \
      "Put \"live-restore\": true into /etc/docker/daemon.json and reload it."
}

start_engine() {
  state_folder
  local by_systemd=
  [[ -z $E80_DOCKERD_DIR && $SANDBOXD_DOCKER_URL == "$DEFAULT_ENGINE" && -d /run/systemd/system ]] && by_systemd=1
  # Before the package is there, because its first act is to start the service.
  [[ -z $by_systemd ]] || dockerd_config /etc/docker/daemon.json /etc/docker/daemon.json live-restore=true
  install_engine
  if [[ -n $by_systemd ]]; then
    start_engine_by_systemd
  else
    start_engine_in_background
  fi
  say "Docker Engine $(engine version --format '{{.Server.Version}}') runs at $SANDBOXD_DOCKER_URL"
}

install_engine() {
  local packages=()
  PATH=$PATH:/usr/sbin command -v dockerd >/dev/null || packages+=(docker.io)
  if ((${#packages[@]})) || ! command -v docker >/dev/null; then
    apt_update
    # The client became a package of its own in later releases.
    if command -v docker >/dev/null; then
      :
    elif apt-cache show docker-cli >/dev/null 2>&1; then
      packages+=(docker-cli)
    elif ((${#packages[@]} == 0)); then
      packages+=(docker.io)
    fi
    apt_install "${packages[@]}"
  fi
}

# dockerd_config FROM TO KEY=JSON...: copies the engine's settings with these keys set, and keeps all others.
dockerd_config() {
  local from=$1 to=$2
  shift 2
  as_root "$VENV/bin/python" - "$from" "$to" "$@" <<'PYTHON' || die "$from could not be used" "Repair or remove it, then run again."
import json
import os
import pathlib
import sys

source, target = map(pathlib.Path, sys.argv[1:3])
text = source.read_text(encoding="utf-8") if source.exists() else ""
try:
    settings = json.loads(text) if text.strip() else {}
    before = dict(settings)
except ValueError as error:
    sys.exit(f"{source}: {error}")
for setting in sys.argv[3:]:
    key, _, value = setting.partition("=")
    settings[key] = json.loads(value)
if settings != before or source != target:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".e80")
    scratch.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, target)
PYTHON
}

start_engine_by_systemd() {
  say "starting the Docker Engine by systemd ..."
  as_root systemctl reset-failed docker.service docker.socket >/dev/null 2>&1 || true
  if ! as_root systemctl start docker.service || ! await_engine 60; then
    warn "docker.service did not start; trying without the docker0 bridge, which this machine may not allow"
    as_root cp /etc/docker/daemon.json "$STATE_DIR/daemon.json.before"
    dockerd_config /etc/docker/daemon.json /etc/docker/daemon.json 'bridge="none"' iptables=false ip6tables=false
    as_root systemctl reset-failed docker.service >/dev/null 2>&1 || true
    { as_root systemctl restart docker.service && await_engine 60; } || {
      as_root cp "$STATE_DIR/daemon.json.before" /etc/docker/daemon.json
      die "docker.service does not start" "Its words: journalctl -u docker.service -n 50"
    }
  fi
  # Where the service ran before these settings were written.
  [[ $(engine info --format '{{.LiveRestoreEnabled}}') == true ]] || as_root systemctl reload docker.service
}

start_engine_in_background() {
  local config=$STATE_DIR/dockerd.json pid_file=/var/run/docker.pid exec_root=/var/run/docker settings=()
  if [[ -n $E80_DOCKERD_DIR ]]; then
    pid_file=$E80_DOCKERD_DIR/docker.pid exec_root=$E80_DOCKERD_DIR/exec
    settings=("data-root=\"$E80_DOCKERD_DIR/data\"" "exec-root=\"$exec_root\"")
  fi
  # No bridge and no firewall rules: sandboxes have no network interface, and many machines forbid both.
  dockerd_config /etc/docker/daemon.json "$config" live-restore=true 'bridge="none"' iptables=false \
    "hosts=[\"$SANDBOXD_DOCKER_URL\"]" "pidfile=\"$pid_file\"" "${settings[@]}"
  remove_stale_pid_file "$pid_file" dockerd
  remove_stale_pid_file "$exec_root/containerd/containerd.pid" containerd
  say "starting the Docker Engine in the background (log: $DOCKERD_LOG) ..."
  as_root rm -f "$DOCKERD_STARTED"
  begin_log "$DOCKERD_LOG"
  # The shell becomes dockerd, so its pid is dockerd's. Descriptor 9 is a lock of scripts/up.
  as_root env PATH="$PATH:/usr/sbin:/sbin" setsid --fork sh -c \
    'umask 022; exec </dev/null >>"$2" 2>&1 9>&-; echo $$ >"$3"; exec dockerd --config-file "$1"' \
    dockerd "$config" "$DOCKERD_LOG" "$DOCKERD_STARTED"
  if ! await_engine 60 "$DOCKERD_STARTED"; then
    as_root tail -n 15 "$DOCKERD_LOG" >&2
    as_root rm -f "$DOCKERD_STARTED"
    die "the Docker Engine does not answer at $SANDBOXD_DOCKER_URL" "The end of $DOCKERD_LOG is above."
  fi
}

# After SIGKILL these files stay and keep the next engine from starting, even when their number has since gone
# to another process.
remove_stale_pid_file() {
  local file=$1 program=$2
  as_root test -e "$file" || return 0
  lives_as "$(as_root cat "$file")" "$program" || {
    say "removing $file, left by a $program that no longer lives"
    as_root rm -f "$file"
  }
}

# await_engine SECONDS [PID_FILE]: until it answers; no longer than the process in the file lives.
await_engine() {
  local deadline=$((SECONDS + $1)) pid=""
  until engine_answers "$SANDBOXD_DOCKER_URL"; do
    ((SECONDS < deadline)) || return 1
    [[ -z ${2:-} ]] || pid=$(as_root cat "$2" 2>/dev/null || true)
    [[ -z $pid ]] || lives_as "$pid" || return 1
    sleep 0.2
  done
}

# Stops the engine only if start_engine_in_background started it and it is still the same process.
stop_engine() {
  local pid
  pid=$(as_root cat "$DOCKERD_STARTED" 2>/dev/null) || {
    say "the Docker Engine was not started by scripts/up: left running"
    return 0
  }
  if lives_as "$pid" dockerd; then
    say "stopping the Docker Engine (pid $pid) ..."
    as_root kill "$pid"
    local deadline=$((SECONDS + 60))
    while lives_as "$pid" dockerd; do
      ((SECONDS < deadline)) || die "the Docker Engine (pid $pid) does not stop" "See $DOCKERD_LOG."
      sleep 0.1
    done
  fi
  as_root rm -f "$DOCKERD_STARTED"
}
