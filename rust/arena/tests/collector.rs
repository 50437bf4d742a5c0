//! The collector: what it counts and keeps is what a plain count over the same rows gives.

mod common;

use common::{Row, decode_step, facts, folder, publisher, wait_for};
use expert_lens_arena::collector::{Collector, MISSING, NO_TOKEN, Options, Pace, State};
use expert_lens_arena::{End, Error, Facts, Mode, OnFull, Outcome, Phase, Publisher, Rows, Span};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

const HISTORY: usize = 40;
const PHASES: [Option<Phase>; 3] = [None, Some(Phase::Prefill), Some(Phase::Decode)];

fn open(directory: &Path, memory: usize) -> Result<Collector, Error> {
    let directory = directory.into();
    Collector::open("test", Options { directory, mode: Mode::Lossless, memory, history: HISTORY, pace: Pace::PROMPT })
}

fn sync(collector: &Collector) {
    assert!(collector.sync(Duration::from_secs(10)));
}

/// One thing that an engine does.
#[derive(Clone, Debug)]
enum Action {
    /// A forward: for each span, whose, how many rows, how many positions are skipped before them, how many rows of
    /// nobody stand before it, and the phase.
    Forward { spans: Vec<(u8, u8, u8, u8, bool)>, token_ids: bool },
    /// A request goes back some positions, as after a retraction.
    Back(u8, u32),
    /// A request ends, with some positions cut off.
    End(u8, u32),
    /// Another request takes its id.
    Anew(u8),
}

fn action() -> impl Strategy<Value = Action> {
    let span = (
        0..5u8,
        0..6u8,
        prop_oneof![4 => Just(0u8), 1 => 0..4u8],
        prop_oneof![4 => Just(0u8), 1 => 0..3u8],
        any::<bool>(),
    );
    prop_oneof![
        8 => (proptest::collection::vec(span, 0..5), any::<bool>())
            .prop_map(|(spans, token_ids)| Action::Forward { spans, token_ids }),
        1 => (0..4u8, 0..5u32).prop_map(|(request, by)| Action::Back(request, by)),
        1 => (0..4u8, 0..4u32).prop_map(|(request, cut)| Action::End(request, cut)),
        1 => (0..4u8).prop_map(Action::Anew),
    ]
}

/// What a request must look like.
#[derive(Clone, Debug, Default)]
struct Expected {
    number: u64,
    rows: BTreeMap<u32, (Row, bool, u64)>,
    end: Option<(u32, Outcome)>,
}

/// The engine's side of a request.
#[derive(Clone, Debug)]
struct Request {
    number: u64,
    position: u32,
}

/// Does what it is told, and keeps the plain count beside it.
struct Model {
    facts: Facts,
    requests: Vec<Request>,
    next_number: u64,
    steps: u64,
    all: Vec<(Option<Phase>, Row)>,
    unattributed: u64,
    held: BTreeMap<String, Expected>,
}

fn name(request: usize) -> String {
    format!("request {request}")
}

impl Model {
    fn new(facts: &Facts) -> Self {
        let requests = (1..5).map(|number| Request { number, position: 0 }).collect();
        let facts = facts.clone();
        Self { facts, requests, next_number: 5, steps: 0, all: vec![], unattributed: 0, held: BTreeMap::new() }
    }

    fn act(&mut self, publisher: &mut Publisher, action: &Action) {
        match action {
            Action::Forward { spans, token_ids } => self.forward(publisher, spans, *token_ids),
            Action::Back(request, by) => {
                let request = &mut self.requests[*request as usize];
                request.position = request.position.saturating_sub(*by);
            }
            Action::End(request, cut) => {
                let Request { number, position } = self.requests[*request as usize];
                let outcome = if *cut == 1 { Outcome::Aborted } else { Outcome::Finished };
                let num_positions = position.saturating_sub(*cut);
                publisher.finish(&End { number, request: name(*request as usize), num_positions, outcome }).unwrap();
                // An end of a number that the id is no longer, or not yet, known by is not this request's.
                let held = self.held.get_mut(&name(*request as usize));
                if let Some(held) = held.filter(|held| held.number == number) {
                    held.end = Some((num_positions, outcome));
                    held.rows.retain(|&position, _| position < num_positions);
                }
            }
            Action::Anew(request) => {
                self.requests[*request as usize] = Request { number: self.next_number, position: 0 };
                self.next_number += 1;
                // The collector hears of it with its first span.
            }
        }
    }

    fn forward(&mut self, publisher: &mut Publisher, parts: &[(u8, u8, u8, u8, bool)], token_ids: bool) {
        let (mut spans, mut rows) = (Vec::<Span>::new(), Vec::<(Option<u8>, Option<Phase>, Row)>::new());
        for &(whose, count, skip, nobodys, decode) in parts {
            // Each request once a forward.
            if whose < 4 && spans.iter().any(|span| span.request == name(whose as usize)) {
                continue;
            }
            for _ in 0..nobodys {
                rows.push((None, None, Row::of(&self.facts, 0, rows.len() as u32, Phase::Prefill)));
            }
            let phase = if decode { Phase::Decode } else { Phase::Prefill };
            let (number, request, position) = match self.requests.get_mut(whose as usize) {
                Some(request) => {
                    let first = request.position + u32::from(skip);
                    request.position = first + u32::from(count);
                    (request.number, name(whose as usize), first)
                }
                None => (0, String::new(), 0),
            };
            let (first_row, rows_of_it) = (rows.len() as u32, u32::from(count));
            spans.push(Span { number, request, first_row, rows: rows_of_it, prompt_tokens: 7, phase });
            for position in position..position + rows_of_it {
                let owner = (number > 0).then_some(whose);
                rows.push((owner, Some(phase), Row::of(&self.facts, number, position, phase)));
            }
        }
        publisher.set_batch(spans.clone()).unwrap();
        let bytes: Vec<u8> = rows.iter().flat_map(|(_, _, row)| row.experts.clone()).collect();
        let weights: Vec<u16> = rows.iter().flat_map(|(_, _, row)| row.weights.clone()).collect();
        let ids: Vec<u32> = rows.iter().map(|(_, _, row)| row.token_id).collect();
        let positions: Vec<u32> = rows.iter().map(|(_, _, row)| row.position).collect();
        let published = publisher.publish(&Rows {
            experts: &bytes,
            token_ids: token_ids.then_some(&ids),
            positions: &positions,
            kv_slots: None,
            weights: self.facts.weights.then_some(&weights),
        });
        assert_eq!(published.unwrap().dropped, 0);
        for span in spans.iter().filter(|span| span.number > 0) {
            // Another number under a known id is another request.
            if self.held.get(&span.request).is_none_or(|held| held.number != span.number) {
                let expected = Expected { number: span.number, ..Expected::default() };
                self.held.insert(span.request.clone(), expected);
            }
        }
        for (owner, phase, row) in rows {
            match owner {
                Some(request) => {
                    let held = self.held.get_mut(&name(request as usize)).unwrap();
                    if held.end.is_none_or(|(end, _)| row.position < end) {
                        held.rows.insert(row.position, (row.clone(), token_ids, self.steps));
                    }
                }
                None => self.unattributed += 1,
            }
            self.all.push((phase, row));
        }
        self.steps += 1;
    }

    fn ids(&self, row: &Row) -> Vec<usize> {
        if self.facts.id_bytes() == 1 {
            row.experts.iter().map(|&id| id as usize).collect()
        } else {
            row.experts.chunks(2).map(|id| u16::from_ne_bytes([id[0], id[1]]) as usize).collect()
        }
    }

    fn counts<'a>(&self, rows: impl Iterator<Item = &'a (Option<Phase>, Row)>) -> Vec<u64> {
        let num_experts = self.facts.num_experts as usize;
        let mut counts = vec![0; self.facts.layers.len() * num_experts];
        for (_, row) in rows {
            for (i, id) in self.ids(row).into_iter().enumerate() {
                counts[i / self.facts.top_k as usize * num_experts + id] += 1;
            }
        }
        counts
    }

    fn check(&self, collector: &Collector) {
        let of = |phase: Option<Phase>| move |(row, _): &&(Option<Phase>, Row)| phase.is_none() || *row == phase;
        for phase in PHASES {
            assert_eq!(collector.counts(phase, None).unwrap(), self.counts(self.all.iter().filter(of(phase))));
            let held = &self.all[self.all.len().saturating_sub(HISTORY)..];
            for last in [1, 7, HISTORY] {
                let newest = held.iter().rev().filter(of(phase)).take(last);
                assert_eq!(collector.counts(phase, Some(last as u64)).unwrap(), self.counts(newest));
            }
        }
        let stats = collector.stats();
        assert_eq!((stats.steps, stats.tokens), (self.steps, self.all.len() as u64));
        assert_eq!((stats.unattributed_tokens, stats.unkept_tokens), (self.unattributed, 0));
        assert_eq!((stats.dropped_tokens, stats.lost_tokens, stats.corrupt_records), (0, 0, 0), "{:?}", stats.corrupt);
        let requests = collector.requests();
        assert_eq!(requests.len(), self.held.len());
        let mut missing = 0;
        for summary in requests {
            let held = &self.held[&summary.request];
            let tokens = held.end.map_or_else(|| held.rows.keys().last().map_or(0, |last| last + 1), |(end, _)| end);
            assert_eq!((summary.tokens, summary.missing), (tokens as usize, tokens as usize - held.rows.len()));
            let state = match held.end {
                None => State::Running,
                Some((_, Outcome::Finished)) => State::Finished,
                Some((_, Outcome::Aborted)) => State::Aborted,
            };
            assert_eq!((summary.state, summary.prompt_tokens), (state, 7));
            missing += summary.missing as u64;
            self.check_rows(&collector.rows(&summary.request).unwrap(), held, tokens);
        }
        assert_eq!(stats.missing_tokens, missing);
        assert!(collector.rows("nobody").is_none());
    }

    fn check_rows(&self, found: &expert_lens_arena::collector::RequestRows, held: &Expected, tokens: u32) {
        let (row_bytes, row_ids) = (self.facts.row_bytes(), self.facts.ids_per_row());
        assert_eq!(found.len(), tokens as usize);
        assert_eq!(found.experts.len(), tokens as usize * row_bytes);
        assert_eq!(found.weights.len(), if self.facts.weights { tokens as usize * row_ids } else { 0 });
        for position in 0..tokens as usize {
            let experts = &found.experts[position * row_bytes..][..row_bytes];
            let Some((row, token_id, step)) = held.rows.get(&(position as u32)) else {
                assert_eq!((found.phases[position], found.token_ids[position]), (MISSING, NO_TOKEN));
                assert!(experts.iter().all(|&byte| byte == 0));
                continue;
            };
            assert_eq!((experts, found.phases[position]), (&row.experts[..], row.phase as u8));
            assert_eq!(found.token_ids[position], if *token_id { row.token_id } else { NO_TOKEN });
            assert_eq!(found.steps[position], *step);
            assert!(found.times[position] > 0);
            if self.facts.weights {
                assert_eq!(found.weights[position * row_ids..][..row_ids], row.weights);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]
    #[test]
    fn counts_and_rows_equal_a_plain_count(
        actions in proptest::collection::vec(action(), 1..60), wide: bool, weights: bool, split: bool,
    ) {
        let root = folder();
        let facts = facts(if wide { 300 } else { 8 }, weights);
        let mut publisher = publisher(root.path(), 1 << 20, &facts, OnFull::Drop);
        // From the start, or from what is still there when half is over: all of it.
        let mut collector = (!split).then(|| open(root.path(), 1 << 30).unwrap());
        let mut model = Model::new(&facts);
        for (i, action) in actions.iter().enumerate() {
            model.act(&mut publisher, action);
            if split && i == actions.len() / 2 {
                collector = Some(open(root.path(), 1 << 30).unwrap());
            }
            if let Some(collector) = collector.as_ref().filter(|_| i % 7 == 3) {
                sync(collector);
                model.check(collector);
            }
        }
        let collector = collector.unwrap();
        sync(&collector);
        model.check(&collector);
        // What was collected stays when it is closed.
        collector.close();
        model.check(&collector);
        prop_assert!(collector.stats().ended);
    }
}

/// Finished requests of `rows` rows each.
fn run_requests(publisher: &mut Publisher, numbers: std::ops::Range<u64>, rows: u32) {
    for number in numbers {
        (0..rows).for_each(|position| assert_eq!(decode_step(publisher, number, position), 0));
        let end = End { number, request: name(number as usize), num_positions: rows, outcome: Outcome::Finished };
        publisher.finish(&end).unwrap();
    }
}

#[test]
fn the_budget_is_kept_and_what_made_room_is_counted() {
    let root = folder();
    let mut publisher = publisher(root.path(), 16 << 20, &facts(8, true), OnFull::Drop);
    let budget = 100_000;
    let collector = open(root.path(), budget).unwrap();
    // The oldest, and never finished: it makes room last.
    (0..20).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
    for numbers in [2..20, 20..100, 100..200] {
        let last = numbers.end;
        run_requests(&mut publisher, numbers, 50);
        sync(&collector);
        let (stats, requests) = (collector.stats(), collector.requests());
        assert!(stats.memory as usize <= budget, "{} bytes", stats.memory);
        assert_eq!(requests.len() as u64 + stats.evicted_requests, last - 1);
        assert_eq!((stats.missing_tokens, stats.unkept_tokens), (0, 0));
        assert_eq!(requests[0].request, "request 1");
        // The newest are held, whole and exact; the others are known to have been here.
        for number in 2..last {
            let held = number > last - requests.len() as u64;
            assert_eq!(collector.was_evicted(&name(number as usize)), !held, "request {number}");
            let rows = collector.rows(&name(number as usize));
            assert_eq!(rows.is_some(), held);
            for (position, experts) in rows.iter().flat_map(|rows| rows.experts.chunks(6).enumerate()) {
                let phase = if position == 0 { Phase::Prefill } else { Phase::Decode };
                assert_eq!(experts, Row::of(publisher.facts(), number, position as u32, phase).experts);
            }
        }
        let counted: u64 = collector.counts(None, None).unwrap().iter().sum();
        assert_eq!(counted, stats.tokens * 6, "what made room is still counted");
    }
    assert!(collector.stats().evicted_requests > 100);
}

#[test]
fn requests_without_rows_take_of_the_budget_too() {
    let root = folder();
    let mut publisher = publisher(root.path(), 1 << 20, &facts(8, false), OnFull::Drop);
    let collector = open(root.path(), 100_000).unwrap();
    let nothing = Rows { experts: &[], token_ids: None, positions: &[], kv_slots: None, weights: None };
    for number in 1..2000 {
        let span = Span {
            number,
            request: name(number as usize),
            first_row: 0,
            rows: 0,
            prompt_tokens: 0,
            phase: Phase::Decode,
        };
        publisher.set_batch(vec![span]).unwrap();
        publisher.publish(&nothing).unwrap();
        if number % 100 == 0 {
            sync(&collector);
        }
    }
    sync(&collector);
    let stats = collector.stats();
    assert!(stats.memory <= 100_000 && collector.requests().len() < 200);
    assert_eq!(stats.evicted_requests + collector.requests().len() as u64, 1999);
}

/// Publish one row of request 1 at any position.
fn row_at(publisher: &mut Publisher, position: u32) {
    let span = Span { number: 1, request: name(1), first_row: 0, rows: 1, prompt_tokens: 1, phase: Phase::Decode };
    publisher.set_batch(vec![span]).unwrap();
    let row = Row::of(publisher.facts(), 1, position, Phase::Decode);
    let rows = Rows { experts: &row.experts, token_ids: None, positions: &[position], kv_slots: None, weights: None };
    assert_eq!(publisher.publish(&rows).unwrap().dropped, 0);
}

#[test]
fn a_position_or_an_end_far_ahead_takes_no_memory() {
    let root = folder();
    let mut publisher = publisher(root.path(), 1 << 20, &facts(8, false), OnFull::Drop);
    let collector = open(root.path(), 1 << 20).unwrap();
    for position in [0, u32::MAX - 1, u32::MAX - 2, 1 << 30] {
        row_at(&mut publisher, position);
    }
    sync(&collector);
    let stats = collector.stats();
    assert_eq!((stats.tokens, stats.unkept_tokens), (4, 3));
    assert!(stats.memory < 10_000);
    let far = End { number: 1, request: name(1), num_positions: u32::MAX, outcome: Outcome::Finished };
    publisher.finish(&far).unwrap();
    sync(&collector);
    let missing = u64::from(u32::MAX) - 1;
    assert_eq!((collector.stats().missing_tokens, collector.requests()[0].missing as u64), (missing, missing));
    assert!(collector.rows(&name(1)).is_none(), "four thousand million missing rows are not made up");
}

#[test]
fn rows_past_a_requests_end_are_void_also_when_they_come_after_it() {
    let root = folder();
    let mut publisher = publisher(root.path(), 1 << 20, &facts(8, false), OnFull::Drop);
    let collector = open(root.path(), 1 << 20).unwrap();
    (0..5).for_each(|position| row_at(&mut publisher, position));
    publisher.finish(&End { number: 1, request: name(1), num_positions: 4, outcome: Outcome::Finished }).unwrap();
    (3..9).for_each(|position| row_at(&mut publisher, position));
    sync(&collector);
    let summary = &collector.requests()[0];
    assert_eq!((summary.tokens, summary.missing, collector.stats().missing_tokens), (4, 0, 0));
    assert_eq!(collector.rows(&name(1)).unwrap().len(), 4);
}

fn rank(directory: &Path, rank: u32, num_experts: u32) -> Publisher {
    let facts = Facts { rank, ..facts(num_experts, false) };
    Publisher::create(directory, "test", 1 << 20, &facts, OnFull::Drop).unwrap()
}

#[test]
fn ranks_are_read_together_and_one_that_starts_later_joins() {
    let root = folder();
    let mut first = rank(root.path(), 0, 8);
    let collector = open(root.path(), 1 << 30).unwrap();
    run_requests(&mut first, 1..4, 3);
    let mut second = rank(root.path(), 1, 8);
    wait_for(5, "the second rank", || (collector.arenas().len() == 2).then_some(()));
    run_requests(&mut second, 4..6, 3);
    // One that cannot be read is said, and harms the others nothing.
    let _third = rank(root.path(), 2, 16);
    let said = wait_for(5, "a word on the third rank", || collector.stats().corrupt);
    assert!(said.contains("rank 2 of capture 'test' has other routed layers"), "{said}");
    drop(second);
    run_requests(&mut first, 6..7, 3);
    sync(&collector);
    std::thread::sleep(Duration::from_millis(700));
    let stats = collector.stats();
    assert_eq!((stats.tokens, stats.arenas, stats.ended, stats.corrupt_records), (18, 2, false, 0));
    assert!(
        collector.requests().iter().all(|r| r.arena == usize::from([4, 5].contains(&r.request[8..].parse().unwrap())))
    );
    drop(first);
    wait_for(5, "the end", || collector.stats().ended.then_some(()));
}

#[test]
fn an_id_that_another_replica_uses_too_is_another_request() {
    let root = folder();
    let (mut first, mut second) = (rank(root.path(), 0, 8), rank(root.path(), 1, 8));
    let collector = open(root.path(), 1 << 30).unwrap();
    for (publisher, rows) in [(&mut first, 6), (&mut second, 4)] {
        run_requests(publisher, 1..2, rows);
        sync(&collector);
    }
    let held: Vec<_> = collector.requests().iter().map(|r| (r.request.clone(), r.tokens, r.arena)).collect();
    assert_eq!(held, [(name(1), 6, 0), (format!("{}#2", name(1)), 4, 1)]);
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let root = folder();
    let _publisher = publisher(root.path(), 1 << 20, &facts(8, false), OnFull::Drop);
    let with_history = |history| {
        let directory = root.path().into();
        let options = Options { directory, mode: Mode::Lossy, memory: 1 << 20, history, pace: Pace::CALM };
        Collector::open("test", options)
    };
    for history in [0, usize::MAX] {
        assert!(matches!(with_history(history), Err(Error::Invalid { .. })));
    }
    let collector = with_history(10).unwrap();
    for last in [0, 11, u64::MAX] {
        assert!(matches!(collector.counts(None, Some(last)), Err(Error::Invalid { .. })));
    }
    assert!(collector.sync(Duration::MAX), "no timeout is too long");
    let unknown = Options { directory: root.path().into(), mode: Mode::Lossy, memory: 0, history: 1, pace: Pace::CALM };
    assert!(matches!(Collector::open("other", unknown), Err(Error::CaptureNotFound { .. })));
}
