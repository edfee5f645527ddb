// exp(x) for x <= 1, within 1 ulp wherever multiply-adds are fused: drivers' exp2 is only good to 2 or 3 ulp, and a sum
// over many rows (the sink logits' gradient) may cancel a thousandfold. Twin of src/cpu/simd.rs.
# for name, f, u, i in [("exp1", "f32", "u32", "i32"), ("exp4", "vec4<f32>", "vec4<u32>", "vec4<i32>")]

fn {{ name }}(x: {{ f }}) -> {{ f }} {
  // x = n ln 2 + r with |r| <= ln(2) / 2; ln 2 in two parts, the first so short that n times it is exact. A NaN must come
  // through, and drivers make a minimum or maximum, which lose it, even of a select: so only n is bounded.
  let n = floor(fma(clamp(x, {{ f }}(-90.0), {{ f }}(2.0)), {{ f }}(LOG2_E), {{ f }}(0.5)));
  let r = fma(n, {{ f }}(2.1219444e-4), fma(n, {{ f }}(-0.693359375), x));
  // Minimax for e^r, relative error 3e-9, with 1 + r exact.
  var p = fma({{ f }}(0.0013814599), r, {{ f }}(0.008368717));
# for c in ["0.04166839", "0.16666521", "0.49999994", "1.0", "1.0"]
  p = fma(p, r, {{ f }}({{ c }}));
# endfor
  // 2^n through its exponent field; a product, which keeps a NaN.
  let power = bitcast<{{ f }}>({{ u }}({{ i }}(n) + {{ i }}(127)) << {{ u }}(23u));
  // Where x > 1 it is of a hidden pair, or rounded by more than it is worth: e is as good as any.
  return select(select(p * power, {{ f }}(), x < {{ f }}(-87.0)), {{ f }}(2.7182817), x > {{ f }}(1.0));
}
# endfor
