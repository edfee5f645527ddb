//! Laws that any correct attention obeys, on every path: they need no reference to compare with, so they
//! hold the reference to account as well.

mod common;

use common::gpu;
use common::operands::{BOUND, Operands, agree, problem, row};
use common::{compare, compare_lse};
use sink_attention::{Attention, Layout, Options, Output, Problem, SinkLogits, Window};

/// Runs a law on the CPU and on the GPU.
fn on_every_path(law: impl Fn(&Attention)) {
    law(&Attention::cpu());
    if let Some(gpu) = gpu() {
        law(gpu);
    }
}

fn forward(attention: &Attention, problem: &Problem, operands: &Operands) -> Output {
    attention.forward(problem, &operands.inputs()).unwrap()
}

/// Two problems of one shape give the same with operands that differ at most in their sink logits.
fn same(attention: &Attention, [left, right]: [(Options, Option<f32>); 2]) {
    for [m, n] in [[1, 90], [70, 90], [90, 70], [65, 65]] {
        let result = |(options, sink): (Options, Option<f32>)| {
            let problem = problem([2, 4, 2], [m, n], [64, 64], options);
            // One seed, and the sink logits come last: q, k and v are the same.
            let mut operands = Operands::random(&problem, 1);
            if let (Some(logits), Some(sink)) = (&mut operands.sink_logits, sink) {
                logits.fill(sink);
            }
            forward(attention, &problem, &operands)
        };
        agree(&result(left), &result(right)).unwrap_or_else(|error| {
            panic!("M={m} N={n} {left:?} is not {right:?} on {}: {error}", attention.device_name())
        });
    }
}

#[test]
fn a_sink_of_minus_infinity_is_none() {
    on_every_path(|attention| {
        for options in [Options::new(), Options::new().causal(true), Options::new().causal(true).query_offset(-9)] {
            let sinks = options.sink_logits(SinkLogits::PerHead);
            same(attention, [(sinks, Some(f32::NEG_INFINITY)), (options, None)]);
        }
    });
}

#[test]
fn off_by_one_is_a_sink_of_zero() {
    on_every_path(|attention| {
        let options = Options::new().causal(true);
        let zero = options.sink_logits(SinkLogits::PerHead);
        same(attention, [(options.sink_logits(SinkLogits::OffByOne), None), (zero, Some(0.0))]);
    });
}

#[test]
fn a_window_over_everything_is_causal() {
    on_every_path(|attention| {
        let new = Options::new();
        for keys in [90, 1000, usize::MAX] {
            same(attention, [(new.window(Window::keys(keys)), None), (new.causal(true), None)]);
        }
        same(attention, [(new.window(Window::new(1000, 1000)), None), (new, None)]);
    });
}

#[test]
fn a_window_with_every_key_a_sink_token_is_causal() {
    on_every_path(|attention| {
        let windowed = Options::new().window(Window::keys(3));
        for sink_tokens in [90, usize::MAX] {
            same(attention, [(windowed.sink_tokens(sink_tokens), None), (Options::new().causal(true), None)]);
        }
    });
}

#[test]
fn alignments_and_offsets_say_the_same() {
    on_every_path(|attention| {
        let causal = Options::new().causal(true);
        let top_left = causal.alignment(sink_attention::Alignment::TopLeft);
        same(attention, [(top_left, None), (causal.query_offset(0), None)]);
    });
}

#[test]
fn grouped_heads_are_repeated_heads() {
    on_every_path(|attention| {
        for layout in [Layout::Bshd, Layout::Bhsd] {
            let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).layout(layout);
            let grouped = problem([2, 6, 2], [50, 60], [64, 32], options);
            let repeated = problem([2, 6, 6], [50, 60], [64, 32], options);
            let few = Operands::random(&grouped, 2);
            let mut many = Operands { q: few.q.clone(), ..Operands::random(&repeated, 3) };
            many.sink_logits = few.sink_logits.clone();
            for b in 0..2 {
                for h in 0..6 {
                    for j in 0..60 {
                        let [key, value] = [64, 32].map(|width| row(&grouped, [2, 60, width], [b, h / 3, j]));
                        many.key(&repeated, b, h, j).copy_from_slice(&few.k[key]);
                        many.value(&repeated, b, h, j).copy_from_slice(&few.v[value]);
                    }
                }
            }
            agree(&forward(attention, &grouped, &few), &forward(attention, &repeated, &many)).unwrap();
        }
    });
}

/// With v = 1 everywhere, o is the share that the sink leaves: 1 - exp(sink - lse).
#[test]
fn ones_give_what_the_sink_leaves() {
    on_every_path(|attention| {
        for sinks in [SinkLogits::None, SinkLogits::OffByOne, SinkLogits::PerHead] {
            let options = Options::new().window(Window::keys(20)).sink_tokens(2).sink_logits(sinks);
            let problem = problem([2, 4, 2], [70, 90], [64, 64], options);
            let mut operands = Operands::random(&problem, 4);
            operands.v.fill(1.0);
            let output = forward(attention, &problem, &operands);
            for b in 0..2 {
                for h in 0..4 {
                    let sink = match sinks {
                        SinkLogits::None => f32::NEG_INFINITY,
                        SinkLogits::OffByOne => 0.0,
                        SinkLogits::PerHead => operands.sink_logits.as_ref().unwrap()[h],
                    };
                    for i in 0..70 {
                        let share = 1.0 - (sink - output.lse[(b * 4 + h) * 70 + i]).exp();
                        let o = &output.o[row(&problem, [4, 70, 64], [b, h, i])];
                        compare(o, &[share; 64], BOUND).unwrap_or_else(|error| panic!("{problem}: {error}"));
                    }
                }
            }
        }
    });
}

/// The keys' order means nothing without a mask: o and lse do not change when k and v are permuted alike.
#[test]
fn keys_in_any_order() {
    on_every_path(|attention| {
        let problem = problem([1, 1, 1], [30, 77], [64, 64], Options::new().sink_logits(SinkLogits::PerHead));
        let operands = Operands::random(&problem, 5);
        let mut permuted = operands.clone();
        for j in 0..77 {
            let from = row(&problem, [1, 77, 64], [0, 0, j]);
            // 30 and 77 share no factor: every place is taken once.
            permuted.key(&problem, 0, 0, j * 30 % 77).copy_from_slice(&operands.k[from.clone()]);
            permuted.value(&problem, 0, 0, j * 30 % 77).copy_from_slice(&operands.v[from]);
        }
        agree(&forward(attention, &problem, &permuted), &forward(attention, &problem, &operands)).unwrap();
    });
}

#[test]
fn batches_do_not_mix() {
    on_every_path(|attention| {
        for layout in [Layout::Bshd, Layout::Bhsd] {
            let options = Options::new().causal(true).sink_logits(SinkLogits::PerHead).layout(layout);
            let problem = problem([3, 4, 2], [40, 50], [64, 64], options);
            let operands = Operands::random(&problem, 6);
            // Batches are the outermost axis of every operand and result.
            let rotate = |data: &[f32]| {
                let (first, rest) = data.split_at(data.len() / 3);
                [rest, first].concat()
            };
            let rotated = Operands {
                q: rotate(&operands.q),
                k: rotate(&operands.k),
                v: rotate(&operands.v),
                sink_logits: operands.sink_logits.clone(),
            };
            let Output { o, lse } = forward(attention, &problem, &operands);
            let actual = forward(attention, &problem, &rotated);
            compare(&actual.o, &rotate(&o), BOUND).unwrap();
            compare_lse(&actual.lse, &rotate(&lse), BOUND).unwrap();
        }
    });
}

/// Adding a number to every score, through one feature, moves lse by it and leaves o alone.
#[test]
fn scores_may_be_shifted() {
    on_every_path(|attention| {
        let problem = problem([1, 2, 1], [40, 50], [64, 64], Options::new().causal(true).scale(1.0 / 8.0));
        let mut operands = Operands::random(&problem, 7);
        operands.q.chunks_mut(64).for_each(|q| q[0] = 8.0);
        operands.k.chunks_mut(64).for_each(|k| k[0] = 0.0);
        let mut expected = forward(attention, &problem, &operands);
        operands.k.chunks_mut(64).for_each(|k| k[0] = 5.0);
        expected.lse.iter_mut().for_each(|lse| *lse += 5.0);
        agree(&forward(attention, &problem, &operands), &expected).unwrap();
    });
}
