// LOG2_E less its f32 rounding.
const LOG2_E_LOW: f32 = 1.925963e-8;

// lse in units of log 2 as a sum of two numbers, so that p = exp2((s - x) - y) keeps its precision where
// scores are in the hundreds. A row that sees nothing has no p but 0, which the mask sets.
fn probability_shift(lse: f32) -> vec2<f32> {
  if (lse == params.negative_infinity) { return vec2<f32>(); }
  let high = lse * LOG2_E;
  if (!(abs(high) <= -LOWEST)) { return vec2<f32>(high, 0.0); }
  return vec2<f32>(high, fma(lse, LOG2_E, -high) + lse * LOG2_E_LOW);
}
