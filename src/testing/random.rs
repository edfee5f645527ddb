//! Random numbers that can be repeated.

/// SplitMix64: the same numbers in every version and on every machine, so that a report can be repeated.
pub struct Random(u64);

impl Random {
    /// A stream for a text. It uses FNV-1a, because the hashes of the standard library change between versions.
    pub fn new(seed: u64, text: &str) -> Self {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        Random(text.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, step))
    }

    /// 24 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) >> 40
    }

    /// Evenly distributed, with mean 0 and standard deviation 1.
    pub fn unit(&mut self) -> f32 {
        (2.0 * self.bits() as f32 / (1u64 << 24) as f32 - 1.0) * 3f32.sqrt()
    }

    /// `count` numbers of [`unit`](Self::unit).
    pub fn units(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit()).collect()
    }

    /// `count` numbers in [-1, 1).
    pub fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| 2.0 * self.bits() as f32 / (1u64 << 24) as f32 - 1.0).collect()
    }

    /// A number from 0 to `count` - 1, for a small `count`.
    pub fn below(&mut self, count: u64) -> usize {
        (self.bits() % count) as usize
    }
}
