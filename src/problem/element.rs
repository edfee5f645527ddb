//! Element types of operands.

use std::borrow::Cow;
use std::fmt;

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
#[cfg(feature = "cpu")]
use rayon::prelude::*;

/// Element type of q, k, v, o and their gradients. lse, the sink logits and their gradients are f32 in every case.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DType {
    /// IEEE 754 single precision.
    #[default]
    F32,
    /// IEEE 754 half precision: 11 significant bits, up to 65504.
    F16,
    /// bfloat16, the upper half of a single: 8 significant bits, the range of f32.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// Whether rounding to this type takes bits from a number of f32, so that o has a rounding error: `o_lo`.
    pub const fn has_rounding_error(self) -> bool {
        match self {
            DType::F32 => false,
            DType::F16 | DType::Bf16 => true,
        }
    }

    /// Whether sums of products in f32 may overflow on the way to a result that this type holds. An f32 problem is computed in f32: its
    /// sums overflow with it.
    #[cfg(feature = "cpu")]
    pub(crate) const fn overflows_f32_sums(self) -> bool {
        match self {
            DType::F32 | DType::F16 => false,
            DType::Bf16 => true,
        }
    }

    /// Whether a word of 32 bits holds two elements.
    pub(crate) const fn is_half(self) -> bool {
        match self {
            DType::F32 => false,
            DType::F16 | DType::Bf16 => true,
        }
    }

    /// Whether cooperative matrices, whose operands are f16, multiply it with an error like its own.
    pub(crate) const fn multiplies_on_matrices(self) -> bool {
        match self {
            DType::F32 => false,
            DType::F16 | DType::Bf16 => true,
        }
    }

    /// Whether cooperative matrices multiply it as two halves a number, with the error of f32 or nearly so, where the caller asks for that.
    pub(crate) const fn is_split_on_matrices(self) -> bool {
        match self {
            DType::F32 => true,
            DType::F16 | DType::Bf16 => false,
        }
    }

    /// Halves that are multiplied in place of a number on cooperative matrices.
    pub(crate) const fn matrix_parts(self) -> u32 {
        if self.is_split_on_matrices() { 2 } else { 1 }
    }

    /// Whether its elements are operands of cooperative matrices as they lie in memory.
    pub(crate) const fn is_matrix_operand(self) -> bool {
        match self {
            DType::F16 => true,
            DType::F32 | DType::Bf16 => false,
        }
    }

    /// Whether it has more range than the f16 of cooperative matrices, so that each token's numbers are multiplied with a power of
    /// two: its token scale.
    pub(crate) const fn needs_token_scales(self) -> bool {
        match self {
            DType::F16 => false,
            DType::F32 | DType::Bf16 => true,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        })
    }
}

pub(crate) mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    // Of buffers only.
    impl Sealed for i16 {}
    impl Sealed for u32 {}
    impl Sealed for u8 {}
}

/// An element of a host operand: `f32`, [`f16`](struct@f16) or [`bf16`]. Nothing else implements it.
pub trait Element:
    sealed::Sealed + bytemuck::Pod + Into<f64> + Send + Sync + Default + PartialEq + fmt::Debug + 'static
{
    /// The element type as a value.
    const DTYPE: DType;

    /// The same number in f32, exactly.
    fn to_f32(self) -> f32;

    /// The nearest number of this type, to even in the middle; beyond the largest one, infinity.
    fn from_f32(x: f32) -> Self;

    /// The rounding error of [`from_f32`](Self::from_f32) of x, from which [`with_lo`](Self::with_lo) gives x back: 0 where nothing is rounded,
    /// as always in f32, and where the rounded number is not finite.
    ///
    /// It is the difference of the bits of |x| and of the rounded |x|, both as f32; for f16 below 2^-14 their own
    /// difference in units of 2^-39.
    fn lo(x: f32) -> i16;

    /// x, from itself rounded and its [`lo`](Self::lo): exactly, but for the last bit of a tie of bf16, and within 2^-40
    /// for f16 below 2^-14.
    fn with_lo(self, lo: i16) -> f32;

    /// [`to_f32`](Self::to_f32) of a whole operand, which is no copy where it is f32 already.
    fn widen(x: &[Self]) -> Cow<'_, [f32]>;

    /// [`from_f32`](Self::from_f32) of a whole result, which is no copy where it stays f32.
    fn narrow(x: Vec<f32>) -> Vec<Self>;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    fn to_f32(self) -> f32 {
        self
    }

    fn from_f32(x: f32) -> Self {
        x
    }

    fn lo(_: f32) -> i16 {
        0
    }

    fn with_lo(self, _: i16) -> f32 {
        self
    }

    fn widen(x: &[Self]) -> Cow<'_, [f32]> {
        Cow::Borrowed(x)
    }

    fn narrow(x: Vec<f32>) -> Vec<Self> {
        x
    }
}

/// Elements that a thread converts at a time.
const CHUNK: usize = 1 << 14;

/// Converts chunk by chunk, on all cores where the CPU path is there.
#[cfg(feature = "cpu")]
fn in_chunks<A: Send, B: Sync>(into: &mut [A], from: &[B], convert: impl Fn(&mut [A], &[B]) + Sync) {
    into.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(into, from)| convert(into, from));
}

#[cfg(not(feature = "cpu"))]
fn in_chunks<A, B>(into: &mut [A], from: &[B], convert: impl Fn(&mut [A], &[B])) {
    convert(into, from);
}

macro_rules! half_element {
    ($type:ty, $dtype:expr, $lo:expr, $with_lo:expr) => {
        impl Element for $type {
            const DTYPE: DType = $dtype;

            fn to_f32(self) -> f32 {
                <$type>::to_f32(self)
            }

            fn from_f32(x: f32) -> Self {
                <$type>::from_f32(x)
            }

            fn lo(x: f32) -> i16 {
                $lo(x)
            }

            fn with_lo(self, lo: i16) -> f32 {
                $with_lo(self, lo)
            }

            fn widen(x: &[Self]) -> Cow<'_, [f32]> {
                let mut wide = vec![0.0; x.len()];
                in_chunks(&mut wide, x, |wide, x| x.convert_to_f32_slice(wide));
                Cow::Owned(wide)
            }

            fn narrow(x: Vec<f32>) -> Vec<Self> {
                let mut narrow = vec![<$type>::ZERO; x.len()];
                in_chunks(&mut narrow, &x, |narrow, x| narrow.convert_from_f32_slice(x));
                narrow
            }
        }
    };
}

half_element!(f16, DType::F16, f16_lo, f16_with_lo);
half_element!(bf16, DType::Bf16, bf16_lo, bf16_with_lo);

/// The unit of what rounding takes from f16 numbers below 2^-14.
const SUBNORMAL_UNIT: f32 = 1.0 / (1u64 << 39) as f32;

fn f16_lo(x: f32) -> i16 {
    let rounded = f16::from_f32(x);
    if !rounded.is_finite() {
        return 0;
    }
    let (size, wide) = (x.abs(), rounded.to_f32().abs());
    if wide < f16::MIN_POSITIVE.to_f32() {
        return ((size - wide) / SUBNORMAL_UNIT).round_ties_even() as i16;
    }
    size.to_bits().wrapping_sub(wide.to_bits()) as i16
}

fn f16_with_lo(x: f16, lo: i16) -> f32 {
    let wide = x.to_f32();
    if wide.abs() < f16::MIN_POSITIVE.to_f32() {
        return (wide.abs() + f32::from(lo) * SUBNORMAL_UNIT).abs().copysign(wide);
    }
    f32::from_bits(wide.to_bits().wrapping_add_signed(lo.into()))
}

fn bf16_lo(x: f32) -> i16 {
    let rounded = bf16::from_f32(x);
    if !rounded.is_finite() {
        return 0;
    }
    // A tie leaves one too many.
    let lo = x.to_bits().wrapping_sub(rounded.to_f32().to_bits()) as i32;
    lo.min(i16::MAX.into()) as i16
}

fn bf16_with_lo(x: bf16, lo: i16) -> f32 {
    f32::from_bits(x.to_f32().to_bits().wrapping_add_signed(lo.into()))
}

/// The element type of a [`DeviceBuffer`](crate::device::DeviceBuffer).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BufferType {
    /// 32-bit floats: operands, lse, sink logits, ALiBi slopes and a bias; a rotary embedding's table.
    F32,
    /// 16-bit floats of IEEE 754: operands and a bias.
    F16,
    /// The upper half of 32-bit floats: operands and a bias.
    Bf16,
    /// The rounding error of o, see [`Output::o_lo`](crate::Output::o_lo).
    I16,
    /// A boolean mask's bits.
    U32,
    /// A boolean mask's bytes.
    U8,
}

impl BufferType {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            BufferType::F32 | BufferType::U32 => 4,
            BufferType::F16 | BufferType::Bf16 | BufferType::I16 => 2,
            BufferType::U8 => 1,
        }
    }
}

impl fmt::Display for BufferType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BufferType::F32 => "f32",
            BufferType::F16 => "f16",
            BufferType::Bf16 => "bf16",
            BufferType::I16 => "i16",
            BufferType::U32 => "u32",
            BufferType::U8 => "u8",
        })
    }
}

impl From<DType> for BufferType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => BufferType::F32,
            DType::F16 => BufferType::F16,
            DType::Bf16 => BufferType::Bf16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number of a type survives, and slices are converted as elements are, whatever instructions do it.
    fn round_trip<T: Element>(numbers: impl Iterator<Item = T>) {
        let numbers: Vec<T> = numbers.collect();
        let wide = T::widen(&numbers).into_owned();
        for (&x, &y) in numbers.iter().zip(&wide) {
            assert!(x.to_f32() == y || x.to_f32().is_nan() && y.is_nan(), "{x:?} as {y}");
        }
        for (&x, &y) in numbers.iter().zip(&T::narrow(wide)) {
            assert!(x == y || x.to_f32().is_nan() && y.to_f32().is_nan(), "{x:?} comes back as {y:?}");
        }
        assert_eq!(T::DTYPE.bytes(), size_of::<T>());
    }

    #[test]
    fn every_number_survives() {
        round_trip((0..=u16::MAX).map(f16::from_bits));
        round_trip((0..=u16::MAX).map(bf16::from_bits));
        round_trip((0..=u16::MAX).map(|n| f32::from_bits(u32::from(n) << 16 | 0x1234)));
    }

    /// Halfway between two neighbours, and a bit to either side of it.
    fn rounds_to_even<T: Element>(low: T, high: T, even: T) {
        let (low32, high32) = (low.to_f32(), high.to_f32());
        let middle = low32 + (high32 - low32) / 2.0;
        assert_eq!(T::narrow(vec![middle; 40]), [even; 40]);
        assert_eq!(T::narrow(vec![middle.next_down(); 40]), [low; 40]);
        assert_eq!(T::narrow(vec![middle.next_up(); 40]), [high; 40]);
        assert_eq!([T::from_f32(middle), T::from_f32(middle.next_down())], [even, low]);
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        for bits in [0, 1, 2, 0x3ff, 0x400, 0x401, 0x3c00, 0x3c01, 0x7bfe] {
            let even = bits + bits % 2;
            rounds_to_even(f16::from_bits(bits), f16::from_bits(bits + 1), f16::from_bits(even));
        }
        for bits in [0x80, 0x81, 0x3f80, 0x3f81, 0x7f7e] {
            let even = bits + bits % 2;
            rounds_to_even(bf16::from_bits(bits), bf16::from_bits(bits + 1), bf16::from_bits(even));
        }
    }

    /// Numbers of all sizes, the ends of the types, ties, and the neighbours of all.
    fn all_sizes() -> impl Iterator<Item = f32> {
        let spread = (0..1 << 16).map(|n: u32| f32::from_bits(n.wrapping_mul(0x9e37_79b1)));
        let ties = (0..1 << 16).map(|n: u32| f32::from_bits(n << 16 | 0x8000));
        let halves = (0..=u16::MAX).map(|n| f16::from_bits(n).to_f32());
        let halfway = (0..0x7bff).map(|n| (f16::from_bits(n).to_f32() + f16::from_bits(n + 1).to_f32()) / 2.0);
        let all = spread.chain(ties).chain(halves).chain(halfway).chain([65519.9, 65520.0, f32::MAX, 0.0]);
        all.flat_map(|x| [x, x.next_up(), x.next_down(), -x])
    }

    #[test]
    fn what_rounding_takes_comes_back() {
        let same = |x: f32, y: f32| x.to_bits() == y.to_bits();
        for x in all_sizes() {
            let (rounded, lo) = (bf16::from_f32(x), <bf16 as Element>::lo(x));
            let whole = rounded.with_lo(lo);
            if rounded.is_finite() {
                let last_bit_of_a_tie = lo == i16::MAX && x.to_bits() - whole.to_bits() == 1;
                assert!(same(whole, x) || last_bit_of_a_tie, "{x:e} comes back as {whole:e} from {rounded} and {lo}");
            } else {
                assert!(lo == 0 && same(whole, rounded.to_f32()), "{x:e} leaves {lo}");
            }

            let (rounded, lo) = (f16::from_f32(x), <f16 as Element>::lo(x));
            let whole = rounded.with_lo(lo);
            if !rounded.is_finite() {
                assert!(lo == 0 && same(whole, rounded.to_f32()), "{x:e} leaves {lo}");
            } else if rounded.to_f32().abs() < 2f32.powi(-14) {
                let close = (whole - x).abs() <= 2f32.powi(-40) && whole.is_sign_negative() == x.is_sign_negative();
                assert!(close, "{x:e} comes back as {whole:e} from {rounded} and {lo}");
            } else {
                assert!(same(whole, x), "{x:e} comes back as {whole:e} from {rounded} and {lo}");
            }

            assert!(f32::lo(x) == 0 && same(x.with_lo(0), x));
        }
    }

    #[test]
    fn any_rest_has_a_whole() {
        for bits in 0..=u16::MAX {
            for lo in [i16::MIN, i16::MAX] {
                // Another number, and no overflow that a debug build would end at.
                let (f16, bf16) = (f16::from_bits(bits), bf16::from_bits(bits));
                assert_ne!(f16.with_lo(lo).to_bits(), f16.to_f32().to_bits());
                assert_ne!(bf16.with_lo(lo).to_bits(), bf16.to_f32().to_bits());
            }
        }
    }

    #[test]
    fn what_is_too_large_becomes_infinite() {
        assert_eq!(
            f16::narrow(vec![65504.0, 65519.9, 65520.0, -1e5]),
            [f16::MAX, f16::MAX, f16::INFINITY, f16::NEG_INFINITY]
        );
        assert_eq!(bf16::narrow(vec![3.38e38, f32::MAX]), [bf16::from_bits(0x7f7e), bf16::INFINITY]);
    }
}
