//! Arenas as files: `<directory>/<capture>/<rank>.arena`, made, opened, listed and removed; theirs who made them alone.

use crate::error::{Error, Result};
use crate::layout::{Facts, Header, MIN_ARENA_BYTES, Producer, READERS, entry, reader_entry, word};
use crate::memory::{Mapped, Memory};
use crate::process;
use crate::reader::{Mode, Reader};
use crate::writer::{OnFull, Writer, now_ns};
use rustix::fs::{self as sys, FlockOperation, Mode as Permissions, OFlags};
use rustix::io::Errno;
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

/// Where captures are: `$EXPERT_LENS_DIR`, or `/dev/shm/expert-lens-<uid>`.
#[must_use]
pub fn default_directory() -> PathBuf {
    match std::env::var_os("EXPERT_LENS_DIR") {
        Some(directory) if !directory.is_empty() => directory.into(),
        _ => format!("/dev/shm/expert-lens-{}", rustix::process::geteuid().as_raw()).into(),
    }
}

/// The publishing end of an arena file: the [`Writer`], and a thread that frees the entries of readers that died.
pub struct Publisher {
    writer: Writer<Mapped>,
    path: PathBuf,
    pid: u32,
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
            return Err(Error::invalid(format!("an arena of {bytes} bytes, and the least is {MIN_ARENA_BYTES}")));
        }
        let root = private_folder(directory)?;
        // Held until the arena stands: two processes that create at once must not both find the name free.
        sys::flock(&root, FlockOperation::LockExclusive).map_err(|e| Error::io("lock", directory, e))?;
        remove_dead_captures(directory, capture);
        let folder = directory.join(capture);
        let folder_fd = private_folder(&folder)?;
        let path = folder.join(format!("{}.arena", facts.rank));
        match open_mapped(&path).and_then(|memory| Header::load(&memory, &path)) {
            Ok(header) if process::is_alive(header.producer) => {
                let (name, rank, pid) = (capture.to_owned(), facts.rank, header.producer.pid);
                return Err(Error::CaptureInUse { name, rank, pid });
            }
            Err(error @ Error::Permission { .. }) => return Err(error),
            // Dead, unfinished or of another layout: the new arena takes its place.
            _ => {}
        }
        let unfinished = format!(".{}.{}.unfinished", facts.rank, std::process::id());
        let made = make(&folder_fd, &unfinished, &folder, bytes, facts).and_then(|(memory, header)| {
            sys::renameat(&folder_fd, &*unfinished, &folder_fd, path.file_name().expect("set above"))
                .map_err(|e| Error::io("rename", &path, e))?;
            Ok((memory, header))
        });
        let (memory, header) = made.inspect_err(|_| {
            let _ = sys::unlinkat(&folder_fd, &*unfinished, sys::AtFlags::empty());
            let _ = std::fs::remove_dir(&folder);
        })?;
        let memory = Arc::new(memory);
        let keeper = start_keeper(Arc::clone(&memory)).map_err(|e| Error::io("start a thread for", &path, e))?;
        let writer = Writer::new(memory, header, on_full);
        Ok(Self { writer, path, pid: std::process::id(), keeper: Some(keeper) })
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
            std::mem::forget(self.keeper.take());
            return;
        }
        self.writer.close();
        if let Some((stop, thread)) = self.keeper.take() {
            drop(stop);
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
        if let Some(folder) = self.path.parent() {
            // Fails while other ranks' arenas are there, as it should.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Make a file in `folder`, reserve its space, map it and lay an arena out in it.
fn make(folder_fd: &OwnedFd, name: &str, folder: &Path, bytes: usize, facts: &Facts) -> Result<(Mapped, Header)> {
    let path = folder.join(name);
    let bytes = bytes / 8 * 8;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let _ = sys::unlinkat(folder_fd, name, sys::AtFlags::empty());
    let file = sys::openat(folder_fd, name, flags, Permissions::RUSR | Permissions::WUSR)
        .map_err(|e| Error::io("create", &path, e))?;
    // Without space of its own, a page touched on a full tmpfs would kill the process with a bus error.
    if let Err(error) = sys::fallocate(&file, sys::FallocateFlags::empty(), 0, bytes as u64) {
        return Err(match error {
            Errno::NOSPC | Errno::NOMEM => {
                let free = sys::fstatvfs(folder_fd).map_or(0, |stat| stat.f_bavail * stat.f_frsize);
                Error::NoSpace { needed: bytes as u64, free, dir: folder.to_owned() }
            }
            other => Error::io("reserve space for", &path, other),
        });
    }
    let map = memmap2::MmapRaw::map_raw(&file).map_err(|e| Error::io("map", &path, e))?;
    let memory = Mapped::new(map);
    let header = Header::store(&memory, facts, process::current(), now_ns())?;
    Ok((memory, header))
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

/// Free the entries of readers that died; gives how many.
pub(crate) fn evict_dead_readers(memory: &impl Memory) -> usize {
    let high = (memory.load(word::READER_HIGH, Acquire) as usize).min(READERS);
    let mut evicted = 0;
    for at in (0..high).map(reader_entry) {
        let owner = memory.load(at + entry::OWNER, Acquire);
        let Ok(pid) = u32::try_from(owner) else {
            continue;
        };
        let start_time = memory.load(at + entry::START_TIME, Relaxed);
        if pid != 0 && !process::is_alive(Producer { pid, start_time }) {
            // Only if it is still the same owner: the entry could have been given back and taken anew meanwhile.
            evicted += usize::from(memory.compare_exchange(at + entry::OWNER, owner, 0));
        }
    }
    evicted
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

/// The arena files of a capture, in the order of their ranks.
///
/// # Errors
/// [`Error::CaptureNotFound`] when there is none; [`Error::Permission`] when the folders are not ours alone.
pub fn find(directory: &Path, capture: &str) -> Result<Vec<PathBuf>> {
    check_name(capture)?;
    let mut files = arena_files(directory, capture)?;
    if files.is_empty() {
        let names: Vec<String> = list(directory)?.into_iter().filter(|c| c.alive).map(|c| c.name).collect();
        let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(Error::CaptureNotFound { name: capture.to_owned(), dir: directory.to_owned(), known });
    }
    files.sort_by_key(|path| path.file_stem().and_then(|stem| stem.to_str()?.parse::<u32>().ok()));
    Ok(files)
}

/// An arena that was found.
#[derive(Clone, Debug)]
pub struct Capture {
    /// The capture's name.
    pub name: String,
    /// Its header.
    pub header: Header,
    /// Its size.
    pub bytes: u64,
    /// Whether its publisher runs.
    pub alive: bool,
}

/// The arenas of this user; files that are none, or of another layout, are left out.
///
/// # Errors
/// [`Error::Permission`] when the folder is not ours alone.
pub fn list(directory: &Path) -> Result<Vec<Capture>> {
    let mut captures = Vec::new();
    for name in folder_names(directory)? {
        for path in arena_files(directory, &name)? {
            let Ok(memory) = open_mapped(&path) else {
                continue;
            };
            let Ok(header) = Header::load(&memory, &path) else {
                continue;
            };
            let alive = process::is_alive(header.producer);
            captures.push(Capture { name: name.clone(), header, bytes: memory.len() as u64 * 8, alive });
        }
    }
    captures.sort_by(|a, b| (&a.name, a.header.facts.rank).cmp(&(&b.name, b.header.facts.rank)));
    Ok(captures)
}

fn folder_names(directory: &Path) -> Result<Vec<String>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    check_folder(directory)?;
    let entries = std::fs::read_dir(directory).map_err(|e| Error::io("list", directory, e))?;
    let names = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(names.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| check_name(name).is_ok()).collect())
}

fn arena_files(directory: &Path, capture: &str) -> Result<Vec<PathBuf>> {
    let folder = directory.join(capture);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    check_folder(directory)?;
    check_folder(&folder)?;
    let entries = std::fs::read_dir(&folder).map_err(|e| Error::io("list", &folder, e))?;
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|extension| extension == "arena")).collect())
}

/// Remove all but the newest captures whose publishers died. What cannot be removed stays: it harms nobody.
fn remove_dead_captures(directory: &Path, keep: &str) {
    let Ok(captures) = list(directory) else {
        return;
    };
    let is_dead = |name: &str| captures.iter().filter(|c| c.name == name).all(|c| !c.alive);
    let mut dead: Vec<&Capture> = captures.iter().filter(|c| c.name != keep && is_dead(&c.name)).collect();
    dead.sort_by_key(|capture| std::cmp::Reverse(capture.header.created_ns));
    let mut names: Vec<&str> = Vec::new();
    for capture in &dead {
        if !names.contains(&capture.name.as_str()) {
            names.push(&capture.name);
        }
    }
    for name in names.into_iter().skip(KEPT_DEAD_CAPTURES) {
        let _ = std::fs::remove_dir_all(directory.join(name));
    }
}

/// Names become folders, so only what is plain on every file system is one.
fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(plain) {
        return Err(Error::invalid(format!(
            "'{name}' cannot name a capture; use 1 to 64 letters, digits, '-', '_' and '.', not beginning with '.'"
        )));
    }
    Ok(())
}

fn open_mapped(path: &Path) -> Result<Mapped> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = sys::open(path, flags, Permissions::empty()).map_err(|error| match error {
        Errno::LOOP => Error::Permission { path: path.to_owned(), why: "it is a symbolic link".into() },
        other => Error::io("open", path, other),
    })?;
    check_owner(&file, path, sys::FileType::RegularFile)?;
    let map = memmap2::MmapRaw::map_raw(&file).map_err(|e| Error::io("map", path, e))?;
    Ok(Mapped::new(map))
}

/// Make a folder that only we can enter, or check that it is one.
fn private_folder(path: &Path) -> Result<OwnedFd> {
    match sys::mkdir(path, Permissions::RWXU) {
        Ok(()) | Err(Errno::EXIST) => check_folder(path),
        Err(error) => Err(Error::io("create the folder", path, error)),
    }
}

fn check_folder(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let folder = sys::open(path, flags, Permissions::empty()).map_err(|error| match error {
        Errno::LOOP | Errno::NOTDIR => {
            Error::Permission { path: path.to_owned(), why: "it is no folder of its own".into() }
        }
        other => Error::io("open the folder", path, other),
    })?;
    check_owner(&folder, path, sys::FileType::Directory)?;
    Ok(folder)
}

fn check_owner(file: &OwnedFd, path: &Path, kind: sys::FileType) -> Result<()> {
    let stat = sys::fstat(file).map_err(|e| Error::io("inspect", path, e))?;
    let refuse = |why: String| Err(Error::Permission { path: path.to_owned(), why });
    let us = rustix::process::geteuid().as_raw();
    if stat.st_uid != us {
        return refuse(format!("it belongs to user {}, and this process runs as user {us}", stat.st_uid));
    }
    if sys::FileType::from_raw_mode(stat.st_mode) != kind {
        return refuse("it is not of the kind expected".into());
    }
    if stat.st_mode & 0o077 != 0 {
        return refuse(format!("its permissions are {:04o}", stat.st_mode & 0o7777));
    }
    Ok(())
}
