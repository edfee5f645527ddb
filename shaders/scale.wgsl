{#- Token scales: powers of two that bring numbers of bf16, or split numbers of f32, to the range of halves. Split numbers come near its upper
    end: numbers down to 2^-15 of a token's largest have all bits of their lower half, and smaller ones err by 2^-37 of it.
    Needs: nothing. Declares: finite_size, token_scale. -#}
# set exponent_of_largest = 12 if dtype == "f32" else 0
// The largest finite size of four numbers. Bits are compared: compilers may assume that a float comparison meets no NaN.
fn finite_size(x: vec4<f32>) -> f32 {
  let bits = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
  let size = bitcast<vec4<f32>>(select(vec4<u32>(), bits, bits < vec4<u32>(0x7f800000u)));
  return max(max(size.x, size.y), max(size.z, size.w));
}

// The power of two that brings a token's largest number to {{ "2^12 .. 2^13" if exponent_of_largest else "1 .. 2" }}. A token of zeros has that of 1. Beyond 2^60 and below
// 2^-60, where the product of several powers would leave the range of f32, it is infinite. Such a token is no longer finite, and the
// portable kernel computes the rows that see it.
fn token_scale(size: f32) -> f32 {
  let exponent = i32(bitcast<u32>(size) >> 23u) - 127;
  if (size == 0.0) { return {{ 2 ** exponent_of_largest }}.0; }
  return bitcast<f32>(select(0x7f800000u, u32({{ 127 + exponent_of_largest }} - exponent) << 23u, abs(exponent) <= 60));
}
