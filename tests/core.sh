#!/usr/bin/env bash
# Tests of the library and the examples: bash tests/core.sh [--lint]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tests/lib.sh
. tests/lib.sh

if [[ $lint ]]; then
    step cargo fmt -p sink-attention -p sink-attention-examples --check
    step cargo clippy "${core[@]}" --lib --tests --examples --benches -- -D warnings
    RUSTDOCFLAGS="-D warnings" step cargo doc -p sink-attention --no-deps --all-features
fi

need_vulkan
# Not each sixteenth, as while writing.
export SINK_ATTENTION_SHADERS=all

# Unit, integration and documentation tests, and the README's code. Without the feature `checked-shaders`: these are the shaders
# that users get.
tests "${core[@]}" --lib --test host --test gpu
tests -p sink-attention --doc --features safetensors,testing
# The tests inside the examples.
tests "${core[@]}" --examples

# Built in the tests' profile, which is optimised, so that no dependency is compiled again.
if cargo build "${core[@]}" --example streaming --example fit_sinks --example gpt_oss_layer </dev/null; then
    # As users start them, which on a machine with a software driver alone is on the CPU, and on a GPU adapter.
    adapters=("" gpu)
    [[ ${SINK_ATTENTION_ADAPTER:-} ]] && adapters=("$SINK_ATTENTION_ADAPTER")
    for adapter in "${adapters[@]}"; do
        on=(env "SINK_ATTENTION_ADAPTER=$adapter")
        step "${on[@]}" "$CARGO_TARGET_DIR/debug/examples/streaming" --tokens 4000 --out "$temp/streaming.svg"
        step "${on[@]}" "$CARGO_TARGET_DIR/debug/examples/gpt_oss_layer" tests/gpt_oss_tiny
        step "${on[@]}" "$CARGO_TARGET_DIR/debug/examples/fit_sinks" --out "$temp/fit_sinks.svg"
    done
else
    failed=$((failed + 1))
fi

# The kernels on cooperative matrices (tensor cores), on a newer software driver that has such matrices.
echo
echo "== tests/software-vulkan.sh"
environment=$(bash tests/software-vulkan.sh "$CARGO_TARGET_DIR/software-vulkan" 2> >(tee "$temp/software-vulkan" >&2))
case $? in
    0)
        # shellcheck source=/dev/null
        . "$environment"
        # Another driver, or an adapter of one, is not what is asked for here.
        unset VK_ICD_FILENAMES SINK_ATTENTION_ADAPTER
        export SINK_ATTENTION_REQUIRE_COOPERATIVE=1
        # Of other suites what takes long is left out.
        few=(--skip size:: --skip properties::)
        [[ ${SINK_ATTENTION_TESTS:-} == all ]] && few=()
        tests "${core[@]}" --test gpu -- cooperative fragments:: split:: subgroups:: ${few[@]+"${few[@]}"}
        mkdir "$temp/modules"
        MESA_SPIRV_DUMP_PATH=$temp/modules tests "${core[@]}" --test gpu -- loops::the_driver_gets
        # The kernels that go to the driver as SPIR-V, by spirv-val of the same Debian: each sixteenth, for it takes long.
        unset SINK_ATTENTION_SHADERS
        tests "${core[@]}" --test host -- spirv
        ;;
    3) skip "the kernels on cooperative matrices: $(tail -n 1 "$temp/software-vulkan")" ;;
    *)
        failed=$((failed + 1))
        echo "FAILED: tests/software-vulkan.sh" >&2
        ;;
esac

# Microsoft's compiler of HLSL: each sixteenth kernel that Direct3D 12 gets.
unset SINK_ATTENTION_SHADERS
echo
echo "== tests/dxc.sh"
library=$(bash tests/dxc.sh "$CARGO_TARGET_DIR/dxc" 2> >(tee "$temp/dxc" >&2))
case $? in
    0) SINK_ATTENTION_DXC=$library tests "${core[@]}" --test host -- vendors::dxc ;;
    3) skip "HLSL by DXC: $(tail -n 1 "$temp/dxc")" ;;
    *)
        failed=$((failed + 1))
        echo "FAILED: tests/dxc.sh" >&2
        ;;
esac

finish
