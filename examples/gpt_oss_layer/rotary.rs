//! Rotary embeddings of rows on the host.

/// Rotates rows of `[tokens, heads, dim]` from position 0 on; feature i pairs with i + dim / 2.
pub fn rotate(x: &mut [f32], heads: usize, dim: usize, table: &[f32]) {
    for (token, turn) in x.chunks_exact_mut(heads * dim).zip(table.chunks_exact(dim)) {
        let (cosines, sines) = turn.split_at(dim / 2);
        for head in token.chunks_exact_mut(dim) {
            let (low, high) = head.split_at_mut(dim / 2);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}
