//! The backward pass: its inflow, and the check of the gradients against the definition.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::compare::accepted;
use super::operands::{BOUND, Operands, rows_agree, score_rounding};
use super::random::Random;
use crate::cpu::reference;
use crate::{Attention, Element, Gradients, Output, Problem, Upstream};

/// Operands of the forward pass, and the gradients that flow into its results.
#[derive(Debug, Clone)]
pub struct Backward<T = f32> {
    pub operands: Operands<T>,
    pub d_o: Vec<T>,
    pub d_lse: Option<Vec<f32>>,
}

impl Backward {
    /// Numbers of unit variance. Every third seed has no d_lse.
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

    /// The same with [`Operands::scattered`].
    pub fn scattered(problem: &Problem, seed: u64, d_lse: bool) -> Self {
        let mut random = Random::new(seed, "scattered gradients");
        let mut vector = |shape: &[usize]| random.units(shape.iter().product());
        Backward {
            operands: Operands::scattered(problem, seed),
            d_o: vector(&problem.o_shape()),
            d_lse: d_lse.then(|| vector(&problem.lse_shape())),
        }
    }

    /// The operands, rounded to an element type.
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

    /// A path's gradients from the results of another forward pass.
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

    /// Compares a path's gradients with the definition.
    pub fn check(&self, attention: &Attention, problem: &Problem) -> Gradients<T> {
        self.check_within(accepted(T::DTYPE), attention, problem)
    }

    /// Like [`check`](Self::check), with a bound for problems that amplify the rounding of f32.
    pub fn check_within(&self, bound: f64, attention: &Attention, problem: &Problem) -> Gradients<T> {
        let actual = self.run(attention, problem);
        let expected = self.rows_agree(bound, problem, &actual);
        self.agree_within(bound, &actual, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
        actual
    }

    /// Compares each row of d_q, d_k and d_v with the definition, relative to its terms. Returns the definition's gradients.
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

    /// Compares two gradients of the same inflow.
    pub fn agree<N: Copy + Into<f64>, S: Copy + Into<f64>>(
        &self,
        actual: &Gradients<T>,
        expected: &Gradients<N, S>,
    ) -> Result<(), String> {
        self.agree_within(accepted(T::DTYPE), actual, expected)
    }

    /// Compares the error of each gradient relative to its norm. If terms cancel and little of a gradient is left, as of d_q with one key
    /// and a sink far below it, the norm is at least a hundredth of the norm of the inflow.
    fn agree_within<N: Copy + Into<f64>, S: Copy + Into<f64>>(
        &self,
        bound: f64,
        actual: &Gradients<T>,
        expected: &Gradients<N, S>,
    ) -> Result<(), String> {
        // NaN that flows into a row that sees nothing flows no further.
        let finite = |x: &[f64]| norm(&x.iter().copied().filter(|x| x.is_finite()).collect::<Vec<_>>());
        let d_o: Vec<f64> = self.d_o.iter().map(|&x| x.into()).collect();
        let d_lse: Vec<f64> = self.d_lse.iter().flatten().map(|&x| x.into()).collect();
        let inflow = finite(&d_o).hypot(finite(&d_lse));
        let d_sink = match (&actual.d_sink_logits, &expected.d_sink_logits) {
            (Some(actual), Some(expected)) => {
                // The gradient is as precise as f32, whatever the operands are.
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
            // Distances multiply the rounding error that is left of terms that cancel.
            off_optional("d_alibi_slopes", &actual.d_alibi_slopes, &expected.d_alibi_slopes, inflow, bound.max(1e-4)),
            off_optional("d_bias", &actual.d_bias, &expected.d_bias, inflow, bound),
        ]
        .into_iter()
        .flatten()
        .collect();
        if failures.is_empty() { Ok(()) } else { Err(failures.join(", ")) }
    }
}

/// Like [`off`], for a gradient that both results have, or neither.
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

/// The mistake in a gradient, if there is one.
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
    // The comparison is written so that NaN is a difference.
    let close = error <= bound * norm.max(0.01 * inflow);
    (!close).then(|| format!("{name} is off by {:.2e} (norm {norm:.2e} of {inflow:.2e})", error / norm))
}

fn norm<T: Copy + Into<f64>>(x: &[T]) -> f64 {
    x.iter().map(|&x| x.into().powi(2)).sum::<f64>().sqrt()
}
