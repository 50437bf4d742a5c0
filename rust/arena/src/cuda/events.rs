//! Events on streams, and a thread of ours that publishes once one has come: for devices that cannot store by themselves,
//! and for records whose forward failed.

use super::driver::{Context, Driver, Handle, RELAXED, Status};
use crate::error::{Error, Result};
use crate::memory::{Mapped, Memory};
use std::ffi::c_uint;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const NOT_READY: Status = 600;
/// CU_EVENT_DISABLE_TIMING
const EVENT_FLAGS: c_uint = 2;
/// How many looks at an event go by before it is asked once more whether its context lives.
pub(super) const LOOKS: u64 = 50;
/// How often the event publisher looks.
pub(super) const EVENT_PERIOD: Duration = Duration::from_micros(20);

/// An event of a device's primary context.
pub(super) struct Event {
    driver: &'static Driver,
    context: Context,
    /// Its CUevent, as a number: it belongs to no thread.
    handle: usize,
}

impl Event {
    /// Of that context, which is current.
    pub fn create(driver: &'static Driver, context: Context) -> Result<Self> {
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: a place for one handle.
        driver.check("cuEventCreate", unsafe { (driver.event_create)(&mut handle, EVENT_FLAGS) })?;
        Ok(Self { driver, context, handle: handle as usize })
    }

    /// Let it come when `stream` has done what it was given so far.
    pub fn record(&self, stream: Handle) -> Result<()> {
        // SAFETY: the event lives as long as its context, until it is dropped; the stream is the caller's, of that context,
        // which is current.
        self.driver.check("cuEventRecord", unsafe { (self.driver.event_record)(self.handle as Handle, stream) })
    }

    /// Whether it has come; None if the driver will not say, as of a context that is broken or was reset.
    pub fn has_come(&self) -> Option<bool> {
        if self.driver.lives(self.context) { self.query() } else { None }
    }

    /// As [`Event::has_come`], of a context of which is known that it was there a moment ago.
    fn query(&self) -> Option<bool> {
        // SAFETY: the event lives as long as its context, until it is dropped. Who resets that in this very moment does so
        // while others use it, which the driver leaves to him.
        match unsafe { (self.driver.event_query)(self.handle as Handle) } {
            0 => Some(true),
            NOT_READY => Some(false),
            _ => None,
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // If the context was reset before us, what was made in it is gone.
        if self.driver.lives(self.context) {
            // SAFETY: made in `create`, in a context that lives, and nobody else holds it. To destroy one that has not come
            // yet is allowed.
            unsafe { (self.driver.event_destroy)(self.handle as Handle) };
        }
    }
}

/// A record whose event has been recorded.
struct Awaited {
    event: Event,
    at: usize,
    value: u64,
    /// What must stand there still; None: whatever does.
    instead_of: Option<u64>,
}

impl Awaited {
    fn publish(&self, memory: &Mapped) {
        match self.instead_of {
            None => memory.store(self.at, self.value, Release),
            // If something else stands there, the device has published the record itself.
            Some(before) => {
                memory.compare_exchange(self.at, before, self.value);
            }
        }
    }
}

/// The thread that publishes records whose event has come, in their order. A record that has not landed keeps its
/// descriptor, which bounds how many there are, but for void ones that a graph has published all the same.
pub(super) struct Watcher {
    driver: &'static Driver,
    awaited: Option<Sender<Awaited>>,
    /// How many events have not come yet.
    waiting: Arc<AtomicUsize>,
    /// Reached through `&mut` only; the mutex lets the watcher be shared.
    spent: Mutex<Receiver<Event>>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    pub fn start(driver: &'static Driver, memory: Arc<Mapped>) -> Result<Self> {
        let (awaited, to_watch) = channel::<Awaited>();
        let (give_back, spent) = channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let still_waiting = Arc::clone(&waiting);
        let watch = move || {
            let mut mode = RELAXED;
            // SAFETY: sets this thread's own mode: its queries must not end another thread's capture.
            unsafe { (driver.exchange_capture_mode)(&mut mode) };
            while let Ok(record) = to_watch.recv() {
                for look in 0_u64.. {
                    // To ask whether the context lives takes four calls of the driver, which the engine needs too.
                    let event = &record.event;
                    match if look % LOOKS == 0 { event.has_come() } else { event.query() } {
                        Some(true) => {
                            record.publish(&memory);
                            break;
                        }
                        Some(false) => std::thread::sleep(EVENT_PERIOD),
                        // The context is broken: the record never lands, and neither does any behind it.
                        None => return,
                    }
                }
                let _ = give_back.send(record.event);
                still_waiting.fetch_sub(1, Release);
            }
        };
        let thread = std::thread::Builder::new()
            .name("expert-lens-events".into())
            .spawn(watch)
            .map_err(|e| Error::io("start a thread for", std::path::Path::new("events"), e))?;
        Ok(Self { driver, awaited: Some(awaited), waiting, spent: Mutex::new(spent), thread: Some(thread) })
    }

    /// Whether all events have come, so that to drop it waits for nothing; None if the driver would not say of one.
    pub fn is_done(&self) -> Option<bool> {
        let runs = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        runs.then(|| self.waiting.load(Acquire) == 0)
    }

    /// Store `value` at word `at` once `stream`, of that context, which is current, has come so far; with `instead_of`, only
    /// if that stands there still.
    pub fn watch(
        &mut self,
        stream: Handle,
        context: Context,
        at: usize,
        value: u64,
        instead_of: Option<u64>,
    ) -> Result<()> {
        let spent = self.spent.get_mut().unwrap_or_else(PoisonError::into_inner);
        let event = match spent.try_iter().find(|event| event.context == context) {
            Some(event) => event,
            None => Event::create(self.driver, context)?,
        };
        event.record(stream)?;
        let record = Awaited { event, at, value, instead_of };
        self.waiting.fetch_add(1, Release);
        let sent = self.awaited.as_ref().map(|awaited| awaited.send(record));
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
    }
}
