# shellcheck shell=bash
# What the test scripts of the members share; they source this file.
#
# A script runs the tests of one member, and with the argument `--lint` its format, clippy and documentation, too. Its last
# line is "N passed, M failed", followed by ", SKIPPED ..." for what could not be set up here. tests/run.sh adds these lines up.

temp=$(mktemp -d) || exit 1
trap 'rm -rf "$temp"' EXIT

passed=0
failed=0
skipped=
lint=
for argument in "$@"; do
    case $argument in
        --lint) lint=1 ;;
        *)
            echo "unknown argument $argument; known: --lint" >&2
            exit 2
            ;;
    esac
done

# Every build of the core's members names all of them, so that they agree about the features of what they share. Otherwise
# naga, wgpu and the library would be compiled once for each member.
core=(-p sink-attention -p sink-attention-examples -p sink-attention-cli)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}

# Runs a command that counts as one test.
step() {
    local start=$SECONDS
    echo
    echo "== $*"
    if "$@" </dev/null; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $*" >&2
    fi
    echo "== $((SECONDS - start)) s"
}

# Runs cargo test, each of whose tests counts.
tests() {
    local status p f start=$SECONDS
    echo
    echo "== cargo test $*"
    cargo test --no-fail-fast "$@" </dev/null 2>&1 | tee "$temp/log"
    status=${PIPESTATUS[0]}
    read -r p f < <(awk '/^test result:/ { p += $4; f += $6 } END { print p + 0, f + 0 }' "$temp/log")
    # What fails without a test's name: a build, or a test binary that crashed.
    [[ $status -ne 0 && $f -eq 0 ]] && f=1
    passed=$((passed + p))
    failed=$((failed + f))
    echo "== $((SECONDS - start)) s"
}

# What could not be set up, for the last line.
skip() {
    skipped+=", SKIPPED $*"
    echo "!!!! NOT TESTED: $* !!!!" >&2
}

# The last line, and the exit status.
finish() {
    echo
    echo "$passed passed, $failed failed$skipped"
    [[ $failed -eq 0 ]]
    exit
}

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


# A GPU adapter for the tests: a GPU's driver, or a software driver, which is installed where there is none.
need_vulkan() {
    case $(uname -s) in
        Darwin | MINGW* | MSYS* | CYGWIN*) ;;
        *)
            if ! have_vulkan && ! install_vulkan; then
                failed=$((failed + 1))
                skip "everything: there is no Vulkan driver, and none could be installed"
                finish
            fi
            ;;
    esac
    # A GPU test without an adapter fails, instead of warning.
    export SINK_ATTENTION_REQUIRE_GPU=1
    # Drivers complain where it is unset.
    if [[ -z ${XDG_RUNTIME_DIR:-} ]]; then
        mkdir -m 700 "$temp/runtime"
        export XDG_RUNTIME_DIR=$temp/runtime
    fi
}
