//! Many threads at once, on one operator, on several of one device, and on several devices: each gets the bits that it gets
//! alone.

use std::sync::{Barrier, OnceLock};

use crate::common::{another_gpu, gpu};
use sink_attention::half::f16;
use sink_attention::plan::MicroKernel;
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::problem;
use sink_attention::{
    Attention, Axes, DType, Element, Gradients, Layout, Options, Output, Problem, SinkLogits, Window,
};

const THREADS: usize = 4;

/// A problem in an element type with its operands, and what a device that does nothing else makes of them.
struct Case<T> {
    problem: Problem,
    backward: Backward<T>,
    alone: (Output<T>, Gradients<T>),
}

/// In both sizes of elements.
type Cases = (Vec<Case<f32>>, Vec<Case<f16>>);

impl<T: Element> Case<T> {
    fn all(alone: &Attention) -> Vec<Self> {
        let sinks = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
        let problems = [
            problem([1, 2, 1], [70, 90], [16, 16], sinks),
            problem([2, 4, 2], [33, 33], [20, 12], sinks.window(Window::keys(9)).sink_tokens(2)),
            problem([1, 2, 2], [50, 40], [5, 7], Options::new().layout(Layout::Bhsd).softcap(3.0).mask(Axes::KEYS)),
        ];
        let case = |(seed, problem): (u64, Problem)| {
            let problem = Problem::new(*problem.shape(), problem.options().dtype(T::DTYPE)).unwrap();
            let backward = Backward::random(&problem, seed).cast();
            let alone = run(alone, &problem, &backward);
            Case { problem, backward, alone }
        };
        (0..).zip(problems).map(case).collect()
    }

    fn check(&self, attention: &Attention) {
        let (output, gradients) = run(attention, &self.problem, &self.backward);
        assert!(output == self.alone.0, "{}: not the bits of a forward pass alone", self.problem);
        assert!(gradients == self.alone.1, "{}: not the bits of a backward pass alone", self.problem);
    }
}

fn run<T: Element>(attention: &Attention, problem: &Problem, backward: &Backward<T>) -> (Output<T>, Gradients<T>) {
    let output = attention.forward(problem, &backward.operands.inputs()).unwrap();
    let gradients = backward.run_with(attention, problem, &output);
    (output, gradients)
}

/// Threads take turns with the operators, whose kernels none has compiled yet, each beginning with another problem: several
/// want the same kernel at the same time.
fn at_once(operators: &[Attention], (singles, halves): &Cases) {
    assert_eq!(halves[0].problem.options().dtype, DType::F16);
    let start = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                for round in 0..2 * singles.len() {
                    let attention = &operators[(thread + round) % operators.len()];
                    let case = (thread / 2 + round) % singles.len();
                    if (thread + round) % 2 == 0 {
                        singles[case].check(attention)
                    } else {
                        halves[case].check(attention)
                    }
                }
            });
        }
    });
}

/// Compiled and run by one thread before any other begins.
fn alone() -> Option<&'static Cases> {
    static ALONE: OnceLock<Cases> = OnceLock::new();
    let gpu = gpu()?;
    Some(ALONE.get_or_init(|| (Case::all(gpu), Case::all(gpu))))
}

#[test]
fn one_operator() {
    let (Some(alone), Some(attention)) = (alone(), another_gpu()) else { return };
    at_once(&[attention], alone);
}

#[test]
fn two_operators_on_one_device() {
    let (Some(alone), Some(first)) = (alone(), another_gpu()) else { return };
    let second = Attention::on(first.device().unwrap().clone()).with_micro_kernel(MicroKernel::Portable);
    at_once(&[first, second], alone);
}

#[test]
fn two_devices() {
    let (Some(alone), Some(first), Some(second)) = (alone(), another_gpu(), another_gpu()) else { return };
    at_once(&[first, second], alone);
}

/// The CPU path shares a pool of threads.
#[test]
fn on_the_cpu() {
    let cpu = Attention::cpu();
    at_once(std::slice::from_ref(&cpu), &(Case::all(&cpu), Case::all(&cpu)));
}
