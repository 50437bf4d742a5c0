//! Requests that begin with tokens from the engine's cache: their rows are those that were computed into its KV slots, as
//! long as every row that was written there is known.

mod common;

use common::{KV_SLOTS, Row, facts, folder, publisher};
use expert_lens_arena::collector::{Collector, MISSING, Options, Pace, RowStream};
use expert_lens_arena::{Mode, NO_POSITION, OnFull, Phase, Prefix, Publisher, Rows, Source, Span, open};
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

const SLOTS: u32 = 40;
const ARENA: usize = 64 << 10;

/// What happens: a request that goes on where `of` tokens of an earlier one stand, with so many tokens of its own; and
/// whether records are dropped before it.
type Action = (u8, u8, u8, bool);

struct Request {
    number: u64,
    slots: Vec<u32>,
    /// What a reader must know of each position.
    rows: Vec<Option<Row>>,
}

/// An engine with a cache of few slots, which it takes round robin.
struct Engine {
    publisher: Publisher,
    requests: Vec<Request>,
    next_slot: u32,
    /// What a reader must know of each slot.
    cache: HashMap<u32, Row>,
}

fn name(number: u64) -> String {
    format!("request {number}")
}

impl Engine {
    fn span(number: u64, rows: usize, phase: Phase) -> Span {
        Span { number, request: name(number), first_row: 0, rows: rows as u32, prompt_tokens: 99, phase }
    }

    fn act(&mut self, &(source, prefix, tokens, squeeze): &Action) {
        if squeeze {
            self.squeeze();
        }
        let number = self.requests.len() as u64 + 1;
        let shared: Vec<u32> = match self.requests.len() {
            0 => vec![],
            n => self.requests[source as usize % n].slots.iter().copied().take(prefix as usize).collect(),
        };
        let mut rows: Vec<Option<Row>> = shared.iter().map(|slot| self.cache.get(slot).cloned()).collect();
        if !shared.is_empty() {
            let kv_slots = Source::Host(bytemuck::cast_slice(&shared));
            let spans = [Self::span(number, shared.len(), Phase::Prefill)];
            if self.publisher.publish_prefix(&Prefix { spans: &spans, kv_slots }).unwrap().dropped > 0 {
                rows.fill(None);
                self.cache.clear();
            }
        }
        let mut slots = shared;
        for _ in 0..=tokens {
            slots.push(self.next_slot);
            self.next_slot = (self.next_slot + 1) % SLOTS;
        }
        let first = rows.len();
        rows.extend(self.forward(number, first, &slots[first..]));
        self.requests.push(Request { number, slots, rows });
    }

    /// Compute rows from position `first` into these slots; gives what a reader must know of them.
    fn forward(&mut self, number: u64, first: usize, kv_slots: &[u32]) -> Vec<Option<Row>> {
        let facts = self.publisher.facts().clone();
        let positions: Vec<u32> = (first as u32..).take(kv_slots.len()).collect();
        let rows: Vec<Row> = positions.iter().map(|&at| Row::of(&facts, number, at, Phase::Prefill)).collect();
        let experts: Vec<u8> = rows.iter().flat_map(|row| row.experts.clone()).collect();
        let token_ids: Vec<u32> = rows.iter().map(|row| row.token_id).collect();
        let weights: Vec<u16> = rows.iter().flat_map(|row| row.weights.clone()).collect();
        self.publisher.set_batch(vec![Self::span(number, rows.len(), Phase::Prefill)]).unwrap();
        let published = self.publisher.publish(&Rows {
            experts: &experts,
            token_ids: Some(&token_ids),
            positions: &positions,
            kv_slots: Some(kv_slots),
            weights: facts.weights.then_some(&weights),
        });
        if published.unwrap().dropped > 0 {
            self.cache.clear();
            return vec![None; rows.len()];
        }
        self.cache.extend(kv_slots.iter().copied().zip(rows.iter().cloned()));
        rows.into_iter().map(Some).collect()
    }

    /// Forwards of a request that nobody asks for, until one is dropped, because some reader holds the space.
    fn squeeze(&mut self) {
        let _holds = open(self.publisher.path(), Mode::Lossless).unwrap();
        let before = self.publisher.dropped_rows();
        while self.publisher.dropped_rows() == before {
            let slots: Vec<u32> = (0..64).map(|i| (self.next_slot + i) % SLOTS).collect();
            self.forward(1 << 40, 0, &slots);
        }
    }
}

/// Take what there is, as a recorder does, until nothing comes in that time.
fn record(stream: &mut RowStream, time: Duration, recorded: &mut HashMap<(String, u32), Vec<u8>>) {
    let row_bytes = stream.facts().row_bytes();
    loop {
        let block = stream.take(usize::MAX, time).unwrap();
        stream.release();
        if block.is_empty() {
            return;
        }
        for row in 0..block.len() {
            let experts = block.experts[row * row_bytes..][..row_bytes].to_vec();
            recorded.insert((block.ids[block.requests[row] as usize].clone(), block.positions[row]), experts);
        }
    }
}

fn collector(directory: &Path, memory: usize) -> Collector {
    let (mode, history, pace) = (Mode::Lossless, 64, Pace::CALM);
    Collector::open("test", Options { directory: directory.to_owned(), mode, memory, history, pace }).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, ..ProptestConfig::default() })]
    #[test]
    fn rows_from_the_cache_are_those_that_were_computed_or_missing(
        actions in proptest::collection::vec((any::<u8>(), 0..12u8, 0..9u8, prop::bool::weighted(0.1)), 1..30),
        wide: bool, weights: bool,
    ) {
        let root = folder();
        let facts = facts(if wide { 300 } else { 8 }, weights);
        let publisher = publisher(root.path(), ARENA, &facts, OnFull::Drop);
        let mut engine = Engine { publisher, requests: vec![], next_slot: 0, cache: HashMap::new() };
        let collector = collector(root.path(), 64 << 20);
        let mut stream = RowStream::open(root.path().to_owned(), "test", &[]).unwrap();
        let mut recorded = HashMap::new();
        for action in &actions {
            engine.act(action);
            // Both keep up, so that nothing is dropped but what is squeezed out.
            prop_assert!(collector.sync(Duration::from_secs(10)));
            record(&mut stream, Duration::from_millis(1), &mut recorded);
        }
        record(&mut stream, Duration::from_millis(50), &mut recorded);
        for request in &engine.requests {
            let known = request.rows.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
            let Some(mut found) = collector.rows(&name(request.number)) else {
                prop_assert_eq!(known, 0);
                continue;
            };
            prop_assert_eq!(found.len(), known);
            found.phases.resize(request.rows.len(), MISSING);
            for (position, row) in request.rows.iter().enumerate() {
                let in_file = recorded.get(&(name(request.number), position as u32));
                let Some(row) = row else {
                    prop_assert_eq!((found.phases[position], in_file), (MISSING, None));
                    continue;
                };
                let experts = &found.experts[position * facts.row_bytes()..][..facts.row_bytes()];
                prop_assert_eq!((experts, found.phases[position]), (&row.experts[..], Phase::Prefill as u8));
                prop_assert_eq!(in_file, Some(&row.experts));
                prop_assert_eq!(found.token_ids[position], row.token_id);
                if weights {
                    let row_ids = facts.ids_per_row();
                    prop_assert_eq!(&found.weights[position * row_ids..][..row_ids], &row.weights[..]);
                }
            }
        }
        prop_assert_eq!(collector.stats().unslotted_tokens, 0);
    }
}

#[test]
fn a_slot_to_which_a_row_went_that_is_none_holds_no_row_any_more() {
    let root = folder();
    let facts = facts(8, false);
    let publisher = publisher(root.path(), ARENA, &facts, OnFull::Drop);
    let mut engine = Engine { publisher, requests: vec![], next_slot: 0, cache: HashMap::new() };
    let collector = collector(root.path(), 1 << 20);
    let mut stream = RowStream::open(root.path().to_owned(), "test", &[]).unwrap();
    engine.forward(1, 0, &[3, 4, 5]);
    let experts = vec![0xff; 2 * facts.row_bytes()];
    let (positions, kv_slots) = ([NO_POSITION; 2], [4, u32::MAX]);
    engine.publisher.set_batch(vec![Engine::span(1, 2, Phase::Prefill)]).unwrap();
    engine
        .publisher
        .publish(&Rows {
            experts: &experts,
            token_ids: None,
            positions: &positions,
            kv_slots: Some(&kv_slots),
            weights: None,
        })
        .unwrap();
    let (spans, kv_slots) = ([Engine::span(2, 3, Phase::Prefill)], [3u32, 4, 5]);
    let prefix = Prefix { spans: &spans, kv_slots: Source::Host(bytemuck::cast_slice(&kv_slots)) };
    engine.publisher.publish_prefix(&prefix).unwrap();
    assert!(collector.sync(Duration::from_secs(10)));
    let there = Phase::Prefill as u8;
    assert_eq!(collector.rows(&name(2)).unwrap().phases, [there, MISSING, there]);
    let mut recorded = HashMap::new();
    record(&mut stream, Duration::from_millis(50), &mut recorded);
    let positions: Vec<u32> = (0..3).filter(|&at| recorded.contains_key(&(name(2), at))).collect();
    assert_eq!(positions, [0, 2]);
}

#[test]
fn slots_past_what_the_memory_holds_are_counted_and_their_rows_missing() {
    let root = folder();
    let facts = facts(8, false);
    let publisher = publisher(root.path(), ARENA, &facts, OnFull::Drop);
    let mut engine = Engine { publisher, requests: vec![], next_slot: 0, cache: HashMap::new() };
    let collector = collector(root.path(), 4096);
    engine.forward(1, 0, &[3, KV_SLOTS - 1, KV_SLOTS - 7]);
    let (spans, kv_slots) = ([Engine::span(2, 3, Phase::Prefill)], [KV_SLOTS - 1, 3, 7]);
    let prefix = Prefix { spans: &spans, kv_slots: Source::Host(bytemuck::cast_slice(&kv_slots)) };
    engine.publisher.publish_prefix(&prefix).unwrap();
    assert!(collector.sync(Duration::from_secs(10)));
    assert_eq!(collector.stats().unslotted_tokens, 2);
    assert_eq!(collector.rows(&name(2)).unwrap().phases, [MISSING, Phase::Prefill as u8]);
    let wrong = Prefix { spans: &spans, kv_slots: Source::Host(&[0; 8]) };
    assert!(engine.publisher.publish_prefix(&wrong).unwrap_err().to_string().contains("2 KV slots, and 3 rows need 3"));
}
