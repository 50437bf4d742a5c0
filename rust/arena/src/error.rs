//! What can go wrong with an arena, said with the values that disagree and with what to do next.

use std::path::PathBuf;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that this crate refuses or finds broken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No arena of that capture exists.
    #[error("no capture named '{name}' in {}; running captures: {known}", .dir.display())]
    CaptureNotFound {
        /// The name asked for.
        name: String,
        /// Where it was looked for.
        dir: PathBuf,
        /// The names that exist, or "none".
        known: String,
    },

    /// A live process publishes under that name and rank already.
    #[error(
        "capture '{name}' rank {rank} is in use by process {pid}; choose another name, or close that capture first"
    )]
    CaptureInUse {
        /// The capture's name.
        name: String,
        /// The rank within the capture.
        rank: u32,
        /// The process that publishes it.
        pid: u32,
    },

    /// The file system cannot hold the arena.
    #[error(
        "no room for an arena of {needed} bytes in {}: {free} bytes are free; ask for a smaller arena, give \
         the container more shared memory (docker: --shm-size), or point EXPERT_LENS_DIR to a larger tmpfs",
        .dir.display()
    )]
    NoSpace {
        /// Bytes asked for.
        needed: u64,
        /// Bytes that the file system has free.
        free: u64,
        /// The folder of the arena.
        dir: PathBuf,
    },

    /// The layout's version differs from this build's.
    #[error(
        "arena {} has layout {found}, this build knows layout {known}; use the same expert_lens release in the engine's \
         and the reader's environment",
        .path.display()
    )]
    Version {
        /// The arena's file.
        path: PathBuf,
        /// Its layout version; 0 means that its creator did not finish.
        found: u64,
        /// The version that this build reads and writes.
        known: u64,
    },

    /// The arena contradicts itself; nothing more is read from it.
    #[error("arena is corrupt: {what}")]
    Corrupt {
        /// What was found, with the value.
        what: String,
    },

    /// A folder or file that others could write, or that is not ours.
    #[error("refusing {}: {why}; it must be yours alone (folders 0700, files 0600, no symbolic links)", .path.display())]
    Permission {
        /// The folder or file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },

    /// No reader entry is free.
    #[error("all {count} reader entries of the arena are taken; close a lens that watches this capture")]
    ReadersFull {
        /// The number of entries.
        count: usize,
    },

    /// An argument outside the layout's limits.
    #[error("{what}")]
    Invalid {
        /// The argument, its value, and the limit.
        what: String,
    },

    /// The CUDA driver said no, or is not there.
    #[error("{what}")]
    Cuda {
        /// Which call, and the driver's answer.
        what: String,
    },

    /// The operating system said no.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
}

impl Error {
    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into() }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    pub(crate) fn io(action: &'static str, path: &std::path::Path, source: impl Into<std::io::Error>) -> Self {
        Self::Io { action, path: path.to_owned(), source: source.into() }
    }
}
