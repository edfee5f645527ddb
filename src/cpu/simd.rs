//! Vector parts of the tiled paths, generic over the instruction set.
//!
//! One side of the score matrix runs along the lanes: the queries, or for d_k and d_v the keys. A *panel* is `NV` vectors of its rows, next
//! to each other. Every matrix of a tile is stored panel by panel as `[row of the other side, or feature][rows of the panel]`. So the
//! softmax needs no reduction across lanes. The products broadcast the other side's operands straight from their rows, whatever the layout
//! is, and only a tile's own rows are copied.
//!
//! Everything here is `inline(always)`, so that it is compiled with the features of the `pulp::Simd` that it is instantiated with.

use std::array;
use std::ops::Range;

use pulp::Simd;

use super::rows::Head;

/// Depth of a partial sum of [`products`].
const CHUNK: usize = 16;

/// The vectors of a panel.
pub(super) type Panel<S, const NV: usize> = [<S as Simd>::f32s; NV];

/// Views a buffer as panels.
#[inline(always)]
pub(super) fn panels<S: Simd, const NV: usize>(buffer: &[f32]) -> &[Panel<S, NV>] {
    S::as_simd_f32s(buffer).0.as_chunks().0
}

/// Views a buffer as panels.
#[inline(always)]
pub(super) fn panels_mut<S: Simd, const NV: usize>(buffer: &mut [f32]) -> &mut [Panel<S, NV>] {
    S::as_mut_simd_f32s(buffer).0.as_chunks_mut().0
}

/// Micro-kernel of every product: `out[n] = sum_k a[k] * b[k][n]`, summed in the order of k.
///
/// The `NR * NV` sums stay in registers. A caller chooses both numbers to fill the register file.
#[inline(always)]
fn multiply<S: Simd, const NV: usize, const NR: usize>(
    simd: S,
    a: &[Panel<S, NV>],
    b: impl Iterator<Item = [f32; NR]>,
) -> [Panel<S, NV>; NR] {
    let mut out = [[simd.splat_f32s(0.0); NV]; NR];
    for (a, b) in a.iter().zip(b) {
        for n in 0..NR {
            let b = simd.splat_f32s(b[n]);
            for v in 0..NV {
                out[n][v] = simd.mul_add_e_f32s(a[v], b, out[n][v]);
            }
        }
    }
    out
}

/// `out = rows x` for one panel: each row of `range` with every column of x.
#[inline(always)]
pub(super) fn products<S: Simd, const NV: usize, const NR: usize>(
    simd: S,
    out: &mut [Panel<S, NV>],
    x: &[Panel<S, NV>],
    rows: Head<'_>,
    range: Range<usize>,
) {
    let (blocks, rest) = out[..range.len()].as_chunks_mut::<NR>();
    for (block, j) in blocks.iter_mut().zip(range.clone().step_by(NR)) {
        *block = product_block(simd, x, array::from_fn(|n| rows.row(j + n)));
    }
    for (out, j) in rest.iter_mut().rev().zip(range.rev()) {
        [*out] = product_block(simd, x, [rows.row(j)]);
    }
}

/// Products of `NR` rows, in partial sums: with large logits the rounding error of one long sum is larger than all other errors of a
/// gradient. Forward and backward share them, because scores that are summed in two ways differ by even more.
#[inline(always)]
fn product_block<S: Simd, const NV: usize, const NR: usize>(
    simd: S,
    x: &[Panel<S, NV>],
    rows: [&[f32]; NR],
) -> [Panel<S, NV>; NR] {
    let mut sum = [[simd.splat_f32s(0.0); NV]; NR];
    for (n, x) in x.chunks(CHUNK).enumerate() {
        // All slices have one length, so that no bounds are checked inside.
        let rows = rows.map(|row| &row[n * CHUNK..][..x.len()]);
        let part: [_; NR] = multiply(simd, x, (0..x.len()).map(|d| array::from_fn(|n| rows[n][d])));
        for n in 0..NR {
            for v in 0..NV {
                sum[n][v] = simd.add_f32s(sum[n][v], part[n][v]);
            }
        }
    }
    sum
}

/// `o = alpha * o + p rows` for one panel. Each tile is summed by itself, so that the error grows with the root of the number of tiles and
/// not of rows.
#[inline(always)]
pub(super) fn accumulate<S: Simd, const NV: usize, const NR: usize>(
    simd: S,
    o: &mut [Panel<S, NV>],
    alpha: Panel<S, NV>,
    p: &[Panel<S, NV>],
    rows: Head<'_>,
    range: Range<usize>,
) {
    let p = &p[..range.len()];
    let width = o.len();
    let (blocks, rest) = o.as_chunks_mut::<NR>();
    for (n, block) in blocks.iter_mut().enumerate() {
        accumulate_block(simd, block, alpha, p, n * NR, rows, range.clone());
    }
    for (n, o) in rest.iter_mut().enumerate() {
        accumulate_block(simd, array::from_mut(o), alpha, p, width - width % NR + n, rows, range.clone());
    }
}

/// `NR` features of o, from feature `e` on.
#[inline(always)]
fn accumulate_block<S: Simd, const NV: usize, const NR: usize>(
    simd: S,
    o: &mut [Panel<S, NV>; NR],
    alpha: Panel<S, NV>,
    p: &[Panel<S, NV>],
    e: usize,
    rows: Head<'_>,
    range: Range<usize>,
) {
    let values = rows.rows(range).map(|row| {
        let row = &row[e..e + NR];
        array::from_fn(|n| row[n])
    });
    let sum: [_; NR] = multiply(simd, p, values);
    for n in 0..NR {
        for v in 0..NV {
            o[n][v] = simd.mul_add_e_f32s(o[n][v], alpha[v], sum[n][v]);
        }
    }
}

/// Like [`accumulate`], but multiplies only pairs for which `visible(lane, row)` holds: in a product even a probability of 0 lets NaN
/// through. The bits are the same if multiply-add is fused.
#[inline(always)]
pub(super) fn accumulate_visible<S: Simd, const NV: usize>(
    o: &mut [Panel<S, NV>],
    alpha: Panel<S, NV>,
    p: &[Panel<S, NV>],
    rows: Head<'_>,
    range: Range<usize>,
    visible: impl Fn(usize, usize) -> bool,
) {
    let alpha: &[f32] = bytemuck::cast_slice(&alpha);
    for (lane, &alpha) in alpha.iter().enumerate() {
        for (e, o) in o.iter_mut().enumerate() {
            let sum = range.clone().zip(p).filter(|(row, _)| visible(lane, *row)).fold(0.0, |sum, (row, p)| {
                let p: &[f32] = bytemuck::cast_slice(p);
                p[lane].mul_add(rows.row(row)[e], sum)
            });
            let o: &mut [f32] = bytemuck::cast_slice_mut(o);
            o[lane] = o[lane].mul_add(alpha, sum);
        }
    }
}

/// One panel's part of a buffer with `width` values for each of its rows.
#[inline(always)]
pub(super) fn column<S: Simd, const NV: usize>(buffer: &[f32], panel: usize, width: usize) -> &[Panel<S, NV>] {
    &panels::<S, NV>(buffer)[panel * width..][..width]
}

/// One panel's part of a buffer with `width` values for each of its rows.
#[inline(always)]
pub(super) fn column_mut<S: Simd, const NV: usize>(
    buffer: &mut [f32],
    panel: usize,
    width: usize,
) -> &mut [Panel<S, NV>] {
    &mut panels_mut::<S, NV>(buffer)[panel * width..][..width]
}

/// Exponential, within 1 ulp (2 without fused multiply-add) for results in the normal range. Smaller results are 0.
///
/// `exp(-inf)` is 0 and NaN stays NaN. x must be at most 1, as it is in every softmax; for a larger x the result is e.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |x| simd.splat_f32s(x);
    // x > 1 happens only for hidden pairs, and where x has a large rounding error. The result is then e. A NaN stays.
    let x = simd.select_f32s(simd.greater_than_f32s(x, splat(1.0)), splat(1.0), x);
    // x = n ln 2 + r with |r| <= ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. Another 127 makes it the
    // exponent field of 2^n.
    let magic = splat(12_582_912.0 + 127.0);
    let shifted = simd.mul_add_e_f32s(x, splat(std::f32::consts::LOG2_E), magic);
    let n = simd.sub_f32s(shifted, magic);
    // ln 2 in two parts. The first is so short that n times it is exact.
    let r = simd.mul_add_e_f32s(n, splat(-355.0 / 512.0), x);
    let r = simd.mul_add_e_f32s(n, splat(2.121_944_4e-4), r);
    // Minimax polynomial for e^r, relative error 3e-9, with 1 + r exact.
    let mut p = splat(0.001_381_459_9);
    for c in [0.008_368_717, 0.041_668_39, 0.166_665_21, 0.499_999_94, 1.0, 1.0] {
        p = simd.mul_add_e_f32s(p, r, splat(c));
    }
    let power = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    // A product keeps a NaN; integer arithmetic on p would not.
    let y = simd.mul_f32s(p, simd.transmute_f32s_u32s(power));
    let underflow = simd.less_than_f32s(x, splat(-87.0));
    simd.select_f32s(underflow, splat(0.0), y)
}

/// Hyperbolic tangent, within 2 ulp, and its derivative 1 - tanh^2, which keeps its precision where tanh comes close to 1.
///
/// Constants of Cephes' `tanhf`.
#[inline(always)]
pub(super) fn tanh<S: Simd>(simd: S, x: S::f32s) -> (S::f32s, S::f32s) {
    let splat = |x| simd.splat_f32s(x);
    let one = splat(1.0);
    let size = simd.abs_f32s(x);
    let square = simd.mul_f32s(x, x);
    let mut p = splat(-5.704_988_7e-3);
    for c in [2.063_908_8e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = simd.mul_add_e_f32s(p, square, splat(c));
    }
    let small = simd.mul_add_e_f32s(simd.mul_f32s(p, square), x, x);
    let small_derivative = simd.sub_f32s(one, simd.mul_f32s(small, small));

    // 1 - rest = 1 - 2 / (exp(2 |x|) + 1)
    let e = exp(simd, simd.mul_f32s(splat(-2.0), size));
    let rest = simd.div_f32s(simd.add_f32s(e, e), simd.add_f32s(one, e));
    let large = simd.transmute_u32s_f32s(simd.sub_f32s(one, rest));
    let sign = simd.and_u32s(simd.transmute_u32s_f32s(x), simd.splat_u32s(1 << 31));
    let large = simd.transmute_f32s_u32s(simd.or_u32s(large, sign));
    let large_derivative = simd.mul_f32s(rest, simd.sub_f32s(splat(2.0), rest));

    let is_small = simd.less_than_f32s(size, splat(0.625));
    (simd.select_f32s(is_small, small, large), simd.select_f32s(is_small, small_derivative, large_derivative))
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, WithSimd};

    use super::*;

    /// A function of the module, applied to all of a buffer.
    struct Map<'a, const F: usize>(&'a mut [f32]);

    const EXP: usize = 0;
    const TANH: usize = 1;
    const TANH_DERIVATIVE: usize = 2;

    impl<const F: usize> WithSimd for Map<'_, F> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            for x in vectors {
                *x = match F {
                    EXP => exp(simd, *x),
                    TANH => tanh(simd, *x).0,
                    _ => tanh(simd, *x).1,
                };
            }
        }
    }

    fn check(x: &[f32], ulps: f64, function: impl Fn(f64) -> f64, run: impl Fn(&mut [f32])) {
        let mut y = x.to_vec();
        run(&mut y);
        for (&x, &y) in x.iter().zip(&y) {
            let exact = function(x.into());
            let size = exact.abs() as f32;
            let ulp = f64::from(size.next_up()) - f64::from(size);
            assert!((f64::from(y) - exact).abs() <= ulps * ulp, "f({x}) = {y}, not {exact}");
        }
    }

    #[test]
    fn exp_is_within_an_ulp() {
        let x: Vec<f32> = (0..1 << 20).map(|n| -87.0 + 87.5 * n as f32 / (1 << 20) as f32).collect();
        check(&x, 1.0, f64::exp, |y| Arch::new().dispatch(Map::<EXP>(y)));
        check(&x, 2.0, f64::exp, |y| Map::<EXP>(y).with_simd(pulp::Scalar::new()));
    }

    #[test]
    fn exp_of_the_exceptions() {
        let x = [f32::NEG_INFINITY, f32::MIN, -1e4, -87.5, 0.0, -0.0, f32::NAN, -f32::NAN];
        let mut x = [x, x, x, x].concat();
        Arch::new().dispatch(Map::<EXP>(&mut x));
        for x in x.chunks(8) {
            assert_eq!(x[..6], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
            assert!(x[6].is_nan() && x[7].is_nan());
        }
    }

    #[test]
    fn tanh_is_within_two_ulp() {
        // Sizes from 2^-40 to 2^7, densest where the two formulas meet, of either sign.
        let sizes = (0..1 << 19).map(|n| (-40.0 + 47.0 * n as f32 / (1 << 19) as f32).exp2());
        let middle = (0..1 << 18).map(|n| 2.0 * n as f32 / (1 << 18) as f32);
        let x: Vec<f32> = sizes.chain(middle).flat_map(|x| [x, -x]).collect();
        check(&x, 2.0, f64::tanh, |y| Arch::new().dispatch(Map::<TANH>(y)));
        check(&x, 2.0, f64::tanh, |y| Map::<TANH>(y).with_simd(pulp::Scalar::new()));
        // Up to the point where the derivative is no longer a normal number.
        let x: Vec<f32> = x.into_iter().filter(|x| x.abs() < 43.0).collect();
        let x = &x[..x.len() / 16 * 16];
        let derivative = |x: f64| x.cosh().powi(-2);
        check(x, 6.0, derivative, |y| Arch::new().dispatch(Map::<TANH_DERIVATIVE>(y)));
        check(x, 6.0, derivative, |y| Map::<TANH_DERIVATIVE>(y).with_simd(pulp::Scalar::new()));
    }

    #[test]
    fn tanh_of_the_exceptions() {
        let inf = f32::INFINITY;
        let x = [inf, -inf, f32::MAX, f32::MIN, 1e-40, 0.0, f32::NAN, -f32::NAN].repeat(4);
        let (mut t, mut derivative) = (x.clone(), x);
        Arch::new().dispatch(Map::<TANH>(&mut t));
        Arch::new().dispatch(Map::<TANH_DERIVATIVE>(&mut derivative));
        for (t, derivative) in t.chunks(8).zip(derivative.chunks(8)) {
            assert_eq!(t[..6], [1.0, -1.0, 1.0, -1.0, 1e-40, 0.0]);
            assert_eq!(derivative[..6], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
            assert!(t[6..].iter().chain(&derivative[6..]).all(|x| x.is_nan()));
        }
    }
}
