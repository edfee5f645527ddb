//! The cases: the shapes, options and numbers that are worth checking.

use std::fmt;
use std::ops::Range;

use sink_attention::plan::Sequence;
use sink_attention::{
    Alignment, Axes, Bias, DType, Element, Inputs, Layout, Lengths, MaskData, MaskPacking, Options, Problem, Result,
    Shape, SinkLogits, Upstream, Window,
};

use sink_attention::testing::hidden::{BiasType, FAMILIES};
use sink_attention::testing::random::Random;

/// Queries and keys around the edges of tiles, and far from square. A quick check takes the first ones of each list.
const SIZES: [[usize; 2]; 7] = [[113, 203], [239, 1], [1, 257], [63, 65], [64, 1], [3, 3], [1, 1]];
/// One size for each query tile there is: whole tiles, a part of one, a single row.
const TILES: [[usize; 2]; 3] = [[113, 203], [63, 65], [1, 257]];
/// Widths of models.
const WIDTHS: [usize; 8] = [128, 80, 16, 32, 64, 96, 192, 256];
/// Widths of no model: not multiples of 4 (so that numbers are read one by one), and different for keys and values.
const ODD_WIDTHS: [[usize; 2]; 8] = [[80, 33], [192, 128], [3, 7], [64, 256], [255, 1], [1, 130], [36, 20], [256, 253]];

/// Axes along which a bias or a mask is not broadcast: all, those of models' masks and biases, and the remaining ones.
const AXES: [Axes; 8] = [
    Axes::ALL,
    Axes { batch: true, heads: false, seq_q: false },
    Axes { batch: false, heads: true, seq_q: true },
    Axes { batch: false, heads: false, seq_q: true },
    Axes { batch: true, heads: false, seq_q: true },
    Axes { batch: true, heads: true, seq_q: false },
    Axes { batch: false, heads: true, seq_q: false },
    Axes { batch: false, heads: false, seq_q: false },
];

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
    /// Whether a gradient also flows into lse.
    pub d_lse: bool,
    /// Whether a bias has the operands' element type, and not f32.
    pub narrow_bias: bool,
    /// Whether q, k, v, d_o and d_lse are small integers, whose sums and products are exact in f32.
    pub integers: bool,
    /// Keys whose k and v are NaN or infinite, in key head 0 of every entry of the batch. A mask or a bias hides them. Results that depend
    /// on them all the same are not compared.
    pub poisoned_keys: Range<usize>,
    /// Whether the case is also checked against the law that nothing unseen changes a result.
    pub hidden: bool,
    /// Queries whose q, d_o or d_lse is NaN or infinite, in the query heads that read key head 0.
    pub poisoned_queries: Range<usize>,
    /// Whether weights are larger than a kernel that keeps them as halves expects.
    pub unforeseen: Option<Unforeseen>,
}

/// Numbers that are much larger than a kernel can know beforehand. Weights beyond the range of halves must become infinite, so that the
/// kernel sees them and computes their rows in another way. If they were rounded toward zero, results would be wrong without any sign of
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unforeseen {
    /// The gradients that flow into later queries. Those of the first queries set the unit of the weights in d_k.
    LateGradients,
    /// The gradients that flow into the probabilities. The values cancel, so that o is 0 and says nothing of d_o . v.
    CancelledValues,
}

/// The first query with a large gradient. It is behind the first tiles of any size.
const LATE: usize = 64;

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
        if let Some(sequence) = self.problem.sequences().next().filter(|_| self.problem.has_lengths()) {
            write!(f, " first {}x{}", sequence.band.seq_q(), sequence.band.seq_k())?;
        }
        if self.narrow_bias {
            write!(f, " narrow bias")?;
        }
        if self.integers {
            write!(f, " integers")?;
        }
        match self.unforeseen {
            Some(Unforeseen::LateGradients) => write!(f, " late gradients")?,
            Some(Unforeseen::CancelledValues) => write!(f, " cancelled values")?,
            None => {}
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
        let bias = if self.narrow_bias { dtype } else { DType::F32 };
        let options = self.problem.options().dtype(dtype).bias_dtype(bias);
        let problem = with_options(&self.problem, options).expect("the shape and the options are valid already");
        Case { problem, ..self.clone() }
    }

    /// The operands in f32. They depend on the case and the seed alone, in whatever grid the case is.
    pub fn operands(&self, seed: u64) -> Operands {
        let problem = &self.problem;
        let mut random = Random::new(seed, &self.to_string());
        let mut tensor = |shape: &[usize], factor: f32| -> Vec<f32> {
            let mut element = || factor * random.unit();
            let exact = |x: f32| if self.integers { (2.0 * x).round() } else { x };
            (0..shape.iter().product()).map(|_| exact(element())).collect()
        };
        let mut operands = Operands {
            q: tensor(&problem.q_shape(), self.logits),
            k: tensor(&problem.k_shape(), 1.0),
            v: tensor(&problem.v_shape(), 1.0),
            sink_logits: None,
            alibi_slopes: None,
            bias: None,
            mask: None,
            d_o: tensor(&problem.o_shape(), 1.0),
            // The larger the logits are, the more d_s depends on them: see the group.
            d_lse: self.d_lse.then(|| tensor(&problem.lse_shape(), self.logits.sqrt())),
        };
        let per_head = problem.options().sink_logits == SinkLogits::PerHead;
        if per_head {
            // Sinks range from those that must vanish to those that leave nothing to the keys.
            let extreme = [f32::NEG_INFINITY, -1e4, -30.0, 20.0, 100.0, 1e4];
            let sinks = (0..problem.shape().heads)
                .map(|h| if self.extreme_sinks { extreme[h % extreme.len()] } else { 2.0 * random.unit() });
            operands.sink_logits = Some(sinks.collect());
        }
        if per_head || problem.options().alibi {
            // One feature with a mean gives nearly every d_o . o the same sign. The gradients of sink logits and slopes sum them, and the
            // norm of a sum that cancels is too small to compare with.
            for (tensor, rows) in [
                (&mut operands.v, self.key_rows(problem.shape().value_dim)),
                (&mut operands.d_o, self.query_rows(problem.shape().value_dim)),
            ] {
                rows.into_iter().for_each(|(_, row)| tensor[row.start] += 2.0);
            }
        }
        if problem.options().alibi {
            // Slopes are those of models, except one that prefers far keys.
            let slope = |h: usize| 0.5f32.powi(1 + h as i32) * if h % 4 == 3 { -0.1 } else { 1.0 };
            operands.alibi_slopes = Some((0..problem.shape().heads).map(slope).collect());
        }
        operands.mask = mask_shape(problem).map(|shape| self.mask(shape, &mut random));
        operands.bias = problem.bias_shape().map(|shape| self.bias(shape, &mut random));
        self.make_unforeseen(&mut operands);
        self.spread_poison(&mut operands);
        operands
    }

    fn make_unforeseen(&self, operands: &mut Operands) {
        let Some(unforeseen) = self.unforeseen else { return };
        let width = self.problem.shape().value_dim;
        match unforeseen {
            Unforeseen::LateGradients => {
                // The factor is 2^25 in f16, which holds both numbers, and 2^80 in bf16, whose range is that of f32.
                let [early, late] = if self.problem.options().dtype == DType::Bf16 { [-40, 40] } else { [-12, 13] };
                for ([_, _, i], row) in self.query_rows(width) {
                    let factor = 2f32.powi(if i < LATE { early } else { late });
                    operands.d_o[row].iter_mut().for_each(|x| *x *= factor);
                }
            }
            Unforeseen::CancelledValues => {
                // All keys have the same weight. Values are those of the first key and their negatives in turn, with few bits, so sums in
                // any order have no rounding error.
                operands.q.fill(0.0);
                let first = operands.v[..width].to_vec();
                for ([_, _, j], row) in self.key_rows(width) {
                    let sign = if j % 2 == 0 { 1.0 } else { -1.0 };
                    let values = first.iter().map(|x| sign * (4.0 * x).round() / 4.0);
                    operands.v[row].iter_mut().zip(values).for_each(|(to, x)| *to = x);
                }
            }
        }
    }

    /// A mask with a byte for each pair. Of the blocks of 32 queries and keys, a third each is hidden, visible and mixed.
    fn mask(&self, shape: [usize; 4], random: &mut Random) -> Vec<u8> {
        let [_, _, seq_q, seq_k] = shape;
        let blocks = [seq_q.div_ceil(32), seq_k.div_ceil(32)];
        let all = shape[0] * shape[1] * blocks[0] * blocks[1];
        // The first keys are mixed: a query that sees a single key has gradients of zero, and a norm of zero is nothing to compare with.
        let kinds: Vec<usize> = (0..all).map(|n| if n % blocks[1] == 0 { 2 } else { random.below(3) }).collect();
        let pair = |[b, h, i, j]: [usize; 4]| {
            let block = ((b * shape[1] + h) * blocks[0] + i / 32) * blocks[1] + j / 32;
            u8::from(
                match kinds[block] {
                    0 => false,
                    1 => true,
                    _ => random.below(4) > 0,
                } && !self.poisoned_keys.contains(&j),
            )
        };
        places(shape).map(pair).collect()
    }

    /// Numbers of unit variance, and some -infinity.
    fn bias(&self, shape: [usize; 4], random: &mut Random) -> Vec<f32> {
        let is_masked = self.problem.options().mask.is_some();
        let pair = |[_, _, _, j]: [usize; 4]| {
            let bias = random.unit();
            let hides = random.below(16) == 0 || (!is_masked && self.poisoned_keys.contains(&j));
            if hides { f32::NEG_INFINITY } else { bias }
        };
        places(shape).map(pair).collect()
    }

    /// The keys that each query of each head and sequence sees, in the order of sequences, heads and queries.
    pub fn views<'a>(&'a self, operands: &'a Operands) -> impl Iterator<Item = View> + 'a {
        let problem = &self.problem;
        let (mask_shape, bias_shape) = (mask_shape(problem), problem.bias_shape());
        let mask = operands.mask.as_deref().zip(mask_shape);
        let bias = operands.bias.as_deref().zip(bias_shape);
        problem.sequences().enumerate().flat_map(move |(number, sequence)| {
            let queries =
                (0..problem.shape().heads * sequence.q_rows).map(move |n| (n / sequence.q_rows, n % sequence.q_rows));
            queries.map(move |(head, i)| {
                let counts = i < sequence.band.seq_q();
                let ranges = sequence.band.visible_keys(i).into_iter().filter(|_| counts).flatten();
                let sees = |&j: &usize| {
                    let pair = [number, head, i, j];
                    mask.is_none_or(|(mask, shape)| mask[place(shape, pair)] != 0)
                        && bias.is_none_or(|(bias, shape)| bias[place(shape, pair)] != f32::NEG_INFINITY)
                };
                View { number, sequence, head, i, keys: ranges.filter(sees).collect() }
            })
        })
    }

    fn spread_poison(&self, operands: &mut Operands) {
        let shape = self.problem.shape();
        if let Some(bias_shape) = self.problem.bias_shape().filter(|_| !self.poisoned_keys.is_empty()) {
            // An element of the bias that is added to no visible pair's score may be anything. There are some if sequences differ in
            // length.
            let mut seen = vec![false; bias_shape.iter().product()];
            for view in self.views(operands) {
                view.keys.iter().for_each(|&j| seen[place(bias_shape, view.pair(j))] = true);
            }
            let unseen = operands.bias.iter_mut().flatten().zip(seen).filter(|(_, seen)| !seen);
            unseen.filter(|(bias, _)| **bias != f32::NEG_INFINITY).for_each(|(bias, _)| *bias = f32::NAN);
        }
        let bad = |n: usize| [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][n % 3];
        for (tensor, width) in [(&mut operands.k, shape.head_dim), (&mut operands.v, shape.value_dim)] {
            for ([_, g, j], row) in self.key_rows(width) {
                if g == 0 && self.poisoned_keys.contains(&j) {
                    tensor[row].fill(bad(j));
                }
            }
        }
        // Kinds of poison take turns, because NaN may hide the effect of infinity.
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

    /// Whether the d_lse of a query's row is poisoned, by its place in the batch entry.
    pub fn poisons_d_lse(&self, i: usize) -> bool {
        self.d_lse && self.poisoned_queries.contains(&i) && i % 3 == 2
    }

    /// Whether a query head reads the poisoned key head, or may be poisoned itself.
    pub fn reads_poison(&self, head: usize) -> bool {
        head < self.problem.heads_per_kv()
    }

    /// Batch, head and position of every row of q, o and their gradients, and the row's range.
    pub fn query_rows(&self, width: usize) -> Vec<([usize; 3], Range<usize>)> {
        let shape = self.problem.shape();
        rows(self.problem.options().layout, [shape.batch, shape.heads, shape.seq_q, width])
    }

    /// Like [`query_rows`](Self::query_rows), for k, v and their gradients.
    pub fn key_rows(&self, width: usize) -> Vec<([usize; 3], Range<usize>)> {
        let shape = self.problem.shape();
        rows(self.problem.options().layout, [shape.batch, shape.kv_heads, shape.seq_k, width])
    }

    /// Like [`query_rows`](Self::query_rows), for lse and its gradient, which have one layout.
    pub fn lse_rows(&self) -> Vec<([usize; 3], Range<usize>)> {
        let [batch, heads, seq_q] = self.problem.lse_shape();
        rows(Layout::Bhsd, [batch, heads, seq_q, 1])
    }
}

/// A query, and the keys that it sees.
#[derive(Debug)]
pub struct View {
    /// The number of the sequence in the batch.
    pub number: usize,
    pub sequence: Sequence,
    pub head: usize,
    /// The query's place in the sequence.
    pub i: usize,
    /// Places of the keys in the sequence.
    pub keys: Vec<usize>,
}

impl View {
    /// The place of a pair in a bias or a mask that is not broadcast.
    pub fn pair(&self, j: usize) -> [usize; 4] {
        [self.number, self.head, self.i, j]
    }
}

/// The shape of the mask in bytes, whatever its packing is.
fn mask_shape(problem: &Problem) -> Option<[usize; 4]> {
    let [batch, heads, seq_q, _] = problem.mask_shape()?;
    let longest = problem.sequences().map(|sequence| sequence.k_rows).max();
    Some([batch, heads, seq_q, longest.unwrap_or(0)])
}

/// All places of a shape in their order.
fn places([batch, heads, seq_q, seq_k]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let place = move |n: usize| [n / seq_k / seq_q / heads, n / seq_k / seq_q % heads, n / seq_k % seq_q, n % seq_k];
    (0..batch * heads * seq_q * seq_k).map(place)
}

/// The place of a pair in a tensor that is broadcast along its axes of size 1.
pub fn place(shape: [usize; 4], pair: [usize; 4]) -> usize {
    shape.into_iter().zip(pair).fold(0, |place, (size, n)| place * size + if size == 1 { 0 } else { n })
}

/// The problem with other options. The lengths of its sequences stay.
pub fn with_options(problem: &Problem, options: Options) -> Result<Problem> {
    let shape = *problem.shape();
    if !problem.has_lengths() {
        return Problem::new(shape, options);
    }
    let all = |number: fn(Sequence) -> usize| problem.sequences().map(move |sequence| number(sequence) as u32);
    if problem.options().layout == Layout::Thd {
        let q: Vec<u32> = [0].into_iter().chain(all(|s| s.q_start + s.q_rows)).collect();
        let k: Vec<u32> = [0].into_iter().chain(all(|s| s.k_start + s.k_rows)).collect();
        return Problem::with_lengths(shape, options, Lengths::Cumulative { q: &q, k: &k });
    }
    let (q, k): (Vec<u32>, Vec<u32>) = (all(|s| s.band.seq_q()).collect(), all(|s| s.band.seq_k()).collect());
    Problem::with_lengths(shape, options, Lengths::Used { q: Some(&q), k: Some(&k) })
}

/// Batch, head and position of every row of a packed operand, and the row's range.
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
    alibi_slopes: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    /// The mask in bytes.
    mask: Option<Vec<u8>>,
    d_o: Vec<T>,
    d_lse: Option<Vec<f32>>,
}

impl Operands {
    /// The operands, rounded to an element type.
    pub fn cast<T: Element>(self) -> Operands<T> {
        let Operands { q, k, v, sink_logits, alibi_slopes, bias, mask, d_o, d_lse } = self;
        let [q, k, v, d_o] = [q, k, v, d_o].map(T::narrow);
        Operands { q, k, v, sink_logits, alibi_slopes, bias, mask, d_o, d_lse }
    }
}

impl<T: Element> Operands<T> {
    /// Calls `call` with the operands, and a bias and a mask in the form that the problem needs.
    pub fn with_inputs<R>(&self, problem: &Problem, call: impl FnOnce(&Inputs<'_, T>) -> R) -> R {
        let options = problem.options();
        let narrow = self.bias.clone().filter(|_| options.bias_dtype != DType::F32).map(T::narrow);
        let bias = narrow.as_deref().map(Bias::Operand).or(self.bias.as_deref().map(Bias::F32));
        let row = mask_shape(problem).map_or(1, |shape| shape[3]);
        let words = self.mask.as_ref().map(|mask| MaskData::pack(mask, row));
        let mask = match options.mask_packing {
            MaskPacking::Bytes => self.mask.as_deref().map(MaskData::Bytes),
            MaskPacking::Bits => words.as_deref().map(MaskData::Bits),
        };
        let inputs = Inputs::new(&self.q, &self.k, &self.v).sink_logits(self.sink_logits.as_deref());
        call(&inputs.alibi_slopes(self.alibi_slopes.as_deref()).bias(bias).mask(mask))
    }

    pub fn upstream(&self) -> Upstream<'_, T> {
        Upstream::new(&self.d_o).d_lse(self.d_lse.as_deref())
    }
}

/// A seed for each family that gives an ordinary problem: it has many rows, most of which see something.
const HIDDEN_SEEDS: [u64; FAMILIES.len()] = [0, 1, 2, 3, 4, 5];

/// Two query heads share a key head, which is enough to detect mixed-up heads.
fn shape([seq_q, seq_k]: [usize; 2], [head_dim, value_dim]: [usize; 2]) -> Shape {
    Shape { batch: 1, heads: 2, kv_heads: 1, seq_q, seq_k, head_dim, value_dim }
}

/// The width of cases that do not test widths. One variant of the kernel serves them all.
const WIDTH: [usize; 2] = [64, 64];

/// All cases in f32, group by group. A quick check has each group, with fewer sizes and widths.
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
        // Queries come before all keys, some of them, or all. Then there are queries whose window has left the keys.
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
    // These have more workgroups than one dimension of a dispatch can number, in the kernels that go by queries and in those that go by
    // keys. There are many key heads, because llvmpipe leaves a shader's loops after 65535 turns of all of them together, and d_k takes
    // dozens for each query head that it sums over.
    grid.add(Shape { batch: 3, heads: 22_000, kv_heads: 22_000, ..shape([2, 3], [4, 4]) }, causal);
    grid.group("scale");
    for scale in [0.0, -0.3, 1.0] {
        for size in grid.some(&TILES) {
            grid.add(shape(size, WIDTH), causal.scale(scale));
        }
    }
    grid.group("large logits");
    // Logits are beyond 88, where exp overflows, but not by far: f32 rounds scores of hundreds by more than is accepted here. There are
    // many rows, because a single one may depend on a near tie.
    for logits in [4.0, 12.0, 36.0] {
        for size in grid.some(&[[113, 203], [63, 65], [40, 257]]) {
            let case = grid.add(shape(size, WIDTH), causal);
            case.logits = logits;
            // The d_s of a row that one key dominates nearly cancels, and then d_q and d_k show little more than the rounding error of that
            // row's scores. With d_lse they do not cancel.
            case.d_lse = true;
        }
    }
    // These options change scores and visibility beyond products, ranges and sinks. There is a batch, and heads share keys.
    let several = |size| Shape { batch: 2, ..shape(size, WIDTH) };
    let per_head = full.sink_logits(SinkLogits::PerHead);
    grid.group("softcap");
    for size in grid.some(&TILES) {
        for (softcap, logits, options) in
            [(0.7, 1.0, full), (5.0, 4.0, stream.sink_logits(SinkLogits::PerHead)), (30.0, 12.0, causal)]
        {
            let case = grid.add(shape(size, WIDTH), options.softcap(softcap));
            (case.logits, case.d_lse) = (logits, true);
        }
    }
    grid.group("ALiBi");
    // There are many rows, because the weighted sum over a single one may cancel.
    for size in grid.some(&[[113, 203], [63, 65], [40, 257]]) {
        for options in [full, per_head.causal(true), stream.sink_logits(SinkLogits::OffByOne)] {
            let shape = Shape { heads: 4, kv_heads: 2, ..several(size) };
            grid.add(shape, options.alibi(true));
            grid.add(shape, options.alibi(true).query_offset(20));
        }
    }
    grid.group("bias");
    // With a single query, a bias with an axis for queries is the same as a broadcast one.
    let distinct = |axes: Axes| move |size: &[usize; 2]| size[0] > 1 || !axes.seq_q;
    for (n, axes) in grid.some(&AXES).into_iter().enumerate() {
        for size in grid.some(&TILES).into_iter().filter(distinct(axes)) {
            grid.add(several(size), full.bias(axes)).narrow_bias = n % 2 == 0;
            grid.add(several(size), per_head.causal(true).bias(axes)).narrow_bias = n % 2 == 1;
        }
    }
    grid.group("mask");
    for (n, axes) in grid.some(&AXES).into_iter().enumerate() {
        let packing = if n % 2 == 0 { MaskPacking::Bytes } else { MaskPacking::Bits };
        for size in grid.some(&TILES).into_iter().filter(distinct(axes)) {
            grid.add(several(size), full.mask(axes).mask_packing(packing));
            grid.add(several(size), per_head.causal(true).mask(axes).mask_packing(packing));
        }
    }
    grid.group("all options");
    for (n, axes) in grid.some(&AXES).into_iter().enumerate() {
        let options = per_head.window(Window::keys(40)).sink_tokens(3).softcap(5.0).alibi(true).bias(axes);
        let layout = if n % 4 < 2 { Layout::Bhsd } else { Layout::Bshd };
        for size in grid.some(&TILES).into_iter().filter(distinct(axes)) {
            let options = options.mask(AXES[7 - n]).layout(layout).mask_packing(MaskPacking::Bits);
            grid.add(several(size), options).narrow_bias = n % 2 == 0;
        }
    }
    grid.group("padded batches");
    let used = |q, k| Lengths::Used { q, k };
    for lengths in grid.some(&[
        used(Some(&[113, 40]), Some(&[150, 203])),
        used(None, Some(&[9, 0])),
        used(Some(&[0, 64]), None),
        used(Some(&[65, 1]), Some(&[64, 1])),
    ]) {
        for options in [full, per_head.causal(true), stream.alignment(Alignment::TopLeft).layout(Layout::Bhsd)] {
            grid.add_lengths(several([113, 203]), options, lengths);
        }
        let options = per_head.causal(true).softcap(5.0).alibi(true).bias(Axes::ALL).mask(Axes::KEYS.batch());
        grid.add_lengths(several([113, 203]), options, lengths);
    }
    grid.group("varlen");
    let tokens = |q: &'static [u32], k: &'static [u32]| Lengths::Cumulative { q, k };
    for lengths in grid.some(&[
        // Sequences are empty on either side and on both, around tiles, or single tokens.
        tokens(&[0, 5, 5, 5, 8, 72, 105, 106], &[0, 7, 11, 11, 11, 75, 205, 206]),
        tokens(&[0, 64, 128, 129], &[0, 64, 129, 200]),
        tokens(&[0, 113], &[0, 203]),
        tokens(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], &[0, 31, 62, 63, 70, 71, 80, 90, 91, 92, 93, 99, 100]),
    ]) {
        let Lengths::Cumulative { q: [.., seq_q], k: [.., seq_k] } = lengths else {
            unreachable!("all are cumulative")
        };
        let shape = Shape { batch: 1, ..several([*seq_q as usize, *seq_k as usize]) };
        for options in [full, per_head.causal(true), stream.alignment(Alignment::TopLeft), causal.query_offset(3)] {
            grid.add_lengths(shape, options.layout(Layout::Thd), lengths);
        }
        for (bias, mask) in [(Axes::ALL, Axes::KEYS.batch()), (Axes::KEYS.heads(), Axes::KEYS.seq_q())] {
            let options = per_head.window(Window::new(30, 9)).softcap(5.0).alibi(true).bias(bias).mask(mask);
            grid.add_lengths(shape, options.layout(Layout::Thd), lengths).narrow_bias = true;
        }
    }
    grid.group("NaN in hidden keys");
    for (axes, size) in [(Axes::ALL, [113, 203]), (Axes::KEYS.batch(), [63, 65])] {
        // A mask, or a bias, hides single keys among visible ones.
        for options in [
            full.mask(axes),
            full.mask(axes).softcap(5.0),
            causal.bias(axes),
            per_head.mask(axes).bias(Axes::KEYS.heads().seq_q()),
        ] {
            grid.add(several(size), options).poisoned_keys = 20..54;
        }
    }
    // The keys are behind the end of every sequence.
    grid.add_lengths(several([113, 203]), per_head, used(None, Some(&[150, 70]))).poisoned_keys = 150..203;
    let options = causal.bias(Axes::ALL);
    grid.add_lengths(several([113, 203]), options, used(Some(&[113, 40]), Some(&[150, 70]))).poisoned_keys = 150..203;
    let window = full.window(Window::keys(17));
    for sinks in [SinkLogits::None, SinkLogits::PerHead, SinkLogits::OffByOne] {
        for (size, options, poison) in [
            // The keys are behind all queries, behind some, before the window, between the window and the sinks, or passed by the window.
            ([63, 65], causal.alignment(Alignment::TopLeft), 63..65),
            ([113, 203], causal, 183..203),
            ([113, 203], window, 0..74),
            ([113, 203], stream, 3..74),
            ([113, 203], window.layout(Layout::Bhsd), 100..101),
            ([1, 257], window, 0..240),
            // No key is visible at all.
            ([63, 65], causal.query_offset(-100), 0..65),
        ] {
            let shape = Shape { heads: 4, kv_heads: 2, ..shape(size, WIDTH) };
            grid.add(shape, options.sink_logits(sinks)).poisoned_keys = poison;
        }
    }
    grid.group("NaN in query rows");
    for d_lse in [true, false] {
        let case = grid.add_lengths(several([113, 203]), per_head, used(Some(&[80, 3]), None));
        (case.poisoned_queries, case.d_lse) = (80..113, d_lse);
    }
    for sinks in [SinkLogits::None, SinkLogits::PerHead, SinkLogits::OffByOne] {
        for (size, options, poison) in [
            // The queries see few keys, all but the last keys, keys that other queries see, too, sink tokens, or nothing.
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
    grid.group("hidden");
    for (family, n) in grid.some(&FAMILIES).into_iter().zip(0..) {
        let problem = family.problem(DType::F32, HIDDEN_SEEDS[n]).expect("the problems of all families are valid");
        let case = grid.add_problem(problem);
        (case.hidden, case.narrow_bias) = (true, family.bias == Some(BiasType::Operand));
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
    grid.group("beyond halves");
    for keys in [64, 48] {
        for unforeseen in [Unforeseen::LateGradients, Unforeseen::CancelledValues] {
            let case = grid.add(shape([96, keys], WIDTH), full);
            (case.unforeseen, case.d_lse) = (Some(unforeseen), false);
        }
    }
    grid.group("gradients that cancel");
    // The only key that a query sees has a probability of 1 whatever its score is, so d_q and d_k are zero.
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

    /// Adds a case, which the caller may change.
    fn add(&mut self, shape: Shape, options: Options) -> &mut Case {
        self.add_problem(Problem::new(shape, options).expect("the shapes and options above are valid"))
    }

    /// Like [`add`](Self::add), with lengths of sequences.
    fn add_lengths(&mut self, shape: Shape, options: Options, lengths: Lengths<'_>) -> &mut Case {
        self.add_problem(Problem::with_lengths(shape, options, lengths).expect("the lengths above are valid"))
    }

    fn add_problem(&mut self, problem: Problem) -> &mut Case {
        // About every second case has a d_lse, and the same ones in any grid.
        let even = Random::new(0, &problem.to_string()).unit() < 0.0;
        self.cases.push(Case {
            group: self.group,
            logits: 1.0,
            extreme_sinks: false,
            d_lse: even,
            narrow_bias: false,
            integers: cancels(&problem),
            problem,
            hidden: false,
            poisoned_keys: 0..0,
            poisoned_queries: 0..0,
            unforeseen: None,
        });
        let last = self.cases.len() - 1;
        &mut self.cases[last]
    }
}

/// Whether no query sees two keys or a sink. Then d_s is zero except for d_lse. It must be without rounding error, because a norm of zero
/// is nothing to compare with.
fn cancels(problem: &Problem) -> bool {
    let seen = |sequence: Sequence, i| sequence.band.visible_keys(i).iter().map(|keys| keys.len()).sum::<usize>();
    let sees_one = |sequence: Sequence| (0..sequence.band.seq_q()).all(|i| seen(sequence, i) < 2);
    problem.options().sink_logits == SinkLogits::None && problem.sequences().all(sees_one)
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
