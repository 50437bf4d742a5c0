//! How a reader waits for records without a lock or a signal: often when one is due, seldom while none is expected.

use std::time::{Duration, Instant};

/// How soon a reader looks again.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Between looks when a record is due.
    pub active: Duration,
    /// Between looks when none has come for a while.
    pub idle: Duration,
}

impl Pace {
    /// For a reader in another process: sees a record within tens of microseconds, one that comes earlier than those before
    /// within half a millisecond, and the first after a while within four. A look costs 10 to 25 us of CPU, nearly all of it
    /// the sleep's: 250 a second are less than 1 % of a core.
    pub const PROMPT: Self = Self { active: Duration::from_micros(20), idle: Duration::from_millis(4) };
    /// For a reader that shares its processor with the engine: a picture a frame is enough.
    pub const CALM: Self = Self { active: Duration::from_millis(4), idle: Duration::from_millis(20) };
}

/// Records count as coming for this long after the last.
const ACTIVE_FOR: Duration = Duration::from_millis(100);
/// Between looks, at most, while records come and none is due: what one that comes early waits for.
const EARLY: Duration = Duration::from_micros(400);

/// When the next record is due: not long before the shortest of the last gaps between records has passed. Steps of an engine
/// that decodes take alike.
#[derive(Debug, Default)]
struct Rhythm {
    gaps: [Duration; 16],
    noted: usize,
}

impl Rhythm {
    fn note(&mut self, gap: Duration) {
        self.gaps[self.noted % self.gaps.len()] = gap;
        self.noted += 1;
    }

    /// How long to wait for the next look, `since` the last record.
    fn pause(&self, pace: Pace, since: Duration) -> Duration {
        if since >= ACTIVE_FOR {
            return pace.idle;
        }
        let shortest = self.gaps.iter().min().expect("there are some");
        (*shortest * 9 / 10).saturating_sub(since).clamp(pace.active, pace.active.max(EARLY))
    }
}

/// Waits between looks.
#[derive(Debug)]
pub struct Waiter {
    pace: Pace,
    rhythm: Rhythm,
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
        Self { pace, rhythm: Rhythm::default(), last_record: Instant::now() }
    }

    /// Sleep until the next look; `came`: the last one found records.
    pub fn wait(&mut self, came: bool) {
        let mut since = self.last_record.elapsed();
        if came {
            self.rhythm.note(since);
            self.last_record += since;
            since = Duration::ZERO;
        }
        std::thread::sleep(self.rhythm.pause(self.pace, since));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_gaps(gaps: &[u64]) -> Rhythm {
        let mut rhythm = Rhythm::default();
        gaps.iter().for_each(|&gap| rhythm.note(Duration::from_micros(gap)));
        rhythm
    }

    /// How long each pause is, in microseconds, from a record on until `until`.
    fn pauses(rhythm: &Rhythm, pace: Pace, until: u64) -> Vec<u64> {
        let (mut since, mut found) = (Duration::ZERO, Vec::new());
        while since < Duration::from_micros(until) {
            let pause = rhythm.pause(pace, since);
            found.push(pause.as_micros() as u64);
            since += pause;
        }
        found
    }

    #[test]
    fn looks_are_few_until_a_record_is_due_and_many_then() {
        let found = pauses(&with_gaps(&[5000; 16]), Pace::PROMPT, 5000);
        assert_eq!(found[..11], [400; 11], "4400 us");
        assert_eq!(found[11..], [vec![100], vec![20; 25]].concat(), "4500 us, and 5000");
    }

    #[test]
    fn the_shortest_gap_counts_and_is_forgotten_in_time() {
        let mut rhythm = with_gaps(&[9000; 16]);
        rhythm.note(Duration::from_micros(100));
        for _ in 0..15 {
            assert_eq!(pauses(&rhythm, Pace::PROMPT, 150)[..2], [90, 20]);
            rhythm.note(Duration::from_micros(9000));
        }
        rhythm.note(Duration::from_micros(9000));
        assert_eq!(pauses(&rhythm, Pace::PROMPT, 100), [400]);
    }

    #[test]
    fn nothing_is_expected_before_there_is_a_rhythm_and_after_a_while() {
        assert_eq!(pauses(&with_gaps(&[5000; 15]), Pace::PROMPT, 100), [20; 5]);
        let rhythm = with_gaps(&[500_000; 16]);
        assert_eq!(rhythm.pause(Pace::PROMPT, Duration::from_millis(99)), EARLY);
        assert_eq!(rhythm.pause(Pace::PROMPT, Duration::from_millis(100)), Pace::PROMPT.idle);
    }

    #[test]
    fn a_calm_reader_has_one_pace() {
        assert_eq!(pauses(&with_gaps(&[50_000; 16]), Pace::CALM, 40_000), [4000; 10]);
    }
}
