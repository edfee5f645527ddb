#!/usr/bin/env bash
# The shader compilers of GPUs that are not here: Mesa's Vulkan drivers over its "DRM shims", which pretend that the device exists. Pipelines
# compile, and VK_KHR_pipeline_executable_properties tells registers, spills and occupancy. NOTHING COMPUTES: a submission does nothing.
#
#   bash tests/vendor-compilers.sh DIR                          installs them beside the driver of tests/software-vulkan.sh, in the same DIR,
#                                                               and prints the devices, a name and what it is a line, and Mesa's version
#   bash tests/vendor-compilers.sh DIR DEVICE COMMAND [ARG...]  runs COMMAND (a program, not a script) with DEVICE as its only adapter
#
# Exits with 3 where they cannot be had, and says on stderr why: it takes what tests/software-vulkan.sh takes.
set -euo pipefail

# Name, driver, shim, the shim's setting, and what it is.
devices='rx7900xtx radeon amdgpu AMDGPU_GPU_ID=navi31 AMD RDNA3, by ACO: matrices of 16x16, subgroups of 32 to 64
rx9070xt radeon amdgpu AMDGPU_GPU_ID=gfx1201 AMD RDNA4, by ACO: matrices of 16x16, subgroups of 32 to 64
rx6800 radeon amdgpu AMDGPU_GPU_ID=navi21 AMD RDNA2, by ACO
m1 asahi asahi NONE=1 Apple M1, by Honeykrisp
adreno740 freedreno freedreno FD_GPU_ID=740 Qualcomm Adreno 740, by Turnip: no f16 in shaders
adreno830 freedreno freedreno FD_GPU_ID=830 Qualcomm Adreno 830, by Turnip
turing nouveau nouveau NOUVEAU_CHIPSET=166 NVIDIA Turing, by NVK (Mesa'"'"'s compiler, not the vendor'"'"'s): matrices of 16x16
ampere nouveau nouveau NOUVEAU_CHIPSET=170 NVIDIA Ampere, by NVK: matrices of 16x16'

unavailable() {
    echo "No compilers of other vendors: $*" >&2
    exit 3
}

dir=$(realpath -m "${1:?usage: vendor-compilers.sh DIR [DEVICE COMMAND...]}")
shift
lib=$dir/usr/lib/x86_64-linux-gnu

if [[ ! -e $lib/libamdgpu_noop_drm_shim.so ]]; then
    bash "$(dirname "${BASH_SOURCE[0]}")/software-vulkan.sh" "$dir" >/dev/null || exit
    # The lists of a mirror that keeps days of the past are older than they promise to be.
    chroot "$dir" sh -c 'apt-get -qq -o Acquire::Check-Valid-Until=false update &&
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends mesa-drm-shim' </dev/null >"$dir.log" 2>&1 || {
        tail -n 20 "$dir.log" >&2
        unavailable "mesa-drm-shim cannot be installed"
    }
    rm -rf "$dir"/var/cache/apt "$dir"/var/lib/apt/lists "$dir.log"
fi

if [[ $# -eq 0 ]]; then
    awk '{ name = $1; $1 = $2 = $3 = $4 = ""; sub(/^ */, ""); print name "\t" $0 }' <<<"$devices"
    version=$(awk '$1 == "Package:" { package = $2 } $1 == "Version:" && package == "mesa-vulkan-drivers" { print $2; exit }' "$dir/var/lib/dpkg/status")
    printf 'mesa\t%s\n' "${version%%-*}"
    exit
fi

name=$1
shift
read -r _ driver shim setting _ < <(awk -v name="$name" '$1 == name' <<<"$devices") || {
    echo "no device $name; known: $(cut -d' ' -f1 <<<"$devices" | xargs)" >&2
    exit 2
}
icd=$dir/$driver.json
printf '{"ICD":{"api_version":"1.4.0","library_path":"%s"},"file_format_version":"1.0.1"}\n' "$lib/libvulkan_$driver.so" >"$icd"
unset VK_ICD_FILENAMES SINK_ATTENTION_ADAPTER
exec env "$setting" NVK_I_WANT_A_BROKEN_VULKAN_DRIVER=1 VK_DRIVER_FILES="$icd" XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}" \
    "$dir/lib64/ld-linux-x86-64.so.2" --library-path "$lib" --preload "$lib/lib${shim}_noop_drm_shim.so" "$@"
