#!/usr/bin/env bash
# Build the images limaml-airflow, limaml-train and limaml-serve on BASE, with buildah or docker, whichever is there.
# `make images BASE=…`; docker/README.md has the variables.
set -euo pipefail
cd "$(dirname "$0")/.."

say() {
  echo "$1" >&2
  exit 2
}

case "${BASE:-}" in
  "") say "BASE must name the base image by its digest, e.g. docker.io/library/python:3.11-slim-bookworm@sha256:…, it is not set; \
see docker/README.md, or make one with \`make base-image\` and BASE=localhost/limaml-base:bookworm" ;;
  *@sha256:* | localhost/*) ;;
  *) say "BASE must name the base image by its digest (NAME@sha256:…) or be one of this machine (localhost/…), got ${BASE}; \
\`skopeo inspect docker://${BASE}\` prints its digest" ;;
esac
if command -v buildah > /dev/null; then
  # Health checks and SHELL belong to Docker's image format only.
  build=(buildah bud --layers --format docker --pull=false)
elif command -v docker > /dev/null; then
  build=(docker build)
else
  say "buildah or docker must be installed, neither is; on Debian: apt-get install buildah podman"
fi
version="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"
revision="$(git rev-parse HEAD 2> /dev/null || echo unknown)"
read -r -a more <<< "${IMAGE_ARGS:-}"
# The revision is a label here as well: buildah 1.28 takes a LABEL of an ARG from its cache though the ARG has another value.
for image in ${IMAGES:-airflow train serve}; do
  "${build[@]}" --file "docker/${image}/Dockerfile" --tag "${IMAGE_PREFIX:-localhost/limaml}-${image}:${version}" \
    --build-arg "BASE=${BASE}" --build-arg "VERSION=${version}" --build-arg "REVISION=${revision}" \
    --label "org.opencontainers.image.revision=${revision}" "${more[@]}" .
done
