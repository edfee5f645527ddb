// The lse by which a row's probabilities are formed: where it is -inf every probability is 0, even of keys that are visible
// but whose scores overflowed.
fn probability_lse(lse: f32) -> f32 {
  return select(lse, -params.negative_infinity, lse == params.negative_infinity);
}
