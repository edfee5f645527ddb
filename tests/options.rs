//! What makes scores more than products (softcap, ALiBi, bias), hides single pairs (boolean mask, bias) and sequences of
//! different lengths, on the GPU against the definition: both passes, every element type, every micro-kernel.

mod common;

use common::gpu;
use common::gradients::Backward;
use common::operands::agree;
use sink_attention::cpu::reference;
use sink_attention::half::{bf16, f16};
use sink_attention::{
    Attention, Axes, Element, Layout, Lengths, MaskPacking, Options, Output, Problem, Shape, SinkLogits, Window,
};

/// Every option with every other one, and each kind of broadcasting.
fn score_options() -> Vec<Options> {
    let new = Options::new();
    let per_head = new.sink_logits(SinkLogits::PerHead);
    let keys = Axes::KEYS;
    vec![
        new.softcap(1.5),
        per_head.alibi(true).causal(true),
        new.bias(Axes::ALL),
        new.mask(Axes::ALL),
        per_head.bias(keys).causal(true),
        new.bias(keys.seq_q()).layout(Layout::Bhsd),
        new.bias(keys.heads()).window(Window::keys(30)).sink_tokens(3),
        per_head.bias(keys.batch().seq_q()).softcap(0.7),
        per_head.mask(keys).causal(true),
        new.mask(keys.batch()).mask_packing(MaskPacking::Bits),
        new.mask(keys.heads().seq_q()).window(Window::new(20, 50)).mask_packing(MaskPacking::Bits),
        per_head.mask(keys.seq_q()).layout(Layout::Bhsd),
        per_head.alibi(true).softcap(2.0).window(Window::keys(40)).query_offset(-7),
        per_head.alibi(true).bias(Axes::ALL).mask(keys.batch().heads()).softcap(1.1).causal(true).scale(-0.4),
        new.mask(Axes::ALL).window(Window::keys(20)).sink_tokens(70),
    ]
}

fn shape(seq: [usize; 2], width: [usize; 2]) -> Shape {
    let ([seq_q, seq_k], [head_dim, value_dim]) = (seq, width);
    Shape { batch: 2, heads: 4, kv_heads: 2, seq_q, seq_k, head_dim, value_dim }
}

/// Dense problems.
fn dense<T: Element>() -> Vec<Problem> {
    let sizes = [([113, 203], [32, 48]), ([1, 130], [33, 16]), ([70, 64], [64, 64])];
    let mut problems = Vec::new();
    for options in score_options() {
        for (seq, width) in sizes {
            let dtypes =
                if options.bias.is_some() { vec![Default::default(), T::DTYPE] } else { vec![Default::default()] };
            for bias_dtype in dtypes {
                let options = options.dtype(T::DTYPE).bias_dtype(bias_dtype);
                problems.push(Problem::new(shape(seq, width), options).unwrap());
            }
        }
    }
    problems
}

/// Sequences of different lengths, empty ones among them, with and without what changes scores.
fn lengths<T: Element>() -> Vec<Problem> {
    let new = Options::new().dtype(T::DTYPE);
    let per_head = new.sink_logits(SinkLogits::PerHead);
    let options = [
        new,
        per_head.causal(true),
        per_head.window(Window::keys(17)).sink_tokens(3),
        new.alibi(true).causal(true),
        per_head.bias(Axes::ALL),
        per_head.mask(Axes::KEYS.batch()).softcap(1.3),
        new.bias(Axes::KEYS.heads()).mask(Axes::KEYS.seq_q()).alibi(true),
    ];
    let cumulative =
        [(vec![0, 70, 70, 71, 200, 233], vec![0, 90, 100, 100, 229, 262]), (vec![0, 1, 2, 3, 40], vec![0, 0, 5, 6, 6])];
    let mut problems = Vec::new();
    for options in options {
        for (q, k) in &cumulative {
            let last = |n: &Vec<u32>| *n.last().unwrap() as usize;
            let shape = Shape { batch: 1, ..shape([last(q), last(k)], [32, 48]) };
            let lengths = Lengths::Cumulative { q, k };
            problems.push(Problem::with_lengths(shape, options.layout(Layout::Thd), lengths).unwrap());
        }
        for (layout, q, k) in [
            (Layout::Bshd, Some(&[75u32, 3][..]), Some(&[100u32, 60][..])),
            (Layout::Bhsd, None, Some(&[0, 100])),
            (Layout::Bshd, Some(&[0, 80]), None),
        ] {
            let lengths = Lengths::Used { q, k };
            problems.push(Problem::with_lengths(shape([80, 100], [32, 16]), options.layout(layout), lengths).unwrap());
        }
    }
    problems
}

/// Holds both passes against the definition, and the backward pass with and without what rounding took from o.
fn check<T: Element>(attention: &Attention, problem: &Problem, seed: u64) {
    let case: Backward<T> = Backward::random(problem, seed).cast();
    let inputs = case.operands.inputs();
    let output = attention.forward(problem, &inputs).unwrap_or_else(|error| panic!("{problem}: {error}"));
    agree(&output, &reference::forward(problem, &inputs).unwrap()).unwrap_or_else(|error| panic!("{problem}: {error}"));
    let expected = case.expected(problem);
    let exact = Output { o_rest: None, ..output.clone() };
    for saved in [&exact, &output] {
        let gradients = case.run_with(attention, problem, saved);
        case.agree(&gradients, &expected).unwrap_or_else(|error| panic!("{problem}: {error}"));
    }
}

fn check_all<T: Element>(problems: &[Problem]) {
    let Some(attention) = gpu() else { return };
    for (seed, problem) in problems.iter().enumerate() {
        check::<T>(attention, problem, seed as u64);
    }
}

#[test]
fn options_in_f32() {
    check_all::<f32>(&dense::<f32>());
}

#[test]
fn options_in_f16() {
    check_all::<f16>(&dense::<f16>());
}

#[test]
fn options_in_bf16() {
    check_all::<bf16>(&dense::<bf16>());
}

#[test]
fn lengths_in_f32() {
    check_all::<f32>(&lengths::<f32>());
}

#[test]
fn lengths_in_f16() {
    check_all::<f16>(&lengths::<f16>());
}

#[test]
fn lengths_in_bf16() {
    check_all::<bf16>(&lengths::<bf16>());
}
