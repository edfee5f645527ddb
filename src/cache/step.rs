//! A step: what is recorded of caches in one encoder, and counted once it has been submitted.
//!
//! A step and the caches that it touches share a [`Ticket`], one atomic number. A cache that is written keeps its book as it
//! was before the step; what the ticket says decides which of the two books holds. So neither needs the other to be alive.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::device::Device;
use crate::problem::error::{Error, Result};

/// The one way to record what changes a cache, or reads it in order: an encoder with the caches that it touches.
///
/// [`submit`](Self::submit) submits all that was recorded, and with that the caches have it. A step that is dropped, or whose
/// submission fails, leaves no trace: nothing of it ever runs, and the lengths and pages of all caches that it touched are
/// those from before it. While it is open, a cache that it touched can be recorded into no other step
/// ([`Error::CacheBusy`]); so steps run in the order of their recording, without any rule that a caller must keep.
///
/// A step may touch any number of caches, of one device. It is made by [`Attention::step`](crate::Attention::step).
///
/// ```
/// use sink_attention::cache::{AppendBuffers, CacheConfig, CacheKind};
/// use sink_attention::{Attention, DType, DeviceChoice, Error};
///
/// # fn main() -> Result<(), Error> {
/// # let attention = match Attention::open(&DeviceChoice::Gpu) { Err(Error::NoAdapter) => return Ok(()), opened => opened? };
/// let Some(device) = attention.device() else { return Ok(()) };
/// let mut cache = attention.create_cache(&CacheConfig::new(CacheKind::Contiguous { capacity: 8 }, 1, 1, 4))?;
/// let [k, v] = [device.zeros("k", DType::F32, &[1, 1, 4])?, device.zeros("v", DType::F32, &[1, 1, 4])?];
/// let append = cache.prepare_append(&[1], &AppendBuffers::new(&k, &v))?;
///
/// let mut dropped = attention.step()?.label("a guess");
/// append.encode(&mut cache, &mut dropped)?;
/// assert_eq!(cache.lengths(), [1]); // as recorded so far
/// drop(dropped);
/// assert_eq!(cache.lengths(), [0]); // it has not happened
///
/// let mut step = attention.step()?;
/// append.encode(&mut cache, &mut step)?;
/// append.encode(&mut cache, &mut step)?;
/// step.submit()?;
/// assert_eq!(cache.lengths(), [2]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Step {
    device: Device,
    encoder: wgpu::CommandEncoder,
    ticket: Held,
}

impl Step {
    pub(crate) fn new(device: &Device) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let encoder = device
            .wgpu()
            .create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("sink-attention step") });
        let ticket = Ticket {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            label: OnceLock::new(),
            device: device.wgpu().clone(),
            state: AtomicU8::new(OPEN),
        };
        #[cfg_attr(
            target_family = "wasm",
            expect(clippy::arc_with_non_send_sync, reason = "a browser's devices belong to one thread, others do not")
        )]
        let ticket = Held(Arc::new(ticket));
        Step { device: device.clone(), encoder, ticket }
    }

    /// Names it in errors. The first name stays.
    pub fn label(self, label: impl Into<String>) -> Self {
        // A second name is ignored.
        let _ = self.ticket.0.label.set(label.into());
        self
    }

    /// Its encoder, for passes and copies of the caller's: they run between what was recorded before and after.
    pub fn encoder(&mut self) -> &mut wgpu::CommandEncoder {
        &mut self.encoder
    }

    /// A compute pass for several operations, or with timestamps.
    pub fn begin_compute_pass(&mut self, descriptor: &wgpu::ComputePassDescriptor<'_>) -> StepPass<'_> {
        StepPass { ticket: &self.ticket.0, pass: self.encoder.begin_compute_pass(descriptor) }
    }

    /// Submits all that was recorded. The index is for [`wgpu::PollType::Wait`].
    ///
    /// # Errors
    /// [`Error::Gpu`] for what wgpu refuses (a buffer that was destroyed or is mapped, a mistake in a pass of the caller's),
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`]: nothing has run then, and the caches are as before the step.
    #[cfg(not(target_family = "wasm"))]
    pub fn submit(self) -> Result<wgpu::SubmissionIndex> {
        pollster::block_on(self.submit_async())
    }

    /// As [`submit`](Self::submit), for browsers and async hosts. It submits when it is first polled. Where it is then dropped
    /// before it is done, nobody knows whether the submission was refused: the caches that it touched stay busy, until
    /// [`KvCache::restore`](crate::cache::KvCache::restore).
    ///
    /// # Errors
    /// As [`submit`](Self::submit).
    pub async fn submit_async(self) -> Result<wgpu::SubmissionIndex> {
        let Step { device, encoder, ticket } = self;
        ticket.0.set(SUBMITTING);
        let submitted = device.scoped_async("submitting a step", || device.queue().submit([encoder.finish()])).await;
        ticket.0.set(if submitted.is_ok() { SUBMITTED } else { DROPPED });
        submitted
    }

    /// Without scopes of its own: within those of the caller.
    #[cfg(not(target_family = "wasm"))]
    pub(crate) fn submit_unscoped(self) {
        let Step { device, encoder, ticket } = self;
        ticket.0.set(SUBMITTING);
        device.queue().submit([encoder.finish()]);
        ticket.0.set(SUBMITTED);
    }

    pub(super) fn ticket(&self) -> &Arc<Ticket> {
        &self.ticket.0
    }
}

/// A compute pass of a [`Step`].
#[derive(Debug)]
pub struct StepPass<'a> {
    ticket: &'a Arc<Ticket>,
    pass: wgpu::ComputePass<'a>,
}

impl<'a> StepPass<'a> {
    /// The pass itself, for dispatches of the caller's.
    pub fn pass(&mut self) -> &mut wgpu::ComputePass<'a> {
        &mut self.pass
    }

    pub(super) fn ticket(&self) -> &Arc<Ticket> {
        self.ticket
    }
}

/// No part of the step has been submitted.
const OPEN: u8 = 0;
/// wgpu has the step, and has not yet said whether it is valid.
const SUBMITTING: u8 = 1;
const SUBMITTED: u8 = 2;
/// The step never ran.
const DROPPED: u8 = 3;
/// It is not known whether the step ran.
const UNKNOWN: u8 = 4;

/// The state that a step shares with the caches that it touches.
#[derive(Debug)]
pub(super) struct Ticket {
    number: u64,
    label: OnceLock<String>,
    pub(super) device: wgpu::Device,
    state: AtomicU8,
}

impl Ticket {
    fn set(&self, state: u8) {
        self.state.store(state, Ordering::Release);
    }

    fn state(&self) -> u8 {
        self.state.load(Ordering::Acquire)
    }

    /// Whether the step never ran, and never will.
    pub(super) fn is_dropped(&self) -> bool {
        self.state() == DROPPED
    }

    /// An error, unless the step is known to have run or never to run.
    pub(super) fn check_ended(&self) -> Result<()> {
        let (step, reason) = match self.state() {
            SUBMITTED | DROPPED => return Ok(()),
            UNKNOWN => (self.to_string(), "whose submission was not awaited to its end: restore the cache"),
            _ => (self.to_string(), "which is open: submit or drop it first"),
        };
        Err(Error::CacheBusy { step, reason })
    }

    /// An error while it may be submitted still.
    #[cfg(any(test, feature = "safetensors"))]
    pub(super) fn check_closed(&self) -> Result<()> {
        if self.state() == UNKNOWN { Ok(()) } else { self.check_ended() }
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.label.get() {
            Some(label) => write!(f, "step {} ({label})", self.number),
            None => write!(f, "step {}", self.number),
        }
    }
}

/// The step's own reference to its ticket. When it is dropped, the caches learn that the step is gone.
#[derive(Debug)]
struct Held(Arc<Ticket>);

impl Drop for Held {
    fn drop(&mut self) {
        match self.0.state() {
            OPEN => self.0.set(DROPPED),
            SUBMITTING => self.0.set(UNKNOWN),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    #[test]
    fn how_a_step_ends() {
        let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
        let device = Device::from_wgpu(device, queue);
        let step = || {
            let step = Step::new(&device).label("named").label("again");
            let ticket = step.ticket().clone();
            let error = ticket.check_ended().unwrap_err().to_string();
            let name = format!(
                "the cache is in use by step {} (named), which is open: submit or drop it first",
                ticket.number
            );
            assert_eq!(error, name);
            assert!(ticket.check_closed().is_err() && !ticket.is_dropped());
            (step, ticket)
        };
        let (dropped, ticket) = step();
        drop(dropped);
        assert!(ticket.is_dropped() && ticket.check_ended().is_ok());

        let (submitted, ticket) = step();
        submitted.submit().unwrap();
        assert!(!ticket.is_dropped() && ticket.check_ended().is_ok());

        // Nothing is submitted before the future is polled.
        let (never_polled, ticket) = step();
        drop(never_polled.submit_async());
        assert!(ticket.is_dropped());

        // The future is dropped between the submission and the answer to it.
        let (forgotten, ticket) = step();
        forgotten.ticket.0.set(SUBMITTING);
        assert!(ticket.check_closed().is_err());
        drop(forgotten);
        assert!(!ticket.is_dropped() && ticket.check_closed().is_ok());
        let error = ticket.check_ended().unwrap_err().to_string();
        assert!(error.contains("was not awaited to its end: restore the cache"), "{error}");

        // Outside browsers the answer is there at once.
        let (polled, ticket) = step();
        let mut future = Box::pin(polled.submit_async());
        assert!(future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
        assert!(ticket.check_ended().is_ok() && !ticket.is_dropped());
    }
}
