//! The GPU as a publisher: it copies rows into the arena itself and stores the sequence number behind them, on the stream
//! that computed them. No thread of the engine waits for a copy, or looks whether it is done.
//!
//! The driver's library is loaded when a device is first used, so the same build runs where there is none. The mapping
//! is pinned once, for all contexts. Three ways to publish, the same records:
//!
//! * **Graph**: kernels in the engine's CUDA graph write the rows and store the number with a system-scope release; where
//!   to, they read from a [`Mailbox`]. No call of the driver a step.
//! * **Stream**: `cuStreamWriteValue64` behind the copies. It is preceded by a memory fence, "similar semantics to
//!   `__threadfence_system()` but scoped to the stream" (CUDA driver API, "Types used by CUDA driver",
//!   `CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER`, a flag that the v2 call has not), and they came before it on that stream: so
//!   whoever sees the number with an acquire load sees the rows.
//! * **Event**, where a device lacks those operations or `EXPERT_LENS_PUBLISHER=event` asks: an event behind the copies,
//!   and a thread of ours that queries it and stores the number with release. A completed event makes what the stream did
//!   before it visible to the host ("Event Management", `cuEventQuery`).
//!
//! What the CPU writes into a record it writes before what stores the number is enqueued, or posted; the store that hands the
//! device that work comes after, and x86-64 and the driver's barriers keep that order.

mod driver;
mod events;
mod mailbox;

use crate::error::{Error, Result};
use crate::memory::{Mapped, Memory};
use crate::rows::Landing;
use driver::{Context, Driver, Entered, Handle};
use events::{EVENT_PERIOD, Event, LOOKS, Watcher};
pub(crate) use mailbox::ByPost;
pub use mailbox::Mailbox;
use std::ffi::{c_int, c_uint};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP: pinned for every context, and reached by the device.
const REGISTER_FLAGS: c_uint = 1 | 2;
/// CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
const CAN_WRITE_64: c_int = 122;
/// CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED
const CAN_REGISTER: c_int = 99;
/// Longest wait, at the end, for copies that are on their way.
const LANDING_TIMEOUT: Duration = Duration::from_secs(5);

/// How records of devices are published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Kernels in the engine's CUDA graph write the rows and the sequence number; of what runs in no graph, the stream does.
    Graph,
    /// The same, where a device cannot do the second.
    GraphAndEvent,
    /// The stream stores the sequence number.
    Stream,
    /// A thread of ours stores it, once an event has come.
    Event,
}

impl Way {
    /// As the arena tells it to readers; 0 stands for none.
    pub(crate) fn to_word(way: Option<Self>) -> u64 {
        match way {
            None => 0,
            Some(Self::Graph) => 1,
            Some(Self::Stream) => 2,
            Some(Self::Event) => 3,
            Some(Self::GraphAndEvent) => 4,
        }
    }

    /// What a word in the arena says; None for what no writer of ours stores.
    pub(crate) fn from_word(word: u64) -> Option<Self> {
        [Self::Graph, Self::Stream, Self::Event, Self::GraphAndEvent]
            .into_iter()
            .find(|&way| Self::to_word(Some(way)) == word)
    }
}

/// Set how this thread's calls stand to stream captures (0: global, 1: thread-local, 2: relaxed, CUDA driver API,
/// `CUstreamCaptureMode`); gives how they stood. Relaxed, they end no capture.
///
/// # Errors
/// [`Error::Cuda`] without a driver, or for another mode.
pub fn exchange_capture_mode(mode: u32) -> Result<u32> {
    let driver = Driver::get()?;
    let mut mode = mode;
    // SAFETY: a place for one value; the call touches nothing but this thread's own state.
    let status = unsafe { (driver.exchange_capture_mode)(&mut mode) };
    driver.check("cuThreadExchangeStreamCaptureMode", status).map(|()| mode)
}

/// A device that publishes, with its context retained.
struct Device {
    ordinal: c_int,
    context: Context,
    /// Where the device finds the arena.
    base: u64,
    /// [`Way::Stream`] or [`Way::Event`]: what publishes copies.
    by_event: bool,
}

/// Our streams, by the context that they are of: see [`Pinned::stream`].
static STREAMS: Mutex<Vec<(Context, usize)>> = Mutex::new(Vec::new());

/// An arena's mapping, pinned, and the devices that publish into it.
pub(crate) struct Pinned {
    driver: &'static Driver,
    memory: Arc<Mapped>,
    devices: Vec<Device>,
    watcher: Option<Watcher>,
    asked: Asked,
    /// How records were published so far; once a graph has, this says so.
    used: Option<Way>,
    /// Of each record that the driver refused part of, which will never land: an event behind what its stream was given of
    /// it. None if the driver refused that too, or if the record may land after all.
    refused: Vec<Option<Event>>,
}

/// What `EXPERT_LENS_PUBLISHER` asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// Graphs where there are some, streams elsewhere, events where a device lacks what streams need.
    Best,
    Stream,
    Event,
}

impl Pinned {
    /// Load the driver. Nothing is pinned before the first device is used.
    ///
    /// # Errors
    /// [`Error::Cuda`] without one, and beside any processor but an x86-64: what a device reads must have been stored in
    /// order, without fences.
    pub fn new(memory: Arc<Mapped>) -> Result<Self> {
        if !cfg!(target_arch = "x86_64") {
            let what =
                format!("devices publish beside x86-64 processors alone, and this is {}", std::env::consts::ARCH);
            return Err(Error::Cuda { what });
        }
        let asked = match std::env::var("EXPERT_LENS_PUBLISHER").as_deref() {
            Ok("event") => Asked::Event,
            Ok("stream") => Asked::Stream,
            Ok("graph" | "") | Err(_) => Asked::Best,
            Ok(other) => {
                return Err(Error::invalid(format!(
                    "EXPERT_LENS_PUBLISHER is '{other}'; give 'graph', 'stream' or 'event', or leave it out"
                )));
            }
        };
        let driver = Driver::get()?;
        Ok(Self { driver, memory, devices: Vec::new(), watcher: None, asked, used: None, refused: Vec::new() })
    }

    /// How records were published; None if none was.
    pub fn way(&self) -> Option<Way> {
        self.used
    }

    /// Pin the arena, and make it known to a device.
    pub fn prepare(&mut self, ordinal: i32) -> Result<()> {
        self.device(ordinal).map(|_| ())
    }

    /// A raw stream of our own on a device: one for all arenas, and for as long as the process runs, with its context, unless
    /// somebody resets that: whoever was told that some memory is used on it may look at it once more when he gives that
    /// memory back.
    pub fn stream(&mut self, ordinal: i32) -> Result<u64> {
        let at = self.device(ordinal)?;
        let context = self.devices[at].context;
        let _relaxed = self.driver.relax()?;
        let mut streams = STREAMS.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|&(of, _)| self.driver.lives(of));
        if let Some(&(_, stream)) = streams.iter().find(|&&(of, _)| of == context) {
            return Ok(stream as u64);
        }
        let stream = self.driver.within(context, || self.driver.create_stream())?;
        self.driver.retain(context.device)?; // given back by nobody: the stream lasts
        streams.push((context, stream as usize));
        Ok(stream as u64)
    }

    /// What brings rows of a device into the arena, on its raw stream.
    pub fn landing(&mut self, ordinal: i32, stream: u64) -> Result<OnStream<'_>> {
        let at = self.device(ordinal)?;
        if !matches!(self.used, Some(Way::Graph | Way::GraphAndEvent)) {
            self.used = Some(if self.devices[at].by_event { Way::Event } else { Way::Stream });
        }
        let entered = self.driver.enter(self.devices[at].context)?;
        Ok(OnStream { pinned: self, at, stream: stream as usize, _entered: entered })
    }

    /// A mailbox of so many entries for a graph of that device, with `table` behind its state; None if another way to publish
    /// was asked for.
    pub fn mailbox(&mut self, ordinal: i32, table: &[u64], entries: usize) -> Result<Option<Mailbox>> {
        let at = self.device(ordinal)?;
        if self.asked != Asked::Best {
            return Ok(None);
        }
        Mailbox::new(self.driver, ordinal, self.devices[at].context, table, entries).map(Some)
    }

    /// What publishes a step of `rows` rows by the next replay of the mailbox's graph; None if too many replays are on
    /// their way.
    pub fn by_post<'a>(&mut self, mailbox: &'a mut Mailbox, rows: usize) -> Result<Option<ByPost<'a>>> {
        let has_room = mailbox.posts().advance()?;
        let at = self.device(mailbox.ordinal())?;
        self.used = Some(if self.devices[at].by_event { Way::GraphAndEvent } else { Way::Graph });
        Ok(has_room.then(|| ByPost { mailbox, base: self.devices[at].base, rows, payload: None }))
    }

    /// Store `value` at word `at` once that raw stream has come so far, if `instead_of` stands there still: the device may
    /// have published the record itself.
    pub fn publish_behind(&mut self, ordinal: i32, stream: u64, at: usize, value: u64, instead_of: u64) -> Result<()> {
        let said = self.watch_behind(ordinal, stream as Handle, at, value, instead_of);
        if said.is_err() {
            // The graph may publish it or not, so that it cannot be told which record is still on its way.
            self.refused.push(None);
        }
        said
    }

    fn watch_behind(&mut self, ordinal: i32, stream: Handle, at: usize, value: u64, instead_of: u64) -> Result<()> {
        let of = self.device(ordinal)?;
        let context = self.devices[of].context;
        let _entered = self.driver.enter(context)?;
        self.watcher()?.watch(stream, context, at, value, Some(instead_of))
    }

    /// What the driver said of a record on that stream, which lands no more if it refused; the context is current.
    fn noted(&mut self, said: Result<()>, context: Context, stream: Handle) -> Result<()> {
        if said.is_err() {
            let event = Event::create(self.driver, context).and_then(|event| event.record(stream).map(|()| event));
            self.refused.push(event.ok());
        }
        said
    }

    fn watcher(&mut self) -> Result<&mut Watcher> {
        if self.watcher.is_none() {
            self.watcher = Some(Watcher::start(self.driver, Arc::clone(&self.memory))?);
        }
        Ok(self.watcher.as_mut().expect("made above"))
    }

    fn device(&mut self, ordinal: i32) -> Result<usize> {
        match self.devices.iter().position(|device| device.ordinal == ordinal) {
            Some(at) => Ok(at),
            None => self.add(ordinal),
        }
    }

    fn add(&mut self, ordinal: c_int) -> Result<usize> {
        let driver = self.driver;
        let mut device: c_int = 0;
        // SAFETY: a place for one value.
        driver.check("cuDeviceGet", unsafe { (driver.device_get)(&mut device, ordinal) })?;
        if !driver.can(device, CAN_REGISTER) {
            return Err(Error::Cuda { what: format!("device {ordinal} cannot register memory of the host") });
        }
        let can_write = driver.write_value.is_some() && driver.can(device, CAN_WRITE_64);
        let by_event = self.asked == Asked::Event || !can_write;
        if by_event {
            self.watcher()?;
        }
        let _relaxed = driver.relax()?;
        let context = driver.retain(device)?; // given back in `drop`
        let base = driver.within(context, || self.pin()).inspect_err(|_| driver.release(context))?;
        self.devices.push(Device { ordinal, context, base, by_event });
        Ok(self.devices.len() - 1)
    }

    /// Pin the mapping, unless another device has had that done; gives where the device finds it whose context is current.
    fn pin(&self) -> Result<u64> {
        let (driver, first) = (self.driver, self.devices.is_empty());
        let (address, len) = (self.memory.address(), self.memory.len() * 8);
        if first {
            // SAFETY: the mapping is `len` bytes, page-aligned, and stays mapped until `Pinned` has unregistered it.
            let status = unsafe { (driver.register)(address, len, REGISTER_FLAGS) };
            driver.check("cuMemHostRegister", status).map_err(|error| Error::Cuda {
                what: format!(
                    "cannot pin the arena of {len} bytes: {error}; it must lie on a tmpfs (EXPERT_LENS_DIR, by default in \
                     /dev/shm), and fit into what the process may lock"
                ),
            })?;
        }
        let mut base = 0;
        // SAFETY: `address` is registered, with DEVICEMAP and PORTABLE; `base` is a place for one pointer.
        let status = unsafe { (driver.device_pointer)(&mut base, address, 0) };
        driver.check("cuMemHostGetDevicePointer", status).inspect_err(|_| {
            if first {
                // SAFETY: registered above, and no device knows it yet.
                unsafe { (driver.unregister)(address) };
            }
        })?;
        Ok(base)
    }

    /// Let the copies that are on their way land: `in_flight` says how many records have not. If they do not within
    /// [`LANDING_TIMEOUT`], the mapping is leaked, pinned as it is, because a device may still write to it. Of records that
    /// the driver has refused it is enough that their streams have done what they were given, which is looked at and not
    /// waited for: somebody may capture a graph meanwhile, and synchronising a context would end that. An event may be
    /// awaited of a record that is no longer on its way: a void one that its graph has published all the same. Where every
    /// context was reset nothing is on its way any more, whatever has not landed.
    pub fn settle(&mut self, in_flight: impl Fn() -> usize) {
        let deadline = Instant::now() + LANDING_TIMEOUT;
        let _relaxed = self.driver.relax();
        for look in 0u64.. {
            let watched = self.watcher.as_ref().map_or(Some(true), Watcher::is_done);
            let mut refused = self.refused.iter().map(|event| event.as_ref().and_then(Event::has_come));
            let done = watched.and_then(|done| refused.try_fold(done, |done, has_come| Some(has_come? && done)));
            if done == Some(true) && in_flight() <= self.refused.len() {
                return;
            }
            if look % LOOKS == 0 && !self.devices.iter().any(|device| self.driver.lives(device.context)) {
                return;
            }
            if done.is_none() || Instant::now() >= deadline {
                std::mem::forget((Arc::clone(&self.memory), self.watcher.take()));
                self.devices.clear();
                return;
            }
            std::thread::sleep(EVENT_PERIOD);
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let (driver, address) = (self.driver, self.memory.address());
        let _relaxed = driver.relax();
        self.watcher = None;
        self.refused.clear(); // while their contexts live
        // If a context was reset before us, what was made in it is gone.
        if let Some(device) = self.devices.iter().find(|device| driver.lives(device.context)) {
            let unpin = || {
                // SAFETY: registered in `pin`, portable, so that any context will do; `settle` has seen every copy land, or
                // the streams be done, so no device writes there any more.
                driver.check("cuMemHostUnregister", unsafe { (driver.unregister)(address) })
            };
            let _ = driver.within(device.context, unpin);
        }
        for device in &self.devices {
            driver.release(device.context);
        }
    }
}

/// Copies and publishes on one stream, whose context is current meanwhile.
pub(crate) struct OnStream<'a> {
    pinned: &'a mut Pinned,
    at: usize,
    /// Its CUstream.
    stream: usize,
    _entered: Entered,
}

impl OnStream<'_> {
    /// As [`Pinned::noted`].
    fn noted(&mut self, said: Result<()>) -> Result<()> {
        self.pinned.noted(said, self.pinned.devices[self.at].context, self.stream as Handle)
    }
}

impl Landing for OnStream<'_> {
    fn copy(&mut self, at: usize, address: u64, len: usize) -> Result<()> {
        let Pinned { driver, memory, .. } = &*self.pinned;
        assert!(at * 8 + len <= memory.len() * 8, "the writer reserved what it copies to");
        // SAFETY: the target is `len` bytes of the pinned mapping, reserved for this record; nobody else writes there until
        // the record has landed (`Writer::make_room`). The source is the caller's: `Writer::publish_device`.
        let said = driver.check("cuMemcpyDtoHAsync", unsafe {
            let target = memory.address().cast::<u8>().add(at * 8).cast();
            (driver.copy_to_host)(target, address, len, self.stream as Handle)
        });
        self.noted(said)
    }

    fn publish(&mut self, at: usize, value: u64) -> Result<()> {
        let stream = self.stream as Handle;
        let Pinned { driver, memory, devices, watcher, .. } = &mut *self.pinned;
        let device = &devices[self.at];
        assert!(at < memory.len(), "the writer publishes in its arena");
        let said = match (driver.write_value, watcher) {
            // SAFETY: the word lies in the pinned mapping, where the device knows it as `base + at * 8`. Flags must be 0.
            (Some(write_value), _) if !device.by_event => driver
                .check("cuStreamWriteValue64", unsafe { write_value(stream, device.base + at as u64 * 8, value, 0) }),
            (_, Some(watcher)) => watcher.watch(stream, device.context, at, value, None),
            (_, None) => unreachable!("a device that publishes by event has started the watcher"),
        };
        self.noted(said)
    }
}
