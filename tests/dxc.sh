#!/usr/bin/env bash
# Microsoft's DXC, as a library for Linux on x86_64, for the test that compiles every kernel's HLSL with it.
#
#   bash tests/dxc.sh DIR    installs it into DIR, unless it is there (67 MB to download, 34 MB to keep), and prints the library's path,
#                            which SINK_ATTENTION_DXC takes
#
# No package of Debian and no crate holds a built DXC; the Python package compushady does, in its source. Nothing of it is run but what pip
# runs to read its name. Exits with 3 where it cannot be had, and says on stderr why: it takes Linux on x86_64, Python's pip, and the network.
set -euo pipefail

unavailable() {
    echo "No DXC: $*" >&2
    exit 3
}

dir=$(realpath -m "${1:?usage: dxc.sh DIR}")
library=$dir/libdxcompiler.so
if [[ ! -e $library ]]; then
    [[ $(uname -sm) == "Linux x86_64" ]] || unavailable "this is $(uname -sm), not Linux x86_64"
    python3 -m pip --version >/dev/null 2>&1 || unavailable "there is no pip for python3"
    mkdir -p "$dir"
    temp=$(mktemp -d)
    trap 'rm -rf "$temp"' EXIT
    # Built in May 2024, by its hash.
    echo "compushady==0.17.5 --hash=sha256:5052caf9e955d8e7a48e22f536e82b44b72e83af46e824a9e99157c7809de691" >"$temp/requirements"
    python3 -m pip -q download --no-deps --no-binary :all: --require-hashes -r "$temp/requirements" -d "$temp" </dev/null >&2 ||
        unavailable "pip cannot download compushady"
    tar -xzf "$temp"/compushady-*.tar.gz -C "$temp" --wildcards '*/libdxcompiler_x86_64.so.*'
    # Renamed at the end, so that an interrupted installation starts over.
    mv "$temp"/*/*/*/libdxcompiler_x86_64.so.* "$dir/new"
    mv "$dir/new" "$library"
fi
echo "$library"
