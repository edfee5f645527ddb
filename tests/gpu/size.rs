//! Operands beyond a binding, and passes beyond the time of a dispatch: cut into pieces, with the same bits.

use std::time::Duration;

use crate::common::buffers::gpu_with;
use crate::common::{cooperative, gpu};
use sink_attention::half::{bf16, f16};
use sink_attention::plan::DeviceClass;
use sink_attention::plan::MicroKernel;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{Operands, agree, problem};
use sink_attention::{
    Attention, Axes, Element, Gradients, Layout, Lengths, Options, Output, Problem, Shape, SinkLogits, Window,
};

type Results<T> = (Output<T>, [Gradients<T>; 2]);

/// Both passes, the second one also without what rounding took from o.
fn run<T: Element>(attention: &Attention, problem: &Problem, case: &Backward<T>) -> Results<T> {
    let forward = |error| panic!("{problem}: {error}");
    let output = attention.forward(problem, &case.operands.inputs()).unwrap_or_else(forward);
    let exact = output.clone().o_lo(None);
    let gradients = [&output, &exact].map(|saved| case.run_with(attention, problem, saved));
    (output, gradients)
}

/// Every kind of operand, on few rows and on many.
fn problems<T: Element>() -> Vec<Problem> {
    let new = Options::new().dtype(T::DTYPE);
    let sinks = new.sink_logits(SinkLogits::PerHead);
    let window = sinks.window(Window::keys(20)).sink_tokens(3);
    let dense = |seq, width, options| problem([3, 4, 2], seq, width, options);
    let thd = |options: Options| {
        let shape = Shape { batch: 1, heads: 4, kv_heads: 2, seq_q: 233, seq_k: 262, head_dim: 16, value_dim: 16 };
        let (q, k) = (&[0, 70, 70, 71, 200, 233], &[0, 90, 100, 100, 229, 262]);
        Problem::with_lengths(shape, options.layout(Layout::Thd), Lengths::Cumulative { q, k }).unwrap()
    };
    let shape = Shape { batch: 3, heads: 4, kv_heads: 2, seq_q: 150, seq_k: 130, head_dim: 16, value_dim: 16 };
    let padded = Lengths::Used { q: Some(&[150, 3, 0]), k: Some(&[0, 130, 77]) };
    vec![
        dense([300, 300], [16, 16], window.layout(Layout::Bhsd)),
        dense([300, 300], [16, 16], window.sink_tokens(0)),
        dense([203, 250], [9, 7], sinks.causal(true).layout(Layout::Bhsd)),
        dense([130, 70], [16, 16], new.alibi(true).softcap(2.0).window(Window::new(30, 5)).layout(Layout::Bhsd)),
        dense(
            [100, 90],
            [16, 16],
            sinks.bias(Axes::KEYS.batch().seq_q()).mask(Axes::KEYS.batch().seq_q()).layout(Layout::Bhsd),
        ),
        thd(window),
        thd(sinks.causal(true).alibi(true)),
        Problem::with_lengths(shape, window.layout(Layout::Bhsd), padded).unwrap(),
    ]
}

/// Holds cut passes against those of one dispatch, bit by bit.
fn hold<T: Element>(whole: &Attention, cut: &[(&str, Attention)]) {
    for (seed, problem) in problems::<T>().iter().enumerate() {
        let case: Backward<T> = Backward::random(problem, seed as u64).cast();
        let expected = run(whole, problem, &case);
        for (how, attention) in cut {
            assert!(run(attention, problem, &case) == expected, "{problem}: other bits with {how}");
        }
    }
}

fn hold_all<T: Element>(micro_kernel: MicroKernel) {
    let of = |attention: Attention| attention.with_micro_kernel(micro_kernel);
    let whole = match micro_kernel {
        MicroKernel::Cooperative => cooperative(),
        _ => gpu().cloned(),
    };
    let Some(whole) = whole else { return };
    let bindings = |bytes| gpu_with(|limits| limits.max_storage_buffer_binding_size = bytes).map(of);
    // The tiles of hardware have more rows than a software driver's.
    let class = whole.device().map(|device| device.capabilities().class);
    let kib = |kib: u64| (if class == Some(DeviceClass::Software) { kib } else { 2 * kib }) << 10;
    let (Some(small), Some(large)) = (bindings(kib(40)), bindings(kib(64))) else { return };
    let cut = [
        ("small bindings", small),
        ("larger ones, and no time", large.with_dispatch_budget(Duration::ZERO)),
        ("no time", of(whole.clone()).with_dispatch_budget(Duration::ZERO)),
    ];
    hold::<T>(&of(whole).with_dispatch_budget(Duration::MAX), &cut);
}

#[test]
fn cut_f32() {
    hold_all::<f32>(MicroKernel::Portable);
}

#[test]
fn cut_f16() {
    hold_all::<f16>(MicroKernel::Portable);
}

#[test]
fn cut_bf16_cooperative() {
    hold_all::<bf16>(MicroKernel::Cooperative);
}

#[test]
fn cut_f16_cooperative() {
    hold_all::<f16>(MicroKernel::Cooperative);
}

/// A million queries and keys, of which a window shows 128: against the CPU path.
#[test]
fn a_million() {
    let Some(gpu) = gpu() else { return };
    let options = Options::new().window(Window::keys(128)).sink_logits(SinkLogits::PerHead);
    let problem = problem([1, 1, 1], [1_000_000, 1_000_000], [4, 4], options);
    let plan = gpu.plan_forward(&problem).unwrap();
    let capabilities = gpu.device().unwrap().capabilities();
    let dispatches = plan.dispatches(&problem, capabilities, Some(Duration::from_micros(100))).unwrap();
    assert!(dispatches[0] > 1, "{dispatches:?}");
    let case = Backward { d_lse: None, ..Backward::random(&problem, 1) };
    let Operands { q, .. } = &case.operands;
    assert_eq!(q.len(), 4_000_000);
    let cpu = Attention::cpu();
    let inputs = case.operands.inputs();
    let output = gpu.forward(&problem, &inputs).unwrap();
    let expected = cpu.forward(&problem, &inputs).unwrap();
    agree(&output, &expected).unwrap();
    case.agree(&case.run_with(gpu, &problem, &output), &case.run_with(&cpu, &problem, &expected)).unwrap();
}
