#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Installs the Debian packages that the build needs, where any is missing.
#   bootstrap.sh            what `make run` and `make test` need
#   bootstrap.sh developer  the above and what `.ci/run` needs
set -eu

# ocl-icd-opencl-dev: Debian's package of oneDNN (libdnnl-dev) needs it and does not say so.
build_packages='
  g++ cmake ninja-build pkg-config
  libhwy-dev libdnnl-dev ocl-icd-opencl-dev libpcre2-dev nlohmann-json3-dev libcli11-dev
  libgtest-dev libbenchmark-dev'
developer_packages='clang-format-19 clang-tidy-19 clang-19 libclang-rt-19-dev
  python3 python3-dev python3-venv ccache shellcheck git make'

case "${1:-build}" in
  build) wanted=$build_packages ;;
  developer) wanted="$build_packages $developer_packages" ;;
  *)
    echo "usage: $0 [build|developer]" >&2
    exit 2
    ;;
esac

missing=$wanted
if command -v dpkg-query >/dev/null; then
  # shellcheck disable=SC2086  # a list of words
  installed=$(dpkg-query --show --showformat='${db:Status-Status} ${Package}\n' $wanted 2>/dev/null |
    sed -n 's/^installed //p')
  missing=
  for package in $wanted; do
    printf '%s\n' "$installed" | grep -qxF "$package" || missing="$missing $package"
  done
fi
# shellcheck disable=SC2086  # onto one line
set -- $missing
missing=$*
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "bootstrap: this system has no apt-get. Install the counterparts of these Debian packages" >&2
  echo "bootstrap: and run 'cmake --workflow --preset release' instead of make:" >&2
  echo "$missing" >&2
  exit 1
fi
root=
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null || ! sudo -v; then
    echo "bootstrap: these packages are missing and need root to install; as root, run:" >&2
    echo "apt-get update && apt-get install --yes --no-install-recommends $missing" >&2
    exit 1
  fi
  root=sudo
fi
echo "bootstrap: installing $missing"
$root apt-get update -qq
# shellcheck disable=SC2086  # a list of words
$root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -o Dpkg::Use-Pty=0 --yes --no-install-recommends \
  $missing </dev/null
