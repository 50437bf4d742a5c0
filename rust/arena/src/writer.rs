//! The publishing end: reserves space, copies rows in, and publishes them by one store.

use crate::batch::{End, Span, encode_end, encode_spans};
use crate::error::{Error, Result};
use crate::layout::{Descriptor, Facts, Header, Kind, descriptor, entry, reader_entry, section, word};
use crate::memory::Memory;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What becomes of a record when lossless readers still need the space it would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// It is dropped and counted.
    Drop,
    /// The writer waits, in one call at most this long, then drops it.
    Wait(Duration),
}

/// The rows of one forward.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Expert ids [n, L, K], u8 or u16 in native byte order: [`Facts::id_bytes`].
    pub experts: &'a [u8],
    /// Token ids [n], where the engine knows them.
    pub token_ids: Option<&'a [u32]>,
    /// Positions in the request [n].
    pub positions: &'a [u32],
    /// Router weights f16 [n, L, K], if the arena was made for them.
    pub weights: Option<&'a [u16]>,
}

/// The rows of one forward whose experts a GPU holds; sections as in [`Rows`].
#[derive(Clone, Copy, Debug)]
pub struct DeviceRows<'a> {
    /// Address of the expert ids on the device.
    pub experts: u64,
    /// Token ids: on the device, on the host, or not known.
    pub token_ids: Option<Source<'a>>,
    /// Positions in the request [n].
    pub positions: &'a [u32],
    /// Address of the router weights on the device, if the arena was made for them.
    pub weights: Option<u64>,
}

/// Where the bytes of a section are.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// In this process.
    Host(&'a [u8]),
    /// On a device: address and length in bytes.
    Device(u64, usize),
}

impl Source<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Host(bytes) => bytes.len(),
            Self::Device(_, len) => *len,
        }
    }

    fn slice(&self, range: Range<usize>) -> Self {
        match self {
            Self::Host(bytes) => Self::Host(&bytes[range]),
            Self::Device(address, _) => Self::Device(address + range.start as u64, range.len()),
        }
    }
}

/// The sections of a step, wherever they are.
#[derive(Clone, Copy)]
struct Sections<'a> {
    experts: Source<'a>,
    token_ids: Option<Source<'a>>,
    positions: &'a [u32],
    weights: Option<Source<'a>>,
}

/// How sections of a device come into the arena, and how a record that has some is published: after they came.
pub(crate) trait Landing {
    /// Copy `len` bytes from a device's `address` to word `at`, some time from now.
    fn copy(&mut self, at: usize, address: u64, len: usize) -> Result<()>;
    /// Store `value` at word `at` with release, after the copies so far.
    fn publish(&mut self, at: usize, value: u64) -> Result<()>;
}

/// What became of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Rows that readers can now see.
    pub rows: usize,
    /// Rows that did not fit, and are counted as dropped.
    pub dropped: usize,
}

/// What all parts of a step have in common, and their rows.
#[derive(Clone, Copy)]
struct What {
    rows: usize,
    sections: u16,
    step: u64,
    time_ns: u64,
}

/// Space taken for a record that nobody sees yet.
struct Reservation {
    index: u64,
    /// Word in memory where the payload begins.
    at: usize,
    position: u64,
}

/// Ends of requests that wait for space; more are counted as lost.
const MAX_PENDING_ENDS: usize = 4096;
/// A step is split so that no part takes more than this share of the ring: smaller parts can be freed one by one.
const PARTS_PER_RING: usize = 4;
/// How often the batch is published anew, even if it stays the same, on the way round the ring.
const BATCHES_PER_RING: usize = 16;
/// How often a writer that waits looks for room.
const WAIT_PERIOD: Duration = Duration::from_micros(50);

/// The writer of an arena. There is one.
pub struct Writer<M: Memory> {
    memory: Arc<M>,
    header: Header,
    on_full: OnFull,
    head: u64,
    tail: u64,
    /// Ring position after the last record.
    position: u64,
    /// Where each live record's payload begins. Kept here: what stands in shared memory could have been overwritten.
    starts: Box<[u64]>,
    rows_before: u64,
    steps: u64,
    dropped_records: u64,
    dropped_rows: u64,
    lost_ends: u64,
    /// Until when this call may wait for room; set when it first has to.
    deadline: Option<Instant>,
    batch: Vec<u8>,
    batch_rows: u32,
    /// The record that holds the batch as it is now.
    batch_record: Option<u64>,
    spans: Vec<Span>,
    pending: VecDeque<Vec<u8>>,
}

impl<M: Memory> Writer<M> {
    /// Take over memory that `header` was just stored in.
    pub(crate) fn new(memory: Arc<M>, header: Header, on_full: OnFull) -> Self {
        let starts = vec![0; header.geometry.descriptors].into_boxed_slice();
        let mut writer = Self {
            memory,
            header,
            on_full,
            head: 0,
            tail: 0,
            position: 0,
            starts,
            rows_before: 0,
            steps: 0,
            dropped_records: 0,
            dropped_rows: 0,
            lost_ends: 0,
            deadline: None,
            batch: Vec::new(),
            batch_rows: 0,
            batch_record: None,
            spans: Vec::new(),
            pending: VecDeque::new(),
        };
        writer.set_batch(Vec::new()).expect("no spans are valid");
        writer
    }

    /// What the arena says of the model.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.header.facts
    }

    /// Forwards so far, dropped ones included.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Rows dropped so far.
    #[must_use]
    pub fn dropped_rows(&self) -> u64 {
        self.dropped_rows
    }

    /// Records of rows dropped so far; a step that was split is several.
    #[must_use]
    pub fn dropped_records(&self) -> u64 {
        self.dropped_records
    }

    /// Ends of requests that were given up for want of room.
    #[must_use]
    pub fn lost_ends(&self) -> u64 {
        self.lost_ends
    }

    /// State whose rows the next steps hold, until the next call.
    ///
    /// # Errors
    /// Spans that overlap, ids longer than [`crate::layout::MAX_ID_BYTES`], or a batch too large for the arena; the
    /// batch before stays in force.
    pub fn set_batch(&mut self, spans: Vec<Span>) -> Result<()> {
        let mut encoded = Vec::with_capacity(self.batch.len());
        encode_spans(&spans, &mut encoded)?;
        if encoded.len() / 8 > self.header.geometry.ring_words / PARTS_PER_RING / 2 {
            return Err(Error::invalid(format!(
                "the spans of {} requests take {} bytes, too many for an arena of {} bytes; make it larger",
                spans.len(),
                encoded.len(),
                self.memory.len() * 8
            )));
        }
        self.batch = encoded;
        self.batch_rows = spans.last().map_or(0, |span| span.first_row + span.rows);
        self.batch_record = None;
        self.spans = spans;
        Ok(())
    }

    /// Publish the rows of one forward, in the batch stated last.
    ///
    /// # Errors
    /// Lengths that do not agree; nothing is published then.
    pub fn publish(&mut self, rows: &Rows<'_>) -> Result<Published> {
        let sections = Sections {
            experts: Source::Host(rows.experts),
            token_ids: rows.token_ids.map(|ids| Source::Host(bytemuck::must_cast_slice(ids))),
            positions: rows.positions,
            weights: rows.weights.map(|weights| Source::Host(bytemuck::must_cast_slice(weights))),
        };
        self.publish_sections(&sections, None)
    }

    /// Publish the rows of one forward that a device holds: they can be read once `landing` has brought them here.
    ///
    /// # Errors
    /// Lengths that do not agree: nothing is published then. And what `landing` says; the record is then never published,
    /// and neither is any behind it.
    pub(crate) fn publish_device(&mut self, rows: &DeviceRows<'_>, landing: &mut dyn Landing) -> Result<Published> {
        let n = rows.positions.len();
        let sections = Sections {
            experts: Source::Device(rows.experts, n * self.facts().row_bytes()),
            token_ids: rows.token_ids,
            positions: rows.positions,
            weights: rows.weights.map(|address| Source::Device(address, n * self.facts().ids_per_row() * 2)),
        };
        self.publish_sections(&sections, Some(landing))
    }

    /// Whether every record that was reserved is published.
    #[must_use]
    pub fn all_landed(&self) -> bool {
        (self.tail..self.head).all(|index| self.has_landed(index))
    }

    fn publish_sections(&mut self, rows: &Sections<'_>, landing: Option<&mut (dyn Landing + '_)>) -> Result<Published> {
        let n = self.check(rows)?;
        self.deadline = None;
        self.publish_pending();
        let step = self.steps;
        self.steps += 1;
        self.memory.store(word::STEPS, self.steps, Relaxed);
        let what = What {
            rows: n,
            sections: section::EXPERTS
                | section::POSITIONS
                | if rows.token_ids.is_some() { section::TOKEN_IDS } else { 0 }
                | if rows.weights.is_some() { section::WEIGHTS } else { 0 },
            step,
            time_ns: now_ns(),
        };
        let limit = self.header.geometry.ring_words / PARTS_PER_RING;
        let published = if self.batch.len() / 8 + self.facts().section_words(what.sections, n) <= limit {
            self.publish_whole(rows, what, landing)?
        } else {
            self.publish_parts(rows, what, limit, landing)?
        };
        let mut result = Published { rows: n, dropped: 0 };
        if published < n {
            result = Published { rows: published, dropped: n - published };
            self.dropped_rows += result.dropped as u64;
            self.memory.store(word::DROPPED_ROWS, self.dropped_rows, Relaxed);
        }
        Ok(result)
    }

    /// State that a request has ended. If the event does not fit, it is published with the next call.
    ///
    /// # Errors
    /// An id longer than [`crate::layout::MAX_ID_BYTES`].
    pub fn finish(&mut self, end: &End) -> Result<()> {
        let event = encode_end(end)?;
        if self.pending.len() == MAX_PENDING_ENDS {
            self.pending.pop_front();
            self.lose_ends(1);
        }
        self.pending.push_back(event);
        self.deadline = None;
        self.publish_pending();
        Ok(())
    }

    /// Say that nothing more comes. Ends of requests that still do not fit are counted as lost.
    pub fn close(&mut self) {
        self.deadline = None;
        self.publish_pending();
        self.lose_ends(self.pending.len());
        self.pending.clear();
        // Pairs with the acquire in `Reader::ended`: whoever sees the end sees every record before it.
        self.memory.store(word::CLOSED, 1, Release);
    }

    fn lose_ends(&mut self, count: usize) {
        self.lost_ends += count as u64;
        self.memory.store(word::LOST_ENDS, self.lost_ends, Relaxed);
    }

    fn check(&self, rows: &Sections<'_>) -> Result<usize> {
        let n = rows.positions.len();
        let expect = |what: &str, found: usize, expected: usize| {
            if found == expected {
                Ok(())
            } else {
                Err(Error::invalid(format!("{found} {what}, and {n} rows need {expected}")))
            }
        };
        u32::try_from(n).map_err(|_| Error::invalid(format!("a step of {n} rows")))?;
        expect("bytes of expert ids", rows.experts.len(), n * self.facts().row_bytes())?;
        if let Some(token_ids) = rows.token_ids {
            expect("token ids", token_ids.len() / 4, n)?;
        }
        let weights = if self.facts().weights { n * self.facts().ids_per_row() } else { 0 };
        expect("router weights", rows.weights.map_or(0, |weights| weights.len() / 2), weights)?;
        if self.batch_rows as usize > n {
            return Err(Error::invalid(format!(
                "the batch's spans end at row {}, and the step has {n}",
                self.batch_rows
            )));
        }
        Ok(n)
    }

    /// Publish a step as one record; gives the rows published.
    fn publish_whole(
        &mut self,
        rows: &Sections<'_>,
        what: What,
        landing: Option<&mut (dyn Landing + '_)>,
    ) -> Result<usize> {
        let inline = self.batch_record.is_none_or(|record| self.is_old(record));
        let span_bytes = if inline { std::mem::take(&mut self.batch) } else { Vec::new() };
        let spans = inline.then_some(&span_bytes[..]);
        let published = self.publish_record(rows, what, spans, landing);
        if inline {
            self.batch = span_bytes;
            self.batch_record = published.as_ref().ok().copied().flatten();
        }
        Ok(if published?.is_some() { what.rows } else { 0 })
    }

    /// Publish a large step as several records, each with its own share of the spans; gives the rows published.
    fn publish_parts(
        &mut self,
        rows: &Sections<'_>,
        what: What,
        limit: usize,
        mut landing: Option<&mut (dyn Landing + '_)>,
    ) -> Result<usize> {
        let row_words = self.facts().section_words(what.sections, 64).div_ceil(64) + 1;
        let part = ((limit - self.batch.len() / 8) / row_words).max(1);
        let (row_bytes, row_ids) = (self.facts().row_bytes(), self.facts().ids_per_row());
        let mut published = 0;
        let mut spans = Vec::new();
        self.batch_record = None;
        for first in (0..what.rows).step_by(part) {
            let end = what.rows.min(first + part);
            encode_spans(&clip(&self.spans, first as u32, end as u32), &mut spans)?;
            let share = Sections {
                experts: rows.experts.slice(first * row_bytes..end * row_bytes),
                token_ids: rows.token_ids.map(|ids| ids.slice(first * 4..end * 4)),
                positions: &rows.positions[first..end],
                weights: rows.weights.map(|weights| weights.slice(first * row_ids * 2..end * row_ids * 2)),
            };
            let part = What { rows: end - first, ..what };
            let lent = landing.as_mut().map(|landing| &mut **landing as &mut dyn Landing);
            if self.publish_record(&share, part, Some(&spans), lent)?.is_some() {
                published += end - first;
            }
        }
        Ok(published)
    }

    /// Publish one record of rows; gives its index, or nothing if it was dropped.
    fn publish_record(
        &mut self,
        rows: &Sections<'_>,
        what: What,
        spans: Option<&[u8]>,
        mut landing: Option<&mut (dyn Landing + '_)>,
    ) -> Result<Option<u64>> {
        let words = self.facts().section_words(what.sections, what.rows) + spans.map_or(0, |bytes| bytes.len() / 8);
        let Some(Reservation { index, mut at, position }) = self.reserve(words) else {
            self.dropped_records += 1;
            self.memory.store(word::DROPPED_RECORDS, self.dropped_records, Relaxed);
            return Ok(None);
        };
        let mut put = |source: Source<'_>| {
            match (source, &mut landing) {
                (Source::Host(bytes), _) => self.memory.write_bytes(at, bytes),
                (Source::Device(address, len), Some(landing)) => landing.copy(at, address, len)?,
                (Source::Device(..), None) => unreachable!("only `publish_device` has such, and a landing"),
            }
            at += source.len().div_ceil(8);
            Ok::<_, Error>(())
        };
        if let Some(spans) = spans {
            put(Source::Host(spans))?;
        }
        put(rows.experts)?;
        if let Some(token_ids) = rows.token_ids {
            put(token_ids)?;
        }
        put(Source::Host(bytemuck::must_cast_slice(rows.positions)))?;
        if let Some(weights) = rows.weights {
            put(weights)?;
        }
        let batch = if spans.is_some() { index } else { self.batch_record.unwrap_or(index) };
        let rows_before = self.rows_before;
        self.rows_before += what.rows as u64;
        let described = Descriptor {
            kind: Kind::Step,
            sections: what.sections | if spans.is_some() { section::SPANS } else { 0 },
            rows: what.rows as u32,
            step: what.step,
            time_ns: what.time_ns,
            position,
            payload_words: words as u64,
            batch,
            rows_before,
        };
        match landing {
            None => self.commit(&described),
            Some(landing) => {
                let at = self.header.geometry.descriptor(index);
                described.store(&*self.memory, at);
                landing.publish(at + descriptor::SEQUENCE, index + 1)?;
            }
        }
        Ok(Some(index))
    }

    fn publish_pending(&mut self) {
        while let Some(event) = self.pending.pop_front() {
            let words = event.len() / 8;
            let Some(Reservation { index, at, position }) = self.reserve(words) else {
                self.pending.push_front(event);
                return;
            };
            self.memory.write_bytes(at, &event);
            self.commit(&Descriptor {
                kind: Kind::Event,
                sections: 0,
                rows: 0,
                step: self.steps,
                time_ns: now_ns(),
                position,
                payload_words: words as u64,
                batch: index,
                rows_before: self.rows_before,
            });
        }
    }

    /// Whether the record that holds the batch is so far back that steps should no longer lean on it: a reader that comes
    /// when it is gone does not know whose rows they are. A large batch is repeated less often.
    fn is_old(&self, record: u64) -> bool {
        let geometry = &self.header.geometry;
        let start = self.starts[(record % self.starts.len() as u64) as usize];
        let reach = (geometry.ring_words / BATCHES_PER_RING).max(self.batch.len()) as u64;
        record < self.tail
            || self.head - record >= (geometry.descriptors / BATCHES_PER_RING) as u64
            || self.position - start >= reach
    }

    /// Take the space of a record of `words` words, if there is room, or if it comes in time.
    fn reserve(&mut self, words: usize) -> Option<Reservation> {
        let ring = self.header.geometry.ring_words as u64;
        let in_lap = self.position % ring;
        // A payload is contiguous: what would run over the ring's end begins at its start.
        let position = if in_lap + words as u64 > ring { self.position - in_lap + ring } else { self.position };
        let end = position + words as u64;
        if !self.make_room(end) && !self.wait_for_room(end) {
            return None;
        }
        let index = self.head;
        self.head += 1;
        self.position = end;
        self.starts[(index % self.starts.len() as u64) as usize] = position;
        self.memory.store(word::HEAD, self.head, Release);
        Some(Reservation { index, at: self.header.geometry.ring(position), position })
    }

    /// Store the descriptor, and last the sequence number that makes the record visible. The record is the newest.
    fn commit(&mut self, what: &Descriptor) {
        let index = self.head - 1;
        let at = self.header.geometry.descriptor(index);
        what.store(&*self.memory, at);
        // Pairs with the acquire load of the same word in `Reader::poll`: payload and descriptor come before it.
        self.memory.store(at + descriptor::SEQUENCE, index + 1, Release);
    }

    /// Give away old records until the rings have room up to `end`; false if one is in the way that a lossless reader
    /// still needs, or that has not landed.
    fn make_room(&mut self, end: u64) -> bool {
        if self.has_room(end) {
            return true;
        }
        let (before, needed) = (self.tail, self.oldest_needed());
        while !self.has_room(end) && self.tail < needed && self.has_landed(self.tail) {
            self.tail += 1;
        }
        if self.tail > before {
            // Announced first, so that a lossless reader that comes just now is not overlooked. The fence pairs with the
            // one in `Reader::new`, which stands between the filling of an entry and the look at this word: either that
            // reader sees the announcement and begins behind it, or we see its entry here. The release store has the
            // head before it: a reader never sees a tail past the head (`Reader::oldest`).
            self.memory.store(word::NEXT_TAIL, self.tail, Release);
            self.memory.fence(SeqCst);
            self.tail = self.tail.min(self.oldest_needed()).max(before);
            // Relaxed: the fence above stands between the head and these.
            self.memory.store(word::NEXT_TAIL, self.tail, Relaxed);
            self.memory.store(word::TAIL, self.tail, Relaxed);
            // Readers must see that the records are gone before any word of them changes. This fence pairs with the acquire
            // fence in `Reader::still_there`: a reader that saw one of the words written below sees this tail.
            self.memory.fence(Release);
        }
        self.has_room(end)
    }

    /// Whether one more descriptor, and the ring up to `end`, hold no record that is not given away.
    fn has_room(&self, end: u64) -> bool {
        let (descriptors, ring) = (self.starts.len() as u64, self.header.geometry.ring_words as u64);
        let oldest = self.starts[(self.tail % descriptors) as usize];
        self.tail == self.head || (self.head - self.tail < descriptors && end - oldest <= ring)
    }

    fn has_landed(&self, index: u64) -> bool {
        let at = self.header.geometry.descriptor(index);
        self.memory.load(at + descriptor::SEQUENCE, Acquire) == index + 1
    }

    /// The oldest record that a lossless reader still needs.
    fn oldest_needed(&self) -> u64 {
        let high = (self.memory.load(word::READER_HIGH, Acquire) as usize).min(crate::layout::READERS);
        let mut needed = u64::MAX;
        for at in (0..high).map(reader_entry) {
            let owner = self.memory.load(at + entry::OWNER, Acquire);
            let reads = owner != 0 && owner & entry::CLAIMED == 0;
            if reads && self.memory.load(at + entry::LOSSLESS, Relaxed) == 1 {
                // Pairs with the release in `Reader::release`: what the reader read, it read before we overwrite it.
                needed = needed.min(self.memory.load(at + entry::CURSOR, Acquire));
            }
        }
        needed
    }

    #[cold]
    fn wait_for_room(&mut self, end: u64) -> bool {
        let OnFull::Wait(timeout) = self.on_full else {
            return false;
        };
        let deadline = *self.deadline.get_or_insert_with(|| after(timeout));
        while Instant::now() < deadline {
            std::thread::sleep(WAIT_PERIOD);
            if self.make_room(end) {
                return true;
            }
        }
        false
    }
}

/// The parts of `spans` within rows `first..end`, counted from `first`.
fn clip(spans: &[Span], first: u32, end: u32) -> Vec<Span> {
    let within = |span: &Span| {
        let (from, to) = (span.first_row.max(first), (span.first_row + span.rows).min(end));
        (from < to).then(|| Span { first_row: from - first, rows: to - from, ..span.clone() })
    };
    spans.iter().filter_map(within).collect()
}

/// The instant that long from now; one beyond the clock's range is as good as never.
pub(crate) fn after(timeout: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
    Instant::now() + timeout.min(CENTURY)
}

/// Nanoseconds since the Unix epoch.
pub(crate) fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos() as u64)
}
