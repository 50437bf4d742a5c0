//! Recorders: killed at the worst moments, their successors lose nothing and write nothing twice.

mod common;

use common::{Engine, Process, Row, decode_step, facts, folder, publisher, role, say, wait_for, watchdog};
use expert_lens_arena::collector::{ArenaId, Block, RowStream};
use expert_lens_arena::{Mode, OnFull, Phase, Producer, open};
use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

const STEPS: u64 = 8_000;
const PART_ROWS: usize = 1_500;

fn engine() -> Engine {
    Engine::new(&facts(128, true), 7, 12, 60)
}

/// One durable part: which record it ends with, then its rows.
fn part(block: &Block) -> String {
    let mut text = String::new();
    let range = block.ranges[0];
    let (arena, row_bytes, row_ids) = (range.arena, 6, 6);
    text += &format!("{} {} {} ", arena.rank, arena.producer.pid, arena.producer.start_time);
    text += &format!("{} {} {}\n", arena.created_ns, range.first, range.last);
    for i in 0..block.len() {
        let number = block.ids[block.requests[i] as usize].strip_prefix("request ").unwrap();
        let experts = &block.experts[i * row_bytes..(i + 1) * row_bytes];
        let weights = &block.weights[i * row_ids..(i + 1) * row_ids];
        let (position, token_id, phase) = (block.positions[i], block.token_ids[i], block.phases[i]);
        text += &format!("{number} {position} {phase} {token_id} {experts:?} {weights:?}\n");
    }
    text
}

fn parts(directory: &Path) -> Vec<String> {
    let mut paths: Vec<_> = fs::read_dir(directory.join("parts")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "part"));
    paths.sort();
    paths.iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// The last durable record, as a recorder finds it in its own parts.
fn durable(parts: &[String]) -> Vec<(ArenaId, u64)> {
    let read = |part: &String| {
        let head: Vec<u64> = part.lines().next().unwrap().split(' ').map(|word| word.parse().unwrap()).collect();
        let producer = Producer { pid: head[1] as u32, start_time: head[2] };
        (ArenaId { rank: head[0] as u32, producer, created_ns: head[3] }, head[5])
    };
    parts.last().map(read).into_iter().collect()
}

fn kill_self() -> ! {
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
    unreachable!("killed");
}

/// Record, and die once `parts_before` new parts are durable: 0 before the next is written, 1 in the middle of it, 2 when
/// it is durable but not released, 3 never.
fn record(directory: &Path, death: u64, parts_before: u64) {
    let before = parts(directory);
    let mut stream = RowStream::open(directory.join("captures"), "test", &durable(&before)).unwrap();
    assert_eq!(stream.skipped_records(), 0);
    say("attached");
    for number in 0.. {
        let block = stream.take(PART_ROWS, Duration::from_secs(5)).unwrap();
        let over = stream.is_over();
        assert_eq!((block.corrupt, block.unattributed), (0, 0));
        let dies = number == parts_before;
        if dies && death == 0 {
            kill_self();
        }
        if !block.is_empty() {
            let (text, name) = (part(&block), format!("{:06}", before.len() as u64 + number));
            let unfinished = directory.join("parts").join(format!("{name}.unfinished"));
            if dies && death == 1 {
                fs::write(&unfinished, &text[..text.len() / 2]).unwrap();
                kill_self();
            }
            fs::write(&unfinished, text).unwrap();
            fs::rename(&unfinished, directory.join("parts").join(format!("{name}.part"))).unwrap();
        }
        if dies && death == 2 {
            kill_self();
        }
        stream.release();
        if over {
            return;
        }
    }
}

#[test]
fn recorders_killed_at_any_moment_lose_nothing_and_write_nothing_twice() {
    watchdog(Duration::from_secs(80));
    let root = folder();
    fs::create_dir(root.path().join("parts")).unwrap();
    let mut writer = Process::start("publish", root.path(), 0);
    writer.hear();
    // Nine recorders die, each at another moment; the last one records to the end.
    for (number, death) in [0, 1, 2, 2, 1, 0, 1, 2, 0, 3].into_iter().enumerate() {
        let mut recorder = Process::start("record", root.path(), death * 10 + number as u64 % 3);
        recorder.hear();
        if number == 0 {
            fs::write(root.path().join("go"), "").unwrap();
        }
        if death == 3 {
            recorder.join();
        } else {
            assert_eq!(recorder.wait().code(), None, "killed by a signal");
        }
    }
    writer.join();
    let (mut engine, mut expected) = (engine(), Vec::new());
    (0..STEPS).for_each(|_| expected.extend(engine.forward().rows));
    let parts = parts(root.path());
    let found: Vec<&str> = parts.iter().flat_map(|part| part.lines().skip(1)).collect();
    assert_eq!(found.iter().collect::<HashSet<_>>().len(), found.len(), "no row twice");
    assert_eq!(found.len(), expected.len(), "no row lost");
    for (line, Row { number, position, phase, token_id, experts, weights }) in found.iter().zip(expected) {
        assert_eq!(*line, format!("{number} {position} {} {token_id} {experts:?} {weights:?}", phase as u8));
    }
    // Each part goes on where the one before it ended.
    let head =
        |part: &String| part.lines().next().unwrap().rsplit(' ').map(|w| w.parse().unwrap()).collect::<Vec<u64>>();
    let ranges: Vec<(u64, u64)> = parts.iter().map(head).map(|head| (head[1], head[0])).collect();
    assert!(ranges.windows(2).all(|pair| pair[0].1 + 1 == pair[1].0), "{ranges:?}");
}

#[test]
fn a_successor_that_comes_too_late_says_how_much_is_gone() {
    let root = folder();
    let mut publisher = publisher(root.path(), 64 << 10, &facts(8, false), OnFull::Drop);
    let mut stream = RowStream::open(root.path().into(), "test", &[]).unwrap();
    (0..10).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
    let block = stream.take(10, Duration::from_secs(5)).unwrap();
    let range = block.ranges[0];
    assert_eq!((block.len(), range.first, range.last), (10, 0, 9));
    drop(stream);
    (10..5000).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
    let oldest = open(publisher.path(), Mode::Lossy).unwrap().tail();
    let mut stream = RowStream::open(root.path().into(), "test", &[(range.arena, range.last)]).unwrap();
    assert_eq!(stream.skipped_records(), oldest - 10);
    let (mut next, mut unattributed) = (oldest, 0);
    while next < 5000 {
        let block = stream.take(100_000, Duration::from_millis(50)).unwrap();
        stream.release();
        assert_eq!(block.ranges[0].first, next);
        // The oldest rows may be of a batch that is gone: no row is written that nobody can name.
        assert!(block.unattributed == 0 || next == oldest);
        unattributed += block.unattributed;
        let first = next + block.unattributed;
        next = block.ranges[0].last + 1;
        assert_eq!(block.positions, (first as u32..next as u32).collect::<Vec<_>>());
        for (i, &position) in block.positions.iter().enumerate() {
            let expected = Row::of(publisher.facts(), 1, position, Phase::Decode);
            assert_eq!(block.experts[i * 6..i * 6 + 6], expected.experts);
        }
    }
    assert!(unattributed < 112 / 14, "{unattributed} of 112 rows");
    // A resume point past the end, as of a file of another machine's clock, is the end.
    let stream = RowStream::open(root.path().into(), "test", &[(range.arena, u64::MAX)]).unwrap();
    assert_eq!(stream.skipped_records(), 0);
}

#[test]
fn a_stream_holds_what_it_gave_out_until_told_that_it_is_durable() {
    let root = folder();
    let mut publisher = publisher(root.path(), 64 << 10, &facts(8, false), OnFull::Drop);
    let mut stream = RowStream::open(root.path().into(), "test", &[]).unwrap();
    (0..100).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
    let mut rows = 0;
    while rows < 100 {
        rows += stream.take(1000, Duration::from_millis(10)).unwrap().len();
    }
    assert_eq!(rows, 100);
    // Given out, not released: a second look finds it all.
    let dropped = (100..).find(|&position| decode_step(&mut publisher, 1, position) > 0).unwrap();
    let mut lossy = open(publisher.path(), Mode::Lossy).unwrap();
    assert_eq!(lossy.tail(), 0);
    assert!(lossy.poll().unwrap().is_some());
    // A quarter of the ring is given out early, though more rows were asked for and there is time.
    let began = std::time::Instant::now();
    let early = stream.take(1_000_000, Duration::from_secs(30)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5) && early.len() + rows >= 28);
    stream.release();
    assert_eq!(decode_step(&mut publisher, 1, dropped), 0);
    assert_eq!(stream.dropped_rows(), 1);
}

#[test]
fn a_stopped_stream_ends_at_what_is_published_by_then() {
    let root = folder();
    let mut publisher = publisher(root.path(), 1 << 20, &facts(8, false), OnFull::Drop);
    let mut stream = RowStream::open(root.path().into(), "test", &[]).unwrap();
    (0..50).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
    let stop = stream.stop_flag();
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let block = stream.take(1_000_000, Duration::from_secs(30)).unwrap();
    assert!(stream.is_over());
    assert_eq!(block.len(), 50);
    (50..60).for_each(|position| assert_eq!(decode_step(&mut publisher, 1, position), 0));
    assert!(stream.take(1_000_000, Duration::from_secs(30)).unwrap().is_empty());
}

#[test]
#[ignore = "runs in child processes only"]
fn child() {
    let Some((role, folder, argument)) = role() else { return };
    if role == "record" {
        return record(&folder, argument / 10, argument % 10);
    }
    // Large enough to hold everything while no recorder lives.
    let mut engine = engine();
    let mut publisher = publisher(&folder.join("captures"), 16 << 20, &engine.facts, OnFull::Drop);
    say("ready");
    wait_for(20, "go", || folder.join("go").exists().then_some(()));
    for step in 0..STEPS {
        assert_eq!(engine.forward().publish(&mut publisher), 0);
        if step % 8 == 0 {
            std::thread::sleep(Duration::from_micros(500));
        }
    }
    // Ends when the last recorder has it all.
    publisher.close();
    let mut reader = open(publisher.path(), Mode::Lossy).unwrap();
    while reader.poll().unwrap().is_some() {}
    assert_eq!((reader.tail(), reader.cursor()), (0, reader.head()), "nothing was given away");
    // The file goes with the publisher; a recorder must find it until the last one has come.
    std::mem::forget(publisher);
}
