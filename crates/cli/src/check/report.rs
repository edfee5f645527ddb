//! The findings of a check: a table for people, and an object for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use sink_attention::{Attention, DType};

use super::dtype;
use super::grid::Case;
use super::measure::{Column, Comparison, Outcome, Passes};

/// Most failures that are listed for people. Programs get all of them.
const LISTED: usize = 10;

/// Errors by the name of their column. None if a case gave no number, and absent if there is nothing to compare.
type Errors = BTreeMap<&'static str, Option<f64>>;

/// Everything that a bug report needs.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    pass: &'static str,
    device: Device,
    seed: u64,
    seconds: f64,
    cases: usize,
    failed: usize,
    dtypes: Vec<Type>,
    failures: Vec<Failure>,
    #[serde(skip)]
    columns: &'static [Column],
}

/// The findings in an element type: a table.
#[derive(Debug, Serialize)]
struct Type {
    #[serde(serialize_with = "as_text")]
    dtype: DType,
    cases: usize,
    failed: usize,
    bounds: Errors,
    groups: Vec<Group>,
    /// For each column, the case that is closest to its bound or exceeds it most.
    worst: Vec<Worst>,
}

/// The device that computed.
#[derive(Debug, Serialize)]
struct Device {
    name: String,
    /// The reason for this device.
    reason: String,
    gpu: bool,
    /// Empty if there is no driver, or if it does not say.
    driver: String,
}

/// A row of the table.
#[derive(Debug, Serialize)]
struct Group {
    name: &'static str,
    cases: usize,
    failed: usize,
    /// The worst error of each column.
    errors: Errors,
}

#[derive(Debug, Serialize)]
struct Worst {
    column: &'static str,
    error: f64,
    group: &'static str,
    case: String,
}

#[derive(Debug, Serialize)]
struct Failure {
    group: &'static str,
    case: String,
    message: String,
}

impl Report {
    pub fn new(
        attention: &Attention,
        seed: u64,
        passes: Passes,
        elapsed: Duration,
        cases: &[Case],
        outcomes: &[Outcome],
    ) -> Self {
        let info = attention.device().map(|device| device.wgpu().adapter_info());
        let pairs: Vec<(&Case, &Outcome)> = cases.iter().zip(outcomes).collect();
        let failures: Vec<Failure> = pairs
            .iter()
            .filter_map(|(case, outcome)| {
                let message = outcome.failure.clone()?;
                Some(Failure { group: case.group, case: case.to_string(), message })
            })
            .collect();
        Report {
            version: env!("CARGO_PKG_VERSION"),
            pass: passes.name(),
            device: Device {
                name: attention.device_name(),
                reason: attention.device_reason().to_string(),
                gpu: attention.is_gpu(),
                driver: info
                    .map_or(String::new(), |info| format!("{} {}", info.driver, info.driver_info).trim().into()),
            },
            seed,
            seconds: elapsed.as_secs_f64(),
            cases: cases.len(),
            failed: failures.len(),
            dtypes: pairs.chunk_by(|a, b| dtype(a.0) == dtype(b.0)).map(|pairs| Type::new(passes, pairs)).collect(),
            failures,
            columns: passes.columns(),
        }
    }
}

impl Report {
    /// An error that says what to do about it, if a case failed.
    pub fn verdict(&self) -> Result<(), String> {
        match self.failed {
            0 => Ok(()),
            failed => Err(format!(
                "{failed} of {} cases failed on {}; please report what is above, and what `sink-attention devices` prints, or the file of --report",
                self.cases, self.device.name
            )),
        }
    }
}

impl Type {
    fn new(passes: Passes, pairs: &[(&Case, &Outcome)]) -> Self {
        let dtype = dtype(pairs[0].0);
        Type {
            dtype,
            cases: pairs.len(),
            failed: failed(pairs),
            bounds: passes.columns().iter().filter_map(|&column| bound(column, pairs)).collect(),
            groups: pairs.chunk_by(|a, b| a.0.group == b.0.group).map(Group::new).collect(),
            worst: passes.columns().iter().filter_map(|&column| Worst::new(column, pairs)).collect(),
        }
    }
}

/// The bound of a column, by its name. If kernels on cooperative matrices were checked, it is theirs. None if there is nothing to compare.
fn bound(column: Column, pairs: &[(&Case, &Outcome)]) -> Option<(&'static str, Option<f64>)> {
    let comparisons = pairs.iter().flat_map(|(_, outcome)| &outcome.comparisons);
    let bounds = comparisons.filter(|comparison| comparison.column == column).map(|comparison| comparison.bound);
    bounds.reduce(f64::max).map(|bound| (column.name(), Some(bound)))
}

fn failed(pairs: &[(&Case, &Outcome)]) -> usize {
    pairs.iter().filter(|(_, outcome)| outcome.failure.is_some()).count()
}

fn as_text<S: serde::Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(dtype)
}

impl Group {
    fn new(pairs: &[(&Case, &Outcome)]) -> Self {
        let mut errors = Errors::new();
        for &Comparison { column, error, .. } in pairs.iter().flat_map(|(_, outcome)| &outcome.comparisons) {
            let worst = errors.entry(column.name()).or_insert(Some(0.0));
            *worst = worst.zip(error).map(|(a, b)| f64::max(a, b));
        }
        Group { name: pairs[0].0.group, cases: pairs.len(), failed: failed(pairs), errors }
    }
}

impl Worst {
    fn new(column: Column, pairs: &[(&Case, &Outcome)]) -> Option<Self> {
        let numbers = pairs.iter().filter_map(|(case, outcome)| {
            let comparison = outcome.comparisons.iter().find(|comparison| comparison.column == column)?;
            Some((comparison.error?, case))
        });
        let (error, case) = numbers.max_by(|a, b| a.0.total_cmp(&b.0))?;
        Some(Worst { column: column.name(), error, group: case.group, case: case.to_string() })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "device   {}: {}", self.device.name, self.device.reason)?;
        if !self.device.driver.is_empty() {
            writeln!(f, "driver   {}", self.device.driver)?;
        }
        writeln!(f, "checked  sink-attention {}, {}, seed {}", self.version, self.pass, self.seed)?;

        let row = |f: &mut fmt::Formatter<'_>, name: &str, cases: &str, errors: &Errors, verdict: &str| {
            write!(f, "{name:<22}{cases:>5}")?;
            for column in self.columns {
                let text = match errors.get(column.name()) {
                    Some(Some(error)) => format!("{error:.1e}"),
                    Some(None) => "none".into(),
                    None => "-".into(),
                };
                write!(f, "{text:>8}")?;
            }
            writeln!(f, "{verdict}")
        };
        for Type { dtype, bounds, groups, worst, .. } in &self.dtypes {
            write!(f, "\n{:<22}{:>5}", format!("group, {dtype}"), "cases")?;
            self.columns.iter().try_for_each(|column| write!(f, "{:>8}", column.name()))?;
            writeln!(f, "  verdict")?;
            for group in groups {
                let verdict = if group.failed == 0 { "  ok".into() } else { format!("  {} FAILED", group.failed) };
                row(f, group.name, &group.cases.to_string(), &group.errors, &verdict)?;
            }
            row(f, "accepted", "", bounds, "")?;

            writeln!(f)?;
            for Worst { column, error, group, case } in worst {
                writeln!(f, "worst {column:<7} {error:.1e} in {group}: {case}")?;
            }
        }
        if self.failed > 0 {
            writeln!(f)?;
        }
        for Failure { group, case, message } in self.failures.iter().take(LISTED) {
            writeln!(f, "FAILED in {group}: {case}\n    {message}")?;
        }
        if self.failures.len() > LISTED {
            writeln!(f, "and {} more, all of them with --json", self.failures.len() - LISTED)?;
        }
        writeln!(f, "\nrepeat a case with: sink-attention check --seed {} --only \"CASE\"\n", self.seed)?;
        let verdict = if self.failed == 0 { "all passed".into() } else { format!("{} FAILED", self.failed) };
        write!(f, "{} cases in {:.1} s: {verdict}", self.cases, self.seconds)
    }
}
