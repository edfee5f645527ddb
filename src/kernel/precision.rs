//! The precision of products of f32.

use std::fmt;

/// How the kernels of f32 operands form their products. Operands, results and sums are f32 in both.
///
/// f16 and bf16 have no such choice: [`Split`](Precision::Split) with their operands is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Multiply-adds in f32, by the portable micro-kernel.
    #[default]
    Full,
    /// Cooperative matrices (tensor cores), which multiply f16. A number x is two halves, `hi = f16(x)` and `lo = f16(x - hi)`, and a product
    /// is the three products `hi hi + (hi lo + lo hi)`, summed in f32. So it has 22 significant bits in place of 24.
    ///
    /// Numbers of a token (a row of a head) count in the unit of its largest one, by a token scale, and probabilities and the gradients by
    /// scores in that of their row. Results are within the bound of f32, a relative error of 1e-5 of the norm. A row that sees numbers
    /// beyond 2^60 or tokens below 2^-60, infinities or NaN is computed by the portable micro-kernel.
    ///
    /// It is the micro-kernel [`Fragments`](crate::plan::MicroKernel::Fragments) that has these products: the device must have it. The
    /// gradient by a bias, which has a portable kernel only, is computed in full precision, and so are decoding steps.
    Split,
}

impl Precision {
    /// All precisions.
    pub const ALL: [Precision; 2] = [Precision::Full, Precision::Split];
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::Full => "full",
            Precision::Split => "split",
        })
    }
}
