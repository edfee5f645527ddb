//! The law of non-interference: a result keeps its bits whatever the numbers are that it does not depend on.
//!
//! ```text
//! o_i, lse_i, d_q_i              row i of q, d_o, d_lse, and the keys, values and bias that query i sees
//! d_k_j, d_v_j                   what the rows of all queries that see key j depend on
//! d_bias_e                       what the rows of all queries that see a key through element e depend on
//! d_sink_logits_h, d_slopes_h    what all rows of head h depend on; of a row that sees nothing, d_lse alone
//! ```
//!
//! A random set of queries is held. All numbers that these queries do not see are filled with other bits, and the results that depend on
//! held queries alone are compared bit for bit.

use std::ops::Range;

use super::operands::{BiasValues, MaskValues, Operands};
use super::random::Random;
use crate::{
    Alignment, Axes, DType, Element, Gradients, Inputs, Layout, Lengths, MaskData, MaskPacking, Options, Output,
    Problem, Result, Shape, SinkLogits, Upstream, Window,
};

/// The options that a kernel is compiled for. The rest of a problem is random, so few kernels see many problems.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Widths of q and k, and of v.
    pub widths: [usize; 2],
    /// Softcap and ALiBi.
    pub softcap: bool,
    pub alibi: bool,
    /// Whether there is a bias, in f32 or in the operands' element type.
    pub bias: Option<BiasType>,
    /// Whether there is a mask, in either packing.
    pub mask: Option<MaskPacking>,
    pub sink_logits: SinkLogits,
    /// Whether sequences differ in length: padded batches and thd in turn.
    pub lengths: bool,
}

/// The element type of a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BiasType {
    F32,
    Operand,
}

/// Every option, alone or with other options.
pub const FAMILIES: [Family; 6] = {
    let plain = Family {
        widths: [16, 16],
        softcap: false,
        alibi: false,
        bias: None,
        mask: None,
        sink_logits: SinkLogits::PerHead,
        lengths: false,
    };
    [
        plain,
        Family { bias: Some(BiasType::F32), mask: Some(MaskPacking::Bytes), ..plain },
        Family { lengths: true, ..plain },
        Family {
            widths: [24, 8],
            softcap: true,
            alibi: true,
            bias: Some(BiasType::Operand),
            mask: Some(MaskPacking::Bits),
            lengths: true,
            ..plain
        },
        Family { widths: [7, 5], sink_logits: SinkLogits::None, mask: Some(MaskPacking::Bits), ..plain },
        Family { sink_logits: SinkLogits::OffByOne, softcap: true, bias: Some(BiasType::F32), ..plain },
    ]
};

impl Family {
    /// A random problem of the family.
    pub fn problem(&self, dtype: DType, seed: u64) -> Result<Problem> {
        let mut random = Random::new(seed, "problem");
        let size = |random: &mut Random| match random.below(3) {
            0 => 1 + random.below(12),
            1 => 20 + random.below(50),
            _ => 64 + random.below(80),
        };
        let (seq_q, seq_k) = (size(&mut random), size(&mut random));
        let kv_heads = 1 + random.below(2);
        let shape = Shape {
            batch: 1 + random.below(2),
            heads: kv_heads * (1 + random.below(2)),
            kv_heads,
            seq_q,
            seq_k,
            head_dim: self.widths[0],
            value_dim: self.widths[1],
        };
        let mut axes = || Axes { batch: random.below(2) == 0, heads: random.below(2) == 0, seq_q: random.below(3) > 0 };
        let (bias, mask) = (axes(), axes());
        let mut options = Options::new()
            .dtype(dtype)
            .sink_logits(self.sink_logits)
            .alibi(self.alibi)
            .causal(random.below(2) == 0)
            .window(match random.below(4) {
                0 => Window::left(random.below(30)),
                1 => Window::new(random.below(40), random.below(9)),
                _ => Window::FULL,
            })
            .sink_tokens(random.below(2) * random.below(9))
            .layout(if random.below(2) == 0 { Layout::Bshd } else { Layout::Bhsd });
        if random.below(3) == 0 {
            options = options.alignment(Alignment::TopLeft);
        }
        if random.below(4) == 0 {
            options = options.query_offset(random.below(60) as i64 - 30);
        }
        if self.softcap {
            options = options.softcap(3.0);
        }
        if let Some(of) = self.bias {
            options = options.bias(bias).bias_dtype(if of == BiasType::F32 { DType::F32 } else { dtype });
        }
        if let Some(packing) = self.mask {
            options = options.mask(mask).mask_packing(packing);
        }
        if !self.lengths {
            return Problem::new(shape, options);
        }
        let mut lengths = |batch, seq| (0..batch).map(|_| random.below(seq as u64 + 1) as u32).collect::<Vec<_>>();
        if seed.is_multiple_of(2) {
            let (q, k) = (lengths(shape.batch, seq_q), lengths(shape.batch, seq_k));
            return Problem::with_lengths(shape, options, Lengths::Used { q: Some(&q), k: Some(&k) });
        }
        // There are three sequences. One of them may be empty on either side.
        let mut cumulative = |seq| {
            let mut cuts = lengths(2, seq);
            cuts.extend([0, seq as u32]);
            cuts.sort_unstable();
            cuts
        };
        let (q, k) = (cumulative(seq_q), cumulative(seq_k));
        let shape = Shape { batch: 1, ..shape };
        Problem::with_lengths(shape, options.layout(Layout::Thd), Lengths::Cumulative { q: &q, k: &k })
    }
}

/// A problem, its operands, and the gradients that flow into its results.
#[derive(Debug, Clone)]
pub struct Case<T> {
    pub problem: Problem,
    pub operands: Operands<T>,
    pub d_o: Vec<T>,
    pub d_lse: Option<Vec<f32>>,
    /// The mask in bytes, whatever its packing in the operands is.
    mask: Option<Vec<u8>>,
}

/// The results of a path.
pub type Results<T> = (Output<T>, Option<Gradients<T>>);

impl<T: Element> Case<T> {
    /// Operands of unit variance. The mask and the bias hide keys one by one and in blocks.
    pub fn random(problem: Problem, seed: u64) -> Self {
        let mut random = Random::new(seed, &problem.to_string());
        let options = *problem.options();
        let mut tensor = |shape: &[usize]| -> Vec<f32> { (0..shape.iter().product()).map(|_| random.unit()).collect() };
        let heads = [problem.shape().heads];
        let [q, k, v, d_o] = [problem.q_shape(), problem.k_shape(), problem.v_shape(), problem.o_shape()]
            .map(|shape| T::narrow(tensor(&shape)));
        let sink_logits = (options.sink_logits == SinkLogits::PerHead).then(|| tensor(&heads));
        let alibi_slopes = options.alibi.then(|| tensor(&heads).iter().map(|x| x.abs() / 8.0).collect());
        let bias = problem.bias_shape().map(|shape| tensor(&shape));
        let d_lse = (seed % 4 != 3).then(|| tensor(&problem.lse_shape()));
        let bias = bias.map(|mut bias| {
            bias.iter_mut().filter(|_| random.below(12) == 0).for_each(|x| *x = f32::NEG_INFINITY);
            match options.bias_dtype {
                DType::F32 => BiasValues::F32(bias),
                _ => BiasValues::Operand(T::narrow(bias)),
            }
        });
        let mask = mask_shape(&problem).map(|shape| {
            let blocks: Vec<usize> = (0..64).map(|_| random.below(4)).collect();
            let pair = |[b, h, i, j]: [usize; 4]| match blocks[(b * 31 + h * 17 + i / 24 * 5 + j / 40) % 64] {
                0 => 0,
                1 => 255,
                _ => u8::from(random.below(5) > 0),
            };
            places(shape).map(pair).collect::<Vec<u8>>()
        });
        let packed = mask.clone().map(|mask| match options.mask_packing {
            MaskPacking::Bytes => MaskValues::Bytes(mask),
            MaskPacking::Bits => MaskValues::Bits(MaskData::pack(&mask, keys(&problem))),
        });
        let operands = Operands { q, k, v, sink_logits, alibi_slopes, bias, mask: packed };
        Case { problem, operands, d_o, d_lse, mask }
    }

    pub fn inputs(&self) -> Inputs<'_, T> {
        self.operands.inputs()
    }

    pub fn upstream(&self) -> Upstream<'_, T> {
        Upstream { d_o: &self.d_o, d_lse: self.d_lse.as_deref() }
    }

    /// Every query of every head and sequence.
    fn queries(&self) -> Vec<Query> {
        let (problem, shape) = (&self.problem, *self.problem.shape());
        let mut queries = Vec::new();
        for (number, sequence) in problem.sequences().enumerate() {
            for (head, i) in (0..shape.heads).flat_map(|head| (0..sequence.q_rows).map(move |i| (head, i))) {
                let counts = i < sequence.band.seq_q();
                let ranges = sequence.band.visible_keys(i).into_iter().filter(|_| counts).flatten();
                let sees = |&j: &usize| {
                    let pair = [number, head, i, j];
                    let mask = self.mask.as_ref().zip(mask_shape(problem));
                    let bias = self.operands.bias.as_ref().zip(problem.bias_shape());
                    mask.is_none_or(|(mask, shape)| mask[place(shape, pair)] != 0)
                        && bias.is_none_or(|(bias, shape)| bias.at(place(shape, pair)) != f32::NEG_INFINITY)
                };
                let (row, kv_head) = (sequence.q_start + i, head / problem.heads_per_kv());
                let index = (sequence.entry * shape.heads + head) * shape.seq_q + row;
                let keys = ranges.filter(sees).map(|j| Key {
                    index: (sequence.entry * shape.kv_heads + kv_head) * shape.seq_k + sequence.k_start + j,
                    bias: problem.bias_shape().map_or(0, |shape| place(shape, [number, head, i, j])),
                });
                queries.push(Query { head, index, counts, keys: keys.collect() });
            }
        }
        queries
    }

    /// A row of q, d_o or o, by the number of a query in the order of lse, or a row of k or v, by that of a key.
    fn row(&self, heads: usize, seq: usize, width: usize, index: usize) -> Range<usize> {
        let strides = self.problem.options().layout.strides(heads, seq, width).map(|stride| stride as usize);
        let at = [index / seq / heads, index / seq % heads, index % seq];
        let start = at.iter().zip(strides).map(|(at, stride)| at * stride).sum();
        start..start + width
    }

    fn query_row(&self, width: usize, index: usize) -> Range<usize> {
        let shape = self.problem.shape();
        self.row(shape.heads, shape.seq_q, width, index)
    }

    fn key_row(&self, width: usize, index: usize) -> Range<usize> {
        let shape = self.problem.shape();
        self.row(shape.kv_heads, shape.seq_k, width, index)
    }

    /// The case with other bits in all numbers that the held queries do not depend on.
    fn filled(&self, queries: &[Query], held: &[bool], fill: Fill, random: &mut Random) -> Self {
        let (shape, mut filled) = (*self.problem.shape(), self.clone());
        let [queries_of_lse, keys] =
            [shape.batch * shape.heads * shape.seq_q, shape.batch * shape.kv_heads * shape.seq_k];
        let mut rows = vec![false; queries_of_lse];
        let mut lse = vec![false; queries_of_lse];
        let mut heads = vec![false; shape.heads];
        let mut seen = vec![false; keys];
        let mut bias = vec![false; self.problem.bias_shape().map_or(0, |shape| shape.iter().product())];
        // A bias of -infinity that hides a key from a held query must stay.
        let mut hiding = bias.clone();
        for (query, _) in queries.iter().zip(held).filter(|(query, held)| **held && query.counts) {
            heads[query.head] = true;
            let sees = !query.keys.is_empty();
            rows[query.index] |= sees;
            lse[query.index] |= sees || self.operands.sink_logits.is_some();
            for key in &query.keys {
                seen[key.index] = true;
                bias.get_mut(key.bias).into_iter().for_each(|seen| *seen = true);
            }
        }
        hiding.iter_mut().enumerate().for_each(|(n, hides)| {
            *hides = self.operands.bias.as_ref().is_some_and(|bias| bias.at(n) == f32::NEG_INFINITY);
        });
        for index in (0..queries_of_lse).filter(|&index| !rows[index]) {
            fill.bits(&mut filled.operands.q[self.query_row(shape.head_dim, index)], random);
            fill.bits(&mut filled.d_o[self.query_row(shape.value_dim, index)], random);
        }
        for index in (0..queries_of_lse).filter(|&index| !lse[index]) {
            fill.bits(filled.d_lse.iter_mut().flat_map(|d_lse| &mut d_lse[index..index + 1]), random);
        }
        for index in (0..keys).filter(|&index| !seen[index]) {
            fill.bits(&mut filled.operands.k[self.key_row(shape.head_dim, index)], random);
            fill.bits(&mut filled.operands.v[self.key_row(shape.value_dim, index)], random);
        }
        for head in (0..shape.heads).filter(|&head| !heads[head]) {
            for of_heads in [&mut filled.operands.sink_logits, &mut filled.operands.alibi_slopes].into_iter().flatten()
            {
                fill.bits(&mut of_heads[head..head + 1], random);
            }
        }
        for n in (0..bias.len()).filter(|&n| !bias[n] && !hiding[n]) {
            match &mut filled.operands.bias {
                Some(BiasValues::F32(bias)) => fill.bits(&mut bias[n..n + 1], random),
                Some(BiasValues::Operand(bias)) => fill.bits(&mut bias[n..n + 1], random),
                None => {}
            }
        }
        filled
    }

    /// The first result that depends on held queries alone, but has other bits.
    fn difference(&self, queries: &[Query], held: &[bool], before: &Results<T>, after: &Results<T>) -> Option<String> {
        let shape = *self.problem.shape();
        let (mut seen, mut heads) = (vec![true; shape.batch * shape.kv_heads * shape.seq_k], vec![true; shape.heads]);
        let mut bias = vec![true; self.problem.bias_shape().map_or(0, |shape| shape.iter().product())];
        for (query, _) in queries.iter().zip(held).filter(|(query, held)| !**held && query.counts) {
            heads[query.head] = false;
            for key in &query.keys {
                seen[key.index] = false;
                bias.get_mut(key.bias).into_iter().for_each(|kept| *kept = false);
            }
        }
        let kept = |rows: &[bool]| (0..rows.len()).filter(|&index| rows[index]).collect::<Vec<_>>();
        let (keys, heads, bias) = (kept(&seen), kept(&heads), kept(&bias));
        let rows: Vec<usize> =
            queries.iter().zip(held).filter(|(_, held)| **held).map(|(query, _)| query.index).collect();
        let ((output, gradients), (output_after, gradients_after)) = (before, after);
        let of_queries = |width| rows.iter().map(move |&index| self.query_row(width, index));
        let of_keys = |width| keys.iter().map(move |&index| self.key_row(width, index));
        let singles = |rows: &[usize]| rows.iter().map(|&n| n..n + 1).collect::<Vec<_>>();
        let wide = |x: &Option<Vec<i16>>| x.iter().flatten().map(|&x| f32::from(x)).collect::<Vec<_>>();
        let output = other_bits("o", &output.o, &output_after.o, of_queries(shape.value_dim))
            .or_else(|| other_bits("lse", &output.lse, &output_after.lse, singles(&rows)))
            .or_else(|| {
                let (before, after) = (wide(&output.o_lo), wide(&output_after.o_lo));
                let rows = of_queries(shape.value_dim).filter(|_| !before.is_empty());
                other_bits("o_lo", &before, &after, rows)
            });
        let (Some(g), Some(after)) = (gradients, gradients_after) else { return output };
        let optional = |name, before: &Option<Vec<f32>>, after: &Option<Vec<f32>>, rows: &[usize]| {
            before.as_ref().zip(after.as_ref()).and_then(|(x, y)| other_bits(name, x, y, singles(rows)))
        };
        output
            .or_else(|| other_bits("d_q", &g.d_q, &after.d_q, of_queries(shape.head_dim)))
            .or_else(|| other_bits("d_k", &g.d_k, &after.d_k, of_keys(shape.head_dim)))
            .or_else(|| other_bits("d_v", &g.d_v, &after.d_v, of_keys(shape.value_dim)))
            .or_else(|| optional("d_sink_logits", &g.d_sink_logits, &after.d_sink_logits, &heads))
            .or_else(|| optional("d_alibi_slopes", &g.d_alibi_slopes, &after.d_alibi_slopes, &heads))
            .or_else(|| optional("d_bias", &g.d_bias, &after.d_bias, &bias))
    }

    /// Checks that other values of a query, and of the keys that it sees, change its results and those of its keys.
    fn control(&self, query: &Query, before: &Results<T>, after: &Results<T>) -> Option<String> {
        let (d, e) = (self.problem.shape().head_dim, self.problem.shape().value_dim);
        let same =
            |x: &[T], y: &[T], rows: &mut dyn Iterator<Item = Range<usize>>| other_bits("", x, y, rows).is_none();
        let own = |width| [self.query_row(width, query.index)].into_iter();
        let theirs = |width| query.keys.iter().map(move |key| self.key_row(width, key.index));
        if same(&before.0.o, &after.0.o, &mut own(e)) {
            return Some("o is the same with other values".into());
        }
        let (Some(before), Some(after)) = (&before.1, &after.1) else { return None };
        if same(&before.d_v, &after.d_v, &mut theirs(e)) {
            return Some("d_v is the same with another d_o".into());
        }
        // With one key and no sink both gradients are 0.
        let cancels = query.keys.len() < 2;
        if !cancels && (same(&before.d_q, &after.d_q, &mut own(d)) || same(&before.d_k, &after.d_k, &mut theirs(d))) {
            return Some("d_q or d_k is the same with other values and another d_o".into());
        }
        None
    }
}

/// Checks the law on a computation of a case. Returns the number of controls. A case in which no query sees a key has none.
///
/// # Errors
/// The result that has other bits, or the error of the computation.
pub fn law<T: Element>(
    case: &Case<T>,
    seed: u64,
    compute: impl Fn(&Case<T>) -> Result<Results<T>>,
) -> std::result::Result<usize, String> {
    let run = |case: &Case<T>| compute(case).map_err(|error| error.to_string());
    let mut random = Random::new(seed, "law");
    let (queries, before) = (case.queries(), run(case)?);
    for fill in [Fill::Bits, Fill::Large, Fill::NotFinite] {
        let holds = Holds::random(&mut random, case, fill);
        for holds in [Holds::All, holds] {
            let held: Vec<bool> = queries.iter().map(|query| holds.query(case, query, &mut random)).collect();
            let filled = case.filled(&queries, &held, fill, &mut random);
            if let Some(difference) = case.difference(&queries, &held, &before, &run(&filled)?) {
                return Err(format!("{difference}, though nothing but unseen numbers differs ({fill:?}, {holds:?})"));
            }
        }
    }
    let seeing: Vec<&Query> = queries.iter().filter(|query| !query.keys.is_empty()).collect();
    if seeing.is_empty() {
        return Ok(0);
    }
    let query = seeing[random.below(seeing.len() as u64)];
    let mut changed = case.clone();
    let add = |x: &mut [T], range: Range<usize>| x[range].iter_mut().for_each(|x| *x = T::from_f32(x.to_f32() + 2.0));
    let value_dim = case.problem.shape().value_dim;
    add(&mut changed.d_o, case.query_row(value_dim, query.index));
    for key in &query.keys {
        add(&mut changed.operands.v, case.key_row(value_dim, key.index));
    }
    case.control(query, &before, &run(&changed)?).map_or(Ok(1), Err)
}

/// A query of a head of a sequence.
struct Query {
    head: usize,
    /// Place in lse.
    index: usize,
    /// Whether the query is within the length of its sequence.
    counts: bool,
    keys: Vec<Key>,
}

/// A key that a query sees.
struct Key {
    /// Number in the order of batch, head and position.
    index: usize,
    /// The element of the bias that is added to their score.
    bias: usize,
}

/// The set of queries that are held.
#[derive(Debug, Clone, Copy)]
enum Holds {
    All,
    Before(usize),
    Head(usize),
    Entry(usize),
    Half,
}

impl Holds {
    fn random<T>(random: &mut Random, case: &Case<T>, fill: Fill) -> Self {
        let shape = case.problem.shape();
        let mut below = |count: usize| random.below(count as u64);
        match (below(4) + fill as usize) % 4 {
            0 => Holds::Before(below(shape.seq_q + 1)),
            1 => Holds::Head(below(shape.heads)),
            2 => Holds::Entry(below(shape.batch)),
            _ => Holds::Half,
        }
    }

    fn query<T>(self, case: &Case<T>, query: &Query, random: &mut Random) -> bool {
        let shape = case.problem.shape();
        match self {
            Holds::All => true,
            Holds::Before(end) => query.index % shape.seq_q < end,
            Holds::Head(head) => query.head == head,
            Holds::Entry(entry) => query.index / shape.seq_q / shape.heads == entry,
            Holds::Half => random.below(2) == 0,
        }
    }
}

/// The replacement of unseen numbers. Each kind is tested by itself, because NaN may hide the effect of large numbers.
#[derive(Debug, Clone, Copy)]
enum Fill {
    /// Arbitrary bits.
    Bits,
    /// Finite numbers up to the largest one, and the smallest one.
    Large,
    NotFinite,
}

impl Fill {
    fn bits<'a, T: Element>(self, x: impl IntoIterator<Item = &'a mut T>, random: &mut Random) {
        for x in x {
            let bits = (random.bits() << 24 | random.bits()) as u32;
            let of = |bits: u32| bytemuck::pod_read_unaligned::<T>(&bits.to_le_bytes()[..size_of::<T>()]);
            let one_of = |numbers: [f32; 4]| T::from_f32(numbers[bits as usize % 4]);
            // The number just below infinity, and the smallest one above 0.
            let infinity = T::from_f32(f32::INFINITY);
            let mut word = [0; 4];
            word[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&infinity));
            let largest = of(u32::from_le_bytes(word) - 1);
            *x = match self {
                Fill::Bits => of(bits),
                Fill::Large => match bits >> 8 & 7 {
                    0 => of(1),
                    1 => T::from_f32(-largest.to_f32()),
                    2 | 3 => largest,
                    // A fraction of the largest number.
                    n => T::from_f32(largest.to_f32() / (1u32 << (2 * n)) as f32),
                },
                Fill::NotFinite => one_of([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN]),
            };
        }
    }
}

/// The first row in which two tensors have different bits.
fn other_bits<T: Element>(
    name: &str,
    before: &[T],
    after: &[T],
    rows: impl IntoIterator<Item = Range<usize>>,
) -> Option<String> {
    if before.len() != after.len() {
        return Some(format!("{name} has {} elements, not {}", after.len(), before.len()));
    }
    let mut elements = rows.into_iter().flatten();
    let n = elements.find(|&n| bytemuck::bytes_of(&before[n]) != bytemuck::bytes_of(&after[n]))?;
    Some(format!("element {n} of {name} is {:?}, not {:?}", after[n].to_f32(), before[n].to_f32()))
}

/// Keys of the longest sequence.
fn keys(problem: &Problem) -> usize {
    problem.sequences().map(|sequence| sequence.k_rows).max().unwrap_or(0)
}

/// The shape of the mask in bytes, whatever its packing is.
fn mask_shape(problem: &Problem) -> Option<[usize; 4]> {
    let [batch, heads, seq_q, _] = problem.mask_shape()?;
    Some([batch, heads, seq_q, keys(problem)])
}

/// All places of a shape in their order.
fn places([batch, heads, seq_q, seq_k]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    let place = move |n: usize| [n / seq_k / seq_q / heads, n / seq_k / seq_q % heads, n / seq_k % seq_q, n % seq_k];
    (0..batch * heads * seq_q * seq_k).map(place)
}

/// The place of a pair in a tensor that is broadcast along its axes of size 1.
fn place(shape: [usize; 4], pair: [usize; 4]) -> usize {
    shape.into_iter().zip(pair).fold(0, |place, (size, n)| place * size + if size == 1 { 0 } else { n })
}
