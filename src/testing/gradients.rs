//! The backward pass: what flows in, and the check of the gradients against the definition.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::compare::accepted;
use super::operands::{BOUND, Operands, rows_agree, score_rounding};
use super::random::Random;
use crate::cpu::reference;
use crate::{Attention, Element, Gradients, Output, Problem, Upstream};

/// Operands of the forward pass with the gradients that flow into its results.
#[derive(Debug, Clone)]
pub struct Backward<T = f32> {
    pub operands: Operands<T>,
    pub d_o: Vec<T>,
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

    /// With [`Operands::scattered`].
    pub fn scattered(problem: &Problem, seed: u64, d_lse: bool) -> Self {
        let mut random = Random::new(seed, "scattered gradients");
        let mut vector = |shape: &[usize]| random.units(shape.iter().product());
        Backward {
            operands: Operands::scattered(problem, seed),
            d_o: vector(&problem.o_shape()),
            d_lse: d_lse.then(|| vector(&problem.lse_shape())),
        }
    }

    /// Rounded to an element type.
    pub fn cast<T: Element>(self) -> Backward<T> {
        Backward { operands: self.operands.cast(), d_o: T::narrow(self.d_o), d_lse: self.d_lse }
    }
}

impl<T: Element> Backward<T> {
    pub fn upstream(&self) -> Upstream<'_, T> {
        Upstream { d_o: &self.d_o, d_lse: self.d_lse.as_deref() }
    }

    /// A path's gradients after its own forward pass.
    pub fn run(&self, attention: &Attention, problem: &Problem) -> Gradients<T> {
        let saved = attention.forward(problem, &self.operands.inputs()).unwrap();
        self.run_with(attention, problem, &saved)
    }

    /// A path's gradients from the results of some other forward pass.
    pub fn run_with(&self, attention: &Attention, problem: &Problem, saved: &Output<T>) -> Gradients<T> {
        attention.backward(problem, &self.operands.inputs(), saved, &self.upstream()).unwrap()
    }

    /// The definition's gradients.
    pub fn expected(&self, problem: &Problem) -> Gradients<f64, f64> {
        reference::backward(problem, &self.operands.inputs(), &self.upstream()).unwrap()
    }

    /// The definition's results of the forward pass, rounded once.
    pub fn saved(&self, problem: &Problem) -> Output<T> {
        let Output { o, lse, .. } = reference::forward(problem, &self.operands.inputs()).unwrap();
        let round = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        Output { o: T::narrow(round(o)), o_lo: None, lse: round(lse) }
    }

    /// Holds a path's gradients against the definition.
    pub fn check(&self, attention: &Attention, problem: &Problem) -> Gradients<T> {
        self.check_within(accepted(T::DTYPE), attention, problem)
    }

    /// As [`check`](Self::check), with a bound for problems that amplify the rounding of f32.
    pub fn check_within(&self, bound: f64, attention: &Attention, problem: &Problem) -> Gradients<T> {
        let actual = self.run(attention, problem);
        let expected = self.rows_agree(bound, problem, &actual);
        self.agree_within(bound, &actual, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
        actual
    }

    /// Holds each row of d_q, d_k and d_v against the definition, relative to its terms. Returns the definition's gradients.
    pub fn rows_agree(&self, bound: f64, problem: &Problem, actual: &Gradients<T>) -> Gradients<f64, f64> {
        let inputs = self.operands.inputs();
        let (_, expected, magnitudes) = reference::with_magnitudes(problem, &inputs, Some(&self.upstream())).unwrap();
        let expected = expected.unwrap();
        let (d, e) = (problem.shape().head_dim, problem.shape().value_dim);
        let bound = bound + score_rounding(problem, &self.operands);
        rows_agree(problem, "d_q", &actual.d_q, &expected.d_q, &magnitudes.d_q, d, bound);
        rows_agree(problem, "d_k", &actual.d_k, &expected.d_k, &magnitudes.d_k, d, bound);
        rows_agree(problem, "d_v", &actual.d_v, &expected.d_v, &magnitudes.d_v, e, bound);
        expected
    }

    /// Holds two gradients of the same inflow against each other.
    pub fn agree<N: Copy + Into<f64>, S: Copy + Into<f64>>(
        &self,
        actual: &Gradients<T>,
        expected: &Gradients<N, S>,
    ) -> Result<(), String> {
        self.agree_within(accepted(T::DTYPE), actual, expected)
    }

    /// The error of each gradient relative to its norm. Where terms cancel and little of a gradient is left, as
    /// of d_q with one key and a sink far below it, to a hundredth of the norm of what flows in.
    fn agree_within<N: Copy + Into<f64>, S: Copy + Into<f64>>(
        &self,
        bound: f64,
        actual: &Gradients<T>,
        expected: &Gradients<N, S>,
    ) -> Result<(), String> {
        // NaN in what flows into rows that see nothing flows no further.
        let finite = |x: &[f64]| norm(&x.iter().copied().filter(|x| x.is_finite()).collect::<Vec<_>>());
        let d_o: Vec<f64> = self.d_o.iter().map(|&x| x.into()).collect();
        let d_lse: Vec<f64> = self.d_lse.iter().flatten().map(|&x| x.into()).collect();
        let inflow = finite(&d_o).hypot(finite(&d_lse));
        let d_sink = match (&actual.d_sink_logits, &expected.d_sink_logits) {
            (Some(actual), Some(expected)) => {
                // As precise as f32 whatever the operands are.
                let bound = bound / accepted(T::DTYPE) * BOUND;
                off("d_sink_logits", actual, expected, inflow, bound)
            }
            (None, None) => None,
            (actual, _) => Some(format!("d_sink_logits is {actual:?}")),
        };
        let failures: Vec<String> = [
            off("d_q", &actual.d_q, &expected.d_q, inflow, bound),
            off("d_k", &actual.d_k, &expected.d_k, inflow, bound),
            off("d_v", &actual.d_v, &expected.d_v, inflow, bound),
            d_sink,
            // Distances multiply what rounding leaves of terms that cancel.
            off_optional("d_alibi_slopes", &actual.d_alibi_slopes, &expected.d_alibi_slopes, inflow, bound.max(1e-4)),
            off_optional("d_bias", &actual.d_bias, &expected.d_bias, inflow, bound),
        ]
        .into_iter()
        .flatten()
        .collect();
        if failures.is_empty() { Ok(()) } else { Err(failures.join(", ")) }
    }
}

/// As [`off`], of a gradient that both have or neither has.
fn off_optional(
    name: &str,
    actual: &Option<Vec<f32>>,
    expected: &Option<Vec<impl Copy + Into<f64>>>,
    inflow: f64,
    bound: f64,
) -> Option<String> {
    match (actual, expected) {
        (Some(actual), Some(expected)) => off(name, actual, expected, inflow, bound),
        (None, None) => None,
        _ => Some(format!("{name} is there: {}", actual.is_some())),
    }
}

/// What is wrong with a gradient, if anything is.
fn off(
    name: &str,
    actual: &[impl Copy + Into<f64>],
    expected: &[impl Copy + Into<f64>],
    inflow: f64,
    bound: f64,
) -> Option<String> {
    if actual.len() != expected.len() {
        return Some(format!("{name} has {} elements, expected {}", actual.len(), expected.len()));
    }
    let differences: Vec<f64> = actual.iter().zip(expected).map(|(&a, &e)| a.into() - e.into()).collect();
    let (error, norm) = (norm(&differences), norm(expected));
    // So written that NaN is a difference.
    let close = error <= bound * norm.max(0.01 * inflow);
    (!close).then(|| format!("{name} is off by {:.2e} (norm {norm:.2e} of {inflow:.2e})", error / norm))
}

fn norm<T: Copy + Into<f64>>(x: &[T]) -> f64 {
    x.iter().map(|&x| x.into().powi(2)).sum::<f64>().sqrt()
}
