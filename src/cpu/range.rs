//! Room for sums of bf16 numbers, which reach as far as f32 does.
//!
//! Results are at most as large as these types hold, but on the way there f32 sums many of them. So where that could
//! overflow, an operand that the results are linear in is taken in smaller units, powers of two, which is exact: but
//! for elements so far below the largest that they become subnormal.

/// Sums in f32 stay below 2 to the power of this.
const ROOM: i32 = 126;

/// An exponent above that of every finite element.
pub(super) fn exponent(x: &[f32]) -> i32 {
    let most = x.iter().map(|x| x.abs()).filter(|x| x.is_finite()).fold(f32::MIN_POSITIVE, f32::max);
    most.log2().floor() as i32 + 1
}

/// The exponent above a count.
pub(super) fn exponent_of(count: usize) -> i32 {
    count.ilog2() as i32 + 1
}

/// The exponent of the unit in which a sum below 2 to the power of `exponent` has room.
pub(super) fn unit(exponent: i32) -> i32 {
    (exponent - ROOM).max(0)
}

/// `x * 2^exponent`.
pub(super) fn scale(x: &mut [f32], exponent: i32) {
    if exponent != 0 {
        let factor = 2f64.powi(exponent);
        x.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
    }
}
