//! `sink-attention check`: a device against the f64 definition, over a grid of shapes and options.

mod grid;
mod measure;
mod report;

use std::error::Error;
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use sink_attention::half::{bf16, f16};
use sink_attention::plan::{MicroKernel, Precision};
use sink_attention::{Attention, DType, Element};

use self::grid::{Case, grid};
use self::measure::{Operator, Outcome, Passes, measure};
use self::report::Report;
use crate::report_file::ReportFile;
use crate::shared::{DeviceArgs, print_summary};

/// Check the results of this device against the definition in f64
///
/// The first command to run on a new machine. Computes a few hundred small problems: sizes around the edges of tiles, many
/// widths, every option, extreme numbers; forward and backward, in every element type. Prints the worst errors of each
/// group of cases, and exits with 1 if one of them is larger than accepted, if a gradient has other bits when computed
/// again, or if one that nothing visible reaches is not zero. Expected is what the definition makes of the same rounded
/// operands. The error of lse is the worst |lse - expected| / (1 + |expected|), that of all else is
/// ||x - expected|| / ||expected||. Each row of o and of the gradients of q, k and v is held to the same bound by itself,
/// relative to the absolute values of what it is a sum of. The cases of the group "hidden" are also computed with other
/// numbers where no query sees them, which must not change a bit.
#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    device: DeviceArgs,

    /// Element type of q, k, v, o and their gradients
    #[arg(long, value_enum, default_value_t)]
    dtype: Types,

    /// Fewer sizes and widths in each group; of all element types, f16 and bf16 take turns
    #[arg(long)]
    quick: bool,

    /// The forward pass only
    #[arg(long)]
    forward: bool,

    /// Seed of the random operands
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Only the group of this name, or the cases with this text in their description, to repeat a failure
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// Print the report as a JSON object
    #[arg(long)]
    json: bool,

    /// Add the report to this file, with what `devices` says of the device, to be attached to a bug report; `tune --report`
    /// adds to the same file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// The element types to check.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Types {
    F32,
    F16,
    Bf16,
    #[default]
    All,
}

impl Check {
    /// Computes, compares and reports. It is an error if a case fails.
    pub fn execute(self) -> Result<(), Box<dyn Error>> {
        self.device.check()?;
        let mut cases = self.cases()?;
        let attention = self.device.open()?;
        let file = self.report.as_deref().map(|path| ReportFile::open(path, &attention)).transpose()?;
        let on_matrices = [MicroKernel::Cooperative, MicroKernel::Fragments].contains(&self.device.micro_kernel());
        if on_matrices || self.device.precision() == Precision::Split {
            leave_out(&mut cases, &attention)?;
        }
        let start = Instant::now();
        let passes = if self.forward { Passes::Forward } else { Passes::ForwardAndBackward };
        let outcomes: Vec<Outcome> = cases
            .chunk_by(|a, b| dtype(a) == dtype(b))
            .flat_map(|cases| match dtype(&cases[0]) {
                DType::F16 => run::<f16>(cases, self.seed, passes, &attention),
                DType::Bf16 => run::<bf16>(cases, self.seed, passes, &attention),
                _ => run::<f32>(cases, self.seed, passes, &attention),
            })
            .collect();
        let report = Report::new(&attention, self.seed, passes, start.elapsed(), &cases, &outcomes);
        // The reader of what is printed may have left, and the file may be gone: neither keeps the other from being written.
        let written = file.map_or(Ok(()), |mut file| file.write(&report));
        print_summary(&report, self.json)?;
        written?;
        Ok(report.verdict()?)
    }

    /// The cases that the arguments ask for. It is an error if there are none, because a check of nothing must not look like a success.
    fn cases(&self) -> Result<Vec<Case>, Box<dyn Error>> {
        let mut cases = in_types(&grid(self.quick), self.dtype, self.quick);
        if let Some(text) = &self.only {
            // A whole description names one case, even if it is also the beginning of another.
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

/// Leaves out cases without cooperative kernels, and says so. It is an error if none is left, because a check of nothing must not look like
/// a success.
fn leave_out(cases: &mut Vec<Case>, attention: &Attention) -> Result<(), Box<dyn Error>> {
    let all = cases.len();
    let mut reason = None;
    cases.retain(|case| match attention.plan_forward(&case.problem) {
        Err(error @ sink_attention::Error::NoKernel { .. }) => {
            reason = Some(error.to_string());
            false
        }
        // Any other error belongs to the case itself.
        _ => true,
    });
    match (reason, all - cases.len()) {
        (Some(reason), _) if cases.is_empty() => Err(reason.into()),
        (Some(reason), left_out) => {
            eprintln!("{left_out} of {all} cases are left out: {reason}");
            Ok(())
        }
        (None, _) => Ok(()),
    }
}

fn dtype(case: &Case) -> DType {
    case.problem.options().dtype
}

/// The cases in each element type that the arguments ask for, type by type.
fn in_types(cases: &[Case], types: Types, quick: bool) -> Vec<Case> {
    let all = |dtype| cases.iter().map(|case| case.with_dtype(dtype)).collect::<Vec<_>>();
    // A quick check of all types should take no more than twice as long as a check of f32. Types take turns by a rule without a period,
    // because the grid has some periods, and no option may fall to one type alone. The case that takes a software driver longest is left
    // out: it tests numbers of workgroups, which the types share.
    let turn = |turn, dtype| {
        let cases = cases.iter().filter(|case| case.group != "many workgroups");
        let own = cases.enumerate().filter(|(n, _)| n.count_ones() % 2 == turn);
        own.map(|(_, case)| case.with_dtype(dtype)).collect()
    };
    match types {
        Types::F32 => all(DType::F32),
        Types::F16 => all(DType::F16),
        Types::Bf16 => all(DType::Bf16),
        Types::All if quick => [all(DType::F32), turn(0, DType::F16), turn(1, DType::Bf16)].concat(),
        Types::All => [all(DType::F32), all(DType::F16), all(DType::Bf16)].concat(),
    }
}

/// Measures every case, all of one element type, and shows the progress on a terminal.
fn run<T: Element>(cases: &[Case], seed: u64, passes: Passes, operator: &dyn Operator<T>) -> Vec<Outcome> {
    let mut stderr = std::io::stderr();
    let terminal = stderr.is_terminal();
    // A terminal that is gone must not stop the check.
    let mut progress = |text: &str| {
        if terminal {
            let _ = write!(stderr, "\r\x1b[K{text}").and_then(|()| stderr.flush());
        }
    };
    let outcomes = cases.iter().enumerate().map(|(i, case)| {
        progress(&format!("{} {:>3} of {} {}", T::DTYPE, i + 1, cases.len(), case.group));
        measure(case, seed, passes, operator)
    });
    let outcomes = outcomes.collect();
    progress("");
    outcomes
}

/// A check that cannot fail proves nothing. These operators have one mistake each.
#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeSet;
    use std::time::Duration;

    use sink_attention::cpu::reference;
    use sink_attention::testing::compare::accepted;
    use sink_attention::testing::operands::row;
    use sink_attention::{
        Attention, Error, Gradients, Inputs, Options, Output, Problem, Result, SinkLogits, Upstream, Window,
    };

    use super::Passes::{Forward, ForwardAndBackward};
    use super::grid::{rows, with_options};
    use super::measure::RoundsP;
    use super::*;

    fn round<T: Element>(x: Vec<f64>) -> Vec<T> {
        T::narrow(x.into_iter().map(|x| x as f32).collect())
    }

    fn right_forward<T: Element>(problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
        let Output { o, lse, .. } = reference::forward(problem, inputs)?;
        Ok(Output::new(round(o), round(lse)))
    }

    fn right_backward<T: Element>(
        problem: &Problem,
        inputs: &Inputs<'_, T>,
        upstream: &Upstream<'_, T>,
    ) -> Result<Gradients<T>> {
        let exact = reference::backward(problem, inputs, upstream)?;
        let [d_q, d_k, d_v] = [exact.d_q, exact.d_k, exact.d_v].map(round);
        let [d_sink_logits, d_alibi_slopes, d_bias] =
            [exact.d_sink_logits, exact.d_alibi_slopes, exact.d_bias].map(|gradient| gradient.map(round));
        Ok(Gradients::new(d_q, d_k, d_v).d_sink_logits(d_sink_logits).d_alibi_slopes(d_alibi_slopes).d_bias(d_bias))
    }

    /// An operator made of two functions.
    struct Functions<F, B>(F, B);

    impl<T, F, B> Operator<T> for Functions<F, B>
    where
        T: Element,
        F: Fn(&Problem, &Inputs<'_, T>) -> Result<Output<T>>,
        B: Fn(&Problem, &Inputs<'_, T>, &Upstream<'_, T>) -> Result<Gradients<T>>,
    {
        fn forward(&self, problem: &Problem, inputs: &Inputs<'_, T>) -> Result<Output<T>> {
            self.0(problem, inputs)
        }

        fn backward(
            &self,
            problem: &Problem,
            inputs: &Inputs<'_, T>,
            _saved: &Output<T>,
            upstream: &Upstream<'_, T>,
        ) -> Result<Gradients<T>> {
            self.1(problem, inputs, upstream)
        }
    }

    /// The right operator with a mistake in its forward pass.
    fn forward_but(mistake: impl Fn(&Problem, &Inputs<'_>, &mut Output)) -> impl Operator<f32> {
        let forward = move |problem: &Problem, inputs: &Inputs<'_>| {
            let mut output = right_forward(problem, inputs)?;
            mistake(problem, inputs, &mut output);
            Ok(output)
        };
        Functions(forward, right_backward)
    }

    /// The right operator with a mistake in its backward pass.
    fn backward_but(mistake: impl Fn(&Problem, &Inputs<'_>, &mut Gradients)) -> impl Operator<f32> {
        let backward = move |problem: &Problem, inputs: &Inputs<'_>, upstream: &Upstream<'_>| {
            let mut gradients = right_backward(problem, inputs, upstream)?;
            mistake(problem, inputs, &mut gradients);
            Ok(gradients)
        };
        Functions(right_forward, backward)
    }

    /// The problem with other options than the caller's, and the operands that go with them.
    fn changed<'a>(
        problem: &Problem,
        inputs: &Inputs<'a>,
        change: impl Fn(Options) -> Options,
    ) -> Result<(Problem, Inputs<'a>)> {
        let options = change(*problem.options());
        let per_head = options.sink_logits == SinkLogits::PerHead;
        let inputs = (*inputs)
            .sink_logits(inputs.sink_logits.filter(|_| per_head))
            .alibi_slopes(inputs.alibi_slopes.filter(|_| options.alibi))
            .bias(inputs.bias.filter(|_| options.bias.is_some()))
            .mask(inputs.mask.filter(|_| options.mask.is_some()));
        Ok((with_options(problem, options)?, inputs))
    }

    fn forward_with(change: impl Fn(Options) -> Options) -> impl Operator<f32> {
        let forward = move |problem: &Problem, inputs: &Inputs<'_>| {
            let (problem, inputs) = changed(problem, inputs, &change)?;
            right_forward(&problem, &inputs)
        };
        Functions(forward, right_backward)
    }

    fn backward_with(change: impl Fn(Options) -> Options) -> impl Operator<f32> {
        let backward = move |problem: &Problem, inputs: &Inputs<'_>, upstream: &Upstream<'_>| {
            let (problem, inputs) = changed(problem, inputs, &change)?;
            right_backward(&problem, &inputs, upstream)
        };
        Functions(right_forward, backward)
    }

    /// A quick check without the cases that take the definition longest, because every mistake goes through all cases. One case of each
    /// group is left.
    fn cases() -> Vec<Case> {
        let pairs = |case: &Case| {
            let pairs: u64 = case.problem.sequences().map(|sequence| sequence.band.visible_pairs()).sum();
            pairs * case.problem.shape().heads as u64
        };
        let all = grid(true);
        let least = |group: &str| all.iter().filter(|case| case.group == group).map(pairs).min();
        let costly = |case: &&Case| pairs(case) > 60_000 && Some(pairs(case)) > least(case.group);
        all.iter().filter(|case| !costly(case)).cloned().collect()
    }

    /// The groups in which the operator fails.
    fn failing(passes: Passes, operator: &dyn Operator<f32>) -> BTreeSet<&'static str> {
        failing_of(cases(), passes, operator)
    }

    fn failing_of(cases: Vec<Case>, passes: Passes, operator: &dyn Operator<f32>) -> BTreeSet<&'static str> {
        let outcomes = run(&cases, 0, passes, operator);
        cases
            .iter()
            .zip(outcomes)
            .filter(|(_, outcome)| outcome.failure.is_some())
            .map(|(case, _)| case.group)
            .collect()
    }

    #[track_caller]
    fn fails_in(passes: Passes, operator: &dyn Operator<f32>, groups: &[&str]) {
        let cases = cases().into_iter().filter(|case| groups.contains(&case.group)).collect();
        let failing = failing_of(cases, passes, operator);
        assert!(groups.iter().all(|group| failing.contains(group)), "{groups:?} should fail, but only {failing:?} do");
    }

    fn all_groups() -> BTreeSet<&'static str> {
        cases().iter().map(|case| case.group).collect()
    }

    /// The groups with cases whose options match.
    fn groups_with(wanted: impl Fn(&Options) -> bool) -> BTreeSet<&'static str> {
        cases().iter().filter(|case| wanted(case.problem.options())).map(|case| case.group).collect()
    }

    fn groups_with_sink_logits() -> BTreeSet<&'static str> {
        groups_with(|options| options.sink_logits == SinkLogits::PerHead)
    }

    fn groups_with_alibi() -> BTreeSet<&'static str> {
        groups_with(|options| options.alibi)
    }

    fn groups_with_bias() -> BTreeSet<&'static str> {
        groups_with(|options| options.bias.is_some())
    }

    #[test]
    fn the_definition_passes() {
        assert_eq!(failing(ForwardAndBackward, &Functions(right_forward, right_backward)), BTreeSet::new());
    }

    /// Each group of cases in an element type, with the results by which one of its cases fails.
    fn failing_results<T: Element>(operator: &dyn Operator<T>) -> BTreeSet<(&'static str, &'static str)> {
        let cases: Vec<Case> = cases().iter().map(|case| case.with_dtype(T::DTYPE)).collect();
        let outcomes = run(&cases, 0, ForwardAndBackward, operator);
        let results = cases.iter().zip(outcomes).flat_map(|(case, outcome)| {
            assert_eq!(outcome.failure.is_some(), outcome.comparisons.iter().any(|c| c.failure.is_some()));
            let failing = outcome.comparisons.into_iter().filter(|comparison| comparison.failure.is_some());
            failing.map(|comparison| (case.group, comparison.column.name()))
        });
        results.collect()
    }

    /// Mistakes in all results at once. They are as small as the accepted errors allow to detect.
    fn half_precision_is_checked<T: Element>() {
        assert_eq!(failing_results::<T>(&Functions(right_forward, right_backward)), BTreeSet::new());

        // The last element is off by four times the accepted norm.
        let off = |x: &mut [T]| {
            let norm = x.iter().map(|x| x.to_f32().powi(2)).filter(|x| x.is_finite()).sum::<f32>().sqrt();
            let last = x.last_mut().unwrap();
            *last = T::from_f32(last.to_f32() + 4.0 * accepted(T::DTYPE) as f32 * norm + 1e-5);
        };
        // Results that are f32 in every type have the bound of f32: here they are rounded to the operands' type.
        let round = |x: &mut [f32]| x.iter_mut().for_each(|x| *x = T::from_f32(*x).to_f32());
        let forward = |problem: &Problem, inputs: &Inputs<'_, T>| {
            let mut output = right_forward(problem, inputs)?;
            off(&mut output.o);
            round(&mut output.lse);
            Ok(output)
        };
        let backward = |problem: &Problem, inputs: &Inputs<'_, T>, upstream: &Upstream<'_, T>| {
            let mut gradients = right_backward(problem, inputs, upstream)?;
            [&mut gradients.d_q, &mut gradients.d_k, &mut gradients.d_v].into_iter().for_each(|x| off(x));
            let singles = [&mut gradients.d_sink_logits, &mut gradients.d_alibi_slopes, &mut gradients.d_bias];
            singles.into_iter().flatten().for_each(|x| round(x));
            Ok(gradients)
        };
        let failing = failing_results::<T>(&Functions(forward, backward));
        for (column, groups) in [
            ("o", all_groups()),
            ("d_q", all_groups()),
            ("d_k", all_groups()),
            ("d_v", all_groups()),
            ("lse", all_groups()),
            ("d_sink", groups_with_sink_logits()),
            ("d_alibi", groups_with_alibi()),
            ("d_bias", groups_with_bias()),
        ] {
            let mut missing = groups;
            missing.retain(|group| !failing.contains(&(*group, column)));
            // Operands of this group are integers, and so is the lse of a row with one key.
            missing.retain(|group| (*group, column) != ("gradients that cancel", "lse"));
            assert_eq!(missing, BTreeSet::new(), "{column}");
        }
    }

    #[test]
    fn half_precision_is_checked_in_f16() {
        half_precision_is_checked::<f16>();
    }

    #[test]
    fn half_precision_is_checked_in_bf16() {
        half_precision_is_checked::<bf16>();
    }

    #[test]
    fn types_have_every_group_and_a_quick_check_is_at_most_twice_as_long() {
        let cases = grid(true);
        let all = in_types(&cases, Types::All, true);
        assert_eq!(all.len(), 2 * cases.len() - 1);
        assert_eq!(in_types(&cases, Types::All, false).len(), 3 * cases.len());
        let one = in_types(&cases, Types::Bf16, true);
        assert!(one.len() == cases.len() && one.iter().all(|case| dtype(case) == DType::Bf16));
        // Every group has cases in each type after the turns.
        let groups = |wanted| all.iter().filter(|case| dtype(case) == wanted).map(|case| case.group).collect();
        let [single, f16, bf16]: [BTreeSet<&str>; 3] = [DType::F32, DType::F16, DType::Bf16].map(groups);
        assert_eq!(f16, bf16);
        assert_eq!(single.difference(&f16).collect::<Vec<_>>(), [&"many workgroups"]);
    }

    #[test]
    fn a_value_that_is_a_little_off_fails() {
        let off = forward_but(|_, _, output| *output.o.last_mut().unwrap() += 0.01);
        assert_eq!(failing(Forward, &off), all_groups());
        // The first row is wrong. It sees no poisoned key in at least one case of each group.
        let nearly = |lse: f32| if lse.is_finite() { lse * 1.0001 + 0.0001 } else { -1e38 };
        let off = forward_but(|_, _, output| output.lse[0] = nearly(output.lse[0]));
        assert_eq!(failing(Forward, &off), all_groups());
    }

    #[test]
    fn a_gradient_that_is_a_little_off_fails() {
        let off = |gradient: &mut [f32]| {
            let norm = gradient.iter().map(|x| x * x).sum::<f32>().sqrt();
            *gradient.last_mut().unwrap() += 1e-4 * norm + 1e-30;
        };
        assert_eq!(failing(ForwardAndBackward, &backward_but(|_, _, g| off(&mut g.d_q))), all_groups());
        assert_eq!(failing(ForwardAndBackward, &backward_but(|_, _, g| off(&mut g.d_k))), all_groups());
        assert_eq!(failing(ForwardAndBackward, &backward_but(|_, _, g| off(&mut g.d_v))), all_groups());
        let sink = backward_but(|_, _, g| g.d_sink_logits.iter_mut().for_each(|sinks| off(sinks)));
        assert_eq!(failing(ForwardAndBackward, &sink), groups_with_sink_logits());
        let slopes = backward_but(|_, _, g| g.d_alibi_slopes.iter_mut().for_each(|slopes| off(slopes)));
        assert_eq!(failing(ForwardAndBackward, &slopes), groups_with_alibi());
        let bias = backward_but(|_, _, g| g.d_bias.iter_mut().for_each(|bias| off(bias)));
        assert_eq!(failing(ForwardAndBackward, &bias), groups_with_bias());
    }

    #[test]
    fn a_nan_that_leaks_fails() {
        // The error of a kernel that multiplies hidden operands by a probability of zero.
        let leak = |inputs: &Inputs<'_>, result: &mut [f32]| {
            if inputs.k.iter().chain(inputs.v).any(|x| !x.is_finite()) {
                result.iter_mut().for_each(|x| *x += 0.0 * f32::NAN);
            }
        };
        let groups = BTreeSet::from(["NaN in hidden keys", "hidden"]);
        assert_eq!(failing(Forward, &forward_but(|_, inputs, output| leak(inputs, &mut output.o))), groups);
        assert_eq!(failing(ForwardAndBackward, &backward_but(|_, inputs, g| leak(inputs, &mut g.d_q))), groups);
        assert_eq!(failing(ForwardAndBackward, &backward_but(|_, inputs, g| leak(inputs, &mut g.d_k))), groups);
        assert_eq!(failing(ForwardAndBackward, &backward_but(|_, inputs, g| leak(inputs, &mut g.d_v))), groups);
        let sink = backward_but(|_, inputs, g| g.d_sink_logits.iter_mut().for_each(|sinks| leak(inputs, sinks)));
        assert_eq!(failing(ForwardAndBackward, &sink), groups);
    }

    #[test]
    fn a_nan_of_a_query_that_reaches_all_keys_fails() {
        let leaking = |problem: &Problem, inputs: &Inputs<'_>, upstream: &Upstream<'_>| {
            let mut gradients = right_backward(problem, inputs, upstream)?;
            let sum: f32 = inputs.q.iter().chain(upstream.d_o).map(|x| 0.0 * x).sum();
            gradients.d_k.iter_mut().chain(&mut gradients.d_v).for_each(|x| *x += sum);
            Ok(gradients)
        };
        let failing = failing(ForwardAndBackward, &Functions(right_forward, leaking));
        assert_eq!(failing, BTreeSet::from(["NaN in query rows", "hidden"]));
    }

    /// The results of cooperative kernels if weights beyond the range of halves became the largest half instead of infinity. The unit in
    /// d_q comes from the numbers that are known of a row beforehand, and the unit in d_k from the first query.
    fn saturated(problem: &Problem, inputs: &Inputs<'_, f16>, upstream: &Upstream<'_, f16>) -> Result<Gradients<f16>> {
        let (shape, scale) = (problem.shape(), f64::from(problem.scale()));
        assert!(shape.batch == 1 && shape.kv_heads == 1 && shape.head_dim == shape.value_dim);
        let width = shape.head_dim;
        let row = |x: &[f16], n: usize| x[n * width..(n + 1) * width].iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let exponent = |x: f64| x.abs().log2().floor();
        let kept = |weight: f64, unit: f64| (weight * unit).clamp(-65504.0, 65504.0) / unit;
        let output = reference::forward(problem, inputs)?;
        let (mut d_q, mut d_k) = (vec![0.0; inputs.q.len()], vec![0.0; inputs.k.len()]);
        let mut key_units = vec![0.0; shape.seq_k];
        for (h, i) in (0..shape.heads).flat_map(|h| (0..shape.seq_q).map(move |i| (h, i))) {
            let n = i * shape.heads + h;
            let (q, d_o, o) = (row(inputs.q, n), row(upstream.d_o, n), &output.o[n * width..(n + 1) * width]);
            let delta = dot(&d_o, o);
            let d_o_sum: f64 = d_o.iter().map(|x| x.abs()).sum();
            let o_most = o.iter().fold(2f64.powi(-24), |most, x| most.max(x.abs()));
            let unit = (12.0 - (exponent(d_o_sum) + exponent(o_most) + 1.0).max(exponent(delta))).exp2();
            for (j, key_unit) in key_units.iter_mut().enumerate() {
                let (k, v) = (row(inputs.k, j), row(inputs.v, j));
                let p = (scale * dot(&q, &k) - output.lse[h * shape.seq_q + i]).exp();
                let d_s = p * (dot(&d_o, &v) - delta);
                *key_unit = if (h, i) == (0, 0) { (-6.0 - exponent(d_s)).exp2() } else { *key_unit };
                for d in 0..width {
                    d_q[n * width + d] += scale * kept(d_s, unit) * k[d];
                    d_k[j * width + d] += scale * kept(d_s, *key_unit) * q[d];
                }
            }
        }
        Ok((right_backward(problem, inputs, upstream)?).d_q(round(d_q)).d_k(round(d_k)))
    }

    #[test]
    fn weights_that_stop_at_the_largest_half_fail() {
        let all = grid(false);
        let [beyond, within]: [Vec<Case>; 2] = ["beyond halves", "sizes"].map(|group| {
            let usual =
                |case: &&Case| case.group == group && !case.d_lse && !case.integers && !case.problem.options().causal;
            let cases = all.iter().filter(usual);
            cases.map(|case| case.with_dtype(DType::F16)).collect()
        });
        let failed = |cases: &[Case]| {
            let outcomes = run::<f16>(cases, 0, ForwardAndBackward, &Functions(right_forward, saturated));
            outcomes.into_iter().filter(|outcome| outcome.failure.is_some()).count()
        };
        // Each kind of unexpected numbers fails in a gradient of its own.
        assert_eq!(failed(&beyond), beyond.len());
        assert!(beyond.len() == 4 && !within.is_empty());
        // The arithmetic of `saturated` itself does not fail.
        assert_eq!(failed(&within), 0);
    }

    /// A dense computation in f64 whose P and d_s become bf16 on the way into the second products, as on matrices that multiply bf16 as
    /// itself: bits are cut off, and the numbers are larger by 2^-8 ln 2 before. Scores are products.
    struct CutOff;

    impl CutOff {
        fn compute(
            problem: &Problem,
            inputs: &Inputs<'_, bf16>,
            upstream: Option<&Upstream<'_, bf16>>,
        ) -> (Output<bf16>, Gradients<bf16>) {
            let (shape, gain) = (problem.shape(), 1.0 + 2f64.powi(-8) * std::f64::consts::LN_2);
            let cut = |x: f64| f64::from(f32::from_bits((x as f32).to_bits() >> 16 << 16));
            let wide = |x: &[bf16]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let add =
                |to: &mut [f64], factor: f64, x: &[f64]| to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
            let mut o = vec![0.0; problem.o_shape().iter().product()];
            let mut lse = Vec::new();
            let [mut d_q, mut d_k, mut d_v] = [inputs.q, inputs.k, inputs.v].map(|x| vec![0.0; x.len()]);
            let mut d_sink = vec![0.0; shape.heads];
            let band = problem.sequences().next().unwrap().band;
            let all = (0..shape.batch * shape.heads * shape.seq_q).enumerate();
            for (n, [b, h, i]) in all
                .map(|(n, at)| (n, [at / shape.seq_q / shape.heads, at / shape.seq_q % shape.heads, at % shape.seq_q]))
            {
                let query = |width| row(problem, [shape.heads, shape.seq_q, width], [b, h, i]);
                let key =
                    |width, j| row(problem, [shape.kv_heads, shape.seq_k, width], [b, h / problem.heads_per_kv(), j]);
                let q = wide(&inputs.q[query(shape.head_dim)]);
                let score = |j| f64::from(problem.scale()) * dot(&q, &wide(&inputs.k[key(shape.head_dim, j)]));
                let scores: Vec<_> = band.visible_keys(i).into_iter().flatten().map(|j| (j, score(j))).collect();
                let sink = match problem.options().sink_logits {
                    SinkLogits::None => f64::NEG_INFINITY,
                    SinkLogits::OffByOne => 0.0,
                    SinkLogits::PerHead => inputs.sink_logits.unwrap()[h].into(),
                };
                let largest = scores.iter().map(|(_, s)| *s).fold(f64::MIN, f64::max);
                let sum = scores.iter().map(|(_, s)| (s - largest).exp()).sum::<f64>();
                // Neither term may exceed f64.
                let top = if scores.is_empty() { sink } else { (largest + sum.ln()).max(sink) };
                let own = if top == f64::NEG_INFINITY {
                    top
                } else {
                    top + (scores.iter().map(|(_, s)| (s - top).exp()).sum::<f64>() + (sink - top).exp()).ln()
                };
                lse.push(own as f32);
                let place = query(shape.value_dim);
                let weight = (largest - own).exp();
                for (j, s) in &scores {
                    let p = cut((s - largest).exp() * gain) * weight;
                    add(&mut o[place.clone()], p, &wide(&inputs.v[key(shape.value_dim, *j)]));
                }
                let Some(upstream) = upstream else { continue };
                let d_o = wide(&upstream.d_o[place.clone()]);
                let seen = if scores.is_empty() { 0.0 } else { dot(&d_o, &o[place]) };
                let delta = seen - upstream.d_lse.map_or(0.0, |d_lse| d_lse[n].into());
                for (j, s) in scores {
                    let p = (s - own).exp() * gain;
                    let value = key(shape.value_dim, j);
                    let d_s =
                        cut(p * (dot(&d_o, &wide(&inputs.v[value.clone()])) - delta)) * f64::from(problem.scale());
                    add(&mut d_v[value], cut(p), &d_o);
                    add(&mut d_q[query(shape.head_dim)], d_s, &wide(&inputs.k[key(shape.head_dim, j)]));
                    add(&mut d_k[key(shape.head_dim, j)], d_s, &q);
                }
                d_sink[h] -= if own == f64::NEG_INFINITY { 0.0 } else { (sink - own).exp() * delta };
            }
            let per_head = problem.options().sink_logits == SinkLogits::PerHead;
            let gradients = Gradients::new(round(d_q), round(d_k), round(d_v));
            (Output::new(round(o), lse), gradients.d_sink_logits(per_head.then(|| round(d_sink))))
        }
    }

    impl Operator<bf16> for CutOff {
        fn forward(&self, problem: &Problem, inputs: &Inputs<'_, bf16>) -> Result<Output<bf16>> {
            Ok(CutOff::compute(problem, inputs, None).0)
        }

        fn backward(
            &self,
            problem: &Problem,
            inputs: &Inputs<'_, bf16>,
            _saved: &Output<bf16>,
            upstream: &Upstream<'_, bf16>,
        ) -> Result<Gradients<bf16>> {
            Ok(CutOff::compute(problem, inputs, Some(upstream)).1)
        }

        fn rounds_p(&self, _problem: &Problem) -> RoundsP {
            RoundsP::ToBf16
        }
    }

    #[test]
    fn probabilities_that_are_cut_off_to_bf16_pass() {
        let is_plain = |case: &Case| {
            let options = case.problem.options();
            let is_modified =
                options.softcap.is_some() || options.alibi || options.bias.is_some() || options.mask.is_some();
            !is_modified && !case.problem.has_lengths() && !case.hidden
        };
        let cases: Vec<Case> =
            cases().iter().filter(|case| is_plain(case)).map(|case| case.with_dtype(DType::Bf16)).collect();
        assert!(cases.len() > 50, "{}", cases.len());
        let outcomes = run(&cases, 0, ForwardAndBackward, &CutOff);
        let failing: Vec<String> = cases
            .iter()
            .zip(outcomes)
            .filter_map(|(case, outcome)| Some(format!("{}: {case}: {}", case.group, outcome.failure?)))
            .collect();
        assert!(failing.is_empty(), "{failing:#?}");
    }

    #[test]
    fn other_bits_the_second_time_fail() {
        let calls = Cell::new(0u32);
        let racing = backward_but(|_, _, gradients| {
            calls.set(calls.get() + 1);
            let last = gradients.d_k.last_mut().unwrap();
            *last = f32::from_bits(last.to_bits() ^ (calls.get() % 2));
        });
        let outcome = measure(&grid(true)[0], 0, ForwardAndBackward, &racing);
        assert!(outcome.failure.unwrap().starts_with("d_k: other bits"));
    }

    #[test]
    fn nearly_zero_where_nothing_is_visible_fails() {
        let mut case = grid(true).into_iter().find(|case| case.to_string().contains("M=113 N=31")).unwrap();
        case.poisoned_keys = 0..0;
        let first = |result: &mut [f32]| result[0] = 1e-30;
        for (column, operator) in [
            ("o", Box::new(forward_but(|_, _, output| first(&mut output.o))) as Box<dyn Operator<f32>>),
            ("d_q", Box::new(backward_but(|_, _, gradients| first(&mut gradients.d_q)))),
        ] {
            let failure = measure(&case, 0, ForwardAndBackward, &*operator).failure.unwrap();
            assert!(failure.starts_with(&format!("{column}: element 0 is 0.0000")), "{failure}");
        }
    }

    #[test]
    fn an_option_that_is_ignored_fails() {
        #[track_caller]
        fn fails(change: impl Fn(Options) -> Options + Copy, groups: &[&str]) {
            fails_in(Forward, &forward_with(change), groups);
            fails_in(ForwardAndBackward, &backward_with(change), groups);
        }
        fails(|o| o.causal(false), &["sizes", "widths", "alignment"]);
        fails(|o| o.window(Window::FULL), &["windows", "sink tokens", "empty rows", "long sequences"]);
        fails(|o| o.sink_tokens(0), &["sink tokens", "long sequences"]);
        fails(|o| o.alignment(Default::default()), &["alignment"]);
        let no_offset = |mut o: Options| {
            o.query_offset = None;
            o
        };
        fails(no_offset, &["alignment", "empty rows"]);
        let no_scale = |mut o: Options| {
            o.scale = None;
            o
        };
        fails(no_scale, &["scale"]);
        fails(|o| o.layout(Default::default()), &["heads, batch, layout"]);
        let sinks = ["sink logits", "extreme sink logits", "off by one", "empty rows"];
        fails(|o| o.sink_logits(SinkLogits::None), &sinks);
        let no_softcap = |mut o: Options| {
            o.softcap = None;
            o
        };
        fails(no_softcap, &["softcap", "all options", "varlen"]);
        fails(|o| o.alibi(false), &["ALiBi", "all options", "varlen"]);
        let no_bias = |mut o: Options| {
            o.bias = None;
            o
        };
        fails(no_bias, &["bias", "all options", "varlen"]);
        let no_mask = |mut o: Options| {
            o.mask = None;
            o
        };
        fails(no_mask, &["mask", "all options", "varlen", "NaN in hidden keys"]);
    }

    #[test]
    fn the_wrong_head_fails() {
        let reversed = |sinks: Option<&[f32]>| sinks.map(|sinks| sinks.iter().rev().copied().collect::<Vec<_>>());
        let wrong = |problem: &Problem, inputs: &Inputs<'_>| {
            right_forward(problem, &(*inputs).sink_logits(reversed(inputs.sink_logits).as_deref()))
        };
        let groups = ["sink logits", "extreme sink logits", "empty rows", "heads, batch, layout"];
        fails_in(Forward, &Functions(wrong, right_backward), &groups);
        let wrong = backward_but(|_, _, g| g.d_sink_logits.iter_mut().for_each(|sinks| sinks.reverse()));
        assert_eq!(failing(ForwardAndBackward, &wrong), groups_with_sink_logits());
    }

    #[test]
    fn d_k_summed_over_the_wrong_heads_fails() {
        let groups = |wrong: fn(&Case) -> bool| -> BTreeSet<_> {
            cases().iter().filter(|case| wrong(case)).map(|case| case.group).collect()
        };
        // The sum misses the last query head of each group.
        let wrong = |problem: &Problem, inputs: &Inputs<'_>, upstream: &Upstream<'_>| {
            let mut gradients = right_backward(problem, inputs, upstream)?;
            let (shape, layout) = (problem.shape(), problem.options().layout);
            let last =
                |h: usize| problem.heads_per_kv() > 1 && h % problem.heads_per_kv() == problem.heads_per_kv() - 1;
            let (mut d_o, mut d_lse) = (upstream.d_o.to_vec(), upstream.d_lse.map(<[f32]>::to_vec));
            for ([_, h, _], row) in rows(layout, [shape.batch, shape.heads, shape.seq_q, shape.value_dim]) {
                d_o[row].iter_mut().filter(|_| last(h)).for_each(|x| *x = 0.0);
            }
            for (n, x) in d_lse.iter_mut().flatten().enumerate() {
                *x = if last(n / shape.seq_q % shape.heads) { 0.0 } else { *x };
            }
            let upstream = Upstream::new(&d_o).d_lse(d_lse.as_deref());
            gradients.d_k = right_backward(problem, inputs, &upstream)?.d_k;
            Ok(gradients)
        };
        let mut shared = groups(|case| case.problem.heads_per_kv() > 1);
        shared.remove("gradients that cancel");
        assert_eq!(failing(ForwardAndBackward, &Functions(right_forward, wrong)), shared);

        // The sums go to the key heads in reverse order.
        let wrong = backward_but(|problem, _, gradients| {
            let (shape, layout) = (problem.shape(), problem.options().layout);
            let right = gradients.d_k.clone();
            let from = rows(layout, [shape.batch, shape.kv_heads, shape.seq_k, shape.head_dim]);
            for ([b, g, j], row) in &from {
                let to = (b * shape.kv_heads + shape.kv_heads - 1 - g) * shape.seq_k + j;
                gradients.d_k[from[to].1.clone()].copy_from_slice(&right[row.clone()]);
            }
        });
        let mut several = groups(|case| case.problem.shape().kv_heads > 1);
        several.remove("gradients that cancel");
        assert_eq!(failing(ForwardAndBackward, &wrong), several);
    }

    #[test]
    fn mistakes_of_the_formulas_fail() {
        // d_lse is ignored.
        let wrong = |problem: &Problem, inputs: &Inputs<'_>, upstream: &Upstream<'_>| {
            right_backward(problem, inputs, &(*upstream).d_lse(None))
        };
        let with_d_lse = cases().iter().filter(|case| case.d_lse).map(|case| case.group).collect();
        assert_eq!(failing(ForwardAndBackward, &Functions(right_forward, wrong)), with_d_lse);
        assert!(with_d_lse.contains("gradient of lse") && with_d_lse.len() > 10, "{with_d_lse:?}");

        // The sink's gradient has the wrong sign.
        let wrong = backward_but(|_, _, g| g.d_sink_logits.iter_mut().flatten().for_each(|x| *x = -*x));
        assert_eq!(failing(ForwardAndBackward, &wrong), groups_with_sink_logits());

        // d_q lacks the scale. This makes no difference if the scale is 1 or d_q is 0.
        let wrong = backward_but(|problem, _, g| g.d_q.iter_mut().for_each(|x| *x /= problem.scale()));
        let mut groups = all_groups();
        groups.remove("gradients that cancel");
        assert_eq!(failing(ForwardAndBackward, &wrong), groups);
    }

    #[test]
    fn a_failure_reaches_the_report_and_the_verdict() {
        let cases = cases();
        let report = |operator: &dyn Operator<f32>| {
            let outcomes = run(&cases, 0, ForwardAndBackward, operator);
            Report::new(&Attention::cpu(), 0, ForwardAndBackward, Duration::ZERO, &cases, &outcomes)
        };
        let good = report(&Functions(right_forward, right_backward));
        assert_eq!(good.verdict(), Ok(()));
        assert!(good.to_string().ends_with("all passed") && !good.to_string().contains("FAILED"), "{good}");

        let bad = report(&forward_with(|o| o.sink_tokens(0)));
        assert!(bad.verdict().unwrap_err().contains("please report"));
        let text = bad.to_string();
        let row = text.lines().find(|line| line.starts_with("sink tokens ")).unwrap();
        assert!(row.ends_with("FAILED") && text.contains("FAILED in sink tokens: B=1 H=2"), "{text}");
        let json = serde_json::to_value(&bad).unwrap();
        assert_eq!(json["failures"].as_array().unwrap().len() as u64, json["failed"].as_u64().unwrap());
        assert!(json["dtypes"][0]["worst"][0]["error"].as_f64().unwrap() > 1e-3);
    }

    #[test]
    fn errors_and_wrong_lengths_fail() {
        let fails = |_: &Problem, _: &Inputs<'_>| Err(Error::NoAdapter);
        assert_eq!(failing(Forward, &Functions(fails, right_backward)), all_groups());
        let fails = |_: &Problem, _: &Inputs<'_>, _: &Upstream<'_>| Err(Error::NoAdapter);
        assert_eq!(failing(ForwardAndBackward, &Functions(right_forward, fails)), all_groups());
        let outcome = measure(&grid(true)[0], 0, ForwardAndBackward, &Functions(right_forward, fails));
        assert_eq!(outcome.failure, Some(Error::NoAdapter.to_string()));
        assert!(outcome.comparisons.iter().all(|comparison| comparison.error.is_none()));

        let empty = forward_but(|_, _, output| *output = Output::new(vec![], vec![]));
        assert_eq!(failing(Forward, &empty), all_groups());
        let empty = backward_but(|_, _, g| g.d_v.clear());
        assert_eq!(failing(ForwardAndBackward, &empty), all_groups());
        let missing = backward_but(|_, _, g| g.d_sink_logits = None);
        assert_eq!(failing(ForwardAndBackward, &missing), groups_with_sink_logits());
        let missing = backward_but(|_, _, g| g.d_bias = None);
        assert_eq!(failing(ForwardAndBackward, &missing), groups_with_bias());
    }
}
