//! Shared by the integration tests: the GPU there is, operands, and the comparing functions.

#[cfg(feature = "cli")]
pub mod binary;
#[cfg(feature = "cli")]
pub mod files;

pub mod buffers;
pub mod caches;
pub mod gradients;
/// The law that the command's check holds a device to, too.
#[path = "../../src/cli/check/hidden.rs"]
pub mod hidden;
pub mod low_precision;
pub mod operands;
pub mod prefills;
#[path = "../../src/cli/check/random.rs"]
pub mod random;
#[cfg(feature = "cli")]
pub mod saved;
pub mod shards;
pub mod tint;
pub mod views;

use std::cell::OnceCell;
use std::io::Write as _;
use std::sync::{Mutex, OnceLock};

/// The comparing functions of the project; their own tests are in src/compare.rs.
pub use sink_attention::compare::{low_precision as compare_low_precision, lse as compare_lse, tensor as compare};
use sink_attention::{Attention, DeviceChoice, DeviceClass, Error, MicroKernel};

/// Whether all cases are wanted: `SINK_ATTENTION_TESTS=all`. Otherwise every option, element type, kernel and error has its
/// cases, but fewer, for a software driver compiles each kernel for a second or more: widths and tiles are fewer, and element
/// types take turns with options.
pub fn all_cases() -> bool {
    match std::env::var_os("SINK_ATTENTION_TESTS") {
        None => false,
        Some(value) if value == "all" => true,
        Some(value) => panic!("SINK_ATTENTION_TESTS is {value:?}, which is not \"all\""),
    }
}

/// The usual cases, and the others where all are wanted.
pub fn with_others<T>(usual: impl IntoIterator<Item = T>, others: impl IntoIterator<Item = T>) -> Vec<T> {
    usual.into_iter().chain(others.into_iter().filter(|_| all_cases())).collect()
}

/// The first of so many cases and each that comes as many later; every one where all are wanted.
pub fn every<T>(nth: usize, cases: impl IntoIterator<Item = T>) -> Vec<T> {
    cases.into_iter().step_by(if all_cases() { 1 } else { nth }).collect()
}

/// A number of random cases, or the larger one where all are wanted.
pub fn this_many(usual: u32, all: u32) -> u32 {
    if all_cases() { all } else { usual }
}

/// A device of its own on the adapter of [`gpu`].
pub fn another_gpu() -> Option<Attention> {
    gpu()?;
    Some(Attention::open(&choice()).expect("a device opened before").with_micro_kernel(MicroKernel::Portable))
}

fn choice() -> DeviceChoice {
    match DeviceChoice::from_env() {
        adapter @ DeviceChoice::Adapter(_) => adapter,
        _ => DeviceChoice::Gpu,
    }
}

/// The adapter that `SINK_ATTENTION_ADAPTER` names, else the best one. With the portable micro-kernel, whatever the
/// adapter has: the other one, whose gradients of sink logits have wider bounds, is [`cooperative`]'s.
///
/// The same device for all of a test; two that run at the same time may have two, see [`Lanes`].
///
/// Without one, says so where it is seen, and fails where `SINK_ATTENTION_REQUIRE_GPU=1`: a machine
/// that lost its driver must not look like one whose tests pass.
pub fn gpu() -> Option<&'static Attention> {
    static LANES: OnceLock<Option<Lanes>> = OnceLock::new();
    let lanes = LANES.get_or_init(|| {
        let choice = choice();
        match Attention::open(&choice) {
            Ok(attention) => {
                assert!(attention.is_gpu(), "{choice:?} opened {}", attention.device_name());
                Some(Lanes::new(attention))
            }
            Err(Error::NoAdapter) => None,
            Err(error) => panic!("{choice:?} does not open: {error}"),
        }
    });
    if lanes.is_none() {
        let required = std::env::var("SINK_ATTENTION_REQUIRE_GPU").is_ok_and(|value| value == "1");
        assert!(!required, "SINK_ATTENTION_REQUIRE_GPU=1, but there is no GPU adapter");
        did_not_run("NO GPU ADAPTER: the GPU part");
    }
    lanes.as_ref().map(Lanes::of_this_thread)
}

/// The devices that tests share. A GPU is one device; a software driver compiles a device's kernels one after the other, so
/// there each of the tests that run at the same time gets its own.
struct Lanes {
    devices: Vec<Attention>,
    /// Threads that each device belongs to.
    threads: Mutex<Vec<usize>>,
}

impl Lanes {
    fn new(first: Attention) -> Self {
        let software = first.device().is_some_and(|device| device.capabilities().class == DeviceClass::Software);
        let tests = std::thread::available_parallelism().map_or(1, usize::from);
        let more = if software { tests.min(8) - 1 } else { 0 };
        let open = |_| Attention::open(&choice()).expect("a device opened before");
        let devices: Vec<Attention> = (0..more).map(open).chain([first]).collect();
        let threads = Mutex::new(vec![0; devices.len()]);
        Lanes {
            devices: devices.into_iter().map(|device| device.with_micro_kernel(MicroKernel::Portable)).collect(),
            threads,
        }
    }

    /// The one that the fewest threads have, until this thread ends, as it does with its test.
    fn of_this_thread(&'static self) -> &'static Attention {
        struct Lane(&'static Lanes, usize);

        impl Drop for Lane {
            fn drop(&mut self) {
                self.0.threads.lock().unwrap()[self.1] -= 1;
            }
        }

        thread_local! {
            static LANE: OnceCell<Lane> = const { OnceCell::new() };
        }
        let lane = |lane: &OnceCell<Lane>| {
            let new = || {
                let mut threads = self.threads.lock().unwrap();
                let least = (0..threads.len()).min_by_key(|&n| threads[n]).expect("a device");
                threads[least] += 1;
                Lane(self, least)
            };
            lane.get_or_init(new).1
        };
        &self.devices[LANE.with(lane)]
    }
}

/// The adapter with the cooperative micro-kernel, where it has cooperative matrices.
///
/// Where it has none, says so, and fails where `SINK_ATTENTION_REQUIRE_COOPERATIVE=1`.
pub fn cooperative() -> Option<Attention> {
    let required = std::env::var("SINK_ATTENTION_REQUIRE_COOPERATIVE").is_ok_and(|value| value == "1");
    let gpu = gpu().filter(|gpu| gpu.device().is_some_and(|device| device.capabilities().cooperative.is_some()));
    if gpu.is_none() {
        assert!(!required, "SINK_ATTENTION_REQUIRE_COOPERATIVE=1, but no adapter with cooperative matrices");
        did_not_run("NO COOPERATIVE MATRICES: the part with them");
    }
    gpu.map(|gpu| gpu.clone().with_micro_kernel(MicroKernel::Cooperative))
}

/// Past the test harness, which swallows eprintln! of a test that passes.
fn did_not_run(what: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "\n!!!! {what} of {test} DID NOT RUN !!!!\n");
}
