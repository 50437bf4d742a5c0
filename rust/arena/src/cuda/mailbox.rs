//! Mailboxes: how the kernels of a CUDA graph learn, at each replay, where to write.
//!
//! A graph replays the same kernels with the same arguments. What changes from one replay to the next, the CPU puts into
//! the graph's mailbox with plain stores, before it launches the replay. Replay number t (the first is 1) finds its post at
//! entry t mod [`ENTRIES`], and takes it only if the entry says t. So a replay for which nothing was posted (a warm-up, an
//! idle replay, a dropped step) writes nothing, and cannot take the post of another. Both sides count: the device in the
//! state's first word, one further at every replay; the CPU in [`Mailbox::replays`], one further for every replay that it
//! posts for or passes over. The device tells its count back in the word behind the entries.
//!
//! *Order.* The post is stored before the call that launches the replay; the launch rings the device's doorbell by a store
//! behind it, x86-64 keeps stores in order, and the device reads host memory only from then on. An entry is filled again
//! only when the device's count says that it was taken.
//!
//! Mailboxes lie in pinned memory of this process alone, not in the arena: the addresses in them are what kernels
//! write to, and nobody else may choose those. It is our own memory, so that it outlives a context that is reset, and a
//! shared mapping, so that a fork does not make the device and this process part ways over its pages.

use super::REGISTER_FLAGS;
use super::driver::{Driver, Handle};
use crate::error::{Error, Result};
use crate::memory::{Mapped, Memory};
use crate::writer::Landing;
use rustix::fs::{self as sys, MemfdFlags};
use std::ffi::{c_int, c_uint};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

/// Posts that may wait for their replay; the CPU runs no further ahead of the device, and what is replayed beyond it
/// gives no rows.
pub const ENTRIES: usize = 512;
/// Words of an entry; the last ones are not used: an entry is one 64-byte access of the device.
pub const ENTRY_WORDS: usize = 8;
/// Words of the state: what the kernel that takes a post leaves to the one that packs, and how many of its blocks are done.
pub const STATE_WORDS: usize = 16;
/// Where the device tells how many replays it has begun.
const TAKEN: usize = ENTRIES * ENTRY_WORDS;
const HOST_WORDS: usize = TAKEN + ENTRY_WORDS;
/// CU_STREAM_NON_BLOCKING
const STREAM_FLAGS: c_uint = 1;

mod entry {
    //! Words of an entry, and after the device's count, of the state.
    pub const REPLAY: usize = 0;
    pub const ROWS: usize = 1;
    pub const PAYLOAD: usize = 2;
    pub const SEQUENCE: usize = 3;
    pub const VALUE: usize = 4;
}

/// The mailbox of one CUDA graph.
///
/// It must outlive every replay of the graph: the graph's kernels look into it, attached or not.
pub struct Mailbox {
    driver: &'static Driver,
    ordinal: i32,
    /// Its CUdevice and its primary context.
    device: c_int,
    context: usize,
    /// `HOST_WORDS` words of pinned memory, and where the device finds them.
    host: Arc<Mapped>,
    host_on_device: u64,
    /// `STATE_WORDS` words of device memory, and behind them the table.
    state: u64,
    replays: u64,
    /// What was posted for the newest replay: the record's index.
    newest: Option<u64>,
    pid: u32,
}

impl Mailbox {
    /// Allocate a mailbox on a device, with `table` behind its state. `context` is the device's primary context, which is
    /// retained once more.
    pub(super) fn new(
        driver: &'static Driver,
        ordinal: i32,
        device: c_int,
        context: usize,
        table: &[u64],
    ) -> Result<Self> {
        let host = Arc::new(private_memory()?);
        let mut retained: Handle = std::ptr::null_mut();
        // SAFETY: a place for one handle; given back in `drop`.
        driver.check("cuDevicePrimaryCtxRetain", unsafe { (driver.retain_context)(&mut retained, device) })?;
        let pid = std::process::id();
        let (host_on_device, state, replays, newest) = (0, 0, 0, None);
        let mut new = Self { driver, ordinal, device, context, host, host_on_device, state, replays, newest, pid };
        driver.within(context, || new.allocate(table))?;
        Ok(new)
    }

    fn allocate(&mut self, table: &[u64]) -> Result<()> {
        let (driver, address) = (self.driver, self.host.address());
        let mut stream: Handle = std::ptr::null_mut();
        let first = [vec![0; STATE_WORDS], table.to_vec()].concat();
        // SAFETY: places for one value each. The mapping is `HOST_WORDS` words, page-aligned, and stays mapped until `drop`
        // has unregistered it; `first` outlives the copy, which has ended when the stream, ours alone, is synchronised.
        unsafe {
            driver.check("cuMemHostRegister", (driver.register)(address, HOST_WORDS * 8, REGISTER_FLAGS))?;
            driver.check("cuMemHostGetDevicePointer", (driver.device_pointer)(&mut self.host_on_device, address, 0))?;
            driver.check("cuMemAlloc", (driver.device_alloc)(&mut self.state, first.len() * 8))?;
            driver.check("cuStreamCreate", (driver.stream_create)(&mut stream, STREAM_FLAGS))?;
            let copied = driver
                .check(
                    "cuMemcpyHtoDAsync",
                    (driver.copy_to_device)(self.state, first.as_ptr().cast(), first.len() * 8, stream),
                )
                .and_then(|()| driver.check("cuStreamSynchronize", (driver.stream_synchronize)(stream)));
            (driver.stream_destroy)(stream);
            copied
        }
    }

    /// The device's ordinal.
    #[must_use]
    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// Where the device finds the entries.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.host_on_device
    }

    /// Where the device finds the word for its count.
    #[must_use]
    pub fn taken_word(&self) -> u64 {
        self.host_on_device + TAKEN as u64 * 8
    }

    /// Where the device finds the state.
    #[must_use]
    pub fn state(&self) -> u64 {
        self.state
    }

    /// Where the device finds the table.
    #[must_use]
    pub fn table(&self) -> u64 {
        self.state + STATE_WORDS as u64 * 8
    }

    /// Replays so far, as the CPU counts them.
    #[must_use]
    pub fn replays(&self) -> u64 {
        self.replays
    }

    /// The next replay has no rows to publish: it is counted, and writes nothing.
    pub fn pass_over(&mut self) {
        self.replays += 1;
        self.newest = None;
    }

    /// Replays that the device has begun.
    fn taken(&self) -> u64 {
        self.host.load(TAKEN, Acquire)
    }

    /// First word of the newest replay's entry.
    fn entry(&self) -> usize {
        (self.replays % ENTRIES as u64) as usize * ENTRY_WORDS
    }

    /// Count the next replay; whether there is an entry free for it.
    ///
    /// # Errors
    /// When the device has counted replays that passed by here: then posts and replays can no longer be matched.
    pub(super) fn advance(&mut self) -> Result<bool> {
        let (taken, before) = (self.taken(), self.replays);
        self.pass_over();
        if taken > before {
            return Err(Error::Cuda {
                what: format!(
                    "a CUDA graph was replayed {taken} times, of which {} passed by the capture: its replays and their \
                     rows cannot be matched",
                    taken - before
                ),
            });
        }
        Ok(self.replays - taken <= ENTRIES as u64)
    }

    /// Post what the newest replay is to write: a record whose payload the device finds at `payload` and whose sequence
    /// number, `value`, it stores at `sequence`.
    fn post(&mut self, rows: usize, payload: u64, sequence: u64, value: u64) {
        let first = self.entry();
        for (at, value) in [
            (entry::ROWS, rows as u64),
            (entry::PAYLOAD, payload),
            (entry::SEQUENCE, sequence),
            (entry::VALUE, value),
            (entry::REPLAY, self.replays),
        ] {
            self.host.store(first + at, value, Release);
        }
        self.newest = Some(value - 1);
    }

    /// The newest replay has failed, or was never launched: take its post out, if it had one, and give its record. If the
    /// device has taken the post already, it is as well: the replay ran then.
    pub fn cancel(&mut self) -> Option<u64> {
        self.host.store(self.entry() + entry::REPLAY, 0, Release);
        self.newest.take()
    }

    /// Bring the device's count to ours, behind what was launched so far.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// `stream` is the stream of this mailbox's device on which the graph is replayed.
    pub(crate) unsafe fn match_again(&self, stream: u64) -> Result<()> {
        let (driver, count) = (self.driver, self.replays);
        driver.within(self.context, || {
            // SAFETY: the state's first word; the copy takes pageable memory of a few bytes before the call returns
            // (CUDA driver API, "API synchronization behavior").
            driver.check("cuMemcpyHtoDAsync", unsafe {
                (driver.copy_to_device)(self.state, (&raw const count).cast(), 8, stream as Handle)
            })
        })
    }
}

impl Drop for Mailbox {
    /// Free the memory, unless a replay may still be on its way: then it is left.
    fn drop(&mut self) {
        let driver = self.driver;
        if std::process::id() != self.pid || !driver.is_active(self.device) {
            return; // a fork's copy; or with the context went what was made in it
        }
        if self.taken() < self.replays {
            std::mem::forget(Arc::clone(&self.host));
            return;
        }
        let _ = driver.within(self.context, || {
            // SAFETY: made in `allocate`, or never made, which the driver says. The graph is gone, its replays are done.
            unsafe {
                (driver.device_free)(self.state);
                (driver.unregister)(self.host.address());
            }
            Ok(())
        });
        // SAFETY: retained in `new`.
        unsafe { (driver.release_context)(self.device) };
    }
}

/// Memory for a mailbox, all zeros, which no other process can open by a name.
fn private_memory() -> Result<Mapped> {
    let what = Path::new("a mailbox");
    let file = sys::memfd_create("expert-lens-mailbox", MemfdFlags::CLOEXEC)
        .map_err(|e| Error::io("reserve memory for", what, e))?;
    sys::ftruncate(&file, HOST_WORDS as u64 * 8).map_err(|e| Error::io("reserve memory for", what, e))?;
    let map = memmap2::MmapOptions::new().populate().map_raw(&file).map_err(|e| Error::io("map", what, e))?;
    Ok(Mapped::new(map))
}

/// Publishes by a post: the sections of the device and the sequence number are the graph's to write.
pub(crate) struct ByPost<'a> {
    pub mailbox: &'a mut Mailbox,
    /// Where the device finds the arena.
    pub base: u64,
    pub rows: usize,
    /// Word where the first section of the device begins.
    pub payload: Option<usize>,
}

impl Landing for ByPost<'_> {
    fn copy(&mut self, at: usize, _: u64, _: usize) -> Result<()> {
        self.payload.get_or_insert(at);
        Ok(())
    }

    fn publish(&mut self, at: usize, value: u64) -> Result<()> {
        let payload = self.payload.expect("a step of a graph has experts, on the device");
        let on_device = |word: usize| self.base + word as u64 * 8;
        let (payload, sequence) = (on_device(payload), on_device(at));
        self.mailbox.post(self.rows, payload, sequence, value);
        Ok(())
    }

    fn takes_parts(&self) -> bool {
        false
    }
}
