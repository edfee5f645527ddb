{#- Probabilities from lse. Needs: params.wgsl. Declares: probability_lse, ABSORBING. -#}
// The lse for a row's probabilities. An lse of -infinity becomes infinity, so that every probability is 0, even that of a visible key
// whose score overflowed.
fn probability_lse(lse: f32) -> f32 {
  return select(lse, -params.negative_infinity, lse == params.negative_infinity);
}

// An lse from here down to the lowest finite number has absorbed the logarithm of a count, and products below 32. Only a bias makes an
// lse so low.
const ABSORBING: f32 = -1e9;
