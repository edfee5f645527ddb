{#- Needs: nothing. Declares: widen2, narrow4; with `o_lo` lo4 and with_lo4, which hold the rounding error of o. -#}
// bfloat16, two numbers a word. A number is the upper half of a single.

fn widen2(word: u32) -> vec2<f32> {
  return bitcast<vec2<f32>>(vec2<u32>(word << 16u, word & 0xffff0000u));
}

// Rounds to nearest, ties to even. The carry makes numbers beyond the range infinite.
fn narrow4(x: vec4<f32>) -> vec4<u32> {
  let bits = bitcast<vec4<u32>>(x);
  let number = (bits + vec4<u32>(0x7fffu) + ((bits >> vec4<u32>(16u)) & vec4<u32>(1u))) >> vec4<u32>(16u);
  // Rounding could turn a NaN into infinity, or carry into its sign. A NaN keeps its first bits and becomes quiet.
  let nan = (bits >> vec4<u32>(16u)) | vec4<u32>(0x40u);
  return select(number, nan, (bits & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u));
}
# if o_lo

// The rounding error of narrow4 in i16: the difference of the bits. Twin of Element::rest.
fn lo4(x: vec4<f32>) -> vec4<u32> {
  let narrow = narrow4(x);
  // A tie has a difference of 2^15, one more than i16 holds. It loses the last bit of a single.
  let rest = min(bitcast<vec4<i32>>(bitcast<vec4<u32>>(x) - (narrow << vec4<u32>(16u))), vec4<i32>(0x7fff));
  let finite = (narrow & vec4<u32>(0x7fffu)) < vec4<u32>(0x7f80u);
  return select(vec4<u32>(), bitcast<vec4<u32>>(rest) & vec4<u32>(0xffffu), finite);
}

// The number before narrow4, from the rounded number and the rounding error. Twin of Element::whole.
fn with_lo4(x: vec4<f32>, lo: vec4<i32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) + bitcast<vec4<u32>>(lo));
}
# endif
