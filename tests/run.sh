#!/usr/bin/env bash
# Runs every test and the demo on a GPU adapter: bash tests/run.sh
#
# Where there is no adapter, a software Vulkan driver (Mesa's llvmpipe) is installed on Debian and Ubuntu; elsewhere
# the script says what is missing. macOS and Windows bring their own driver.
#
# A software driver compiles each kernel for a second or more. So that a machine with two cores is done in 20 minutes, the
# tests try every option, element type and kernel with few widths and tiles. All of them, and the whole device check, on
# cooperative matrices too: SINK_ATTENTION_TESTS=all bash tests/run.sh
#
# Last come the kernels on cooperative matrices (tensor cores), on a newer software driver that has such matrices; where
# tests/software-vulkan.sh cannot install it, this says so, here and in the last line.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

temp=$(mktemp -d) || exit 1
trap 'rm -rf "$temp"' EXIT

# The loader, and a driver with something to drive: a software one, or one for a GPU that is there.
have_vulkan() {
    local libraries dir file
    libraries=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null)
    if [[ $libraries != *libvulkan.so.1* ]]; then
        local found=
        local -a dirs=()
        IFS=: read -ra dirs <<<"${LD_LIBRARY_PATH:-}"
        for dir in ${dirs[@]+"${dirs[@]}"}; do
            [[ -e $dir/libvulkan.so.1 ]] && found=1
        done
        [[ $found ]] || return 1
    fi
    [[ -n ${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-} ]] && return 0
    local gpu=
    for file in /dev/dri/renderD* /dev/nvidia[0-9]* /dev/dxg; do
        [[ -e $file ]] && gpu=1
    done
    local -a places=()
    IFS=: read -ra places <<<"${XDG_CONFIG_HOME:-${HOME:-/root}/.config}:${XDG_CONFIG_DIRS:-/etc/xdg}:/etc:${XDG_DATA_HOME:-${HOME:-/root}/.local/share}:${XDG_DATA_DIRS:-/usr/local/share:/usr/share}:/usr/share"
    for dir in "${places[@]}"; do
        for file in "$dir"/vulkan/icd.d/*.json; do
            case "${file##*/}" in
                '*.json') ;;
                lvp_* | *swiftshader*) return 0 ;;
                *) [[ $gpu ]] && return 0 ;;
            esac
        done
    done
    return 1
}

install_vulkan() {
    local -a as_root=()
    if ! command -v apt-get >/dev/null; then
        echo "No Vulkan driver was found, and there is no apt-get to install one with." >&2
        echo "Install your system's Vulkan loader and Mesa's software driver (lavapipe), then run this again:" >&2
        echo "  Fedora: mesa-vulkan-drivers vulkan-loader   Arch: vulkan-swrast vulkan-icd-loader" >&2
        echo "  Alpine: mesa-vulkan-swrast vulkan-loader    openSUSE: libvulkan_lvp libvulkan1" >&2
        return 1
    fi
    if [[ $(id -u) -ne 0 ]]; then
        if ! command -v sudo >/dev/null; then
            echo "No Vulkan driver was found. As root: apt-get install mesa-vulkan-drivers libvulkan1" >&2
            return 1
        fi
        as_root=(sudo)
        [[ -t 0 ]] || as_root=(sudo -n)
    fi
    as_root+=(env DEBIAN_FRONTEND=noninteractive apt-get -qq)
    echo "No Vulkan driver was found: installing Mesa's software driver"
    # The install decides: an outdated list may do.
    "${as_root[@]}" update </dev/null || echo "apt-get update failed; trying all the same" >&2
    if ! "${as_root[@]}" install -y --no-install-recommends mesa-vulkan-drivers libvulkan1 </dev/null >"$temp/apt" 2>&1; then
        cat "$temp/apt" >&2
        echo "Installing mesa-vulkan-drivers and libvulkan1 failed" >&2
        return 1
    fi
    have_vulkan && return 0
    echo "mesa-vulkan-drivers and libvulkan1 are installed, but no Vulkan driver was found" >&2
    return 1
}

case $(uname -s) in
    Darwin | MINGW* | MSYS* | CYGWIN*) ;;
    *) have_vulkan || install_vulkan || exit 1 ;;
esac

# A GPU test without an adapter fails, instead of warning.
export SINK_ATTENTION_REQUIRE_GPU=1
# Drivers complain where it is unset.
if [[ -z ${XDG_RUNTIME_DIR:-} ]]; then
    mkdir -m 700 "$temp/runtime"
    export XDG_RUNTIME_DIR=$temp/runtime
fi

passed=0
failed=0

# Runs a command that counts as one test.
step() {
    echo
    echo "== $*"
    if "$@" </dev/null; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $*" >&2
    fi
}

# Runs cargo test, each of whose tests counts.
tests() {
    local status p f
    echo
    echo "== cargo test --features cli $*"
    cargo test --features cli --no-fail-fast "$@" </dev/null 2>&1 | tee "$temp/log"
    status=${PIPESTATUS[0]}
    read -r p f < <(awk '/^test result:/ { p += $4; f += $6 } END { print p + 0, f + 0 }' "$temp/log")
    # What fails without a test's name: a build, or a test binary that crashed.
    [[ $status -ne 0 && $f -eq 0 ]] && f=1
    passed=$((passed + p))
    failed=$((failed + f))
}

# Unit, integration and documentation tests, the README's code, and the tests inside the examples. Without the feature
# `checked-shaders`: these are the shaders that users get.
tests

# Built by one command in the tests' profile, which is optimised, so that no dependency is compiled again.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
if cargo build --features cli --bin sink-attention --example streaming --example fit_sinks --example gpt_oss_layer </dev/null; then
    # As users start them, which on a machine with a software driver alone is on the CPU, and on a GPU adapter.
    adapters=("" gpu)
    [[ ${SINK_ATTENTION_ADAPTER:-} ]] && adapters=("$SINK_ATTENTION_ADAPTER")
    for adapter in "${adapters[@]}"; do
        on=(env "SINK_ATTENTION_ADAPTER=$adapter")
        step "${on[@]}" "$CARGO_TARGET_DIR/debug/examples/streaming" --tokens 4000 --out "$temp/streaming.svg"
        step "${on[@]}" "$CARGO_TARGET_DIR/debug/examples/gpt_oss_layer" tests/gpt_oss_tiny
        step "${on[@]}" "$CARGO_TARGET_DIR/debug/examples/fit_sinks" --out "$temp/fit_sinks.svg"
        step "${on[@]}" "$CARGO_TARGET_DIR/debug/sink-attention" bench --quick --shape seed
    done
else
    failed=$((failed + 1))
fi

skipped=
echo
echo "== tests/software-vulkan.sh"
environment=$(bash tests/software-vulkan.sh "$CARGO_TARGET_DIR/software-vulkan" 2> >(tee "$temp/software-vulkan" >&2))
case $? in
    0)
        start=$SECONDS
        # shellcheck source=/dev/null
        . "$environment"
        # Another driver, or an adapter of one, is not what is asked for here.
        unset VK_ICD_FILENAMES SINK_ATTENTION_ADAPTER
        export SINK_ATTENTION_REQUIRE_COOPERATIVE=1
        # Of other suites what takes long is left out.
        few=(--skip size:: --skip properties::)
        [[ ${SINK_ATTENTION_TESTS:-} == all ]] && few=()
        tests --test suites -- cooperative ${few[@]+"${few[@]}"}
        echo
        echo "== $((SECONDS - start)) s on cooperative matrices"
        ;;
    3)
        skipped=", SKIPPED the kernels on cooperative matrices: $(tail -n 1 "$temp/software-vulkan")"
        echo "!!!! The kernels on cooperative matrices are NOT TESTED !!!!" >&2
        ;;
    *)
        failed=$((failed + 1))
        echo "FAILED: tests/software-vulkan.sh" >&2
        ;;
esac

echo
echo "$passed passed, $failed failed$skipped"
[[ $failed -eq 0 ]]
