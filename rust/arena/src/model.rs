//! Writers and readers over any memory, with rings of a few words: for the models in `tests/loom.rs`, and for them only.

use crate::error::Result;
use crate::layout::{Facts, Geometry, Header, Producer, descriptor, entry, reader_entry, word};
use crate::memory::Memory;
use crate::reader::{Mode, Reader};
use crate::writer::{OnFull, Writer};
use std::sync::Arc;

/// Header of an arena of L = K = 1 whose rings are that small.
#[must_use]
pub fn header(descriptors: usize, ring_words: usize) -> Header {
    let ring_at = word::READER_TABLE + crate::layout::READERS * entry::WORDS + descriptors * descriptor::WORDS;
    let facts = Facts { layers: vec![0], num_experts: 200, top_k: 1, ..Facts::default() };
    let geometry = Geometry { descriptors, ring_at, ring_words };
    Header { facts, producer: us(), created_ns: 0, geometry }
}

/// Words of such an arena.
#[must_use]
pub fn len(header: &Header) -> usize {
    header.geometry.ring_at + header.geometry.ring_words
}

/// The words whose order of accesses the protocol rests on, with `readers` reader entries. The others are figures, or stand
/// or fall with one of these: of a descriptor the step's number speaks for all words but the sequence number.
#[must_use]
pub fn ordered_words(header: &Header, readers: usize) -> Vec<usize> {
    let mut words = vec![word::HEAD, word::TAIL, word::NEXT_TAIL, word::CLOSED, word::READER_HIGH];
    for at in (0..readers).map(reader_entry) {
        words.extend([at + entry::OWNER, at + entry::CURSOR, at + entry::LOSSLESS]);
    }
    for at in (0..header.geometry.descriptors as u64).map(|index| header.geometry.descriptor(index)) {
        words.extend([at + descriptor::SEQUENCE, at + descriptor::STEP]);
    }
    words.extend(header.geometry.ring_at..len(header));
    words
}

/// A writer that drops what does not fit.
pub fn writer<M: Memory>(memory: &Arc<M>, header: &Header) -> Writer<M> {
    Writer::new(Arc::clone(memory), header.clone(), OnFull::Drop)
}

/// A reader of this process.
///
/// # Errors
/// As [`crate::open`].
pub fn reader<M: Memory>(memory: &Arc<M>, header: &Header, mode: Mode) -> Result<Reader<M>> {
    Reader::new(Arc::clone(memory), header.clone(), mode, us())
}

fn us() -> Producer {
    Producer { pid: std::process::id(), start_time: 0 }
}
