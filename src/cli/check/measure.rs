//! One case: computed by the operator and by the definition, and compared.

use std::ops::Range;

use sink_attention::compare;
use sink_attention::cpu::reference;
use sink_attention::{Attention, DType, Element, Gradients, Inputs, Output, Problem, Result, Upstream};

use super::grid::Case;

/// What is checked, in an element type: a device, or in tests an operator with a mistake.
pub trait Operator<T: Element> {
    fn forward(&self, problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>>;

    fn backward(
        &self,
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        saved: &Output<T>,
        upstream: &Upstream<'_, T>,
    ) -> Result<Gradients<T>>;
}

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
}

/// How much of the operator is checked.
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

    /// What these passes compute.
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
}

impl Column {
    const ALL: [Column; 6] = [Column::O, Column::Lse, Column::DQ, Column::DK, Column::DV, Column::DSink];

    pub fn name(self) -> &'static str {
        match self {
            Column::O => "o",
            Column::Lse => "lse",
            Column::DQ => "d_q",
            Column::DK => "d_k",
            Column::DV => "d_v",
            Column::DSink => "d_sink",
        }
    }

    /// The largest error accepted with operands of an element type.
    pub fn bound(self, dtype: DType) -> f64 {
        compare::accepted(match self {
            Column::O | Column::DQ | Column::DK | Column::DV => dtype,
            // f32 whatever the operands are.
            Column::Lse | Column::DSink => DType::F32,
        })
    }

    /// This result out of all of them, if the problem has it.
    fn of(self, results: &mut Results) -> Option<&mut Vec<f64>> {
        let Results { output, gradients } = results;
        match self {
            Column::O => Some(&mut output.o),
            Column::Lse => Some(&mut output.lse),
            Column::DQ => gradients.as_mut().map(|g| &mut g.d_q),
            Column::DK => gradients.as_mut().map(|g| &mut g.d_k),
            Column::DV => gradients.as_mut().map(|g| &mut g.d_v),
            Column::DSink => gradients.as_mut().and_then(|g| g.d_sink_logits.as_mut()),
        }
    }

    /// The rows of this result, and what is known of them.
    fn rows(self, case: &Case, known: &Knowledge) -> Vec<(Range<usize>, Row)> {
        let shape = case.problem.shape();
        let query = |([_, h, i], row): ([usize; 3], _)| (row, known.queries[i].in_head(case.reads_poison(h)));
        let key = |([_, g, j], row): ([usize; 3], _)| (row, known.keys[j].in_head(g == 0));
        match self {
            Column::O => case.query_rows(shape.value_dim).into_iter().map(query).collect(),
            Column::DQ => case.query_rows(shape.head_dim).into_iter().map(query).collect(),
            Column::DK => case.key_rows(shape.head_dim).into_iter().map(key).collect(),
            Column::DV => case.key_rows(shape.value_dim).into_iter().map(key).collect(),
            // The lse of a row that sees nothing is no zero, but the sink logit or -inf.
            Column::Lse => {
                let rows = case.lse_rows().into_iter().map(query);
                rows.map(|(row, kind)| (row, if kind == Row::Zero { Row::Compared } else { kind })).collect()
            }
            Column::DSink => (0..shape.heads).map(|h| (h..h + 1, known.sinks.in_head(case.reads_poison(h)))).collect(),
        }
    }
}

/// What is known of a row of a result before it is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    Compared,
    /// No query sees this key, or this query sees no key: not nearly zero, but zero.
    Zero,
    /// NaN or infinite operands reach it by right, so that there is nothing to compare.
    Poisoned,
}

impl Row {
    /// Poison in one head must not reach another.
    fn in_head(self, poisoned: bool) -> Row {
        if self == Row::Poisoned && !poisoned { Row::Compared } else { self }
    }
}

/// Which rows can be compared, in a head with poison.
struct Knowledge {
    queries: Vec<Row>,
    keys: Vec<Row>,
    sinks: Row,
}

impl Knowledge {
    fn of(case: &Case) -> Self {
        let mask = case.problem.sequence(0).band;
        let overlap = |a: &Range<usize>, b: &Range<usize>| a.start.max(b.start) < a.end.min(b.end);
        let query = |i| {
            let seen = mask.visible_keys(i);
            if seen.iter().all(Range::is_empty) {
                Row::Zero
            } else if case.poisoned_queries.contains(&i) || seen.iter().any(|keys| overlap(keys, &case.poisoned_keys)) {
                Row::Poisoned
            } else {
                Row::Compared
            }
        };
        let queries: Vec<Row> = (0..case.problem.shape().seq_q).map(query).collect();
        // A gradient of a key sums over the queries that see it, one of a sink logit over all queries.
        let mut keys = vec![Row::Zero; case.problem.shape().seq_k];
        for (i, &query) in queries.iter().enumerate() {
            for seen in mask.visible_keys(i) {
                for key in keys[seen].iter_mut().filter(|key| **key != Row::Poisoned) {
                    *key = query;
                }
            }
        }
        let poisoned = queries.contains(&Row::Poisoned) || !case.poisoned_queries.is_empty();
        Knowledge { queries, keys, sinks: if poisoned { Row::Poisoned } else { Row::Compared } }
    }
}

/// What both ways compute, in f64 whatever the element type, which is exact.
struct Results {
    output: Output<f64, f64>,
    gradients: Option<Gradients<f64, f64>>,
}

impl Results {
    fn widen<T: Element>(output: &Output<T>, gradients: Option<Gradients<T>>) -> Self {
        Results {
            output: Output { o: wide(&output.o), o_rest: None, lse: wide(&output.lse) },
            gradients: gradients.map(|g| Gradients {
                d_q: wide(&g.d_q),
                d_k: wide(&g.d_k),
                d_v: wide(&g.d_v),
                d_sink_logits: g.d_sink_logits.as_deref().map(wide),
                d_alibi_slopes: g.d_alibi_slopes.as_deref().map(wide),
                d_bias: g.d_bias.as_deref().map(wide),
            }),
        }
    }
}

fn wide<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

/// How a result compares with what is expected.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    pub column: Column,
    /// The error, where there is a number to give.
    pub error: Option<f64>,
    /// Why the case fails by this result, if it does.
    pub failure: Option<String>,
}

/// What came of a case: a comparison for each result that the problem has.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub comparisons: Vec<Comparison>,
    /// Why the case fails, if it does.
    pub failure: Option<String>,
}

/// Computes a case, whose problem is in this element type, both ways and compares.
pub fn measure<T: Element>(case: &Case, seed: u64, passes: Passes, operator: &dyn Operator<T>) -> Outcome {
    let operands = case.operands(seed).cast::<T>();
    let (problem, inputs, upstream) = (&case.problem, operands.inputs(), operands.upstream());
    let backward = passes == Passes::ForwardAndBackward;
    let compute = || -> Result<_> {
        let output = operator.forward(problem, &inputs)?;
        let twice = || -> Result<_> {
            let backward = || operator.backward(problem, &inputs, &output, &upstream);
            Ok([backward()?, backward()?])
        };
        let computed = if backward { twice()?.map(Some) } else { [None, None] };
        Ok(computed.map(|gradients| Results::widen(&output, gradients)))
    };
    let expect = || -> Result<_> {
        Ok(Results {
            output: reference::forward(problem, &inputs)?,
            gradients: backward.then(|| reference::backward(problem, &inputs, &upstream)).transpose()?,
        })
    };
    let (actual, expected) = match compute().and_then(|actual| Ok((actual, expect()?))) {
        Ok(both) => both,
        Err(error) => {
            // No numbers, which must not look like nothing to compare.
            let none = |&column| Comparison { column, error: None, failure: None };
            let comparisons = passes.columns().iter().map(none).collect();
            return Outcome { comparisons, failure: Some(error.to_string()) };
        }
    };
    compare_all(case, passes, actual, expected)
}

fn compare_all(case: &Case, passes: Passes, actual: [Results; 2], mut expected: Results) -> Outcome {
    let [mut actual, mut again] = actual;
    let known = Knowledge::of(case);
    let dtype = case.problem.options().dtype;
    let compared = passes.columns().iter().filter_map(|&column| {
        let expected = column.of(&mut expected)?;
        let (Some(actual), Some(again)) = (column.of(&mut actual), column.of(&mut again)) else {
            return Some(Comparison { column, error: None, failure: Some("missing".into()) });
        };
        let rows = column.rows(case, &known);
        let same = actual.iter().map(|x| x.to_bits()).eq(again.iter().map(|x| x.to_bits()));
        clear_poisoned(actual, &rows);
        clear_poisoned(expected, &rows);
        let compared = match column {
            Column::Lse => compare::lse(actual, expected, column.bound(dtype)),
            _ => compare::tensor(actual, expected, column.bound(dtype)),
        };
        let (error, failure) = match compared {
            Ok(error) => (Some(error), None),
            Err(mismatch) => (mismatch.error(), Some(mismatch.to_string())),
        };
        let failure = failure
            .or_else(|| not_zero(actual, &rows))
            .or_else(|| (!same).then(|| "other bits when computed again from the same inputs".into()));
        Some(Comparison { column, error, failure })
    });
    let comparisons: Vec<Comparison> = compared.collect();
    let named = |c: &Comparison| Some(format!("{}: {}", c.column.name(), c.failure.as_ref()?));
    let failure = comparisons.iter().filter_map(named).reduce(|a, b| format!("{a}; {b}"));
    Outcome { comparisons, failure }
}

/// Sets the rows that cannot be compared to zero.
fn clear_poisoned(tensor: &mut [f64], rows: &[(Range<usize>, Row)]) {
    for (row, _) in rows.iter().filter(|(_, kind)| *kind == Row::Poisoned) {
        // Results of a wrong length are for the comparison to refuse.
        tensor.get_mut(row.clone()).into_iter().for_each(|row| row.fill(0.0));
    }
}

/// The first element that must be zero and is not; a norm would accept it among larger ones.
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
            let known = Knowledge::of(&case);
            for column in Column::ALL {
                assert!(column.rows(&case, &known).iter().any(|(_, kind)| *kind != Row::Poisoned), "{case}");
            }
        }
    }

    #[test]
    fn poison_reaches_what_depends_on_it() {
        let cases = grid(false);
        let known = |group, text: &str| {
            let case = cases.iter().find(|case| case.group == group && case.to_string().contains(text)).unwrap();
            Knowledge::of(case)
        };
        // Key 100 alone, in windows of 17: queries at 100 to 116 see it, and keys from 84 on with it.
        let Knowledge { queries, keys, sinks } = known("NaN in hidden keys", "NaN in keys 100..101");
        let poisoned = |rows: &[Row]| (0..rows.len()).filter(|&n| rows[n] == Row::Poisoned).collect::<Vec<_>>();
        assert_eq!(poisoned(&queries), (10..27).collect::<Vec<_>>());
        assert_eq!(poisoned(&keys), (84..117).collect::<Vec<_>>());
        assert_eq!(sinks, Row::Poisoned);
        // Nobody sees keys before the first window.
        assert!((0..74).all(|j| keys[j] == Row::Zero) && keys[74] == Row::Compared);
        // Hidden from all.
        let Knowledge { queries, keys, sinks } = known("NaN in hidden keys", "NaN in keys 0..74");
        assert!(poisoned(&queries).is_empty() && poisoned(&keys).is_empty() && sinks == Row::Compared);
        // Queries that see nothing have gradients of zero whatever they hold, but the sink's sum has their d_o.
        let Knowledge { queries, keys, sinks } = known("NaN in query rows", "NaN in queries 0..82");
        assert!(poisoned(&queries).is_empty() && poisoned(&keys).is_empty() && queries[81] == Row::Zero);
        assert_eq!(sinks, Row::Poisoned);
    }
}
