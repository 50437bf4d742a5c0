//! The arenas of a capture, read in turn; ranks that start later join.

use super::stages::{Part, Stages};
use crate::arena::open;
use crate::captures::find;
use crate::error::{Error, Result};
use crate::layout::{Facts, Producer};
use crate::memory::Mapped;
use crate::process;
use crate::reader::{Mode, Reader};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often a capture's folder is looked at for new ranks, and its publishers for signs of life.
const LOOK_PERIOD: Duration = Duration::from_millis(500);

/// One arena, and where it came from.
pub(super) struct Source {
    pub reader: Reader<Mapped>,
    /// What it has of the model.
    pub part: Part,
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
    stages: Stages,
    pub sources: Vec<Source>,
    /// Ranks that could not be read.
    refused: Vec<PathBuf>,
    looked: Instant,
}

impl Feed {
    pub fn open(directory: PathBuf, capture: &str, mode: Mode) -> Result<Self> {
        let paths = find(&directory, capture)?;
        let readers: Vec<_> = paths.iter().map(|path| open(path, mode)).collect::<Result<_>>()?;
        let stages = Stages::of(capture, &readers.iter().map(Reader::facts).collect::<Vec<_>>())?;
        let (capture, looked) = (capture.to_owned(), Instant::now());
        let mut feed = Self { directory, capture, mode, stages, sources: Vec::new(), refused: Vec::new(), looked };
        for (path, reader) in paths.into_iter().zip(readers) {
            feed.add(path, reader)?;
        }
        Ok(feed)
    }

    /// What the arenas say of the model: the first one of each stage for its layers, and all of them agree on the rest.
    pub fn facts(&self) -> &Facts {
        &self.stages.whole
    }

    /// What they say of each pipeline stage, in order.
    pub fn facts_by_stage(&self) -> impl Iterator<Item = Facts> {
        self.stages.facts()
    }

    fn add(&mut self, path: PathBuf, reader: Reader<Mapped>) -> Result<()> {
        let part = self.stages.part(&self.capture, reader.facts())?;
        let dropped_before = reader.dropped_rows();
        self.sources.push(Source { reader, part, path, dropped_before, over: false });
        Ok(())
    }

    /// The arenas of each replica of the model, in the order of its stages; those of which a stage has not come yet are
    /// left out.
    pub fn replicas(&self) -> Vec<Vec<usize>> {
        let stages = self.stages.whole.other_stages + 1;
        let mut by_replica: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (arena, source) in self.sources.iter().enumerate() {
            by_replica.entry(source.part.facts.rank / stages).or_default().push(arena);
        }
        let mut replicas: Vec<_> = by_replica.into_values().filter(|arenas| arenas.len() == stages as usize).collect();
        replicas.iter_mut().for_each(|arenas| arenas.sort_by_key(|&arena| self.sources[arena].part.stage));
        replicas
    }
    /// Whether it is time to call [`Feed::mark_ended`] and [`Feed::join_new_ranks`] again.
    pub fn is_time_to_look(&mut self) -> bool {
        let is_time = self.looked.elapsed() >= LOOK_PERIOD;
        if is_time {
            self.looked = Instant::now();
        }
        is_time
    }

    /// Look for publishers that are gone; gives the sources that have just ended.
    pub fn mark_ended(&mut self) -> Vec<usize> {
        let mut ended = Vec::new();
        for (index, source) in self.sources.iter_mut().enumerate().filter(|(_, source)| !source.over) {
            let gone = source.reader.ended() || !process::is_alive(source.reader.header().producer);
            // Read to the end first: what was published before the death is still there. A record that the publisher died
            // in the middle of never comes.
            if gone && !source.reader.has_next() {
                source.over = true;
                ended.push(index);
            }
        }
        ended
    }

    /// Look for ranks that started later, and read them too.
    ///
    /// # Errors
    /// Why a rank cannot be read; said once, though it is tried again.
    pub fn join_new_ranks(&mut self) -> Result<()> {
        let found = match find(&self.directory, &self.capture) {
            Ok(found) => found,
            Err(Error::CaptureNotFound { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut result = Ok(());
        for path in found {
            // A file of the same name may be another process's by now: that is another capture, not this one.
            if self.sources.iter().any(|source| source.path == path) {
                continue;
            }
            if let Err(error) = open(&path, self.mode).and_then(|reader| self.add(path.clone(), reader))
                && !self.refused.contains(&path)
            {
                self.refused.push(path);
                result = Err(error);
            }
        }
        result
    }

    /// Whether every publisher has ended or died, and everything they published was read.
    pub fn is_over(&self) -> bool {
        self.sources.iter().all(|source| source.over)
    }

    /// Rows that the writers have dropped since we came.
    pub fn dropped_rows(&self) -> u64 {
        self.sum(|source| source.reader.dropped_rows().saturating_sub(source.dropped_before))
    }

    /// Ends of requests that the writers gave up.
    pub fn lost_ends(&self) -> u64 {
        self.sum(|source| source.reader.lost_ends())
    }

    /// Rows that were overwritten before we read them.
    pub fn lost_rows(&self) -> u64 {
        self.sum(|source| source.reader.lost_rows())
    }

    /// Saturating: the arenas' words could say anything.
    fn sum(&self, figure: impl Fn(&Source) -> u64) -> u64 {
        self.sources.iter().map(figure).fold(0, u64::saturating_add)
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
