//! Pieces of a text as embeddings.

use rand::RngExt;
use rand::rngs::StdRng;

const MOBY_DICK: &[u8] = include_bytes!("../data/moby-dick.txt");

/// Width of an embedding. No more than there are frequent letters: what no letter of a piece shows of the teacher's
/// projections, the student cannot learn from it.
pub const EMBEDDING: usize = 16;

/// The text, and a random embedding for each of the 256 bytes, which teacher and student share.
pub struct Text {
    table: Vec<f32>,
}

impl Text {
    pub fn new(rng: &mut StdRng) -> Self {
        let bound = 3f32.sqrt();
        Text { table: (0..256 * EMBEDDING).map(|_| rng.random_range(-bound..bound)).collect() }
    }

    /// Random pieces of the text, `[pieces, length, EMBEDDING]`.
    pub fn batch(&self, pieces: usize, length: usize, rng: &mut StdRng) -> Vec<f32> {
        let mut x = Vec::with_capacity(pieces * length * EMBEDDING);
        for _ in 0..pieces {
            let start = rng.random_range(0..=MOBY_DICK.len() - length);
            for &byte in &MOBY_DICK[start..start + length] {
                x.extend_from_slice(&self.table[usize::from(byte) * EMBEDDING..][..EMBEDDING]);
            }
        }
        x
    }
}
