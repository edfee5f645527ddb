// IEEE 754 half precision, two numbers in a word, without the extension that would give WGSL a type for it.

// Drivers may take numbers below 2^-14 for zero.
fn widen2(word: u32) -> vec2<f32> {
  return unpack2x16float(word);
}

# if cooperative
// As the driver rounds the halves that these kernels compute with: by the bits it takes longer than a window of keys.
fn narrow4(x: vec4<f32>) -> vec4<u32> {
  let words = vec2<u32>(pack2x16float(x.xy), pack2x16float(x.zw)).xxyy;
  return (words >> vec4<u32>(0u, 16u, 0u, 16u)) & vec4<u32>(0xffffu);
}
# else
// Rounded to nearest, ties to even, by the bits: pack2x16float may round otherwise, and makes anything of what is too
// large.
fn narrow4(x: vec4<f32>) -> vec4<u32> {
  let bits = bitcast<vec4<u32>>(x);
  let size = bits & vec4<u32>(0x7fffffffu);
  // Exponents fewer by 112, and never more than that of infinity.
  let rounded = (size + vec4<u32>(0xfffu) + ((size >> vec4<u32>(13u)) & vec4<u32>(1u))) >> vec4<u32>(13u);
  let normal = min(rounded - vec4<u32>(0x1c000u), vec4<u32>(0x7c00u));
  // Below 2^-14: multiples of 2^-24. What is below a quarter of that is zero at the largest shift, too.
  let shift = clamp(vec4<u32>(126u) - (size >> vec4<u32>(23u)), vec4<u32>(1u), vec4<u32>(25u));
  let digits = (size & vec4<u32>(0x7fffffu)) | vec4<u32>(0x800000u);
  let half_ulp = vec4<u32>(1u) << (shift - vec4<u32>(1u));
  let subnormal = (digits + half_ulp - vec4<u32>(1u) + ((digits >> shift) & vec4<u32>(1u))) >> shift;
  let number = select(normal, subnormal, size < vec4<u32>(0x38800000u));
  // A NaN keeps its first bits, and is quiet.
  let nan = vec4<u32>(0x7e00u) | ((size >> vec4<u32>(13u)) & vec4<u32>(0x3ffu));
  return select(number, nan, size > vec4<u32>(0x7f800000u)) | ((bits >> vec4<u32>(16u)) & vec4<u32>(0x8000u));
}
# endif
# if o_rest

// What narrow4 takes from x, in i16: the difference of the bits as singles; below 2^-14, where these lie too far apart, that
// of the sizes in units of 2^-39. Twin of Element::rest.
fn rest4(x: vec4<f32>) -> vec4<u32> {
  let narrow = narrow4(x) & vec4<u32>(0x7fffu);
  let size = bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu);
  let normal = bitcast<vec4<i32>>(size - ((narrow + vec4<u32>(0x1c000u)) << vec4<u32>(13u)));
  let subnormal = vec4<i32>(round(fma(abs(x), vec4<f32>(549755813888.0), vec4<f32>(narrow) * -32768.0)));
  let rest = bitcast<vec4<u32>>(select(normal, subnormal, narrow < vec4<u32>(0x400u))) & vec4<u32>(0xffffu);
  return select(vec4<u32>(), rest, narrow < vec4<u32>(0x7c00u));
}

// The number before narrow4, from what it made of it and took from it. Twin of Element::whole.
fn whole4(x: vec4<f32>, rest: vec4<i32>) -> vec4<f32> {
  let bits = bitcast<vec4<u32>>(x);
  let subnormal = abs(fma(vec4<f32>(rest), vec4<f32>(1.8189894e-12), abs(x)));
  let signed = bitcast<vec4<u32>>(subnormal) | (bits & vec4<u32>(0x80000000u));
  let normal = bits + bitcast<vec4<u32>>(rest);
  return bitcast<vec4<f32>>(select(normal, signed, (bits & vec4<u32>(0x7fffffffu)) < vec4<u32>(0x38800000u)));
}
# endif
