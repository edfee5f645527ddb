{#- Needs: LOG2_E of bindings.wgsl. Declares: exp1, exp4. -#}
// exp(x) for x <= 1, within 1 ulp on devices that fuse multiply-adds. The exp2 of drivers is good to 2 or 3 ulp only, and a sum over many
// rows (the gradient of sink logits) may cancel a thousandfold. Twin of src/cpu/simd.rs.
# for name, f, u, i in [("exp1", "f32", "u32", "i32"), ("exp4", "vec4<f32>", "vec4<u32>", "vec4<i32>")]

fn {{ name }}(x: {{ f }}) -> {{ f }} {
  // x = n ln 2 + r with |r| <= ln(2) / 2. ln 2 has two parts, and the first is short enough for an exact n times it. A NaN has to
  // come through. Drivers turn even a select into a minimum or maximum, which lose it, so only n is bounded.
  let n = floor(fma(clamp(x, {{ f }}(-90.0), {{ f }}(2.0)), {{ f }}(LOG2_E), {{ f }}(0.5)));
  let r = fma(n, {{ f }}(2.1219444e-4), fma(n, {{ f }}(-0.693359375), x));
  // The minimax polynomial of e^r, with a relative error of 3e-9 and an exact 1 + r.
  var p = fma({{ f }}(0.0013814599), r, {{ f }}(0.008368717));
# for c in ["0.04166839", "0.16666521", "0.49999994", "1.0", "1.0"]
  p = fma(p, r, {{ f }}({{ c }}));
# endfor
  // 2^n through its exponent field. The product keeps a NaN.
  let power = bitcast<{{ f }}>({{ u }}({{ i }}(n) + {{ i }}(127)) << {{ u }}(23u));
  // x > 1 happens only for hidden pairs, or by rounding of a large score: it is clamped to e.
  return select(select(p * power, {{ f }}(), x < {{ f }}(-87.0)), {{ f }}(2.7182817), x > {{ f }}(1.0));
}
# endfor
