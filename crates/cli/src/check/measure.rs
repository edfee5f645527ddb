//! One case, computed by the operator and by the definition, and compared.

use std::ops::Range;

use sink_attention::cpu::reference::{self, Magnitudes};
use sink_attention::plan::Pass;
use sink_attention::testing::compare;
use sink_attention::{Attention, DType, Element, Gradients, Inputs, Output, Problem, Result, Upstream};

use super::grid::{Case, Operands, place};
use sink_attention::testing::hidden;

/// The subject of the check in an element type: a device, or in tests an operator with a mistake.
pub trait Operator<T: Element> {
    fn forward(&self, problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>>;

    fn backward(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
    ) -> Result<Gradients<T>>;

    /// How the forward pass rounds probabilities, as kernels on cooperative matrices do. Then delta, and the results that depend on it, are
    /// no more precise.
    fn rounds_p(&self, _problem: &Problem) -> RoundsP {
        RoundsP::No
    }
}

/// The type that P and d_s are rounded to before they are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoundsP {
    No,
    ToF16,
    ToBf16,
}

/// The accepted error of a row where P and d_s have the 8 bits of bf16, and so has the result: one P is off by up to 5.1e-3 (bits that are
/// cut off, docs/precision.md), and an element of the result by 3.9e-3. In a row of few elements both may come together.
const ROW_IN_BF16: f64 = 9.1e-3;

impl<T: Element> Operator<T> for Attention {
    fn forward(&self, problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
        Attention::forward(self, problem, inputs)
    }

    fn backward(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
    ) -> Result<Gradients<T>> {
        Attention::backward(self, problem, inputs, saved, upstream)
    }

    fn rounds_p(&self, problem: &Problem) -> RoundsP {
        let Ok(plan) = self.plan_forward(problem) else { return RoundsP::No };
        let any = |rounds: fn(&Pass) -> bool| plan.passes.iter().any(rounds);
        match (any(|pass| pass.variant.multiplies_bf16()), any(|pass| pass.variant.micro_kernel.multiplies_halves())) {
            (true, _) => RoundsP::ToBf16,
            (_, true) => RoundsP::ToF16,
            _ => RoundsP::No,
        }
    }
}

/// The passes of the operator that are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    Forward,
    ForwardAndBackward,
}

impl Passes {
    pub fn name(self) -> &'static str {
        match self {
            Passes::Forward => "forward",
            Passes::ForwardAndBackward => "forward and backward",
        }
    }

    /// The results of these passes.
    pub fn columns(self) -> &'static [Column] {
        match self {
            Passes::Forward => &Column::ALL[..2],
            Passes::ForwardAndBackward => &Column::ALL,
        }
    }
}

/// A result that is compared: a column of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    O,
    Lse,
    DQ,
    DK,
    DV,
    DSink,
    DAlibi,
    DBias,
}

impl Column {
    const ALL: [Column; 8] =
        [Column::O, Column::Lse, Column::DQ, Column::DK, Column::DV, Column::DSink, Column::DAlibi, Column::DBias];

    pub fn name(self) -> &'static str {
        match self {
            Column::O => "o",
            Column::Lse => "lse",
            Column::DQ => "d_q",
            Column::DK => "d_k",
            Column::DV => "d_v",
            Column::DSink => "d_sink",
            Column::DAlibi => "d_alibi",
            Column::DBias => "d_bias",
        }
    }

    /// The largest error accepted with operands of an element type.
    fn bound(self, dtype: DType, rounds_p: RoundsP) -> f64 {
        match self {
            Column::O | Column::DQ | Column::DK | Column::DV => compare::accepted(dtype),
            Column::DSink | Column::DBias if rounds_p != RoundsP::No => compare::accepted(dtype),
            // Distances multiply the error that is left of sums that cancel.
            Column::DAlibi if rounds_p == RoundsP::ToBf16 => 2.0 * ROW_IN_BF16,
            Column::DAlibi if rounds_p == RoundsP::ToF16 && dtype.has_rounding_error() => {
                2.0 * compare::accepted(dtype)
            }
            // These results are f32, whatever the operands are.
            Column::Lse | Column::DSink | Column::DAlibi | Column::DBias => compare::accepted(DType::F32),
        }
    }

    /// This result out of all results, if the problem has it.
    fn of(self, results: &mut Results) -> Option<&mut Vec<f64>> {
        let Results { output, gradients } = results;
        match self {
            Column::O => Some(&mut output.o),
            Column::Lse => Some(&mut output.lse),
            Column::DQ => gradients.as_mut().map(|g| &mut g.d_q),
            Column::DK => gradients.as_mut().map(|g| &mut g.d_k),
            Column::DV => gradients.as_mut().map(|g| &mut g.d_v),
            Column::DSink => gradients.as_mut().and_then(|g| g.d_sink_logits.as_mut()),
            Column::DAlibi => gradients.as_mut().and_then(|g| g.d_alibi_slopes.as_mut()),
            Column::DBias => gradients.as_mut().and_then(|g| g.d_bias.as_mut()),
        }
    }

    /// The sizes of the terms of its elements, for a result that is compared row by row.
    fn magnitudes(self, magnitudes: &Magnitudes) -> Option<&[f64]> {
        match self {
            Column::O => Some(&magnitudes.o),
            Column::DQ => Some(&magnitudes.d_q),
            Column::DK => Some(&magnitudes.d_k),
            Column::DV => Some(&magnitudes.d_v),
            Column::Lse | Column::DSink | Column::DAlibi | Column::DBias => None,
        }
    }

    /// The rows of this result, with the knowledge of each.
    fn rows(self, case: &Case, known: &Knowledge) -> Vec<(Range<usize>, Row)> {
        let shape = case.problem.shape();
        // Knowledge is in the order of batch, head and position. So are rows.
        let all = |rows: Vec<([usize; 3], Range<usize>)>, known: &[Row]| -> Vec<(Range<usize>, Row)> {
            rows.into_iter().map(|(_, row)| row).zip(known.iter().copied()).collect()
        };
        let single = |known: &[Row]| known.iter().enumerate().map(|(n, &kind)| (n..n + 1, kind)).collect();
        match self {
            Column::O => all(case.query_rows(shape.value_dim), &known.queries),
            Column::DQ => all(case.query_rows(shape.head_dim), &known.queries),
            Column::DK => all(case.key_rows(shape.head_dim), &known.keys),
            Column::DV => all(case.key_rows(shape.value_dim), &known.keys),
            // The lse of a row that sees nothing is not zero: it is the sink logit or -inf.
            Column::Lse => {
                let rows = all(case.lse_rows(), &known.queries).into_iter();
                rows.map(|(row, kind)| (row, if kind == Row::Zero { Row::Compared } else { kind })).collect()
            }
            Column::DSink | Column::DAlibi => single(&known.heads),
            Column::DBias => single(&known.bias),
        }
    }
}

/// The knowledge of a row of a result before it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    Compared,
    /// No query sees this key, or this query sees no key: the row is exactly zero.
    Zero,
    /// NaN or infinite operands reach the row legitimately, so there is nothing to compare.
    Poisoned,
}

impl Row {
    /// Adds one more term to a sum.
    fn plus(&mut self, term: Row) {
        if *self != Row::Poisoned && term != Row::Zero {
            *self = term;
        }
    }
}

/// The rows that can be compared.
struct Knowledge {
    /// Rows in the order of batch, head and position.
    queries: Vec<Row>,
    /// Rows in the order of batch, key head and position.
    keys: Vec<Row>,
    /// Gradients that sum over all queries of a head.
    heads: Vec<Row>,
    /// Elements of the bias.
    bias: Vec<Row>,
}

impl Knowledge {
    fn of(case: &Case, operands: &Operands) -> Self {
        let (problem, shape) = (&case.problem, case.problem.shape());
        let bias_shape = problem.bias_shape();
        let mut known = Knowledge {
            queries: vec![Row::Zero; shape.batch * shape.heads * shape.seq_q],
            keys: vec![Row::Zero; shape.batch * shape.kv_heads * shape.seq_k],
            heads: vec![Row::Compared; shape.heads],
            bias: vec![Row::Zero; bias_shape.iter().flatten().product::<usize>() * usize::from(bias_shape.is_some())],
        };
        for view in case.views(operands) {
            let sequence = &view.sequence;
            // Poison in one head must not reach another head.
            let poisoned = |rows: &Range<usize>, row| case.reads_poison(view.head) && rows.contains(&row);
            let query = sequence.q_start + view.i;
            let is_poisoned = poisoned(&case.poisoned_queries, query);
            let reaches = |&j: &usize| poisoned(&case.poisoned_keys, sequence.k_start + j);
            let row = match &view.keys[..] {
                [] => Row::Zero,
                keys if is_poisoned || keys.iter().any(reaches) => Row::Poisoned,
                _ => Row::Compared,
            };
            known.queries[(sequence.entry * shape.heads + view.head) * shape.seq_q + query] = row;
            // The sink's gradient sums the gradient of lse of queries that see nothing, but not of queries beyond their sequence.
            let reaches_sink = case.reads_poison(view.head) && case.poisons_d_lse(query);
            if row == Row::Poisoned || (reaches_sink && view.i < sequence.band.seq_q()) {
                known.heads[view.head] = Row::Poisoned;
            }
            let keys = sequence.entry * shape.kv_heads + view.head / problem.heads_per_kv();
            for &j in &view.keys {
                known.keys[keys * shape.seq_k + sequence.k_start + j].plus(row);
                if let Some(shape) = bias_shape {
                    known.bias[place(shape, view.pair(j))].plus(row);
                }
            }
        }
        known
    }
}

/// The results of both ways, in f64 whatever the element type is, which is exact.
struct Results {
    output: Output<f64, f64>,
    gradients: Option<Gradients<f64, f64>>,
}

/// The expected results, and the sizes of their terms.
struct Expected {
    results: Results,
    magnitudes: Magnitudes,
}

impl Results {
    fn widen<T: Element>(output: &Output<T>, gradients: Option<Gradients<T>>) -> Self {
        Results {
            output: Output::new(wide(&output.o), wide(&output.lse)),
            gradients: gradients.map(|g| {
                Gradients::new(wide(&g.d_q), wide(&g.d_k), wide(&g.d_v))
                    .d_sink_logits(g.d_sink_logits.as_deref().map(wide))
                    .d_alibi_slopes(g.d_alibi_slopes.as_deref().map(wide))
                    .d_bias(g.d_bias.as_deref().map(wide))
            }),
        }
    }
}

fn wide<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

/// The comparison of a result with the expected one.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    pub column: Column,
    /// The largest error accepted.
    pub bound: f64,
    /// The error, if there is a number to give.
    pub error: Option<f64>,
    /// The reason why the case fails by this result, if it does.
    pub failure: Option<String>,
}

/// The outcome of a case: a comparison for each result that the problem has.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub comparisons: Vec<Comparison>,
    /// The reason why the case fails, if it does.
    pub failure: Option<String>,
}

/// Computes a case both ways and compares. Its problem is in this element type.
pub fn measure<T: Element>(case: &Case, seed: u64, passes: Passes, operator: &dyn Operator<T>) -> Outcome {
    let operands = case.operands(seed);
    let known = Knowledge::of(case, &operands);
    let operands = operands.cast::<T>();
    let (problem, upstream) = (&case.problem, operands.upstream());
    let backward = passes == Passes::ForwardAndBackward;
    let compute = |inputs: &Inputs<'_, T>| -> Result<_> {
        let output = operator.forward(problem, inputs)?;
        let twice = || -> Result<_> {
            let backward = || operator.backward(problem, inputs, &output, &upstream);
            Ok([backward()?, backward()?])
        };
        let computed = if backward { twice()?.map(Some) } else { [None, None] };
        Ok(computed.map(|gradients| Results::widen(&output, gradients)))
    };
    let expect = |inputs: &Inputs<'_, T>| -> Result<_> {
        let (output, gradients, magnitudes) =
            reference::with_magnitudes(problem, inputs, backward.then_some(&upstream))?;
        Ok(Expected { results: Results { output, gradients }, magnitudes })
    };
    let rounds_p = operator.rounds_p(problem);
    let bound = |column: Column| column.bound(T::DTYPE, rounds_p);
    let both = operands.with_inputs(problem, |inputs| Ok((compute(inputs)?, expect(inputs)?)));
    match both {
        Ok((actual, expected)) => {
            let mut outcome = compare_all(case, &known, passes, rounds_p, bound, actual, expected);
            if case.hidden && outcome.failure.is_none() {
                outcome.failure = hidden_changes_nothing(case, seed, passes, operator).err();
            }
            outcome
        }
        Err::<_, sink_attention::Error>(error) => {
            // There are no numbers, which must not look like nothing to compare.
            let none = |&column| Comparison { column, bound: bound(column), error: None, failure: None };
            let comparisons = passes.columns().iter().map(none).collect();
            Outcome { comparisons, failure: Some(error.to_string()) }
        }
    }
}

/// Checks the operator against the law of non-interference.
fn hidden_changes_nothing<T: Element>(
    case: &Case,
    seed: u64,
    passes: Passes,
    operator: &dyn Operator<T>,
) -> std::result::Result<(), String> {
    let case = hidden::Case::<T>::random(case.problem.clone(), seed);
    let compute = |case: &hidden::Case<T>| {
        let (problem, inputs) = (&case.problem, &case.inputs());
        let output = operator.forward(problem, inputs)?;
        let backward = || operator.backward(problem, inputs, &output, &case.upstream());
        let gradients = (passes == Passes::ForwardAndBackward).then(backward).transpose()?;
        Ok((output, gradients))
    };
    hidden::law(&case, seed, compute).map(drop)
}

fn compare_all(
    case: &Case,
    known: &Knowledge,
    passes: Passes,
    rounds_p: RoundsP,
    bound: impl Fn(Column) -> f64,
    actual: [Results; 2],
    Expected { results: mut expected, magnitudes }: Expected,
) -> Outcome {
    let [mut actual, mut again] = actual;
    let compared = passes.columns().iter().filter_map(|&column| {
        let expected = column.of(&mut expected)?;
        let bound = bound(column);
        let (Some(actual), Some(again)) = (column.of(&mut actual), column.of(&mut again)) else {
            return Some(Comparison { column, bound, error: None, failure: Some("missing".into()) });
        };
        let rows = column.rows(case, known);
        let same = actual.iter().map(|x| x.to_bits()).eq(again.iter().map(|x| x.to_bits()));
        clear_poisoned(actual, &rows);
        clear_poisoned(expected, &rows);
        let failure = not_zero(actual, &rows);
        if case.integers && rounds_p != RoundsP::No && [Column::DQ, Column::DK].contains(&column) {
            // All terms cancel, except the rounding error of p, so there is no norm. The terms are integers, so the error counts relative
            // to 1.
            actual.iter_mut().chain(expected.iter_mut()).for_each(|x| *x += 1.0);
        }
        let compared = match column {
            Column::Lse => compare::lse(actual, expected, bound),
            _ => compare::tensor(actual, expected, bound),
        };
        let failure = failure.or_else(|| {
            let rows = rows.iter().filter(|(_, kind)| *kind == Row::Compared).map(|(row, _)| row.clone());
            let dtype = case.problem.options().dtype;
            // All weights of a row may be small. Each is as uncertain as the rounding of its score, of the sum of products and of lse: some
            // four half units of five standard deviations.
            let bound = if rounds_p == RoundsP::ToBf16 { ROW_IN_BF16 } else { bound };
            let bound = bound + 20.0 * f64::from(case.logits) * f64::from(f32::EPSILON / 2.0);
            compare::rows(actual, expected, column.magnitudes(&magnitudes)?, rows, dtype, bound)
                .err()
                .map(|mismatch| mismatch.to_string())
        });
        let (error, mismatch) = match compared {
            Ok(error) => (Some(error), None),
            Err(mismatch) => (mismatch.error(), Some(mismatch.to_string())),
        };
        let failure = mismatch
            .or(failure)
            .or_else(|| (!same).then(|| "other bits when computed again from the same inputs".into()));
        Some(Comparison { column, bound, error, failure })
    });
    let comparisons: Vec<Comparison> = compared.collect();
    let named = |c: &Comparison| Some(format!("{}: {}", c.column.name(), c.failure.as_ref()?));
    let failure = comparisons.iter().filter_map(named).reduce(|a, b| format!("{a}; {b}"));
    Outcome { comparisons, failure }
}

/// Sets the rows that cannot be compared to zero.
fn clear_poisoned(tensor: &mut [f64], rows: &[(Range<usize>, Row)]) {
    for (row, _) in rows.iter().filter(|(_, kind)| *kind == Row::Poisoned) {
        // The comparison refuses results of a wrong length.
        tensor.get_mut(row.clone()).into_iter().for_each(|row| row.fill(0.0));
    }
}

/// The first element that must be zero and is not. A norm would accept it among larger ones.
fn not_zero(tensor: &[f64], rows: &[(Range<usize>, Row)]) -> Option<String> {
    let mut zeros = rows.iter().filter(|(_, kind)| *kind == Row::Zero).flat_map(|(row, _)| row.clone());
    let index = zeros.find(|&index| tensor.get(index).is_some_and(|&x| x != 0.0))?;
    Some(format!("element {index} is {}, but nothing visible reaches it, so it must be 0", tensor[index]))
}

#[cfg(test)]
mod tests {
    use super::super::grid::grid;
    use super::*;

    #[test]
    fn every_case_compares_something_of_every_result() {
        for case in grid(false) {
            let known = Knowledge::of(&case, &case.operands(0));
            for column in Column::ALL {
                let rows = column.rows(&case, &known);
                assert!(
                    rows.is_empty() == (column == Column::DBias && case.problem.options().bias.is_none()),
                    "{case}"
                );
                assert!(rows.is_empty() || rows.iter().any(|(_, kind)| *kind != Row::Poisoned), "{case}");
            }
        }
    }

    #[test]
    fn poison_reaches_what_depends_on_it() {
        let cases = grid(false);
        // Knowledge of the first query head, which reads key head 0.
        let known = |group, text: &str| {
            let case = cases.iter().find(|case| case.group == group && case.to_string().contains(text)).unwrap();
            let mut known = Knowledge::of(case, &case.operands(0));
            known.queries.truncate(case.problem.shape().seq_q);
            known.keys.truncate(case.problem.shape().seq_k);
            (known, case.problem.heads_per_kv())
        };
        // Key 100 alone is poisoned, in windows of 17: queries 100 to 116 see it, and with it keys from 84 on.
        let (Knowledge { queries, keys, heads, .. }, group) = known("NaN in hidden keys", "NaN in keys 100..101");
        let poisoned = |rows: &[Row]| (0..rows.len()).filter(|&n| rows[n] == Row::Poisoned).collect::<Vec<_>>();
        assert_eq!(poisoned(&queries), (10..27).collect::<Vec<_>>());
        assert_eq!(poisoned(&keys), (84..117).collect::<Vec<_>>());
        // The other heads are not poisoned.
        assert_eq!(poisoned(&heads), (0..group).collect::<Vec<_>>());
        // No query sees keys before the first window.
        assert!((0..74).all(|j| keys[j] == Row::Zero) && keys[74] == Row::Compared);
        // The window, a mask and a bias hide these keys from all queries.
        for keys in ["NaN in keys 0..74", "mask=2x2x113x203", "bias=2x1x1x65"] {
            let (Knowledge { queries, keys, heads, .. }, _) = known("NaN in hidden keys", keys);
            assert!([queries, keys, heads].iter().all(|rows| poisoned(rows).is_empty()));
        }
        // Queries that see nothing have gradients of zero whatever they hold, but the sink's sum has their d_lse.
        let (Knowledge { queries, keys, heads, .. }, group) = known("NaN in query rows", "NaN in queries 0..82");
        assert!(poisoned(&queries).is_empty() && poisoned(&keys).is_empty() && queries[81] == Row::Zero);
        assert_eq!(poisoned(&heads), (0..group).collect::<Vec<_>>());
        // Without the sink no result has their d_lse.
        let without =
            |case: &&Case| case.group == "NaN in query rows" && case.poisoned_queries == (0..82) && !case.d_lse;
        let case = cases.iter().find(without).unwrap();
        assert!(poisoned(&Knowledge::of(case, &case.operands(0)).heads).is_empty());
        // No result has the d_lse of queries beyond the end of their sequence.
        let (Knowledge { queries, keys, heads, .. }, _) = known("NaN in query rows", "NaN in queries 80..113");
        assert!([queries, keys, heads].iter().all(|rows| poisoned(rows).is_empty()));
    }
}
