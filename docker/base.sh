#!/usr/bin/env bash
# Make a base image where none can be pulled: Debian 12 with its Python 3.11, from Debian's packages. `make base-image`.
# DEBIAN_MIRROR names a mirror; SOURCE_DATE_EPOCH makes two runs write the same bytes from the same packages.
set -euo pipefail

for program in mmdebstrap podman; do
  command -v "${program}" > /dev/null || {
    echo "${program} must be installed, it is not; on Debian: apt-get install ${program}" >&2
    exit 2
  }
done
folder="$(mktemp -d)"
trap 'rm -rf "${folder}"' EXIT
mmdebstrap --variant=minbase --include=python3,ca-certificates \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
  bookworm "${folder}/base.tar" ${DEBIAN_MIRROR:+"${DEBIAN_MIRROR}"}
podman import "${folder}/base.tar" localhost/limaml-base:bookworm
