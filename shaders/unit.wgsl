{#- The unit of d_q. Needs: nothing. Declares: query_unit, exponent_of. -#}
// The unit of a query's dS in d_q: a power of two that brings dS to the range of halves. `exponent` is that of a rough bound of |dS|, which
// comes to 2^12 in the unit. dS up to 16 times as large are within the range. Larger ones become infinite as halves, and the row is
// reported. dS down to 2^-26 of the bound are as precise as halves are.
fn query_unit(exponent: i32) -> f32 {
  return bitcast<f32>(u32(127 + clamp(12 - exponent, -100, 100)) << 23u);
}

fn exponent_of(x: f32) -> i32 {
  return i32((bitcast<u32>(x) >> 23u) & 255u) - 127;
}
