//! The devices that tests run on.

use std::cell::OnceCell;
use std::io::Write as _;
use std::sync::{Mutex, OnceLock};

use crate::plan::DeviceClass;
use crate::plan::MicroKernel;
use crate::{Attention, DeviceChoice, Error};

/// A device of its own, on the adapter of [`gpu`].
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

/// The adapter that `SINK_ATTENTION_ADAPTER` names, or else the best one. It has the portable micro-kernel whatever the adapter offers.
/// [`cooperative`] has the other micro-kernel, whose gradients of sink logits have wider bounds.
///
/// It is the same device for all of a test. Two tests that run at the same time may have two, see `Lanes`.
///
/// Without an adapter the function says so where it is seen, and fails under `SINK_ATTENTION_REQUIRE_GPU=1`: a machine that lost its driver
/// must not look like one whose tests pass.
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

/// The devices that tests share. All tests share one device on a GPU. A software driver compiles a device's kernels one after the other, so
/// there each test that runs at the same time gets a device of its own.
struct Lanes {
    devices: Vec<Attention>,
    /// Number of threads that use each device.
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

    /// The device that the fewest threads have. It stays with this thread until the thread ends together with its test.
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

/// The adapter with the micro-kernel on fragments, if it has cooperative matrices with a known layout of their elements.
///
/// Without them the function says so, and fails under `SINK_ATTENTION_REQUIRE_COOPERATIVE=1`.
pub fn fragments() -> Option<Attention> {
    let cooperative = cooperative()?;
    let has_elements = cooperative.device().is_some_and(|device| {
        let capabilities = device.capabilities();
        capabilities.spirv.is_some() && capabilities.cooperative.is_some_and(|matrices| matrices.elements.is_some())
    });
    if !has_elements {
        let required = std::env::var("SINK_ATTENTION_REQUIRE_COOPERATIVE").is_ok_and(|value| value == "1");
        assert!(!required, "SINK_ATTENTION_REQUIRE_COOPERATIVE=1, but no known layout of the elements of fragments");
        did_not_run("NO LAYOUT OF ELEMENTS: the part with them");
        return None;
    }
    Some(cooperative.with_micro_kernel(MicroKernel::Fragments))
}

/// The adapter with the micro-kernel on fragments, if its matrices multiply bf16 as itself.
///
/// Without them the function says so, and fails under `SINK_ATTENTION_REQUIRE_BF16=1`: drivers without bf16 are many.
pub fn bf16_fragments() -> Option<Attention> {
    let matrices = |attention: &Attention| attention.device()?.capabilities().cooperative;
    let found = fragments().filter(|attention| matrices(attention).is_some_and(|matrices| matrices.bf16.is_some()));
    if found.is_none() {
        let required = std::env::var("SINK_ATTENTION_REQUIRE_BF16").is_ok_and(|value| value == "1");
        assert!(!required, "SINK_ATTENTION_REQUIRE_BF16=1, but no matrices that multiply bf16 as itself");
        did_not_run("NO MATRICES OF BF16: the part with them");
    }
    found
}

/// The adapter with the cooperative micro-kernel, if it has cooperative matrices.
///
/// Without them the function says so, and fails under `SINK_ATTENTION_REQUIRE_COOPERATIVE=1`.
pub fn cooperative() -> Option<Attention> {
    let required = std::env::var("SINK_ATTENTION_REQUIRE_COOPERATIVE").is_ok_and(|value| value == "1");
    let gpu = gpu().filter(|gpu| gpu.device().is_some_and(|device| device.capabilities().cooperative.is_some()));
    if gpu.is_none() {
        assert!(!required, "SINK_ATTENTION_REQUIRE_COOPERATIVE=1, but no adapter with cooperative matrices");
        did_not_run("NO COOPERATIVE MATRICES: the part with them");
    }
    gpu.map(|gpu| gpu.clone().with_micro_kernel(MicroKernel::Cooperative))
}

/// Bypasses the test harness, which swallows eprintln! of a test that passes.
fn did_not_run(what: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let _ = writeln!(std::io::stderr(), "\n!!!! {what} of {test} DID NOT RUN !!!!\n");
}
