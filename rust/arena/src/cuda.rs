//! The GPU as a publisher: it copies rows into the arena itself and stores the sequence number behind them, on the stream
//! that computed them. No thread of the engine waits for a copy, or looks whether it is done.
//!
//! The driver's library is loaded when a device is first used, so the same build runs where there is none. The mapping
//! is pinned once, for all contexts. Two ways to publish, the same records:
//!
//! * **Stream**: `cuStreamWriteValue64` behind the copies. Without `CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER` it is preceded
//!   by a system-wide memory fence that covers them (CUDA driver API, "Stream Memory Operations"), so whoever sees the
//!   number with an acquire load sees the rows.
//! * **Event**, where a device lacks those operations or `EXPERT_LENS_PUBLISHER=event` asks: an event behind the copies,
//!   and a thread of ours that queries it and stores the number with release. A completed event makes what the stream did
//!   before it visible to the host ("Event Management", `cuEventQuery`).
//!
//! What the CPU writes into a record it writes before the copies are enqueued; the store that hands the device its work
//! comes after, and x86-64 and the driver's barriers keep that order.

use crate::error::{Error, Result};
use crate::memory::{Mapped, Memory};
use crate::writer::Landing;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::Ordering::Release;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

type Status = c_int;
type Handle = *mut c_void;

const LIBRARY: &str = "libcuda.so.1";
const NOT_READY: Status = 600;
/// CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP: pinned for every context, and reached by the device.
const REGISTER_FLAGS: c_uint = 1 | 2;
/// CU_EVENT_DISABLE_TIMING
const EVENT_FLAGS: c_uint = 2;
/// CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
const CAN_WRITE_64: c_int = 122;
/// CU_STREAM_CAPTURE_MODE_RELAXED: this thread's calls do not end a capture that another thread is making.
const RELAXED: c_uint = 2;
/// How often the event publisher looks.
const EVENT_PERIOD: Duration = Duration::from_micros(20);
/// Longest wait, at the end, for copies that are on their way.
const LANDING_TIMEOUT: Duration = Duration::from_secs(5);

macro_rules! driver {
    ($($name:ident: $symbol:literal($($argument:ty),*);)*) => {
        /// The driver's functions that are used here.
        struct Driver {
            $($name: unsafe extern "C" fn($($argument),*) -> Status,)*
            /// Keeps the functions where they are.
            _library: Library,
        }

        impl Driver {
            fn load() -> std::result::Result<Self, libloading::Error> {
                // SAFETY: the library is the driver's, whose initialisers any CUDA program runs; each symbol is given the
                // type that cuda.h declares for the name with that version suffix, which never changes.
                unsafe {
                    let library = Library::new(LIBRARY)?;
                    Ok(Self { $($name: *library.get($symbol)?,)* _library: library })
                }
            }
        }
    };
}

driver! {
    init: b"cuInit\0"(c_uint);
    error_name: b"cuGetErrorName\0"(Status, *mut *const c_char);
    device_get: b"cuDeviceGet\0"(*mut c_int, c_int);
    device_attribute: b"cuDeviceGetAttribute\0"(*mut c_int, c_int, c_int);
    retain_context: b"cuDevicePrimaryCtxRetain\0"(*mut Handle, c_int);
    release_context: b"cuDevicePrimaryCtxRelease_v2\0"(c_int);
    current_context: b"cuCtxGetCurrent\0"(*mut Handle);
    push_context: b"cuCtxPushCurrent_v2\0"(Handle);
    pop_context: b"cuCtxPopCurrent_v2\0"(*mut Handle);
    register: b"cuMemHostRegister_v2\0"(*mut c_void, usize, c_uint);
    unregister: b"cuMemHostUnregister\0"(*mut c_void);
    device_pointer: b"cuMemHostGetDevicePointer_v2\0"(*mut u64, *mut c_void, c_uint);
    copy_to_host: b"cuMemcpyDtoHAsync_v2\0"(*mut c_void, u64, usize, Handle);
    write_value: b"cuStreamWriteValue64_v2\0"(Handle, u64, u64, c_uint);
    event_create: b"cuEventCreate\0"(*mut Handle, c_uint);
    event_record: b"cuEventRecord\0"(Handle, Handle);
    event_query: b"cuEventQuery\0"(Handle);
    event_destroy: b"cuEventDestroy_v2\0"(Handle);
    exchange_capture_mode: b"cuThreadExchangeStreamCaptureMode\0"(*mut c_uint);
}

impl Driver {
    fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<std::result::Result<Driver, String>> = OnceLock::new();
        let driver = DRIVER.get_or_init(|| {
            let driver = Driver::load().map_err(|error| format!("cannot load {LIBRARY}: {error}"))?;
            // SAFETY: cuInit takes flags, which must be 0, and may be called again and again.
            match unsafe { (driver.init)(0) } {
                0 => Ok(driver),
                status => Err(format!("cuInit failed: {}", driver.name_of(status))),
            }
        });
        driver.as_ref().map_err(|why| Error::Cuda { what: why.clone() })
    }

    fn name_of(&self, status: Status) -> String {
        let mut name = std::ptr::null();
        // SAFETY: `name` is a place for one pointer; where the call succeeds, it points to a constant string.
        let known = unsafe { (self.error_name)(status, &mut name) } == 0 && !name.is_null();
        if !known {
            return format!("error {status}");
        }
        // SAFETY: as above: a constant, NUL-terminated string of the driver.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    fn check(&self, call: &str, status: Status) -> Result<()> {
        if status == 0 { Ok(()) } else { Err(Error::Cuda { what: format!("{call} failed: {}", self.name_of(status)) }) }
    }

    /// Run `work` with `context` current, and calls that would end another thread's stream capture allowed.
    fn within<T>(&self, context: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut mode = RELAXED;
        let mut current: Handle = std::ptr::null_mut();
        // SAFETY: places for one value each; neither call touches anything but this thread's own state.
        unsafe {
            self.check("cuThreadExchangeStreamCaptureMode", (self.exchange_capture_mode)(&mut mode))?;
            (self.current_context)(&mut current);
        }
        let pushed = current as usize != context;
        let entered = if pushed {
            // SAFETY: `context` is a primary context that is retained for as long as its `Device` lives.
            self.check("cuCtxPushCurrent", unsafe { (self.push_context)(context as Handle) })
        } else {
            Ok(())
        };
        let result = entered.and_then(|()| {
            let result = work();
            if pushed {
                // SAFETY: takes off what was pushed above; `current` is a place for its handle.
                unsafe { (self.pop_context)(&mut current) };
            }
            result
        });
        // SAFETY: puts back the mode that the first call gave.
        unsafe { (self.exchange_capture_mode)(&mut mode) };
        result
    }
}

/// How records of a device are published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The stream stores the sequence number.
    Stream,
    /// A thread of ours stores it, once an event has come.
    Event,
}

/// A device that publishes, with its context retained.
struct Device {
    ordinal: c_int,
    /// Its CUdevice.
    device: c_int,
    /// Its CUcontext.
    context: usize,
    /// Where the device finds the arena.
    base: u64,
    way: Way,
}

/// An arena's mapping, pinned, and the devices that publish into it.
pub(crate) struct Pinned {
    driver: &'static Driver,
    memory: Arc<Mapped>,
    devices: Vec<Device>,
    watcher: Option<Watcher>,
    events_only: bool,
}

impl Pinned {
    /// Load the driver. Nothing is pinned before the first device is used.
    pub fn new(memory: Arc<Mapped>) -> Result<Self> {
        let events_only = match std::env::var("EXPERT_LENS_PUBLISHER").as_deref() {
            Ok("event") => true,
            Ok("stream" | "") | Err(_) => false,
            Ok(other) => {
                return Err(Error::invalid(format!(
                    "EXPERT_LENS_PUBLISHER is '{other}'; give 'stream' or 'event', or leave it out"
                )));
            }
        };
        Ok(Self { driver: Driver::get()?, memory, devices: Vec::new(), watcher: None, events_only })
    }

    /// How the device that was used last publishes.
    pub fn way(&self) -> Option<Way> {
        self.devices.last().map(|device| device.way)
    }

    /// What brings rows of a device into the arena, on its raw stream.
    pub fn landing(&mut self, ordinal: i32, stream: u64) -> Result<OnStream<'_>> {
        let at = match self.devices.iter().position(|device| device.ordinal == ordinal) {
            Some(at) => at,
            None => self.add(ordinal)?,
        };
        Ok(OnStream { pinned: self, at, stream: stream as usize })
    }

    fn add(&mut self, ordinal: c_int) -> Result<usize> {
        let driver = self.driver;
        let (mut device, mut context, mut can_write): (c_int, Handle, c_int) = (0, std::ptr::null_mut(), 0);
        // SAFETY: places for one value each; `device` is what the first call gave. Retaining the primary context, which
        // torch uses too, keeps it alive until `Pinned` is dropped.
        unsafe {
            driver.check("cuDeviceGet", (driver.device_get)(&mut device, ordinal))?;
            driver.check("cuDeviceGetAttribute", (driver.device_attribute)(&mut can_write, CAN_WRITE_64, device))?;
            driver.check("cuDevicePrimaryCtxRetain", (driver.retain_context)(&mut context, device))?;
        }
        let first = self.devices.is_empty();
        let (address, len) = (self.memory.address(), self.memory.len() * 8);
        let mut base = 0;
        let pinned = driver.within(context as usize, || {
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
            // SAFETY: `address` is registered, with DEVICEMAP and PORTABLE; `base` is a place for one pointer.
            driver.check("cuMemHostGetDevicePointer", unsafe { (driver.device_pointer)(&mut base, address, 0) })
        });
        if let Err(error) = pinned {
            // SAFETY: gives back what was retained above.
            unsafe { (driver.release_context)(device) };
            return Err(error);
        }
        let way = if self.events_only || can_write == 0 { Way::Event } else { Way::Stream };
        if way == Way::Event && self.watcher.is_none() {
            self.watcher = Some(Watcher::start(driver, Arc::clone(&self.memory))?);
        }
        self.devices.push(Device { ordinal, device, context: context as usize, base, way });
        Ok(self.devices.len() - 1)
    }

    /// Let the copies that are on their way land: `landed` says whether they have. If they do not within
    /// [`LANDING_TIMEOUT`], the mapping is leaked, pinned as it is, because a device may still write to it.
    pub fn settle(&mut self, landed: impl Fn() -> bool) {
        let deadline = Instant::now() + LANDING_TIMEOUT;
        while !landed() {
            if Instant::now() >= deadline {
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
        self.watcher = None;
        let (driver, address) = (self.driver, self.memory.address());
        if let Some(first) = self.devices.first() {
            // If the driver or the context is gone before us, so is the registration: nothing is left to undo.
            // SAFETY: registered in `add`; `settle` has seen every copy land, so no device writes there any more.
            let _ = driver
                .within(first.context, || driver.check("cuMemHostUnregister", unsafe { (driver.unregister)(address) }));
        }
        for device in &self.devices {
            // SAFETY: retained in `add`, once for each entry.
            unsafe { (driver.release_context)(device.device) };
        }
    }
}

/// Copies and publishes on one stream.
pub(crate) struct OnStream<'a> {
    pinned: &'a mut Pinned,
    at: usize,
    /// Its CUstream.
    stream: usize,
}

impl Landing for OnStream<'_> {
    fn copy(&mut self, at: usize, address: u64, len: usize) -> Result<()> {
        let Pinned { driver, memory, devices, .. } = &*self.pinned;
        assert!(at * 8 + len <= memory.len() * 8, "the writer reserved what it copies to");
        driver.within(devices[self.at].context, || {
            // SAFETY: the target is `len` bytes of the pinned mapping, reserved for this record; nobody else writes there
            // until the record has landed (`Writer::make_room`). The source is the caller's: `Writer::publish_device`.
            driver.check("cuMemcpyDtoHAsync", unsafe {
                (driver.copy_to_host)(
                    memory.address().cast::<u8>().add(at * 8).cast(),
                    address,
                    len,
                    self.stream as Handle,
                )
            })
        })
    }

    fn publish(&mut self, at: usize, value: u64) -> Result<()> {
        let stream = self.stream as Handle;
        let Pinned { driver, memory, devices, watcher, .. } = &mut *self.pinned;
        let device = &devices[self.at];
        assert!(at < memory.len(), "the writer publishes in its arena");
        driver.within(device.context, || match (device.way, watcher) {
            // SAFETY: the word lies in the pinned mapping, where the device knows it as `base + at * 8`. Flag 0 keeps the
            // barrier before the store.
            (Way::Stream, _) => driver.check("cuStreamWriteValue64", unsafe {
                (driver.write_value)(stream, device.base + at as u64 * 8, value, 0)
            }),
            (Way::Event, Some(watcher)) => watcher.watch(stream, device.context, at, value),
            (Way::Event, None) => unreachable!("`Pinned::add` has started it"),
        })
    }
}

/// A record whose event has been recorded. Handles as numbers: they belong to no thread.
struct Awaited {
    event: usize,
    context: usize,
    at: usize,
    value: u64,
}

/// The thread that publishes records whose event has come, in their order. How many there are is bounded by the arena's
/// descriptors: a record that has not landed keeps its own.
struct Watcher {
    driver: &'static Driver,
    awaited: Option<Sender<Awaited>>,
    /// Reached through `&mut` only; the mutex lets the watcher be shared.
    spent: Mutex<Receiver<Awaited>>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(driver: &'static Driver, memory: Arc<Mapped>) -> Result<Self> {
        let (awaited, to_watch) = channel::<Awaited>();
        let (give_back, spent) = channel();
        let watch = move || {
            let mut mode = RELAXED;
            // SAFETY: sets this thread's own mode: its queries must not end another thread's capture.
            unsafe { (driver.exchange_capture_mode)(&mut mode) };
            while let Ok(record) = to_watch.recv() {
                loop {
                    // SAFETY: the event lives until it is destroyed by `Watcher`, after this thread has ended.
                    match unsafe { (driver.event_query)(record.event as Handle) } {
                        0 => break memory.store(record.at, record.value, Release),
                        NOT_READY => std::thread::sleep(EVENT_PERIOD),
                        // The context is broken: the record never lands, and neither does any behind it.
                        _ => return,
                    }
                }
                let _ = give_back.send(record);
            }
        };
        let thread = std::thread::Builder::new()
            .name("expert-lens-events".into())
            .spawn(watch)
            .map_err(|e| Error::io("start a thread for", std::path::Path::new("events"), e))?;
        Ok(Self { driver, awaited: Some(awaited), spent: Mutex::new(spent), thread: Some(thread) })
    }

    fn watch(&mut self, stream: Handle, context: usize, at: usize, value: u64) -> Result<()> {
        let driver = self.driver;
        // An event belongs to its context; a spent one of another device is destroyed.
        let mut event: Handle = std::ptr::null_mut();
        let spent_ones = self.spent.get_mut().unwrap_or_else(PoisonError::into_inner);
        while let Ok(spent) = spent_ones.try_recv() {
            if spent.context == context {
                event = spent.event as Handle;
                break;
            }
            // SAFETY: it has come, and nobody else holds it.
            unsafe { (driver.event_destroy)(spent.event as Handle) };
        }
        // SAFETY: `event` is a place for one handle, or an event of this context that has come; the stream is the caller's.
        unsafe {
            if event.is_null() {
                driver.check("cuEventCreate", (driver.event_create)(&mut event, EVENT_FLAGS))?;
            }
            driver.check("cuEventRecord", (driver.event_record)(event, stream))?;
        }
        let sent =
            self.awaited.as_ref().map(|awaited| awaited.send(Awaited { event: event as usize, context, at, value }));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::Cuda { what: "the event publisher has ended: a copy of an earlier step failed".into() }),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.awaited = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for spent in self.spent.get_mut().unwrap_or_else(PoisonError::into_inner).try_iter() {
            // SAFETY: it has come, and nobody else holds it.
            unsafe { (self.driver.event_destroy)(spent.event as Handle) };
        }
    }
}
