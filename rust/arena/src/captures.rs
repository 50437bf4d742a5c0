//! What stands in the folder of captures: `<directory>/<capture>/<rank>.arena`, theirs who made them alone.

use crate::error::{Error, Result};
use crate::layout::{Header, origin};
use crate::memory::{Mapped, Memory};
use crate::process;
use rustix::fs::{self as sys, FlockOperation, Mode as Permissions, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where captures are: `$EXPERT_LENS_DIR`, or `/dev/shm/expert-lens-<uid>`.
#[must_use]
pub fn default_directory() -> PathBuf {
    match std::env::var_os("EXPERT_LENS_DIR") {
        Some(directory) if !directory.is_empty() => directory.into(),
        _ => format!("/dev/shm/expert-lens-{}", rustix::process::geteuid().as_raw()).into(),
    }
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

/// The arenas of this user; files that are none, of another layout, or open to others, are left out.
///
/// # Errors
/// [`Error::Permission`] when the folder is not ours alone.
pub fn list(directory: &Path) -> Result<Vec<Capture>> {
    let mut captures = Vec::new();
    for name in folder_names(directory)? {
        for path in arena_files(directory, &name).unwrap_or_default() {
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
    files(&folder, "arena").map_err(|e| Error::io("list", &folder, e))
}

fn files(folder: &Path, extension: &str) -> std::io::Result<Vec<PathBuf>> {
    let paths = std::fs::read_dir(folder)?.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect())
}

/// An error if a live process publishes to that file, or if it is not ours. What is dead, or no arena, may be replaced.
pub(crate) fn check_free(path: &Path, capture: &str, rank: u32) -> Result<()> {
    match open_mapped(path).map(|memory| origin(&memory)) {
        Ok(Some((producer, _))) if process::is_alive(producer) => {
            Err(Error::CaptureInUse { name: capture.to_owned(), rank, pid: producer.pid })
        }
        Err(error @ Error::Permission { .. }) => Err(error),
        _ => Ok(()),
    }
}

/// Remove the files that creators left who died before they were done. Only under the lock, which a live one holds.
pub(crate) fn remove_unfinished(directory: &Path) {
    for name in folder_names(directory).unwrap_or_default() {
        let folder = directory.join(name);
        for path in files(&folder, "unfinished").unwrap_or_default() {
            let _ = std::fs::remove_file(path);
            // Fails unless nothing else was in it.
            let _ = std::fs::remove_dir(&folder);
        }
    }
}

/// When a dead process made the arena, 0 if it is none; nothing if the process lives.
fn created_by_the_dead(path: &Path) -> Option<u64> {
    let made = open_mapped(path).ok()?;
    match origin(&made) {
        Some((producer, _)) if process::is_alive(producer) => None,
        Some((_, created_ns)) => Some(created_ns),
        None => Some(0),
    }
}

/// Remove the arenas in a capture's folder whose publishers died.
pub(crate) fn remove_dead_ranks(folder: &Path) {
    for path in files(folder, "arena").unwrap_or_default() {
        if created_by_the_dead(&path).is_some() {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Remove all but the `kept` newest captures whose publishers all died; gives how many. What cannot be removed stays: it
/// harms nobody.
pub(crate) fn remove_dead(directory: &Path, kept: usize) -> usize {
    let mut dead = Vec::new();
    for name in folder_names(directory).unwrap_or_default() {
        let paths = arena_files(directory, &name).unwrap_or_default();
        let created: Option<Vec<u64>> = paths.iter().map(|path| created_by_the_dead(path)).collect();
        if let Some(newest) = created.and_then(|created| created.into_iter().max()) {
            dead.push((newest, directory.join(name)));
        }
    }
    dead.sort_by(|a, b| b.cmp(a));
    dead.iter().skip(kept).filter(|(_, folder)| std::fs::remove_dir_all(folder).is_ok()).count()
}

/// Remove every capture whose publishers all died; gives how many.
///
/// # Errors
/// [`Error::Permission`] when the folder is not ours alone.
pub fn clean(directory: &Path) -> Result<usize> {
    if !directory.exists() {
        return Ok(0);
    }
    let root = check_folder(directory)?;
    // A capture that is being made is not taken for a dead one.
    lock(&root, directory)?;
    remove_unfinished(directory);
    Ok(remove_dead(directory, 0))
}

/// Remove a publisher's own file at its end, and the folder if it was the last.
pub(crate) fn remove_own(path: &Path, file: (u64, u64)) {
    let Some((folder, directory)) = path.parent().and_then(|folder| Some((folder, folder.parent()?))) else {
        return;
    };
    // Under the lock, so that the folder does not vanish under a publisher that is being made in it.
    let Ok(root) = check_folder(directory) else { return };
    if lock(&root, directory).is_ok() && sys::stat(path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == file) {
        let _ = std::fs::remove_file(path);
        // Fails while other ranks' arenas are there, as it should.
        let _ = std::fs::remove_dir(folder);
    }
}

/// Lock the folder of captures, until `root` is dropped.
pub(crate) fn lock(root: &OwnedFd, directory: &Path) -> Result<()> {
    retry_on_intr(|| sys::flock(root, FlockOperation::LockExclusive)).map_err(|e| Error::io("lock", directory, e))
}

/// Names become folders, so only what is plain on every file system is one.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(plain) {
        return Err(Error::invalid(format!(
            "'{name}' cannot name a capture; use 1 to 64 letters, digits, '-', '_' and '.', not beginning with '.'"
        )));
    }
    Ok(())
}

pub(crate) fn open_mapped(path: &Path) -> Result<Mapped> {
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
pub(crate) fn private_folder(path: &Path) -> Result<OwnedFd> {
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
