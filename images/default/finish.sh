#!/bin/sh
# Runs as root inside the new root file system, after the Debian packages: the same for both ways of building.
# Needs no network. $1 = folder that holds this recipe and the wheels.
set -eu

recipe=$1
site=/usr/local/lib/python3.11/dist-packages
# Newer files get this one time (2026-01-01), so that a build can be repeated; .pyc record their sources' times.
epoch=1767225600

step() { echo "    $*" >&2; }

same_time() {
  find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path "$recipe" \) -prune -o \
    -newermt "@$epoch" -exec touch -h -d "@$epoch" {} +
}

step "installing the wheels"
# pip runs from its own wheel and installs itself; the .pyc are made below, all at once.
python3 "$(echo "$recipe"/pip-*.whl)/pip" install --quiet --no-index --find-links "$recipe" --no-compile \
  --require-hashes --no-deps --root-user-action ignore --break-system-packages --no-warn-script-location \
  -r "$recipe/requirements.lock"

step "removing what a sandbox does not need"
rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
# The libraries' own test suites, a third of their size; numpy.testing imports from numpy's, which stay.
find "$site" -type d -name tests -not -path "$site/numpy/*" -prune -exec rm -rf {} +
rm -rf "$site/matplotlib/mpl-data/sample_data"
find /usr/share/doc -not -name copyright -not -type d -delete
find /usr/share/man /usr/share/info /usr/share/locale -mindepth 1 -delete
find /etc/alternatives -xtype l -delete
rm -rf /usr/share/lintian /usr/share/bash-completion /root/.cache
find /var/log -type f -delete
# No package sources, nor the settings to reach them: those of the building machine are its own affair.
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/* /etc/apt/apt.conf.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/99mmdebstrap
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /var/cache/ldconfig/aux-cache /var/lib/dpkg/*-old

step "settings"
mkdir -p /home/user /opt/e80
cat >/etc/pip.conf <<'CONF'
[global]
disable-pip-version-check = true
no-cache-dir = true
CONF
# There is never a display; looking for one costs time at the first figure.
echo 'backend: agg' >>"$site/matplotlib/mpl-data/matplotlibrc"
PYTHONDONTWRITEBYTECODE=1 python3 "$recipe/bake_fonts.py"

step "clearing setuid and setgid bits"
find / -xdev -perm /6000 \( -type f -o -type d \) -exec chmod ug-s {} +

step "compiling every module"
find / -xdev -type d -name __pycache__ -prune -exec rm -rf {} +
same_time
python3 -m compileall -q -j 0 /usr/lib/python3.11 /usr/lib/python3 "$site"
same_time
