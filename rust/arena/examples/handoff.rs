//! What the handoff costs: from a publish to a reader in another process, for the writer, for an idle reader, and for the
//! collector. Each figure is one JSON line, with its bar where there is one.
//!
//! `cargo run --release -p expert-lens-arena --example handoff`

use expert_lens_arena::collector::{Collector, Options, Pace, Waiter};
use expert_lens_arena::{Facts, Mode, OnFull, Phase, Publisher, Record, Rows, Span, find, open};
use rustix::time::{ClockId, clock_gettime};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const ARENA_BYTES: usize = 256 << 20;
const CAPTURE: &str = "handoff";

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, directory, count, periods_us @ ..] = &arguments[..]
        && role == "publish"
    {
        let periods_us = periods_us.iter().map(|period| period.parse()).collect::<std::result::Result<Vec<_>, _>>()?;
        return publish_at_a_pace(Path::new(directory), count.parse()?, &periods_us);
    }
    machine(1000, 4000);
    let early = [vec![8000; 19], vec![1000]].concat();
    for (name, periods_us, count) in [
        ("published to visible in another process, a record a ms", &[1000][..], 4000),
        ("the same, a record in 10 ms", &[10_000], 500),
        ("the same, a record in 8 ms, and of 20 one after one", &early, 600),
    ] {
        visible(name, periods_us, count)?;
    }
    visible_in_collector(1000, 4000)?;
    idle_reader()?;
    for rows in [1, 64] {
        writer_cost(rows)?;
    }
    collector_throughput()
}

fn folder() -> Result<tempfile::TempDir> {
    let alone = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    Ok(tempfile::Builder::new().prefix("expert-lens-").permissions(alone).tempdir_in("/dev/shm")?)
}

/// Rows of [48, 8] out of 128 experts.
fn facts() -> Facts {
    Facts { layers: (0..48).collect(), num_experts: 128, top_k: 8, ..Facts::default() }
}

fn publisher(directory: &Path) -> Result<Publisher> {
    Ok(Publisher::create(directory, CAPTURE, ARENA_BYTES, &facts(), OnFull::Drop)?)
}

/// A decode batch: so many requests, a row each.
struct Decode {
    experts: Vec<u8>,
    token_ids: Vec<u32>,
    positions: Vec<u32>,
}

impl Decode {
    fn begin(publisher: &mut Publisher, rows: u32) -> Result<Self> {
        let span = |row: u32| Span {
            number: u64::from(row) + 1,
            request: format!("request {row}"),
            first_row: row,
            rows: 1,
            prompt_tokens: 1,
            phase: Phase::Decode,
        };
        publisher.set_batch((0..rows).map(span).collect())?;
        let experts = (0..rows as usize * publisher.facts().row_bytes()).map(|i| (i * 7 % 128) as u8).collect();
        Ok(Self { experts, token_ids: (0..rows).collect(), positions: vec![0; rows as usize] })
    }

    fn publish(&mut self, publisher: &mut Publisher) -> Result<()> {
        let Self { experts, token_ids, positions } = self;
        publisher.publish(&Rows { experts, token_ids: Some(token_ids), positions, kv_slots: None, weights: None })?;
        positions.iter_mut().for_each(|position| *position += 1);
        Ok(())
    }
}

/// The child's part: one row a record, in time; before each one of the periods, in turn.
fn publish_at_a_pace(directory: &Path, count: usize, periods_us: &[u64]) -> Result<()> {
    let mut publisher = publisher(directory)?;
    let mut decode = Decode::begin(&mut publisher, 1)?;
    while !directory.join("go").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    for &period_us in periods_us.iter().cycle().take(count) {
        std::thread::sleep(Duration::from_micros(period_us));
        decode.publish(&mut publisher)?;
    }
    Ok(())
}

/// Start the publishing child, and wait for its arena.
fn start(directory: &Path, periods_us: &[u64], count: u64) -> Result<Child> {
    let child = Command::new(std::env::current_exe()?)
        .arg("publish")
        .arg(directory)
        .arg(count.to_string())
        .args(periods_us.iter().map(u64::to_string))
        .spawn()?;
    while find(directory, CAPTURE).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(child)
}

fn go(directory: &Path) -> Result<()> {
    Ok(std::fs::write(directory.join("go"), "")?)
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos() as u64)
}

/// CPU time of this process so far, in seconds.
fn cpu_s() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// What the machine itself adds: how late a thread that only sleeps, as a reader does when a record is due, would see a
/// record a period.
fn machine(period_us: u64, count: u64) {
    let _exact = Waiter::new(Pace::PROMPT); // for its short sleeps, which the kernel would stretch
    let (mut figures, began) = (Vec::new(), Instant::now());
    while figures.len() < count as usize {
        std::thread::sleep(Pace::PROMPT.active);
        let now = began.elapsed().as_secs_f64() * 1e6;
        let due = |figures: &Vec<f64>| ((figures.len() + 1) as u64 * period_us) as f64;
        while due(&figures) <= now {
            figures.push(now - due(&figures));
        }
    }
    figures.truncate(count as usize);
    report("what the machine's own sleep adds, a record a ms", "us", &mut figures, "");
}

/// From the moment that a publish begins until a reader in another process, looking at the prompt pace, has the record.
fn visible(name: &str, periods_us: &[u64], count: u64) -> Result<()> {
    let folder = folder()?;
    let mut child = start(folder.path(), periods_us, count)?;
    let mut reader = open(&find(folder.path(), CAPTURE)?[0], Mode::Lossless)?;
    go(folder.path())?;
    let mut waiter = Waiter::new(Pace::PROMPT);
    let mut figures = Vec::new();
    let (began, cpu) = (Instant::now(), cpu_s());
    while figures.len() < count as usize {
        let mut came = false;
        while let Some(record) = reader.poll()? {
            if let Record::Step(step) = record {
                figures.push((now_ns() - step.time_ns) as f64 * 1e-3);
            }
            reader.release(reader.cursor());
            came = true;
        }
        waiter.wait(came);
    }
    let share = (cpu_s() - cpu) / began.elapsed().as_secs_f64();
    child.wait()?;
    report(
        name,
        "us",
        &mut figures,
        &format!(", \"reader_cpu_share\": {share:.3}, \"bar\": \"median <= 50, p99 <= 1000\""),
    );
    Ok(())
}

/// The same until the collector has counted the rows, as it says itself, asked now and then.
fn visible_in_collector(period_us: u64, count: u64) -> Result<()> {
    let folder = folder()?;
    let mut child = start(folder.path(), &[period_us], count)?;
    let collector = collector(folder.path())?;
    go(folder.path())?;
    let (mut figures, mut last) = (Vec::new(), 0);
    while collector.tokens() < count {
        std::thread::sleep(Duration::from_micros(1700));
        if collector.tokens() > last {
            last = collector.tokens();
            figures.push(collector.stats().lag_s * 1e6);
        }
    }
    child.wait()?;
    report("published to counted, a record a ms", "us", &mut figures, ", \"bar\": \"median <= 50, p99 <= 1000\"");
    Ok(())
}

fn collector(directory: &Path) -> Result<Collector> {
    let directory = directory.into();
    let options = Options { directory, mode: Mode::Lossless, memory: 1 << 30, history: 16_384, pace: Pace::PROMPT };
    Ok(Collector::open(CAPTURE, options)?)
}

/// CPU that a collector takes while nothing comes.
fn idle_reader() -> Result<()> {
    let folder = folder()?;
    let mut child = start(folder.path(), &[1_000_000], 8)?;
    let _collector = collector(folder.path())?;
    std::thread::sleep(Duration::from_millis(500));
    let mut figures = Vec::new();
    for _ in 0..5 {
        let (began, cpu) = (Instant::now(), cpu_s());
        std::thread::sleep(Duration::from_secs(1));
        figures.push((cpu_s() - cpu) / began.elapsed().as_secs_f64() * 100.0);
    }
    child.kill()?;
    child.wait()?;
    report("CPU of an idle reader", "% of a core", &mut figures, ", \"bar\": \"<= 1\"");
    Ok(())
}

/// What a publish takes of the engine's thread, once the ring has gone round and old records must be given away.
fn writer_cost(rows: u32) -> Result<()> {
    let folder = folder()?;
    let mut publisher = publisher(folder.path())?;
    let _reader = open(publisher.path(), Mode::Lossy)?;
    let mut decode = Decode::begin(&mut publisher, rows)?;
    let record_bytes = rows as usize * (facts().row_bytes() + 8);
    for _ in 0..ARENA_BYTES / record_bytes {
        decode.publish(&mut publisher)?;
    }
    let mut figures = Vec::new();
    for _ in 0..20_000 {
        let began = Instant::now();
        decode.publish(&mut publisher)?;
        figures.push(began.elapsed().as_nanos() as f64);
    }
    report(&format!("writer alone, publish of [{rows}, 48, 8]"), "ns", &mut figures, "");
    Ok(())
}

/// Tokens that the collector takes into counts and request rows in a second: decode steps of 64 requests.
fn collector_throughput() -> Result<()> {
    let folder = folder()?;
    let mut figures = Vec::new();
    let mut cpu_share = 0.0;
    for _ in 0..5 {
        let mut publisher = publisher(folder.path())?;
        let mut decode = Decode::begin(&mut publisher, 64)?;
        let tokens = 64 * 4000;
        for _ in 0..tokens / 64 {
            decode.publish(&mut publisher)?;
        }
        let (began, cpu) = (Instant::now(), cpu_s());
        let collector = collector(folder.path())?;
        while collector.tokens() < tokens {
            std::thread::sleep(Duration::from_micros(500));
        }
        let seconds = began.elapsed().as_secs_f64();
        figures.push(tokens as f64 / seconds);
        cpu_share = (cpu_s() - cpu) / seconds;
        assert_eq!((collector.stats().unattributed_tokens, collector.requests().len()), (0, 64));
    }
    report(
        "collector, [n, 48, 8] into counts and rows",
        "tokens/s",
        &mut figures,
        &format!(", \"cores\": {cpu_share:.2}, \"bar\": \">= 100000\""),
    );
    Ok(())
}

fn report(name: &str, unit: &str, figures: &mut [f64], more: &str) {
    figures.sort_by(f64::total_cmp);
    let at = |share: f64| figures[((figures.len() - 1) as f64 * share).round() as usize];
    println!(
        "{{\"name\": \"{name}\", \"unit\": \"{unit}\", \"median\": {:.2}, \"spread\": [{:.2}, {:.2}], \"p99\": {:.2}, \"max\": {:.2}, \
         \"n\": {}{more}}}",
        at(0.5),
        at(0.25),
        at(0.75),
        at(0.99),
        at(1.0),
        figures.len(),
    );
}
