//! How much of the teacher the student has found.

use std::fmt;

use sink_attention::Problem;

use crate::layer::Weights;

/// A student's weights beside its teacher's.
pub struct Recovery {
    heads: Vec<Head>,
    /// ||W_v - true W_v|| / ||true W_v||
    pub values: f64,
}

struct Head {
    true_sink: f32,
    sink: f32,
    /// ||W_q W_k^T - true W_q W_k^T|| / ||true W_q W_k^T||. W_q and W_k themselves cannot be found: W_q A and
    /// W_k (A^-1)^T give the same scores, whatever A.
    scores: f64,
}

impl Recovery {
    pub fn new(problem: &Problem, embedding: usize, student: &Weights, teacher: &Weights) -> Self {
        let head = |h| Head {
            true_sink: teacher.sink_logits[h],
            sink: student.sink_logits[h],
            scores: relative_error(
                &score_matrix(problem, embedding, student, h),
                &score_matrix(problem, embedding, teacher, h),
            ),
        };
        let wide = |w: &[f32]| w.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        Recovery {
            heads: (0..problem.shape().heads).map(head).collect(),
            values: relative_error(&wide(&student.w_v), &wide(&teacher.w_v)),
        }
    }

    /// Whether every sink logit is within `bound` of the true one; not so for NaN.
    pub fn within(&self, bound: f32) -> bool {
        self.heads.iter().all(|head| (head.sink - head.true_sink).abs() <= bound)
    }
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Head  true sink logit  recovered  difference  W_q W_k^T is off by")?;
        for (h, &Head { true_sink, sink, scores }) in self.heads.iter().enumerate() {
            let difference = sink - true_sink;
            writeln!(f, "{h:4}  {true_sink:15.4}  {sink:9.4}  {difference:+10.4}  {:18.2}%", 100.0 * scores)?;
        }
        Ok(())
    }
}

/// W_q W_k^T of a query head, `[embedding, embedding]`: what makes scores of embeddings.
fn score_matrix(problem: &Problem, embedding: usize, weights: &Weights, head: usize) -> Vec<f64> {
    let width = problem.shape().head_dim;
    // Rows of one head's columns.
    let rows = |w, head| -> Vec<&[f32]> {
        <[f32]>::chunks_exact(w, w.len() / embedding).map(|row| &row[head * width..][..width]).collect()
    };
    let (w_q, w_k) = (rows(&weights.w_q, head), rows(&weights.w_k, head / problem.heads_per_kv()));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    w_q.iter().flat_map(|q| w_k.iter().map(|k| dot(q, k))).collect()
}

fn relative_error(actual: &[f64], expected: &[f64]) -> f64 {
    let difference: f64 = actual.iter().zip(expected).map(|(a, e)| (a - e) * (a - e)).sum();
    (difference / expected.iter().map(|e| e * e).sum::<f64>()).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use sink_attention::{Options, Shape};

    #[test]
    fn sees_errors_and_only_errors() {
        const EMBEDDING: usize = 3;
        let shape = Shape { batch: 1, heads: 2, kv_heads: 1, seq_q: 1, seq_k: 1, head_dim: 2, value_dim: 2 };
        let problem = Problem::new(shape, Options::new()).unwrap();
        let teacher = Weights::random(&problem, EMBEDDING, &mut StdRng::seed_from_u64(1));
        let compare = |student: &Weights| Recovery::new(&problem, EMBEDDING, student, &teacher);

        // Other projections with the same scores.
        let mut student = teacher.clone();
        student.w_q.iter_mut().for_each(|w| *w *= 4.0);
        student.w_k.iter_mut().for_each(|w| *w /= 4.0);
        let same = compare(&student);
        assert!(same.heads.iter().all(|head| head.scores == 0.0) && same.values == 0.0 && same.within(0.0));

        // A feature of the second query head; the sink logit of the first one.
        student.w_q[3] += 4.0;
        student.sink_logits[0] = 0.5;
        let other = compare(&student);
        assert!(other.heads[0].scores == 0.0 && other.heads[1].scores > 0.1);
        assert!(other.within(0.5) && !other.within(0.4));
        student.sink_logits[1] = f32::NAN;
        assert!(!compare(&student).within(f32::INFINITY));
    }
}
