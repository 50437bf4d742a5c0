//! An event on a stream, and a thread of ours that publishes once it has come: for devices that cannot store by
//! themselves, and for records whose forward failed.

use super::driver::{Driver, Handle, RELAXED, Status};
use crate::error::{Error, Result};
use crate::memory::{Mapped, Memory};
use std::ffi::c_uint;
use std::sync::atomic::Ordering::Release;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const NOT_READY: Status = 600;
/// CU_EVENT_DISABLE_TIMING
const EVENT_FLAGS: c_uint = 2;
/// How often the event publisher looks.
pub(super) const EVENT_PERIOD: Duration = Duration::from_micros(20);

/// A record whose event has been recorded. Handles as numbers: they belong to no thread.
struct Awaited {
    event: usize,
    context: usize,
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

/// The thread that publishes records whose event has come, in their order. How many there are is bounded by the arena's
/// descriptors: a record that has not landed keeps its own.
pub(super) struct Watcher {
    driver: &'static Driver,
    awaited: Option<Sender<Awaited>>,
    /// Reached through `&mut` only; the mutex lets the watcher be shared.
    spent: Mutex<Receiver<Awaited>>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    pub fn start(driver: &'static Driver, memory: Arc<Mapped>) -> Result<Self> {
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
                        0 => break record.publish(&memory),
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

    /// Store `value` at word `at` once `stream` has come so far; with `instead_of`, only if that stands there still.
    pub fn watch(
        &mut self,
        stream: Handle,
        context: usize,
        at: usize,
        value: u64,
        instead_of: Option<u64>,
    ) -> Result<()> {
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
        let record = Awaited { event: event as usize, context, at, value, instead_of };
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
        for spent in self.spent.get_mut().unwrap_or_else(PoisonError::into_inner).try_iter() {
            // SAFETY: it has come, and nobody else holds it.
            unsafe { (self.driver.event_destroy)(spent.event as Handle) };
        }
    }
}
