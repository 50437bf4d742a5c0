//! An arena as a file: made and removed by the process that publishes, opened by those that read.

use crate::captures::{self, check_name, lock, open_mapped, private_folder};
use crate::cuda::{Mailbox, Pinned, Way};
use crate::error::{Error, Result};
use crate::layout::{Facts, Header, MIN_ARENA_BYTES, Producer, READERS, entry, reader_entry, word};
use crate::memory::{Mapped, Memory};
use crate::process;
use crate::reader::{Mode, Reader};
use crate::rows::{DeviceRows, GraphRows, Prefix};
use crate::writer::{OnFull, Published, Writer, now_ns};
use rustix::fs::{self as sys, Mode as Permissions, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Captures of dead processes that are kept, newest first, so that what they published can still be read.
const KEPT_DEAD_CAPTURES: usize = 2;
/// How often a publishing process looks for readers that died.
const KEEPER_PERIOD: Duration = Duration::from_millis(100);

/// The publishing end of an arena file: the [`Writer`], and a thread that frees the entries of readers that died.
pub struct Publisher {
    writer: Writer<Mapped>,
    path: PathBuf,
    /// Device and inode of the file: the path may be another publisher's by the time that this one ends.
    file: (u64, u64),
    pid: u32,
    /// Once a device has published.
    pinned: Option<Pinned>,
    memory: Arc<Mapped>,
    keeper: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Publisher {
    /// Make `<directory>/<capture>/<rank>.arena`, of `bytes` bytes, all of them reserved now.
    ///
    /// # Errors
    /// [`Error::CaptureInUse`], [`Error::NoSpace`], [`Error::Permission`]; [`Error::Invalid`] for a bad name, size or
    /// fact.
    pub fn create(directory: &Path, capture: &str, bytes: usize, facts: &Facts, on_full: OnFull) -> Result<Self> {
        check_name(capture)?;
        if bytes < MIN_ARENA_BYTES {
            return Err(Error::invalid(format!("an arena of {bytes} bytes; give it {MIN_ARENA_BYTES} or more")));
        }
        let root = private_folder(directory)?;
        // Held until the arena stands: two processes that create at once must not both find the name free.
        lock(&root, directory)?;
        captures::remove_unfinished(directory);
        let folder = directory.join(capture);
        let folder_fd = private_folder(&folder)?;
        let path = folder.join(format!("{}.arena", facts.rank));
        captures::check_free(&path, capture, facts.rank)?;
        let made = make(&folder_fd, &path, bytes, facts).or_else(|error| match error {
            // What dead processes left can still be read, but not at the price of a live one.
            Error::NoSpace { .. } if captures::remove_dead(directory, 0) > 0 => {
                make(&private_folder(&folder)?, &path, bytes, facts)
            }
            other => Err(other),
        });
        let (memory, header, file) = made.inspect_err(|_| {
            // Fails while other ranks' arenas are there, as it should.
            let _ = std::fs::remove_dir(&folder);
        })?;
        // Ranks that an earlier process left under this name are no part of this capture.
        captures::remove_dead_ranks(&folder);
        captures::remove_dead(directory, KEPT_DEAD_CAPTURES);
        let memory = Arc::new(memory);
        let writer = Writer::new(Arc::clone(&memory), header, on_full);
        let pid = std::process::id();
        let mut publisher = Self { writer, path, file, pid, pinned: None, memory: Arc::clone(&memory), keeper: None };
        drop(root);
        publisher.keeper = Some(start_keeper(memory).map_err(|e| Error::io("start a thread for", &publisher.path, e))?);
        Ok(publisher)
    }

    /// Pin the arena and make it known to a device, which takes the time that its pages need: before the first step has to.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses.
    pub fn prepare(&mut self, device: i32) -> Result<()> {
        pin(&mut self.pinned, &self.memory)?.prepare(device)
    }

    /// A raw stream of our own on that device, on which nobody captures a graph: the same for all of this process, for as long
    /// as it runs and nobody resets the device.
    ///
    /// # Errors
    /// As [`Publisher::prepare`].
    pub fn stream(&mut self, device: i32) -> Result<u64> {
        pin(&mut self.pinned, &self.memory)?.stream(device)
    }

    /// Publish the rows of one forward that a device holds, on the raw stream that computed them. Returns once that is
    /// enqueued; readers see the rows when the stream has come so far.
    ///
    /// The first call for a device that was not prepared ([`Publisher::prepare`]) does that.
    ///
    /// # Errors
    /// Lengths that do not agree: nothing is published then. [`Error::Cuda`] when the driver refuses: nothing more is
    /// published then, so the caller had better stop.
    ///
    /// # Safety
    /// The addresses in `rows` are memory of that device, of the lengths that [`DeviceRows`] states, and what is there
    /// stays until the stream has come to what is enqueued here; `stream` is a stream of that device, or 0, and is not
    /// being captured.
    pub unsafe fn publish_device(&mut self, rows: &DeviceRows<'_>, device: i32, stream: u64) -> Result<Published> {
        let pinned = pin(&mut self.pinned, &self.memory)?;
        let published = self.writer.publish_device(rows, &mut pinned.landing(device, stream)?);
        self.tell_way();
        published
    }

    /// Let readers know how devices publish.
    fn tell_way(&self) {
        self.memory.store(word::WAY, Way::to_word(self.way()), Relaxed);
    }

    /// Publish where the beginnings of requests stand in the engine's cache, which a device says: as
    /// [`Writer::publish_prefix`], on that raw stream.
    ///
    /// # Errors
    /// As [`Writer::publish_prefix`]; and [`Error::Cuda`] when the driver refuses.
    ///
    /// # Safety
    /// As [`Publisher::publish_device`].
    pub unsafe fn publish_prefix_device(&mut self, prefix: &Prefix<'_>, device: i32, stream: u64) -> Result<Published> {
        let pinned = pin(&mut self.pinned, &self.memory)?;
        self.writer.publish_prefix_by(prefix, Some(&mut pinned.landing(device, stream)?))
    }

    /// Make a mailbox for a CUDA graph of that device, before or while it is captured; `table` (addresses of device
    /// memory, say) stands behind its state, and `entries` posts may wait. None if `EXPERT_LENS_PUBLISHER`
    /// asks for another way to publish.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses, [`Error::Invalid`] for no entries, or more than 65 536.
    pub fn mailbox(&mut self, device: i32, table: &[u64], entries: usize) -> Result<Option<Mailbox>> {
        pin(&mut self.pinned, &self.memory)?.mailbox(device, table, entries)
    }

    /// Publish the rows that the next replay of the mailbox's graph writes. The replay must be launched next; if that
    /// fails, [`Mailbox::retract`] and [`Publisher::void`].
    ///
    /// # Errors
    /// Lengths that do not agree, and replays that passed by the mailbox: nothing is published then, and the replay writes
    /// nothing.
    ///
    /// # Safety
    /// The graph's kernels write no more than the sections that `rows` states.
    pub unsafe fn publish_graph(&mut self, mailbox: &mut Mailbox, rows: &GraphRows<'_>) -> Result<Published> {
        let pinned = pin(&mut self.pinned, &self.memory)?;
        let published = match pinned.by_post(mailbox, rows.rows)? {
            // The graph's kernels do nothing for no rows, not even publish them.
            _ if rows.rows == 0 => Ok(Published::default()),
            Some(mut post) => self.writer.publish_graph(rows, &mut post),
            None => Ok(self.writer.drop_step(rows.rows)),
        };
        self.tell_way();
        published
    }

    /// The replay of a graph that `record` was posted for has failed, or was never launched, and [`Mailbox::retract`] took
    /// the post out: make it a record of nothing, which counts as dropped, unless its rows have come and gone.
    ///
    /// # Errors
    /// [`Error::Cuda`] when the driver refuses: nothing more is published then, so the caller had better stop.
    ///
    /// # Safety
    /// `stream` is the raw stream of that device on which the replay was, or would have been, launched.
    pub unsafe fn void(&mut self, record: u64, device: i32, stream: u64) -> Result<()> {
        if let Some((at, before)) = self.writer.void(record) {
            pin(&mut self.pinned, &self.memory)?.publish_behind(device, stream, at, record + 1, before)?;
        }
        Ok(())
    }

    /// How devices published; None if none has.
    #[must_use]
    pub fn way(&self) -> Option<Way> {
        self.pinned.as_ref().and_then(Pinned::way)
    }

    /// The arena's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for Publisher {
    type Target = Writer<Mapped>;

    fn deref(&self) -> &Self::Target {
        &self.writer
    }
}

impl DerefMut for Publisher {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.writer
    }
}

impl Drop for Publisher {
    /// End the capture in good order and remove its file. Readers that hold the arena keep what it holds.
    fn drop(&mut self) {
        // A forked child holds a copy of this value, and neither the file nor the thread are its own.
        if std::process::id() != self.pid {
            std::mem::forget((self.keeper.take(), self.pinned.take()));
            return;
        }
        if let Some(mut pinned) = self.pinned.take() {
            // Before the end is told: whoever sees it may rely on every record before it.
            pinned.settle(|| self.writer.in_flight());
        }
        self.writer.close();
        if let Some((stop, thread)) = self.keeper.take() {
            drop(stop);
            let _ = thread.join();
        }
        captures::remove_own(&self.path, self.file);
    }
}

/// The arena's mapping for devices, made when the first one is used.
fn pin<'a>(pinned: &'a mut Option<Pinned>, memory: &Arc<Mapped>) -> Result<&'a mut Pinned> {
    if pinned.is_none() {
        *pinned = Some(Pinned::new(Arc::clone(memory))?);
    }
    Ok(pinned.as_mut().expect("made above"))
}

/// Make an arena file, under another name until it is whole: reserve its space, map it and lay an arena out in it. Gives
/// its device and inode too.
fn make(folder: &OwnedFd, path: &Path, bytes: usize, facts: &Facts) -> Result<(Mapped, Header, (u64, u64))> {
    let unfinished = format!(".{}.{}.unfinished", facts.rank, std::process::id());
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = sys::openat(folder, &*unfinished, flags, Permissions::RUSR | Permissions::WUSR)
        .map_err(|e| Error::io("create", path, e))?;
    let lay_out = || {
        let bytes = (bytes as u64).min(i64::MAX as u64) / 8 * 8;
        // Without space of its own, a page touched on a full tmpfs would kill the process with a bus error.
        if let Err(error) = retry_on_intr(|| sys::fallocate(&file, sys::FallocateFlags::empty(), 0, bytes)) {
            return Err(match error {
                Errno::NOSPC | Errno::NOMEM | Errno::FBIG | Errno::DQUOT => {
                    // What was reserved before the space ran out is free again for the next arena.
                    let _ = sys::ftruncate(&file, 0);
                    let free = sys::fstatvfs(folder).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
                    let dir = path.parent().unwrap_or(path).to_owned();
                    Error::NoSpace { needed: bytes, free, dir }
                }
                other => Error::io("reserve space for", path, other),
            });
        }
        // Every page is touched now, so that none is first touched by the engine's thread.
        let map = memmap2::MmapOptions::new().populate().map_raw(&file).map_err(|e| Error::io("map", path, e))?;
        let memory = Mapped::new(map);
        let header = Header::store(&memory, facts, process::current(), now_ns())?;
        let stat = sys::fstat(&file).map_err(|e| Error::io("inspect", path, e))?;
        let name = path.file_name().unwrap_or(path.as_os_str());
        sys::renameat(folder, &*unfinished, folder, name).map_err(|e| Error::io("rename", path, e))?;
        Ok((memory, header, (stat.st_dev, stat.st_ino)))
    };
    lay_out().inspect_err(|_| {
        let _ = sys::unlinkat(folder, &*unfinished, sys::AtFlags::empty());
    })
}

/// Free, now and then, the entries of readers whose process has died. A thread of ours does it, because to ask the
/// system about a process is nothing for an engine's thread.
fn start_keeper(memory: Arc<Mapped>) -> std::io::Result<(Sender<()>, JoinHandle<()>)> {
    let (stop, stopped) = channel();
    let keep = move || {
        while stopped.recv_timeout(KEEPER_PERIOD) == Err(RecvTimeoutError::Timeout) {
            evict_dead_readers(&*memory);
        }
    };
    let thread = std::thread::Builder::new().name("expert-lens-keeper".into()).spawn(keep)?;
    Ok((stop, thread))
}

/// Free the entries of readers that died.
fn evict_dead_readers(memory: &impl Memory) {
    let high = (memory.load(word::READER_HIGH, Acquire) as usize).min(READERS);
    for at in (0..high).map(reader_entry) {
        let owner = memory.load(at + entry::OWNER, Acquire);
        let Ok(pid) = u32::try_from(owner & !entry::CLAIMED) else {
            continue;
        };
        let start_time = memory.load(at + entry::START_TIME, Relaxed);
        let is_alive = match owner & entry::CLAIMED {
            0 => process::is_alive(Producer { pid, start_time }),
            // An entry that is being filled does not say yet when its process began.
            _ => process::exists(pid),
        };
        if pid != 0 && !is_alive {
            // Only if it is still the same owner: the entry could have been given back and taken anew meanwhile.
            memory.compare_exchange(at + entry::OWNER, owner, 0);
        }
    }
}

/// Open an arena file for reading.
///
/// # Errors
/// [`Error::Version`], [`Error::Corrupt`], [`Error::Permission`], [`Error::ReadersFull`], [`Error::Io`].
pub fn open(path: &Path, mode: Mode) -> Result<Reader<Mapped>> {
    let memory = open_mapped(path)?;
    let header = Header::load(&memory, path)?;
    if !process::is_alive(header.producer) {
        // Nobody else cleans the table of a dead publisher.
        evict_dead_readers(&memory);
    }
    Reader::new(Arc::new(memory), header, mode, process::current())
}
