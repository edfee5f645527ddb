//! What a driver reports comes back as a typed error: a lost device, exhausted memory, buffers that cannot be used. Nothing
//! panics, and the operator works again afterwards, on a new device where the old one is lost.

use crate::common;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::common::another_gpu;
use crate::common::buffers::{Buffers, empty, submit};
use sink_attention::plan::{Capabilities, OptionalOperands, Plan, Preference};
use sink_attention::testing::gradients::Backward;
use sink_attention::testing::operands::{Operands, check, problem};
use sink_attention::timing::Timer;
use sink_attention::wgpu::{self, BufferUsages};
use sink_attention::{
    Attention, Axes, Device, Error, Inputs, Lengths, Options, Problem, Shape, SinkLogits, TensorView, Window,
};

fn typical() -> Problem {
    let options = Options::new().window(Window::keys(30)).sink_tokens(2).sink_logits(SinkLogits::PerHead);
    problem([2, 4, 2], [50, 50], [16, 16], options)
}

#[track_caller]
fn lost<T>(result: Result<T, Error>) {
    match result {
        Err(error @ Error::DeviceLost { during }) => assert!(error.to_string().contains(during), "{error}"),
        Err(error) => panic!("{error:?} of a lost device"),
        Ok(_) => panic!("no error of a lost device"),
    }
}

/// Every call says that the device is lost, whether its kernels were compiled before or not.
#[test]
fn a_device_that_was_lost() {
    let problem = typical();
    let backward = Backward::random(&problem, 1);
    let saved = backward.saved(&problem);
    let inputs = backward.operands.inputs();
    for warm in [false, true] {
        let Some(gpu) = another_gpu() else { return };
        let device = gpu.device().unwrap();
        let buffers = Buffers::new(device, &problem, &backward.operands);
        let prepared = warm.then(|| gpu.prepare_forward(&problem, &buffers.views()).unwrap());
        if warm {
            backward.check(&gpu, &problem);
        }
        let timer = Timer::new(device).unwrap();
        device.wgpu().destroy();

        // Twice: what failed must leave nothing behind that would pass for whole.
        for _ in 0..2 {
            lost(gpu.forward(&problem, &inputs));
            lost(gpu.backward(&problem, &inputs, &saved, &backward.upstream()));
            lost(gpu.prepare_forward(&problem, &buffers.views()));
            lost(Timer::new(device).and_then(|_| timer.time(2, |_| ())));
            if !warm {
                lost(gpu.precompile(&gpu.plan_forward(&problem).unwrap()));
            }
            if let Some(prepared) = &prepared {
                lost(timer.time(2, |pass| prepared.encode_in(pass)));
                let run = || submit(device, |encoder| prepared.encode(encoder));
                lost(device.scoped("running", run));
            }
            if device.wgpu().features().contains(wgpu::Features::PIPELINE_CACHE) {
                lost(gpu.clone().with_pipeline_cache(std::env::temp_dir().join("sink-attention no such cache")));
            }
        }
        // Its adapter opens again.
        backward.check(&another_gpu().unwrap(), &problem);
    }
}

/// The device goes while the host waits for results, by which time everything is submitted and about to be mapped.
#[test]
fn a_device_that_is_lost_while_results_are_awaited() {
    let problem = problem([1, 4, 4], [300, 300], [64, 64], Options::new().causal(true));
    let backward = Backward::random(&problem, 2);
    let (saved, inputs, upstream) = (backward.saved(&problem), backward.operands.inputs(), backward.upstream());
    let Some(gpu) = another_gpu() else { return };
    let expected = (gpu.forward(&problem, &inputs).unwrap(), backward.run_with(&gpu, &problem, &saved));
    let lose = |gpu: &Attention| gpu.device().unwrap().wgpu().destroy();
    // Results that had arrived before are results.
    match when_waiting(gpu.forward_async(&problem, &inputs), || lose(&gpu)) {
        Ok(output) => assert!(output == expected.0),
        error => lost(error),
    }
    let gpu = another_gpu().unwrap();
    match when_waiting(gpu.backward_async(&problem, &inputs, &saved, &upstream), || lose(&gpu)) {
        Ok(gradients) => assert!(gradients == expected.1),
        error => lost(error),
    }
}

/// Calls `meanwhile` at the first wait of a future.
fn when_waiting<T>(future: impl Future<Output = T>, meanwhile: impl FnOnce()) -> T {
    let mut future = pin!(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => result,
        Poll::Pending => {
            meanwhile();
            pollster::block_on(future)
        }
    }
}

/// Another thread loses the device at any moment: in an upload, a compilation, a kernel, a download.
#[test]
fn a_device_that_another_thread_loses() {
    let problem = typical();
    let backward = Backward::random(&problem, 3);
    let expected = backward.saved(&problem);
    for delay in [0, 1, 3, 10, 30, 100, 300] {
        let Some(gpu) = another_gpu() else { return };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(delay));
                gpu.device().unwrap().wgpu().destroy();
            });
            let inputs = backward.operands.inputs();
            let until_lost = || -> Result<(), Error> {
                loop {
                    let output = gpu.forward(&problem, &inputs)?;
                    sink_attention::testing::operands::agree(&output, &expected).unwrap();
                    gpu.backward(&problem, &inputs, &output, &backward.upstream())?;
                }
            };
            lost(until_lost());
        });
    }
}

/// In a process of its own, whose memory ends soon: of an instance that keeps back all but 1 % of a GPU's memory, and, as
/// software drivers have the host's memory, within bounds of address space.
#[cfg(target_os = "linux")]
#[test]
fn memory_that_is_not_there() {
    const CHILD: &str = "SINK_ATTENTION_TEST_SHORT_OF_MEMORY";
    let Some(gpu) = common::gpu() else { return };
    if std::env::var_os(CHILD).is_none() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let child = child
            .args(["errors::memory_that_is_not_there", "--exact", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success() && output.contains("1 passed"), "{output}");
        return;
    }
    let wanted = gpu.device().unwrap().wgpu().adapter_info();
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.memory_budget_thresholds.for_resource_creation = Some(1);
    let instance = wgpu::Instance::new(descriptor);
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()));
    let adapter = adapters.into_iter().find(|adapter| adapter.get_info().name == wanted.name).unwrap();
    let gpu = Attention::on(Device::open(&adapter).unwrap());
    let device = gpu.device().unwrap();
    let small = typical();
    let operands = Operands::random(&small, 4);
    let expected = check(&gpu, &small, &operands);

    let pages: u64 = std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').next().unwrap().parse().unwrap();
    let bounds = format!("--as={}", 4096 * pages + (800 << 20));
    let limit =
        std::process::Command::new("prlimit").args(["--pid", &std::process::id().to_string(), &bounds]).status();
    assert!(limit.unwrap().success());

    // Takes what there is.
    let size = device.capabilities().buffer_bytes.min(256 << 20);
    let mut taken = Vec::new();
    let error = loop {
        let take = || empty(device, size, BufferUsages::STORAGE);
        match device.scoped("taking all", take) {
            Ok(buffer) => taken.push(buffer),
            Err(error) => break error,
        }
        assert!(taken.len() < 64, "no end of memory");
    };
    assert!(matches!(&error, Error::OutOfMemory(what) if what.contains("taking all")), "{error:?}");

    // The result alone takes as much again.
    let rows = size as usize / 4 / 512;
    let large = problem([1, 1, 1], [rows, 1], [1, 512], Options::new());
    match gpu.forward(&large, &Inputs::new(&vec![0.0; rows], &[0.0], &[0.0; 512])) {
        Err(Error::OutOfMemory(what)) => {
            assert!(what.contains("uploading operands") && what.contains("'o'"), "{what}");
            assert!(what.ends_with(&format!("(o takes {} bytes)", 4 * 512 * rows)), "{what}");
        }
        other => panic!("{:?}", other.map(|output| output.o.len())),
    }
    drop(taken);
    assert!(check(&gpu, &small, &operands) == expected);
}

/// What becomes of a buffer after a pass was prepared with it, the submission shows.
#[test]
fn buffers_that_cannot_be_used_any_more() {
    let Some(gpu) = common::gpu() else { return };
    let device = gpu.device().unwrap();
    let problem = typical();
    let operands = Operands::random(&problem, 5);
    let buffers = Buffers::new(device, &problem, &operands);
    let size = buffers.q.size();
    let usage = BufferUsages::STORAGE;
    let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: true };
    let q = device.wgpu().create_buffer(&descriptor);
    let views = |q| buffers.views().q(TensorView::new(q));
    let prepared = gpu.prepare_forward(&problem, &views(&q)).unwrap();
    let run = || {
        let run = || submit(device, |encoder| prepared.encode(encoder));
        device.scoped("running", run)
    };
    let refused = |result, reason| match result {
        Err(Error::Gpu { during: "running", message }) => assert!(message.contains(reason), "{message}"),
        other => panic!("{reason}: {other:?}"),
    };
    refused(run(), "mapped");
    q.unmap();
    run().unwrap();
    q.destroy();
    refused(run(), "destroyed");

    // A buffer that wgpu refused to make.
    let scope = device.wgpu().push_error_scope(wgpu::ErrorFilter::Validation);
    let invalid = empty(device, size, BufferUsages::STORAGE | BufferUsages::MAP_READ);
    assert!(pollster::block_on(scope.pop()).is_some());
    match gpu.prepare_forward(&problem, &views(&invalid)) {
        Err(Error::Gpu { during: "binding operands", .. }) => {}
        other => panic!("{other:?}"),
    }
    check(gpu, &problem, &operands);
}

/// Whatever is asked for, the planner answers, with a plan or with an error. Overflow is checked here.
#[test]
fn problems_of_every_size_have_a_plan_or_an_error() {
    const LARGE: [usize; 6] = [1, 3, 1 << 16, (1 << 29) - 1, u32::MAX as usize, usize::MAX];
    let [all, none] = [true, false].map(|own| Axes { batch: own, heads: own, seq_q: own });
    let (mut plans, mut errors) = (0, 0);
    let mut count = |result: Result<Plan, Error>| match result {
        Ok(_) => plans += 1,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            errors += 1;
        }
    };
    let plain = Options::new().causal(true).sink_logits(SinkLogits::PerHead);
    let options = [plain, plain.bias(all).mask(all).alibi(true), plain.bias(none).window(Window::keys(9))];
    let devices = Capabilities::samples();
    // One or two dimensions are large.
    for [first, second] in (0..5).flat_map(|first| (first..5).map(move |second| [first, second])) {
        for large in LARGE {
            let mut sizes = [1; 5];
            sizes[first] = large;
            sizes[second] = large;
            let [batch, heads, seq_q, seq_k, width] = sizes;
            for kv_heads in [1, heads] {
                let shape = Shape { batch, heads, kv_heads, seq_q, seq_k, head_dim: width, value_dim: width };
                for options in options {
                    for options in [options, options.dtype(sink_attention::DType::F16)] {
                        match Problem::new(shape, options) {
                            Err(error) => count(Err(error)),
                            Ok(problem) => {
                                for device in &devices {
                                    count(Plan::forward(&problem, device));
                                    count(Plan::backward_with(
                                        &problem,
                                        OptionalOperands::default().d_lse(true),
                                        device,
                                        &Preference::default(),
                                    ));
                                }
                                // The slices are checked by their lengths.
                                let inputs = Inputs::new(&[0.0f32; 0], &[], &[]);
                                assert!(problem.check_inputs(&inputs).is_err());
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(plans > 1000 && errors > 1000, "{plans} plans, {errors} errors");

    // Many empty sequences, of which the bias and the mask have one row each.
    let zeros = vec![0; 100];
    let shape = Shape { batch: 1, heads: 1 << 31, kv_heads: 1, seq_q: 1, seq_k: 1, head_dim: 1, value_dim: 1 };
    let options = plain.bias(all).layout(sink_attention::Layout::Thd);
    let lengths = Lengths::Cumulative { q: &zeros, k: &zeros };
    assert!(matches!(Problem::with_lengths(shape, options, lengths), Err(Error::InvalidLengths { .. })));
}
