//! The fit: a student that learns from a teacher's outputs.

use std::f32::consts::PI;

use sink_attention::{Output, Result, Upstream};

use crate::adam::Adam;
use crate::layer::{Layer, Weights};

/// Of the first step; it falls to zero along half a cosine.
const RATE: f32 = 0.05;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    pub steps: usize,
    /// Whether the teacher shows lse besides o.
    pub with_lse: bool,
}

/// What is known of a step.
pub struct Step {
    /// On the step's batch, before the step.
    pub loss: f64,
    /// The student's, before the step.
    pub sink_logits: Vec<f32>,
}

/// Fits `student` to a `teacher` of which no more is known than what it makes of a batch.
pub fn run(
    layer: &Layer<'_>,
    mut student: Weights,
    settings: &Settings,
    mut next_batch: impl FnMut() -> Vec<f32>,
    teacher: impl Fn(&[f32]) -> Result<Output>,
    mut on_step: impl FnMut(Step),
) -> Result<Weights> {
    let mut adam = Adam::new(Weights::zeros(&layer.problem, layer.embedding));
    for step in 0..settings.steps {
        let x = next_batch();
        let pass = layer.forward(&student, &x)?;
        let loss = Loss::new(&pass.output, &teacher(&x)?, settings.with_lse);
        on_step(Step { loss: loss.value, sink_logits: student.sink_logits.clone() });

        let gradient = layer.backward(&student, &x, &pass, &loss.upstream())?;
        let done = step as f32 / settings.steps as f32;
        adam.step(&mut student, &gradient, RATE * 0.5 * (1.0 + (PI * done).cos()));
    }
    Ok(student)
}

/// The squared distance of a row of o, and if wanted of its lse, from the teacher's: the mean over rows and heads.
pub struct Loss {
    pub value: f64,
    d_o: Vec<f32>,
    d_lse: Option<Vec<f32>>,
}

impl Loss {
    pub fn new(student: &Output, teacher: &Output, with_lse: bool) -> Self {
        let rows = student.lse.len();
        let (of_o, d_o) = squared_distance(&student.o, &teacher.o, rows);
        let (of_lse, d_lse) = match with_lse.then(|| squared_distance(&student.lse, &teacher.lse, rows)) {
            Some((value, gradient)) => (value, Some(gradient)),
            None => (0.0, None),
        };
        Loss { value: of_o + of_lse, d_o, d_lse }
    }

    /// Its gradient.
    pub fn upstream(&self) -> Upstream<'_> {
        Upstream::new(&self.d_o).d_lse(self.d_lse.as_deref())
    }
}

/// The sum of (a - b)^2 divided by `rows`, and its gradient by a.
fn squared_distance(a: &[f32], b: &[f32], rows: usize) -> (f64, Vec<f32>) {
    let differences = || a.iter().zip(b).map(|(a, b)| a - b);
    let value = differences().map(|d| f64::from(d) * f64::from(d)).sum::<f64>() / rows as f64;
    (value, differences().map(|d| 2.0 * d / rows as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use sink_attention::{Attention, DeviceChoice, Options, Problem, Shape, SinkLogits, Window};

    use crate::gpu;

    const EMBEDDING: usize = 3;

    fn tiny() -> Problem {
        let shape = Shape { batch: 2, heads: 4, kv_heads: 2, seq_q: 5, seq_k: 5, head_dim: 2, value_dim: 2 };
        let options = Options::new().causal(true).window(Window::keys(3)).sink_logits(SinkLogits::PerHead);
        Problem::new(shape, options).unwrap()
    }

    /// The CPU, and the GPU where there is one.
    fn devices() -> impl Iterator<Item = Attention> {
        let choices = [Some(DeviceChoice::Cpu), gpu::choice()].into_iter().flatten();
        choices.map(|choice| Attention::open(&choice).unwrap())
    }

    #[test]
    fn gradients_are_finite_differences() {
        devices().for_each(|attention| check_gradients(&attention));
    }

    fn check_gradients(attention: &Attention) {
        const STEP: f32 = 0.02;
        let problem = tiny();
        let layer = Layer { attention, problem: problem.clone(), embedding: EMBEDDING };
        let mut rng = StdRng::seed_from_u64(1);
        let x: Vec<f32> = (0..2 * 5 * EMBEDDING).map(|_| rng.random_range(-2.0..2.0)).collect();
        let mut student = Weights::random(&problem, EMBEDDING, &mut rng);
        student.sink_logits = vec![0.5, -1.0, 2.0, 0.0];
        let target = layer.forward(&Weights::random(&problem, EMBEDDING, &mut rng), &x).unwrap().output;

        for with_lse in [true, false] {
            let pass = layer.forward(&student, &x).unwrap();
            let loss = Loss::new(&pass.output, &target, with_lse);
            let gradient = layer.backward(&student, &x, &pass, &loss.upstream()).unwrap();
            for (tensor, gradient) in gradient.tensors().into_iter().enumerate() {
                let (mut error, mut norm) = (0.0, 0.0);
                for (i, &g) in gradient.iter().enumerate() {
                    let loss_beside = |step: f32| {
                        let mut moved = student.clone();
                        moved.tensors_mut()[tensor][i] += step;
                        Loss::new(&layer.forward(&moved, &x).unwrap().output, &target, with_lse).value
                    };
                    let expected = (loss_beside(STEP) - loss_beside(-STEP)) / f64::from(2.0 * STEP);
                    error += (f64::from(g) - expected).powi(2);
                    norm += expected.powi(2);
                }
                let relative = (error / norm).sqrt();
                assert!(relative < 1e-3, "weight {tensor}, with lse {with_lse}: off by {relative:.1e}");
            }
        }
    }

    #[test]
    fn a_student_that_knows_all_stays() {
        devices().for_each(|attention| check_student(&attention));
    }

    fn check_student(attention: &Attention) {
        let problem = tiny();
        let layer = Layer { attention, problem: problem.clone(), embedding: EMBEDDING };
        let weights = Weights::random(&problem, EMBEDDING, &mut StdRng::seed_from_u64(1));
        let settings = Settings { steps: 3, with_lse: true };
        let student = run(
            &layer,
            weights.clone(),
            &settings,
            || vec![1.0; 2 * 5 * EMBEDDING],
            |x| Ok(layer.forward(&weights, x)?.output),
            |step| assert_eq!(step.loss, 0.0),
        );
        assert_eq!(student.unwrap(), weights);
    }
}
