//! The peak performance of devices, by their makers' figures.

use sink_attention::DType;
use sink_attention::plan::Precision;

/// Peaks of a device. Operations are those of dense matrices, without sparsity, and f16 and bf16 have f32 sums.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peaks {
    /// Part of the adapter's name.
    name: &'static str,
    /// TFLOP/s of f32 multiply-adds.
    f32: f64,
    /// TFLOP/s of f16 and bf16 matrix units. None if there are none.
    half: Option<f64>,
    /// GB/s of memory.
    pub bandwidth: f64,
}

const fn peaks(name: &'static str, f32: f64, half: f64, bandwidth: f64) -> Peaks {
    Peaks { name, f32, half: if half > 0.0 { Some(half) } else { None }, bandwidth }
}

/// The first entry whose name is part of the adapter's name counts, so longer names come first.
const KNOWN: [Peaks; 13] = [
    // NVIDIA H200 and H100 Tensor Core GPU datasheets. Their figures are with sparsity, and halved here.
    peaks("H200", 67.0, 989.0, 4800.0),
    peaks("H100 PCIe", 51.0, 756.0, 2000.0),
    peaks("H100", 67.0, 989.0, 3350.0),
    // NVIDIA A100 Tensor Core GPU datasheet.
    peaks("A100-SXM4-80GB", 19.5, 312.0, 2039.0),
    peaks("A100-SXM4-40GB", 19.5, 312.0, 1555.0),
    // NVIDIA L4 and L40S datasheets.
    peaks("L40S", 91.6, 362.0, 864.0),
    peaks("NVIDIA L4", 30.3, 121.0, 300.0),
    // NVIDIA Ada and Ampere GPU architecture whitepapers (GA102: f16 with f32 sums).
    peaks("RTX 4090", 82.6, 165.2, 1008.0),
    peaks("RTX 3090 Ti", 40.0, 80.0, 1008.0),
    peaks("RTX 3090", 35.6, 71.0, 936.0),
    // AMD's product pages of the Radeon RX 7900 XTX and the Instinct MI300X.
    peaks("RX 7900 XTX", 61.4, 122.8, 960.0),
    peaks("MI300X", 163.4, 1307.4, 5300.0),
    // Apple's press release of the M2 (10 GPU cores). It has no matrix units.
    peaks("Apple M2", 3.6, 0.0, 100.0),
];

impl Peaks {
    /// The peaks of an adapter, if they are known.
    pub fn of(adapter: &str) -> Option<Self> {
        // "M2" must not match an M2 Pro.
        let known = |peaks: &&Peaks| {
            adapter.split_once(peaks.name).is_some_and(|(_, rest)| !peaks.name.starts_with("Apple") || rest.is_empty())
        };
        KNOWN.iter().find(known).copied()
    }

    /// The peaks of a precision of f32: split numbers take three products of halves each.
    pub fn in_precision(self, precision: Precision) -> Self {
        match (precision, self.half) {
            (Precision::Split, Some(half)) => Peaks { f32: half / 3.0, ..self },
            _ => self,
        }
    }

    /// TFLOP/s with operands of a type.
    pub fn tflops(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F32 => self.f32,
            _ => self.half.unwrap_or(self.f32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_name() {
        assert_eq!(Peaks::of("NVIDIA H200").unwrap().tflops(DType::F16), 989.0);
        assert_eq!(Peaks::of("NVIDIA H100 PCIe").unwrap().tflops(DType::F32), 51.0);
        assert_eq!(Peaks::of("NVIDIA H100 80GB HBM3").unwrap().bandwidth, 3350.0);
        assert_eq!(Peaks::of("Apple M2").unwrap().tflops(DType::Bf16), 3.6);
        let split = |name| Peaks::of(name).unwrap().in_precision(Precision::Split).tflops(DType::F32);
        assert_eq!([split("NVIDIA H200"), split("Apple M2")], [989.0 / 3.0, 3.6]);
        assert_eq!(Peaks::of("Apple M2 Max"), None);
        assert_eq!(Peaks::of("llvmpipe (LLVM 15.0.6, 256 bits)"), None);
    }
}
