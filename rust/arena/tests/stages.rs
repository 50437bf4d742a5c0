//! Pipeline stages: a row is there once every stage has given its part of the same forward, and no row is of two.

mod common;

use common::{folder, mix};
use expert_lens_arena::collector::{ArenaId, Collector, MISSING, Options, Pace, RowStream};
use expert_lens_arena::{End, Facts, Mode, OnFull, Outcome, Phase, Prefix, Publisher, Rows, Source, Span};
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

const LAYERS: [&[u16]; 3] = [&[1, 2], &[3], &[5, 6, 7]];
const TOP_K: usize = 2;
const POSITIONS: u32 = 24;
const REQUESTS: u32 = 3;

fn facts(stage: usize, num_experts: u32, weights: bool) -> Facts {
    let (layers, kv_slots, rank) = (LAYERS[stage].to_vec(), REQUESTS * POSITIONS, stage as u32);
    Facts { layers, num_experts, top_k: TOP_K as u32, weights, kv_slots, rank, other_stages: 2, ..Facts::default() }
}

fn publishers(directory: &Path, num_experts: u32, weights: bool, stages: &[usize]) -> Vec<Publisher> {
    let create = |stage: &usize| {
        Publisher::create(directory, "staged", 1 << 20, &facts(*stage, num_experts, weights), OnFull::Drop).unwrap()
    };
    stages.iter().map(create).collect()
}

fn open(directory: &Path) -> Result<Collector, expert_lens_arena::Error> {
    let (directory, pace) = (directory.into(), Pace::PROMPT);
    Collector::open("staged", Options { directory, mode: Mode::Lossless, memory: 1 << 24, history: 10, pace })
}

/// What the model chose for a position in a forward, of all layers; another choice in each forward.
fn row(num_experts: u32, request: u32, position: u32, forward: u64) -> Vec<u16> {
    let place = u64::from(request * POSITIONS + position);
    (0..6 * TOP_K as u64).map(|i| (mix(forward, place, i) % u64::from(num_experts)) as u16).collect()
}

#[derive(Clone, Debug)]
enum Action {
    /// A forward over so many positions of requests, from there on; and which stages drop it.
    Forward(Vec<(u32, u32, u32)>, [bool; 3]),
    /// A request begins with the first positions of another from the cache.
    Prefix(u32, u32),
    /// A stage publishes what the engine has done.
    Advance(usize),
    /// The reader reads on, and what the recorder has is durable.
    Read,
    /// The recorder is killed, and another one goes on.
    Kill,
}

fn action() -> impl Strategy<Value = Action> {
    let rows = (0..REQUESTS, 0..POSITIONS - 6, 1..6u32);
    let dropped = prop_oneof![6 => Just([false; 3]), 1 => any::<[bool; 3]>()];
    prop_oneof![
        4 => (proptest::collection::vec(rows, 1..3), dropped).prop_map(|(rows, drops)| Action::Forward(rows, drops)),
        1 => (0..REQUESTS, 1..8u32).prop_map(|(request, rows)| Action::Prefix(request, rows)),
        6 => (0..3usize).prop_map(Action::Advance),
        2 => Just(Action::Read),
        1 => Just(Action::Kill),
    ]
}

/// A recorder: what is durable, and where its successor goes on.
struct Recorder {
    directory: PathBuf,
    num_experts: u32,
    stream: RowStream,
    durable: HashMap<ArenaId, u64>,
    /// Request, position, forward (steps begin at 0, forwards here at 1), and experts.
    rows: Vec<(String, u32, u64, Vec<u16>)>,
    ends: usize,
}

impl Recorder {
    fn new(directory: &Path, num_experts: u32) -> Self {
        let stream = RowStream::open(directory.into(), "staged", &[]).unwrap();
        let (directory, durable, rows) = (directory.to_owned(), HashMap::new(), vec![]);
        Self { directory, num_experts, stream, durable, rows, ends: 0 }
    }

    fn write(&mut self) {
        let block = self.stream.take(usize::MAX, Duration::ZERO).unwrap();
        let experts = ids(self.num_experts, &block.experts);
        for row in 0..block.len() {
            let request = block.ids[block.requests[row] as usize].clone();
            self.rows.push((request, block.positions[row], block.steps[row] + 1, experts[row * 12..][..12].to_vec()));
        }
        self.ends += block.ends.len();
        for range in block.ranges {
            let before = self.durable.insert(range.arena, range.last);
            assert!(
                before.is_none_or(|last| last < range.first && range.first <= range.last),
                "a record twice, or none"
            );
        }
        self.stream.release();
    }

    fn kill(&mut self) {
        let resume: Vec<_> = self.durable.iter().map(|(arena, last)| (*arena, *last)).collect();
        self.stream = RowStream::open(self.directory.clone(), "staged", &resume).unwrap();
        assert_eq!(self.stream.skipped_records(), 0);
    }
}

#[derive(Clone, Debug)]
enum Job {
    Step(u64, Vec<(u32, u32)>, Vec<Span>),
    Drop(usize),
    Prefix(Span, Vec<u32>),
}

/// Publishes one stage's part of a job.
fn run(publisher: &mut Publisher, stage: usize, num_experts: u32, weights: bool, job: &Job) {
    let first: usize = LAYERS[..stage].iter().map(|layers| layers.len() * TOP_K).sum();
    let ids = first..first + LAYERS[stage].len() * TOP_K;
    match job {
        Job::Drop(rows) => {
            publisher.drop_step(*rows);
        }
        Job::Prefix(span, slots) => {
            let kv_slots = Source::Host(bytemuck::cast_slice(slots));
            publisher.publish_prefix(&Prefix { spans: std::slice::from_ref(span), kv_slots }).unwrap();
        }
        Job::Step(forward, places, spans) => {
            publisher.set_batch(spans.clone()).unwrap();
            let chosen =
                |&(request, position): &(u32, u32)| row(num_experts, request, position, *forward)[ids.clone()].to_vec();
            let part: Vec<u16> = places.iter().flat_map(chosen).collect();
            let narrow: Vec<u8> = part.iter().map(|&id| id as u8).collect();
            let slots: Vec<u32> = places.iter().map(|(request, position)| request * POSITIONS + position).collect();
            publisher
                .publish(&Rows {
                    experts: if num_experts <= 256 { &narrow } else { bytemuck::cast_slice(&part) },
                    token_ids: Some(&slots),
                    positions: &places.iter().map(|place| place.1).collect::<Vec<_>>(),
                    kv_slots: Some(&slots),
                    weights: weights.then_some(&part),
                })
                .unwrap();
        }
    }
}

proptest! {
    #[test]
    fn rows_are_those_of_one_forward_of_all_stages(
        num_experts in prop_oneof![Just(16u32), Just(400)],
        weights: bool,
        actions in proptest::collection::vec(action(), 1..80),
    ) {
        let folder = folder();
        let mut publishers = publishers(folder.path(), num_experts, weights, &[2, 0, 1]);
        publishers.sort_by_key(|publisher| publisher.facts().rank);
        let collector = open(folder.path()).unwrap();
        let mut recorder = Recorder::new(folder.path(), num_experts);
        let mut whole: Vec<(String, u32, u64, Vec<u16>)> = Vec::new();
        prop_assert_eq!(&collector.facts().layers, &LAYERS.concat());
        let mut jobs: [VecDeque<Job>; 3] = Default::default();
        // By request and position: the newest forward over it, and whether a stage has dropped that.
        let mut newest: HashMap<(String, u32), (u32, u32, u64, bool)> = HashMap::new();
        // By stage: the forward and place whose row stands in a KV slot, if all is known.
        let mut slots: [HashMap<u32, (u32, u32, u64)>; 3] = Default::default();
        // Behind one, a stage may not know what stands in the cache.
        let mut gaps = false;
        let (mut forwards, mut beginnings, mut counted) = (0, 0, [vec![0u64; 16], vec![0; 400]].concat());
        counted.clear();
        counted.resize(6 * num_experts as usize, 0);
        for action in actions {
            match action {
                Action::Forward(mut requests, drops) => {
                    requests.sort_unstable();
                    requests.dedup_by_key(|rows| rows.0);
                    forwards += 1;
                    let (mut places, mut spans) = (vec![], vec![]);
                    for &(request, from, rows) in &requests {
                        let name = format!("r{request}");
                        let (number, first_row) = (u64::from(request) + 1, places.len() as u32);
                        spans.push(Span { number, request: name.clone(), first_row, rows, prompt_tokens: 3, phase: Phase::Decode });
                        for position in from..from + rows {
                            places.push((request, position));
                            let dropped = drops.contains(&true);
                            // Dropped by all, nobody knows of it.
                            if drops != [true; 3] {
                                newest.insert((name.clone(), position), (request, position, forwards, dropped));
                            }
                        }
                    }
                    if drops == [false; 3] {
                        whole.extend(places.iter().map(|&(request, position)| {
                            let chosen = row(num_experts, request, position, forwards);
                            (format!("r{request}"), position, forwards, chosen)
                        }));
                    } else {
                        gaps = true;
                    }
                    for stage in 0..3 {
                        if drops[stage] {
                            slots[stage].clear();
                            jobs[stage].push_back(Job::Drop(places.len()));
                            continue;
                        }
                        for &(request, position) in &places {
                            slots[stage].insert(request * POSITIONS + position, (request, position, forwards));
                            let first: usize = LAYERS[..stage].iter().map(|layers| layers.len()).sum();
                            for (i, &id) in row(num_experts, request, position, forwards).iter().enumerate() {
                                let layer = i / TOP_K;
                                if (first..first + LAYERS[stage].len()).contains(&layer) {
                                    counted[layer * num_experts as usize + id as usize] += 1;
                                }
                            }
                        }
                        jobs[stage].push_back(Job::Step(forwards, places.clone(), spans.clone()));
                    }
                }
                Action::Prefix(request, rows) => {
                    beginnings += 1;
                    let name = format!("begins {beginnings}");
                    let standing: Vec<u32> = (0..rows).map(|position| request * POSITIONS + position).collect();
                    for (position, slot) in standing.iter().enumerate() {
                        let known: Vec<_> = slots.iter().map(|known| known.get(slot)).collect();
                        if let [Some(&(request, at, forward)), other, third] = known[..]
                            && [other, third].iter().all(|known| known.is_some_and(|known| known.2 == forward))
                        {
                            newest.insert((name.clone(), position as u32), (request, at, forward, false));
                        }
                    }
                    let span = Span {
                        number: 100 + beginnings,
                        request: name,
                        first_row: 0,
                        rows,
                        prompt_tokens: rows + 1,
                        phase: Phase::Prefill,
                    };
                    jobs.iter_mut().for_each(|jobs| jobs.push_back(Job::Prefix(span.clone(), standing.clone())));
                }
                Action::Advance(stage) => {
                    if let Some(job) = jobs[stage].pop_front() {
                        run(&mut publishers[stage], stage, num_experts, weights, &job);
                    }
                }
                Action::Kill => {
                    recorder.kill();
                    gaps = true;
                }
                Action::Read => {
                    recorder.write();
                    prop_assert!(collector.sync(Duration::from_secs(10)));
                    // Whatever is there by now is of one forward.
                    for summary in collector.requests() {
                        let rows = collector.rows(&summary.request).unwrap();
                        for (position, &phase) in rows.phases.iter().enumerate() {
                            let at = (summary.request.clone(), position as u32);
                            let Some(&(request, place, _, _)) = newest.get(&at) else { continue };
                            let experts = &ids(num_experts, &rows.experts)[position * 12..][..12];
                            let whole = |forward| row(num_experts, request, place, forward) == experts;
                            prop_assert!(phase == MISSING || (1..=forwards).any(whole), "a row of two forwards");
                        }
                    }
                }
            }
        }
        for (stage, jobs) in jobs.iter_mut().enumerate() {
            jobs.drain(..).for_each(|job| run(&mut publishers[stage], stage, num_experts, weights, &job));
        }
        prop_assert!(collector.sync(Duration::from_secs(10)));
        for summary in collector.requests() {
            let rows = collector.rows(&summary.request).unwrap();
            let mut missing = 0;
            for (position, &phase) in rows.phases.iter().enumerate() {
                let found = newest.get(&(summary.request.clone(), position as u32)).filter(|newest| !newest.3);
                let experts = &ids(num_experts, &rows.experts)[position * 12..][..12];
                match found {
                    None => {
                        missing += 1;
                        prop_assert_eq!(phase, MISSING);
                        prop_assert_eq!(experts, &[0; 12]);
                    }
                    Some(&(request, place, forward, _)) => {
                        let expected = row(num_experts, request, place, forward);
                        prop_assert_ne!(phase, MISSING);
                        prop_assert_eq!(experts, &expected[..]);
                        prop_assert_eq!(rows.token_ids[position], request * POSITIONS + place);
                        if weights {
                            prop_assert_eq!(&rows.weights[position * 12..][..12], &expected[..]);
                        }
                    }
                }
            }
            prop_assert_eq!(summary.missing, missing);
        }
        prop_assert_eq!(collector.counts(None, None).unwrap(), counted);

        // The recorder has each row of a forward that no stage dropped once, and beginnings from the cache.
        recorder.stream.stop_flag().store(true, Relaxed);
        while !recorder.stream.is_over() {
            recorder.write();
        }
        let (mut begun, mut recorded): (Vec<_>, Vec<_>) =
            recorder.rows.into_iter().partition(|(request, ..)| request.starts_with("begins"));
        recorded.sort();
        whole.sort();
        prop_assert_eq!(recorded, whole);
        let standing = |(request, position, ..): &(String, u32, u64, Vec<u16>)| newest.get(&(request.clone(), *position));
        for beginning in &begun {
            let &(request, place, forward, _) = standing(beginning).expect("a row that no slot holds");
            prop_assert_eq!(beginning.2, forward);
            prop_assert_eq!(&beginning.3, &row(num_experts, request, place, forward));
        }
        begun.sort();
        begun.dedup();
        let expected = newest.keys().filter(|(request, _)| request.starts_with("begins")).count();
        prop_assert!(gaps || begun.len() == expected, "{} of {expected} rows from the cache", begun.len());
    }
}

fn ids(num_experts: u32, bytes: &[u8]) -> Vec<u16> {
    if num_experts <= 256 {
        bytes.iter().map(|&id| u16::from(id)).collect()
    } else {
        bytes.chunks_exact(2).map(|id| u16::from_ne_bytes([id[0], id[1]])).collect()
    }
}

#[test]
fn tokens_and_windows_count_each_token_once() {
    let folder = folder();
    let mut publishers = publishers(folder.path(), 16, false, &[0, 1, 2]);
    let collector = open(folder.path()).unwrap();
    let span = Span { number: 1, request: "a".into(), first_row: 0, rows: 5, prompt_tokens: 5, phase: Phase::Prefill };
    let job = Job::Step(1, (0..5).map(|position| (0, position)).collect(), vec![span]);
    for (stage, publisher) in publishers.iter_mut().enumerate() {
        run(publisher, stage, 16, false, &job);
    }
    assert!(collector.sync(Duration::from_secs(10)));
    let stats = collector.stats();
    assert_eq!((stats.tokens, stats.steps, stats.arenas, stats.missing_tokens), (5, 1, 3, 0));
    let mut expected = vec![0u64; 6 * 16];
    for position in 2..5 {
        row(16, 0, position, 1).iter().enumerate().for_each(|(i, &id)| expected[i / 2 * 16 + id as usize] += 1);
    }
    assert_eq!(collector.counts(None, Some(3)).unwrap(), expected);

    let mut recorder = Recorder::new(folder.path(), 16);
    publishers[0]
        .finish(&End { number: 1, request: "a".into(), num_positions: 5, outcome: Outcome::Finished })
        .unwrap();
    publishers.clear();
    while !recorder.stream.is_over() {
        recorder.write();
    }
    assert_eq!((recorder.rows.len(), recorder.ends, recorder.durable.len()), (5, 1, 3));
}

#[test]
fn stages_that_are_not_all_there_or_not_of_one_model_are_refused() {
    let folder = folder();
    let early = publishers(folder.path(), 16, false, &[2, 0]);
    let error = open(folder.path()).err().unwrap().to_string();
    assert!(error.contains("2 of 3 pipeline stages so far"), "{error}");
    let more = publishers(folder.path(), 16, false, &[1]);
    let collector = open(folder.path()).unwrap();
    let directory = folder.path().to_owned();
    let other = Facts { rank: 7, layers: vec![2, 3], ..facts(1, 16, false) };
    let stranger = Publisher::create(&directory, "staged", 1 << 20, &other, OnFull::Drop).unwrap();
    let error = open(folder.path()).err().unwrap().to_string();
    assert!(error.contains("not those of 3 pipeline stages"), "{error}");
    drop((early, more, stranger, collector));
}

#[test]
fn a_replica_without_one_of_its_stages_keeps_no_recorder_from_its_end() {
    let folder = folder();
    let mut publishers = publishers(folder.path(), 16, false, &[0, 1, 2]);
    let other = Facts { rank: 3, ..facts(0, 16, false) };
    publishers.push(Publisher::create(folder.path(), "staged", 1 << 20, &other, OnFull::Drop).unwrap());
    let span = |number| Span {
        number,
        request: format!("of {number}"),
        first_row: 0,
        rows: 2,
        prompt_tokens: 2,
        phase: Phase::Prefill,
    };
    for (stage, publisher) in publishers.iter_mut().enumerate() {
        let job = Job::Step(1, vec![(0, 0), (0, 1)], vec![span(1 + stage as u64 / 3)]);
        run(publisher, stage % 3, 16, false, &job);
    }
    let mut recorder = Recorder::new(folder.path(), 16);
    recorder.stream.stop_flag().store(true, Relaxed);
    for _ in 0..100 {
        recorder.write();
    }
    assert!(recorder.stream.is_over());
    assert_eq!(recorder.rows.iter().map(|row| row.0.as_str()).collect::<Vec<_>>(), ["of 1", "of 1"]);
}

#[test]
fn a_forward_that_each_stage_splits_at_other_rows_is_put_together_again() {
    let folder = folder();
    let mut publishers = publishers(folder.path(), 16, false, &[0, 1, 2]);
    let mut recorder = Recorder::new(folder.path(), 16);
    let positions: Vec<u32> = (0..40_000).collect();
    let span = |number, first_row, rows| Span {
        number,
        request: format!("of {number}"),
        first_row,
        rows,
        prompt_tokens: rows,
        phase: Phase::Prefill,
    };
    for (stage, publisher) in publishers.iter_mut().enumerate() {
        publisher.set_batch(vec![span(1, 0, 25_000), span(2, 25_000, 15_000)]).unwrap();
        let experts = vec![stage as u8; positions.len() * LAYERS[stage].len() * TOP_K];
        let rows = Rows { experts: &experts, token_ids: None, positions: &positions, kv_slots: None, weights: None };
        assert_eq!(publisher.publish(&rows).unwrap().rows, positions.len());
    }
    publishers.clear();
    while !recorder.stream.is_over() {
        recorder.write();
    }
    assert_eq!((recorder.rows.len(), recorder.stream.left_out_rows()), (40_000, 0));
    assert!(recorder.rows.iter().all(|row| row.3 == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]));
    assert_eq!(recorder.rows.iter().filter(|row| row.0 == "of 2").count(), 15_000);
}

#[test]
fn what_one_stage_dropped_is_left_out_and_counted() {
    let folder = folder();
    let mut publishers = publishers(folder.path(), 16, false, &[0, 1, 2]);
    let mut recorder = Recorder::new(folder.path(), 16);
    let span = Span { number: 1, request: "a".into(), first_row: 0, rows: 2, prompt_tokens: 2, phase: Phase::Prefill };
    for (stage, publisher) in publishers.iter_mut().enumerate() {
        let told = Job::Step(1, vec![(0, 0), (0, 1)], vec![span.clone()]);
        run(publisher, stage, 16, false, if stage == 1 { &Job::Drop(2) } else { &told });
        run(publisher, stage, 16, false, &Job::Step(2, vec![(0, 2)], vec![Span { rows: 1, ..span.clone() }]));
    }
    publishers.clear();
    while !recorder.stream.is_over() {
        recorder.write();
    }
    assert_eq!((recorder.rows.len(), recorder.stream.left_out_rows()), (1, 2));
}
