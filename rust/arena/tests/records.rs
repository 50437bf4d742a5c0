//! Records: split, batched, dropped, waited for, lost; within one process.

mod common;

use common::{Engine, Forward, Row, decode_step, facts, folder, mix, publisher, release, rows_of, wait_for, watchdog};
use expert_lens_arena::collector::{Collector, MISSING, Options, Pace, State};
use expert_lens_arena::{
    End, Error, Mapped, Mode, OnFull, Outcome, Phase, Publisher, Reader, Record, Rows, Span, open,
};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

const SMALL: usize = 64 << 10;

fn span(number: u64, first_row: u32, rows: u32) -> Span {
    Span { number, request: format!("request {number}"), first_row, rows, prompt_tokens: rows, phase: Phase::Prefill }
}

fn end(number: u64, num_positions: u32) -> End {
    End { number, request: format!("request {number}"), num_positions, outcome: Outcome::Finished }
}

/// A prefill of one request of `n` rows.
fn prompt(publisher: &Publisher, number: u64, n: u32) -> Forward {
    let row = |position| Row::of(publisher.facts(), number, position, Phase::Prefill);
    Forward { spans: vec![span(number, 0, n)], changed: true, rows: (0..n).map(row).collect(), ends: vec![] }
}

/// Everything that is published, in order: rows of steps (with the step's number) and ends. Released as it is read.
fn drain(reader: &mut Reader<Mapped>) -> (Vec<(u64, Row)>, Vec<End>) {
    let facts = reader.facts().clone();
    let (mut rows, mut ends) = (Vec::new(), Vec::new());
    loop {
        match reader.poll().unwrap() {
            None => return (rows, ends),
            Some(Record::End(end)) => ends.push(end),
            Some(Record::Prefix(prefix)) => panic!("{prefix:?} where none is published"),
            Some(Record::Step(step)) => rows.extend(rows_of(&facts, &step).into_iter().map(|row| (step.step, row))),
        }
        release(reader);
    }
}

fn collector(directory: &Path, mode: Mode) -> Collector {
    let options = Options { directory: directory.into(), mode, memory: 1 << 30, history: 64, pace: Pace::PROMPT };
    Collector::open("test", options).unwrap()
}

#[test]
fn a_step_too_large_for_one_record_comes_in_parts_that_name_their_rows() {
    for (num_experts, weights) in [(8, false), (300, true)] {
        let root = folder();
        let facts = facts(num_experts, weights);
        let mut publisher = publisher(root.path(), SMALL, &facts, OnFull::Drop);
        let mut reader = open(publisher.path(), Mode::Lossless).unwrap();
        // Several requests, with rows of no span before, between and behind them.
        let spans = vec![span(1, 3, 500), span(2, 503, 1), span(3, 600, 390)];
        let n = 1000;
        let row = |i: u32| {
            let owner = spans.iter().find(|span| (span.first_row..span.first_row + span.rows).contains(&i));
            let number = owner.map_or(0, |span| span.number);
            Row::of(&facts, number, i, Phase::Prefill)
        };
        let forward = Forward { spans: spans.clone(), changed: true, rows: (0..n).map(row).collect(), ends: vec![] };
        assert_eq!(forward.publish(&mut publisher), 0);
        // A step after it must not lean on one of the parts' spans.
        assert_eq!(decode_step(&mut publisher, 9, 0), 0);

        let (mut at, mut parts) = (0, 0);
        while at < n as usize {
            let Some(Record::Step(step)) = reader.poll().unwrap() else { panic!("{at} of {n} rows came") };
            assert_eq!(step.step, 0);
            for (i, &position) in step.positions.iter().enumerate() {
                let expected = &forward.rows[at + i];
                let experts = &step.experts[i * facts.row_bytes()..(i + 1) * facts.row_bytes()];
                assert_eq!((position, experts), (expected.position, &expected.experts[..]));
                assert_eq!(step.token_ids.unwrap()[i], expected.token_id);
                if weights {
                    let ids = facts.ids_per_row();
                    assert_eq!(step.weights.unwrap()[i * ids..(i + 1) * ids], expected.weights);
                }
                let within = |span: &&Span| (span.first_row..span.first_row + span.rows).contains(&(i as u32));
                let number = step.batch.unwrap().iter().find(within).map_or(0, |span| span.number);
                assert_eq!(number, expected.number, "row {}", at + i);
            }
            at += step.rows;
            parts += 1;
        }
        assert_eq!(at, n as usize);
        assert!(parts >= 2, "{parts} parts");
        let (rows, _) = drain(&mut reader);
        assert_eq!(rows, [(1, Row::of(&facts, 9, 0, Phase::Prefill))]);
    }
}

#[test]
fn a_step_larger_than_the_arena_is_published_as_far_as_it_fits_and_the_rest_is_counted() {
    let root = folder();
    let mut publisher = publisher(root.path(), SMALL, &facts(8, false), OnFull::Drop);
    let reader = collector(root.path(), Mode::Lossless);
    let mut held = open(publisher.path(), Mode::Lossless).unwrap();
    let forward = prompt(&publisher, 1, 10_000);
    let dropped = forward.publish(&mut publisher);
    assert!(dropped > 0 && dropped < 10_000, "{dropped} dropped");
    assert_eq!(publisher.dropped_rows(), dropped as u64);
    drain(&mut held);
    publisher.finish(&end(1, 10_000)).unwrap();
    assert!(reader.sync(Duration::from_secs(5)));
    // What is missing is said, position by position, and what is there is exact.
    let rows = reader.rows("request 1").unwrap();
    assert_eq!(rows.len(), 10_000);
    for (position, expected) in forward.rows.iter().enumerate() {
        let found = &rows.experts[position * 6..position * 6 + 6];
        if rows.phases[position] == MISSING { assert_eq!(found, [0; 6]) } else { assert_eq!(found, expected.experts) }
    }
    assert_eq!(rows.phases.iter().filter(|&&phase| phase == MISSING).count(), dropped);
    let stats = reader.stats();
    assert_eq!((stats.dropped_tokens, stats.missing_tokens), (dropped as u64, dropped as u64));
    assert_eq!(stats.tokens + stats.dropped_tokens, 10_000);
    assert_eq!(reader.requests()[0].missing, dropped);
}

#[test]
fn a_late_reader_sees_the_recent_past_and_whose_it_was() {
    let root = folder();
    let facts = facts(8, false);
    let mut publisher = publisher(root.path(), SMALL, &facts, OnFull::Drop);
    // One batch, never changed, through more than ten times the ring.
    for position in 0..20_000 {
        assert_eq!(decode_step(&mut publisher, 1, position), 0);
    }
    let mut reader = open(publisher.path(), Mode::Lossy).unwrap();
    let oldest = reader.tail();
    assert!(oldest > 10_000);
    let (mut known, mut unknown, mut next) = (0, 0, oldest as u32);
    while let Some(record) = reader.poll().unwrap() {
        let Record::Step(step) = record else { panic!("only steps were published") };
        assert_eq!(step.positions, [next]);
        assert_eq!(step.experts, Row::of(&facts, 1, next, Phase::Decode).experts);
        match step.batch {
            None => unknown += 1,
            Some(spans) => {
                assert_eq!((spans.len(), spans[0].request.as_str()), (1, "request 1"));
                known += 1;
            }
        }
        next += 1;
    }
    assert_eq!(next, 20_000);
    assert!(known > 14 * unknown, "of {} rows, {unknown} are of an unknown request", known + unknown);
    assert_eq!((reader.lost_records(), reader.lost_rows()), (0, 0), "what went before it came is not lost");
}

#[test]
fn rows_whose_batch_is_gone_are_counted_but_under_no_phase_and_no_request() {
    let root = folder();
    let mut publisher = publisher(root.path(), SMALL, &facts(8, false), OnFull::Drop);
    (0..20_000).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
    let collector = collector(root.path(), Mode::Lossy);
    assert!(collector.sync(Duration::from_secs(5)));
    let stats = collector.stats();
    let sum = |phase| collector.counts(phase, None).unwrap().iter().sum::<u64>() / 6;
    assert_eq!(sum(None), stats.tokens);
    assert_eq!(sum(Some(Phase::Prefill)), 0);
    assert_eq!(sum(Some(Phase::Decode)), stats.tokens - stats.unattributed_tokens);
    let held = collector.rows("request 1").unwrap();
    let present = held.phases.iter().filter(|&&phase| phase != MISSING).count() as u64;
    assert_eq!(present, stats.tokens - stats.unattributed_tokens);
    assert_eq!(stats.missing_tokens, 20_000 - present);
}

#[test]
fn a_batch_is_published_when_it_changes_and_found_by_a_reader_that_comes_later() {
    let root = folder();
    let mut publisher = publisher(root.path(), 1 << 20, &facts(8, false), OnFull::Drop);
    let mut early = open(publisher.path(), Mode::Lossless).unwrap();
    for position in 0..10 {
        decode_step(&mut publisher, 1, position);
    }
    // Comes when the record with the batch is long released by others, and begins behind it.
    let mut late = open(publisher.path(), Mode::Lossy).unwrap();
    late.seek(5).unwrap();
    let Some(Record::Step(step)) = late.poll().unwrap() else { panic!("a step") };
    assert_eq!((step.step, step.batch.unwrap()[0].number), (5, 1));
    let first = std::sync::Arc::clone(step.batch.unwrap());
    let Some(Record::Step(step)) = late.poll().unwrap() else { panic!("a step") };
    assert!(std::sync::Arc::ptr_eq(&first, step.batch.unwrap()), "the same batch is one object");
    drain(&mut early);
    publisher.set_batch(vec![span(7, 0, 1)]).unwrap();
    let rows = Rows { experts: &[1, 2, 3, 4, 5, 6], token_ids: None, positions: &[0], kv_slots: None, weights: None };
    publisher.publish(&rows).unwrap();
    let Some(Record::Step(step)) = early.poll().unwrap() else { panic!("a step") };
    assert_eq!((step.batch.unwrap()[0].number, step.token_ids), (7, None));
}

#[test]
fn what_does_not_fit_is_dropped_and_counted_exactly() {
    let root = folder();
    let facts = facts(300, true);
    let mut publisher = publisher(root.path(), SMALL, &facts, OnFull::Drop);
    let mut reader = open(publisher.path(), Mode::Lossless).unwrap();
    let mut engine = Engine::new(&facts, 11, 6, 20);
    let (mut expected, mut dropped, mut dropped_steps, mut ends) = (Vec::new(), 0, 0, Vec::new());
    let (mut read, mut read_ends) = (Vec::new(), Vec::new());
    for step in 0..4000 {
        let forward = engine.forward();
        let lost = forward.publish(&mut publisher);
        ends.extend(forward.ends.iter().cloned());
        if lost == 0 {
            expected.extend(forward.rows.into_iter().map(|row| (step, row)));
        } else {
            // Not one of these steps is larger than a quarter of the ring: they go whole or not at all.
            assert_eq!(lost, forward.rows.len());
            (dropped, dropped_steps) = (dropped + lost, dropped_steps + 1);
        }
        // A reader that comes by now and then.
        if mix(1, step, 2).is_multiple_of(50) {
            let (rows, more) = drain(&mut reader);
            read.extend(rows);
            read_ends.extend(more);
        }
    }
    let (rows, more) = drain(&mut reader);
    read.extend(rows);
    read_ends.extend(more);
    assert!(dropped_steps > 100 && read.len() > 1000, "{dropped_steps} steps dropped, {} rows read", read.len());
    assert_eq!(read, expected);
    assert_eq!((publisher.dropped_rows(), publisher.dropped_records()), (dropped as u64, dropped_steps));
    assert_eq!((reader.dropped_rows(), reader.dropped_records()), (dropped as u64, dropped_steps));
    assert_eq!((publisher.steps(), reader.steps()), (4000, 4000));
    assert_eq!((reader.lost_records(), reader.lost_rows()), (0, 0));
    // Ends wait for space; none is lost.
    decode_step(&mut publisher, 1_000_000, 0);
    read_ends.extend(drain(&mut reader).1);
    assert_eq!(read_ends, ends);
    assert_eq!(publisher.lost_ends(), 0);
}

/// Publish until the first step is dropped.
fn fill(publisher: &mut Publisher, number: u64) -> u32 {
    (0..).find(|&position| decode_step(publisher, number, position) > 0).unwrap()
}

#[test]
fn ends_that_never_fit_are_counted_as_lost() {
    let root = folder();
    let mut publisher = publisher(root.path(), SMALL, &facts(8, false), OnFull::Drop);
    let reader = open(publisher.path(), Mode::Lossless).unwrap();
    fill(&mut publisher, 1);
    (0..5000).for_each(|number| publisher.finish(&end(number, 1)).unwrap());
    assert!((800..=904).contains(&publisher.lost_ends()), "{} lost: 4096 wait", publisher.lost_ends());
    let before = publisher.lost_ends();
    publisher.close();
    assert_eq!(reader.lost_ends(), before + 4096, "closing gives up those that wait");
}

#[test]
fn a_writer_told_to_wait_waits_no_longer_than_its_deadline() {
    let root = folder();
    let timeout = Duration::from_millis(200);
    let mut publisher = publisher(root.path(), SMALL, &facts(8, false), OnFull::Wait(timeout));
    let mut reader = open(publisher.path(), Mode::Lossless).unwrap();
    let began = Instant::now();
    let position = fill(&mut publisher, 1);
    assert!(began.elapsed() >= timeout);
    // A step in many parts waits once, not once a part.
    let began = Instant::now();
    let large = prompt(&publisher, 2, 2000);
    assert_eq!(large.publish(&mut publisher), 2000);
    assert!(began.elapsed() >= timeout && began.elapsed() < 3 * timeout, "{:?}", began.elapsed());
    assert_eq!(publisher.dropped_rows(), 2001);
    // With a reader that reads, nothing is dropped, and all comes in order.
    let (rows, _) = drain(&mut reader);
    assert_eq!(rows.len(), position as usize);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut rows = Vec::new();
            loop {
                let stopped = stop.load(Relaxed);
                let (more, _) = drain(&mut reader);
                rows.extend(more);
                if stopped {
                    return rows;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        for position in 0..20_000 {
            assert_eq!(decode_step(&mut publisher, 3, position), 0);
        }
        stop.store(true, Relaxed);
        let rows = reading.join().unwrap();
        assert_eq!(rows.len(), 20_000);
        assert!(rows.iter().enumerate().all(|(i, (_, row))| row.position == i as u32 && row.number == 3));
    });
}

#[test]
fn a_lossy_reader_counts_what_it_lost() {
    let root = folder();
    let facts = facts(8, false);
    let mut publisher = publisher(root.path(), SMALL, &facts, OnFull::Drop);
    let mut reader = open(publisher.path(), Mode::Lossy).unwrap();
    let mut engine = Engine::new(&facts, 5, 8, 30);
    let (mut published, mut read) = (0, 0);
    let mut of_step: HashMap<u64, Vec<Row>> = HashMap::new();
    for round in 0..40_u64 {
        for _ in 0..round * 13 {
            let forward = engine.forward();
            published += forward.rows.len();
            of_step.insert(publisher.steps(), forward.rows.clone());
            assert_eq!(forward.publish(&mut publisher), 0, "a lossy reader holds nothing back");
        }
        while let Some(record) = reader.poll().unwrap() {
            let Record::Step(step) = record else { continue };
            read += step.rows;
            // Lapped, it may have lost the batch with the rest; then nobody's rows are told, and still exact.
            if step.batch.is_some() {
                assert_eq!(rows_of(&facts, &step), of_step[&step.step]);
            }
            let positions: Vec<u32> = of_step[&step.step].iter().map(|row| row.position).collect();
            assert_eq!(step.positions, positions);
        }
        assert_eq!(read as u64 + reader.lost_rows(), published as u64);
    }
    assert!(reader.lost_rows() > 1000 && reader.lost_records() > 100);
}

#[test]
fn a_lossless_reader_loses_nothing_from_its_first_record_on() {
    watchdog(Duration::from_secs(60));
    let root = folder();
    let mut publisher = publisher(root.path(), SMALL, &facts(8, false), OnFull::Drop);
    let path = publisher.path().to_owned();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut position = 0;
            while !stop.load(Relaxed) {
                decode_step(&mut publisher, 1, position);
                position += 1;
            }
        });
        // The writer runs at full speed and gives records away all the time: to come just then is what may go wrong.
        for _ in 0..400 {
            let mut reader = open(&path, Mode::Lossless).unwrap();
            let first = reader.cursor();
            for expected in first..first + 20 {
                let step = wait_for(5, "a step", || match reader.poll().unwrap() {
                    Some(Record::Step(step)) => Some(step.step),
                    _ => None,
                });
                assert_eq!(reader.cursor(), expected + 1, "step {step}");
            }
            assert_eq!((reader.lost_records(), reader.lost_rows()), (0, 0));
        }
        stop.store(true, Relaxed);
    });
}

#[test]
fn steps_that_contradict_themselves_are_refused_and_publish_nothing() {
    let root = folder();
    let mut publisher = publisher(root.path(), SMALL, &facts(8, true), OnFull::Drop);
    let mut reader = open(publisher.path(), Mode::Lossless).unwrap();
    let weights = [0; 6];
    let good = Rows {
        experts: &[1; 6],
        token_ids: Some(&[3]),
        positions: &[0],
        kv_slots: Some(&[4]),
        weights: Some(&weights),
    };
    let bad = [
        (Rows { experts: &[1; 5], ..good }, "5 bytes of expert ids, and 1 rows need 6"),
        (Rows { token_ids: Some(&[]), ..good }, "0 token ids, and 1 rows need 1"),
        (Rows { kv_slots: Some(&[1, 2]), ..good }, "2 KV slots, and 1 rows need 1"),
        (Rows { weights: None, ..good }, "0 router weights, and 1 rows need 6"),
        (Rows { weights: Some(&[0; 7]), ..good }, "7 router weights, and 1 rows need 6"),
        (Rows { positions: &[0, 1], ..good }, "6 bytes of expert ids, and 2 rows need 12"),
    ];
    for (rows, words) in bad {
        let error = publisher.publish(&rows).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }) && error.to_string() == words, "{error}");
    }
    publisher.set_batch(vec![span(1, 0, 2)]).unwrap();
    assert!(publisher.publish(&good).unwrap_err().to_string().contains("spans end at row 2, and the step has 1"));
    for spans in [
        vec![span(1, 1, 2), span(2, 2, 1)],
        vec![Span { request: "x".repeat(256), ..span(1, 0, 1) }],
        vec![span(0, 0, 1)],
        vec![span(1, u32::MAX, 1)],
        (0..200).map(|i| span(i + 1, i as u32, 1)).collect(),
    ] {
        assert!(matches!(publisher.set_batch(spans), Err(Error::Invalid { .. })));
    }
    assert!(publisher.finish(&End { request: "x".repeat(256), ..end(1, 1) }).is_err());
    assert!(reader.poll().unwrap().is_none());
    assert_eq!(publisher.steps(), 0);
    // The batch that was stated before stays in force, and ids of the longest length work.
    let long = Span { request: "é".repeat(127) + "x", ..span(1, 0, 1) };
    publisher.set_batch(vec![long.clone()]).unwrap();
    publisher.set_batch(vec![span(0, 0, 1)]).unwrap_err();
    publisher.publish(&good).unwrap();
    let Some(Record::Step(step)) = reader.poll().unwrap() else { panic!("a step") };
    assert_eq!(step.batch.unwrap()[..], [long]);
}

#[test]
fn the_end_in_good_order_shows_and_requests_that_ran_are_aborted() {
    let root = folder();
    let mut publisher = publisher(root.path(), SMALL, &facts(8, false), OnFull::Drop);
    let collector = collector(root.path(), Mode::Lossless);
    (0..5).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
    publisher.finish(&end(1, 4)).unwrap();
    (0..3).for_each(|position| assert_eq!(decode_step(&mut publisher, 2, position), 0));
    drop(publisher);
    wait_for(5, "the end", || collector.stats().ended.then_some(()));
    let requests = collector.requests();
    let states: Vec<_> = requests.iter().map(|r| (r.state, r.tokens, r.missing)).collect();
    assert_eq!(states, [(State::Finished, 4, 0), (State::Aborted, 3, 0)]);
}

#[test]
fn an_empty_forward_and_an_empty_batch_are_fine() {
    let root = folder();
    let mut publisher = publisher(root.path(), SMALL, &facts(8, false), OnFull::Drop);
    let mut reader = open(publisher.path(), Mode::Lossless).unwrap();
    let none = Rows { experts: &[], token_ids: Some(&[]), positions: &[], kv_slots: None, weights: None };
    publisher.publish(&none).unwrap();
    let Some(Record::Step(step)) = reader.poll().unwrap() else { panic!("a step") };
    assert_eq!((step.rows, step.batch.unwrap().len()), (0, 0));
    assert!(reader.poll().unwrap().is_none());
}
