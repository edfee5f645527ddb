//! The cases: which shapes, options and numbers are worth checking.

use std::fmt;
use std::ops::Range;

use sink_attention::{
    Alignment, DType, Element, Inputs, Layout, Options, Problem, Shape, SinkLogits, Upstream, Window,
};

/// Queries and keys around the edges of tiles, and far from square; a quick check takes the first ones of each list.
const SIZES: [[usize; 2]; 7] = [[113, 203], [239, 1], [1, 257], [63, 65], [64, 1], [3, 3], [1, 1]];
/// One size for each query tile there is: whole tiles, a part of one, a single row.
const TILES: [[usize; 2]; 3] = [[113, 203], [63, 65], [1, 257]];
/// Widths of models.
const WIDTHS: [usize; 8] = [128, 80, 16, 32, 64, 96, 192, 256];
/// Widths of no model: not multiples of 4 (so read one by one), and different for keys and values.
const ODD_WIDTHS: [[usize; 2]; 8] = [[80, 33], [192, 128], [3, 7], [64, 256], [255, 1], [1, 130], [36, 20], [256, 253]];

/// A problem with its operands.
#[derive(Debug, Clone)]
pub struct Case {
    /// Cases of one group share a row of the report.
    pub group: &'static str,
    pub problem: Problem,
    /// Factor on the scores, whose standard deviation is otherwise 1 under the default scale.
    pub logits: f32,
    /// Whether the sink logits are extreme.
    pub extreme_sinks: bool,
    /// Whether a gradient flows into lse, too.
    pub d_lse: bool,
    /// Whether q, k, v, d_o and d_lse are small integers, of which sums and products are exact in f32.
    pub integers: bool,
    /// Keys whose k and v are NaN or infinite, in key head 0 of every sequence. What depends on them is not compared.
    pub poisoned_keys: Range<usize>,
    /// Queries whose q, d_o or d_lse is NaN or infinite, in the query heads that read key head 0.
    pub poisoned_queries: Range<usize>,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.problem)?;
        if self.logits != 1.0 {
            write!(f, " logits x{}", self.logits)?;
        }
        if self.extreme_sinks {
            write!(f, " extreme")?;
        }
        if self.d_lse {
            write!(f, " d_lse")?;
        }
        if self.integers {
            write!(f, " integers")?;
        }
        for (what, poisoned) in [("keys", &self.poisoned_keys), ("queries", &self.poisoned_queries)] {
            if !poisoned.is_empty() {
                write!(f, " NaN in {what} {}..{}", poisoned.start, poisoned.end)?;
            }
        }
        Ok(())
    }
}

impl Case {
    /// The same case in another element type.
    pub fn with_dtype(&self, dtype: DType) -> Case {
        let options = self.problem.options().dtype(dtype);
        let problem =
            Problem::new(*self.problem.shape(), options).expect("the shape and the options are valid already");
        Case { problem, ..self.clone() }
    }

    /// The operands in f32: the same for the same case and seed, in whatever grid the case stands.
    pub fn operands(&self, seed: u64) -> Operands {
        let problem = &self.problem;
        let mut random = Random::new(seed, &self.to_string());
        let mut tensor = |shape: &[usize], factor: f32| -> Vec<f32> {
            let mut element = || factor * random.next();
            let exact = |x: f32| if self.integers { (2.0 * x).round() } else { x };
            (0..shape.iter().product()).map(|_| exact(element())).collect()
        };
        let mut operands = Operands {
            q: tensor(&problem.q_shape(), self.logits),
            k: tensor(&problem.k_shape(), 1.0),
            v: tensor(&problem.v_shape(), 1.0),
            sink_logits: None,
            d_o: tensor(&problem.o_shape(), 1.0),
            // The larger the logits, the more of d_s hangs on it: see the group.
            d_lse: self.d_lse.then(|| tensor(&problem.lse_shape(), self.logits.sqrt())),
        };
        if problem.options().sink_logits == SinkLogits::PerHead {
            // From sinks that must vanish to sinks that leave nothing to the keys.
            let extreme = [f32::NEG_INFINITY, -1e4, -30.0, 20.0, 100.0, 1e4];
            let sinks = (0..problem.shape().heads)
                .map(|h| if self.extreme_sinks { extreme[h % extreme.len()] } else { 2.0 * random.next() });
            operands.sink_logits = Some(sinks.collect());
            // One feature with a mean gives every d_o . o the same sign, mostly: the gradient of a sink logit sums them,
            // and the norm of a sum that cancels is nothing to compare with.
            for (tensor, rows) in [
                (&mut operands.v, self.key_rows(problem.shape().value_dim)),
                (&mut operands.d_o, self.query_rows(problem.shape().value_dim)),
            ] {
                rows.into_iter().for_each(|(_, row)| tensor[row.start] += 2.0);
            }
        }
        self.spread_poison(&mut operands);
        operands
    }

    fn spread_poison(&self, operands: &mut Operands) {
        let shape = self.problem.shape();
        let bad = |n: usize| [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][n % 3];
        for (tensor, width) in [(&mut operands.k, shape.head_dim), (&mut operands.v, shape.value_dim)] {
            for ([_, g, j], row) in self.key_rows(width) {
                if g == 0 && self.poisoned_keys.contains(&j) {
                    tensor[row].fill(bad(j));
                }
            }
        }
        // By turns, as one NaN may hide what another does.
        let d_lse = operands.d_lse.as_deref_mut().unwrap_or_default();
        let tensors = [&mut operands.q[..], &mut operands.d_o, d_lse];
        let rows = [self.query_rows(shape.head_dim), self.query_rows(shape.value_dim), self.lse_rows()];
        let turns = if self.d_lse { 3 } else { 2 };
        for (turn, (tensor, rows)) in tensors.into_iter().zip(rows).enumerate().take(turns) {
            for ([_, h, i], row) in rows {
                if self.reads_poison(h) && self.poisoned_queries.contains(&i) && i % turns == turn {
                    tensor[row].fill(bad(i / turns));
                }
            }
        }
    }

    /// Whether a query head reads the key head that poison is in, or may hold poison itself.
    pub fn reads_poison(&self, head: usize) -> bool {
        head < self.problem.group()
    }

    /// Batch, head and position of every row of q, o and their gradients, and where it lies.
    pub fn query_rows(&self, width: usize) -> Vec<([usize; 3], Range<usize>)> {
        let shape = self.problem.shape();
        rows(self.problem.options().layout, [shape.batch, shape.heads, shape.seq_q, width])
    }

    /// As [`query_rows`](Self::query_rows), of k, v and their gradients.
    pub fn key_rows(&self, width: usize) -> Vec<([usize; 3], Range<usize>)> {
        let shape = self.problem.shape();
        rows(self.problem.options().layout, [shape.batch, shape.kv_heads, shape.seq_k, width])
    }

    /// As [`query_rows`](Self::query_rows), of lse and its gradient, which have one layout.
    pub fn lse_rows(&self) -> Vec<([usize; 3], Range<usize>)> {
        let [batch, heads, seq_q] = self.problem.lse_shape();
        rows(Layout::Bhsd, [batch, heads, seq_q, 1])
    }
}

/// Batch, head and position of every row of a packed operand, and where it lies.
pub fn rows(layout: Layout, [batch, heads, seq, width]: [usize; 4]) -> Vec<([usize; 3], Range<usize>)> {
    let strides = layout.strides(heads, seq, width).map(|stride| stride as usize);
    let place = |n: usize| [n / seq / heads, n / seq % heads, n % seq];
    let start = |row: [usize; 3]| row.iter().zip(strides).map(|(index, stride)| index * stride).sum::<usize>();
    let places = (0..batch * heads * seq).map(place);
    places.map(|row| (row, start(row)..start(row) + width)).collect()
}

/// The operands of a case.
#[derive(Debug)]
pub struct Operands<T = f32> {
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    sink_logits: Option<Vec<f32>>,
    d_o: Vec<T>,
    d_lse: Option<Vec<f32>>,
}

impl Operands {
    /// Rounded to an element type.
    pub fn cast<T: Element>(self) -> Operands<T> {
        let Operands { q, k, v, sink_logits, d_o, d_lse } = self;
        Operands { q: T::narrow(q), k: T::narrow(k), v: T::narrow(v), sink_logits, d_o: T::narrow(d_o), d_lse }
    }
}

impl<T: Element> Operands<T> {
    pub fn inputs(&self) -> Inputs<'_, T> {
        Inputs::new(&self.q, &self.k, &self.v).sink_logits(self.sink_logits.as_deref())
    }

    pub fn upstream(&self) -> Upstream<'_, T> {
        Upstream { d_o: &self.d_o, d_lse: self.d_lse.as_deref() }
    }
}

/// SplitMix64: the same numbers in every version and on every machine, so that a report can be repeated.
struct Random(u64);

impl Random {
    /// A stream for a text: FNV-1a, as the hashes of the standard library change between versions.
    fn new(seed: u64, text: &str) -> Self {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        Random(text.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, step))
    }

    /// Evenly distributed, with mean 0 and standard deviation 1.
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 24) as f32;
        (2.0 * unit - 1.0) * 3f32.sqrt()
    }
}

/// Two query heads that share a key head: enough to see heads mixed up.
fn shape([seq_q, seq_k]: [usize; 2], [head_dim, value_dim]: [usize; 2]) -> Shape {
    Shape { batch: 1, heads: 2, kv_heads: 1, seq_q, seq_k, head_dim, value_dim }
}

/// The width of cases that are not about widths: one variant of the kernel serves them all.
const WIDTH: [usize; 2] = [64, 64];

/// All cases in f32, group by group; a quick check has each group, with fewer sizes and widths.
pub fn grid(quick: bool) -> Vec<Case> {
    let mut grid = Grid { quick, group: "", cases: Vec::new() };
    let full = Options::new();
    let causal = full.causal(true);
    let stream = full.window(Window::keys(17)).sink_tokens(3);

    grid.group("sizes");
    for size in grid.some(&SIZES) {
        grid.add(shape(size, WIDTH), full);
        grid.add(shape(size, WIDTH), causal);
    }
    grid.group("widths");
    for width in grid.some(&WIDTHS) {
        for size in grid.some(&TILES) {
            grid.add(shape(size, [width, width]), causal);
        }
    }
    grid.group("odd widths");
    for width in grid.some(&ODD_WIDTHS) {
        for size in grid.some(&TILES) {
            grid.add(shape(size, width), stream);
        }
    }
    grid.group("windows");
    let bounds = [None, Some(0), Some(5), Some(70), Some(usize::MAX)];
    for size in grid.some(&TILES) {
        for (left, right) in bounds.into_iter().flat_map(|left| bounds.map(|right| (left, right))) {
            grid.add(shape(size, WIDTH), full.window(Window { left, right }));
        }
        grid.add(shape(size, WIDTH), causal.window(Window::new(9, 4)));
    }
    grid.group("sink tokens");
    for size in grid.some(&TILES) {
        for window in [Window::keys(1), Window::keys(17), Window::new(9, 4)] {
            for sink_tokens in grid.some(&[4, 100, 1, 32, 1000]) {
                grid.add(shape(size, WIDTH), full.window(window).sink_tokens(sink_tokens));
            }
        }
    }
    for sinks in [SinkLogits::PerHead, SinkLogits::OffByOne] {
        grid.group(if sinks == SinkLogits::PerHead { "sink logits" } else { "off by one" });
        for size in grid.some(&SIZES) {
            for options in [full, causal, stream] {
                let shape = Shape { heads: 6, kv_heads: 3, ..shape(size, WIDTH) };
                grid.add(shape, options.sink_logits(sinks));
            }
        }
    }
    grid.group("extreme sink logits");
    for size in grid.some(&TILES) {
        for options in [full, causal, stream] {
            let shape = Shape { heads: 6, kv_heads: 3, ..shape(size, WIDTH) };
            grid.add(shape, options.sink_logits(SinkLogits::PerHead)).extreme_sinks = true;
        }
    }
    grid.group("alignment");
    for size in grid.some(&[[113, 203], [203, 113], [63, 65], [239, 1], [1, 257]]) {
        for options in [causal, stream, stream.causal(true).window(Window::new(40, 9))] {
            grid.add(shape(size, WIDTH), options.alignment(Alignment::TopLeft));
            for offset in [-30, 7, 150] {
                grid.add(shape(size, WIDTH), options.query_offset(offset));
            }
        }
    }
    grid.group("empty rows");
    for sinks in [SinkLogits::None, SinkLogits::PerHead, SinkLogits::OffByOne] {
        let [full, causal] = [full.sink_logits(sinks), causal.sink_logits(sinks)];
        // Queries before all keys, some of them and all; queries whose window has left the keys.
        grid.add(shape([239, 1], WIDTH), causal);
        grid.add(shape([113, 31], WIDTH), causal);
        grid.add(shape([63, 65], WIDTH), causal.query_offset(i64::MIN));
        grid.add(shape([113, 31], WIDTH), full.window(Window::new(5, 3)).query_offset(0));
        grid.add(shape([113, 31], WIDTH), full.window(Window::keys(2)).query_offset(i64::MAX));
    }
    grid.group("heads, batch, layout");
    for (batch, heads, kv_heads) in grid.some(&[(2, 6, 2), (3, 5, 1), (1, 8, 8), (2, 8, 2)]) {
        for layout in [Layout::Bshd, Layout::Bhsd] {
            for size in grid.some(&TILES) {
                let shape = Shape { batch, heads, kv_heads, ..shape(size, [64, 64]) };
                grid.add(shape, causal.layout(layout));
                grid.add(shape, stream.layout(layout).sink_logits(SinkLogits::PerHead));
            }
        }
    }
    grid.group("many workgroups");
    // More than one dimension of a dispatch can number, in the kernels that go by queries and in those that go by keys.
    // Not with few key heads: llvmpipe leaves a shader's loops after 65535 turns of all of them together, and d_k takes
    // dozens for each query head that it sums over.
    grid.add(Shape { batch: 3, heads: 22_000, kv_heads: 22_000, ..shape([2, 3], [4, 4]) }, causal);
    grid.group("scale");
    for scale in [0.0, -0.3, 1.0] {
        for size in grid.some(&TILES) {
            grid.add(shape(size, WIDTH), causal.scale(scale));
        }
    }
    grid.group("large logits");
    // Beyond 88, where exp overflows, but not by far: f32 rounds scores of hundreds by more than is accepted here.
    // And in many rows, as a single one may hang on a near tie.
    for logits in [4.0, 12.0, 36.0] {
        for size in grid.some(&[[113, 203], [63, 65], [40, 257]]) {
            let case = grid.add(shape(size, WIDTH), causal);
            case.logits = logits;
            // A row that one key dominates has a d_s that all but cancels, and then d_q and d_k show little more
            // than the rounding of that row's scores. With d_lse they do not cancel.
            case.d_lse = true;
        }
    }
    grid.group("NaN in hidden keys");
    let window = full.window(Window::keys(17));
    for sinks in [SinkLogits::None, SinkLogits::PerHead, SinkLogits::OffByOne] {
        for (size, options, poison) in [
            // Behind all queries; behind some; before the window; between it and the sinks; passed by the window.
            ([63, 65], causal.alignment(Alignment::TopLeft), 63..65),
            ([113, 203], causal, 183..203),
            ([113, 203], window, 0..74),
            ([113, 203], stream, 3..74),
            ([113, 203], window.layout(Layout::Bhsd), 100..101),
            ([1, 257], window, 0..240),
            // Nothing is visible at all.
            ([63, 65], causal.query_offset(-100), 0..65),
        ] {
            let shape = Shape { heads: 4, kv_heads: 2, ..shape(size, WIDTH) };
            grid.add(shape, options.sink_logits(sinks)).poisoned_keys = poison;
        }
    }
    grid.group("NaN in query rows");
    for sinks in [SinkLogits::None, SinkLogits::PerHead, SinkLogits::OffByOne] {
        for (size, options, poison) in [
            // Rows that see few keys; all but the last keys; keys that others see, too; sink tokens; nothing.
            ([113, 203], causal.alignment(Alignment::TopLeft), 0..9),
            ([113, 203], causal, 0..74),
            ([113, 203], window, 50..53),
            ([113, 203], stream.layout(Layout::Bhsd), 6..12),
            ([113, 31], causal, 0..82),
        ] {
            for d_lse in [true, false] {
                let shape = Shape { heads: 4, kv_heads: 2, ..shape(size, WIDTH) };
                let case = grid.add(shape, options.sink_logits(sinks));
                (case.poisoned_queries, case.d_lse) = (poison.clone(), d_lse);
            }
        }
    }
    grid.group("gradient of lse");
    for size in grid.some(&SIZES) {
        for sinks in [SinkLogits::None, SinkLogits::PerHead, SinkLogits::OffByOne] {
            for options in [full, stream] {
                let shape = Shape { heads: 6, kv_heads: 3, ..shape(size, WIDTH) };
                grid.add(shape, options.sink_logits(sinks)).d_lse = true;
            }
        }
    }
    grid.group("gradients that cancel");
    // The one key that a query sees has a probability of 1 whatever its score is, so that d_q and d_k are zero.
    for (size, options) in [([239, 1], full), ([113, 203], full.window(Window::new(0, 0))), ([1, 1], causal)] {
        for layout in [Layout::Bshd, Layout::Bhsd] {
            let case = grid.add(Shape { heads: 6, kv_heads: 3, ..shape(size, WIDTH) }, options.layout(layout));
            case.d_lse = false;
            assert!(case.integers, "{case}");
        }
    }
    grid.group("long sequences");
    for size in grid.some(&[[1023, 1024], [1, 4099], [5, 2048]]) {
        grid.add(shape(size, WIDTH), full);
        grid.add(shape(size, WIDTH), causal.sink_logits(SinkLogits::PerHead));
        grid.add(shape(size, WIDTH), full.window(Window::keys(128)).sink_tokens(4));
    }
    grid.cases
}

/// A grid under construction.
struct Grid {
    quick: bool,
    group: &'static str,
    cases: Vec<Case>,
}

impl Grid {
    fn group(&mut self, group: &'static str) {
        self.group = group;
    }

    /// All of a list, or its first two for a quick check.
    fn some<T: Clone>(&self, list: &[T]) -> Vec<T> {
        list.iter().take(if self.quick { 2 } else { list.len() }).cloned().collect()
    }

    /// Adds a case, which the caller may make less ordinary.
    fn add(&mut self, shape: Shape, options: Options) -> &mut Case {
        let problem = Problem::new(shape, options).expect("the shapes and options above are valid");
        // In every second case or so, whatever grid it stands in.
        let even = Random::new(0, &problem.to_string()).next() < 0.0;
        self.cases.push(Case {
            group: self.group,
            logits: 1.0,
            extreme_sinks: false,
            d_lse: even,
            integers: cancels(&problem),
            problem,
            poisoned_keys: 0..0,
            poisoned_queries: 0..0,
        });
        let last = self.cases.len() - 1;
        &mut self.cases[last]
    }
}

/// Whether no query sees two keys or a sink: then d_s is zero but for d_lse, and must be without rounding, as zero is
/// no norm to compare with.
fn cancels(problem: &Problem) -> bool {
    let seen = |i| problem.sequence(0).band.visible_keys(i).iter().map(|keys| keys.len()).sum::<usize>();
    problem.options().sink_logits == SinkLogits::None && (0..problem.shape().seq_q).all(|i| seen(i) < 2)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn descriptions_are_unique_within_a_group() {
        for quick in [false, true] {
            let mut seen = HashSet::new();
            for case in grid(quick) {
                assert!(seen.insert((case.group, case.to_string())), "twice: {} {case}", case.group);
            }
        }
    }

    #[test]
    fn a_quick_check_has_every_group_of_the_whole() {
        let groups = |quick| {
            let mut groups: Vec<_> = grid(quick).iter().map(|case| case.group).collect();
            groups.dedup();
            groups
        };
        assert_eq!(groups(true), groups(false));
        assert!(grid(true).len() < grid(false).len() / 2);
    }

    #[test]
    fn operands_depend_on_the_case_and_the_seed_alone() {
        let find = |quick| grid(quick).into_iter().find(|case| case.group == "scale").unwrap();
        let q = |quick, seed| find(quick).operands(seed).q;
        assert_eq!(q(true, 1), q(false, 1));
        assert_ne!(q(true, 1), q(true, 2));
        let q = q(false, 1);
        let mean = q.iter().sum::<f32>() / q.len() as f32;
        let variance = q.iter().map(|x| x * x).sum::<f32>() / q.len() as f32;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
