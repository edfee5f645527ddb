//! Measured tiles and compiled pipelines on the GPU: they change the speed, and nothing else.

use crate::common;
use std::fs;
use std::path::PathBuf;

use sink_attention::plan::MicroKernel;
use sink_attention::plan::{
    Capabilities, Kernel, LoopHints, OptionalOperands, Pass, Plan, PortableTile, Preference, TilesOrigin, Tiling,
};
use sink_attention::testing::operands::{Operands, agree, problem};
use sink_attention::timing::{Clock, Timer};
use sink_attention::tuning::{MaskClass, Tuning, TuningKey};
use sink_attention::{Attention, DType, Device, Error, Options, Problem, SinkLogits, Upstream, Window, wgpu};

const KERNELS: [Kernel; 3] = [Kernel::FORWARD, Kernel::D_Q, Kernel::D_KV];

fn options() -> Options {
    Options::new().causal(true).sink_logits(SinkLogits::PerHead)
}

/// Tiles that fit every device, and that no table has first.
const OTHER: PortableTile =
    PortableTile { threads_r: 4, threads_c: 8, rows: 4, quads: 1, k_step: 4, n_step: 16, loops: LoopHints::NONE };

fn tuning(device: &str, problem: &Problem, tiles: PortableTile) -> Tuning {
    let mut tuning = Tuning::new(device, "");
    KERNELS.iter().for_each(|kernel| tuning.insert(TuningKey::of(*kernel, problem).unwrap(), tiles));
    tuning
}

/// A file that is gone when the test is over.
struct File(PathBuf);

impl File {
    fn new(name: &str) -> Self {
        let file = File(std::env::temp_dir().join(format!("sink-attention-{}-{name}", std::process::id())));
        let _ = fs::remove_file(&file.0);
        file
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn tiled(passes: &[Pass]) -> impl Iterator<Item = &Pass> {
    passes.iter().filter(|pass| pass.variant.tiling.is_some())
}

#[test]
fn a_tuning_changes_the_plan_where_it_fits() {
    let problem = problem([1, 4, 2], [300, 300], [64, 64], options());
    let other_class = sink_attention::testing::operands::problem([1, 4, 2], [3000, 3000], [64, 64], options());
    for device in Capabilities::samples() {
        let optional = OptionalOperands::default();
        let passes = |problem: &Problem, tuning: &Tuning| {
            let preference = Preference::default().tuning(tuning);
            let mut passes = Plan::forward_with(problem, optional, &device, &preference).unwrap().passes;
            passes.extend(Plan::backward_with(problem, optional, &device, &preference).unwrap().passes);
            passes
        };
        let fitting = tuning(&device.name, &problem, OTHER);
        let tuned = passes(&problem, &fitting);
        assert_eq!(tiled(&tuned).count(), 3);
        for pass in tiled(&tuned) {
            assert_eq!((pass.variant.tiling, pass.tiles_origin), (Some(OTHER.into()), TilesOrigin::Tuning));
        }
        // Another class, and tiles that do not fit the device, are left to the built-in table.
        let huge = PortableTile { rows: 64, threads_r: 64, ..OTHER };
        for (problem, tuning) in [(&other_class, fitting), (&problem, tuning(&device.name, &problem, huge))] {
            let built_in =
                [Plan::forward(problem, &device).unwrap().passes, Plan::backward(problem, &device).unwrap().passes];
            assert_eq!(passes(problem, &tuning), built_in.concat());
            assert!(tiled(&built_in.concat()).all(|pass| pass.tiles_origin == TilesOrigin::BuiltIn));
        }
        // The caller's own go before measured ones.
        let own = PortableTile { rows: 2, ..OTHER };
        let own_tiles = [(Kernel::FORWARD, own.into())];
        let tuning = tuning(&device.name, &problem, OTHER);
        let preference = Preference::default().tiles(&own_tiles).tuning(&tuning);
        let pass = Plan::forward_with(&problem, optional, &device, &preference).unwrap().passes[0];
        assert_eq!((pass.variant.tiling, pass.tiles_origin), (Some(own.into()), TilesOrigin::Caller));
    }
}

/// In half precision, the tiles that a caller gives or that were measured decide on the micro-kernel under `auto`; a
/// micro-kernel that is asked for stays.
#[test]
fn tiles_decide_on_the_micro_kernel() {
    let problem = problem([1, 4, 2], [300, 300], [64, 64], options().dtype(DType::F16));
    let samples = Capabilities::samples();
    let device = samples.iter().find(|device| device.name.contains("H200")).unwrap();
    let plan = |device, preference: &Preference<'_>| {
        Plan::forward_with(&problem, OptionalOperands::default(), device, preference).map(|plan| {
            let of = |pass: &Pass| (pass.variant.tiling.unwrap(), pass.tiles_origin, pass.variant.fallback);
            plan.passes.iter().filter(|pass| !pass.variant.sanitize).map(of).collect::<Vec<_>>()
        })
    };
    let cooperative = Tiling::Cooperative { subgroups: 2, rows: 2, columns: 1, stages: 2, loops: LoopHints::NONE };
    let portable = Tiling::Portable(OTHER);
    let built_in = |micro_kernel| plan(device, &Preference::default().micro_kernel(micro_kernel)).unwrap();
    let built_in_portable = built_in(MicroKernel::Portable)[0];

    // The fallback run with built-in tiles that take little workgroup memory, unless the caller names some.
    let Tiling::Portable(tiles) = built_in_portable.0 else { panic!() };
    let slim = Tiling::Portable(PortableTile { k_step: 4, n_step: 8, ..tiles });
    let own = |tiles: &[Tiling], micro_kernel| {
        let tiles: Vec<_> = tiles.iter().map(|tiling| (Kernel::FORWARD, *tiling)).collect();
        plan(device, &Preference::default().tiles(&tiles).micro_kernel(micro_kernel))
    };
    let (caller, fallback) = (TilesOrigin::Caller, Some(64));
    let repaired = |tiling, origin| vec![(tiling, origin, fallback)];
    let [first, second] = own(&[cooperative], MicroKernel::Auto).unwrap()[..] else { panic!() };
    assert_eq!(first, (cooperative, caller, None));
    assert_eq!(vec![second], repaired(slim, TilesOrigin::BuiltIn));
    let both = own(&[cooperative, portable], MicroKernel::Auto).unwrap();
    assert_eq!(both, [vec![(cooperative, caller, None)], repaired(portable, caller)].concat());
    assert_eq!(own(&[portable, cooperative], MicroKernel::Auto).unwrap(), [(portable, caller, None)]);
    for (tiling, micro_kernel) in [(portable, MicroKernel::Cooperative), (cooperative, MicroKernel::Portable)] {
        let error = own(&[tiling], micro_kernel).unwrap_err().to_string();
        let reason = format!("asked for as {micro_kernel} and with the tiles \"{tiling}\"");
        assert!(error.contains(&reason), "{error}");
    }

    let measured = |tiling, micro_kernel| {
        let mut tuning = Tuning::new(&device.name, "");
        tuning.insert(TuningKey::of(Kernel::FORWARD, &problem).unwrap(), tiling);
        plan(device, &Preference::default().tuning(&tuning).micro_kernel(micro_kernel)).unwrap()
    };
    let tuned = measured(cooperative, MicroKernel::Auto);
    assert_eq!((tuned.len(), tuned[0]), (2, (cooperative, TilesOrigin::Tuning, None)));
    assert_eq!(measured(portable, MicroKernel::Auto), [(portable, TilesOrigin::Tuning, None)]);
    assert_eq!(measured(cooperative, MicroKernel::Portable), [built_in_portable]);
    let forced = built_in(MicroKernel::Cooperative);
    let kept = measured(portable, MicroKernel::Cooperative);
    assert_eq!((forced.len(), kept[0], kept[1].0), (2, forced[0], portable));
    // Fragments that do not fit are passed over as tiles are.
    let huge = Tiling::Cooperative { subgroups: 32, rows: 4, columns: 8, stages: 2, loops: LoopHints::NONE };
    assert_eq!(measured(huge, MicroKernel::Auto), built_in(MicroKernel::Auto));

    // Without the matrices they are an error of the caller's, and nothing to a tuning.
    let least = samples.last().unwrap();
    let tiles = [(Kernel::FORWARD, cooperative)];
    let error = plan(least, &Preference::default().tiles(&tiles)).unwrap_err().to_string();
    assert!(error.contains("WebGPU defaults has no cooperative matrices"), "{error}");
}

#[test]
fn a_tuning_does_not_change_results() {
    let Some(attention) = common::gpu() else { return };
    let name = &attention.device().unwrap().capabilities().name;
    for options in [options(), options().window(Window::keys(40))] {
        let problem = problem([1, 4, 2], [130, 130], [20, 20], options);
        let operands = Operands::random(&problem, 3);
        let tuned = attention.clone().with_tuning(tuning(name, &problem, OTHER)).unwrap();
        assert_eq!(tuned.plan_forward(&problem).unwrap().passes[0].variant.tiling, Some(OTHER.into()));
        assert_ne!(attention.plan_forward(&problem).unwrap().passes[0].variant.tiling, Some(OTHER.into()));
        let output = tuned.forward(&problem, &operands.inputs()).unwrap();
        let expected = attention.forward(&problem, &operands.inputs()).unwrap();
        agree(&output, &expected).unwrap();
        let upstream = Upstream::new(&expected.o);
        let [tuned, expected] =
            [&tuned, attention].map(|a| a.backward(&problem, &operands.inputs(), &expected, &upstream).unwrap());
        for (tuned, expected) in [(tuned.d_q, expected.d_q), (tuned.d_k, expected.d_k), (tuned.d_v, expected.d_v)] {
            common::compare(&tuned, &expected, 1e-5).unwrap();
        }
    }
}

#[test]
fn a_tuning_of_another_device_is_refused() {
    assert!(matches!(Attention::cpu().with_tuning(Tuning::new("x", "")), Err(Error::NeedsGpu { call: "with_tuning" })));
    let Some(attention) = common::gpu() else { return };
    let error = attention.clone().with_tuning(Tuning::new("Voodoo 2", "")).unwrap_err();
    let name = &attention.device().unwrap().capabilities().name;
    assert!(matches!(error, Error::TuningDevice { .. }), "{error}");
    assert!(error.to_string().contains("Voodoo 2") && error.to_string().contains(name), "{error}");
    assert!(attention.tuning().is_none());
}

#[test]
fn every_class_is_a_problem_of_its_own() {
    let class = |seq, options| MaskClass::of(&problem([1, 1, 1], [seq, seq], [8, 8], options));
    let classes = [class(4096, options()), class(4096, options().window(Window::keys(64))), class(200, options())];
    assert_eq!(classes, MaskClass::ALL.map(Some));
}

#[test]
fn precompiled_kernels_compute() {
    assert!(matches!(
        Attention::cpu().plan_forward(&problem([1, 1, 1], [9, 9], [8, 8], Options::new())),
        Err(Error::NeedsGpu { .. })
    ));
    let Some(attention) = common::gpu() else { return };
    let problem = problem([1, 2, 1], [70, 70], [24, 24], options());
    for plan in [attention.plan_forward(&problem), attention.plan_backward(&problem)] {
        // Compiled again, which finds what is there.
        attention.precompile(plan.as_ref().unwrap()).unwrap();
        attention.precompile(&plan.unwrap()).unwrap();
    }
    sink_attention::testing::operands::check(attention, &problem, &Operands::random(&problem, 0));
}

/// An operator of its own device, so that nothing is compiled yet.
fn with_cache(file: &File) -> Option<sink_attention::Result<Attention>> {
    let device = common::gpu()?.device()?.clone();
    Some(Attention::on(device).with_pipeline_cache(&file.0))
}

fn has_cache() -> bool {
    let features = common::gpu().and_then(Attention::device).map(|device| device.wgpu().features());
    features.is_some_and(|features| features.contains(wgpu::Features::PIPELINE_CACHE))
}

#[test]
fn pipelines_are_kept_in_a_file() {
    if !has_cache() {
        return;
    }
    let file = File::new("kept.cache");
    let problem = problem([1, 2, 1], [50, 50], [28, 28], options());
    let operands = Operands::random(&problem, 0);
    let compute = |attention: &Attention| sink_attention::testing::operands::check(attention, &problem, &operands);

    let absent = with_cache(&file).unwrap().unwrap();
    let output = compute(&absent);
    let bytes = absent.save_pipeline_cache().unwrap().unwrap();
    assert_eq!(fs::read(&file.0).unwrap().len(), bytes);
    assert!(bytes > 60, "{bytes} bytes hold nothing");
    let loaded = with_cache(&file).unwrap().unwrap();
    assert_eq!(compute(&loaded), output);
    loaded.save_pipeline_cache().unwrap();

    // Spoiled in every part, cut, of another device, of another program: as if there were none.
    let good = fs::read(&file.0).unwrap();
    let mut spoiled: Vec<Vec<u8>> = vec![Vec::new(), b"not a cache".to_vec(), good[..good.len() / 2].to_vec()];
    for place in [0, 40, good.len() / 2, good.len() - 1] {
        let mut bytes = good.clone();
        bytes[place] ^= 0x55;
        spoiled.push(bytes);
    }
    let text = String::from_utf8_lossy(&good).into_owned();
    let key = text.lines().nth(1).unwrap();
    let at = good.windows(key.len()).position(|window| window == key.as_bytes()).unwrap();
    let mut foreign = good.clone();
    foreign[at + key.len() - 1] ^= 1;
    spoiled.push(foreign);
    for bytes in spoiled {
        fs::write(&file.0, bytes).unwrap();
        assert_eq!(compute(&with_cache(&file).unwrap().unwrap()), output);
    }
    // Nothing is left beside it.
    let name = file.0.file_name().unwrap().to_str().unwrap().to_string();
    let beside = fs::read_dir(file.0.parent().unwrap()).unwrap().filter_map(Result::ok);
    let beside = beside.filter(|entry| entry.file_name().to_str().is_some_and(|n| n.starts_with(&name)));
    assert_eq!(beside.count(), 1);
}

#[test]
fn a_cache_that_cannot_be_kept_is_told() {
    let nowhere = File(std::env::temp_dir().join("sink-attention no such folder").join("cache"));
    assert!(matches!(Attention::cpu().with_pipeline_cache(&nowhere.0), Err(Error::NeedsGpu { .. })));
    assert_eq!(Attention::cpu().save_pipeline_cache().unwrap(), None);
    let Some(attention) = common::gpu() else { return };
    assert_eq!(attention.save_pipeline_cache().unwrap(), None);
    if !has_cache() {
        let error = with_cache(&nowhere).unwrap().unwrap_err();
        assert!(error.to_string().contains("PIPELINE_CACHE"), "{error}");
        return;
    }
    // What is not there is empty; a folder is no file; and what cannot be written is an error.
    let error = with_cache(&nowhere).unwrap().unwrap().save_pipeline_cache().unwrap_err();
    assert!(matches!(error, Error::PipelineCache { .. }) && error.to_string().contains("no such folder"), "{error}");
    let folder = File(std::env::temp_dir());
    let error = with_cache(&folder).unwrap().unwrap_err();
    std::mem::forget(folder);
    assert!(matches!(error, Error::PipelineCache { .. }), "{error}");
}

/// Neither the zeros of a device, nor a pipe, nor a file with a hole as large as the disk is read.
#[cfg(unix)]
#[test]
fn endless_files_are_refused() {
    let Some(attention) = common::gpu().filter(|attention| {
        attention
            .device()
            .is_some_and(|device| device.capabilities().class != sink_attention::plan::DeviceClass::Nvidia)
    }) else {
        return;
    };
    let folder = sink_attention::testing::folder::Folder::new(env!("CARGO_TARGET_TMPDIR"), "tuning-endless");
    let (huge, pipe) = (folder.path("huge"), folder.path("pipe"));
    fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // Where there is no pipeline cache at all, the reason is another one; in any case it ends.
    let error = |path: &str| Attention::on(attention.device().unwrap().clone()).with_pipeline_cache(path).err();
    assert!(error("/dev/zero").is_some() && error(&pipe).is_some());
    // Not one of ours, and as good as absent.
    if let Some(error) = error(&huge) {
        assert!(error.to_string().contains("PIPELINE_CACHE"), "{error}");
    }
}

/// A device of the caller's that lacks the feature.
#[test]
fn a_device_without_pipeline_caches() {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let device = Device::from_wgpu(device, queue);
    let file = File::new("noop.cache");
    let error = Attention::on(device.clone()).with_pipeline_cache(&file.0).unwrap_err();
    assert!(matches!(error, Error::PipelineCache { .. }), "{error}");
    assert!(error.to_string().contains("PIPELINE_CACHE"), "{error}");
    assert_eq!(Timer::new(&device).unwrap().clock(), Clock::Wall);
}

#[test]
fn a_timer_times() {
    let Some(attention) = common::gpu() else { return };
    let device = attention.device().unwrap();
    let timer = Timer::new(device).unwrap();
    assert_eq!(timer.clock() == Clock::Timestamps, device.capabilities().timestamps);
    let problem = problem([1, 2, 1], [256, 256], [64, 64], options());
    let operands = Operands::random(&problem, 0);
    let buffers = common::buffers::Buffers::new(device, &problem, &operands);
    let prepared = attention.prepare_forward(&problem, &buffers.views()).unwrap();
    let nothing = timer.time(5, |_| {}).unwrap();
    let times = timer.time(300, |pass| prepared.encode_in(pass)).unwrap();
    assert_eq!((nothing.len(), times.len()), (5, 300));
    assert!(times.iter().max() > nothing.iter().min(), "{nothing:?}");
    assert!(times.iter().all(|time| !time.is_zero()));
    let series = timer.measure(5, std::time::Duration::from_secs(1), |pass| prepared.encode_in(pass)).unwrap();
    assert_eq!(series.runs(), 5);
    assert!(series.min() <= series.median() && series.median() <= series.max());
    // Time that does not suffice leaves three.
    let series = timer.measure(5, std::time::Duration::ZERO, |pass| prepared.encode_in(pass)).unwrap();
    assert_eq!(series.runs(), 3);
}
