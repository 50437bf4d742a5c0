//! What the integration tests share: an engine whose every byte is known, child processes, and a watchdog.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

use expert_lens_arena::{End, Facts, OnFull, Outcome, Phase, Publisher, Reader, Rows, Span, Step};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A private folder in real shared memory.
pub fn folder() -> tempfile::TempDir {
    let alone = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    tempfile::Builder::new().prefix("expert-lens-test-").permissions(alone).tempdir_in("/dev/shm").unwrap()
}

/// Slots of the small model's cache.
pub const KV_SLOTS: u32 = 4096;

/// Facts of a small model: L = 3, K = 2.
pub fn facts(num_experts: u32, weights: bool) -> Facts {
    let name = |name: &str| name.to_owned();
    let (engine, engine_version, model) = (name("test"), name("1.0"), name("tiny"));
    let (layers, kv_slots) = (vec![1, 2, 5], KV_SLOTS);
    Facts { layers, num_experts, top_k: 2, weights, kv_slots, rank: 0, other_stages: 0, engine, engine_version, model }
}

pub fn publisher(directory: &Path, bytes: usize, facts: &Facts, on_full: OnFull) -> Publisher {
    Publisher::create(directory, "test", bytes, facts, on_full).unwrap()
}

/// A well-mixed number from three (splitmix64).
pub fn mix(a: u64, b: u64, c: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ b.rotate_left(24) ^ c.rotate_left(48);
    for multiplier in [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
        x = (x ^ (x >> 30)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(multiplier);
    }
    x ^ (x >> 31)
}

/// What one row must hold, whoever reads it: everything follows from the request's number and the position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub number: u64,
    pub position: u32,
    pub phase: Phase,
    pub token_id: u32,
    pub experts: Vec<u8>,
    pub weights: Vec<u16>,
}

impl Row {
    pub fn of(facts: &Facts, number: u64, position: u32, phase: Phase) -> Self {
        let value = |i: usize| mix(number, u64::from(position), i as u64);
        let ids = (0..facts.ids_per_row()).map(|i| (value(i) % u64::from(facts.num_experts)) as u16);
        let experts = if facts.id_bytes() == 1 {
            ids.map(|id| id as u8).collect()
        } else {
            ids.flat_map(u16::to_ne_bytes).collect()
        };
        let weights =
            if facts.weights { (0..facts.ids_per_row()).map(|i| (value(i) >> 20) as u16).collect() } else { vec![] };
        Self { number, position, phase, token_id: value(7777) as u32, experts, weights }
    }

    /// Where the engine keeps this row's token.
    pub fn kv_slot(&self) -> u32 {
        mix(self.number, u64::from(self.position), 8888) as u32 % KV_SLOTS
    }
}

/// One forward of the engine.
#[derive(Clone, Debug, Default)]
pub struct Forward {
    pub spans: Vec<Span>,
    /// Whether the spans differ from the forward's before.
    pub changed: bool,
    pub rows: Vec<Row>,
    /// Requests that end after it.
    pub ends: Vec<End>,
}

#[derive(Clone)]
struct Running {
    number: u64,
    position: u32,
    prompt: u32,
    length: u32,
}

/// An engine that makes everything up from a seed: run twice, it does the same twice.
#[derive(Clone)]
pub struct Engine {
    pub facts: Facts,
    seed: u64,
    step: u64,
    max_running: usize,
    max_prompt: u32,
    running: Vec<Running>,
    next_number: u64,
    decoding: bool,
}

impl Engine {
    pub fn new(facts: &Facts, seed: u64, max_running: usize, max_prompt: u32) -> Self {
        let facts = facts.clone();
        Self { facts, seed, step: 0, max_running, max_prompt, running: Vec::new(), next_number: 1, decoding: false }
    }

    fn random(&self, what: u64, below: u64) -> u64 {
        mix(self.seed, self.step, what) % below
    }

    pub fn forward(&mut self) -> Forward {
        self.step += 1;
        let joins = self.running.is_empty() || (self.running.len() < self.max_running && self.random(1, 4) == 0);
        if joins {
            let prompt = 1 + self.random(2, u64::from(self.max_prompt)) as u32;
            let length = prompt + self.random(3, 12) as u32;
            self.running.push(Running { number: self.next_number, position: 0, prompt, length });
            self.next_number += 1;
        }
        let mut forward = Forward { changed: joins || !self.decoding, ..Forward::default() };
        self.decoding = !joins;
        for request in &mut self.running {
            let (phase, count) =
                if request.position == 0 { (Phase::Prefill, request.prompt) } else { (Phase::Decode, 1) };
            forward.spans.push(Span {
                number: request.number,
                request: format!("request {}", request.number),
                first_row: forward.rows.len() as u32,
                rows: count,
                prompt_tokens: request.prompt,
                phase,
            });
            let positions = request.position..request.position + count;
            forward.rows.extend(positions.map(|position| Row::of(&self.facts, request.number, position, phase)));
            request.position += count;
        }
        let ended = |request: &Running| request.position >= request.length;
        forward.ends = self.running.iter().filter(|request| ended(request)).map(end_of).collect();
        self.running.retain(|request| !ended(request));
        self.decoding &= forward.ends.is_empty();
        forward
    }
}

fn end_of(request: &Running) -> End {
    let outcome = if request.number.is_multiple_of(3) { Outcome::Aborted } else { Outcome::Finished };
    End {
        number: request.number,
        request: format!("request {}", request.number),
        num_positions: request.length,
        outcome,
    }
}

impl Forward {
    /// Publish it; gives the rows dropped.
    pub fn publish(&self, publisher: &mut Publisher) -> usize {
        if self.changed {
            publisher.set_batch(self.spans.clone()).unwrap();
        }
        let dropped = self.publish_rows(publisher);
        for end in &self.ends {
            publisher.finish(end).unwrap();
        }
        dropped
    }

    fn publish_rows(&self, publisher: &mut Publisher) -> usize {
        let experts: Vec<u8> = self.rows.iter().flat_map(|row| row.experts.clone()).collect();
        let token_ids: Vec<u32> = self.rows.iter().map(|row| row.token_id).collect();
        let positions: Vec<u32> = self.rows.iter().map(|row| row.position).collect();
        let kv_slots: Vec<u32> = self.rows.iter().map(Row::kv_slot).collect();
        let weights: Vec<u16> = self.rows.iter().flat_map(|row| row.weights.clone()).collect();
        let weights = publisher.facts().weights.then_some(&weights[..]);
        let (token_ids, kv_slots) = (Some(&token_ids[..]), Some(&kv_slots[..]));
        let rows = Rows { experts: &experts, token_ids, positions: &positions, kv_slots, weights };
        let published = publisher.publish(&rows).unwrap();
        assert_eq!(published.rows + published.dropped, self.rows.len());
        published.dropped
    }
}

/// A decode step of one request that begins at position 0: rows of known content.
pub fn decode_step(publisher: &mut Publisher, number: u64, position: u32) -> usize {
    let facts = publisher.facts().clone();
    let phase = if position == 0 { Phase::Prefill } else { Phase::Decode };
    let span = Span { number, request: format!("request {number}"), first_row: 0, rows: 1, prompt_tokens: 1, phase };
    let rows = vec![Row::of(&facts, number, position, phase)];
    Forward { spans: vec![span], changed: position < 2, rows, ends: vec![] }.publish(publisher)
}

/// A step's rows as a reader sees them; every row must be one of a request.
pub fn rows_of(facts: &Facts, step: &Step<'_>) -> Vec<Row> {
    let spans = step.batch.expect("a step whose batch is known");
    let mut rows = Vec::new();
    for span in spans.iter() {
        for row in span.first_row as usize..(span.first_row + span.rows) as usize {
            let (row_bytes, row_ids) = (facts.row_bytes(), facts.ids_per_row());
            rows.push(Row {
                number: span.number,
                position: step.positions[row],
                phase: span.phase,
                token_id: step.token_ids.expect("token ids")[row],
                experts: step.experts[row * row_bytes..(row + 1) * row_bytes].to_vec(),
                weights: step.weights.map_or(vec![], |w| w[row * row_ids..(row + 1) * row_ids].to_vec()),
            });
            let known: &Row = rows.last().expect("pushed above");
            assert_eq!(step.kv_slots.expect("KV slots")[row], known.kv_slot());
        }
    }
    assert_eq!(rows.len(), step.rows, "every row belongs to a request");
    rows
}

/// Poll until a record comes, at most `seconds`.
pub fn wait_for<T>(seconds: u64, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: nothing within {seconds} s");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Release everything that a reader has read.
pub fn release<M: expert_lens_arena::Memory>(reader: &mut Reader<M>) {
    reader.release(reader.cursor());
}

/// A child process: this test binary again, in the test named `child`, killed when dropped.
pub struct Process {
    child: Child,
    output: BufReader<ChildStdout>,
}

const ROLE: &str = "EXPERT_LENS_TEST_ROLE";
const FOLDER: &str = "EXPERT_LENS_TEST_FOLDER";
const ARGUMENT: &str = "EXPERT_LENS_TEST_ARGUMENT";

impl Process {
    pub fn start(role: &str, folder: &Path, argument: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .env(FOLDER, folder)
            .env(ARGUMENT, argument.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What the child says next with [`say`]; panics when it ends without.
    pub fn hear(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the child ended: {:?}", self.child.wait());
            // The test harness writes lines of its own, and no line end after a test's name.
            if let Some((_, said)) = line.split_once("say: ") {
                return said.trim_end().to_owned();
            }
        }
    }

    /// SIGKILL, and wait until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Wait for it to end, in whatever order.
    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Wait for it to end in good order.
    pub fn join(mut self) {
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "the child failed, {status}: {rest}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a child: tell the parent.
pub fn say(what: impl std::fmt::Display) {
    println!("say: {what}");
}

/// In a child: sleep until killed, or until the parent is long gone.
pub fn stay() {
    std::thread::sleep(Duration::from_secs(60));
}

/// In a child: the role it was started in, the folder, and the argument. None where the test harness runs ignored tests.
pub fn role() -> Option<(String, std::path::PathBuf, u64)> {
    let role = std::env::var(ROLE).ok()?;
    watchdog(Duration::from_secs(60));
    let argument = std::env::var(ARGUMENT).unwrap().parse().unwrap();
    Some((role, std::env::var_os(FOLDER).unwrap().into(), argument))
}

/// End the process if it still runs after `limit`: a hang is a failed test.
pub fn watchdog(limit: Duration) {
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        eprintln!("still running after {limit:?}");
        std::process::abort();
    });
}
