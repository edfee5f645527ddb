//! The distance of results from expected ones: the comparisons that tests and `sink-attention check` use.
//!
//! A comparison that cannot fail proves nothing. So everything but a number that is close enough is a [`Mismatch`]: NaN, an infinity in the
//! wrong place, a wrong length, nothing to compare.

use std::ops::Range;

use crate::problem::element::{DType, Element};

/// The accepted relative error of a whole result of this element type, see [`tensor`]. It is that of the operands for o and the gradients
/// of q, k and v. All other results are in f32, and so is [`lse`].
pub const fn accepted(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 1.5e-3,
        DType::Bf16 => 6e-3,
    }
}

/// The reason why results are not the expected ones.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum Mismatch {
    /// Nothing is expected, so nothing would be compared.
    #[error("nothing is expected, so nothing would be compared")]
    Empty,
    /// The numbers of elements differ.
    #[error("{actual} elements, expected {expected}")]
    Length {
        /// Number of elements.
        actual: usize,
        /// Expected number of elements.
        expected: usize,
    },
    /// An element is NaN or infinite, but the expected one is not, or the other way round.
    #[error("element {index} is {actual}, expected {expected}")]
    NotFinite {
        /// Index of the element.
        index: usize,
        /// Value of the element.
        actual: f64,
        /// Expected value.
        expected: f64,
    },
    /// The relative error of a whole tensor is too large.
    #[error("relative error {error:.3e}, at most {bound:.1e}")]
    Norm {
        /// ||actual - expected|| / ||expected||.
        error: f64,
        /// The largest error accepted.
        bound: f64,
    },
    /// The error of a row is too large. This row is the worst one.
    #[error("the row at element {index} is off by {error:.3e} of its terms, at most {bound:.1e}")]
    Row {
        /// The row's first element.
        index: usize,
        /// ||actual - expected|| / ||sums of the absolute values of terms||.
        error: f64,
        /// The largest error accepted.
        bound: f64,
    },
    /// The error of an element is too large. This element is the worst one.
    #[error("element {index} is {actual}, expected {expected} within {bound:.1e} absolute + relative")]
    Element {
        /// Index of the element.
        index: usize,
        /// Value of the element.
        actual: f64,
        /// Expected value.
        expected: f64,
        /// |actual - expected| / (1 + |expected|).
        error: f64,
        /// The largest error accepted.
        bound: f64,
    },
    /// An element is worse than a low-precision computation explains. This element is the worst one.
    #[error(
        "element {index} is {actual}, expected {expected} within {bound:.1e}: \
         twice the largest error of a low-precision computation and 2 units in the last place"
    )]
    LowPrecision {
        /// Index of the element.
        index: usize,
        /// Value of the element.
        actual: f64,
        /// Expected value.
        expected: f64,
        /// |actual - expected|.
        error: f64,
        /// The largest error accepted of this element.
        bound: f64,
    },
}

impl Mismatch {
    /// The measured error, if there is one.
    pub fn error(&self) -> Option<f64> {
        match *self {
            Mismatch::Norm { error, .. }
            | Mismatch::Row { error, .. }
            | Mismatch::Element { error, .. }
            | Mismatch::LowPrecision { error, .. } => Some(error),
            Mismatch::Empty | Mismatch::Length { .. } | Mismatch::NotFinite { .. } => None,
        }
    }
}

/// Compares whole tensors, which must be finite: the error ||actual - expected|| / ||expected||, at most `bound`.
///
/// # Errors
/// A [`Mismatch`] if they differ by more, or are not finite.
pub fn tensor<A, E>(actual: &[A], expected: &[E], bound: f64) -> Result<f64, Mismatch>
where
    A: Copy + Into<f64>,
    E: Copy + Into<f64>,
{
    let (mut difference, mut norm) = (0.0, 0.0);
    for (index, actual, expected) in pairs(actual, expected)? {
        if !actual.is_finite() || !expected.is_finite() {
            return Err(Mismatch::NotFinite { index, actual, expected });
        }
        difference += (actual - expected) * (actual - expected);
        norm += expected * expected;
    }
    // Expected zeros must be exact.
    let error = if difference == 0.0 { 0.0 } else { f64::sqrt(difference) / f64::sqrt(norm) };
    if error <= bound { Ok(error) } else { Err(Mismatch::Norm { error, bound }) }
}

/// Compares each row by itself, because a norm over all rows would not show a row that is lost next to larger ones.
///
/// The error of a row is `||actual - expected|| / ||magnitudes||`. A magnitude is the sum of the absolute values of the terms of an
/// element, see [`Magnitudes`](crate::cpu::reference::Magnitudes). The denominator is never less than the norm of the row itself. The
/// rounding error of the smallest numbers of `dtype` is accepted in addition to `bound`. The three slices are of one length, and `rows` are
/// within it. Returns the worst error.
///
/// # Errors
/// A [`Mismatch`] if an error is above `bound`, or a row is not finite.
pub fn rows<A, E>(
    actual: &[A],
    expected: &[E],
    magnitudes: &[f64],
    rows: impl IntoIterator<Item = Range<usize>>,
    dtype: DType,
    bound: f64,
) -> Result<f64, Mismatch>
where
    A: Copy + Into<f64>,
    E: Copy + Into<f64>,
{
    let length = Mismatch::Length { actual: actual.len(), expected: expected.len() };
    if actual.len() != expected.len() || magnitudes.len() != expected.len() {
        return Err(length);
    }
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let mut worst = (0.0, Ok(0.0));
    for row in rows {
        let start = row.start;
        let (Some(actual), Some(expected)) = (actual.get(row.clone()), expected.get(row.clone())) else {
            return Err(length);
        };
        let pairs = || actual.iter().zip(expected).map(|(&x, &y)| (x.into(), y.into()));
        if let Some((n, (x, y))) = pairs().enumerate().find(|(_, (x, y))| !x.is_finite() || !y.is_finite()) {
            return Err(Mismatch::NotFinite { index: start + n, actual: x, expected: y });
        }
        let difference = norm(&mut pairs().map(|(x, y)| x - y));
        // Devices may flush results below f32's normal numbers to zero.
        let smallest = (row.len() as f64).sqrt() * ulp(0.0, dtype).max(f32::MIN_POSITIVE.into());
        let size = norm(&mut magnitudes[row].iter().copied()).max(norm(&mut pairs().map(|(_, y)| y)));
        // The smallest numbers have no relative precision. Expected zeros must be exact.
        let rest = if size == 0.0 { difference } else { (difference - smallest).max(0.0) };
        let error = if rest == 0.0 { 0.0 } else { rest / size };
        if error > worst.0 {
            worst = (error, if error <= bound { Ok(error) } else { Err(Mismatch::Row { index: start, error, bound }) });
        }
    }
    worst.1
}

/// Compares element by element, as is right for logarithms: the worst |actual - expected| / (1 + |expected|), at most `bound`. It is
/// absolute for small numbers and relative for large ones. Infinities must be equal.
///
/// # Errors
/// A [`Mismatch`] if an error is above `bound`, or an infinity or a NaN is in the wrong place.
pub fn lse<A, E>(actual: &[A], expected: &[E], bound: f64) -> Result<f64, Mismatch>
where
    A: Copy + Into<f64>,
    E: Copy + Into<f64>,
{
    let mut worst = (0.0, Ok(0.0));
    for (index, actual, expected) in pairs(actual, expected)? {
        if actual == expected {
            continue;
        }
        if !actual.is_finite() || !expected.is_finite() {
            return Err(Mismatch::NotFinite { index, actual, expected });
        }
        let error = (actual - expected).abs() / (1.0 + expected.abs());
        if error > worst.0 {
            let mismatch = Mismatch::Element { index, actual, expected, error, bound };
            worst = (error, if error <= bound { Ok(error) } else { Err(mismatch) });
        }
    }
    worst.1
}

/// Compares element by element with the results of a plain computation of low precision. The accepted error is twice the largest error of
/// `low` and 2 units in the last place of the element. Returns the worst error as a share of the accepted one.
///
/// If `low` is infinite, because `T` does not hold the number, `actual` must be the same.
///
/// # Errors
/// A [`Mismatch`] if an error is larger, or a number is not finite.
pub fn low_precision<T: Element>(actual: &[T], low: &[T], expected: &[f64]) -> Result<f64, Mismatch> {
    let mut largest = 0.0;
    for (index, low, expected) in pairs(low, expected)? {
        if low.is_nan() || !expected.is_finite() {
            return Err(Mismatch::NotFinite { index, actual: low, expected });
        }
        if low.is_finite() {
            largest = f64::max(largest, (low - expected).abs());
        }
    }
    let mut worst = (0.0, Ok(0.0));
    for ((index, actual, expected), low) in pairs(actual, expected)?.zip(low) {
        let low: f64 = (*low).into();
        if actual == low {
            continue;
        }
        if !actual.is_finite() || low.is_infinite() {
            return Err(Mismatch::NotFinite {
                index,
                actual,
                expected: if low.is_infinite() { low } else { expected },
            });
        }
        let error = (actual - expected).abs();
        let bound = 2.0 * largest + 2.0 * ulp(expected, T::DTYPE);
        let share = error / bound;
        if share > worst.0 {
            let mismatch = Mismatch::LowPrecision { index, actual, expected, error, bound };
            worst = (share, if share <= 1.0 { Ok(share) } else { Err(mismatch) });
        }
    }
    worst.1
}

/// The distance of neighbouring numbers of a type at `x`.
fn ulp(x: f64, dtype: DType) -> f64 {
    let (digits, least) = match dtype {
        DType::F32 => (24, -126),
        DType::F16 => (11, -14),
        DType::Bf16 => (8, -126),
    };
    let exponent = if x == 0.0 { least } else { (x.abs().log2().floor() as i32).max(least) };
    2f64.powi(exponent - digits + 1)
}

/// Pairs of elements, with their index.
fn pairs<A, E>(actual: &[A], expected: &[E]) -> Result<impl Iterator<Item = (usize, f64, f64)>, Mismatch>
where
    A: Copy + Into<f64>,
    E: Copy + Into<f64>,
{
    match (actual.len(), expected.len()) {
        (_, 0) => Err(Mismatch::Empty),
        (a, e) if a != e => Err(Mismatch::Length { actual: a, expected: e }),
        _ => Ok(actual.iter().zip(expected).enumerate().map(|(i, (&a, &e))| (i, a.into(), e.into()))),
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::{DType, Element, Mismatch, low_precision, lse, rows, tensor, ulp};

    const INF: f32 = f32::INFINITY;
    const NAN: f32 = f32::NAN;

    #[test]
    fn accepts_what_is_close_and_says_how_close() {
        assert_eq!(tensor(&[3.0, 4.0f32], &[3.0, 4.0f32], 0.0), Ok(0.0));
        assert_eq!(tensor(&[0.0f32; 3], &[0.0f64; 3], 1e-5), Ok(0.0));
        approx::assert_relative_eq!(tensor(&[3.0, 4.00004f64], &[3.0, 4.0f32], 1e-5).unwrap(), 8e-6, epsilon = 1e-12);
        assert_eq!(lse(&[1.0, -INF, INF], &[1.0, -INF, INF], 0.0), Ok(0.0));
        let worst = lse(&[1.0, -f64::INFINITY, f64::INFINITY, 1000.009], &[1.0, -INF, INF, 1000.0], 1e-5).unwrap();
        approx::assert_relative_eq!(worst, 0.009 / 1001.0, epsilon = 1e-12);
        lse(&[0.000009f64], &[0.0f32], 1e-5).unwrap();
    }

    #[test]
    fn rejects_an_error_above_the_bound() {
        tensor(&[3.0, 4.00006f64], &[3.0, 4.0f32], 1e-5).unwrap_err();
        tensor(&[3.0, -4.0f32], &[3.0, 4.0f32], 1e-5).unwrap_err();
        tensor(&[0.0f32; 2], &[3.0, 4.0f32], 1e-5).unwrap_err();
        tensor(&[1e-20f32], &[0.0f32], 1e-5).unwrap_err();
        lse(&[0.000011f64], &[0.0f32], 1e-5).unwrap_err();
        lse(&[1.0, 1000.02f32], &[1.0, 1000.0f32], 1e-5).unwrap_err();
        lse(&[-1.0f32], &[1.0f32], 1e-5).unwrap_err();
    }

    #[test]
    fn names_the_worst_element() {
        match lse(&[1.0, 2.5, 3.1f64], &[1.0, 2.0, 3.0f64], 1e-5) {
            Err(mismatch @ Mismatch::Element { index: 1, .. }) => assert_eq!(mismatch.error(), Some(0.5 / 3.0)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn rejects_what_is_not_finite() {
        for bad in [NAN, INF, -INF] {
            tensor(&[1.0, bad], &[1.0, 2.0f32], 1e-5).unwrap_err();
            tensor(&[1.0, 2.0f32], &[1.0, bad], 1e-5).unwrap_err();
            tensor(&[1.0, bad], &[1.0, bad], 1e-5).unwrap_err();
            lse(&[1.0, bad], &[1.0, 2.0f32], 1e-5).unwrap_err();
            lse(&[1.0, 2.0f32], &[1.0, bad], 1e-5).unwrap_err();
        }
        lse(&[INF], &[-INF], 1e-5).unwrap_err();
        lse(&[-INF], &[INF], 1e-5).unwrap_err();
        lse(&[-f32::MAX], &[-INF], 1e-5).unwrap_err();
        lse(&[NAN], &[-INF], 1e-5).unwrap_err();
        lse(&[NAN], &[NAN], 1e-5).unwrap_err();
        // An error does not hide an infinity or a NaN behind it.
        assert!(matches!(lse(&[9.0, NAN], &[1.0, 1.0f32], 1e-5), Err(Mismatch::NotFinite { index: 1, .. })));
    }

    #[test]
    fn rejects_a_wrong_length() {
        for wrong in [&[1.0f32][..], &[1.0, 2.0, 3.0], &[]] {
            tensor(wrong, &[1.0, 2.0f32], 1e-5).unwrap_err();
            lse(wrong, &[1.0, 2.0f32], 1e-5).unwrap_err();
        }
        assert_eq!(tensor::<f32, f32>(&[], &[], 1e-5), Err(Mismatch::Empty));
        assert_eq!(lse::<f32, f32>(&[], &[], 1e-5), Err(Mismatch::Empty));
    }

    #[test]
    fn rows_stand_for_themselves() {
        // The second row is lost next to the first, and the norm over both does not show it.
        let (expected, magnitudes) = ([3.0, 4.0, 3e-6, 4e-6], [3.0, 4.0, 3e-6, 4e-6]);
        let lost = [3.0, 4.0, 0.0, 0.0];
        let of =
            |actual: &[f64], magnitudes: &[f64]| rows(actual, &expected, magnitudes, [0..2, 2..4], DType::F32, 1e-5);
        tensor(&lost, &expected, 1e-5).unwrap();
        assert_eq!(of(&expected, &magnitudes), Ok(0.0));
        assert!(matches!(of(&lost, &magnitudes), Err(Mismatch::Row { index: 2, error: 1.0, .. })));
        // Terms that cancel explain more. Magnitudes below the row itself do not count.
        of(&lost, &[3.0, 4.0, 0.3, 0.4]).unwrap();
        assert!(of(&lost, &[0.0; 4]).is_err());
        // Half of the smallest number of f16 is no error, but twice that is one. If zero is expected, both are errors.
        let small = |actual: f64, expected: f64| {
            rows(&[actual], &[expected], &[expected], std::iter::once(0..1), DType::F16, 1e-3)
        };
        small(0.0, 0.5f64 * 2f64.powi(-24)).unwrap();
        small(0.0, 2.0 * 2f64.powi(-24)).unwrap_err();
        small(2f64.powi(-24), 0.0).unwrap_err();
        // NaN and a wrong length are errors.
        of(&[3.0, 4.0, f64::NAN, 0.0], &magnitudes).unwrap_err();
        of(&expected[..3], &magnitudes).unwrap_err();
        of(&expected, &magnitudes[..3]).unwrap_err();
    }

    fn halves<T: Element>(x: &[f32]) -> Vec<T> {
        T::narrow(x.to_vec())
    }

    #[test]
    fn a_unit_in_the_last_place_is_the_distance_of_neighbours() {
        for bits in [0x0001, 0x03ff, 0x0400, 0x3c00, 0x3fff, 0x7bfe] {
            let [x, next] = [bits, bits + 1].map(|bits| f16::from_bits(bits).to_f64());
            assert_eq!(ulp(x, DType::F16), next - x, "{x}");
        }
        for bits in [0x0001, 0x0080, 0x3f80, 0x7f7e] {
            let [x, next] = [bits, bits + 1].map(|bits| bf16::from_bits(bits).to_f64());
            assert_eq!(ulp(-x, DType::Bf16), next - x, "{x}");
        }
        assert_eq!(ulp(1.0, DType::F32), f64::from(f32::EPSILON));
        assert_eq!(ulp(0.0, DType::F16), f16::from_bits(1).to_f64());
    }

    #[test]
    fn low_precision_accepts_twice_its_error_and_two_units() {
        // The first element has an error of 2^-11. Units are 2^-10 and 2^-9.
        let (low, expected) = (halves::<f16>(&[1.0, 2.0]), [1.0 + 2f64.powi(-11), 2.0]);
        assert_eq!(low_precision(&low, &low, &expected), Ok(0.0));
        let second = |units: f32| low_precision(&halves::<f16>(&[1.0, 2.0 + units / 512.0]), &low, &expected);
        assert_eq!([second(1.0), second(-2.0)], [Ok(0.4), Ok(0.8)]);
        assert!(matches!(second(3.0), Err(Mismatch::LowPrecision { index: 1, .. })));
        assert!(second(-3.0).unwrap_err().error().is_some());
        // The first element has the smaller unit.
        low_precision(&halves::<f16>(&[1.0 - 2.0 / 1024.0, 2.0]), &low, &expected).unwrap();
        low_precision(&halves::<f16>(&[1.0 - 3.0 / 1024.0, 2.0]), &low, &expected).unwrap_err();
    }

    #[test]
    fn low_precision_rejects_what_is_not_finite() {
        let ones = halves::<bf16>(&[1.0, 1.0]);
        for bad in [NAN, INF, -INF] {
            low_precision(&halves(&[1.0, bad]), &ones, &[1.0, 1.0]).unwrap_err();
            low_precision(&ones, &halves(&[1.0, bad]), &[1.0, 1.0]).unwrap_err();
            low_precision(&ones, &ones, &[1.0, f64::from(bad)]).unwrap_err();
        }
        // An infinity by rounding is right, and then nothing else is.
        let (large, expected) = (halves::<f16>(&[1.0, 1e5]), [1.0, 1e5]);
        assert_eq!(low_precision(&large, &large, &expected), Ok(0.0));
        low_precision(&halves(&[1.0, 65504.0]), &large, &expected).unwrap_err();
        low_precision(&halves(&[1.0, -INF]), &large, &expected).unwrap_err();
        low_precision(&halves(&[1.0, NAN]), &halves::<f16>(&[1.0, NAN]), &[1.0, 1.0]).unwrap_err();
    }

    #[test]
    fn low_precision_rejects_a_wrong_length() {
        let two = [1.0f32, 2.0];
        for wrong in [&two[..1], &[], &[1.0, 2.0, 3.0]] {
            low_precision(wrong, &two, &[1.0, 2.0]).unwrap_err();
            low_precision(&two, wrong, &[1.0, 2.0]).unwrap_err();
        }
        assert_eq!(low_precision::<f32>(&[], &[], &[]), Err(Mismatch::Empty));
    }
}
