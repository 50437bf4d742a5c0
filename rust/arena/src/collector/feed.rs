//! The arenas of a capture, read in turn; ranks that start later join.

use crate::arena::{find, open};
use crate::error::{Error, Result};
use crate::layout::{Facts, Producer};
use crate::memory::Mapped;
use crate::process;
use crate::reader::{Mode, Reader};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often a capture's folder is looked at for new ranks, and its publishers for signs of life.
const LOOK_PERIOD: Duration = Duration::from_millis(500);

/// One arena, and where it came from.
pub(super) struct Source {
    pub reader: Reader<Mapped>,
    pub path: PathBuf,
    /// Rows dropped by the writer before we came.
    pub dropped_before: u64,
    /// The publisher has ended, or has died.
    pub over: bool,
}

/// Every arena of a capture.
pub(super) struct Feed {
    directory: PathBuf,
    capture: String,
    mode: Mode,
    pub sources: Vec<Source>,
    looked: Instant,
}

impl Feed {
    pub fn open(directory: PathBuf, capture: &str, mode: Mode) -> Result<Self> {
        let mut feed =
            Self { directory, capture: capture.to_owned(), mode, sources: Vec::new(), looked: Instant::now() };
        for path in find(&feed.directory, capture)? {
            feed.add(path)?;
        }
        Ok(feed)
    }

    /// What the first arena says of the model. All of them agree on it.
    pub fn facts(&self) -> &Facts {
        self.sources[0].reader.facts()
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let reader = open(&path, self.mode)?;
        if let Some(first) = self.sources.first() {
            let (ours, theirs) = (first.reader.facts(), reader.facts());
            let shape = |facts: &Facts| (facts.layers.clone(), facts.num_experts, facts.top_k, facts.weights);
            if shape(ours) != shape(theirs) {
                return Err(Error::invalid(format!(
                    "rank {} of capture '{}' has other routed layers, experts or top-k than rank {}; ranks with layers of \
                     their own cannot be watched together",
                    theirs.rank, self.capture, ours.rank
                )));
            }
        }
        let dropped_before = reader.dropped_rows();
        self.sources.push(Source { reader, path, dropped_before, over: false });
        Ok(())
    }

    /// Now and then, look for new ranks and for publishers that are gone; gives the sources that have just ended.
    pub fn look(&mut self) -> Result<Vec<usize>> {
        if self.looked.elapsed() < LOOK_PERIOD {
            return Ok(Vec::new());
        }
        self.looked = Instant::now();
        let mut ended = Vec::new();
        for (index, source) in self.sources.iter_mut().enumerate().filter(|(_, source)| !source.over) {
            // Read to the end first: what was published before the death is still there.
            let gone = source.reader.ended() || !process::is_alive(source.reader.header().producer);
            if gone && source.reader.cursor() >= source.reader.head() {
                source.over = true;
                ended.push(index);
            }
        }
        let found = match find(&self.directory, &self.capture) {
            Ok(found) => found,
            Err(Error::CaptureNotFound { .. }) => return Ok(ended),
            Err(error) => return Err(error),
        };
        for path in found {
            // A file of the same name may be another process's by now: that is another capture, not this one.
            if !self.sources.iter().any(|source| source.path == path) {
                self.add(path)?;
            }
        }
        Ok(ended)
    }

    /// Whether every publisher has ended or died, and everything they published was read.
    pub fn is_over(&self) -> bool {
        self.sources.iter().all(|source| source.over)
    }

    /// Rows that the writers have dropped since we came.
    pub fn dropped_rows(&self) -> u64 {
        self.sources.iter().map(|s| s.reader.dropped_rows().saturating_sub(s.dropped_before)).sum()
    }

    /// Rows that were overwritten before we read them.
    pub fn lost_rows(&self) -> u64 {
        self.sources.iter().map(|source| source.reader.lost_rows()).sum()
    }
}

/// What makes one publisher's arena different from every other, ever: for a recorder that resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ArenaId {
    /// Rank within the capture.
    pub rank: u32,
    /// The publishing process.
    pub producer: Producer,
    /// When the arena was made, in nanoseconds since the Unix epoch.
    pub created_ns: u64,
}

/// Which arena a reader reads.
pub(super) fn arena_id(reader: &Reader<Mapped>) -> ArenaId {
    let header = reader.header();
    ArenaId { rank: header.facts.rank, producer: header.producer, created_ns: header.created_ns }
}
