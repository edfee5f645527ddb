#!/usr/bin/env bash
# Tests of the command: bash crates/cli/test.sh [--lint]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
# shellcheck source=tests/lib.sh
. tests/lib.sh

if [[ $lint ]]; then
    step cargo fmt -p sink-attention-cli --check
    # Has no documentation: `sink-attention COMMAND --help` is it.
    step cargo clippy "${core[@]}" --bins --test cli -- -D warnings
fi

need_vulkan

tests "${core[@]}" --bins --test cli

# Built by the tests. As users start it, and on a GPU adapter.
adapters=("" gpu)
[[ ${SINK_ATTENTION_ADAPTER:-} ]] && adapters=("$SINK_ATTENTION_ADAPTER")
for adapter in "${adapters[@]}"; do
    step env "SINK_ATTENTION_ADAPTER=$adapter" "$CARGO_TARGET_DIR/debug/sink-attention" bench --quick --shape seed
done

finish
