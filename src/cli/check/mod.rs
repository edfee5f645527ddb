//! `sink-attention check`: a device against the f64 definition, over a grid of shapes and options.

mod grid;
mod measure;
mod report;

use std::error::Error;
use std::io::{IsTerminal as _, Write as _};
use std::time::Instant;

use clap::Args;

use self::grid::{Case, grid};
use self::measure::{Operator, Outcome, measure};
use self::report::Report;
use super::{DeviceArgs, print_summary};

/// Check the results of this device against the definition in f64
///
/// What to run first on a new machine. Computes a few hundred small problems: sizes around the edges of tiles, many
/// widths, every option, extreme numbers. Prints the worst errors of each group of cases, and exits with 1 if one of
/// them is larger than accepted. The error of o is ||o - expected|| / ||expected||, that of lse the worst
/// |lse - expected| / (1 + |expected|).
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    device: DeviceArgs,

    /// Fewer sizes and widths in each group
    #[arg(long)]
    quick: bool,

    /// Seed of the random operands
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Only the group of this name, or the cases with this text in their description, to repeat a failure
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Print the report as a JSON object
    #[arg(long)]
    json: bool,
}

impl Check {
    /// Computes, compares, reports; an error where a case fails.
    pub fn execute(self) -> Result<(), Box<dyn Error>> {
        self.device.check()?;
        let cases = self.cases()?;
        let attention = self.device.open()?;
        let start = Instant::now();
        let outcomes = run(&cases, self.seed, &|problem, inputs| attention.forward(problem, inputs));
        let report = Report::new(&attention, self.seed, start.elapsed(), &cases, &outcomes);
        print_summary(&report, self.json)?;
        Ok(report.verdict()?)
    }

    /// The cases asked for; never none, since nothing checked must not look like a success.
    fn cases(&self) -> Result<Vec<Case>, Box<dyn Error>> {
        let mut cases = grid(self.quick);
        if let Some(text) = &self.only {
            // A whole description names one case, though it may be the beginning of another.
            let whole = |case: &Case| case.to_string() == *text || case.group == text;
            let exact = cases.iter().any(whole);
            cases.retain(|case| if exact { whole(case) } else { case.to_string().contains(text) });
            if cases.is_empty() {
                return Err(format!("no case matches {text:?}").into());
            }
        }
        Ok(cases)
    }
}

/// Measures every case, and says on a terminal how far it is.
fn run(cases: &[Case], seed: u64, operator: &Operator<'_>) -> Vec<Outcome> {
    let mut stderr = std::io::stderr();
    let terminal = stderr.is_terminal();
    // A terminal that is gone must not stop the check.
    let mut progress = |text: &str| {
        if terminal {
            let _ = write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush());
        }
    };
    let outcomes = cases.iter().enumerate().map(|(i, case)| {
        progress(&format!("{:>3} of {} {}", i + 1, cases.len(), case.group));
        measure(case, seed, operator)
    });
    let outcomes = outcomes.collect();
    progress("");
    outcomes
}

/// A check that cannot fail proves nothing: operators with one mistake each.
#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use sink_attention::cpu::reference;
    use sink_attention::{Attention, Error, Inputs, Options, Output, Problem, Result, SinkLogits, Window};

    use super::*;

    fn right(problem: &Problem, inputs: &Inputs<'_>) -> Result<Output> {
        let Output { o, lse } = reference::forward(problem, inputs)?;
        let round = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect();
        Ok(Output { o: round(o), lse: round(lse) })
    }

    /// Computes with other options than asked for.
    fn with(change: impl Fn(Options) -> Options) -> impl Fn(&Problem, &Inputs<'_>) -> Result<Output> {
        move |problem, inputs| {
            let options = change(*problem.options());
            let per_head = options.sink_logits == SinkLogits::PerHead;
            let inputs = Inputs { sink_logits: inputs.sink_logits.filter(|_| per_head), ..*inputs };
            right(&Problem::new(*problem.shape(), options)?, &inputs)
        }
    }

    /// The groups in which the operator fails.
    fn failing(operator: &Operator<'_>) -> BTreeSet<&'static str> {
        let cases = grid(true);
        let outcomes = run(&cases, 0, operator);
        cases
            .iter()
            .zip(outcomes)
            .filter(|(_, outcome)| outcome.failure.is_some())
            .map(|(case, _)| case.group)
            .collect()
    }

    #[track_caller]
    fn fails_in(operator: &Operator<'_>, groups: &[&str]) {
        let failing = failing(operator);
        assert!(groups.iter().all(|group| failing.contains(group)), "{groups:?} should fail, but only {failing:?} do");
    }

    fn all_groups() -> BTreeSet<&'static str> {
        grid(true).iter().map(|case| case.group).collect()
    }

    #[test]
    fn the_definition_passes() {
        assert_eq!(failing(&right), BTreeSet::new());
    }

    #[test]
    fn a_value_that_is_a_little_off_fails() {
        let off = |problem: &Problem, inputs: &Inputs<'_>| {
            let mut output = right(problem, inputs)?;
            *output.o.last_mut().unwrap() += 0.01;
            Ok(output)
        };
        assert_eq!(failing(&off), all_groups());
        let off = |problem: &Problem, inputs: &Inputs<'_>| {
            let mut output = right(problem, inputs)?;
            // The first row: it sees no poisoned key in at least one case of each group.
            output.lse[0] = if output.lse[0].is_finite() { output.lse[0] * 1.0001 + 0.0001 } else { -1e38 };
            Ok(output)
        };
        assert_eq!(failing(&off), all_groups());
    }

    #[test]
    fn a_nan_that_leaks_fails() {
        let leaking = |problem: &Problem, inputs: &Inputs<'_>| {
            let mut output = right(problem, inputs)?;
            if inputs.v.iter().any(|x| !x.is_finite()) {
                // What a kernel gives that multiplies hidden values by a probability of zero.
                output.o.iter_mut().for_each(|o| *o += 0.0 * f32::NAN);
            }
            Ok(output)
        };
        assert_eq!(failing(&leaking), BTreeSet::from(["NaN in hidden keys"]));
    }

    #[test]
    fn an_option_that_is_ignored_fails() {
        fails_in(&with(|o| o.causal(false)), &["sizes", "widths", "alignment", "long sequences"]);
        fails_in(&with(|o| o.window(Window::FULL)), &["windows", "sink tokens", "empty rows", "long sequences"]);
        fails_in(&with(|o| o.sink_tokens(0)), &["sink tokens", "long sequences"]);
        fails_in(&with(|o| o.alignment(Default::default())), &["alignment"]);
        fails_in(
            &with(|mut o| {
                o.query_offset = None;
                o
            }),
            &["alignment", "empty rows"],
        );
        fails_in(
            &with(|mut o| {
                o.scale = None;
                o
            }),
            &["scale"],
        );
        fails_in(&with(|o| o.layout(Default::default())), &["heads, batch, layout"]);
        let sinks = ["sink logits", "extreme sink logits", "off by one", "empty rows"];
        fails_in(&with(|o| o.sink_logits(SinkLogits::None)), &sinks);
    }

    #[test]
    fn the_wrong_head_fails() {
        let wrong = |problem: &Problem, inputs: &Inputs<'_>| {
            let reversed = inputs.sink_logits.map(|sinks| sinks.iter().rev().copied().collect::<Vec<_>>());
            right(problem, &Inputs { sink_logits: reversed.as_deref(), ..*inputs })
        };
        fails_in(&wrong, &["sink logits", "extreme sink logits", "empty rows", "heads, batch, layout"]);
    }

    #[test]
    fn a_failure_reaches_the_report_and_the_verdict() {
        let cases = grid(true);
        let report = |operator: &Operator<'_>| {
            let outcomes = run(&cases, 0, operator);
            Report::new(&Attention::cpu(), 0, Duration::ZERO, &cases, &outcomes)
        };
        let good = report(&right);
        assert_eq!(good.verdict(), Ok(()));
        assert!(good.to_string().ends_with("all passed") && !good.to_string().contains("FAILED"), "{good}");

        let bad = report(&with(|o| o.sink_tokens(0)));
        assert!(bad.verdict().unwrap_err().contains("please report"));
        let text = bad.to_string();
        let row = text.lines().find(|line| line.starts_with("sink tokens ")).unwrap();
        assert!(row.ends_with("FAILED") && text.contains("FAILED in sink tokens: B=1 H=2"), "{text}");
        let json = serde_json::to_value(&bad).unwrap();
        assert_eq!(json["failures"].as_array().unwrap().len() as u64, json["failed"].as_u64().unwrap());
        assert!(json["worst"][0]["error"].as_f64().unwrap() > 1e-3);
    }

    #[test]
    fn errors_and_wrong_lengths_fail() {
        assert_eq!(failing(&|_, _| Err(Error::NoAdapter)), all_groups());
        assert_eq!(failing(&|_, _| Ok(Output { o: vec![], lse: vec![] })), all_groups());
        let outcome = measure(&grid(true)[0], 0, &|_, _| Err(Error::NoAdapter));
        assert_eq!(outcome.failure, Some(Error::NoAdapter.to_string()));
    }
}
