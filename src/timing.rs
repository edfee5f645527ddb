//! How long a device takes, by its own clock where it has one.

use std::fmt;
use std::time::{Duration, Instant};

use crate::cache::{Step, StepPass};
use crate::device::Device;
use crate::problem::error::{Error, Result};

/// Runs between two readings of the timestamps.
const BATCH: u32 = 128;
/// Long enough for a clock to rise from idle; an H200's rises in steps, and takes more than 300 ms.
const WARM_UP: Duration = Duration::from_millis(800);
/// So many runs warm up at most: the queue of a driver has an end.
const WARM_UP_RUNS: f64 = 2000.0;

/// Which clock a [`Timer`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Clock {
    /// Timestamps of the GPU around the kernels alone.
    Timestamps,
    /// The host's clock around one submission and the wait for it, for devices without timestamps: it scatters, and
    /// short kernels drown in it.
    Wall,
}

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Clock::Timestamps => "GPU timestamps",
            Clock::Wall => "wall clock of single submissions, as the device takes no timestamps",
        })
    }
}

/// The durations of a series of runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Series {
    sorted: Vec<Duration>,
}

impl Series {
    /// A series of at least one run, in any order; `None` of no run.
    pub fn new(mut runs: Vec<Duration>) -> Option<Self> {
        runs.sort_unstable();
        (!runs.is_empty()).then_some(Series { sorted: runs })
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.sorted.len()
    }

    /// The shortest run.
    pub fn min(&self) -> Duration {
        self.sorted.first().copied().unwrap_or_default()
    }

    /// The middle run; of an even number, the later one of the two.
    pub fn median(&self) -> Duration {
        self.sorted.get(self.sorted.len() / 2).copied().unwrap_or_default()
    }

    /// The longest run.
    pub fn max(&self) -> Duration {
        self.sorted.last().copied().unwrap_or_default()
    }

    /// Whether the longest run took over 1.5 times the shortest: as a rule the clock had dropped or something else
    /// ran, and the series is to be measured again.
    pub fn disturbed(&self) -> bool {
        self.max() > self.min() * 3 / 2
    }
}

/// Times compute passes on a device.
///
/// ```
/// use sink_attention::timing::{Series, Timer};
/// use sink_attention::{Attention, DType, DeviceChoice, Error, ForwardBuffers, Options, Problem, Shape};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let shape = Shape { batch: 1, heads: 1, kv_heads: 1, seq_q: 64, seq_k: 64, head_dim: 16, value_dim: 16 };
/// let problem = Problem::new(shape, Options::new())?;
/// let zeros = |name, len| device.zeros(name, DType::F32, &[len]);
/// let [q, k, v, o, lse] = [zeros("q", 1024)?, zeros("k", 1024)?, zeros("v", 1024)?, zeros("o", 1024)?, zeros("lse", 64)?];
/// let forward = attention.prepare_forward(&problem, &ForwardBuffers::new(&q, &k, &v, &o, &lse))?;
///
/// let timer = Timer::new(device)?;
/// let Some(series) = Series::new(timer.time(3, |pass| forward.encode_in(pass))?) else { return Ok(()) };
/// println!("{:?} by {}", series.median(), timer.clock());
/// assert_eq!(series.runs(), 3);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Timer {
    device: Device,
    timestamps: Option<Timestamps>,
}

#[derive(Debug)]
struct Timestamps {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    read: wgpu::Buffer,
}

impl Timer {
    /// A timer by timestamps, or by the wall clock where the device was opened without
    /// [`wgpu::Features::TIMESTAMP_QUERY`]; [`clock`](Self::clock) says which.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`], [`Error::Gpu`].
    pub fn new(device: &Device) -> Result<Self> {
        let timestamps = || {
            let label = Some("sink-attention timer");
            let buffer = |usage| {
                let size = u64::from(2 * BATCH) * 8;
                device.wgpu().create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false })
            };
            Timestamps {
                queries: device.wgpu().create_query_set(&wgpu::QuerySetDescriptor {
                    label,
                    ty: wgpu::QueryType::Timestamp,
                    count: 2 * BATCH,
                }),
                resolved: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
                read: buffer(wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ),
            }
        };
        let offered = device.capabilities().timestamps;
        let timestamps =
            offered.then(|| pollster::block_on(device.scoped_async("creating a timer", timestamps))).transpose()?;
        Ok(Timer { device: device.clone(), timestamps })
    }

    /// The clock that it goes by.
    pub fn clock(&self) -> Clock {
        if self.timestamps.is_some() { Clock::Timestamps } else { Clock::Wall }
    }

    /// Runs a pass `runs` times and gives the duration of each. With timestamps the submissions follow each other
    /// without a wait, so that the device's clock stays up.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`], [`Error::Gpu`].
    pub fn time(&self, runs: usize, encode: impl Fn(&mut wgpu::ComputePass<'_>)) -> Result<Vec<Duration>> {
        self.times(runs, &|pass| encode(pass.pass()), &|step| {
            step.submit_unscoped();
            Ok(())
        })
    }

    /// As [`time`](Self::time) for passes with caches: each run is a [`Step`].
    ///
    /// # Errors
    /// As [`time`](Self::time), and those of [`Step::submit`].
    pub fn time_steps(&self, runs: usize, encode: impl Fn(&mut StepPass<'_>)) -> Result<Vec<Duration>> {
        self.times(runs, &encode, &|step| step.submit().map(|_| ()))
    }

    fn times(&self, runs: usize, encode: &Encode<'_>, submit: &Submit<'_>) -> Result<Vec<Duration>> {
        let Some(timestamps) = &self.timestamps else {
            return (0..runs).map(|_| self.wall(encode, submit)).collect();
        };
        let mut times = Vec::with_capacity(runs);
        while times.len() < runs {
            let count = (runs - times.len()).min(BATCH as usize) as u32;
            times.extend(self.batch(timestamps, count, encode, submit)?);
        }
        Ok(times)
    }

    /// Warms the device up, then times `runs` runs; fewer, but at least three, where they would take longer than `most`
    /// in all. A run of a second or more is not repeated for warmth.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`], [`Error::Gpu`].
    pub fn measure(&self, runs: usize, most: Duration, encode: impl Fn(&mut wgpu::ComputePass<'_>)) -> Result<Series> {
        measured(runs, most, |runs| self.time(runs, &encode))
    }

    /// As [`measure`](Self::measure) for passes with caches: each run is a [`Step`].
    ///
    /// # Errors
    /// As [`measure`](Self::measure), and those of [`Step::submit`].
    pub fn measure_steps(&self, runs: usize, most: Duration, encode: impl Fn(&mut StepPass<'_>)) -> Result<Series> {
        measured(runs, most, |runs| self.time_steps(runs, &encode))
    }

    fn wall(&self, encode: &Encode<'_>, submit: &Submit<'_>) -> Result<Duration> {
        self.scoped(|| {
            let start = Instant::now();
            self.submit(None, encode, submit)?;
            self.wait().map(|()| start.elapsed())
        })?
    }

    fn batch(
        &self,
        timestamps: &Timestamps,
        runs: u32,
        encode: &Encode<'_>,
        submit: &Submit<'_>,
    ) -> Result<Vec<Duration>> {
        let Timestamps { queries, resolved, read } = timestamps;
        let ticks = self.scoped(|| {
            for run in 0..runs {
                let writes = wgpu::ComputePassTimestampWrites {
                    query_set: queries,
                    beginning_of_pass_write_index: Some(2 * run),
                    end_of_pass_write_index: Some(2 * run + 1),
                };
                self.submit(Some(writes), encode, submit)?;
            }
            let mut encoder = self.device.wgpu().create_command_encoder(&Default::default());
            encoder.resolve_query_set(queries, 0..2 * runs, resolved, 0);
            encoder.copy_buffer_to_buffer(resolved, 0, read, 0, u64::from(runs) * 16);
            self.device.queue().submit([encoder.finish()]);
            read.map_async(wgpu::MapMode::Read, .., |_| {});
            self.wait()?;
            // Fails where the mapping did.
            let mapped = read.get_mapped_range(..).map_err(|error| failed(error.to_string()))?;
            let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&mapped);
            drop(mapped);
            read.unmap();
            Ok::<_, Error>(ticks)
        })??;
        let period = f64::from(self.device.queue().get_timestamp_period());
        let run = |t: &[u64]| {
            let ticks = t[1].checked_sub(t[0]).ok_or_else(|| failed("its timestamps run backwards".into()))?;
            Ok(Duration::from_secs_f64(ticks as f64 * period * 1e-9))
        };
        ticks.chunks_exact(2).take(runs as usize).map(run).collect()
    }

    fn submit(
        &self,
        timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
        encode: &Encode<'_>,
        submit: &Submit<'_>,
    ) -> Result<()> {
        let mut step = Step::new(&self.device);
        let descriptor = wgpu::ComputePassDescriptor { label: Some("sink-attention timed"), timestamp_writes };
        encode(&mut step.begin_compute_pass(&descriptor));
        submit(step)
    }

    fn wait(&self) -> Result<()> {
        self.device.wait().map_err(failed)
    }

    fn scoped<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        pollster::block_on(self.device.scoped_async("timing", work))
    }
}

type Encode<'a> = dyn Fn(&mut StepPass<'_>) + 'a;
type Submit<'a> = dyn Fn(Step) -> Result<()> + 'a;

fn measured(runs: usize, most: Duration, time: impl Fn(usize) -> Result<Vec<Duration>>) -> Result<Series> {
    // The first run may hold what the driver had put off.
    let first = time(2)?;
    let once = first.last().copied().unwrap_or_default().as_secs_f64().max(1e-6);
    if once < 1.0 {
        time((WARM_UP.as_secs_f64() / once).min(WARM_UP_RUNS) as usize)?;
    }
    let fitting = (most.as_secs_f64() / once) as usize;
    let times = time(runs.min(fitting).max(3))?;
    Series::new(times).ok_or_else(|| failed("no run was timed".into()))
}

fn failed(message: String) -> Error {
    Error::Gpu { during: "timing", message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(milliseconds: &[u64]) -> Series {
        Series::new(milliseconds.iter().map(|&n| Duration::from_millis(n)).collect()).unwrap()
    }

    #[test]
    fn least_middle_and_most() {
        for (runs, [min, median, max]) in
            [(&[7][..], [7, 7, 7]), (&[9, 1, 5], [1, 5, 9]), (&[4, 3, 2, 1], [1, 3, 4]), (&[2, 2, 8, 2], [2, 2, 8])]
        {
            let series = series(runs);
            assert_eq!([series.min(), series.median(), series.max()], [min, median, max].map(Duration::from_millis));
            assert_eq!(series.runs(), runs.len());
        }
        assert_eq!(Series::new(Vec::new()), None);
    }

    #[test]
    fn a_series_that_scatters_is_flagged() {
        assert!(!series(&[10, 12, 15]).disturbed());
        assert!(series(&[10, 10, 16]).disturbed());
        assert!(!series(&[10]).disturbed());
    }
}
