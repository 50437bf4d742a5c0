//! Mailboxes: the posts of one CUDA graph, in memory that a device reaches.
//!
//! They lie in pinned memory of this process alone, not in the arena: the addresses in them are what kernels write to, and
//! nobody else may choose those. It is our own memory, so that it outlives a context that is reset, and a shared mapping, so
//! that a fork does not make the device and this process part ways over its pages.

use super::REGISTER_FLAGS;
use super::driver::{Context, Driver, Handle};
use crate::error::{Error, Result};
use crate::memory::{Mapped, Memory};
use crate::posts::{ENTRY_WORDS, Post, Posts, words};
use crate::rows::Landing;
use rustix::fs::{self as sys, MemfdFlags};
use std::path::Path;
use std::sync::Arc;

/// More than any engine runs ahead.
const MAX_ENTRIES: usize = 1 << 16;
/// Words of the state: what the kernel that takes a post leaves to the one that packs, and how many of its blocks are done.
const STATE_WORDS: usize = 16;

/// The mailbox of one CUDA graph.
///
/// It must outlive every replay of the graph: the graph's kernels look into it, attached or not.
pub struct Mailbox {
    driver: &'static Driver,
    ordinal: i32,
    context: Context,
    /// How many posts may wait.
    entries: usize,
    /// Pinned memory for as many entries, and where the device finds it.
    host: Arc<Mapped>,
    host_on_device: u64,
    /// `STATE_WORDS` words of device memory, and behind them the table.
    state: u64,
    /// A stream of our own: to upload, and to work beside a capture.
    stream: usize,
    posts: Posts<Mapped>,
    pid: u32,
}

impl Mailbox {
    /// Allocate a mailbox of so many entries on a device, with `table` behind its state. `context` is retained once more.
    pub(super) fn new(
        driver: &'static Driver,
        ordinal: i32,
        context: Context,
        table: &[u64],
        entries: usize,
    ) -> Result<Self> {
        if !(1..=MAX_ENTRIES).contains(&entries) {
            return Err(Error::invalid(format!("a mailbox of {entries} entries; it has 1 to {MAX_ENTRIES}")));
        }
        let host = Arc::new(private_memory(words(entries))?);
        let _relaxed = driver.relax()?;
        driver.retain(context.device)?; // given back in `drop`
        let pid = std::process::id();
        let posts = Posts::new(Arc::clone(&host), entries);
        let (host_on_device, state, stream) = (0, 0, 0);
        let mut new = Self { driver, ordinal, context, entries, host, host_on_device, state, stream, posts, pid };
        driver.within(context, || new.allocate(table))?;
        Ok(new)
    }

    fn allocate(&mut self, table: &[u64]) -> Result<()> {
        let (driver, address) = (self.driver, self.host.address());
        let first = [vec![0; STATE_WORDS], table.to_vec()].concat();
        // SAFETY: places for one value each. The mapping has these words, is page-aligned, and stays mapped until `drop`
        // has unregistered it; `first` outlives the copy, which has ended when the stream, ours alone, is synchronised.
        unsafe {
            driver.check("cuMemHostRegister", (driver.register)(address, self.host.len() * 8, REGISTER_FLAGS))?;
            driver.check("cuMemHostGetDevicePointer", (driver.device_pointer)(&mut self.host_on_device, address, 0))?;
            driver.check("cuMemAlloc", (driver.device_alloc)(&mut self.state, first.len() * 8))?;
            let stream = driver.create_stream()?;
            self.stream = stream as usize;
            let source = first.as_ptr().cast();
            let copied = (driver.copy_to_device)(self.state, source, first.len() * 8, stream);
            driver.check("cuMemcpyHtoDAsync", copied)?;
            driver.check("cuStreamSynchronize", (driver.stream_synchronize)(stream))
        }
    }

    /// The device's ordinal.
    #[must_use]
    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// How many entries it has.
    #[must_use]
    pub fn num_entries(&self) -> usize {
        self.entries
    }

    /// Where the device finds the entries.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.host_on_device
    }

    /// Where the device finds the word for its count.
    #[must_use]
    pub fn taken_word(&self) -> u64 {
        self.host_on_device + (self.entries * ENTRY_WORDS) as u64 * 8
    }

    /// A raw stream of this mailbox's own.
    #[must_use]
    pub fn stream(&self) -> u64 {
        self.stream as u64
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
        self.posts.replays()
    }

    /// The next replay has no rows to publish: it is counted, and writes nothing.
    pub fn pass_over(&mut self) {
        self.posts.pass_over();
    }

    pub(super) fn posts(&mut self) -> &mut Posts<Mapped> {
        &mut self.posts
    }

    /// The newest replay has failed, or was never launched: take its post out, bring the device's count to ours behind what
    /// was launched so far, and give the record that was posted, if one was.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// `stream` is the raw stream of this mailbox's device on which the graph is replayed.
    pub unsafe fn retract(&mut self, stream: u64) -> Result<Option<u64>> {
        let record = self.posts.cancel();
        let (driver, count) = (self.driver, self.posts.replays());
        driver.within(self.context, || {
            for (at, half) in [(0, count as u32), (4, (count >> 32) as u32)] {
                // SAFETY: one half of the state's first word; the value goes by value.
                driver.check("cuMemsetD32Async", unsafe {
                    (driver.set_words)(self.state + at, half, 1, stream as Handle)
                })?;
            }
            Ok(())
        })?;
        Ok(record)
    }
}

impl Drop for Mailbox {
    /// Free the memory.
    fn drop(&mut self) {
        let driver = self.driver;
        if std::process::id() != self.pid {
            return; // a fork's copy
        }
        let freed = || {
            // SAFETY: made in `allocate`, in a context that lives, or not made, which the driver says. Nobody launches the
            // graph any more, and to free device memory waits for the replays on their way ("causes the GPU to synchronize
            // across all executing CUDA streams", CUDA C++ Programming Guide, "Stream Ordered Memory Allocator"), so it
            // comes first.
            unsafe {
                (driver.device_free)(self.state);
                (driver.unregister)(self.host.address());
                (driver.stream_destroy)(self.stream as Handle);
            }
            Ok(())
        };
        let _relaxed = driver.relax();
        if driver.lives(self.context) {
            // Else the context was reset, and with it went what was made in it.
            let _ = driver.within(self.context, freed);
        }
        driver.release(self.context);
    }
}

/// So many words for a mailbox, all zeros, which no other process can open by a name.
fn private_memory(words: usize) -> Result<Mapped> {
    let what = Path::new("a mailbox");
    let file = sys::memfd_create("expert-lens-mailbox", MemfdFlags::CLOEXEC)
        .map_err(|e| Error::io("reserve memory for", what, e))?;
    sys::ftruncate(&file, words as u64 * 8).map_err(|e| Error::io("reserve memory for", what, e))?;
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
        let (payload, sequence, rows) = (on_device(payload), on_device(at), self.rows as u64);
        self.mailbox.posts().post(Post { rows, payload, sequence, value }, value - 1);
        Ok(())
    }

    fn takes_parts(&self) -> bool {
        false
    }
}
