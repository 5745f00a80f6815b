# shellcheck shell=bash
# PostgreSQL for the tests, which start servers of their own from its programs.

# Debian's package would make and start a server of its own: not this time.
ensure_postgres() {
  compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && return
  local settings=/etc/postgresql-common/createcluster.d/e80.conf status=0
  as_root mkdir -p "${settings%/*}"
  echo 'create_main_cluster = false' | as_root tee "$settings" >/dev/null
  (apt_install postgresql) || status=$?
  as_root rm -f "$settings"
  ((status == 0)) || exit "$status"
}
