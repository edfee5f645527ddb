{#- Needs: nothing. Declares: widen2, narrow4; with `o_lo` lo4 and with_lo4, which hold the rounding error of o. -#}
// IEEE 754 half precision, two numbers a word, without the extension that has a type for it.

// Drivers may flush numbers below 2^-14 to zero.
fn widen2(word: u32) -> vec2<f32> {
  return unpack2x16float(word);
}

# if multiplies_halves
// Rounds like the driver, as the products of these kernels do. Rounding by bits would take longer than the attention of a narrow window.
fn narrow4(x: vec4<f32>) -> vec4<u32> {
  let words = vec2<u32>(pack2x16float(x.xy), pack2x16float(x.zw)).xxyy;
  return (words >> vec4<u32>(0u, 16u, 0u, 16u)) & vec4<u32>(0xffffu);
}
# else
// Rounds to nearest, ties to even, by bits: pack2x16float may round in another way, and its result is indeterminate beyond the range.
fn narrow4(x: vec4<f32>) -> vec4<u32> {
  let bits = bitcast<vec4<u32>>(x);
  let size = bits & vec4<u32>(0x7fffffffu);
  // The exponent decreases by 112. Beyond the range it is that of infinity.
  let rounded = (size + vec4<u32>(0xfffu) + ((size >> vec4<u32>(13u)) & vec4<u32>(1u))) >> vec4<u32>(13u);
  let normal = min(rounded - vec4<u32>(0x1c000u), vec4<u32>(0x7c00u));
  // Numbers below 2^-14 are multiples of 2^-24. Numbers below a quarter of 2^-24 are zero at the largest shift, too.
  let shift = clamp(vec4<u32>(126u) - (size >> vec4<u32>(23u)), vec4<u32>(1u), vec4<u32>(25u));
  let digits = (size & vec4<u32>(0x7fffffu)) | vec4<u32>(0x800000u);
  let half_ulp = vec4<u32>(1u) << (shift - vec4<u32>(1u));
  let subnormal = (digits + half_ulp - vec4<u32>(1u) + ((digits >> shift) & vec4<u32>(1u))) >> shift;
  let number = select(normal, subnormal, size < vec4<u32>(0x38800000u));
  // A NaN keeps its first bits and becomes quiet.
  let nan = vec4<u32>(0x7e00u) | ((size >> vec4<u32>(13u)) & vec4<u32>(0x3ffu));
  return select(number, nan, size > vec4<u32>(0x7f800000u)) | ((bits >> vec4<u32>(16u)) & vec4<u32>(0x8000u));
}
# endif
# if o_lo

// The rounding error of narrow4 in i16: the difference of the bits of both as singles. Below 2^-14, where these are too far apart, it is
// the difference of the sizes in units of 2^-39. Twin of Element::rest.
fn lo4(x: vec4<f32>) -> vec4<u32> {
  let narrow = narrow4(x) & vec4<u32>(0x7fffu);
  let size = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
  let normal = bitcast<vec4<i32>>(size - ((narrow + vec4<u32>(0x1c000u)) << vec4<u32>(13u)));
  let subnormal = vec4<i32>(round(fma(abs(x), vec4<f32>(549755813888.0), vec4<f32>(narrow) * -32768.0)));
  let rest = bitcast<vec4<u32>>(select(normal, subnormal, narrow < vec4<u32>(0x400u))) & vec4<u32>(0xffffu);
  return select(vec4<u32>(), rest, narrow < vec4<u32>(0x7c00u));
}

// The number before narrow4, from the rounded number and the rounding error. Twin of Element::whole.
fn with_lo4(x: vec4<f32>, lo: vec4<i32>) -> vec4<f32> {
  let bits = bitcast<vec4<u32>>(x);
  let subnormal = abs(fma(vec4<f32>(lo), vec4<f32>(1.8189894e-12), abs(x)));
  let signed = bitcast<vec4<u32>>(subnormal) | (bits & vec4<u32>(0x80000000u));
  let normal = bits + bitcast<vec4<u32>>(lo);
  return bitcast<vec4<f32>>(select(normal, signed, (bits & vec4<u32>(0x7fffffffu)) < vec4<u32>(0x38800000u)));
}
# endif
