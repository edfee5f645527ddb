#!/usr/bin/env bash
# What the shader compilers of AMD's, Apple's, Qualcomm's and NVIDIA's GPUs make of the kernels, without such a GPU: bash tests/compilers.sh [--lint]
#
# tests/compilers.txt has a line for each kernel of the standard problems (those of `sink-attention bench`, and decoding) on each device: registers,
# spills, and the subgroups that an execution unit holds at a time. A spill fails, and so do fewer than 4 subgroups (2 on Adreno, which counts a core's
# halves), but on NVIDIA's GPUs, whose compiler here is not the vendor's. A line that differs from the file fails where Mesa's version is that of the file,
# and is printed otherwise. `UPDATE_COMPILERS=1 bash tests/compilers.sh` writes the file. With SINK_ATTENTION_TESTS=all the kernels of every option and
# type are compiled, too.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tests/lib.sh
. tests/lib.sh

file=tests/compilers.txt
place=$CARGO_TARGET_DIR/software-vulkan
program=$CARGO_TARGET_DIR/debug/examples/driver_stats

# The lines of a device in a file.
lines_of() { grep "^$1 " "$2"; }

# The lines that have spills or too few subgroups.
beyond_limits() {
    local least=4
    [[ $1 == adreno* ]] && least=2
    awk -v least="$least" '{ for (i = 2; i <= NF; i++) { if ($i ~ /^spills/ && $(i - 1) > 0) print; if ($i == "waves" && $(i - 1) < least) print } }'
}

# Lists a device's kernels, and holds them against the limits and the reviewed file.
check_device() {
    local device=$1 kernels=0
    if ! bash tests/vendor-compilers.sh "$place" "$device" "$program" --list standard >"$temp/listed" 2>"$temp/errors"; then
        tail -n 20 "$temp/errors" >&2
        return 1
    fi
    # The first line names the adapter.
    sed "1d; s/^/$device /" "$temp/listed" >"$temp/lines"
    cat "$temp/lines" >>"$temp/new"
    kernels=$(wc -l <"$temp/lines")
    echo "$device: $kernels kernels"
    [[ $kernels -ge 30 ]] || return 1
    if [[ $device != turing && $device != ampere ]] && beyond_limits "$device" <"$temp/lines" | grep .; then
        echo "spills, or too few subgroups" >&2
        return 1
    fi
    [[ ${UPDATE_COMPILERS:-} ]] && return 0
    lines_of "$device" "$file" >"$temp/reviewed"
    diff "$temp/reviewed" "$temp/lines" && return 0
    if [[ $(lines_of mesa "$file") == "$version" ]]; then
        echo "not as in $file; UPDATE_COMPILERS=1 bash tests/compilers.sh writes it anew" >&2
        return 1
    fi
    echo "This is $version; $file is of $(lines_of mesa "$file")."
}

# Every option and type. A driver that refuses a kernel fails; spills are listed.
check_every() {
    local status
    timeout 3600 bash tests/vendor-compilers.sh "$place" "$1" "$program" --list every 2>"$temp/errors"
    status=$?
    [[ $status -eq 0 ]] || tail -n 20 "$temp/errors" >&2
    return $status
}

devices=$(bash tests/vendor-compilers.sh "$place" 2> >(tee "$temp/vendors" >&2))
case $? in
    0)
        version="mesa $(awk -F'\t' '$1 == "mesa" { print $2 }' <<<"$devices")"
        names=$(awk -F'\t' '$1 != "mesa" { print $1 }' <<<"$devices")
        if cargo build "${core[@]}" --example driver_stats </dev/null; then
            for name in $names; do
                step check_device "$name"
                [[ ${SINK_ATTENTION_TESTS:-} == all ]] && step check_every "$name"
            done
            if [[ ${UPDATE_COMPILERS:-} && $failed -eq 0 ]]; then
                { printf '# Written and checked by tests/compilers.sh: device, problem, kernel, and what Mesa'"'"'s compilers say.\n%s\n' "$version" && cat "$temp/new"; } >"$file"
            fi
        else
            failed=$((failed + 1))
        fi
        ;;
    3) skip "the compilers of AMD, Apple, Qualcomm and NVK: $(tail -n 1 "$temp/vendors")" ;;
    *)
        failed=$((failed + 1))
        echo "FAILED: tests/vendor-compilers.sh" >&2
        ;;
esac

finish
