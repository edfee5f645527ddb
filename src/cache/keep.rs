//! The tokens that are kept of several continuations, on the CPU.

use super::cpu::{KvCache, scales_of};
use crate::problem::element::Element;
use crate::problem::error::Result;

impl<T: Element> KvCache<T> {
    /// As [`KvCache::keep`](crate::cache::KvCache::keep).
    ///
    /// # Errors
    /// As there.
    pub fn keep(&mut self, sequence: usize, first: usize, numbers: &[usize]) -> Result<()> {
        self.config.check_keep(numbers)?;
        let (changes, moves) = self.block_table.keep(sequence, first, numbers)?;
        for [from, to] in changes.copies {
            self.copy_block(from as usize, to as usize);
        }
        let (heads, rows) = (self.config.kv_heads, self.config.kind.rows());
        for (places, head) in moves.iter().flat_map(|places| (0..heads).map(move |head| (places, head))) {
            let [from, to] = places.map(|[block, row]| (block * heads + head) * rows + row);
            for (cached, width) in [(&mut self.keys, self.config.head_dim), (&mut self.values, self.config.value_dim)] {
                cached.copy_within(from * width..(from + 1) * width, to * width);
            }
            for (scales, width) in self.scales.iter_mut().zip([self.config.head_dim, self.config.value_dim]) {
                let len = if scales.is_empty() { 0 } else { scales_of(width) };
                scales.copy_within(from * len..(from + 1) * len, to * len);
            }
        }
        Ok(())
    }
}
