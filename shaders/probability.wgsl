// The lse by which a row's probabilities are formed: where it is -inf every probability is 0, even of keys that are visible
// but whose scores overflowed.
fn probability_lse(lse: f32) -> f32 {
  return select(lse, -params.negative_infinity, lse == params.negative_infinity);
}

// Numbers from here down to the lowest finite one keep nothing of the logarithm of a count, or of a product below 32. Only a bias
// makes an lse so low.
const ABSORBING: f32 = -1e9;
