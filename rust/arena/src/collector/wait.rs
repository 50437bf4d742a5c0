//! How a reader waits for records without a lock or a signal: often while they come, seldom when they do not.

use std::time::{Duration, Instant};

/// How soon a reader looks again.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between looks while records come.
    pub active: Duration,
    /// Between looks when none has come for a while.
    pub idle: Duration,
}

impl Pace {
    /// For a reader in another process: sees a record within tens of microseconds, and the first after a while within four
    /// milliseconds. A look costs 10 to 25 us of CPU, nearly all of it the sleep's: 250 a second are less than 1 % of a core.
    pub const PROMPT: Self = Self { active: Duration::from_micros(20), idle: Duration::from_millis(4) };
    /// For a reader that shares its processor with the engine: a picture a frame is enough.
    pub const CALM: Self = Self { active: Duration::from_millis(4), idle: Duration::from_millis(20) };
}

/// Records count as coming for this long after the last.
const ACTIVE_FOR: Duration = Duration::from_millis(100);

/// Waits between looks.
#[derive(Debug)]
pub struct Waiter {
    pace: Pace,
    last_record: Instant,
}

impl Waiter {
    /// For the calling thread: a short pace makes its sleeps exact.
    #[must_use]
    pub fn new(pace: Pace) -> Self {
        // The kernel may add its slack to a short sleep: 50 us unless told otherwise (prctl(2), PR_SET_TIMERSLACK).
        if pace.active < Duration::from_millis(1) {
            let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1000));
        }
        Self { pace, last_record: Instant::now() }
    }

    /// Sleep until the next look; `came`: the last one found records.
    pub fn wait(&mut self, came: bool) {
        if came {
            self.last_record = Instant::now();
        }
        let active = came || self.last_record.elapsed() < ACTIVE_FOR;
        std::thread::sleep(if active { self.pace.active } else { self.pace.idle });
    }
}
