//! Laws that any correct attention obeys, on the CPU in one program and on the GPU in the other: they need no reference to compare with, so they
//! hold the reference to account as well.

use crate::common::{compare, compare_lse, shards};
use sink_attention::half::{bf16, f16};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::hidden::{self, Family};
use sink_attention::testing::operands::{BOUND, Operands, agree, problem, row};
use sink_attention::{Attention, Element, Gradients, Layout, Options, Output, Problem, SinkLogits, Window};

/// Runs a law on the program's paths.
fn on_every_path(law: impl Fn(&Attention)) {
    crate::paths().iter().for_each(law);
}

fn forward(attention: &Attention, problem: &Problem, operands: &Operands) -> Output {
    attention.forward(problem, &operands.inputs()).unwrap()
}

/// Two problems of one shape give the same results and gradients with operands that differ at most in their
/// sink logits, in every element type.
fn same(attention: &Attention, sides: [(Options, Option<f32>); 2]) {
    same_in::<f32>(attention, sides);
    same_in::<f16>(attention, sides);
    same_in::<bf16>(attention, sides);
}

fn same_in<T: Element>(attention: &Attention, [left, right]: [(Options, Option<f32>); 2]) {
    for [m, n] in [[1, 90], [70, 90], [90, 70], [65, 65]] {
        let result = |(options, sink): (Options, Option<f32>)| {
            let problem = problem([2, 4, 2], [m, n], [64, 64], options.dtype(T::DTYPE));
            // One seed, and the sink logits come last: q, k and v are the same.
            let mut backward: Backward<T> = Backward::random(&problem, 1).cast();
            if let (Some(logits), Some(sink)) = (&mut backward.operands.sink_logits, sink) {
                logits.fill(sink);
            }
            let output = attention.forward(&problem, &backward.operands.inputs()).unwrap();
            let gradients = backward.run_with(attention, &problem, &output);
            (backward, output, gradients)
        };
        let (_, left_output, mut left_gradients) = result(left);
        let (backward, right_output, right_gradients) = result(right);
        if left.1 == Some(f32::NEG_INFINITY) {
            assert_eq!(left_gradients.d_sink_logits, Some(vec![0.0; 4]));
        }
        // Only one of the two sides may have sink logits as an operand.
        left_gradients.d_sink_logits = right_gradients.d_sink_logits.as_ref().and(left_gradients.d_sink_logits);
        let gradients = right_gradients.d_sink_logits(left_gradients.d_sink_logits.clone());
        let all = agree(&left_output, &right_output).and_then(|()| backward.agree(&left_gradients, &gradients));
        all.unwrap_or_else(|error| {
            panic!("{} M={m} N={n} {left:?} is not {right:?} on {}: {error}", T::DTYPE, attention.device_name())
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
            let few = Backward::random(&grouped, 2);
            let mut many = Backward { operands: Operands::random(&repeated, 3), ..few.clone() };
            many.operands.q.clone_from(&few.operands.q);
            many.operands.sink_logits.clone_from(&few.operands.sink_logits);
            let (few_operands, many_operands) = (&few.operands, &mut many.operands);
            for b in 0..2 {
                for h in 0..6 {
                    for j in 0..60 {
                        let [key, value] = [64, 32].map(|width| row(&grouped, [2, 60, width], [b, h / 3, j]));
                        many_operands.key(&repeated, b, h, j).copy_from_slice(&few_operands.k[key]);
                        many_operands.value(&repeated, b, h, j).copy_from_slice(&few_operands.v[value]);
                    }
                }
            }
            let output = forward(attention, &grouped, few_operands);
            agree(&output, &forward(attention, &repeated, &many.operands)).unwrap();

            // The gradients by a key are those by its copies, added up.
            let gradients = many.run(attention, &repeated);
            let add_up = |copies: &[f32], width| {
                let mut sum = vec![0.0; 2 * 2 * 60 * width];
                for (b, h, j) in (0..2 * 6 * 60).map(|n| (n / 360, n / 60 % 6, n % 60)) {
                    let from = row(&repeated, [6, 60, width], [b, h, j]);
                    let to = row(&grouped, [2, 60, width], [b, h / 3, j]);
                    for (sum, x) in sum[to].iter_mut().zip(&copies[from]) {
                        *sum += f64::from(*x);
                    }
                }
                sum
            };
            let expected =
                Gradients::new(widen(&gradients.d_q), add_up(&gradients.d_k, 64), add_up(&gradients.d_v, 32))
                    .d_sink_logits(gradients.d_sink_logits.as_deref().map(widen));
            few.agree(&few.run(attention, &grouped), &expected).unwrap();
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
                ..Operands::new(Vec::new(), Vec::new(), Vec::new())
            };
            let Output { o, lse, .. } = forward(attention, &problem, &operands);
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

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Applies a function to the elements of several gradients that have the same place.
fn combine(parts: &[&Gradients], function: impl Fn(&[f64]) -> f64) -> Gradients<f64, f64> {
    let each = |operand: &dyn for<'a> Fn(&'a Gradients) -> &'a [f32]| -> Vec<f64> {
        let parts: Vec<Vec<f64>> = parts.iter().map(|part| widen(operand(part))).collect();
        (0..parts[0].len()).map(|n| function(&parts.iter().map(|part| part[n]).collect::<Vec<_>>())).collect()
    };
    let sinks: &dyn for<'a> Fn(&'a Gradients) -> &'a [f32] = &|g| g.d_sink_logits.as_deref().unwrap_or_default();
    Gradients::new(each(&|g| &g.d_q), each(&|g| &g.d_k), each(&|g| &g.d_v))
        .d_sink_logits(parts[0].d_sink_logits.as_ref().map(|_| each(sinks)))
}

#[test]
fn gradients_are_linear_in_what_flows_in() {
    on_every_path(|attention| {
        let options = Options::new().window(Window::keys(40)).sink_tokens(3).sink_logits(SinkLogits::PerHead);
        let problem = problem([2, 4, 2], [70, 90], [64, 64], options);
        let first = Backward::random(&problem, 8);
        let other = Backward::random(&problem, 10);
        let second = Backward { operands: first.operands.clone(), ..other };
        let saved = forward(attention, &problem, &first.operands);
        let run = |backward: &Backward| backward.run_with(attention, &problem, &saved);
        // 2 * first - second: exact factors, so that nothing but the gradients is rounded twice.
        let mix = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| 2.0 * x - y).collect::<Vec<_>>();
        let mut mixed = first.clone();
        mixed.d_o = mix(&first.d_o, &second.d_o);
        mixed.d_lse = first.d_lse.as_deref().zip(second.d_lse.as_deref()).map(|(x, y)| mix(x, y));
        assert!(mixed.d_lse.is_some());
        let expected = combine(&[&run(&first), &run(&second)], |x| 2.0 * x[0] - x[1]);
        mixed.agree(&run(&mixed), &expected).unwrap();

        // A power of two changes exponents alone.
        let mut scaled = first.clone();
        scaled.d_o.iter_mut().chain(scaled.d_lse.iter_mut().flatten()).for_each(|x| *x *= 4.0);
        assert!(combine(&[&run(&scaled)], |x| x[0]) == combine(&[&run(&first)], |x| 4.0 * x[0]));

        // No d_lse is a d_lse of zero.
        let none = Backward { d_lse: None, ..first.clone() };
        let zero = Backward { d_lse: Some(vec![0.0; 2 * 4 * 70]), ..first };
        assert!(run(&none) == run(&zero));
    });
}

/// With v = 1 and d_o = 1 the loss is the sum of 1 - p over all rows, p the sink's share, and p' = p (1 - p).
#[test]
fn ones_give_the_sink_its_gradient() {
    on_every_path(|attention| {
        let options = Options::new().causal(true).layout(Layout::Bhsd).sink_logits(SinkLogits::PerHead);
        let problem = problem([1, 5, 1], [63, 65], [16, 1], options);
        let mut backward = Backward::random(&problem, 9);
        backward.operands.v.fill(1.0);
        backward.d_o.fill(1.0);
        backward.d_lse = None;
        let saved = forward(attention, &problem, &backward.operands);
        let d_sink_logits = backward.run_with(attention, &problem, &saved).d_sink_logits.unwrap();
        let expected: Vec<f64> =
            saved.o.chunks(63).map(|o| -widen(o).iter().map(|o| o * (1.0 - o)).sum::<f64>()).collect();
        compare(&d_sink_logits, &expected, BOUND).unwrap();
    });
}

/// Each shard of the keys, given the whole's o and lse, gives its part of d_q and its own d_k and d_v.
#[test]
fn shards_of_the_keys_add_up() {
    on_every_path(|attention| {
        let shard = |keys: std::ops::Range<usize>| {
            // Where the first query stands among the shard's keys.
            let options = Options::new().causal(true).query_offset(133 - keys.start as i64).layout(Layout::Bhsd);
            problem([1, 2, 1], [70, keys.len()], [16, 16], options)
        };
        let problem = shard(0..203);
        let whole = Backward::random(&problem, 11);
        let saved = forward(attention, &problem, &whole.operands);
        let empty = || Vec::<f32>::new();
        let mut sum = Gradients::new(vec![0.0; 2 * 70 * 16], empty(), empty());
        for keys in [0..90, 90..91, 91..203] {
            let mut part = whole.clone();
            part.operands.k = whole.operands.k[keys.start * 16..keys.end * 16].to_vec();
            part.operands.v = whole.operands.v[keys.start * 16..keys.end * 16].to_vec();
            let gradients = part.run_with(attention, &shard(keys), &saved);
            sum.d_q.iter_mut().zip(gradients.d_q).for_each(|(sum, x)| *sum += x);
            sum.d_k.extend(gradients.d_k);
            sum.d_v.extend(gradients.d_v);
        }
        whole.agree(&sum, &whole.expected(&problem)).unwrap();
    });
}

/// Holds a path to the law of non-interference on random problems of some families; the seeds count on from `first`.
pub fn nothing_unseen_matters<T: Element>(
    families: &[Family],
    seeds: std::ops::Range<u64>,
    name: &str,
    compute: impl Fn(&hidden::Case<T>) -> sink_attention::Result<hidden::Results<T>>,
) {
    let mut controls = 0;
    let mut failures = Vec::new();
    for (seed, family) in seeds.flat_map(|seed| families.iter().map(move |family| (seed, family))) {
        let case = hidden::Case::<T>::random(family.problem(T::DTYPE, seed).unwrap(), seed);
        match hidden::law(&case, seed, &compute) {
            Ok(count) => controls += count,
            Err(error) => failures.push(format!("seed {seed}: {}: {error}", case.problem)),
        }
    }
    assert!(failures.is_empty(), "{} problems fail on {name}:\n{}", failures.len(), failures.join("\n"));
    assert!(controls > 0, "no query sees a key in any of the problems");
}

/// Both passes; o_lo reaches the backward pass or does not.
pub fn both_passes<T: Element>(
    attention: &Attention,
    rest: bool,
) -> impl Fn(&hidden::Case<T>) -> sink_attention::Result<hidden::Results<T>> + '_ {
    move |case| {
        let output = attention.forward(&case.problem, &case.inputs())?;
        let saved = output.clone().o_lo(output.o_lo.clone().filter(|_| rest));
        let gradients = attention.backward(&case.problem, &case.inputs(), &saved, &case.upstream())?;
        Ok((output, Some(gradients)))
    }
}

/// Both passes by shards of the keys, whose states are merged.
pub fn by_shards<T: Element>(
    attention: &Attention,
) -> impl Fn(&hidden::Case<T>) -> sink_attention::Result<hidden::Results<T>> + '_ {
    move |case| {
        let (problem, s) = (&case.problem, *case.problem.shape());
        let whole = &case.operands;
        let shards = shards::ranges(&[s.seq_k / 3], s.seq_k);
        let states = shards::states(attention, problem, whole, &shards);
        let state = attention.merge(problem, &states.iter().collect::<Vec<_>>())?;
        let output = attention.finish::<T>(problem, &state, whole.sink_logits.as_deref())?;

        let zeros = |x: &[T]| vec![T::default(); x.len()];
        let mut all = Gradients::new(zeros(&whole.q), zeros(&whole.k), zeros(&whole.v))
            .d_bias(problem.bias_shape().map(|shape| vec![0.0; shape.iter().product()]));
        for (n, keys) in shards.into_iter().enumerate() {
            let shard = shards::shard(problem, whole, &keys);
            let inputs = if n == 0 { shards::with_sinks(&shard, whole) } else { shard.inputs() };
            let part = attention.backward_partial(problem, keys.clone(), &inputs, &output, &case.upstream())?;
            all.d_q.iter_mut().zip(part.d_q).for_each(|(x, y)| *x = T::from_f32(x.to_f32() + y.to_f32()));
            let inner = |width| if problem.options().layout == Layout::Bhsd { width } else { s.kv_heads * width };
            put(&mut all.d_k, &part.d_k, s.seq_k, inner(s.head_dim), &keys);
            put(&mut all.d_v, &part.d_v, s.seq_k, inner(s.value_dim), &keys);
            all.d_bias.iter_mut().zip(part.d_bias).for_each(|(whole, part)| put(whole, &part, s.seq_k, 1, &keys));
            all.d_sink_logits = all.d_sink_logits.or(part.d_sink_logits);
        }
        Ok((output, Some(all)))
    }
}

/// Writes the rows `keys` of each run of `count` rows.
fn put<T: Copy>(whole: &mut [T], part: &[T], count: usize, width: usize, keys: &std::ops::Range<usize>) {
    if !keys.is_empty() {
        for (whole, part) in whole.chunks_mut(count * width).zip(part.chunks(keys.len() * width)) {
            whole[keys.start * width..keys.end * width].copy_from_slice(part);
        }
    }
}
