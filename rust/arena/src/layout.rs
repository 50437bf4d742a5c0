//! Where everything stands in an arena.
//!
//! ```text
//! word 0      header: magic, version, geometry, model facts     (written once, before the version)
//!             magic, version, process and creation stand at the same words in every layout
//! word 256    hot words: head, tail, counters                   (each in its own cache line)
//! word 512    reader table: READERS entries of 8 words
//! ...         descriptor ring: one cache line a record
//! ...         byte ring: each record's payload, contiguous
//! ```

use crate::error::{Error, Result};
use crate::memory::Memory;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Version of everything below. Another number means that neither side can read the other.
pub const LAYOUT_VERSION: u64 = 3;
/// The first word of every arena ("explens" and a line end, so that a text-mode copy shows).
pub const MAGIC: u64 = u64::from_le_bytes(*b"explens\n");

/// Largest number of routed layers.
pub const MAX_LAYERS: usize = 512;
/// Most pipeline stages.
pub const MAX_STAGES: usize = 32;
/// Largest number of experts of a layer: ids are u16.
pub const MAX_EXPERTS: usize = 65_536;
/// Longest request id in bytes.
pub const MAX_ID_BYTES: usize = 255;
/// Room for the reason why a capture switched itself off.
pub(crate) const FAILURE_WORDS: usize = 32;
/// Position of a row that is none: a token that was drafted, went through the forward, and was rejected; or one whose
/// experts nobody saw.
pub const NO_POSITION: u32 = u32::MAX;
/// Reader entries of an arena.
pub const READERS: usize = 64;

pub(crate) mod word {
    //! Indices of the header's words.
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 1;
    pub const WORDS: usize = 2;
    pub const DESCRIPTORS: usize = 3;
    pub const LAYERS: usize = 4;
    pub const EXPERTS: usize = 5;
    pub const TOP_K: usize = 6;
    pub const WEIGHTS: usize = 7;
    pub const RANK: usize = 8;
    pub const PID: usize = 9;
    pub const START_TIME: usize = 10;
    pub const CREATED: usize = 11;
    pub const KV_SLOTS: usize = 12;
    pub const OTHER_STAGES: usize = 13;
    pub const ENGINE: usize = 16;
    pub const ENGINE_VERSION: usize = 24;
    pub const MODEL: usize = 32;
    pub const LAYER_INDICES: usize = 64;
    /// Index of the next record to be reserved.
    pub const HEAD: usize = 256;
    /// Index of the oldest record whose space is not given away.
    pub const TAIL: usize = 264;
    /// What the tail is about to become: stored before the writer looks at the readers' entries.
    pub const NEXT_TAIL: usize = 265;
    pub const DROPPED_RECORDS: usize = 272;
    pub const DROPPED_ROWS: usize = 273;
    pub const LOST_ENDS: usize = 274;
    pub const STEPS: usize = 275;
    /// Non-zero: the writer has ended in good order.
    pub const CLOSED: usize = 276;
    /// How devices publish, as of the last record; 0: none does.
    pub const WAY: usize = 277;
    /// Non-zero: the capture has switched itself off, and the text at [`FAILURE`] says why.
    pub const FAILED: usize = 278;
    /// Text, see [`super::FAILURE_WORDS`].
    pub const FAILURE: usize = 320;
    /// One more than the highest reader entry ever taken.
    pub const READER_HIGH: usize = 280;
    pub const READER_TABLE: usize = 512;
}

pub(crate) mod entry {
    //! Words of a reader entry.
    pub const WORDS: usize = 8;
    /// The reader's process id; 0: free; with [`CLAIMED`] added: being filled by that process.
    pub const OWNER: usize = 0;
    pub const START_TIME: usize = 1;
    /// The oldest record that the reader still needs.
    pub const CURSOR: usize = 2;
    /// 1: holds back the reuse of space.
    pub const LOSSLESS: usize = 3;
    pub const CLAIMED: u64 = 1 << 63;
}

pub(crate) mod descriptor {
    //! Words of a descriptor.
    pub const WORDS: usize = 8;
    /// Record index + 1 once the record is published; stored last.
    pub const SEQUENCE: usize = 0;
    /// Kind, sections and rows: see [`super::Descriptor`].
    pub const WHAT: usize = 1;
    pub const STEP: usize = 2;
    pub const TIME: usize = 3;
    /// Position of the payload in words since the arena began.
    pub const POSITION: usize = 4;
    pub const PAYLOAD_WORDS: usize = 5;
    /// How many records back the spans are, and above that the records dropped so far: see [`super::Descriptor`].
    pub const BATCH: usize = 6;
    /// Rows of all records before this one.
    pub const ROWS_BEFORE: usize = 7;
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Rows of one forward, or of a part of it.
    Step = 1,
    /// The end of a request.
    Event = 2,
    /// Nothing: space of a step whose forward failed after the space was taken.
    Void = 3,
    /// Where in the engine's cache the beginnings of requests stand, which are not computed again.
    Prefix = 4,
}

/// Sections of a step's payload, in this order; each begins on a word.
pub mod section {
    /// The batch: whose rows these and later steps' are.
    pub const SPANS: u16 = 1;
    /// Expert ids [n, L, K].
    pub const EXPERTS: u16 = 2;
    /// Token ids u32 [n].
    pub const TOKEN_IDS: u16 = 4;
    /// Positions u32 [n].
    pub const POSITIONS: u16 = 8;
    /// KV slots u32 [n]: where in the engine's cache each row's token stands.
    pub const KV_SLOTS: u16 = 16;
    /// Router weights f16 [n, L, K].
    pub const WEIGHTS: u16 = 32;
    /// All of them.
    pub const ALL: u16 = 63;
}

/// The word of a descriptor that says what the record is.
pub(crate) fn what_word(kind: Kind, sections: u16, rows: u32) -> u64 {
    u64::from(rows) << 32 | u64::from(sections) << 16 | kind as u64
}

/// A record's descriptor, as read.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    /// What the record is.
    pub kind: Kind,
    /// Which sections its payload holds.
    pub sections: u16,
    /// Rows in it.
    pub rows: u32,
    /// The forward it came from, counted by the writer.
    pub step: u64,
    /// When it was reserved: nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Position of the payload in words since the arena began.
    pub position: u64,
    /// Length of the payload in words.
    pub payload_words: u64,
    /// Index of the record that holds the spans (its own index: it does).
    pub batch: u64,
    /// Rows in all records before this one.
    pub rows_before: u64,
    /// Records of rows that were dropped before this one, modulo 2^32.
    pub dropped_before: u32,
}

impl Descriptor {
    /// Store the descriptor of record `index`, but for its sequence number.
    pub(crate) fn store(&self, memory: &impl Memory, at: usize, index: u64) {
        memory.store(at + descriptor::WHAT, what_word(self.kind, self.sections, self.rows), Relaxed);
        memory.store(at + descriptor::STEP, self.step, Relaxed);
        memory.store(at + descriptor::TIME, self.time_ns, Relaxed);
        memory.store(at + descriptor::POSITION, self.position, Relaxed);
        memory.store(at + descriptor::PAYLOAD_WORDS, self.payload_words, Relaxed);
        let back = u64::from(self.dropped_before) << 32 | (index - self.batch);
        memory.store(at + descriptor::BATCH, back, Relaxed);
        memory.store(at + descriptor::ROWS_BEFORE, self.rows_before, Relaxed);
    }

    /// Decode the words of the descriptor of record `index`; what they say is not yet checked against the arena.
    pub(crate) fn decode(words: &[u64; descriptor::WORDS], index: u64) -> Result<Self> {
        let what = words[descriptor::WHAT];
        let kind = match what & 0xffff {
            1 => Kind::Step,
            2 => Kind::Event,
            3 => Kind::Void,
            4 => Kind::Prefix,
            other => return Err(Error::corrupt(format!("a record of unknown kind {other}"))),
        };
        Ok(Self {
            kind,
            sections: (what >> 16) as u16,
            rows: (what >> 32) as u32,
            step: words[descriptor::STEP],
            time_ns: words[descriptor::TIME],
            position: words[descriptor::POSITION],
            payload_words: words[descriptor::PAYLOAD_WORDS],
            batch: index
                .checked_sub(words[descriptor::BATCH] & 0xffff_ffff)
                .ok_or_else(|| Error::corrupt(format!("record {index} with a batch before the first record")))?,
            rows_before: words[descriptor::ROWS_BEFORE],
            dropped_before: (words[descriptor::BATCH] >> 32) as u32,
        })
    }
}

/// What the arena says of the model and of its publisher.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The model's own indices of its routed layers, in order; L of them.
    pub layers: Vec<u16>,
    /// Experts of a layer (E).
    pub num_experts: u32,
    /// Experts chosen for a token (K).
    pub top_k: u32,
    /// Whether router weights are published.
    pub weights: bool,
    /// KV slots of the engine's cache; 0 where rows do not tell theirs.
    pub kv_slots: u32,
    /// Which of the capture's publishers this is.
    pub rank: u32,
    /// How many pipeline stages there are beside this one, each with routed layers of its own, published by itself.
    pub other_stages: u32,
    /// The engine's name.
    pub engine: String,
    /// The engine's version.
    pub engine_version: String,
    /// The model's name.
    pub model: String,
}

impl Facts {
    /// Bytes of one expert id: 1 if every id fits, else 2.
    #[must_use]
    pub fn id_bytes(&self) -> usize {
        if self.num_experts <= 256 { 1 } else { 2 }
    }

    /// Expert ids in a row: L · K.
    #[must_use]
    pub fn ids_per_row(&self) -> usize {
        self.layers.len() * self.top_k as usize
    }

    /// Bytes of a row's expert ids.
    #[must_use]
    pub fn row_bytes(&self) -> usize {
        self.ids_per_row() * self.id_bytes()
    }

    fn check(&self) -> std::result::Result<(), String> {
        let (l, e, k) = (self.layers.len(), self.num_experts as usize, self.top_k as usize);
        if l == 0 || l > MAX_LAYERS {
            return Err(format!("{l} routed layers, and an arena holds 1 to {MAX_LAYERS}"));
        }
        if e == 0 || e > MAX_EXPERTS {
            return Err(format!("{e} experts, and an arena holds 1 to {MAX_EXPERTS}"));
        }
        if self.other_stages as usize >= MAX_STAGES {
            return Err(format!(
                "{} other pipeline stages, and there are at most {}",
                self.other_stages,
                MAX_STAGES - 1
            ));
        }
        if k == 0 || k > e {
            return Err(format!("top-k is {k}, and must be 1 to the number of experts, {e}"));
        }
        Ok(())
    }

    /// Words that the sections of `rows` rows take; the spans, if any, come on top.
    pub(crate) fn section_words(&self, sections: u16, rows: usize) -> usize {
        let mut words = 0;
        let mut add = |mask, bytes: usize| {
            if sections & mask != 0 {
                words += bytes.div_ceil(8);
            }
        };
        add(section::EXPERTS, rows * self.row_bytes());
        add(section::TOKEN_IDS, rows * 4);
        add(section::POSITIONS, rows * 4);
        add(section::KV_SLOTS, rows * 4);
        add(section::WEIGHTS, rows * self.ids_per_row() * 2);
        words
    }
}

/// Sizes of the two rings, in records and words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub descriptors: usize,
    pub ring_at: usize,
    pub ring_words: usize,
}

const DESCRIPTORS_AT: usize = word::READER_TABLE + READERS * entry::WORDS;
/// The smallest arena: both rings hold a few records.
pub const MIN_ARENA_BYTES: usize = 64 * 1024;
/// The ring holds at least so many rows, so that a part of a step holds at least one beside its spans.
const ROWS_PER_RING: usize = 8;

impl Geometry {
    /// Divide an arena of `words` words between the rings.
    pub(crate) fn of(words: usize, facts: &Facts) -> Self {
        // A decode step of one token is the smallest record; twice as many descriptors as half the ring could hold of
        // them keeps the descriptors from being the bound, and an eighth of the arena keeps them from taking over.
        let smallest = facts.section_words(section::ALL & !section::SPANS, 1) + 1;
        let rest = words - DESCRIPTORS_AT;
        let descriptors = (rest / (smallest + descriptor::WORDS)).min(rest / 8 / descriptor::WORDS).max(64);
        let ring_at = DESCRIPTORS_AT + descriptors * descriptor::WORDS;
        Self { descriptors, ring_at, ring_words: words - ring_at }
    }

    /// Whether rows of this size go through the ring; if not, their size in bytes.
    fn check(&self, facts: &Facts) -> std::result::Result<(), usize> {
        let widest = facts.section_words(section::ALL, 1);
        if widest * ROWS_PER_RING > self.ring_words { Err(widest * 8) } else { Ok(()) }
    }

    /// First word of the descriptor of record `index`.
    pub(crate) fn descriptor(&self, index: u64) -> usize {
        DESCRIPTORS_AT + (index % self.descriptors as u64) as usize * descriptor::WORDS
    }

    /// Word of the ring at `position`.
    pub(crate) fn ring(&self, position: u64) -> usize {
        self.ring_at + (position % self.ring_words as u64) as usize
    }
}

/// First word of reader entry `index`.
pub(crate) fn reader_entry(index: usize) -> usize {
    word::READER_TABLE + index * entry::WORDS
}

/// Who publishes: a process id alone could be another process's by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Producer {
    /// Process id.
    pub pid: u32,
    /// When the process started, in clock ticks since boot.
    pub start_time: u64,
}

/// A checked header.
#[derive(Clone, Debug)]
pub struct Header {
    /// What the arena holds.
    pub facts: Facts,
    /// Who writes it.
    pub producer: Producer,
    /// When it was made: nanoseconds since the Unix epoch.
    pub created_ns: u64,
    pub(crate) geometry: Geometry,
}

/// Who made an arena, and when, whatever its layout; None for what is no finished arena.
pub(crate) fn origin(memory: &impl Memory) -> Option<(Producer, u64)> {
    if memory.len() <= word::CREATED {
        return None;
    }
    let version = memory.load(word::VERSION, Acquire);
    let get = |at| memory.load(at, Relaxed);
    let pid = u32::try_from(get(word::PID)).ok()?;
    let producer = Producer { pid, start_time: get(word::START_TIME) };
    (version != 0 && get(word::MAGIC) == MAGIC).then(|| (producer, get(word::CREATED)))
}

pub(crate) fn store_text(memory: &impl Memory, at: usize, room_words: usize, text: &str) {
    let mut end = text.len().min(room_words * 8 - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut bytes = vec![end as u8];
    bytes.extend_from_slice(&text.as_bytes()[..end]);
    memory.write_bytes(at, &bytes);
}

pub(crate) fn load_text(memory: &impl Memory, at: usize, room_words: usize) -> Result<String> {
    let mut words = vec![0; room_words];
    memory.read_words(at, &mut words);
    let bytes: &[u8] = bytemuck::must_cast_slice(&words);
    let length = bytes[0] as usize;
    let text =
        bytes.get(1..=length).ok_or_else(|| Error::corrupt(format!("a name of {length} bytes in the header")))?;
    String::from_utf8(text.to_vec()).map_err(|_| Error::corrupt("a name in the header that is not UTF-8"))
}

impl Header {
    /// Lay out an arena over zeroed memory. The version is stored last: until then nobody takes it for an arena.
    pub(crate) fn store(memory: &impl Memory, facts: &Facts, producer: Producer, created_ns: u64) -> Result<Self> {
        facts.check().map_err(Error::invalid)?;
        if memory.len() * 8 < MIN_ARENA_BYTES {
            return Err(Error::invalid(format!(
                "an arena of {} bytes, and the least is {MIN_ARENA_BYTES}",
                memory.len() * 8
            )));
        }
        let geometry = Geometry::of(memory.len(), facts);
        geometry.check(facts).map_err(|row_bytes| {
            Error::invalid(format!(
                "an arena of {} bytes is too small for rows of {row_bytes} bytes; the least is about {} bytes",
                memory.len() * 8,
                (row_bytes * ROWS_PER_RING + DESCRIPTORS_AT * 8) * 8 / 7,
            ))
        })?;
        let put = |at, value: u64| memory.store(at, value, Relaxed);
        put(word::MAGIC, MAGIC);
        put(word::WORDS, memory.len() as u64);
        put(word::DESCRIPTORS, geometry.descriptors as u64);
        put(word::LAYERS, facts.layers.len() as u64);
        put(word::EXPERTS, u64::from(facts.num_experts));
        put(word::TOP_K, u64::from(facts.top_k));
        put(word::WEIGHTS, u64::from(facts.weights));
        put(word::KV_SLOTS, u64::from(facts.kv_slots));
        put(word::RANK, u64::from(facts.rank));
        put(word::OTHER_STAGES, u64::from(facts.other_stages));
        put(word::PID, u64::from(producer.pid));
        put(word::START_TIME, producer.start_time);
        put(word::CREATED, created_ns);
        store_text(memory, word::ENGINE, 8, &facts.engine);
        store_text(memory, word::ENGINE_VERSION, 8, &facts.engine_version);
        store_text(memory, word::MODEL, 32, &facts.model);
        memory.write_bytes(word::LAYER_INDICES, bytemuck::cast_slice(&facts.layers));
        // Pairs with the acquire in `load`: whoever sees the version sees the whole header.
        memory.store(word::VERSION, LAYOUT_VERSION, Release);
        Ok(Self { facts: facts.clone(), producer, created_ns, geometry })
    }

    /// Read and check a header; `path` is for the messages.
    pub(crate) fn load(memory: &impl Memory, path: &std::path::Path) -> Result<Self> {
        if memory.len() * 8 < MIN_ARENA_BYTES {
            return Err(Error::corrupt(format!("{} has only {} bytes", path.display(), memory.len() * 8)));
        }
        let version = memory.load(word::VERSION, Acquire);
        let get = |at| memory.load(at, Relaxed);
        if version != 0 && get(word::MAGIC) != MAGIC {
            return Err(Error::corrupt(format!("{} is not an arena", path.display())));
        }
        if version != LAYOUT_VERSION {
            return Err(Error::Version { path: path.to_owned(), found: version, known: LAYOUT_VERSION });
        }
        if get(word::WORDS) != memory.len() as u64 {
            return Err(Error::corrupt(format!(
                "{} has {} words, and its header says {}",
                path.display(),
                memory.len(),
                get(word::WORDS)
            )));
        }
        let narrow = |what: &str, at: usize| {
            u32::try_from(get(at)).map_err(|_| Error::corrupt(format!("{what} is {} in the header", get(at))))
        };
        let num_layers = get(word::LAYERS).min(MAX_LAYERS as u64 + 1) as usize;
        if num_layers > MAX_LAYERS {
            return Err(Error::corrupt(format!("{} routed layers in the header", get(word::LAYERS))));
        }
        let mut words = [0; MAX_LAYERS / 4];
        memory.read_words(word::LAYER_INDICES, &mut words);
        let indices: &[u16] = bytemuck::must_cast_slice(&words);
        let facts = Facts {
            layers: indices[..num_layers].to_vec(),
            num_experts: narrow("the number of experts", word::EXPERTS)?,
            top_k: narrow("top-k", word::TOP_K)?,
            weights: get(word::WEIGHTS) != 0,
            kv_slots: narrow("the number of KV slots", word::KV_SLOTS)?,
            rank: narrow("the rank", word::RANK)?,
            other_stages: narrow("the number of other stages", word::OTHER_STAGES)?,
            engine: load_text(memory, word::ENGINE, 8)?,
            engine_version: load_text(memory, word::ENGINE_VERSION, 8)?,
            model: load_text(memory, word::MODEL, 32)?,
        };
        facts.check().map_err(|what| Error::corrupt(format!("the header says {what}")))?;
        let geometry = Geometry::of(memory.len(), &facts);
        geometry.check(&facts).map_err(|row_bytes| {
            Error::corrupt(format!("the header says rows of {row_bytes} bytes, too long for this arena"))
        })?;
        if get(word::DESCRIPTORS) != geometry.descriptors as u64 {
            return Err(Error::corrupt(format!("{} descriptors in the header", get(word::DESCRIPTORS))));
        }
        let producer = Producer { pid: narrow("the process id", word::PID)?, start_time: get(word::START_TIME) };
        Ok(Self { facts, producer, created_ns: get(word::CREATED), geometry })
    }
}
