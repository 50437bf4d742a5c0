//! Rows in the order of their records, for a recorder: nothing is lost between what it took and what it wrote.

use super::feed::{ArenaId, Feed, Source, arena_id};
use super::join::{self, Next, Rows, Stage, What};
use super::known::Known;
use super::slots::Slots;
use super::store::NO_TOKEN;
use super::wait::{Pace, Waiter};
use crate::batch::{End, Phase, Span};
use crate::error::Result;
use crate::layout::Facts;
use crate::reader::{Mode, Record, Step};
use crate::writer::after;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Which records of an arena a block came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordRange {
    /// The arena.
    pub arena: ArenaId,
    /// The first record.
    pub first: u64,
    /// The last record.
    pub last: u64,
}

/// KV slot of a row whose engine did not tell it.
pub const NO_SLOT: u32 = u32::MAX;

/// Rows of a number of records; n of them.
#[derive(Clone, Debug, Default)]
pub struct Block {
    /// Index into `ids` [n].
    pub requests: Vec<u32>,
    /// Index into `ranges` [n].
    pub arenas: Vec<u32>,
    /// The ids of the requests that have rows here.
    pub ids: Vec<String>,
    /// Positions [n].
    pub positions: Vec<u32>,
    /// Token ids [n]; [`NO_TOKEN`] where the engine did not tell.
    pub token_ids: Vec<u32>,
    /// KV slots [n]; [`NO_SLOT`] where the engine did not tell.
    pub kv_slots: Vec<u32>,
    /// Phases as u8 [n].
    pub phases: Vec<u8>,
    /// The forward [n].
    pub steps: Vec<u64>,
    /// When it was published, in nanoseconds since the Unix epoch [n].
    pub times: Vec<i64>,
    /// Expert ids [n, L, K], u8 or u16 in native byte order.
    pub experts: Vec<u8>,
    /// Router weights f16 [n, L, K]; empty if the arena has none.
    pub weights: Vec<u16>,
    /// Requests that ended, each behind its arena's index into `ranges`.
    pub ends: Vec<(u32, End)>,
    /// The records that these rows came from, one entry an arena.
    pub ranges: Vec<RecordRange>,
    /// Rows of no request, left out.
    pub unattributed: u64,
    /// Records that contradicted themselves, left out.
    pub corrupt: u64,
}

impl Block {
    /// The number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }
}

/// A lossless reader of a capture whose space is released only when told that the rows are durable.
pub struct RowStream {
    feed: Feed,
    facts: Facts,
    waiter: Waiter,
    block: Block,
    by_id: HashMap<String, u32>,
    /// For each arena, its batch's requests: indices into `block.ids`; None for rows of no request.
    batches: Vec<Known<Option<u32>>>,
    /// For each arena, what the engine has in its cache.
    slots: Vec<Slots>,
    /// Of a model in several pipeline stages, those of which every stage has come.
    replicas: Vec<Replica>,
    left_out_rows: u64,
    skipped: u64,
    /// For each arena, the record after the last one that a block gave out; at first, the one to begin with.
    taken: Vec<u64>,
    /// Whether nothing came when it was looked last.
    emptied: bool,
    stop: Arc<AtomicBool>,
    /// Once stopped: for each arena, the record to stop before.
    targets: Option<Vec<u64>>,
}

/// The arenas of a model's stages, in order, and what each has told and the others have not.
struct Replica {
    arenas: Vec<usize>,
    stages: Vec<Stage>,
}

/// Most that the rows of all arenas' KV slots may take.
const MAX_SLOT_BYTES: usize = 512 << 20;
/// Part of an arena that may wait to be written: beyond it, a block is given out early, so that the writer never drops
/// records for a recorder that merely waits for a fuller file.
const HELD_SHARE: u64 = 4;

impl RowStream {
    /// Attach losslessly. For each arena named in `resume`, go on after that record; elsewhere begin at the oldest one.
    ///
    /// # Errors
    /// As [`super::Collector::open`].
    pub fn open(directory: PathBuf, capture: &str, resume: &[(ArenaId, u64)]) -> Result<Self> {
        let mut feed = Feed::open(directory, capture, Mode::Lossless)?;
        let mut skipped = 0;
        for source in &mut feed.sources {
            if let Some((_, last)) = resume.iter().find(|(arena, _)| *arena == arena_id(&source.reader)) {
                let next = last.saturating_add(1);
                skipped += source.reader.cursor().saturating_sub(next);
                source.reader.seek(next)?;
            }
        }
        let waiter = Waiter::new(Pace::CALM);
        let mut stream = Self {
            facts: feed.facts().clone(),
            feed,
            waiter,
            block: Block::default(),
            by_id: HashMap::new(),
            batches: Vec::new(),
            slots: Vec::new(),
            replicas: Vec::new(),
            left_out_rows: 0,
            skipped,
            taken: Vec::new(),
            emptied: false,
            stop: Arc::default(),
            targets: None,
        };
        stream.see_new_arenas();
        Ok(stream)
    }

    fn see_new_arenas(&mut self) {
        self.slots.resize_with(self.feed.sources.len(), Slots::default);
        self.taken.extend(self.feed.sources[self.taken.len()..].iter().map(|source| source.reader.cursor()));
        if self.facts.other_stages == 0 {
            return;
        }
        for arenas in self.feed.replicas() {
            if self.replicas.iter().all(|replica| replica.arenas != arenas) {
                let stages = arenas.iter().map(|_| Stage::default()).collect();
                self.replicas.push(Replica { arenas, stages });
            }
        }
    }

    /// What the capture says of its model.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Records that were gone when this stream resumed.
    #[must_use]
    pub fn skipped_records(&self) -> u64 {
        self.skipped
    }

    /// Rows that not all pipeline stages told of, and that were left out.
    #[must_use]
    pub fn left_out_rows(&self) -> u64 {
        self.left_out_rows
    }

    /// Rows that the writers have dropped since this stream began.
    #[must_use]
    pub fn dropped_rows(&self) -> u64 {
        self.feed.dropped_rows()
    }

    /// Set this to true, from any thread, to have the stream end at what is published by then.
    #[must_use]
    pub fn stop_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Whether every publisher has ended or the stream was stopped, and everything published by then was taken.
    #[must_use]
    pub fn is_over(&self) -> bool {
        // A record that its publisher died in the middle of is never reached.
        let reached = |arena: usize| {
            let source = &self.feed.sources[arena];
            source.over || self.targets.as_ref().is_some_and(|targets| source.reader.cursor() >= targets[arena])
        };
        // Of a replica that lacks a stage nothing is read. What was read of stages may wait to be given.
        let all_reached = if self.facts.other_stages == 0 {
            (0..self.feed.sources.len()).all(reached)
        } else {
            self.replicas.iter().flat_map(|replica| &replica.arenas).all(|&arena| reached(arena))
        };
        self.emptied && all_reached
    }

    /// Wait until there are `rows` rows, or `timeout` is over, or much of an arena is held; gives what there is, which
    /// may be nothing. Call [`RowStream::release`] once it is durable.
    ///
    /// # Errors
    /// When a new rank of the capture cannot be opened.
    pub fn take(&mut self, rows: usize, timeout: Duration) -> Result<Block> {
        let deadline = after(timeout);
        loop {
            if self.feed.is_time_to_look() {
                self.feed.mark_ended();
                if self.targets.is_none() {
                    self.feed.join_new_ranks()?;
                    self.see_new_arenas();
                }
            }
            if self.targets.is_none() && self.stop.load(Relaxed) {
                self.targets = Some(self.feed.sources.iter().map(|source| source.reader.head()).collect());
            }
            let mut came = false;
            if self.facts.other_stages == 0 {
                for arena in 0..self.feed.sources.len() {
                    came |= self.take_one(arena);
                }
            } else {
                for replica in 0..self.replicas.len() {
                    came |= self.take_joined(replica);
                }
            }
            self.emptied = !came;
            let full = self.block.len() >= rows || self.holds_much();
            if full || Instant::now() >= deadline || (!came && self.is_over()) {
                self.by_id.clear();
                self.batches.clear();
                if self.facts.other_stages == 0 {
                    self.taken = self.feed.sources.iter().map(|source| source.reader.cursor()).collect();
                } else {
                    self.end_ranges_of_stages();
                }
                return Ok(std::mem::take(&mut self.block));
            }
            if !came {
                self.waiter.wait(false);
            }
        }
    }

    /// Every block given out so far is durable: the writers may reuse its space.
    pub fn release(&mut self) {
        for (source, &taken) in self.feed.sources.iter_mut().zip(&self.taken) {
            source.reader.release(taken);
        }
    }

    fn holds_much(&self) -> bool {
        self.feed.sources.iter().any(|source| source.reader.held_share() * HELD_SHARE as f64 >= 1.0)
    }

    /// Read what each stage of a replica tells, and give what all of them have told; false if one must be waited for.
    fn take_joined(&mut self, replica: usize) -> bool {
        let mut read = false;
        for stage in 0..self.replicas[replica].stages.len() {
            read |= self.read_stage(replica, stage);
        }
        let told = match join::next(&mut self.replicas[replica].stages) {
            Next::All(told) => told,
            Next::LeftOut(rows) => {
                self.left_out_rows += rows as u64;
                return true;
            }
            Next::Wait => return read,
        };
        let index = self.range_of(self.replicas[replica].arenas[0]);
        match &told[0] {
            What::End(end) => self.block.ends.push((index, end.clone())),
            what => {
                let parts: Vec<&Rows> = told.iter().filter_map(What::rows).collect();
                let request = |span: &Span| index_of(span, &mut self.by_id, &mut self.block.ids);
                let requests: Vec<_> = parts[0].spans.iter().map(request).collect();
                self.block.add_joined(what, &parts, &requests, index);
            }
        }
        true
    }

    /// Read an arena until its stage has told something to its end; gives whether it read anything.
    fn read_stage(&mut self, replica: usize, stage: usize) -> bool {
        let arena = self.replicas[replica].arenas[stage];
        let stage = &mut self.replicas[replica].stages[stage];
        let budget = MAX_SLOT_BYTES / self.slots.len();
        let slots = &mut self.slots[arena];
        let Source { reader, part, over, .. } = &mut self.feed.sources[arena];
        let mut read = false;
        while !stage.has_told() {
            let index = reader.cursor();
            let reached = self.targets.as_ref().is_some_and(|targets| index >= targets[arena]);
            let polled = if reached { Ok(None) } else { reader.poll() };
            let nothing = matches!(polled, Ok(None));
            match polled {
                Ok(None) => {}
                Ok(Some(Record::Step(step))) => {
                    stage.step(index, &step);
                    slots.keep(&part.facts, &step, budget);
                }
                Ok(Some(Record::Prefix(prefix))) => {
                    if prefix.after_gap {
                        slots.forget();
                    }
                    stage.prefix(index, &prefix, part, slots);
                }
                Ok(Some(Record::End(end))) => stage.end(index, end, part.is_first()),
                Err(_) => self.block.corrupt += 1,
            }
            if reader.cursor() > index {
                read = true; // also past records of nothing
                continue;
            }
            if nothing && (reached || *over) {
                stage.finish();
            }
            return read; // nothing came; or the arena, not a record, contradicts itself
        }
        read
    }

    /// Index of the range in the block of an arena that is one of several stages.
    fn range_of(&mut self, arena: usize) -> u32 {
        let (id, first) = (arena_id(&self.feed.sources[arena].reader), self.taken[arena]);
        let known = self.block.ranges.iter().position(|range| range.arena == id);
        known.unwrap_or_else(|| {
            self.block.ranges.push(RecordRange { arena: id, first, last: first });
            self.block.ranges.len() - 1
        }) as u32
    }

    /// A block goes out: of stages, it has what all of them have told, and not what some are ahead.
    fn end_ranges_of_stages(&mut self) {
        let pending = |replica: &Replica| {
            let stages = replica.arenas.iter().zip(&replica.stages);
            let cursor = |arena: usize| self.feed.sources[arena].reader.cursor();
            stages.map(|(&arena, stage)| (arena, stage.pending(cursor(arena)))).collect::<Vec<_>>()
        };
        for (arena, pending) in self.replicas.iter().flat_map(pending).collect::<Vec<_>>() {
            if pending > self.taken[arena] {
                let range = self.range_of(arena) as usize;
                self.block.ranges[range].last = pending - 1;
                self.taken[arena] = pending;
            }
        }
    }

    fn take_one(&mut self, arena: usize) -> bool {
        self.batches.resize_with(self.feed.sources.len(), Known::default);
        let Source { reader, .. } = &mut self.feed.sources[arena];
        let (id, first) = (arena_id(reader), reader.cursor());
        if self.targets.as_ref().is_some_and(|targets| first >= targets[arena]) {
            return false;
        }
        let range = self.block.ranges.iter().position(|range| range.arena == id);
        let index = range.unwrap_or(self.block.ranges.len()) as u32;
        match reader.poll() {
            Ok(None) => return false,
            Ok(Some(Record::End(end))) => self.block.ends.push((index, end)),
            Ok(Some(Record::Step(step))) => {
                let request = |span: &Span| index_of(span, &mut self.by_id, &mut self.block.ids);
                let requests = self.batches[arena].spans(step.batch, request);
                self.block.add(&step, requests, index);
                let budget = MAX_SLOT_BYTES / self.slots.len();
                self.slots[arena].keep(&self.facts, &step, budget);
            }
            Ok(Some(Record::Prefix(prefix))) => {
                let slots = &mut self.slots[arena];
                if prefix.after_gap {
                    slots.forget();
                }
                for span in &prefix.spans {
                    if let Some(request) = index_of(span, &mut self.by_id, &mut self.block.ids) {
                        let rows = span.first_row as usize..(span.first_row + span.rows) as usize;
                        self.block.add_prefix(&self.facts, request, index, slots, &prefix.kv_slots[rows]);
                    }
                }
            }
            Err(_) => self.block.corrupt += 1,
        }
        if reader.cursor() <= first {
            // The arena, not a record, contradicts itself.
            return true;
        }
        let last = reader.cursor() - 1;
        match range {
            Some(range) => self.block.ranges[range].last = last,
            // A late or lapped reader does not begin where it stood; `first` then names records that were gone.
            None => self.block.ranges.push(RecordRange { arena: id, first, last }),
        }
        true
    }
}

/// Index of a span's request in `ids`; None for rows of no request.
fn index_of(span: &Span, by_id: &mut HashMap<String, u32>, ids: &mut Vec<String>) -> Option<u32> {
    if span.number == 0 {
        return None;
    }
    Some(*by_id.entry(span.request.clone()).or_insert_with(|| {
        ids.push(span.request.clone());
        (ids.len() - 1) as u32
    }))
}

/// What a block keeps of a row beside its experts and weights.
struct Row {
    position: u32,
    token_id: u32,
    kv_slot: u32,
    phase: Phase,
    step: u64,
    time_ns: i64,
}

impl Block {
    /// Add a row of a request, but for its experts and weights.
    fn add_row(&mut self, request: u32, arena: u32, row: Row) {
        self.requests.push(request);
        self.arenas.push(arena);
        self.positions.push(row.position);
        self.token_ids.push(row.token_id);
        self.kv_slots.push(row.kv_slot);
        self.phases.push(row.phase as u8);
        self.steps.push(row.step);
        self.times.push(row.time_ns);
    }

    /// Add the rows that stand in these slots, as a request's first ones; unknown ones are left out.
    fn add_prefix(&mut self, facts: &Facts, request: u32, arena: u32, slots: &Slots, kv_slots: &[u32]) {
        let (row_bytes, row_ids) = (facts.row_bytes(), facts.ids_per_row());
        for (position, &slot) in kv_slots.iter().enumerate() {
            let Some(at) = slots.find(slot) else { continue };
            let rows = slots.rows();
            self.add_row(
                request,
                arena,
                Row {
                    position: position as u32,
                    token_id: rows.token_ids[at],
                    kv_slot: slot,
                    phase: Phase::Prefill,
                    step: rows.steps[at],
                    time_ns: rows.times[at],
                },
            );
            self.experts.extend_from_slice(&rows.experts[at * row_bytes..(at + 1) * row_bytes]);
            if facts.weights {
                self.weights.extend_from_slice(&rows.weights[at * row_ids..(at + 1) * row_ids]);
            }
        }
    }

    /// Add the rows that all stages know, each of the same forward.
    fn add_joined(&mut self, what: &What, parts: &[&Rows], requests: &[Option<u32>], arena: u32) {
        let first = parts[0];
        let mut attributed = 0;
        for (span, request) in first.spans.iter().zip(requests) {
            let Some(request) = *request else { continue };
            attributed += span.rows as usize;
            for row in span.first_row as usize..(span.first_row + span.rows) as usize {
                if !parts.iter().all(|part| part.known[row] && part.steps[row] == first.steps[row]) {
                    continue;
                }
                self.add_row(
                    request,
                    arena,
                    Row {
                        position: first.positions[row],
                        token_id: first.token_ids[row],
                        kv_slot: first.kv_slots[row],
                        phase: what.phase(span),
                        step: first.steps[row],
                        time_ns: first.times[row],
                    },
                );
                for (experts, weights) in parts.iter().map(|part| part.row(row)) {
                    self.experts.extend_from_slice(experts);
                    self.weights.extend_from_slice(weights);
                }
            }
        }
        if matches!(what, What::Step(_)) {
            self.unattributed += (first.len() - attributed) as u64;
        }
    }

    fn add(&mut self, step: &Step<'_>, requests: &[Option<u32>], arena: u32) {
        let mut attributed = 0;
        let spans = step.batch.map_or(&[][..], |spans| spans);
        let (row_bytes, row_ids) =
            (step.experts.len() / step.rows.max(1), step.weights.map_or(0, <[u16]>::len) / step.rows.max(1));
        for (span, request) in spans.iter().zip(requests) {
            let Some(request) = *request else { continue };
            let rows = span.first_row as usize..(span.first_row + span.rows) as usize;
            attributed += rows.len();
            let n = self.len() + rows.len();
            self.requests.resize(n, request);
            self.arenas.resize(n, arena);
            self.positions.extend_from_slice(&step.positions[rows.clone()]);
            match step.token_ids {
                Some(ids) => self.token_ids.extend_from_slice(&ids[rows.clone()]),
                None => self.token_ids.resize(n, NO_TOKEN),
            }
            match step.kv_slots {
                Some(slots) => self.kv_slots.extend_from_slice(&slots[rows.clone()]),
                None => self.kv_slots.resize(n, NO_SLOT),
            }
            self.phases.resize(n, span.phase as u8);
            self.steps.resize(n, step.step);
            self.times.resize(n, step.time_ns as i64);
            self.experts.extend_from_slice(&step.experts[rows.start * row_bytes..rows.end * row_bytes]);
            if let Some(weights) = step.weights {
                self.weights.extend_from_slice(&weights[rows.start * row_ids..rows.end * row_ids]);
            }
        }
        self.unattributed += (step.rows - attributed) as u64;
    }
}
