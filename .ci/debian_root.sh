#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs commands on a clean checkout of HEAD in a clean Debian 12 that has git and make and nothing
# else of ours. Needs root, debootstrap and git; packages come from this machine's own apt sources.
#   debian_root.sh [-k FOLDER] [COMMAND...]    default command: make run && make test
#   -k FOLDER  keep the Debian root there and reuse it if it exists (the checkout is always new)
set -euo pipefail

suite=bookworm
keep=
if [[ ${1:-} == -k ]]; then
  keep=$2
  shift 2
fi
command=${*:-make run && make test}
repository=$(cd "$(dirname "$0")/.." && pwd)
if [[ -n $keep ]]; then
  root=$keep
else
  root=$(mktemp -d)
  trap 'rm -rf --one-file-system -- "$root"' EXIT
fi

sources=$(apt-get indextargets --format "\$(REPO_URI) \$(RELEASE) \$(COMPONENT) \$(ORIGIN)" \
  'Created-By: Packages' | sed -n "s/^\(.* ${suite}[^ ]* .*\) Debian\$/\1/p" | sort -u)
mirror=$(sed -n "s/ $suite main\$//p" <<<"$sources" | head -1)
if [[ -z $mirror ]]; then
  echo "debian_root: apt on this machine has no source for Debian $suite main" >&2
  exit 1
fi

if [[ ! -e $root/var/lib/msa_root_complete ]]; then
  echo "== debootstrap $suite"
  debootstrap --variant=minbase --include=git,make,ca-certificates "$suite" "$root" "$mirror" \
    >"$root.log" 2>&1 || { tail -5 "$root.log" >&2; exit 1; }
  rm -f "$root.log"
  # The same network settings as the host; none of them is part of the system under test.
  awk '{print "deb", $0}' <<<"$sources" >"$root/etc/apt/sources.list"
  apt-config dump | grep -E '^Acquire::(https?|Check-[A-Za-z-]+)(::| ")' \
    >"$root/etc/apt/apt.conf.d/host" || true
  cp -L /etc/resolv.conf "$root/etc/resolv.conf"
  cp -RL /usr/local/share/ca-certificates/. "$root/usr/local/share/ca-certificates/"
  chroot "$root" update-ca-certificates >/dev/null 2>&1 || true
  touch "$root/var/lib/msa_root_complete"
fi

checkout=/root/msa.cpp
rm -rf --one-file-system -- "${root:?}$checkout"
git clone --quiet --no-hardlinks "$repository" "$root$checkout"
echo "== $(chroot "$root" cat /etc/debian_version): $command"
# The mounts live and die with the namespace.
# shellcheck disable=SC2016  # expanded by the inner shell
exec_in_root='mount -t proc proc "$1/proc" && cd / && exec chroot "$1" /usr/bin/env -i HOME=/root \
  PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  sh -c "cd $2 && $3"'
unshare --mount --propagation private sh -c "$exec_in_root" sh "$root" "$checkout" "$command" \
  </dev/null
