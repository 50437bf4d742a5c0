//! The rows of pipeline stages, put together for a recorder: what each stage tells of a step, once all have told it.

use super::slots::Slots;
use super::stages::Part;
use super::store::{NO_TOKEN, RequestRows};
use super::stream::NO_SLOT;
use crate::batch::{End, Phase, Span};
use crate::layout::Facts;
use crate::reader::{CachedPrefix, Step};
use std::collections::VecDeque;

/// What one stage tells, in the order of its records.
pub(super) enum What {
    /// A forward, of one or several records.
    Step(Rows),
    /// Beginnings from the cache, with the rows that this stage knows.
    Prefix(Rows),
    /// The end of a request.
    End(End),
}

impl What {
    /// The rows; None of an end.
    pub fn rows(&self) -> Option<&Rows> {
        match self {
            Self::Step(rows) | Self::Prefix(rows) => Some(rows),
            Self::End(_) => None,
        }
    }

    /// How many they are.
    fn len(&self) -> usize {
        self.rows().map_or(0, Rows::len)
    }

    /// The phase of a span's rows.
    pub fn phase(&self, span: &Span) -> Phase {
        if matches!(self, Self::Prefix(_)) { Phase::Prefill } else { span.phase }
    }

    /// Whether it is of the same positions of the same requests.
    fn is_alike(&self, other: &Self) -> bool {
        let (Some(ours), Some(theirs)) = (self.rows(), other.rows()) else { return false };
        let whose = |span: &Span, other: &Span| {
            (&span.request, span.first_row, span.rows) == (&other.request, other.first_row, other.rows)
        };
        ours.positions == theirs.positions
            && ours.spans.len() == theirs.spans.len()
            && ours.spans.iter().zip(&theirs.spans).all(|(span, other)| whose(span, other))
    }
}

/// One stage's part of some rows; n of them.
#[derive(Default)]
pub(super) struct Rows {
    pub spans: Vec<Span>,
    pub positions: Vec<u32>,
    pub token_ids: Vec<u32>,
    pub kv_slots: Vec<u32>,
    /// The forward that computed it [n].
    pub steps: Vec<u64>,
    pub times: Vec<i64>,
    /// Whether it is known [n].
    pub known: Vec<bool>,
    pub experts: Vec<u8>,
    pub weights: Vec<u16>,
}

impl Rows {
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    fn add(&mut self, step: &Step<'_>) {
        let (before, n) = (self.len(), self.len() + step.rows);
        for span in step.batch.map_or(&[][..], |spans| spans) {
            self.add_span(Span { first_row: span.first_row + before as u32, ..span.clone() });
        }
        self.positions.extend_from_slice(step.positions);
        match step.token_ids {
            Some(ids) => self.token_ids.extend_from_slice(ids),
            None => self.token_ids.resize(n, NO_TOKEN),
        }
        match step.kv_slots {
            Some(slots) => self.kv_slots.extend_from_slice(slots),
            None => self.kv_slots.resize(n, NO_SLOT),
        }
        self.steps.resize(n, step.step);
        self.times.resize(n, step.time_ns as i64);
        self.known.resize(n, true);
        self.experts.extend_from_slice(step.experts);
        self.weights.extend_from_slice(step.weights.unwrap_or_default());
    }

    /// A step that was split goes on with the span in which it was: stages split theirs at rows of their own.
    fn add_span(&mut self, span: Span) {
        match self.spans.last_mut() {
            Some(last)
                if (last.number, last.phase) == (span.number, span.phase)
                    && last.first_row + last.rows == span.first_row =>
            {
                last.rows += span.rows;
            }
            _ => self.spans.push(span),
        }
    }

    fn of_prefix(prefix: &CachedPrefix<'_>, facts: &Facts, slots: &Slots) -> Self {
        let mut found = Self { spans: prefix.spans.clone(), kv_slots: prefix.kv_slots.to_vec(), ..Self::default() };
        let (row_bytes, row_ids) = (facts.row_bytes(), facts.ids_per_row());
        found.positions = prefix.spans.iter().flat_map(|span| 0..span.rows).collect();
        let rows: &RequestRows = slots.rows();
        for &slot in prefix.kv_slots {
            let at = slots.find(slot);
            found.known.push(at.is_some());
            found.token_ids.push(at.map_or(NO_TOKEN, |at| rows.token_ids[at]));
            found.steps.push(at.map_or(0, |at| rows.steps[at]));
            found.times.push(at.map_or(0, |at| rows.times[at]));
            match at {
                Some(at) => found.experts.extend_from_slice(&rows.experts[at * row_bytes..(at + 1) * row_bytes]),
                None => found.experts.resize(found.experts.len() + row_bytes, 0),
            }
            if facts.weights {
                let ids = at.map(|at| &rows.weights[at * row_ids..(at + 1) * row_ids]);
                found.weights.extend(ids.map_or_else(|| vec![0; row_ids], <[u16]>::to_vec));
            }
        }
        found
    }

    /// The experts of a row, and its weights.
    pub fn row(&self, row: usize) -> (&[u8], &[u16]) {
        let (bytes, ids) = (self.experts.len() / self.len(), self.weights.len() / self.len());
        (&self.experts[row * bytes..(row + 1) * bytes], &self.weights[row * ids..(row + 1) * ids])
    }
}

/// Something told, and what the other stages must tell to be it: the forward, or the one before it.
struct Item {
    /// Index of its first record.
    first: u64,
    key: (u64, bool),
    what: What,
}

/// One stage of a replica.
#[derive(Default)]
pub(super) struct Stage {
    told: VecDeque<Item>,
    /// The forward whose records are being read.
    open: Option<Item>,
    last_step: u64,
    /// It has told everything that it will.
    over: bool,
}

impl Stage {
    /// Whether something was told to its end.
    pub fn has_told(&self) -> bool {
        !self.told.is_empty()
    }

    /// Index of the first record that is not given out; `cursor`: of the next one to be read.
    pub fn pending(&self, cursor: u64) -> u64 {
        self.told.front().or(self.open.as_ref()).map_or(cursor, |item| item.first)
    }

    /// Nothing more comes of the forward that is being read.
    fn flush(&mut self) {
        self.told.extend(self.open.take());
    }

    /// Nothing more comes at all.
    pub fn finish(&mut self) {
        self.flush();
        self.over = true;
    }

    /// Record `index` is a step, or a part of one.
    pub fn step(&mut self, index: u64, step: &Step<'_>) {
        let key = (step.step, false);
        if self.open.as_ref().is_none_or(|open| open.key != key) {
            self.flush();
            self.open = Some(Item { first: index, key, what: What::Step(Rows::default()) });
        }
        if let Some(Item { what: What::Step(rows), .. }) = &mut self.open {
            rows.add(step);
        }
        self.last_step = step.step;
    }

    /// Record `index` tells of beginnings from the cache.
    pub fn prefix(&mut self, index: u64, prefix: &CachedPrefix<'_>, part: &Part, slots: &Slots) {
        self.flush();
        let what = What::Prefix(Rows::of_prefix(prefix, &part.facts, slots));
        self.told.push_back(Item { first: index, key: (self.last_step, true), what });
    }

    /// Record `index` ends a request; `told` is false where another stage tells of ends.
    pub fn end(&mut self, index: u64, end: End, told: bool) {
        self.flush();
        if told {
            self.told.push_back(Item { first: index, key: (self.last_step, true), what: What::End(end) });
        }
    }
}

/// What comes next of a replica.
pub(super) enum Next {
    /// An end of the first stage, or the same of each stage, in their order.
    All(Vec<What>),
    /// Some of the stages alone had told what was next, so many rows: it is left out.
    LeftOut(usize),
    /// A stage has told nothing yet.
    Wait,
}

/// Take what all stages have told next.
pub(super) fn next(stages: &mut [Stage]) -> Next {
    if let Some(Item { what: What::End(_), .. }) = stages[0].told.front() {
        return Next::All(stages[0].told.pop_front().map(|item| item.what).into_iter().collect());
    }
    let keys: Option<Vec<(u64, bool)>> = stages.iter().map(|stage| Some(stage.told.front()?.key)).collect();
    let Some(keys) = keys else {
        if stages.iter().any(|stage| stage.told.is_empty() && !stage.over) {
            return Next::Wait;
        }
        // What a stage that has ended has not told, it never will.
        let left_out: Vec<Item> = stages.iter_mut().filter_map(|stage| stage.told.pop_front()).collect();
        let rows = left_out.iter().map(|item| item.what.len()).max();
        return rows.map_or(Next::Wait, Next::LeftOut);
    };
    let oldest = *keys.iter().min().expect("a replica has stages");
    let behind = stages.iter_mut().zip(&keys).filter(|(_, key)| **key == oldest);
    let told: Vec<What> = behind.filter_map(|(stage, _)| stage.told.pop_front()).map(|item| item.what).collect();
    if told.len() == keys.len() && told.iter().all(|what| what.is_alike(&told[0])) {
        Next::All(told)
    } else {
        Next::LeftOut(told.iter().map(What::len).max().unwrap_or_default())
    }
}
