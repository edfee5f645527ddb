//! Gradient descent with Adam (Kingma and Ba, 2015).

use crate::layer::Weights;

const MEAN_DECAY: f32 = 0.9;
/// Less than the usual 0.999: gradients shrink fast here, and their squares should not be remembered for a whole fit.
const SQUARE_DECAY: f32 = 0.99;
const EPSILON: f32 = 1e-8;

/// Running means of the gradient and of its square.
pub struct Adam {
    mean: Weights,
    square: Weights,
    steps: i32,
}

impl Adam {
    /// `zeros` only says how many weights there are.
    pub fn new(zeros: Weights) -> Self {
        Adam { mean: zeros.clone(), square: zeros, steps: 0 }
    }

    /// Moves each weight against its gradient, by about `rate`.
    pub fn step(&mut self, weights: &mut Weights, gradient: &Weights, rate: f32) {
        self.steps += 1;
        // The means began at zero: what is missing from their weights.
        let [mean_share, square_share] = [MEAN_DECAY, SQUARE_DECAY].map(|decay| 1.0 - decay.powi(self.steps));
        let state = self.mean.tensors_mut().into_iter().zip(self.square.tensors_mut());
        for ((weights, gradient), (mean, square)) in
            weights.tensors_mut().into_iter().zip(gradient.tensors()).zip(state)
        {
            for (((w, g), mean), square) in weights.iter_mut().zip(gradient).zip(mean).zip(square) {
                *mean += (1.0 - MEAN_DECAY) * (g - *mean);
                *square += (1.0 - SQUARE_DECAY) * (g * g - *square);
                *w -= rate * (*mean / mean_share) / ((*square / square_share).sqrt() + EPSILON);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(x: f32) -> Weights {
        Weights { w_q: vec![x], w_k: vec![-x], w_v: vec![0.0], sink_logits: vec![x; 2] }
    }

    #[test]
    fn by_hand() {
        let (mut adam, mut w) = (Adam::new(weights(0.0)), weights(1.0));
        // The size of the first gradient does not matter, its sign does; where it is zero, nothing moves.
        adam.step(&mut w, &weights(3.0), 0.5);
        assert_eq!(w, Weights { w_q: vec![0.5], w_k: vec![-0.5], w_v: vec![0.0], sink_logits: vec![0.5; 2] });
        // The opposite gradient: a mean of (0.9 * 0.1 - 0.1) / (1 - 0.9^2) of it.
        adam.step(&mut w, &weights(-3.0), 0.5);
        approx::assert_relative_eq!(w.w_q[0], 0.5 + 0.5 * 0.01 / 0.19, max_relative = 1e-5);
        assert_eq!((-w.w_k[0], w.w_v[0], w.sink_logits[1]), (w.w_q[0], 0.0, w.w_q[0]));
    }
}
