{#- Softcap: the score of a product x is cap tanh(x / cap).
    Needs: exp.wgsl. Declares: where scores are in powers of two capped4 and cap_derivative4, else tanh4. -#}
# if scores_in_powers_of_two
# if bias
// -2^60 / (1 + e), of e times 2^-60. Each element has a reciprocal of its own: a bias may hide any of them.
fn capped4(e: vec4<f32>) -> vec4<f32> {
  return -1.0 / (e + vec4<f32>(8.6736173798840355e-19));
}
# else
// -2^60 / (1 + e), of e times 2^-60. Two elements share a reciprocal, and the factor leaves room for their product. Where e exceeds
// 2^188, the other element and the derivative become NaN, and the fallback computes the row.
fn capped4(e: vec4<f32>) -> vec4<f32> {
  let sum = e + vec4<f32>(8.6736173798840355e-19);
  let inverse = -1.0 / (sum.xy * sum.zw);
  return vec4<f32>(inverse * sum.zw, inverse * sum.xy);
}
# endif

// 1 - tanh^2 = 4 e / (1 + e)^2. This form does not cancel at either end.
fn cap_derivative4(capped: vec4<f32>, e: vec4<f32>) -> vec4<f32> {
  return (capped * e) * (capped * 3.4694469519536142e-18);
}
# else
// tanh(x) within 2 ulp, and its derivative. The tanh of drivers overflows for large numbers, and 1 - tanh^2 cancels. After Cephes
// (Moshier); twin of src/cpu/simd.rs.
struct Tanh { value: vec4<f32>, derivative: vec4<f32> }

fn tanh4(x: vec4<f32>) -> Tanh {
  let square = x * x;
  var p = fma(vec4<f32>(-5.70498872745e-3), square, vec4<f32>(2.06390887954e-2));
# for c in ["-5.37397155531e-2", "1.33314422036e-1", "-3.33332819422e-1"]
  p = fma(p, square, vec4<f32>({{ c }}));
# endfor
  let small = fma(p * square, x, x);
  let e = exp4(-2.0 * abs(x));
  let rest = 2.0 * e / (1.0 + e);
  let large = 1.0 - rest;
  // A NaN fails the comparison and takes `small`, which is NaN, too.
  let is_large = abs(x) >= vec4<f32>(0.625);
  return Tanh(
    select(small, select(large, -large, x < vec4<f32>()), is_large),
    select(fma(-small, small, vec4<f32>(1.0)), rest * (2.0 - rest), is_large),
  );
}
# endif
