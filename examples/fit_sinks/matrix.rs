//! The two matrix products of a projection, row-major.

/// `x * w` for `x` of `[rows, inner]` and `w` of `[inner, columns]`.
pub fn product(x: &[f32], w: &[f32], inner: usize) -> Vec<f32> {
    let columns = w.len() / inner;
    let mut y = vec![0.0; x.len() / inner * columns];
    for (x, y) in x.chunks_exact(inner).zip(y.chunks_exact_mut(columns)) {
        for (&x, w) in x.iter().zip(w.chunks_exact(columns)) {
            add_scaled(y, x, w);
        }
    }
    y
}

/// `x^T * d_y`, the gradient by `w` of [`product`]: `x` is `[rows, inner]`, `d_y` `[rows, columns]`.
pub fn transposed_product(x: &[f32], d_y: &[f32], inner: usize) -> Vec<f32> {
    let columns = d_y.len() / (x.len() / inner);
    let mut d_w = vec![0.0; inner * columns];
    for (x, d_y) in x.chunks_exact(inner).zip(d_y.chunks_exact(columns)) {
        for (&x, d_w) in x.iter().zip(d_w.chunks_exact_mut(columns)) {
            add_scaled(d_w, x, d_y);
        }
    }
    d_w
}

fn add_scaled(sum: &mut [f32], factor: f32, terms: &[f32]) {
    for (sum, term) in sum.iter_mut().zip(terms) {
        *sum += factor * term;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let x = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(product(&x, &[5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 2), [21.0, 24.0, 27.0, 47.0, 54.0, 61.0]);
        assert_eq!(transposed_product(&x, &[1.0, 0.0, 0.0, 0.0, 1.0, 1.0], 2), [1.0, 3.0, 3.0, 2.0, 4.0, 4.0]);
    }
}
