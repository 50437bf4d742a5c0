//! The rows of a forward, wherever their sections are: in this process, on a device, or still to be written by a graph.

use crate::batch::Span;
use crate::error::Result;
use crate::layout::{Facts, section};
use std::ops::Range;

/// The rows of one forward.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Expert ids [n, L, K], u8 or u16 in native byte order: [`Facts::id_bytes`].
    pub experts: &'a [u8],
    /// Token ids [n], where the engine knows them.
    pub token_ids: Option<&'a [u32]>,
    /// Positions in the request [n].
    pub positions: &'a [u32],
    /// Where in the engine's cache each row's token stands [n], where the engine has such slots.
    pub kv_slots: Option<&'a [u32]>,
    /// Router weights f16 [n, L, K], if the arena was made for them.
    pub weights: Option<&'a [u16]>,
}

/// The rows of one forward whose experts a GPU holds; sections as in [`Rows`].
#[derive(Clone, Copy, Debug)]
pub struct DeviceRows<'a> {
    /// The number of rows, n.
    pub rows: usize,
    /// Address of the expert ids on the device.
    pub experts: u64,
    /// Token ids: on the device, on the host, or not known.
    pub token_ids: Option<Source<'a>>,
    /// Positions, on the device or on the host.
    pub positions: Source<'a>,
    /// KV slots: on the device, on the host, or not known.
    pub kv_slots: Option<Source<'a>>,
    /// Address of the router weights on the device, if the arena was made for them.
    pub weights: Option<u64>,
}

/// The rows that the next replay of a CUDA graph writes; sections as in [`Rows`].
#[derive(Clone, Copy, Debug)]
pub struct GraphRows<'a> {
    /// The number of rows, n: at most as many as the graph was captured with.
    pub rows: usize,
    /// Whether the graph writes token ids.
    pub token_ids: bool,
    /// Positions, unless the graph writes them.
    pub positions: Option<&'a [u32]>,
    /// Whether the graph writes KV slots.
    pub kv_slots: bool,
}

/// Where in the engine's cache the beginnings of requests stand.
#[derive(Clone, Copy, Debug)]
pub struct Prefix<'a> {
    /// Whose: row `i` of a span is position `i` of its request.
    pub spans: &'a [Span],
    /// KV slots u32 [n] in native byte order, on the device or on the host.
    pub kv_slots: Source<'a>,
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
    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Host(bytes) => bytes.len(),
            Self::Device(_, len) => *len,
        }
    }

    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        match self {
            Self::Host(bytes) => Self::Host(&bytes[range]),
            Self::Device(address, _) => Self::Device(address + range.start as u64, range.len()),
        }
    }
}

/// The sections of a step, wherever they are.
#[derive(Clone, Copy)]
pub(crate) struct Sections<'a> {
    pub experts: Source<'a>,
    pub token_ids: Option<Source<'a>>,
    pub positions: Source<'a>,
    pub kv_slots: Option<Source<'a>>,
    pub weights: Option<Source<'a>>,
}

impl<'a> Sections<'a> {
    /// Each of them, with the bytes that a row takes in it, in the order of [`section`].
    pub fn in_order(&self, facts: &Facts) -> [(u16, Option<Source<'a>>, usize); 5] {
        [
            (section::EXPERTS, Some(self.experts), facts.row_bytes()),
            (section::TOKEN_IDS, self.token_ids, 4),
            (section::POSITIONS, Some(self.positions), 4),
            (section::KV_SLOTS, self.kv_slots, 4),
            (section::WEIGHTS, self.weights, facts.ids_per_row() * 2),
        ]
    }

    /// Those that there are, in that order.
    pub fn present(&self, facts: &Facts) -> impl Iterator<Item = Source<'a>> + use<'a> {
        self.in_order(facts).into_iter().filter_map(|(_, source, _)| source)
    }

    /// Which of them there are.
    pub fn mask(&self, facts: &Facts) -> u16 {
        let present = self.in_order(facts).into_iter().filter(|(_, source, _)| source.is_some());
        present.fold(0, |mask, (section, ..)| mask | section)
    }

    /// Those of rows `first..end`.
    pub fn part(&self, facts: &Facts, first: usize, end: usize) -> Self {
        let [experts, token_ids, positions, kv_slots, weights] = self
            .in_order(facts)
            .map(|(_, source, row_bytes)| source.map(|source| source.slice(first * row_bytes..end * row_bytes)));
        let [Some(experts), Some(positions)] = [experts, positions] else { unreachable!("every step has them") };
        Self { experts, token_ids, positions, kv_slots, weights }
    }
}

/// How sections of a device come into the arena, and how a record that has some is published: after they came.
pub(crate) trait Landing {
    /// Copy `len` bytes from a device's `address` to word `at`, some time from now.
    fn copy(&mut self, at: usize, address: u64, len: usize) -> Result<()>;
    /// Store `value` at word `at` with release, after the copies so far.
    fn publish(&mut self, at: usize, value: u64) -> Result<()>;
    /// Whether a large step may come in several records.
    fn takes_parts(&self) -> bool {
        true
    }
}
