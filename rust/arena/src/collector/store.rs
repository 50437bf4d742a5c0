//! Each request's rows, by position, within a memory budget.

use super::slots::Slots;
use super::stages::Part;
use crate::batch::{End, Outcome, Phase, Span};
use crate::layout::Facts;
use crate::reader::Step;
use slotmap::{SlotMap, new_key_type};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;

new_key_type! {
    /// A request that the store holds, or held.
    pub(super) struct Key;
}

/// How a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// More rows may come.
    Running,
    /// It ran to its end.
    Finished,
    /// It was given up, or its engine died.
    Aborted,
}

/// What is known of a request, without its rows.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Its id.
    pub request: String,
    /// How it stands.
    pub state: State,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Positions whose forward ran.
    pub tokens: usize,
    /// Those of them whose row is not held.
    pub missing: usize,
    /// Index of the arena that it came from.
    pub arena: usize,
}

/// The rows of one request; index is the position.
#[derive(Clone, Debug, Default)]
pub struct RequestRows {
    /// Expert ids [n, L, K], u8 or u16 in native byte order; zeros where missing.
    pub experts: Vec<u8>,
    /// Router weights f16 [n, L, K]; empty if the arena has none.
    pub weights: Vec<u16>,
    /// Token ids [n]; [`NO_TOKEN`] where the engine did not tell.
    pub token_ids: Vec<u32>,
    /// [`MISSING`], or the phase as u8.
    pub phases: Vec<u8>,
    /// The forward [n].
    pub steps: Vec<u64>,
    /// When it was published, in nanoseconds since the Unix epoch [n].
    pub times: Vec<i64>,
    /// Of several pipeline stages, the bits of those whose part of the row is there [n]; empty if there is one.
    stages: Vec<u32>,
}

/// Phase of a position whose row is missing.
pub const MISSING: u8 = u8::MAX;
/// Token id of a row whose engine did not tell it.
pub const NO_TOKEN: u32 = u32::MAX;

impl RequestRows {
    /// Positions held, missing ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.phases.len()
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.phases.is_empty()
    }

    /// Bytes of one row and all that is kept with it.
    pub(super) fn row_bytes(facts: &Facts) -> usize {
        let weights = if facts.weights { facts.ids_per_row() * 2 } else { 0 };
        let stages = if facts.other_stages > 0 { 4 } else { 0 };
        // Token id, phase, step, time.
        facts.row_bytes() + weights + stages + 4 + 1 + 8 + 8
    }

    pub(super) fn resize(&mut self, facts: &Facts, len: usize) {
        self.experts.resize(len * facts.row_bytes(), 0);
        self.weights.resize(if facts.weights { len * facts.ids_per_row() } else { 0 }, 0);
        self.token_ids.resize(len, NO_TOKEN);
        self.phases.resize(len, MISSING);
        self.steps.resize(len, 0);
        self.times.resize(len, 0);
        self.stages.resize(if facts.other_stages > 0 { len } else { 0 }, 0);
    }

    fn shrink(&mut self) {
        self.experts.shrink_to_fit();
        self.weights.shrink_to_fit();
        self.token_ids.shrink_to_fit();
        self.phases.shrink_to_fit();
        self.steps.shrink_to_fit();
        self.times.shrink_to_fit();
        self.stages.shrink_to_fit();
    }

    pub(super) fn bytes(&self) -> usize {
        self.experts.capacity()
            + self.weights.capacity() * 2
            + self.token_ids.capacity() * 4
            + self.phases.capacity()
            + (self.steps.capacity() + self.times.capacity()) * 8
            + self.stages.capacity() * 4
    }
}

/// One stage's part of a row, and what is kept with it.
struct RowPart<'a> {
    experts: &'a [u8],
    weights: Option<&'a [u16]>,
    token_id: u32,
    phase: u8,
    step: u64,
    time_ns: i64,
}

struct Request {
    /// The id that it goes by here, and the one that its replica gives it: another replica may have had that one before.
    id: String,
    told: String,
    replica: u32,
    arena: usize,
    number: u64,
    state: State,
    prompt_tokens: u32,
    /// Set by the request's end: positions that count.
    num_positions: Option<usize>,
    present: usize,
    rows: RequestRows,
}

impl Request {
    fn tokens(&self) -> usize {
        self.num_positions.unwrap_or(self.rows.len())
    }

    fn missing(&self) -> usize {
        self.tokens() - self.present
    }

    /// Keep rows of consecutive positions.
    fn keep(&mut self, facts: &Facts, part: &Part, step: &Step<'_>, run: Range<usize>, phase: Phase) {
        let (row_bytes, row_ids) = (part.facts.row_bytes(), part.facts.ids_per_row());
        let first = step.positions[run.start] as usize;
        let to = first..first + run.len();
        let rows = &mut self.rows;
        if to.end > rows.len() {
            rows.resize(facts, to.end);
        }
        if !part.is_whole() {
            for (position, row) in to.zip(run) {
                let from = RowPart {
                    experts: &step.experts[row * row_bytes..(row + 1) * row_bytes],
                    weights: step.weights.map(|weights| &weights[row * row_ids..(row + 1) * row_ids]),
                    token_id: step.token_ids.map_or(NO_TOKEN, |ids| ids[row]),
                    phase: phase as u8,
                    step: step.step,
                    time_ns: step.time_ns as i64,
                };
                self.keep_part(facts, part, position, &from);
            }
            return;
        }
        self.present += rows.phases[to.clone()].iter().filter(|&&phase| phase == MISSING).count();
        let experts = &step.experts[run.start * row_bytes..run.end * row_bytes];
        rows.experts[to.start * row_bytes..to.end * row_bytes].copy_from_slice(experts);
        if let Some(weights) = step.weights {
            let weights = &weights[run.start * row_ids..run.end * row_ids];
            rows.weights[to.start * row_ids..to.end * row_ids].copy_from_slice(weights);
        }
        match step.token_ids {
            Some(ids) => rows.token_ids[to.clone()].copy_from_slice(&ids[run]),
            None => rows.token_ids[to.clone()].fill(NO_TOKEN),
        }
        rows.phases[to.clone()].fill(phase as u8);
        rows.steps[to.clone()].fill(step.step);
        rows.times[to].fill(step.time_ns as i64);
    }

    /// Keep one stage's part of a row, as `facts` of the whole model have it.
    ///
    /// A row is there once all stages have given their part of the same forward: positions may be computed anew, by a
    /// forward with a higher number, and each stage is read at its own pace.
    fn keep_part(&mut self, facts: &Facts, part: &Part, position: usize, from: &RowPart<'_>) {
        let rows = &mut self.rows;
        if rows.stages[position] == 0 || from.step > rows.steps[position] {
            self.present -= usize::from(rows.phases[position] != MISSING);
            rows.phases[position] = MISSING;
            rows.stages[position] = 0;
        } else if from.step < rows.steps[position] {
            return;
        }
        let (row_bytes, row_ids) = (facts.row_bytes(), facts.ids_per_row());
        let first_id = part.first_layer * facts.top_k as usize;
        rows.experts[position * row_bytes + first_id * facts.id_bytes()..][..from.experts.len()]
            .copy_from_slice(from.experts);
        if let Some(weights) = from.weights {
            rows.weights[position * row_ids + first_id..][..weights.len()].copy_from_slice(weights);
        }
        rows.token_ids[position] = from.token_id;
        rows.steps[position] = from.step;
        rows.times[position] = from.time_ns;
        rows.stages[position] |= part.bit();
        if rows.stages[position] == part.all() {
            self.present += usize::from(rows.phases[position] == MISSING);
            rows.phases[position] = from.phase;
        }
    }

    /// Keep a row that stands at `at` in `from`, as one of the prompt.
    fn keep_copy(&mut self, facts: &Facts, part: &Part, position: usize, from: &RequestRows, at: usize) {
        let (row_bytes, row_ids) = (part.facts.row_bytes(), part.facts.ids_per_row());
        let rows = &mut self.rows;
        if position >= rows.len() {
            rows.resize(facts, position + 1);
        }
        if !part.is_whole() {
            let weights = &from.weights[..];
            let row = RowPart {
                experts: &from.experts[at * row_bytes..(at + 1) * row_bytes],
                weights: facts.weights.then(|| &weights[at * row_ids..(at + 1) * row_ids]),
                token_id: from.token_ids[at],
                phase: Phase::Prefill as u8,
                step: from.steps[at],
                time_ns: from.times[at],
            };
            return self.keep_part(facts, part, position, &row);
        }
        self.present += usize::from(rows.phases[position] == MISSING);
        rows.experts[position * row_bytes..(position + 1) * row_bytes]
            .copy_from_slice(&from.experts[at * row_bytes..(at + 1) * row_bytes]);
        if facts.weights {
            rows.weights[position * row_ids..(position + 1) * row_ids]
                .copy_from_slice(&from.weights[at * row_ids..(at + 1) * row_ids]);
        }
        rows.token_ids[position] = from.token_ids[at];
        rows.phases[position] = Phase::Prefill as u8;
        rows.steps[position] = from.steps[at];
        rows.times[position] = from.times[at];
    }

    fn summary(&self) -> Summary {
        let (request, tokens) = (self.id.clone(), self.tokens());
        let (state, prompt_tokens) = (self.state, self.prompt_tokens);
        Summary { request, state, prompt_tokens, tokens, missing: self.missing(), arena: self.arena }
    }
}

/// End of the consecutive positions that begin at `row`.
fn end_of_run(positions: &[u32], row: usize, end: usize) -> usize {
    let steps = positions[row..end].windows(2);
    row + 1 + steps.take_while(|pair| pair[0].checked_add(1) == Some(pair[1])).count()
}

/// Fixed cost of a request beyond its rows, about.
const REQUEST_BYTES: usize = 512;
/// Ids of requests that were removed for want of memory; older ones are forgotten.
const MAX_EVICTED_IDS: usize = 65_536;

/// Requests and their rows.
pub(super) struct Store {
    budget: usize,
    /// Bytes of one row and all that is kept with it.
    row_bytes: usize,
    bytes: usize,
    /// Of these, what KV slots take.
    reserved: usize,
    requests: SlotMap<Key, Request>,
    /// By the id that it goes by here.
    by_id: HashMap<String, Key>,
    /// By replica of the model, and the id that this one gives it.
    told: HashMap<u32, HashMap<String, Key>>,
    /// Every request that is held, oldest first; finished ones are looked for from the front.
    order: VecDeque<Key>,
    evicted: VecDeque<String>,
    pub evicted_requests: u64,
    /// Rows that came for a request that is no longer held, or that alone would exceed the budget.
    pub unkept_rows: u64,
}

impl Store {
    pub fn new(facts: &Facts, budget: usize) -> Self {
        Self {
            budget,
            row_bytes: RequestRows::row_bytes(facts),
            bytes: 0,
            reserved: 0,
            requests: SlotMap::with_key(),
            by_id: HashMap::new(),
            told: HashMap::new(),
            order: VecDeque::new(),
            evicted: VecDeque::new(),
            evicted_requests: 0,
            unkept_rows: 0,
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The key of a span's request: the one known, or a new one. A known id with another number is another request,
    /// which takes the place of the earlier; from another replica it is another request too, and gets `#2`, `#3`, ...
    /// appended.
    pub fn key_of(&mut self, replica: u32, arena: usize, span: &Span) -> Option<Key> {
        if span.number == 0 {
            return None;
        }
        if let Some(key) = self.find(replica, &span.request) {
            let held = &mut self.requests[key];
            // Another arena's rows under the same id are the same request, seen by another stage.
            if held.arena != arena || held.number == span.number {
                held.prompt_tokens = held.prompt_tokens.max(span.prompt_tokens);
                return Some(key);
            }
            self.remove(key);
        }
        self.bytes += REQUEST_BYTES;
        let again = (2..).map(|use_| format!("{}#{use_}", span.request));
        let mut ids = std::iter::once(span.request.clone()).chain(again);
        let id = ids.find(|id| !self.by_id.contains_key(id)).expect("there is no end of them");
        let key = self.requests.insert(Request {
            id: id.clone(),
            told: span.request.clone(),
            replica,
            arena,
            number: span.number,
            state: State::Running,
            prompt_tokens: span.prompt_tokens,
            num_positions: None,
            present: 0,
            rows: RequestRows::default(),
        });
        self.by_id.insert(id, key);
        self.told.entry(replica).or_default().insert(span.request.clone(), key);
        self.order.push_back(key);
        self.make_room(key);
        Some(key)
    }

    /// The request that a replica knows by this id.
    fn find(&self, replica: u32, told: &str) -> Option<Key> {
        self.told.get(&replica)?.get(told).copied()
    }

    /// Keep rows `range` of a step for a request. `facts`: of the whole model; `part`: what the step has of it.
    pub fn add(&mut self, facts: &Facts, part: &Part, key: Key, step: &Step<'_>, range: Range<usize>, phase: Phase) {
        let Some(request) = self.requests.get_mut(key) else {
            self.unkept_rows += range.len() as u64;
            return;
        };
        let before = request.rows.bytes();
        let mut row = range.start;
        while row < range.end {
            let mut run = row..end_of_run(step.positions, row, range.end);
            row = run.end;
            let first = step.positions[run.start] as usize;
            // Positions past the request's end are void.
            let void = (first + run.len()).saturating_sub(request.num_positions.unwrap_or(usize::MAX));
            run.end -= void.min(run.len());
            // A position far ahead must not take the memory of all others; twice is what a growing Vec may take.
            if (first + run.len()).saturating_mul(2 * self.row_bytes) > self.budget {
                self.unkept_rows += run.len() as u64;
            } else if !run.is_empty() {
                request.keep(facts, part, step, run, phase);
            }
        }
        self.bytes = self.bytes + request.rows.bytes() - before;
        self.make_room(key);
    }

    /// Keep the rows that stand in these slots, as a request's first ones; unknown ones stay missing.
    pub fn add_prefix(&mut self, facts: &Facts, part: &Part, key: Key, slots: &Slots, kv_slots: &[u32]) {
        let Some(request) = self.requests.get_mut(key) else {
            self.unkept_rows += kv_slots.len() as u64;
            return;
        };
        if kv_slots.len().saturating_mul(2 * self.row_bytes) > self.budget {
            self.unkept_rows += kv_slots.len() as u64;
            return;
        }
        let before = request.rows.bytes();
        let counting = request.num_positions.unwrap_or(usize::MAX);
        for (position, &slot) in kv_slots.iter().enumerate().take(counting) {
            if let Some(at) = slots.find(slot) {
                request.keep_copy(facts, part, position, slots.rows(), at);
            }
        }
        self.bytes = self.bytes + request.rows.bytes() - before;
        self.make_room(key);
    }

    /// Count what the slots take: it is part of the budget.
    pub fn reserve(&mut self, bytes: usize) {
        self.bytes = self.bytes + bytes - self.reserved;
        self.reserved = bytes;
    }

    /// Bytes that the rows of KV slots may take: half of the budget.
    pub fn slot_budget(&self) -> usize {
        self.budget / 2
    }

    pub fn finish(&mut self, replica: u32, arena: usize, end: &End) {
        let Some(key) = self.find(replica, &end.request) else {
            return;
        };
        let request = &mut self.requests[key];
        if request.arena == arena && request.number != end.number {
            return;
        }
        let before = request.rows.bytes();
        let positions = end.num_positions as usize;
        request.state = match end.outcome {
            Outcome::Finished => State::Finished,
            Outcome::Aborted => State::Aborted,
        };
        request.num_positions = Some(positions);
        let len = request.rows.len().min(positions);
        request.rows.truncate(len);
        request.present = request.rows.phases.iter().filter(|&&phase| phase != MISSING).count();
        request.rows.shrink();
        self.bytes = self.bytes + request.rows.bytes() - before;
    }

    /// The engine is gone: nothing that runs will end any more.
    pub fn abort_running(&mut self, arena: usize) {
        for request in self.requests.values_mut().filter(|r| r.arena == arena && r.state == State::Running) {
            request.state = State::Aborted;
        }
    }

    pub fn summaries(&self) -> Vec<Summary> {
        self.order.iter().filter_map(|&key| self.requests.get(key)).map(Request::summary).collect()
    }

    /// Positions, of all requests held, whose row is not.
    pub fn missing_rows(&self) -> u64 {
        self.requests.values().map(|request| request.missing() as u64).sum()
    }

    /// A request's rows, filled up with missing ones to the positions whose forward ran. None if it is not held, or if
    /// so many are missing that they alone would exceed the budget.
    pub fn rows(&self, facts: &Facts, request: &str) -> Option<RequestRows> {
        let request = &self.requests[*self.by_id.get(request)?];
        if request.missing().saturating_mul(self.row_bytes) > self.budget {
            return None;
        }
        let mut rows = request.rows.clone();
        rows.resize(facts, request.tokens());
        if facts.other_stages > 0 {
            let row_bytes = facts.row_bytes();
            for position in (0..rows.len()).filter(|&at| rows.phases[at] == MISSING && rows.stages[at] != 0) {
                rows.experts[position * row_bytes..][..row_bytes].fill(0); // of some stages alone
            }
        }
        Some(rows)
    }

    pub fn was_evicted(&self, request: &str) -> bool {
        self.evicted.iter().any(|id| id == request)
    }

    /// Remove requests until the budget is kept: finished ones first, the oldest first, `newest` last.
    fn make_room(&mut self, newest: Key) {
        while self.bytes > self.budget && self.order.len() > 1 {
            let ended = |key: &&Key| **key != newest && self.requests[**key].state != State::Running;
            let victim = self.order.iter().find(ended).or_else(|| self.order.iter().find(|key| **key != newest));
            let Some(&victim) = victim else { return };
            let id = self.remove(victim);
            self.evicted_requests += 1;
            self.evicted.push_back(id);
            if self.evicted.len() > MAX_EVICTED_IDS {
                self.evicted.pop_front();
            }
        }
    }

    fn remove(&mut self, key: Key) -> String {
        let request = self.requests.remove(key).expect("keys in `order` are held");
        self.bytes -= REQUEST_BYTES + request.rows.bytes();
        self.by_id.remove(&request.id);
        if let Some(told) = self.told.get_mut(&request.replica) {
            told.remove(&request.told);
        }
        // Nearly always the first.
        if let Some(at) = self.order.iter().position(|&held| held == key) {
            self.order.remove(at);
        }
        request.id
    }
}

impl RequestRows {
    fn truncate(&mut self, len: usize) {
        let n = self.len().max(1);
        let (row_bytes, row_ids) = (self.experts.len() / n, self.weights.len() / n);
        self.experts.truncate(len * row_bytes);
        self.weights.truncate(len * row_ids);
        self.token_ids.truncate(len);
        self.phases.truncate(len);
        self.steps.truncate(len);
        self.times.truncate(len);
        self.stages.truncate(len);
    }
}
