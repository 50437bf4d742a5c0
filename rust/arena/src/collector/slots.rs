//! The engine's cache as a reader knows it: for each KV slot, the row of the token that was written there last.
//!
//! A request whose beginning the engine has in its cache does not compute it again; its rows are those that stand in its
//! slots when it starts. That holds as long as every row that was written is known: after records were lost, dropped or
//! void, nothing in the slots is sure, and all of it is forgotten.

use super::store::{MISSING, RequestRows};
use crate::layout::Facts;
use crate::reader::Step;

/// The rows of one arena's KV slots.
#[derive(Default)]
pub(super) struct Slots {
    /// Row `i` is that of slot `i`.
    rows: RequestRows,
    /// Rows whose slot lies past the bound, and is not kept.
    pub unkept: u64,
}

impl Slots {
    /// Note where the rows of a step went. `budget`: bytes that all slots may take.
    pub fn keep(&mut self, facts: &Facts, step: &Step<'_>, budget: usize) {
        if step.after_gap {
            self.forget();
        }
        for &slot in step.emptied {
            self.empty(slot as usize);
        }
        let Some(kv_slots) = step.kv_slots else { return };
        let limit = (facts.kv_slots as usize).min(budget / RequestRows::row_bytes(facts));
        let top = kv_slots.iter().map(|&slot| slot as usize).filter(|&slot| slot < limit).max();
        if let Some(top) = top.filter(|&top| top >= self.rows.len()) {
            // A cache is filled here and there: make room for what comes, not for each slot alone.
            self.rows.resize(facts, (top + 1).next_power_of_two().min(limit));
        }
        let (row_bytes, row_ids) = (facts.row_bytes(), facts.ids_per_row());
        for (row, &slot) in kv_slots.iter().enumerate() {
            let slot = slot as usize;
            if slot >= limit {
                self.unkept += 1;
                self.empty(slot); // kept while the budget was larger, before another rank came
                continue;
            }
            let rows = &mut self.rows;
            rows.experts[slot * row_bytes..(slot + 1) * row_bytes]
                .copy_from_slice(&step.experts[row * row_bytes..(row + 1) * row_bytes]);
            if let Some(weights) = step.weights {
                rows.weights[slot * row_ids..(slot + 1) * row_ids]
                    .copy_from_slice(&weights[row * row_ids..(row + 1) * row_ids]);
            }
            rows.token_ids[slot] = step.token_ids.map_or(super::NO_TOKEN, |ids| ids[row]);
            rows.phases[slot] = 0;
            rows.steps[slot] = step.step;
            rows.times[slot] = step.time_ns as i64;
        }
    }

    /// What stood in a slot no longer does.
    fn empty(&mut self, slot: usize) {
        if let Some(phase) = self.rows.phases.get_mut(slot) {
            *phase = MISSING;
        }
    }

    /// Nothing in the slots is sure any more.
    pub fn forget(&mut self) {
        self.rows.phases.fill(MISSING);
    }

    /// The rows, and where among them that of a slot is; None if it is not known.
    pub fn find(&self, slot: u32) -> Option<usize> {
        let slot = slot as usize;
        self.rows.phases.get(slot).is_some_and(|&phase| phase != MISSING).then_some(slot)
    }

    /// What [`Slots::find`] points into.
    pub fn rows(&self) -> &RequestRows {
        &self.rows
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        self.rows.bytes()
    }
}
