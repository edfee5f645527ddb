//! `sink-attention bench --decode`: decoding from caches.

use std::cell::RefCell;
use std::error::Error;
use std::fmt;

use serde::Serialize;
use sink_attention::cache::{
    AppendBuffers, CacheConfig, CacheKind, Decode, DecodeBuffers, DecodeTiling, KvCache, PreparedAppend,
    PreparedDecode, Quantisation, Rotary, RotaryPositions, RotaryStyle, TreeMask,
};
use sink_attention::device::is_software;
use sink_attention::timing::{Clock, Series, Timer};
use sink_attention::{Attention, DType, Device, Options, Problem, Shape, SinkLogits, Window};

use super::{Bench, MOST, QUICK};
use crate::shared::Progress;
use sink_attention::testing::buffers::filled;

/// Tokens of one append while a cache is filled.
const CHUNK: usize = 4096;

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    device: String,
    device_reason: String,
    driver: String,
    clock: String,
    rows: Vec<Row>,
}

/// The measurements of one cache.
#[derive(Debug, Serialize)]
struct Row {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    seq_k: usize,
    head_dim: usize,
    value_dim: usize,
    dtype: String,
    cache: String,
    alibi: bool,
    tree: bool,
    tiling: String,
    workgroups: u64,
    decode: Times,
    /// Counts keys and values alone.
    gb_per_s: f64,
    /// An append and a decoding step.
    step: Times,
    append: Times,
}

#[derive(Debug, Serialize)]
struct Times {
    median_us: f64,
    min_us: f64,
    max_us: f64,
}

impl Times {
    fn new(series: &Series) -> Self {
        let [median_us, min_us, max_us] =
            [series.median(), series.min(), series.max()].map(|time| time.as_secs_f64() * 1e6);
        Times { median_us, min_us, max_us }
    }
}

/// Three digits, or more if more are before the point.
fn rate(gb_per_s: f64) -> String {
    let decimals = match gb_per_s {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{gb_per_s:.decimals$}")
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { version, device, device_reason, driver, clock, rows } = self;
        writeln!(
            f,
            "sink-attention {version} on {device} ({device_reason}), {driver}\ntimes by {clock}: median (min to max), microseconds\n"
        )?;
        for row in rows {
            let Row { batch, heads, kv_heads, queries, seq_k, head_dim, value_dim, dtype, cache, .. } = row;
            let us = |t: &Times| format!("{:.1} ({:.1} to {:.1})", t.median_us, t.min_us, t.max_us);
            writeln!(
                f,
                "B={batch} H={heads} G={kv_heads} M={queries} N={seq_k} D={head_dim} E={value_dim} {dtype}, {cache}"
            )?;
            writeln!(
                f,
                "  decode {}, {} GB/s; {}, {} workgroups",
                us(&row.decode),
                rate(row.gb_per_s),
                row.tiling,
                row.workgroups
            )?;
            writeln!(f, "  append {}; step {}", us(&row.append), us(&row.step))?;
        }
        Ok(())
    }
}

/// A case to measure: a batch, its keys, and all that the arguments say.
#[derive(Clone, Copy)]
struct Case<'a> {
    args: &'a Bench,
    batch: usize,
    seq_k: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    widths: [usize; 2],
    dtype: DType,
}

pub fn execute(args: &Bench, attention: &Attention) -> Result<(), Box<dyn Error>> {
    let device = attention.device().ok_or(sink_attention::Error::NeedsGpu { call: "bench --decode" })?;
    let timer = Timer::new(device)?;
    let shape = &args.shape;
    let info = device.wgpu().adapter_info();
    let shorter = if args.quick || is_software(&info) { QUICK } else { 1 };
    let batches: Vec<[usize; 2]> = match (shape.batch, shape.seq_k) {
        (None, None) => [[1, 131_072], [8, 131_072], [1, 4096]].map(|[batch, seq]| [batch, seq / shorter]).into(),
        (batch, seq) => vec![[batch.unwrap_or(1), seq.unwrap_or(131_072 / shorter)]],
    };
    let head_dim = shape.head_dim.unwrap_or(64);
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: attention.device_name(),
        device_reason: attention.device_reason().to_string(),
        driver: format!("{} {}", info.driver, info.driver_info),
        clock: timer.clock().to_string(),
        rows: Vec::new(),
    };
    let cases = batches.iter().flat_map(|&[batch, seq_k]| {
        args.dtype.iter().map(move |dtype| Case {
            args,
            batch,
            seq_k,
            heads: shape.heads.unwrap_or(64),
            kv_heads: shape.kv_heads.unwrap_or(8),
            queries: shape.seq_q.unwrap_or(1),
            widths: [head_dim, shape.value_dim.unwrap_or(head_dim)],
            dtype: DType::from(*dtype),
        })
    });
    let kinds = || std::iter::once(None).chain(args.page_size.iter().copied().map(Some));
    let cases: Vec<(Case<'_>, Option<usize>)> =
        cases.flat_map(|case| kinds().map(move |page_size| (case, page_size))).collect();
    cases.iter().try_for_each(|(case, page_size)| case.check(*page_size))?;
    let progress = Progress::new(cases.len())?;
    let mut failed = None;
    for (case, page_size) in &cases {
        let Case { dtype, batch, seq_k, .. } = case;
        progress.begin(format!("decoding {dtype}, batch {batch}, {seq_k} keys, {}", cache_name(*page_size)));
        match case.measure(attention, device, &timer, *page_size) {
            Ok(row) => report.rows.push(row),
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
        progress.end();
    }
    progress.finish();
    // Measurements before a failure are reported, too.
    if failed.is_none() || !report.rows.is_empty() {
        args.write(&report, || Ok(String::new()))?;
    }
    failed.map_or(Ok(()), Err)
}

fn cache_name(page_size: Option<usize>) -> String {
    page_size.map_or("contiguous".into(), |size| format!("pages of {size}"))
}

impl Case<'_> {
    /// Tokens that fill a cache, and tokens that are appended while steps and appends are measured.
    fn capacity(&self) -> usize {
        let appended = (2 * self.args.runs as usize).saturating_mul(self.queries);
        self.seq_k.saturating_add(appended)
    }

    fn config(&self, page_size: Option<usize>) -> CacheConfig {
        let [head_dim, value_dim] = self.widths;
        let capacity = self.capacity();
        let kind = match page_size {
            None => CacheKind::Contiguous { capacity },
            Some(page_size) => {
                let sequence_pages = capacity.div_ceil(page_size.max(1));
                CacheKind::Paged { page_size, pages: sequence_pages * self.batch, sequence_pages }
            }
        };
        let rotary = Rotary {
            dim: (head_dim / 2 * 2) as u32,
            style: RotaryStyle::HalfSplit,
            positions: RotaryPositions::Absolute,
        };
        CacheConfig::new(kind, self.batch, self.kv_heads, head_dim)
            .value_dim(value_dim)
            .dtype(self.dtype)
            .rotary((rotary.dim > 0 && !self.args.tree).then_some(rotary))
            .quantisation(self.args.quantised.then_some(Quantisation::Q8_0))
    }

    /// Refuses wrong numbers before anything is computed from them.
    fn check(&self, page_size: Option<usize>) -> sink_attention::Result<()> {
        let Case { batch, heads, kv_heads, queries, .. } = *self;
        let ([head_dim, value_dim], seq_k) = (self.widths, self.capacity());
        let shape = Shape { batch, heads, kv_heads, seq_q: queries, seq_k, head_dim, value_dim };
        Problem::new(shape, self.options())?;
        self.config(page_size).check()
    }

    fn options(&self) -> Options {
        let shape = &self.args.shape;
        Options::new()
            .causal(true)
            .window(shape.window.map_or(Window::FULL, Window::keys))
            .sink_tokens(shape.sink_tokens)
            .sink_logits(SinkLogits::from(shape.sinks))
            .alibi(self.args.alibi)
            .dtype(self.dtype)
    }

    /// Bytes of the keys and values that a query sees.
    fn bytes(&self) -> f64 {
        let shape = &self.args.shape;
        let seen =
            shape.window.map_or(self.seq_k, |window| (window + self.queries - 1 + shape.sink_tokens).min(self.seq_k));
        let row = |width: usize| match self.args.quantised {
            true => width + 2 * width.div_ceil(32),
            false => width * self.dtype.bytes(),
        };
        (self.batch * seen * self.kv_heads) as f64 * self.widths.map(row).iter().sum::<usize>() as f64
    }

    fn measure(
        &self,
        attention: &Attention,
        device: &Device,
        timer: &Timer,
        page_size: Option<usize>,
    ) -> Result<Row, Box<dyn Error>> {
        let config = self.config(page_size);
        let [head_dim, value_dim] = self.widths;
        let mut cache = attention.create_cache(&config)?;
        let chunk = CHUNK.min(self.seq_k);
        let tokens = self.batch * chunk.max(self.queries);
        let [k, v, q] = filled(
            device,
            self.dtype,
            [
                [1, tokens, self.kv_heads, head_dim],
                [1, tokens, self.kv_heads, value_dim],
                [self.batch, self.queries, self.heads, head_dim],
            ],
        )?;
        let dim = config.rotary.map_or(1, |rotary| rotary.dim as usize);
        let [cos_sin, sinks] = filled(device, DType::F32, [[1, 1, self.capacity(), dim], [1, 1, 1, self.heads]])?;
        let o = device.zeros("o", self.dtype, &[self.batch, self.queries, self.heads, value_dim])?;
        let lse = device.zeros("lse", DType::F32, &[self.batch, self.queries, self.heads])?;
        let cos_sin = config.rotary.map(|_| cos_sin.wgpu());
        if let CacheKind::Paged { sequence_pages, .. } = config.kind {
            // The pages of a sequence are far from each other, as in a cache that has been in use for long.
            let total = sequence_pages * self.batch;
            let stride = (total / 2..).find(|stride| gcd(*stride, total) == 1).unwrap_or(1);
            let mut step = attention.step()?.label("pages");
            for sequence in 0..self.batch {
                let first = sequence * sequence_pages;
                let pages: Vec<u32> = (first..first + sequence_pages).map(|n| (n * stride % total) as u32).collect();
                cache.assign(&mut step, sequence, &pages, 0)?;
            }
            step.submit()?;
        }
        let buffers = AppendBuffers::new(&k, &v).cos_sin(cos_sin);
        for (chunk, times) in [(chunk, self.seq_k / chunk.max(1)), (self.seq_k % chunk.max(1), 1)] {
            let append = cache.prepare_append(&vec![chunk; self.batch], &buffers)?;
            for _ in 0..times {
                let mut step = attention.step()?.label("prompt");
                append.encode(&mut cache, &mut step)?;
                step.submit()?;
            }
        }

        // Decoding is also timed by itself, with queries that no append has rotated.
        let decode = Decode::new(self.heads, self.options()).queries(self.queries).q_rotated(true);
        let decode = decode.tiling(self.args.decode_tiling);
        let per_head = decode.options.sink_logits == SinkLogits::PerHead;
        let decode = decode.tree_mask(self.args.tree.then_some(TreeMask::Shared));
        let parents: Vec<Option<usize>> = (0..self.queries).map(|token| token.checked_sub(1).map(|n| n / 2)).collect();
        let words = if self.args.tree { TreeMask::of_parents(&parents)? } else { vec![0] };
        let words = device.upload("tree_mask", &words)?;
        let slopes: Vec<f32> =
            (0..self.heads).map(|head| (-8.0 * (head + 1) as f32 / self.heads as f32).exp2()).collect();
        let slopes = device.upload("alibi_slopes", &slopes)?;
        let operands = DecodeBuffers::new(&q, &o, &lse)
            .sink_logits(per_head.then(|| sinks.view()))
            .alibi_slopes(self.args.alibi.then(|| slopes.view()))
            .tree_mask(self.args.tree.then(|| words.view()));
        let decoding = cache.prepare_decode(&decode, &operands)?;
        let q = config.rotary.map(|_| (q.view(), self.heads));
        let appending = cache.prepare_append(&vec![self.queries; self.batch], &buffers.q(q))?;
        self.series(timer, &RefCell::new(cache), &decoding, &appending, page_size)
    }

    fn series(
        &self,
        timer: &Timer,
        cache: &RefCell<KvCache>,
        decoding: &PreparedDecode,
        appending: &PreparedAppend,
        page_size: Option<usize>,
    ) -> Result<Row, Box<dyn Error>> {
        let runs =
            if timer.clock() == Clock::Timestamps { self.args.runs as usize } else { self.args.runs.min(5) as usize };
        let failed = RefCell::new(None);
        let note = |result: sink_attention::Result<()>| {
            if let Err(error) = result {
                failed.borrow_mut().get_or_insert(error);
            }
        };
        let decode = timer.measure_steps(runs, MOST, |pass| note(decoding.encode_in(&cache.borrow(), pass)))?;
        // The device is warm by now. Each run makes the sequences longer, so there are only as many runs as are counted.
        let step = timer.time_steps(runs, |pass| {
            note(appending.encode_in(&mut cache.borrow_mut(), pass));
            note(decoding.encode_in(&cache.borrow(), pass));
        })?;
        let append = timer.time_steps(runs, |pass| note(appending.encode_in(&mut cache.borrow_mut(), pass)))?;
        if let Some(error) = failed.into_inner() {
            return Err(error.into());
        }
        let none = || sink_attention::Error::Gpu { during: "timing", message: "no run was timed".into() };
        let [step, append] = [step, append].map(Series::new);
        let [head_dim, value_dim] = self.widths;
        let tiling: DecodeTiling = decoding.tiling();
        Ok(Row {
            batch: self.batch,
            heads: self.heads,
            kv_heads: self.kv_heads,
            queries: self.queries,
            seq_k: self.seq_k,
            head_dim,
            value_dim,
            dtype: format!("{}{}", self.dtype, if self.args.quantised { " q8_0" } else { "" }),
            cache: cache_name(page_size),
            alibi: self.args.alibi,
            tree: self.args.tree,
            tiling: tiling.to_string(),
            workgroups: decoding.workgroups(&cache.borrow()),
            gb_per_s: self.bytes() / decode.median().as_secs_f64() * 1e-9,
            decode: Times::new(&decode),
            step: Times::new(&step.ok_or_else(none)?),
            append: Times::new(&append.ok_or_else(none)?),
        })
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::rate;

    #[test]
    fn rates_have_digits() {
        for (gb_per_s, text) in [(0.0123, "0.012"), (0.49, "0.490"), (1.236, "1.24"), (45.67, "45.7"), (3210.4, "3210")]
        {
            assert_eq!(rate(gb_per_s), text);
        }
    }
}
