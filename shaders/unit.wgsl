// The unit of a query's weights p (d_p - delta) in d_q, a power of two that brings them within the range of halves, from the exponent
// of what bounds them, roughly: 2^12 in the unit. Weights up to 16 times as large are within it; larger ones become infinite as halves,
// so that the row is reported. Down to 2^-26 of it they are as precise as halves are.
fn query_unit(exponent: i32) -> f32 {
  return bitcast<f32>(u32(127 + clamp(12 - exponent, -100, 100)) << 23u);
}

fn exponent_of(x: f32) -> i32 {
  return i32((bitcast<u32>(x) >> 23u) & 255u) - 127;
}
