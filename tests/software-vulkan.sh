#!/usr/bin/env bash
# A current Mesa lavapipe (Vulkan on the CPU, with cooperative matrices) beside Debian's own, whose Mesa has none; and spirv-val, which
# knows these matrices, too.
#
#   bash tests/software-vulkan.sh DIR    installs it into DIR, unless it is there (about a minute and 600 MB), and writes
#                                        DIR/environment: variables for the Vulkan loader, the driver, cargo and the tests, to be sourced
#
# Exits with 3 where it cannot be had, and says on stderr why: it takes Debian on x86_64, root, and the network.
set -euo pipefail

# The first release of Debian whose Mesa has cooperative matrices in lavapipe.
release=forky

unavailable() {
    echo "No driver with cooperative matrices: $*" >&2
    exit 3
}

dir=$(realpath -m "${1:?usage: software-vulkan.sh DIR}")
lib=$dir/usr/lib/x86_64-linux-gnu
environment=$dir/environment

# Written last, so that an installation that was interrupted starts over; an earlier one has no spirv-val.
if ! grep -qs SPIRV_VAL "$environment"; then
    [[ $(uname -sm) == "Linux x86_64" ]] || unavailable "this is $(uname -sm), not Linux x86_64"
    grep -q '^ID=debian$' /etc/os-release 2>/dev/null || unavailable "this is not Debian"
    [[ $(id -u) -eq 0 ]] || unavailable "debootstrap needs root"
    command -v apt-get >/dev/null || unavailable "there is no apt-get"
    if ! command -v debootstrap >/dev/null; then
        # The install decides: an outdated list may do.
        apt-get -qq update </dev/null >&2 || true
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends debootstrap </dev/null >&2 ||
            unavailable "debootstrap cannot be installed"
    fi
    # From where this machine gets its own packages.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m1 '/debian/*$') ||
        unavailable "apt has no Debian mirror among its sources"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [[ -e $keyring ]] || unavailable "$keyring is missing, so that nothing could be verified"

    echo "Installing Mesa's lavapipe of Debian $release into $dir" >&2
    rm -rf "$dir"
    mkdir -p "$dir"
    # The script is named, for this debootstrap may be older than the release.
    debootstrap --variant=minbase --keyring="$keyring" --include=mesa-vulkan-drivers,libvulkan1,spirv-tools "$release" "$dir" "$mirror" \
        /usr/share/debootstrap/scripts/sid </dev/null >"$dir.log" 2>&1 || {
        tail -n 20 "$dir.log" "$dir/debootstrap/debootstrap.log" >&2 || true
        unavailable "debootstrap failed"
    }
    rm -rf "$dir"/var/cache/apt "$dir"/var/lib/apt/lists "$dir.log"
    printf '{"ICD":{"api_version":"1.4.0","library_path":"%s"},"file_format_version":"1.0.1"}\n' \
        "$lib/libvulkan_lvp.so" >"$dir/lavapipe.json"
    # The binary runs under the newer C library, which the driver needs. Subgroups are as wide as vectors: 8 lanes on
    # every machine.
    run="$dir/lib64/ld-linux-x86-64.so.2 --library-path $lib"
    printf "export %s='%s'\n" \
        VK_DRIVER_FILES "$dir/lavapipe.json" \
        LP_NATIVE_VECTOR_WIDTH 256 \
        CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER "$run" \
        SINK_ATTENTION_SPIRV_VAL "$run $dir/usr/bin/spirv-val" >"$environment"
fi
echo "$environment"
