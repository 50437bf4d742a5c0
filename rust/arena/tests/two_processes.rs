//! A writer and a reader in processes of their own; either may die.

mod common;

use common::{
    Engine, Forward, Process, Row, decode_step, facts, folder, mix, publisher, release, role, rows_of, say, stay,
    wait_for, watchdog,
};
use expert_lens_arena::collector::{Collector, MISSING, Options, Pace, RowStream, State};
use expert_lens_arena::{Mapped, Mode, OnFull, Reader, Record, find, is_alive, open};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

const STEPS: u64 = 20_000;
/// How long a publisher waits for a reader before it drops: longer than any hiccup of the machine.
const PATIENCE: Duration = Duration::from_secs(20);
const SEED: u64 = 42;

fn engine(wide: bool) -> Engine {
    let facts = if wide { facts(300, true) } else { facts(128, false) };
    Engine::new(&facts, SEED, 12, 60)
}

fn arena(directory: &Path) -> Reader<Mapped> {
    open(&find(directory, "test").unwrap()[0], Mode::Lossless).unwrap()
}

fn collector(directory: &Path, mode: Mode) -> Collector {
    let options = Options { directory: directory.into(), mode, memory: 1 << 30, history: 64, pace: Pace::PROMPT };
    Collector::open("test", options).unwrap()
}

/// Let a child that waits for it go on.
fn go(directory: &Path) {
    std::fs::write(directory.join("go"), "").unwrap();
}

/// The next record, waited for.
fn next<T>(reader: &mut Reader<Mapped>, mut take: impl FnMut(Record<'_>) -> T) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(record) = reader.poll().unwrap() {
            return take(record);
        }
        assert!(Instant::now() < deadline, "no record within 20 s");
        std::thread::yield_now();
    }
}

#[test]
fn a_lossless_reader_gets_every_byte_in_order() {
    watchdog(Duration::from_secs(60));
    for wide in [false, true] {
        let root = folder();
        let mut child = Process::start("publish and wait", root.path(), u64::from(wide));
        child.hear();
        let mut reader = arena(root.path());
        go(root.path());
        let mut engine = engine(wide);
        let facts = engine.facts.clone();
        for step in 0..STEPS {
            let forward = engine.forward();
            // The step in as many parts as it has, then its ends.
            let mut rows = Vec::new();
            while rows.len() < forward.rows.len() {
                next(&mut reader, |record| match record {
                    Record::Step(part) => {
                        assert_eq!(part.step, step);
                        rows.extend(rows_of(&facts, &part));
                    }
                    other => panic!("{other:?} in step {step}"),
                });
                release(&mut reader);
            }
            assert_eq!(rows, forward.rows, "step {step}");
            for expected in forward.ends {
                next(&mut reader, |record| match record {
                    Record::End(end) => assert_eq!(end, expected),
                    Record::Prefix(prefix) => panic!("{prefix:?} where an end is"),
                    Record::Step(_) => panic!("a step before the end of {expected:?}"),
                });
                release(&mut reader);
            }
        }
        wait_for(5, "the end", || reader.ended().then_some(()));
        assert!(reader.poll().unwrap().is_none());
        assert_eq!((reader.lost_records(), reader.lost_rows(), reader.dropped_rows()), (0, 0, 0));
        child.join();
    }
}

#[test]
fn a_slow_lossy_reader_gets_what_is_right_and_counts_the_rest() {
    watchdog(Duration::from_secs(60));
    let root = folder();
    let mut child = Process::start("publish", root.path(), 1);
    child.hear();
    let mut reader = open(&find(root.path(), "test").unwrap()[0], Mode::Lossy).unwrap();
    go(root.path());
    let mut engine = engine(true);
    let facts = engine.facts.clone();
    let (mut forward, mut at, mut offset, mut last) = (engine.forward(), 0, 0, None);
    let (mut published, mut read, mut whole) = (forward.rows.len(), 0, 0);
    let mut total = None;
    let mut drained = false;
    while !drained {
        let ended = reader.ended();
        match reader.poll().unwrap() {
            None => drained = ended,
            Some(Record::End(_) | Record::Prefix(_)) => {}
            Some(Record::Step(step)) => {
                assert!(last.is_none_or(|last| last <= step.step), "steps come in order");
                while at < step.step {
                    (forward, at, offset) = (engine.forward(), at + 1, 0);
                    published += forward.rows.len();
                }
                last = Some(at);
                read += step.rows;
                let positions: Vec<u32> = forward.rows.iter().map(|row| row.position).collect();
                // Of a step in parts, the first parts may be among what was lost.
                let found = (offset..=positions.len() - step.rows)
                    .find(|&from| positions[from..from + step.rows] == *step.positions);
                let from = found.expect("rows of this step");
                if step.batch.is_some() {
                    assert_eq!(rows_of(&facts, &step), forward.rows[from..from + step.rows]);
                    whole += step.rows;
                }
                offset = from + step.rows;
            }
        }
        if total.is_none() && mix(3, reader.cursor(), 0).is_multiple_of(40) {
            std::thread::sleep(Duration::from_millis(3));
        }
        if total.is_none() && reader.ended() {
            total = Some(child.hear().parse::<usize>().unwrap());
        }
    }
    while at + 1 < STEPS {
        published += engine.forward().rows.len();
        at += 1;
    }
    assert_eq!(total, Some(published));
    assert_eq!(read as u64 + reader.lost_rows(), published as u64);
    assert!(reader.lost_records() > 0, "the reader was slow enough to lose something");
    assert!(whole * 10 > read * 9, "of {read} rows read, the requests of {whole} are known");
    child.join();
}

#[test]
fn what_a_writer_drops_for_a_slow_lossless_reader_is_counted_and_named() {
    watchdog(Duration::from_secs(60));
    let root = folder();
    let mut child = Process::start("publish", root.path(), 0);
    child.hear();
    let collector = collector(root.path(), Mode::Lossless);
    // A second reader that holds everything for a while, so that something must be dropped.
    let mut holding = arena(root.path());
    go(root.path());
    wait_for(20, "a drop", || (holding.dropped_rows() > 0).then_some(()));
    wait_for(20, "records", || holding.poll().unwrap().is_none().then_some(()));
    drop(holding);
    let total: u64 = child.hear().parse().unwrap();
    wait_for(20, "the end", || collector.stats().ended.then_some(()));
    let stats = collector.stats();
    assert!(stats.dropped_tokens > 0);
    assert_eq!((stats.tokens + stats.dropped_tokens, stats.lost_tokens), (total, 0));
    assert_eq!(stats.unattributed_tokens + stats.unkept_tokens + stats.corrupt_records, 0);
    // Every position of every request: exact, or said to be missing.
    let (mut engine, mut missing, mut lengths) = (engine(false), 0, std::collections::BTreeMap::<u64, Vec<Row>>::new());
    for _ in 0..STEPS {
        let Forward { rows, .. } = engine.forward();
        rows.into_iter().for_each(|row| lengths.entry(row.number).or_default().push(row));
    }
    for (number, rows) in lengths {
        // A request all of whose rows were dropped is not known at all.
        let Some(found) = collector.rows(&format!("request {number}")) else {
            missing += rows.len();
            continue;
        };
        for (position, row) in rows.iter().enumerate() {
            if found.phases.get(position).is_none_or(|&phase| phase == MISSING) {
                missing += 1;
                continue;
            }
            assert_eq!(found.experts[position * 6..][..6], row.experts);
            assert_eq!((found.token_ids[position], found.phases[position]), (row.token_id, row.phase as u8));
        }
    }
    assert_eq!(missing as u64, stats.dropped_tokens);
    child.join();
}

#[test]
fn a_killed_reader_is_evicted_and_the_writer_goes_on() {
    watchdog(Duration::from_secs(60));
    for on_full in [OnFull::Drop, OnFull::Wait(PATIENCE)] {
        let root = folder();
        let mut publisher = publisher(root.path(), 64 << 10, &facts(8, false), on_full);
        let mut child = Process::start("hold", root.path(), 0);
        child.hear();
        if on_full == OnFull::Drop {
            (0..).find(|&position| decode_step(&mut publisher, 1, position) > 0).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(decode_step(&mut publisher, 1, 0), 1, "while the reader lives, its space is held");
        }
        child.kill();
        let began = Instant::now();
        wait_for(5, "room", || (decode_step(&mut publisher, 1, 0) == 0).then_some(()));
        (0..5000).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        // Its entry can be taken again, and again.
        let readers: Vec<_> = (0..64).map(|_| open(publisher.path(), Mode::Lossless).unwrap()).collect();
        assert_eq!(readers.len(), 64);
    }
}

#[test]
fn a_reader_that_died_while_it_came_frees_its_entry() {
    let root = folder();
    let publisher = publisher(root.path(), 64 << 10, &facts(8, false), OnFull::Drop);
    let mut gone = std::process::Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    let first_entry = 512 * 8;
    let file = OpenOptions::new().write(true).open(publisher.path()).unwrap();
    file.write_all_at(&(1 << 63 | u64::from(gone.id())).to_ne_bytes(), first_entry).unwrap();
    // The entry of a live one is left alone.
    file.write_all_at(&(1_u64 << 63 | u64::from(std::process::id())).to_ne_bytes(), first_entry + 64).unwrap();
    let mut readers: Vec<_> = (0..62).map(|_| open(publisher.path(), Mode::Lossless).unwrap()).collect();
    readers.push(wait_for(5, "an entry", || open(publisher.path(), Mode::Lossless).ok()));
    std::thread::sleep(Duration::from_millis(250));
    assert!(open(publisher.path(), Mode::Lossless).is_err());
}

#[test]
fn what_a_killed_writer_published_stays_readable_and_its_end_is_noticed() {
    watchdog(Duration::from_secs(60));
    for attempt in 0..6 {
        let root = folder();
        let mut child = Process::start("publish forever", root.path(), 0);
        child.hear();
        let early = collector(root.path(), Mode::Lossless);
        wait_for(10, "rows", || (early.tokens() > 1000).then_some(()));
        std::thread::sleep(Duration::from_micros(mix(attempt, 1, 1) % 20_000));
        child.kill();
        if attempt % 2 == 0 {
            // Killed between taking the space of a record and publishing it: that record never comes.
            let head_at = 256 * 8;
            let path = &find(root.path(), "test").unwrap()[0];
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let mut head = [0; 8];
            file.read_exact_at(&mut head, head_at).unwrap();
            file.write_all_at(&(u64::from_ne_bytes(head) + 1).to_ne_bytes(), head_at).unwrap();
        }
        let (late, mut stream) =
            (collector(root.path(), Mode::Lossless), RowStream::open(root.path().into(), "test", &[]).unwrap());
        stream.stop_flag().store(true, Relaxed);
        let mut recorded = 0;
        while !stream.is_over() {
            recorded += stream.take(1 << 20, Duration::from_secs(5)).unwrap().len();
        }
        for collector in [&early, &late] {
            wait_for(5, "the end", || collector.stats().ended.then_some(()));
            assert!(collector.sync(Duration::ZERO), "nothing more comes");
            let stats = collector.stats();
            assert_eq!((stats.corrupt_records, stats.lost_tokens), (0, 0));
            assert!(stats.lag_s < 5.0, "{}", stats.lag_s);
            let requests = collector.requests();
            assert!(requests.iter().all(|request| request.state != State::Running));
            assert!(!requests.is_empty());
            for request in requests.iter().filter(|request| request.missing == 0) {
                let number = request.request.strip_prefix("request ").unwrap().parse().unwrap();
                let rows = collector.rows(&request.request).unwrap();
                for position in 0..request.tokens {
                    let expected =
                        Row::of(collector.facts(), number, position as u32, expert_lens_arena::Phase::Decode);
                    assert_eq!(rows.experts[position * 6..][..6], expected.experts);
                }
            }
        }
        assert_eq!(early.stats().unattributed_tokens, 0);
        assert!(early.requests().iter().all(|request| request.missing == 0), "the early reader missed nothing");
        assert_eq!(recorded as u64, late.tokens() - late.stats().unattributed_tokens);
    }
}

#[test]
fn another_process_with_the_same_id_is_not_the_publisher() {
    let root = folder();
    let mut child = Process::start("publish forever", root.path(), 0);
    child.hear();
    let producer = arena(root.path()).header().producer;
    assert_eq!(producer.pid, child.id());
    assert!(is_alive(producer));
    assert!(!is_alive(expert_lens_arena::Producer { start_time: producer.start_time + 1, ..producer }));
    child.kill();
    assert!(!is_alive(producer));
}

#[test]
#[ignore = "runs in child processes only"]
fn child() {
    let Some((role, folder, argument)) = role() else { return };
    let (wide, on_full) =
        (argument == 1, if role == "publish and wait" { OnFull::Wait(PATIENCE) } else { OnFull::Drop });
    match role.as_str() {
        "publish" | "publish and wait" => {
            let mut engine = engine(wide);
            // A ring that holds a few hundred steps, so that it goes round many times.
            let mut publisher = publisher(&folder, 256 << 10, &engine.facts, on_full);
            say("ready");
            wait_for(20, "go", || folder.join("go").exists().then_some(()));
            let mut total = 0;
            for _ in 0..STEPS {
                let forward = engine.forward();
                total += forward.rows.len();
                forward.publish(&mut publisher);
            }
            if on_full != OnFull::Drop {
                assert_eq!(publisher.dropped_rows(), 0);
            }
            // Ends that found no room are published with the next call.
            publisher.close();
            say(total);
        }
        "publish forever" => {
            let mut engine = engine(wide);
            let mut publisher = publisher(&folder, 1 << 20, &engine.facts, OnFull::Wait(PATIENCE));
            say("ready");
            loop {
                engine.forward().publish(&mut publisher);
            }
        }
        "hold" => {
            let _reader = arena(&folder);
            say("attached");
            stay();
        }
        other => panic!("no role {other}"),
    }
}
