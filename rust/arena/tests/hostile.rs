//! Arenas that lie: words are overwritten at random, before and while they are read. Whatever comes is an error or bounded
//! data that is consistent in itself; never a panic, a hang, or an access out of bounds. Each test runs in a child
//! process with little memory, so that a crash is a failed test too.

mod common;

use common::{Engine, Process, decode_step, facts, folder, mix, publisher, role};
use expert_lens_arena::collector::{Collector, Options, Pace, RowStream};
use expert_lens_arena::{Error, Facts, Mapped, Mode, OnFull, Publisher, Reader, Record, Rows, Step, open};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

const SIZE: usize = 64 << 10;

/// Where the words of an arena of [`SIZE`] bytes stand, for E = 8, L = 3, K = 2: the parts of the layout.
const PARTS: [std::ops::Range<u64>; 5] = [0..48, 256..288, 512..544, 1024..1920, 1920..8192];

/// What is done to one word.
#[derive(Clone, Copy, Debug)]
enum Lie {
    Set(u64),
    Add(u64),
    Flip(u32),
    Byte(u32, u8),
}

impl Lie {
    fn told(self, word: u64) -> u64 {
        match self {
            Self::Set(value) => value,
            Self::Add(value) => word.wrapping_add(value),
            Self::Flip(bit) => word ^ 1 << bit,
            Self::Byte(at, byte) => word & !(0xff << (at * 8)) | u64::from(byte) << (at * 8),
        }
    }
}

fn lie() -> impl Strategy<Value = Lie> {
    let value = prop_oneof![Just(0), Just(u64::MAX), Just(1 << 63), Just(1 << 32), 0..300u64, any::<u64>()];
    let near = prop_oneof![1..20u64, (1..20u64).prop_map(|value| value.wrapping_neg())];
    prop_oneof![
        3 => value.prop_map(Lie::Set),
        2 => near.prop_map(Lie::Add),
        2 => (0..64u32).prop_map(Lie::Flip),
        2 => (0..8u32, any::<u8>()).prop_map(|(at, byte)| Lie::Byte(at, byte)),
    ]
}

/// A word, most often one that means something, and what is done to it.
fn overwritten() -> impl Strategy<Value = (u64, Lie)> {
    let word = prop_oneof![
        2 => PARTS[0].clone(),
        3 => prop_oneof![Just(256), Just(264), Just(272), Just(276), Just(280), PARTS[1].clone()],
        2 => PARTS[2].clone(),
        6 => PARTS[3].clone(),
        3 => PARTS[4].clone(),
    ];
    (word, lie())
}

/// What a step that was let through must be, whatever the arena says.
fn check(facts: &Facts, step: &Step<'_>) {
    assert_eq!(step.experts.len(), step.rows * facts.row_bytes());
    assert_eq!(step.positions.len(), step.rows);
    assert!(step.token_ids.is_none_or(|ids| ids.len() == step.rows));
    assert!(step.weights.is_none_or(|weights| weights.len() == step.rows * facts.ids_per_row()));
    let id_bytes = facts.id_bytes();
    let id = |id: &[u8]| if id_bytes == 1 { u32::from(id[0]) } else { u32::from(u16::from_ne_bytes([id[0], id[1]])) };
    assert!(step.experts.chunks(id_bytes).all(|bytes| id(bytes) < facts.num_experts));
    let mut next = 0;
    for span in step.batch.iter().flat_map(|spans| spans.iter()) {
        assert!(span.first_row >= next);
        next = span.first_row + span.rows;
    }
    assert!(next as usize <= step.rows);
}

/// Read until nothing comes; an arena of `SIZE` bytes has fewer than 200 records.
fn drain(reader: &mut Reader<Mapped>) {
    let facts = reader.facts().clone();
    for _ in 0..300 {
        match reader.poll() {
            Ok(None) => return,
            Ok(Some(Record::Step(step))) => check(&facts, &step),
            Ok(Some(Record::End(_) | Record::Prefix(_))) => {}
            Err(error) => assert!(matches!(error, Error::Corrupt { .. }), "{error}"),
        }
        reader.release(reader.cursor());
        assert!(reader.held_share() >= 0.0);
    }
    panic!("records without end");
}

fn options(directory: &Path) -> Options {
    Options { directory: directory.into(), mode: Mode::Lossless, memory: 1 << 20, history: 64, pace: Pace::PROMPT }
}

/// Ask everything that can be asked.
fn ask(collector: &Collector, closed: bool) {
    let stats = collector.stats();
    assert!(stats.memory <= 2 << 20, "{} bytes", stats.memory);
    for request in collector.requests() {
        let rows = collector.rows(&request.request);
        // Until it is closed, more may come between the two calls.
        assert!(rows.is_none_or(|rows| rows.len() == request.tokens || !closed));
    }
    if collector.facts().num_experts < 1000 {
        collector.counts(None, None).unwrap();
        collector.counts(None, Some(64)).unwrap();
    }
}

/// Everything that reads, on the file as it is.
fn read_all(directory: &Path) {
    let path = directory.join("test/0.arena");
    for mode in [Mode::Lossy, Mode::Lossless] {
        match open(&path, mode) {
            Ok(mut reader) => {
                for index in [3, u64::MAX, 0] {
                    match reader.seek(index) {
                        Ok(()) | Err(Error::Corrupt { .. }) => drain(&mut reader),
                        Err(error) => panic!("{error}"),
                    }
                }
                let _ = (reader.next_time_ns(), reader.has_next(), reader.dropped_rows());
            }
            Err(Error::Corrupt { .. } | Error::Version { .. } | Error::ReadersFull { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    if let Ok(collector) = Collector::open("test", options(directory)) {
        // A head that lies is never reached.
        let _ = collector.sync(Duration::from_millis(2));
        ask(&collector, false);
        collector.close();
        ask(&collector, true);
    }
    if let Ok(mut stream) = RowStream::open(directory.into(), "test", &[]) {
        let block = stream.take(1000, Duration::from_millis(1)).unwrap();
        assert_eq!(block.experts.len(), block.len() * stream.facts().row_bytes());
        assert!(block.requests.iter().all(|&index| (index as usize) < block.ids.len()));
        assert!(block.arenas.iter().all(|&index| (index as usize) < block.ranges.len()));
        stream.release();
    }
    let _ = expert_lens_arena::list(directory).unwrap();
}

/// An arena's bytes after a while of an engine's life, and its words that mean something.
fn arena_bytes(directory: &Path, seed: u64) -> Vec<u8> {
    let facts = facts(8, seed % 2 == 1);
    let mut publisher = publisher(directory, SIZE, &facts, OnFull::Drop);
    let mut engine = Engine::new(&facts, seed, 6, 30);
    for _ in 0..seed * 40 {
        engine.forward().publish(&mut publisher);
    }
    let bytes = fs::read(publisher.path()).unwrap();
    // As a killed process leaves it: the file stays.
    drop(publisher);
    bytes
}

fn overwritten_arenas_are_read(directory: &Path, cases: u32) {
    let arenas: Vec<Vec<u8>> = [1, 2, 9].iter().map(|&seed| arena_bytes(directory, seed)).collect();
    let folder = directory.join("test");
    let alone = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, alone(0o700)).unwrap();
    let strategy = (0..arenas.len(), proptest::collection::vec(overwritten(), 1..12));
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&strategy, |(arena, overwritten)| {
            let mut bytes = arenas[arena].clone();
            for (word, lie) in overwritten {
                let at = word as usize * 8..word as usize * 8 + 8;
                let before = u64::from_ne_bytes(bytes[at.clone()].try_into().unwrap());
                bytes[at].copy_from_slice(&lie.told(before).to_ne_bytes());
            }
            let path = folder.join("0.arena");
            let _ = fs::remove_file(&path);
            fs::write(&path, &bytes).unwrap();
            fs::set_permissions(&path, alone(0o600)).unwrap();
            read_all(directory);
            Ok(())
        })
        .unwrap();
}

/// A writer and every kind of reader, while another process's worth of lies is written under them.
fn arenas_are_overwritten_while_they_are_used(directory: &Path, seconds: u64) {
    let stop = AtomicBool::new(false);
    let until = Instant::now() + Duration::from_secs(seconds);
    let going = || !stop.load(Relaxed) && Instant::now() < until;
    for round in 0.. {
        if !going() {
            return;
        }
        let mut publisher = publisher(directory, SIZE, &facts(8, false), OnFull::Drop);
        let file = OpenOptions::new().read(true).write(true).open(publisher.path()).unwrap();
        let path = publisher.path().to_owned();
        let round_over = Instant::now() + Duration::from_millis(150);
        let in_round = || Instant::now() < round_over;
        std::thread::scope(|scope| {
            scope.spawn(|| publish(&mut publisher, &in_round));
            scope.spawn(|| {
                for i in 0.. {
                    if !in_round() {
                        return;
                    }
                    let random = |what| mix(round, i, what);
                    let part = &PARTS[1 + random(0) as usize % 4];
                    let word = part.start + random(1) % (part.end - part.start);
                    let value = [0, u64::MAX, random(2), random(2) % 300][random(3) as usize % 4];
                    file.write_all_at(&value.to_ne_bytes(), word * 8).unwrap();
                    if random(4) % 8 == 0 {
                        std::thread::sleep(Duration::from_micros(100));
                    }
                }
            });
            for mode in [Mode::Lossy, Mode::Lossless] {
                let path = &path;
                scope.spawn(move || {
                    while in_round() {
                        let Ok(mut reader) = open(path, mode) else { continue };
                        let facts = reader.facts().clone();
                        for _ in 0..500 {
                            if let Ok(Some(Record::Step(step))) = reader.poll() {
                                check(&facts, &step);
                            }
                            reader.release(reader.cursor());
                        }
                    }
                });
            }
            if let Ok(collector) = Collector::open("test", options(directory)) {
                while in_round() {
                    let _ = collector.sync(Duration::from_millis(5));
                    ask(&collector, false);
                }
            }
        });
    }
}

fn publish(publisher: &mut Publisher, in_round: &impl Fn() -> bool) {
    for i in 0.. {
        if !in_round() {
            return;
        }
        decode_step(publisher, 1 + i / 100, (i % 100) as u32);
        if i % 97 == 0 {
            let n = 900;
            publisher.set_batch(vec![]).unwrap();
            let (experts, positions) = (vec![1; n * 6], vec![0; n]);
            let rows =
                Rows { experts: &experts, token_ids: None, positions: &positions, kv_slots: None, weights: None };
            publisher.publish(&rows).unwrap();
        }
    }
}

#[test]
fn a_head_that_no_writer_reaches_is_refused_and_nothing_is_read_past_it() {
    const HEAD: u64 = 256;
    let root = folder();
    let publisher = publisher(root.path(), SIZE, &facts(8, false), OnFull::Drop);
    let file = OpenOptions::new().write(true).open(publisher.path()).unwrap();
    for mode in [Mode::Lossy, Mode::Lossless] {
        file.write_all_at(&0u64.to_ne_bytes(), HEAD * 8).unwrap();
        let mut reader = open(publisher.path(), mode).unwrap();
        // The number behind it is 0, as in the descriptor of a record that never was.
        file.write_all_at(&u64::MAX.to_ne_bytes(), HEAD * 8).unwrap();
        let error = reader.seek(u64::MAX).unwrap_err();
        assert!(
            matches!(error, Error::Corrupt { .. }) && error.to_string().contains("of 18446744073709551615"),
            "{error}"
        );
        drain(&mut reader);
        assert!(reader.ended() && !reader.has_next());
    }
}

#[test]
fn an_overwritten_arena_gives_errors_or_bounded_data() {
    let root = folder();
    Process::start("overwritten", root.path(), 1500).join();
}

#[test]
fn an_arena_overwritten_in_use_gives_errors_or_bounded_data_and_does_not_stop_its_writer() {
    let root = folder();
    Process::start("in use", root.path(), 4).join();
}

#[test]
#[ignore = "runs in child processes only"]
fn child() {
    let Some((role, folder, argument)) = role() else { return };
    // What an arena says must not take all memory.
    let limit = Some(4 << 30);
    rustix::process::setrlimit(
        rustix::process::Resource::As,
        rustix::process::Rlimit { current: limit, maximum: limit },
    )
    .unwrap();
    // A panic in a thread of the crate's own would end that thread only.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        if std::thread::current().name().is_some_and(|name| name.starts_with("expert-lens")) {
            std::process::abort();
        }
    }));
    match role.as_str() {
        "overwritten" => overwritten_arenas_are_read(&folder, argument as u32),
        "in use" => arenas_are_overwritten_while_they_are_used(&folder, argument),
        other => panic!("no role {other}"),
    }
}
