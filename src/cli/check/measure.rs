//! One case: computed by the operator and by the definition, and compared.

use sink_attention::compare::{self, Mismatch};
use sink_attention::cpu::reference;
use sink_attention::{Inputs, Output, Problem, Result};

use super::grid::Case;

/// What is checked: a device's forward pass, or in tests one with a mistake.
pub type Operator<'a> = dyn Fn(&Problem, &Inputs<'_>) -> Result<Output> + 'a;

/// A result that is compared: a column of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    O,
    Lse,
}

impl Column {
    pub const ALL: [Column; 2] = [Column::O, Column::Lse];

    pub fn name(self) -> &'static str {
        match self {
            Column::O => "o",
            Column::Lse => "lse",
        }
    }

    /// The largest error accepted.
    pub fn bound(self) -> f64 {
        match self {
            Column::O | Column::Lse => 1e-5,
        }
    }

    fn compare(self, actual: &Output, expected: &Output<f64>) -> Result<f64, Mismatch> {
        match self {
            Column::O => compare::tensor(&actual.o, &expected.o, self.bound()),
            Column::Lse => compare::lse(&actual.lse, &expected.lse, self.bound()),
        }
    }
}

/// What came of a case.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The error in each of [`Column::ALL`], where there is a number to give.
    pub errors: [Option<f64>; Column::ALL.len()],
    /// Why the case fails, if it does.
    pub failure: Option<String>,
}

/// Computes a case both ways and compares.
pub fn measure(case: &Case, seed: u64, operator: &Operator<'_>) -> Outcome {
    let operands = case.operands(seed);
    let inputs = operands.inputs();
    let both = operator(&case.problem, &inputs).and_then(|actual| {
        let expected = reference::forward(&case.problem, &inputs)?;
        Ok((without_poisoned_rows(case, actual), without_poisoned_rows(case, expected)))
    });
    let (actual, expected) = match both {
        Ok(both) => both,
        Err(error) => return Outcome { errors: [None; 2], failure: Some(error.to_string()) },
    };
    let compared = Column::ALL.map(|column| (column, column.compare(&actual, &expected)));
    let errors = compared.map(|(_, result)| result.map_or_else(|mismatch| mismatch.error(), Some));
    let failures = compared.iter().filter_map(|(column, result)| {
        let mismatch = result.as_ref().err()?;
        Some(format!("{}: {mismatch}", column.name()))
    });
    let failure = failures.reduce(|a, b| format!("{a}; {b}"));
    Outcome { errors, failure }
}

/// Sets to zero, in the actual results as in the expected ones, the rows that see a poisoned key.
fn without_poisoned_rows<T: Default + Copy>(case: &Case, mut output: Output<T>) -> Output<T> {
    let shape = case.problem.shape();
    let layout = case.problem.options().layout;
    let [batch, head, seq] = layout.strides(shape.heads, shape.seq_q, shape.value_dim).map(|s| s as usize);
    for i in (0..shape.seq_q).filter(|&i| !case.is_compared(i)) {
        for (b, h) in (0..shape.batch).flat_map(|b| (0..shape.heads).map(move |h| (b, h))) {
            let o = b * batch + h * head + i * seq;
            let lse = (b * shape.heads + h) * shape.seq_q + i;
            // Results of a wrong length are for the comparison to refuse.
            output.o.get_mut(o..o + shape.value_dim).into_iter().for_each(|row| row.fill(T::default()));
            output.lse.get_mut(lse).into_iter().for_each(|lse| *lse = T::default());
        }
    }
    output
}
