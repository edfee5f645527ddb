//! The backward pass: what flows in, and the check of the gradients against the definition.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use sink_attention::cpu::reference;
use sink_attention::{Attention, Gradients, Output, Problem, Upstream};

use super::operands::{BOUND, Operands};

/// Operands of the forward pass with the gradients that flow into its results.
#[derive(Debug, Clone)]
pub struct Backward {
    pub operands: Operands,
    pub d_o: Vec<f32>,
    pub d_lse: Option<Vec<f32>>,
}

impl Backward {
    /// Numbers of unit variance; every third seed has no d_lse.
    pub fn random(problem: &Problem, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0xd0);
        let half_width = 3f32.sqrt();
        let mut vector = |len: usize| (0..len).map(|_| rng.random_range(-half_width..half_width)).collect::<Vec<_>>();
        Backward {
            operands: Operands::random(problem, seed),
            d_o: vector(problem.o_shape().iter().product()),
            d_lse: (!seed.is_multiple_of(3)).then(|| vector(problem.lse_shape().iter().product())),
        }
    }

    pub fn upstream(&self) -> Upstream<'_> {
        Upstream { d_o: &self.d_o, d_lse: self.d_lse.as_deref() }
    }

    /// A path's gradients after its own forward pass.
    pub fn run(&self, attention: &Attention, problem: &Problem) -> Gradients {
        let saved = attention.forward(problem, &self.operands.inputs()).unwrap();
        self.run_with(attention, problem, &saved)
    }

    /// A path's gradients from the results of some other forward pass.
    pub fn run_with(&self, attention: &Attention, problem: &Problem, saved: &Output) -> Gradients {
        attention.backward(problem, &self.operands.inputs(), saved, &self.upstream()).unwrap()
    }

    /// The definition's gradients.
    pub fn expected(&self, problem: &Problem) -> Gradients<f64, f64> {
        reference::backward(problem, &self.operands.inputs(), &self.upstream()).unwrap()
    }

    /// The definition's results of the forward pass, rounded once.
    pub fn saved(&self, problem: &Problem) -> Output {
        let Output { o, lse } = reference::forward(problem, &self.operands.inputs()).unwrap();
        let round = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        Output { o: round(o), lse: round(lse) }
    }

    /// Holds a path's gradients against the definition.
    pub fn check(&self, attention: &Attention, problem: &Problem) -> Gradients {
        self.check_within(BOUND, attention, problem)
    }

    /// As [`check`](Self::check), with a bound for problems that amplify the rounding of f32.
    pub fn check_within(&self, bound: f64, attention: &Attention, problem: &Problem) -> Gradients {
        let actual = self.run(attention, problem);
        self.agree_within(bound, &actual, &self.expected(problem)).unwrap_or_else(|error| panic!("{problem}: {error}"));
        actual
    }

    /// Holds two gradients of the same inflow against each other.
    pub fn agree<N: Copy + Into<f64>>(&self, actual: &Gradients, expected: &Gradients<N, N>) -> Result<(), String> {
        self.agree_within(BOUND, actual, expected)
    }

    /// The error of each gradient relative to its norm. Where terms cancel and little of a gradient is left, as
    /// of d_q with one key and a sink far below it, to a hundredth of the norm of what flows in.
    fn agree_within<N: Copy + Into<f64>>(
        &self,
        bound: f64,
        actual: &Gradients,
        expected: &Gradients<N, N>,
    ) -> Result<(), String> {
        let inflow = norm(&self.d_o).hypot(norm(self.d_lse.as_deref().unwrap_or_default()));
        let compare = |name: &str, actual: &[f32], expected: &[_]| {
            if actual.len() != expected.len() {
                return Some(format!("{name} has {} elements, expected {}", actual.len(), expected.len()));
            }
            let differences: Vec<f64> =
                actual.iter().zip(expected).map(|(&a, &e): (_, &_)| f64::from(a) - Into::<f64>::into(e)).collect();
            let (error, norm) = (norm(&differences), norm(expected));
            // So written that NaN is a difference.
            let close = error <= bound * norm.max(0.01 * inflow);
            (!close).then(|| format!("{name} is off by {:.2e} (norm {norm:.2e} of {inflow:.2e})", error / norm))
        };
        let failures: Vec<String> = [
            compare("d_q", &actual.d_q, &expected.d_q),
            compare("d_k", &actual.d_k, &expected.d_k),
            compare("d_v", &actual.d_v, &expected.d_v),
            match (&actual.d_sink_logits, &expected.d_sink_logits) {
                (Some(actual), Some(expected)) => compare("d_sink_logits", actual, expected),
                (None, None) => None,
                (actual, _) => Some(format!("d_sink_logits is {actual:?}")),
            },
        ]
        .into_iter()
        .flatten()
        .collect();
        if failures.is_empty() { Ok(()) } else { Err(failures.join(", ")) }
    }
}

fn norm<T: Copy + Into<f64>>(x: &[T]) -> f64 {
    x.iter().map(|&x| x.into().powi(2)).sum::<f64>().sqrt()
}
