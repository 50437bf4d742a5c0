//! How often each expert was chosen: of all tokens, by phase, and of the last N.

use super::stages::Part;
use crate::batch::Phase;
use crate::error::{Error, Result};
use crate::layout::Facts;
use std::collections::VecDeque;

/// Windows that are kept up to date; the one that was asked for longest ago makes way.
const MAX_WINDOWS: usize = 4;

/// Calls `add(cell)` for each id of rows [n, L, K], where the cell is that of counts [L, E].
fn each_cell(facts: &Facts, experts: &[u8], mut add: impl FnMut(usize)) {
    let (top_k, num_experts, num_layers) = (facts.top_k as usize, facts.num_experts as usize, facts.layers.len());
    let layer_bytes = top_k * facts.id_bytes();
    for row in experts.chunks_exact(layer_bytes * num_layers) {
        for (layer, ids) in row.chunks_exact(layer_bytes).enumerate() {
            let first = layer * num_experts;
            if facts.id_bytes() == 1 {
                ids.iter().for_each(|&id| add(first + id as usize));
            } else {
                ids.chunks_exact(2).for_each(|id| add(first + u16::from_ne_bytes([id[0], id[1]]) as usize));
            }
        }
    }
}

/// Most that the rows of a history may take: what a header says must not take all memory.
const MAX_HISTORY_BYTES: usize = 4 << 30;

/// Counts u64 [L, E] of all rows: one array a phase, and one of rows whose phase is not known.
pub(super) struct Counts {
    by_phase: [Vec<u64>; 3],
}

impl Counts {
    pub fn new(facts: &Facts) -> Self {
        let zeros = || vec![0; facts.layers.len() * facts.num_experts as usize];
        Self { by_phase: [zeros(), zeros(), Vec::new()] }
    }

    /// Add rows of a part of the layers.
    pub fn add(&mut self, part: &Part, phase: Option<Phase>, experts: &[u8]) {
        let first = part.first_layer * part.facts.num_experts as usize;
        let len = self.by_phase[0].len();
        let counts = &mut self.by_phase[phase.map_or(2, |phase| phase as usize)];
        // Few captures have rows of an unknown phase, and the array may be large.
        counts.resize(len, 0);
        each_cell(&part.facts, experts, |cell| counts[first + cell] += 1);
    }

    pub fn of(&self, phase: Option<Phase>) -> Vec<u64> {
        match phase {
            Some(phase) => self.by_phase[phase as usize].clone(),
            None => {
                let [prefill, decode, unknown] = &self.by_phase;
                let mut sum: Vec<u64> = prefill.iter().zip(decode).map(|(prefill, decode)| prefill + decode).collect();
                sum.iter_mut().zip(unknown).for_each(|(sum, unknown)| *sum += unknown);
                sum
            }
        }
    }
}

/// The newest rows, and counts over the last N of them.
pub(super) struct History {
    facts: Facts,
    capacity: u64,
    row_bytes: usize,
    /// A ring: row `i` stands at `i % capacity`.
    experts: Vec<u8>,
    phases: Vec<Option<Phase>>,
    /// Rows ever added.
    end: u64,
    windows: VecDeque<Window>,
}

/// Counts over rows `begin..end` of one phase, or of both.
struct Window {
    last: u64,
    phase: Option<Phase>,
    begin: u64,
    end: u64,
    rows: u64,
    counts: Vec<u64>,
}

impl History {
    /// `facts`: of the part of the layers that it is for.
    pub fn new(facts: &Facts, capacity: usize) -> Result<Self> {
        let row_bytes = facts.row_bytes();
        let most = MAX_HISTORY_BYTES / row_bytes;
        if capacity == 0 || capacity > most {
            return Err(Error::invalid(format!(
                "a history of {capacity} rows of {row_bytes} bytes; ask for 1 to {most}"
            )));
        }
        Ok(Self {
            facts: facts.clone(),
            capacity: capacity as u64,
            row_bytes,
            experts: vec![0; capacity * row_bytes],
            phases: vec![None; capacity],
            end: 0,
            windows: VecDeque::new(),
        })
    }

    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    pub fn add(&mut self, phase: Option<Phase>, rows: &[u8]) {
        let n = rows.len() / self.row_bytes;
        // Of more rows than the ring holds, only the last would stay.
        let skipped = n.saturating_sub(self.capacity as usize);
        self.end += skipped as u64;
        for row in rows[skipped * self.row_bytes..].chunks_exact(self.row_bytes) {
            let slot = (self.end % self.capacity) as usize;
            self.experts[slot * self.row_bytes..][..self.row_bytes].copy_from_slice(row);
            self.phases[slot] = phase;
            self.end += 1;
        }
    }

    /// Counts u64 [L, E] of the last `last` rows of `phase` that the history holds.
    ///
    /// A window that is asked for again is moved on by the rows that came and went, not counted anew: the cost follows
    /// the rows, not how often a picture is drawn. Rows that went may be overwritten, so a window is counted anew when
    /// they are.
    pub fn counts(&mut self, phase: Option<Phase>, last: u64) -> Vec<u64> {
        let oldest = self.end.saturating_sub(self.capacity);
        let found = self.windows.iter().position(|window| window.last == last && window.phase == phase);
        let kept = found.and_then(|i| self.windows.remove(i)).filter(|window| window.begin >= oldest);
        let mut window = kept.unwrap_or_else(|| self.empty_window(phase, last, oldest));
        while window.end < self.end {
            let end = window.end;
            let added = self.count_row(&mut window, end, 1);
            window.end += 1;
            window.rows += added;
            while window.rows > last {
                let begin = window.begin;
                window.rows -= self.count_row(&mut window, begin, u64::MAX);
                window.begin += 1;
            }
        }
        let counts = window.counts.clone();
        self.windows.push_front(window);
        self.windows.truncate(MAX_WINDOWS);
        counts
    }

    /// A window that begins where `last` rows of the phase are left, so that none is counted in vain.
    fn empty_window(&self, phase: Option<Phase>, last: u64, oldest: u64) -> Window {
        let mut begin = self.end;
        let mut rows = 0;
        while begin > oldest && rows < last {
            begin -= 1;
            rows += u64::from(self.is_in(phase, begin));
        }
        let counts = vec![0; self.facts.layers.len() * self.facts.num_experts as usize];
        Window { last, phase, begin, end: begin, rows: 0, counts }
    }

    fn is_in(&self, phase: Option<Phase>, row: u64) -> bool {
        phase.is_none() || self.phases[(row % self.capacity) as usize] == phase
    }

    /// Add `amount` (modulo 2^64, so that u64::MAX takes one away) for each id of a row of the window's phase; gives
    /// how many rows that were, 0 or 1.
    fn count_row(&self, window: &mut Window, row: u64, amount: u64) -> u64 {
        if !self.is_in(window.phase, row) {
            return 0;
        }
        let at = (row % self.capacity) as usize * self.row_bytes;
        let counts = &mut window.counts;
        each_cell(&self.facts, &self.experts[at..at + self.row_bytes], |cell| {
            counts[cell] = counts[cell].wrapping_add(amount)
        });
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn facts(num_experts: u32) -> Facts {
        Facts { layers: vec![1, 3], num_experts, top_k: 2, ..Facts::default() }
    }

    fn bytes_of(facts: &Facts, ids: &[u16]) -> Vec<u8> {
        if facts.id_bytes() == 1 {
            ids.iter().map(|&id| id as u8).collect()
        } else {
            ids.iter().flat_map(|id| id.to_ne_bytes()).collect()
        }
    }

    proptest! {
        /// Windows moved on step by step agree with rows counted by hand.
        #[test]
        fn windows_agree_with_a_plain_count(
            wide: bool,
            steps in proptest::collection::vec((0..3u8, 0..12usize, any::<u64>()), 1..30),
        ) {
            let facts = facts(if wide { 300 } else { 9 });
            let mut history = History::new(&facts, 16).unwrap();
            let mut all: Vec<(Option<Phase>, Vec<u16>)> = Vec::new();
            for (phase, rows, seed) in steps {
                let phase = Phase::try_from(phase).ok();
                let mut ids = Vec::new();
                for row in 0..rows as u64 {
                    let id = |i: u64| ((seed ^ (row * 31 + i)).wrapping_mul(0x9e37_79b9) % u64::from(facts.num_experts)) as u16;
                    all.push((phase, (0..4).map(id).collect()));
                    ids.extend((0..4).map(id));
                }
                history.add(phase, &bytes_of(&facts, &ids));
                for (asked, last) in [(None, 5), (Some(Phase::Decode), 5), (Some(Phase::Prefill), 3), (None, 16), (None, 1)] {
                    let held = &all[all.len().saturating_sub(16)..];
                    let mut expected = vec![0; 2 * facts.num_experts as usize];
                    let chosen = held.iter().rev().filter(|(phase, _)| asked.is_none() || asked == *phase);
                    for (_, row) in chosen.take(last as usize) {
                        for (i, &id) in row.iter().enumerate() {
                            expected[i / 2 * facts.num_experts as usize + id as usize] += 1;
                        }
                    }
                    prop_assert_eq!(history.counts(asked, last), expected);
                }
            }
        }
    }
}
