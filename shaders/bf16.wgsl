// bfloat16, two numbers in a word: the upper halves of singles.

fn widen2(word: u32) -> vec2<f32> {
  return bitcast<vec2<f32>>(vec2<u32>(word << 16u, word & 0xffff0000u));
}

// Rounded to nearest, ties to even; what is too large becomes infinite by carrying.
fn narrow4(x: vec4<f32>) -> vec4<u32> {
  let bits = bitcast<vec4<u32>>(x);
  let number = (bits + vec4<u32>(0x7fffu) + ((bits >> vec4<u32>(16u)) & vec4<u32>(1u))) >> vec4<u32>(16u);
  // A NaN must not be rounded to infinity, nor carry into the sign: it keeps its first bits, and is quiet.
  let nan = (bits >> vec4<u32>(16u)) | vec4<u32>(0x40u);
  return select(number, nan, (bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u));
}
