//! The reading end: takes records in order, and notices every one that it lost.

use crate::batch::{End, Span, decode_end, decode_spans};
use crate::cuda::Way;
use crate::error::{Error, Result};
use crate::layout::{
    Descriptor, FAILURE_WORDS, Facts, Header, Kind, Producer, READERS, descriptor, entry, load_text, reader_entry,
    section, word,
};
use crate::memory::Memory;
use crate::rejected;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

/// Whether a reader holds back the writer's reuse of space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The writer keeps what this reader has not released: it drops new records, or waits.
    Lossless,
    /// The writer goes on; the reader counts what it lost.
    Lossy,
}

/// A record, copied out of the arena and checked.
#[derive(Debug)]
pub enum Record<'a> {
    /// Rows of a forward.
    Step(Step<'a>),
    /// The end of a request.
    End(End),
    /// Beginnings of requests that the engine has in its cache.
    Prefix(CachedPrefix<'a>),
}

/// Beginnings of requests that the engine has in its cache, and does not compute again.
#[derive(Debug)]
pub struct CachedPrefix<'a> {
    /// Whose: row `i` of a span is position `i` of its request.
    pub spans: Vec<Span>,
    /// Where they stand in the engine's cache [n].
    pub kv_slots: &'a [u32],
    /// As in [`Step`].
    pub after_gap: bool,
}

/// Rows of a forward, or of a part of it.
#[derive(Debug)]
pub struct Step<'a> {
    /// Which forward.
    pub step: u64,
    /// When it was published: nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// The number of rows, n.
    pub rows: usize,
    /// Expert ids [n, L, K], u8 or u16 in native byte order; each below E.
    pub experts: &'a [u8],
    /// Token ids [n].
    pub token_ids: Option<&'a [u32]>,
    /// Positions in the request [n].
    pub positions: &'a [u32],
    /// Where in the engine's cache each row's token stands [n].
    pub kv_slots: Option<&'a [u32]>,
    /// Where rows that are none went: whatever stood there before no longer does.
    pub emptied: &'a [u32],
    /// Router weights f16 [n, L, K].
    pub weights: Option<&'a [u16]>,
    /// The batch that the rows belong to; its identity stays the same until the batch changes. None: the record that
    /// held it was gone before this reader came.
    pub batch: Option<&'a Arc<[Span]>>,
    /// Whether rows may have been written into the engine's cache since the last record read that no record tells of:
    /// records were lost, dropped or void. What was known of the cache is no longer sure then.
    pub after_gap: bool,
}

/// A reader of one arena.
pub struct Reader<M: Memory> {
    memory: Arc<M>,
    header: Header,
    entry: usize,
    owner: Producer,
    mode: Mode,
    cursor: u64,
    started: bool,
    /// The arena's hot words contradicted themselves: nothing more is read.
    broken: bool,
    rows_seen: u64,
    lost_records: u64,
    lost_rows: u64,
    /// Records dropped before the last one read, modulo 2^32.
    dropped_before: u32,
    after_gap: bool,
    time_ns: u64,
    /// Ring position after the last record read, and after the last one released.
    position: u64,
    released: u64,
    /// The oldest record that is not released.
    needed: u64,
    batch: Option<(u64, Arc<[Span]>)>,
    /// The same over the last step's rows, if some of its rows are none.
    accepted: Option<Arc<[Span]>>,
    /// KV slots of the last step's rows that are none.
    emptied: Vec<u32>,
    payload: Vec<u64>,
}

/// How often a lapped reader tries again before it lets its caller breathe.
const MAX_LAPS: usize = 16;
/// How many records of nothing are passed over before the caller breathes.
const MAX_VOIDS: usize = 16;
/// More records than any writer lives to publish.
const MAX_RECORDS: u64 = 1 << 62;

impl<M: Memory> Reader<M> {
    /// Take a reader entry and begin at the oldest record that is still there.
    pub(crate) fn new(memory: Arc<M>, header: Header, mode: Mode, owner: Producer) -> Result<Self> {
        let pid = u64::from(owner.pid);
        let entry = (0..READERS)
            .find(|&i| memory.compare_exchange(reader_entry(i) + entry::OWNER, 0, entry::CLAIMED | pid))
            .ok_or(Error::ReadersFull { count: READERS })?;
        let at = reader_entry(entry);
        let oldest = memory.load(word::TAIL, Acquire);
        memory.store(at + entry::START_TIME, owner.start_time, Relaxed);
        memory.store(at + entry::CURSOR, oldest, Relaxed);
        memory.store(at + entry::LOSSLESS, u64::from(mode == Mode::Lossless), Relaxed);
        // Pairs with the acquire load in `Writer::oldest_needed`: an owned entry is a filled one.
        memory.store(at + entry::OWNER, pid, Release);
        loop {
            let high = memory.load(word::READER_HIGH, Acquire);
            if high > entry as u64 || memory.compare_exchange(word::READER_HIGH, high, entry as u64 + 1) {
                break;
            }
        }
        // Pairs with the first fence in `Writer::make_room`: a writer that gives records away just now sees the entry, or
        // we see what it announced, and begin behind that.
        memory.fence(SeqCst);
        let mut reader = Self {
            memory,
            header,
            entry,
            owner,
            mode,
            cursor: 0,
            started: false,
            broken: false,
            rows_seen: 0,
            lost_records: 0,
            lost_rows: 0,
            dropped_before: 0,
            after_gap: false,
            time_ns: 0,
            position: 0,
            released: 0,
            needed: 0,
            batch: None,
            accepted: None,
            emptied: Vec::new(),
            payload: Vec::new(),
        };
        reader.cursor = reader.oldest(word::TAIL)?.max(reader.oldest(word::NEXT_TAIL)?);
        reader.release(reader.cursor);
        Ok(reader)
    }

    /// What the arena says of the model.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.header.facts
    }

    /// The arena's header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Index of the next record to be read.
    #[must_use]
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Index that the writer's next record will get.
    #[must_use]
    pub fn head(&self) -> u64 {
        self.memory.load(word::HEAD, Acquire)
    }

    /// Index of the oldest record that is still there.
    #[must_use]
    pub fn tail(&self) -> u64 {
        self.memory.load(word::TAIL, Acquire)
    }

    /// Records that were overwritten before this reader came to them.
    #[must_use]
    pub fn lost_records(&self) -> u64 {
        self.lost_records
    }

    /// Rows in [`Reader::lost_records`], as far as a later record told.
    #[must_use]
    pub fn lost_rows(&self) -> u64 {
        self.lost_rows
    }

    /// Rows that the writer has dropped since the arena was made.
    #[must_use]
    pub fn dropped_rows(&self) -> u64 {
        self.memory.load(word::DROPPED_ROWS, Relaxed)
    }

    /// Records of rows that the writer has dropped since the arena was made.
    #[must_use]
    pub fn dropped_records(&self) -> u64 {
        self.memory.load(word::DROPPED_RECORDS, Relaxed)
    }

    /// Ends of requests that the writer has given up for want of room.
    #[must_use]
    pub fn lost_ends(&self) -> u64 {
        self.memory.load(word::LOST_ENDS, Relaxed)
    }

    /// Forwards that the writer has seen, dropped ones included.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.memory.load(word::STEPS, Relaxed)
    }

    /// When the last record read was published: nanoseconds since the Unix epoch, or 0.
    #[must_use]
    pub fn time_ns(&self) -> u64 {
        self.time_ns
    }

    /// Whether nothing more comes: the writer has ended in good order, or the arena contradicts itself.
    #[must_use]
    pub fn ended(&self) -> bool {
        // Pairs with the release in `Writer::close`.
        self.broken || self.memory.load(word::CLOSED, Acquire) != 0
    }

    /// Whether [`Reader::poll`] has something to give now.
    #[must_use]
    pub fn has_next(&self) -> bool {
        !self.broken && (self.is_published(self.cursor) || self.tail() > self.cursor)
    }

    /// When the next record to be read was published, if it was: nanoseconds since the Unix epoch.
    #[must_use]
    pub fn next_time_ns(&self) -> Option<u64> {
        let at = self.header.geometry.descriptor(self.cursor);
        self.is_published(self.cursor).then(|| self.memory.load(at + descriptor::TIME, Relaxed))
    }

    /// Go on at record `index`, read or not; before the oldest one that is there, and that a lossless reader has not
    /// released, at that; past the newest, behind it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the arena contradicts itself; nothing more is read.
    pub fn seek(&mut self, index: u64) -> Result<()> {
        let held = if self.mode == Mode::Lossless { self.needed } else { 0 };
        let tail = self.tail();
        let head = self.checked_head(tail)?;
        let oldest = tail.max(held);
        self.cursor = index.clamp(oldest, head.max(oldest));
        self.started = false;
        self.after_gap = true;
        self.batch = None;
        self.release(self.cursor);
        Ok(())
    }

    /// Let the writer reuse the space of every record before `index`; of what was not read, nothing is released.
    pub fn release(&mut self, index: u64) {
        let index = index.min(self.cursor);
        // Pairs with the acquire load in `Writer::oldest_needed`.
        self.memory.store(reader_entry(self.entry) + entry::CURSOR, index, Release);
        if index == self.cursor {
            self.released = self.position;
        } else if index > self.needed {
            let at = self.header.geometry.descriptor(index);
            self.released = self.memory.load(at + descriptor::POSITION, Relaxed).clamp(self.released, self.position);
        }
        self.needed = index;
    }

    /// How much of the arena this reader has read and not released, of its bytes or of its descriptors: 0 to 1.
    #[must_use]
    pub fn held_share(&self) -> f64 {
        let geometry = &self.header.geometry;
        let words = (self.position - self.released) as f64 / geometry.ring_words as f64;
        let records = (self.cursor - self.needed) as f64 / geometry.descriptors as f64;
        words.max(records)
    }

    /// Read the next record, if it is published. Its space stays held until [`Reader::release`].
    ///
    /// # Errors
    /// [`Error::Corrupt`] if the arena contradicts itself; the record is passed over.
    pub fn poll(&mut self) -> Result<Option<Record<'_>>> {
        let mut next = self.take()?;
        for _ in 0..MAX_VOIDS {
            match next {
                Some(what) if what.kind == Kind::Void => next = self.take()?,
                _ => break,
            }
        }
        let Some(what) = next else {
            return Ok(None);
        };
        self.time_ns = what.time_ns;
        // Told with the next rows or prefix that can be read; one that contradicts itself is a gap of its own.
        let after_gap = std::mem::replace(&mut self.after_gap, true);
        match what.kind {
            Kind::Event => {
                self.after_gap = after_gap;
                let payload = bytemuck::must_cast_slice(&self.payload);
                Ok(Some(Record::End(decode_end(payload)?)))
            }
            Kind::Void => Ok(None),
            Kind::Prefix => {
                let payload = bytemuck::must_cast_slice::<u64, u8>(&self.payload);
                let (spans, length) = decode_spans(payload, what.rows)?;
                let kv_slots = payload.get(length..length + what.rows as usize * 4);
                let kv_slots = kv_slots.ok_or_else(|| Error::corrupt("sections longer than their record"))?;
                let kv_slots = bytemuck::cast_slice(kv_slots);
                check_slots(kv_slots, &self.header.facts)?;
                self.after_gap = false;
                Ok(Some(Record::Prefix(CachedPrefix { spans, kv_slots, after_gap })))
            }
            Kind::Step => {
                let mut at = 0;
                if what.sections & section::SPANS != 0 {
                    let payload = bytemuck::must_cast_slice(&self.payload);
                    let (spans, length) = decode_spans(payload, what.rows)?;
                    self.batch = Some((self.cursor - 1, spans.into()));
                    at = length;
                } else if self.batch.as_ref().is_none_or(|(record, _)| *record != what.batch) {
                    self.batch = self.fetch_batch(what.batch).map(|spans| (what.batch, spans.into()));
                }
                let what = self.without_rejected(what, at);
                let payload = bytemuck::must_cast_slice::<u64, u8>(&self.payload);
                let batch = self.accepted.as_ref().or(self.batch.as_ref().map(|(_, spans)| spans));
                let step = Step::decode(&self.header.facts, &what, &payload[at..], batch, after_gap)?;
                self.after_gap = false;
                Ok(Some(Record::Step(Step { emptied: &self.emptied, ..step })))
            }
        }
    }

    /// Take the rows that are none out of a step, whose sections begin at byte `at` of the payload.
    fn without_rejected(&mut self, what: Descriptor, at: usize) -> Descriptor {
        self.accepted = None;
        self.emptied.clear();
        let (facts, rows) = (&self.header.facts, what.rows as usize);
        let payload = &mut bytemuck::must_cast_slice_mut::<u64, u8>(&mut self.payload)[at..];
        let Some(runs) = rejected::accepted(facts, what.sections, rows, payload) else {
            return what;
        };
        self.emptied.extend(rejected::slots(facts, what.sections, rows, payload));
        rejected::keep(facts, what.sections, rows, payload, &runs);
        self.accepted = self.batch.as_ref().map(|(_, spans)| rejected::spans_of(spans, &runs).into());
        Descriptor { rows: runs.iter().map(|run| run.len() as u32).sum(), ..what }
    }

    /// Copy the next record's payload out and move past it; lapped, go on at the oldest record that is still there.
    fn take(&mut self) -> Result<Option<Descriptor>> {
        let mut lapped = false;
        for _ in 0..MAX_LAPS {
            if self.broken {
                return Ok(None);
            }
            let oldest = self.oldest(word::TAIL)?;
            if self.cursor < oldest {
                lapped = true;
                if self.started {
                    self.lost_records = self.lost_records.saturating_add(oldest - self.cursor);
                }
                self.cursor = oldest;
                self.needed = self.needed.max(oldest);
            }
            let mut payload = std::mem::take(&mut self.payload);
            let read = self.read(self.cursor, &mut payload);
            self.payload = payload;
            match read {
                Read::NotYet => return Ok(None),
                Read::Gone => {}
                Read::There(what) => {
                    self.cursor += 1;
                    // A record that contradicts itself may have told of rows, too.
                    let what = what.inspect_err(|_| self.after_gap = true)?;
                    let end = what.position.saturating_add(what.payload_words);
                    if !self.started {
                        self.released = what.position;
                    }
                    self.position = end.max(self.released);
                    self.after_gap |= lapped || what.kind == Kind::Void;
                    self.after_gap |= self.started && what.dropped_before != self.dropped_before;
                    self.dropped_before = what.dropped_before;
                    if self.started {
                        let lost = what.rows_before.saturating_sub(self.rows_seen);
                        self.lost_rows = self.lost_rows.saturating_add(lost);
                    }
                    self.started = true;
                    self.rows_seen = what.rows_before.saturating_add(u64::from(what.rows));
                    return Ok(Some(what));
                }
            }
        }
        Ok(None)
    }

    /// The oldest record that is still there, or is about to be: what either word says, checked.
    fn oldest(&mut self, tail: usize) -> Result<u64> {
        let oldest = self.memory.load(tail, Acquire);
        if oldest > self.cursor {
            self.checked_head(oldest)?;
        }
        Ok(oldest)
    }

    /// The head, if it can be one of an arena whose oldest record is `oldest`, read before.
    fn checked_head(&mut self, oldest: u64) -> Result<u64> {
        // The acquire load of the oldest pairs with the release store and the fence in `Writer::make_room`: the head is
        // not older.
        let head = self.head();
        if oldest > head || head > MAX_RECORDS {
            self.broken = true;
            return Err(Error::corrupt(format!("the oldest record is {oldest} of {head}")));
        }
        Ok(head)
    }

    fn is_published(&self, index: u64) -> bool {
        let at = self.header.geometry.descriptor(index);
        // Pairs with the release store in `Writer::commit`, or with the GPU's system-scope release.
        self.memory.load(at + descriptor::SEQUENCE, Acquire) == index.wrapping_add(1)
    }

    /// Copy one record out, if it is there and stays there meanwhile.
    fn read(&self, index: u64, payload: &mut Vec<u64>) -> Read {
        let geometry = &self.header.geometry;
        let at = geometry.descriptor(index);
        if !self.is_published(index) {
            return if self.still_there(index) { Read::NotYet } else { Read::Gone };
        }
        let mut words = [0; descriptor::WORDS];
        self.memory.read_words(at, &mut words);
        if !self.still_there(index) {
            return Read::Gone;
        }
        let what = match Descriptor::decode(&words, index).and_then(|what| self.check(what)) {
            Ok(what) => what,
            Err(error) => return Read::There(Err(error)),
        };
        payload.resize(what.payload_words as usize, 0);
        self.memory.read_words(geometry.ring(what.position), payload);
        if self.still_there(index) { Read::There(Ok(what)) } else { Read::Gone }
    }

    /// Whether nothing read of record `index` so far can have been overwritten.
    fn still_there(&self, index: u64) -> bool {
        // Pairs with the last fence in `Writer::make_room`: had we seen a word written after it, we would see its tail.
        self.memory.fence(Acquire);
        self.memory.load(word::TAIL, Relaxed) <= index
    }

    /// Check a descriptor against the arena's geometry, so that no access leaves the ring.
    fn check(&self, what: Descriptor) -> Result<Descriptor> {
        let ring = self.header.geometry.ring_words as u64;
        let fits = what.payload_words <= ring && what.position % ring + what.payload_words <= ring;
        let needed = match what.kind {
            Kind::Step if what.sections & !section::ALL == 0 => {
                // Rows are bounded before they are multiplied: a row takes more than a byte of the ring.
                let rows = (u64::from(what.rows) <= ring * 8).then_some(what.rows as usize);
                rows.map(|rows| self.header.facts.section_words(what.sections, rows) as u64)
            }
            Kind::Step => None,
            Kind::Event => Some(2),
            Kind::Void => Some(0),
            Kind::Prefix if what.sections == section::SPANS | section::KV_SLOTS => {
                let rows = (u64::from(what.rows) <= ring * 8).then_some(what.rows as usize);
                rows.map(|rows| self.header.facts.section_words(section::KV_SLOTS, rows) as u64)
            }
            Kind::Prefix => None,
        };
        if fits && needed.is_some_and(|needed| needed <= what.payload_words) {
            Ok(what)
        } else {
            Err(Error::corrupt(format!(
                "record {} says {} rows in {} words at {}, in a ring of {ring} words",
                self.cursor, what.rows, what.payload_words, what.position
            )))
        }
    }

    /// The spans of an older record, if it is still there.
    fn fetch_batch(&self, index: u64) -> Option<Vec<Span>> {
        let mut payload = Vec::new();
        match self.read(index, &mut payload) {
            Read::There(Ok(what)) if what.kind == Kind::Step && what.sections & section::SPANS != 0 => {
                decode_spans(bytemuck::must_cast_slice(&payload), what.rows).ok().map(|(spans, _)| spans)
            }
            _ => None,
        }
    }

    /// How the publisher's devices publish; None if none has, or if the word for it says nothing that is known.
    #[must_use]
    pub fn way(&self) -> Option<Way> {
        Way::from_word(self.memory.load(word::WAY, Relaxed))
    }

    /// Why the capture has switched itself off; None while it has not.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        // Pairs with the release in `Writer::fail`.
        (self.memory.load(word::FAILED, Acquire) != 0)
            .then(|| load_text(&*self.memory, word::FAILURE, FAILURE_WORDS))
            .map(|text| text.unwrap_or_else(|error| format!("a reason that cannot be read: {error}")))
    }

    /// Whether this reader holds back the reuse of space.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }
}

impl<M: Memory> Drop for Reader<M> {
    /// Give the reader entry back.
    fn drop(&mut self) {
        // A forked child holds a copy of this value, and the entry is its parent's.
        if std::process::id() == self.owner.pid {
            let at = reader_entry(self.entry) + entry::OWNER;
            // Only if it is still ours: who took us for dead may have given it to another.
            self.memory.compare_exchange(at, u64::from(self.owner.pid), 0);
        }
    }
}

enum Read {
    There(Result<Descriptor>),
    NotYet,
    Gone,
}

impl<'a> Step<'a> {
    /// Cut a payload into its sections, and check what later code relies on: ids below E, spans within the rows.
    fn decode(
        facts: &Facts,
        what: &Descriptor,
        payload: &'a [u8],
        batch: Option<&'a Arc<[Span]>>,
        after_gap: bool,
    ) -> Result<Self> {
        let n = what.rows as usize;
        let mut rest = payload;
        let mut cut = |mask: u16, bytes: usize| -> Result<Option<&'a [u8]>> {
            if what.sections & mask == 0 {
                return Ok(None);
            }
            let section = rest.get(..bytes).ok_or_else(|| Error::corrupt("sections longer than their record"))?;
            rest = rest.get(bytes.next_multiple_of(8)..).unwrap_or(&[]);
            Ok(Some(section))
        };
        let missing = |name: &str| Error::corrupt(format!("a step of {n} rows without {name}"));
        let experts = cut(section::EXPERTS, n * facts.row_bytes())?.ok_or_else(|| missing("experts"))?;
        let token_ids = cut(section::TOKEN_IDS, n * 4)?;
        let positions = cut(section::POSITIONS, n * 4)?.ok_or_else(|| missing("positions"))?;
        let kv_slots = cut(section::KV_SLOTS, n * 4)?;
        let weights = cut(section::WEIGHTS, n * facts.ids_per_row() * 2)?;
        if weights.is_some() != facts.weights {
            return Err(Error::corrupt("router weights in a step, or in the header, but not in both"));
        }
        check_ids(experts, facts)?;
        let kv_slots = kv_slots.map(bytemuck::cast_slice);
        check_slots(kv_slots.unwrap_or(&[]), facts)?;
        if let Some(span) = batch.and_then(|spans| spans.last())
            && u64::from(span.first_row) + u64::from(span.rows) > n as u64
        {
            return Err(Error::corrupt(format!("a batch whose spans end past the {n} rows of the step")));
        }
        Ok(Self {
            step: what.step,
            time_ns: what.time_ns,
            rows: n,
            experts,
            token_ids: token_ids.map(bytemuck::cast_slice),
            positions: bytemuck::cast_slice(positions),
            kv_slots,
            emptied: &[],
            weights: weights.map(bytemuck::cast_slice),
            batch,
            after_gap,
        })
    }
}

fn check_slots(kv_slots: &[u32], facts: &Facts) -> Result<()> {
    match kv_slots.iter().max() {
        Some(&slot) if slot >= facts.kv_slots => {
            Err(Error::corrupt(format!("KV slot {slot} of an engine with {}", facts.kv_slots)))
        }
        _ => Ok(()),
    }
}

fn check_ids(experts: &[u8], facts: &Facts) -> Result<()> {
    let largest = if facts.id_bytes() == 1 {
        experts.iter().copied().max().map(u32::from)
    } else {
        bytemuck::cast_slice::<u8, u16>(experts).iter().copied().max().map(u32::from)
    };
    match largest {
        Some(id) if id >= facts.num_experts => {
            Err(Error::corrupt(format!("expert id {id} of a model with {} experts", facts.num_experts)))
        }
        _ => Ok(()),
    }
}
