//! The publishing end: reserves space, copies rows in, and publishes them by one store.

use crate::batch::{End, Span, encode_end, encode_spans};
use crate::error::{Error, Result};
use crate::layout::{
    Descriptor, FAILURE_WORDS, Facts, Header, Kind, descriptor, entry, reader_entry, section, store_text, what_word,
    word,
};
use crate::memory::Memory;
use crate::rows::{DeviceRows, GraphRows, Landing, Prefix, Rows, Sections, Source};
use std::collections::VecDeque;
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
            positions: Source::Host(bytemuck::must_cast_slice(rows.positions)),
            kv_slots: rows.kv_slots.map(|slots| Source::Host(bytemuck::must_cast_slice(slots))),
            weights: rows.weights.map(|weights| Source::Host(bytemuck::must_cast_slice(weights))),
        };
        self.publish_sections(rows.positions.len(), &sections, None)
    }

    /// Publish the rows of one forward that a device holds: they can be read once `landing` has brought them here.
    ///
    /// # Errors
    /// Lengths that do not agree: nothing is published then. And what `landing` says; the record is then never published,
    /// and neither is any behind it.
    pub(crate) fn publish_device(&mut self, rows: &DeviceRows<'_>, landing: &mut dyn Landing) -> Result<Published> {
        let n = rows.rows;
        let sections = Sections {
            experts: Source::Device(rows.experts, n * self.facts().row_bytes()),
            token_ids: rows.token_ids,
            positions: rows.positions,
            kv_slots: rows.kv_slots,
            weights: rows.weights.map(|address| Source::Device(address, n * self.facts().ids_per_row() * 2)),
        };
        self.publish_sections(n, &sections, Some(landing))
    }

    /// Take space for the rows that a graph is about to write, and have `landing` post where. Gives nothing to `landing` if
    /// there is no room, or if the step takes more than a quarter of the ring: then it is dropped.
    ///
    /// # Errors
    /// Lengths that do not agree: nothing is published then.
    pub(crate) fn publish_graph(&mut self, rows: &GraphRows<'_>, landing: &mut dyn Landing) -> Result<Published> {
        let n = rows.rows;
        let written = |bytes: usize| Source::Device(0, n * bytes);
        let sections = Sections {
            experts: written(self.facts().row_bytes()),
            token_ids: rows.token_ids.then(|| written(4)),
            positions: rows.positions.map_or(written(4), |host| Source::Host(bytemuck::must_cast_slice(host))),
            kv_slots: rows.kv_slots.then(|| written(4)),
            weights: self.facts().weights.then(|| written(self.facts().ids_per_row() * 2)),
        };
        self.publish_sections(n, &sections, Some(landing))
    }

    /// A forward whose rows are not published: they count as dropped, and readers know that there were some. Of none:
    /// nothing happens.
    pub fn drop_step(&mut self, rows: usize) -> Published {
        if rows == 0 {
            return Published { rows: 0, dropped: 0 }; // readers would take it for a gap, behind which no KV slot is sure
        }
        self.begin_step();
        self.count_dropped_record();
        self.count_dropped_rows(rows);
        Published { rows: 0, dropped: rows }
    }

    /// Make a record that was reserved, and whose forward has failed, one of nothing. Gives the word of its sequence number
    /// and what stands there until it is published, which is still to be done, behind whatever may yet write into the
    /// record; None if the forward ran after all and its space is given away. Its rows count as dropped.
    pub(crate) fn void(&mut self, index: u64) -> Option<(usize, u64)> {
        if index < self.tail || index >= self.head {
            return None;
        }
        let at = self.header.geometry.descriptor(index);
        let what = self.memory.load(at + descriptor::WHAT, Relaxed);
        let rows = (what >> 32) as u32;
        // One word: a reader that comes just now, because the forward ran after all, sees the step whole, or nothing of it.
        self.memory.store(at + descriptor::WHAT, what_word(Kind::Void, 0, rows), Relaxed);
        if self.batch_record == Some(index) {
            self.batch_record = None;
        }
        self.count_dropped_record();
        self.count_dropped_rows(rows as usize);
        // A descriptor keeps the number of the record that had it before.
        let before = (index + 1).saturating_sub(self.starts.len() as u64);
        Some((at + descriptor::SEQUENCE, before))
    }

    /// How many records were reserved and are not published yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        (self.tail..self.head).filter(|&index| !self.has_landed(index)).count()
    }

    fn publish_sections(
        &mut self,
        n: usize,
        rows: &Sections<'_>,
        landing: Option<&mut (dyn Landing + '_)>,
    ) -> Result<Published> {
        self.check(n, rows)?;
        let step = self.begin_step();
        let what = What { rows: n, sections: rows.mask(self.facts()), step, time_ns: now_ns() };
        let limit = self.header.geometry.ring_words / PARTS_PER_RING;
        let published = if self.batch.len() / 8 + self.facts().section_words(what.sections, n) <= limit {
            self.publish_whole(rows, what, landing)?
        } else if landing.as_ref().is_none_or(|landing| landing.takes_parts()) {
            self.publish_parts(rows, what, limit, landing)?
        } else {
            self.count_dropped_record();
            0
        };
        if published < n {
            self.count_dropped_rows(n - published);
        }
        Ok(Published { rows: published, dropped: n - published })
    }

    /// Count a forward, and publish the ends that waited for room; gives the forward's number.
    fn begin_step(&mut self) -> u64 {
        self.deadline = None;
        self.publish_pending();
        let step = self.steps;
        self.steps += 1;
        self.memory.store(word::STEPS, self.steps, Relaxed);
        step
    }

    fn count_dropped_record(&mut self) {
        self.dropped_records += 1;
        self.memory.store(word::DROPPED_RECORDS, self.dropped_records, Relaxed);
    }

    fn count_dropped_rows(&mut self, rows: usize) {
        self.dropped_rows += rows as u64;
        self.memory.store(word::DROPPED_ROWS, self.dropped_rows, Relaxed);
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

    /// Tell readers that the capture has switched itself off, and why: what fits of it. Nothing more is published.
    pub fn fail(&mut self, reason: &str) {
        store_text(&*self.memory, word::FAILURE, FAILURE_WORDS, reason);
        // Pairs with the acquire in `Reader::failure`: whoever sees the word sees the text.
        self.memory.store(word::FAILED, 1, Release);
    }

    fn lose_ends(&mut self, count: usize) {
        self.lost_ends += count as u64;
        self.memory.store(word::LOST_ENDS, self.lost_ends, Relaxed);
    }

    fn check(&self, n: usize, rows: &Sections<'_>) -> Result<()> {
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
        expect("positions", rows.positions.len() / 4, n)?;
        if let Some(kv_slots) = rows.kv_slots {
            expect("KV slots", kv_slots.len() / 4, n)?;
            self.check_has_slots()?;
        }
        let weights = if self.facts().weights { n * self.facts().ids_per_row() } else { 0 };
        expect("router weights", rows.weights.map_or(0, |weights| weights.len() / 2), weights)?;
        if self.batch_rows as usize > n {
            return Err(Error::invalid(format!(
                "the batch's spans end at row {}, and the step has {n}",
                self.batch_rows
            )));
        }
        Ok(())
    }

    fn check_has_slots(&self) -> Result<()> {
        match self.facts().kv_slots {
            0 => Err(Error::invalid("KV slots, and the arena was made for an engine without; state how many it has")),
            _ => Ok(()),
        }
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
        let mut published = 0;
        let mut spans = Vec::new();
        self.batch_record = None;
        for first in (0..what.rows).step_by(part) {
            let end = what.rows.min(first + part);
            encode_spans(&clip(&self.spans, first as u32, end as u32), &mut spans)?;
            let share = rows.part(self.facts(), first, end);
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
            self.count_dropped_record();
            return Ok(None);
        };
        for source in spans.map(Source::Host).into_iter().chain(rows.present(self.facts())) {
            at = self.put(at, source, &mut landing)?;
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
            dropped_before: self.dropped_records as u32,
        };
        self.commit_or_land(&described, landing)?;
        Ok(Some(index))
    }

    /// Publish where in the engine's cache the beginnings of requests stand, which are not computed again: readers that saw
    /// these slots filled know their rows. Before the step that goes on with them.
    ///
    /// # Errors
    /// Spans that overlap, or with ids longer than [`crate::layout::MAX_ID_BYTES`]; as many KV slots as the spans have rows
    /// are needed. Nothing is published then.
    pub fn publish_prefix(&mut self, prefix: &Prefix<'_>) -> Result<Published> {
        self.publish_prefix_by(prefix, None)
    }

    /// The same, with `landing` for KV slots that a device holds.
    pub(crate) fn publish_prefix_by(
        &mut self,
        prefix: &Prefix<'_>,
        mut landing: Option<&mut (dyn Landing + '_)>,
    ) -> Result<Published> {
        let n = prefix.spans.last().map_or(0, |span| (span.first_row + span.rows) as usize);
        let mut spans = Vec::new();
        encode_spans(prefix.spans, &mut spans)?;
        if prefix.kv_slots.len() != n * 4 {
            return Err(Error::invalid(format!("{} KV slots, and {n} rows need {n}", prefix.kv_slots.len() / 4)));
        }
        self.check_has_slots()?;
        self.deadline = None;
        self.publish_pending();
        let sections = section::SPANS | section::KV_SLOTS;
        let words = spans.len() / 8 + self.facts().section_words(sections, n);
        let fits = words <= self.header.geometry.ring_words / PARTS_PER_RING;
        let Some(Reservation { index, mut at, position }) = fits.then(|| self.reserve(words)).flatten() else {
            self.count_dropped_record();
            self.count_dropped_rows(n);
            return Ok(Published { rows: 0, dropped: n });
        };
        for source in [Source::Host(&spans), prefix.kv_slots] {
            at = self.put(at, source, &mut landing)?;
        }
        let described = Descriptor { sections, rows: n as u32, ..self.describe(Kind::Prefix, index, position, words) };
        self.commit_or_land(&described, landing)?;
        Ok(Published { rows: n, dropped: 0 })
    }

    /// Write a section at word `at`, or have it brought there; gives the word behind it.
    fn put(&self, at: usize, source: Source<'_>, landing: &mut Option<&mut (dyn Landing + '_)>) -> Result<usize> {
        match (source, landing) {
            (Source::Host(bytes), _) => self.memory.write_bytes(at, bytes),
            (Source::Device(address, len), Some(landing)) => landing.copy(at, address, len)?,
            (Source::Device(..), None) => unreachable!("who gives such gives a landing"),
        }
        Ok(at + source.len().div_ceil(8))
    }

    fn commit_or_land(&mut self, what: &Descriptor, landing: Option<&mut (dyn Landing + '_)>) -> Result<()> {
        let Some(landing) = landing else {
            self.commit(what);
            return Ok(());
        };
        let index = self.head - 1;
        let at = self.header.geometry.descriptor(index);
        what.store(&*self.memory, at, index);
        landing.publish(at + descriptor::SEQUENCE, index + 1)
    }

    /// A record that is no step, and goes with none: without sections.
    fn describe(&self, kind: Kind, index: u64, position: u64, words: usize) -> Descriptor {
        Descriptor {
            kind,
            sections: 0,
            rows: 0,
            step: self.steps,
            time_ns: now_ns(),
            position,
            payload_words: words as u64,
            batch: index,
            rows_before: self.rows_before,
            dropped_before: self.dropped_records as u32,
        }
    }

    fn publish_pending(&mut self) {
        while let Some(event) = self.pending.pop_front() {
            let words = event.len() / 8;
            let Some(Reservation { index, at, position }) = self.reserve(words) else {
                self.pending.push_front(event);
                return;
            };
            self.memory.write_bytes(at, &event);
            self.commit(&self.describe(Kind::Event, index, position, words));
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
        what.store(&*self.memory, at, index);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Producer;
    use crate::memory::Mapped;
    use crate::reader::{Mode, Reader, Record};

    const BYTES: usize = 1 << 16;

    /// Stands in for a device, which no machine of CI has: nothing comes before `land`.
    #[derive(Default)]
    struct Device {
        copies: Vec<(usize, usize)>,
        published: Vec<(usize, u64)>,
        in_graph: bool,
    }

    impl Landing for Device {
        fn copy(&mut self, at: usize, _: u64, len: usize) -> Result<()> {
            self.copies.push((at, len));
            Ok(())
        }

        fn publish(&mut self, at: usize, value: u64) -> Result<()> {
            self.published.push((at, value));
            Ok(())
        }

        fn takes_parts(&self) -> bool {
            !self.in_graph
        }
    }

    impl Device {
        fn land(&mut self, memory: &Mapped, experts: u8) {
            for (at, len) in self.copies.drain(..) {
                memory.write_bytes(at, &vec![experts; len]);
            }
            for (at, value) in self.published.drain(..) {
                memory.store(at, value, Release);
            }
        }
    }

    fn arena() -> (Arc<Mapped>, Writer<Mapped>, Reader<Mapped>) {
        let memory = Arc::new(Mapped::new(memmap2::MmapMut::map_anon(BYTES).unwrap().into()));
        let kv_slots = u32::MAX;
        let facts = Facts { layers: vec![0, 1, 2], num_experts: 200, top_k: 2, kv_slots, ..Facts::default() };
        let us = Producer { pid: std::process::id(), start_time: 1 };
        let header = Header::store(&*memory, &facts, us, 1).unwrap();
        let reader = Reader::new(Arc::clone(&memory), header.clone(), Mode::Lossless, us).unwrap();
        (Arc::clone(&memory), Writer::new(memory, header, OnFull::Drop), reader)
    }

    fn span(number: u64, rows: u32) -> Span {
        let phase = crate::batch::Phase::Decode;
        Span { number, request: format!("r{number}"), first_row: 0, rows, prompt_tokens: 0, phase }
    }

    fn rows(positions: Option<&[u32]>, rows: usize) -> GraphRows<'_> {
        GraphRows { rows, token_ids: true, positions, kv_slots: true }
    }

    #[test]
    fn a_record_of_a_forward_that_failed_is_passed_over_and_its_batch_is_stated_again() {
        let (memory, mut writer, mut reader) = arena();
        let mut device = Device { in_graph: true, ..Device::default() };
        writer.set_batch(vec![span(1, 2)]).unwrap();
        assert_eq!(writer.publish_graph(&rows(Some(&[4, 5]), 2), &mut device).unwrap().rows, 2);
        assert!(reader.poll().unwrap().is_none(), "nothing has landed");
        device.published.clear();
        let (at, before) = writer.void(0).unwrap();
        assert_eq!(before, 0);
        assert_eq!(writer.publish_graph(&rows(None, 2), &mut device).unwrap().rows, 2);
        device.land(&memory, 7);
        assert!(reader.poll().unwrap().is_none(), "the void record is still before it");
        memory.store(at, 1, Release);
        let Some(Record::Step(step)) = reader.poll().unwrap() else { panic!("a step") };
        assert_eq!((step.step, step.experts, step.positions), (1, &[7; 12][..], &[0x0707_0707; 2][..]));
        assert_eq!(step.kv_slots.unwrap(), step.token_ids.unwrap());
        assert_eq!(step.batch.unwrap()[0].request, "r1");
        assert_eq!((writer.dropped_rows(), writer.dropped_records(), reader.lost_rows()), (2, 1, 0));
        assert!(writer.void(1).is_some(), "a record that has come can be made void, too");
        assert!(writer.void(2).is_none(), "but not one that there is not");
    }

    #[test]
    fn a_descriptor_keeps_its_last_number_until_it_is_published_anew() {
        let (memory, mut writer, mut reader) = arena();
        let mut device = Device { in_graph: true, ..Device::default() };
        let laps = writer.starts.len() as u64;
        for _ in 0..laps + 5 {
            assert_eq!(writer.publish_graph(&rows(None, 1), &mut device).unwrap().rows, 1);
            device.land(&memory, 3);
            reader.poll().unwrap().unwrap();
            reader.release(reader.cursor());
        }
        writer.publish_graph(&rows(None, 1), &mut device).unwrap();
        let (at, before) = writer.void(laps + 5).unwrap();
        assert_eq!(memory.load(at, Acquire), before);
        assert_eq!(before, 6);
        assert!(writer.void(4).is_none(), "its space is given away");
    }

    #[test]
    fn positions_that_the_host_knows_are_its_to_write() {
        let (memory, mut writer, mut reader) = arena();
        let mut device = Device::default();
        writer.publish_graph(&rows(Some(&[40, 50]), 2), &mut device).unwrap();
        assert_eq!(device.copies.iter().map(|(_, len)| *len).collect::<Vec<_>>(), [12, 8, 8]);
        device.land(&memory, 9);
        let Some(Record::Step(step)) = reader.poll().unwrap() else { panic!("a step") };
        assert_eq!((step.positions, step.token_ids.unwrap()), (&[40, 50][..], &[0x0909_0909; 2][..]));
        assert!(writer.publish_graph(&rows(Some(&[1]), 2), &mut device).is_err());
    }

    #[test]
    fn a_step_of_a_graph_is_one_record_or_none() {
        let (memory, mut writer, mut reader) = arena();
        let mut device = Device { in_graph: true, ..Device::default() };
        assert_eq!(writer.publish_graph(&rows(None, 1000), &mut device).unwrap().dropped, 1000);
        assert!(device.copies.is_empty() && device.published.is_empty());
        assert_eq!(writer.drop_step(3).dropped, 3);
        assert_eq!((writer.steps(), writer.dropped_rows(), writer.dropped_records()), (2, 1003, 2));
        assert_eq!(writer.publish_graph(&rows(None, 1), &mut device).unwrap().rows, 1);
        device.land(&memory, 1);
        assert!(matches!(reader.poll().unwrap(), Some(Record::Step(step)) if step.step == 2));
    }
}
