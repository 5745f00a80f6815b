# shellcheck shell=bash
# The default image: its content hash, and two ways to build it. Needs lib/engine.sh.

RECIPE=$REPO/images/default
IMAGE_NAME=e80/default
CONTEXT=$REPO/build/image
# The files that decide what is in the image.
RECIPE_FILES=(Dockerfile bake_fonts.py finish.sh packages.txt requirements.lock)

image_hash() {
  (cd "$RECIPE" && sha256sum "${RECIPE_FILES[@]}") | sha256sum | cut -d ' ' -f 1
}

# ensure_image [--force]: builds the image when the engine does not have it.
ensure_image() {
  local hash image
  hash=$(image_hash)
  image=$IMAGE_NAME:${hash:0:12}
  if [[ ${1:-} != --force ]] && engine image inspect "$image" >/dev/null 2>&1; then
    engine tag "$image" "$IMAGE_NAME:latest"
    return
  fi
  say "building $image (a few minutes at most) ..."
  build_image "$hash"
  say "testing the image ..."
  if ! smoke_test "$IMAGE_NAME:building"; then
    engine rmi "$IMAGE_NAME:building" >/dev/null
    die "the image that was built does not pass images/default/smoke.sh" "The check that failed is above."
  fi
  engine tag "$IMAGE_NAME:building" "$image"
  engine tag "$IMAGE_NAME:building" "$IMAGE_NAME:latest"
  engine rmi "$IMAGE_NAME:building" >/dev/null
  # What --force replaced has no name any more; the engine keeps it while a container uses it.
  engine image prune --force --filter label=e80.content-hash >/dev/null
  say "$image is ready: $(($(engine image inspect --format '{{.Size}}' "$image") / 1000000)) MB"
}

# E80_IMAGE_BUILD: dockerfile (base image from a registry), bootstrap (Debian's packages only), auto.
build_image() {
  local hash=$1 way=${E80_IMAGE_BUILD:-auto} base
  [[ $way =~ ^(auto|dockerfile|bootstrap)$ ]] ||
    die "E80_IMAGE_BUILD=$way is unknown" "Use auto, dockerfile or bootstrap."
  collect_recipe
  if [[ $way != bootstrap ]]; then
    base=$(awk '/^FROM/ { print $2; exit }' "$RECIPE/Dockerfile")
    if engine image inspect "$base" >/dev/null 2>&1 || engine pull --quiet "$base" >/dev/null 2>&1; then
      build_from_dockerfile "$hash" && return
      [[ $way == auto ]] || die "the Dockerfile could not be built" "The builder's own words are above."
      warn "the Dockerfile could not be built; trying Debian's packages alone"
    elif [[ $way == dockerfile ]]; then
      die "no registry gives $base" "E80_IMAGE_BUILD=bootstrap builds without a registry."
    else
      say "  no registry gives $base: building from Debian's packages alone"
    fi
  fi
  build_from_packages "$hash"
}

# The recipe and the wheels, side by side in $CONTEXT. The wheels come through pip as it is set up here.
collect_recipe() {
  local platforms=() glibc arch
  arch=$(uname -m)
  for glibc in 17 24 26 27 28 31 34 35 36; do # Debian 12 has glibc 2.36
    platforms+=(--platform "manylinux_2_${glibc}_$arch")
  done
  say "  downloading wheels ..."
  rm -rf "$CONTEXT"
  mkdir -p "$CONTEXT"
  "$VENV/bin/python" -m pip download -qq --disable-pip-version-check --no-deps --require-hashes \
    --only-binary :all: --python-version 3.11 --implementation cp --platform "manylinux2014_$arch" \
    "${platforms[@]}" --dest "$CONTEXT" -r "$RECIPE/requirements.lock" ||
    die "pip could not download the image's libraries" "Its own words are above; it uses your pip settings (pip config list)."
  (cd "$RECIPE" && cp "${RECIPE_FILES[@]}" "$CONTEXT")
}

build_from_dockerfile() {
  say "  building the Dockerfile ..."
  # The host's network: the engine may have no bridge. The output of apt goes to a log, progress to the eye.
  DOCKER_BUILDKIT=0 engine build --network host --force-rm --label "e80.content-hash=$1" \
    --tag "$IMAGE_NAME:building" "$CONTEXT" >"$REPO/build/image.log" 2>&1 || {
    tail -n 15 "$REPO/build/image.log" >&2
    return 1
  }
  # The first stage, which the builder keeps.
  engine image prune --force --filter label=e80.stage=build >/dev/null
}

build_from_packages() {
  local hash=$1 changes=() sources=() options=() line
  need_command mmdebstrap mmdebstrap
  [[ -e /usr/share/keyrings/debian-archive-keyring.gpg ]] || apt_install debian-archive-keyring
  while read -r line; do
    changes+=(--change "$line")
  done < <(sed -n '/^FROM files/,$ { /^FROM/d; p }' "$RECIPE/Dockerfile")
  debian_sources >"$CONTEXT/sources.list"
  [[ ! -s $CONTEXT/sources.list ]] || sources=("$CONTEXT/sources.list")
  while read -r line; do
    options+=("--aptopt=${line%;}")
  done < <(apt-config dump | grep -E '^Acquire::(https?::|Check-|Retries)')
  say "  unpacking Debian's packages ..."
  # Debian's file times and one fixed time for all others: the same input gives the same image.
  as_root env TMPDIR="${TMPDIR:-/var/tmp}" SOURCE_DATE_EPOCH=1767225600 E80_CONTEXT="$CONTEXT" \
    mmdebstrap --quiet --mode=root --variant=minbase --format=tar \
    --include="$(grep -v '^#' "$RECIPE/packages.txt" | paste -sd ,)" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    "${options[@]}" \
    --customize-hook='mkdir "$1/recipe" && cp "$E80_CONTEXT"/* "$1/recipe/"' \
    --customize-hook='env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 chroot "$1" sh /recipe/finish.sh /recipe' \
    --customize-hook='rm -rf "$1/recipe"' \
    bookworm - "${sources[@]}" </dev/null |
    engine import "${changes[@]}" --change "LABEL e80.content-hash=$hash" - "$IMAGE_NAME:building" >/dev/null ||
    die "the image could not be built from Debian's packages" "mmdebstrap's own words are above."
}

# This machine's own sources of Debian 12, if it has any; else mmdebstrap knows where Debian's are.
debian_sources() {
  apt-get indextargets --format '$(ORIGIN) $(RELEASE) $(REPO_URI) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
    awk '$1 == "Debian" && $2 ~ /^bookworm(-updates|-security)?$/ && $4 == "main" { print "deb", $3, $2, $4 }' | sort -u
}

# smoke_test IMAGE: images/default/smoke.sh in a container with what every sandbox has.
smoke_test() {
  local uid=200000 passwd status=0
  passwd=$(mktemp /var/tmp/e80-passwd.XXXXXX)
  echo "user:x:$uid:$uid:user:/home/user:/bin/bash" >"$passwd"
  chmod 0644 "$passwd"
  engine run --rm --network none --read-only --cap-drop ALL --security-opt no-new-privileges \
    --security-opt "seccomp=$REPO/sandboxd/runtimes/docker/seccomp.json" --ipc private --log-driver none \
    --user "$uid:$uid" --pids-limit 256 --memory 1g --memory-swap 1g \
    --tmpfs /tmp:rw,exec,nosuid,nodev,size=64m,mode=1777 \
    --tmpfs "/home/user:rw,exec,nosuid,nodev,size=256m,uid=$uid,gid=$uid,mode=0700" \
    --mount "type=bind,src=$passwd,dst=/etc/passwd,readonly" \
    --mount "type=bind,src=$RECIPE,dst=/smoke,readonly" "$1" bash /smoke/smoke.sh >&2 </dev/null || status=$?
  rm -f "$passwd"
  return $status
}
