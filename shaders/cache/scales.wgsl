{#- Scales of quantised blocks in half precision, as IEEE 754 has it, with its subnormal numbers, which drivers' own functions may lose.
    Needs: `kernel`. Declares: widen_scale; in append narrow_scale, elsewhere quad_of_bytes. -#}
fn widen_scale(half: u32) -> f32 {
  let exponent = (half >> 10u) & 31u;
  let digits = half & 0x3ffu;
  let normal = bitcast<f32>(((exponent + 112u) << 23u) | (digits << 13u));
  // Infinity counts as a NaN: nothing in its block is known.
  return select(select(normal, bitcast<f32>(0x7fc00000u | digits), exponent == 31u), f32(digits) * 5.9604645e-8, exponent == 0u);
}
# if kernel != "append"

// Four signed bytes. Written as digits of a number from 2^23 up, they are exact and cost no conversion.
fn quad_of_bytes(word: u32) -> vec4<f32> {
  let biased = word ^ 0x80808080u;
  let bytes = vec4<u32>(biased, biased >> 8u, biased >> 16u, biased >> 24u) & vec4<u32>(0xffu);
  return bitcast<vec4<f32>>(bytes | vec4<u32>(0x4b000000u)) - vec4<f32>(8388736.0);
}
# else

// The half nearest to a number that is not negative, ties to even.
fn narrow_scale(x: f32) -> u32 {
  let size = bitcast<u32>(x);
  let normal = min(((size + 0xfffu + ((size >> 13u) & 1u)) >> 13u) - 0x1c000u, 0x7c00u);
  // Multiples of 2^-24, exactly scaled.
  let subnormal = u32(round(min(x, 1.0) * 16777216.0));
  return select(select(normal, subnormal, size < 0x38800000u), 0x7e00u, size >= 0x7f800000u);
}
# endif
