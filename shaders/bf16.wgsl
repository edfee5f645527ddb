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
# if o_rest

// What narrow4 takes from x, in i16: the difference of the bits. Twin of Element::rest.
fn rest4(x: vec4<f32>) -> vec4<u32> {
  let narrow = narrow4(x);
  // A tie leaves one too many: the last bit of a single.
  let rest = min(bitcast<vec4<i32>>(bitcast<vec4<u32>>(x) - (narrow << vec4<u32>(16u))), vec4<i32>(0x7fff));
  let finite = (narrow & vec4<u32>(0x7fffu)) < vec4<u32>(0x7f80u);
  return select(vec4<u32>(), bitcast<vec4<u32>>(rest) & vec4<u32>(0xffffu), finite);
}

// The number before narrow4, from what it made of it and took from it. Twin of Element::whole.
fn whole4(x: vec4<f32>, rest: vec4<i32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) + bitcast<vec4<u32>>(rest));
}
# endif
