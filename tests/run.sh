#!/usr/bin/env bash
# Runs every test and the examples, or those of some stages: bash tests/run.sh [--lint] [STAGE...]
#
# `--lint` also checks format, clippy and documentation. The last line is "N passed, M failed" over all stages, followed by
# what could not be set up on this machine.
#
# Where there is no adapter, a software Vulkan driver (Mesa's llvmpipe) is installed on Debian and Ubuntu; elsewhere
# the script says what is missing. macOS and Windows bring their own driver.
#
# A software driver compiles each kernel for a second or more. So that a machine with two cores is done in 25 minutes, the
# tests try every option, element type and kernel with few widths and tiles. All of them, and the whole device check, on
# cooperative matrices too: SINK_ATTENTION_TESTS=all bash tests/run.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# A stage a line: its name, and the scripts that run it. Each script ends with a line as the one of this script.
stages=(
    "core tests/core.sh crates/cli/test.sh"
    "compilers tests/compilers.sh"
)

options=()
wanted=()
for argument in "$@"; do
    if [[ $argument == --lint ]]; then
        options+=(--lint)
    elif printf '%s\n' "${stages[@]%% *}" | grep -Fqx -- "$argument"; then
        wanted+=("$argument")
    else
        echo "unknown stage $argument; known: ${stages[*]%% *}" >&2
        exit 2
    fi
done
[[ ${#wanted[@]} -eq 0 ]] && wanted=("${stages[@]%% *}")

log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
passed=0
failed=0
skipped=

for line in "${stages[@]}"; do
    read -ra scripts <<<"$line"
    stage=${scripts[0]}
    [[ " ${wanted[*]} " == *" $stage "* ]] || continue
    for script in "${scripts[@]:1}"; do
        start=$SECONDS
        echo
        echo "==== $stage: $script"
        bash "$script" ${options[@]+"${options[@]}"} </dev/null 2>&1 | tee "$log"
        status=${PIPESTATUS[0]}
        if [[ $(tail -n 1 "$log") =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed(.*)$ ]]; then
            passed=$((passed + BASH_REMATCH[1]))
            failed=$((failed + BASH_REMATCH[2]))
            skipped+=${BASH_REMATCH[3]}
            # Nothing that fails may be lost.
            [[ $status -ne 0 && ${BASH_REMATCH[2]} -eq 0 ]] && failed=$((failed + 1))
        else
            failed=$((failed + 1))
            echo "FAILED: $script ended without a last line" >&2
        fi
        echo "==== $((SECONDS - start)) s: $stage: $script"
    done
done

echo
echo "$passed passed, $failed failed$skipped"
[[ $failed -eq 0 ]]
