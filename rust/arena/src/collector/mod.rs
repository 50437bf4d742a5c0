//! The reading process's half: one thread drains every arena of a capture into counts and requests.

mod counts;
mod feed;
mod join;
mod known;
mod slots;
mod stages;
mod store;
mod stream;
mod wait;

pub use feed::ArenaId;
pub use store::{MISSING, NO_TOKEN, RequestRows, State, Summary};
pub use stream::{Block, NO_SLOT, RecordRange, RowStream};
pub use wait::{Pace, Waiter};

use crate::batch::{Phase, Span};
use crate::cuda::Way;
use crate::error::{Error, Result};
use crate::layout::Facts;
use crate::reader::{Mode, Record, Step};
use crate::writer::{after, now_ns};
use counts::{Counts, History};
use feed::{Feed, Source};
use known::Known;
use slots::Slots;
use stages::Part;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use store::{Key, Store};

/// How a collector is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the captures are.
    pub directory: PathBuf,
    /// Whether its readers hold the writers back.
    pub mode: Mode,
    /// Bytes that the requests' rows may take.
    pub memory: usize,
    /// Rows kept for counts over the last N.
    pub history: usize,
    /// How soon the thread looks for records.
    pub pace: Pace,
}

/// Figures of a collector.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Forwards that gave rows.
    pub steps: u64,
    /// Rows read.
    pub tokens: u64,
    /// Rows that the writers dropped since we came.
    pub dropped_tokens: u64,
    /// Rows that were overwritten before we read them (lossy readers only).
    pub lost_tokens: u64,
    /// Ends of requests that the writers gave up for want of room: those requests stay running.
    pub lost_ends: u64,
    /// Rows of no request, or of one that the reader came too late to know: counted, not kept.
    pub unattributed_tokens: u64,
    /// Rows that came for requests which are no longer held.
    pub unkept_tokens: u64,
    /// Rows whose KV slot lay past what the memory holds: a request that begins with them from the cache lacks them.
    pub unslotted_tokens: u64,
    /// Positions, of the requests that are held, whose row is not.
    pub missing_tokens: u64,
    /// Requests removed for want of memory.
    pub evicted_requests: u64,
    /// Records that contradicted themselves.
    pub corrupt_records: u64,
    /// What the last of those said, or why a later rank cannot be read.
    pub corrupt: Option<String>,
    /// Seconds from the publishing of the newest record read until it was read; of the oldest unread one, if later.
    pub lag_s: f64,
    /// Bytes that the requests take.
    pub memory: u64,
    /// How devices publish; None where none does.
    pub way: Option<Way>,
    /// Why a publisher has switched its capture off; None while none has.
    pub failure: Option<String>,
    /// Arenas, one a rank.
    pub arenas: u64,
    /// Whether every publisher has ended, and everything was read.
    pub ended: bool,
}

/// A span whose request was looked up.
struct Resolved {
    rows: std::ops::Range<usize>,
    phase: Phase,
    key: Option<Key>,
}

struct Inner {
    facts: Facts,
    feed: Feed,
    counts: Counts,
    /// Of each pipeline stage.
    histories: Vec<History>,
    store: Store,
    /// For each arena, its batch's requests.
    batches: Vec<Known<Resolved>>,
    /// For each arena, what the engine has in its cache.
    slots: Vec<Slots>,
    steps: u64,
    last_step: Vec<Option<u64>>,
    unattributed: u64,
    corrupt_records: u64,
    corrupt: Option<String>,
    lag_ns: u64,
    /// What there was to say of the arenas when they were let go.
    closed: Option<(Stats, Vec<ArenaId>)>,
}

struct Shared {
    state: Mutex<Inner>,
    tokens: AtomicU64,
    stop: AtomicBool,
    /// Callers that want the state: the thread lets them in before it goes on.
    waiting: AtomicUsize,
}

/// Counts and rows of a running capture.
pub struct Collector {
    shared: Arc<Shared>,
    facts: Facts,
    thread: Mutex<Option<JoinHandle<()>>>,
    pid: u32,
}

/// Longest time that the state is held by the thread.
const DRAIN_SLICE: Duration = Duration::from_millis(1);
/// How often a caller of [`Collector::sync`] looks for records that have not landed.
const SYNC_PERIOD: Duration = Duration::from_micros(50);

impl Collector {
    /// Attach to the capture of that name and begin to read, from the oldest records that are still there.
    ///
    /// # Errors
    /// [`Error::CaptureNotFound`] and everything that [`crate::open`] refuses; [`Error::Invalid`] for a history of no rows
    /// or of too many.
    pub fn open(capture: &str, options: Options) -> Result<Self> {
        let feed = Feed::open(options.directory, capture, options.mode)?;
        let facts = feed.facts().clone();
        let state = Inner {
            counts: Counts::new(&facts),
            histories: feed
                .facts_by_stage()
                .map(|facts| History::new(&facts, options.history))
                .collect::<Result<_>>()?,
            store: Store::new(&facts, options.memory),
            facts: facts.clone(),
            feed,
            batches: Vec::new(),
            slots: Vec::new(),
            steps: 0,
            last_step: Vec::new(),
            unattributed: 0,
            corrupt_records: 0,
            corrupt: None,
            lag_ns: 0,
            closed: None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            tokens: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("expert-lens-collector".into())
            .spawn(move || run(&of_thread, options.pace))
            .map_err(|e| Error::io("start a thread for", std::path::Path::new(capture), e))?;
        Ok(Self { shared, facts, thread: Mutex::new(Some(thread)), pid: std::process::id() })
    }

    /// What the capture says of its model.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Rows read so far; cheap.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.shared.tokens.load(Relaxed)
    }

    /// Read everything that was reserved before this call; false if some of it has not landed within `timeout`.
    #[must_use]
    pub fn sync(&self, timeout: Duration) -> bool {
        let deadline = after(timeout);
        let targets: Vec<u64> = self.lock().feed.sources.iter().map(|source| source.reader.head()).collect();
        loop {
            let mut state = self.lock();
            let (_, emptied) = state.drain(&self.shared.tokens, DRAIN_SLICE);
            let mut sources = state.feed.sources.iter().zip(&targets);
            if sources.all(|(source, &target)| source.over || source.reader.cursor() >= target) {
                return true;
            }
            drop(state);
            if Instant::now() >= deadline {
                return false;
            }
            if emptied {
                std::thread::sleep(SYNC_PERIOD);
            }
        }
    }

    /// Counts u64 [L, E] of all rows, or of the last `last` ones, of one phase or of both.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `last` is 0 or exceeds the history.
    pub fn counts(&self, phase: Option<Phase>, last: Option<u64>) -> Result<Vec<u64>> {
        let mut state = self.lock();
        let Inner { counts, histories, .. } = &mut *state;
        let capacity = histories[0].capacity();
        match last {
            None => Ok(counts.of(phase)),
            Some(last) if last > 0 && last <= capacity => {
                Ok(histories.iter_mut().flat_map(|history| history.counts(phase, last)).collect())
            }
            Some(last) => Err(Error::invalid(format!(
                "counts of the last {last} tokens, and this lens keeps the last {}; ask for 1 to that many, or attach with a \
                 larger history",
                capacity
            ))),
        }
    }

    /// Every request that is held, in the order of their coming.
    #[must_use]
    pub fn requests(&self) -> Vec<Summary> {
        self.lock().store.summaries()
    }

    /// The rows of a request; None if it is not held.
    #[must_use]
    pub fn rows(&self, request: &str) -> Option<RequestRows> {
        let state = self.lock();
        state.store.rows(&state.facts, request)
    }

    /// Whether the request was held and had to make room.
    #[must_use]
    pub fn was_evicted(&self, request: &str) -> bool {
        self.lock().store.was_evicted(request)
    }

    /// The arenas that are read, one a rank.
    #[must_use]
    pub fn arenas(&self) -> Vec<ArenaId> {
        self.lock().arenas()
    }

    /// Why a publisher has switched its capture off; None while none has.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.lock().failure()
    }

    /// The collector's figures.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.lock().stats(self.tokens())
    }

    /// Stop reading and let go of the arenas. What was collected stays readable.
    pub fn close(&self) {
        // A forked child holds a copy of this value: the thread is not there, and may have held the lock.
        if std::process::id() != self.pid {
            return;
        }
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
        let mut state = self.lock();
        if state.closed.is_none() {
            let stats = Stats { ended: true, ..state.stats(self.tokens()) };
            state.closed = Some((stats, state.arenas()));
            state.feed.sources.clear();
        }
    }

    /// The lock, ahead of the thread's next slice.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.shared.waiting.fetch_add(1, Relaxed);
        // A panic while the state was held would have ended the thread; its figures can still be read.
        let state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.waiting.fetch_sub(1, Relaxed);
        state
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.close();
    }
}

fn run(shared: &Shared, pace: Pace) {
    let mut waiter = Waiter::new(pace);
    let mut came = false;
    while !shared.stop.load(Relaxed) {
        let emptied = {
            let mut state = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.look();
            let (some, emptied) = state.drain(&shared.tokens, DRAIN_SLICE);
            came |= some;
            emptied
        };
        while shared.waiting.load(Relaxed) > 0 && !shared.stop.load(Relaxed) {
            std::thread::yield_now();
        }
        if emptied {
            waiter.wait(came);
            came = false;
        }
    }
}

impl Inner {
    /// Take records from every arena in turn until none is left or `slice` is over; gives whether any came, and
    /// whether none is left.
    fn drain(&mut self, tokens: &AtomicU64, slice: Duration) -> (bool, bool) {
        let began = Instant::now();
        let mut came = false;
        loop {
            let mut emptied = true;
            for arena in 0..self.feed.sources.len() {
                if self.take_one(arena, tokens) {
                    (came, emptied) = (true, false);
                }
            }
            if emptied || began.elapsed() >= slice {
                return (came, emptied);
            }
        }
    }

    /// Take one record of an arena; false if there is none.
    fn take_one(&mut self, arena: usize, tokens: &AtomicU64) -> bool {
        self.batches.resize_with(self.feed.sources.len(), Known::default);
        self.last_step.resize(self.feed.sources.len(), None);
        self.slots.resize_with(self.feed.sources.len(), Slots::default);
        let Source { reader, part, .. } = &mut self.feed.sources[arena];
        let mut time_ns = 0;
        match reader.poll() {
            Ok(None) => {
                // It may have passed over records of nothing, whose space must not stay held.
                reader.release(reader.cursor());
                return false;
            }
            Ok(Some(Record::End(end))) if part.is_first() => self.store.finish(part.replica(), arena, &end),
            Ok(Some(Record::End(_))) => {}
            Ok(Some(Record::Step(step))) => {
                time_ns = step.time_ns;
                let store = &mut self.store;
                let resolve = |span: &Span| Resolved {
                    rows: span.first_row as usize..(span.first_row + span.rows) as usize,
                    phase: span.phase,
                    key: store.key_of(part.replica(), arena, span),
                };
                let spans = self.batches[arena].spans(step.batch, resolve);
                let (counts, history) = (&mut self.counts, &mut self.histories[part.stage]);
                let unattributed = apply(&self.facts, part, &step, spans, counts, history, &mut self.store);
                let budget = self.store.slot_budget() / self.slots.len();
                self.slots[arena].keep(&part.facts, &step, budget);
                if step.kv_slots.is_some() {
                    self.store.reserve(self.slots.iter().map(Slots::bytes).sum());
                }
                if part.is_first() {
                    self.steps += u64::from(self.last_step[arena] != Some(step.step));
                    self.last_step[arena] = Some(step.step);
                    self.unattributed += unattributed;
                    tokens.fetch_add(step.rows as u64, Relaxed);
                }
            }
            Ok(Some(Record::Prefix(prefix))) => {
                let slots = &mut self.slots[arena];
                if prefix.after_gap {
                    slots.forget();
                }
                for span in &prefix.spans {
                    let rows = span.first_row as usize..(span.first_row + span.rows) as usize;
                    if let Some(key) = self.store.key_of(part.replica(), arena, span) {
                        self.store.add_prefix(&self.facts, part, key, slots, &prefix.kv_slots[rows]);
                    }
                }
            }
            Err(error) => {
                self.corrupt_records += 1;
                self.corrupt = Some(error.to_string());
            }
        }
        let cursor = reader.cursor();
        reader.release(cursor);
        if time_ns > 0 {
            self.lag_ns = now_ns().saturating_sub(time_ns);
        }
        true
    }

    fn look(&mut self) {
        if !self.feed.is_time_to_look() {
            return;
        }
        for arena in self.feed.mark_ended() {
            self.store.abort_running(arena);
        }
        if let Err(error) = self.feed.join_new_ranks() {
            self.corrupt = Some(error.to_string());
        }
    }

    fn arenas(&self) -> Vec<ArenaId> {
        match &self.closed {
            Some((_, arenas)) => arenas.clone(),
            None => self.feed.sources.iter().map(|source| feed::arena_id(&source.reader)).collect(),
        }
    }

    fn failure(&self) -> Option<String> {
        match &self.closed {
            Some((stats, _)) => stats.failure.clone(),
            None => self.feed.sources.iter().find_map(|source| source.reader.failure()),
        }
    }

    fn stats(&self, tokens: u64) -> Stats {
        if let Some((stats, _)) = &self.closed {
            return stats.clone();
        }
        let unread = self.feed.sources.iter().filter_map(|source| source.reader.next_time_ns());
        let waited = unread.map(|time_ns| now_ns().saturating_sub(time_ns)).max().unwrap_or(0);
        Stats {
            steps: self.steps,
            tokens,
            dropped_tokens: self.feed.dropped_rows(),
            lost_tokens: self.feed.lost_rows(),
            lost_ends: self.feed.lost_ends(),
            unattributed_tokens: self.unattributed,
            unkept_tokens: self.store.unkept_rows,
            unslotted_tokens: self.slots.iter().map(|slots| slots.unkept).sum(),
            missing_tokens: self.store.missing_rows(),
            evicted_requests: self.store.evicted_requests,
            corrupt_records: self.corrupt_records,
            corrupt: self.corrupt.clone(),
            lag_s: self.lag_ns.max(waited) as f64 * 1e-9,
            memory: self.store.bytes() as u64,
            way: self.feed.sources.iter().find_map(|source| source.reader.way()),
            failure: self.failure(),
            arenas: self.feed.sources.len() as u64,
            ended: self.feed.is_over(),
        }
    }
}

/// Count a step's rows and hand them to their requests; gives how many belong to none. Rows under no span are of no known
/// phase.
fn apply(
    facts: &Facts,
    part: &Part,
    step: &Step<'_>,
    spans: &[Resolved],
    counts: &mut Counts,
    history: &mut History,
    store: &mut Store,
) -> u64 {
    let row_bytes = part.facts.row_bytes();
    let mut unattributed = 0;
    let mut count = |phase, rows: std::ops::Range<usize>| {
        if rows.is_empty() {
            return;
        }
        let experts = &step.experts[rows.start * row_bytes..rows.end * row_bytes];
        counts.add(part, phase, experts);
        history.add(phase, experts);
    };
    let mut next = 0;
    for span in spans {
        count(None, next..span.rows.start);
        unattributed += span.rows.start - next;
        count(Some(span.phase), span.rows.clone());
        match span.key {
            Some(key) => store.add(facts, part, key, step, span.rows.clone(), span.phase),
            None => unattributed += span.rows.len(),
        }
        next = span.rows.end;
    }
    count(None, next..step.rows);
    (unattributed + step.rows - next) as u64
}
