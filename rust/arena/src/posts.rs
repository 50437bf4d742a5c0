//! Posts: how the kernels of a CUDA graph learn, at each replay, where to write.
//!
//! A graph replays the same kernels with the same arguments. What changes from one replay to the next, the CPU stores
//! into an entry, before it launches the replay. Replay number t (the first is 1) finds its post at entry t mod the
//! number of entries, and takes it only if the entry says t. So a replay for which nothing was posted (a warm-up, an
//! idle replay, a dropped step) writes nothing, and cannot take the post of another. Both sides count: the device in
//! memory of its own, one further at every replay; the CPU here, one further for every replay that it posts for or
//! passes over. **Every replay must be counted here before it is launched**, in the order of the launches. The device
//! tells its count back in the word behind the entries as soon as a replay has begun, so one that passed by is noticed
//! by the first post at which all that was launched before has begun; until then it may have taken a post. Whoever is
//! two launches ahead at every post gives no such moment.
//!
//! *Order.* The post is stored before the call that launches the replay; the launch rings the device's doorbell by a store
//! behind it, x86-64 keeps stores in order (no other processor is taken, see `cuda`), and the device reads host
//! memory only from then on. An entry is filled again only when the device's count says that it was taken: that count is
//! told when the entry has been read.

use crate::error::{Error, Result};
use crate::memory::Memory;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

/// Words of an entry; the last ones are not used: an entry is one 64-byte access of the device.
pub const ENTRY_WORDS: usize = 8;

/// Words of an entry.
pub mod entry {
    /// The replay it is for; stored last.
    pub const REPLAY: usize = 0;
    /// Rows to write.
    pub const ROWS: usize = 1;
    /// Where the device finds the first section to write.
    pub const PAYLOAD: usize = 2;
    /// Where it finds the sequence number.
    pub const SEQUENCE: usize = 3;
    /// What to store there.
    pub const VALUE: usize = 4;
}

/// Words of the memory of `entries` posts.
#[must_use]
pub const fn words(entries: usize) -> usize {
    (entries + 1) * ENTRY_WORDS
}

/// What one replay is to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Post {
    /// How many rows.
    pub rows: u64,
    /// Where the device finds the first section to write.
    pub payload: u64,
    /// Where it finds the sequence number.
    pub sequence: u64,
    /// What to store there.
    pub value: u64,
}

/// The CPU's side of one graph's posts. As many may wait for their replay as there are entries: the CPU runs no further
/// ahead of the device, and what is replayed beyond it gives no rows.
pub struct Posts<M> {
    memory: Arc<M>,
    entries: usize,
    replays: u64,
    /// The record that was posted for the newest replay.
    newest: Option<u64>,
}

impl<M: Memory> Posts<M> {
    /// Over zeroed memory of [`words`]`(entries)` words.
    pub fn new(memory: Arc<M>, entries: usize) -> Self {
        assert!(memory.len() >= words(entries), "room for the entries and the device's count");
        Self { memory, entries, replays: 0, newest: None }
    }

    /// Replays counted so far.
    #[must_use]
    pub fn replays(&self) -> u64 {
        self.replays
    }

    /// The next replay has no rows to publish: it is counted, and writes nothing.
    pub fn pass_over(&mut self) {
        self.replays += 1;
        self.newest = None;
    }

    /// Count the next replay; whether there is an entry free for it.
    ///
    /// # Errors
    /// When the device has counted replays that passed by here: then posts and replays can no longer be matched.
    pub fn advance(&mut self) -> Result<bool> {
        // Pairs with the device's store, which stands behind its reading of the entry: the entry may be filled again.
        let taken = self.memory.load(self.entries * ENTRY_WORDS, Acquire);
        let before = self.replays;
        self.pass_over();
        if taken > before {
            return Err(Error::Cuda {
                what: format!(
                    "a CUDA graph was replayed {taken} times, of which {} passed by the capture: its replays and their \
                     rows cannot be matched",
                    taken - before
                ),
            });
        }
        Ok(self.replays - taken <= self.entries as u64)
    }

    /// Post what the newest replay is to write, for which [`Posts::advance`] found an entry; `record` is its record.
    pub fn post(&mut self, post: Post, record: u64) {
        let first = self.entry();
        let Post { rows, payload, sequence, value } = post;
        // Pairs with the launch, see above; and the number of the replay comes last.
        for (at, word) in [
            (entry::ROWS, rows),
            (entry::PAYLOAD, payload),
            (entry::SEQUENCE, sequence),
            (entry::VALUE, value),
            (entry::REPLAY, self.replays),
        ] {
            self.memory.store(first + at, word, Release);
        }
        self.newest = Some(record);
    }

    /// The newest replay has failed, or was never launched: take its post out, if it had one, and give its record. If the
    /// device has taken the post already, it is as well: the replay ran then.
    pub fn cancel(&mut self) -> Option<u64> {
        let record = self.newest.take();
        if record.is_some() {
            self.memory.store(self.entry() + entry::REPLAY, 0, Release);
        }
        record
    }

    /// First word of the newest replay's entry.
    fn entry(&self) -> usize {
        (self.replays % self.entries as u64) as usize * ENTRY_WORDS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Mapped;
    use proptest::prelude::*;

    const FEW: usize = 4;

    /// Stands in for the device: takes posts as `take_post` in `py/expert_lens/kernels.py` does.
    struct Device {
        memory: Arc<Mapped>,
        taken: u64,
    }

    impl Device {
        fn replay(&mut self) -> Option<Post> {
            self.taken += 1;
            let word = |at| self.memory.load((self.taken % FEW as u64) as usize * ENTRY_WORDS + at, Acquire);
            let (rows, payload, sequence, value) =
                (word(entry::ROWS), word(entry::PAYLOAD), word(entry::SEQUENCE), word(entry::VALUE));
            let post = (word(entry::REPLAY) == self.taken).then_some(Post { rows, payload, sequence, value });
            self.memory.store(FEW * ENTRY_WORDS, self.taken, Release);
            post
        }
    }

    fn both() -> (Posts<Mapped>, Device) {
        let memory = Arc::new(Mapped::new(memmap2::MmapMut::map_anon(words(FEW) * 8).unwrap().into()));
        (Posts::new(Arc::clone(&memory), FEW), Device { memory, taken: 0 })
    }

    fn numbered(number: u64) -> Post {
        Post { rows: number, payload: number * 10, sequence: number * 100, value: number + 1 }
    }

    #[derive(Clone, Copy, Debug)]
    enum Action {
        Post,
        PassOver,
        Fail { launched: bool },
        Replay,
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            4 => Just(Action::Post),
            2 => Just(Action::PassOver),
            1 => any::<bool>().prop_map(|launched| Action::Fail { launched }),
            5 => Just(Action::Replay),
        ]
    }

    proptest! {
        #[test]
        fn each_replay_takes_its_own_post_or_none(actions in proptest::collection::vec(action(), 1..200)) {
            let (mut posts, mut device) = both();
            let mut launched = std::collections::VecDeque::new();
            let mut record = 0;
            for action in actions {
                match action {
                    Action::Post => {
                        let wanted = posts.advance().unwrap().then(|| {
                            record += 1;
                            posts.post(numbered(record), record);
                            numbered(record)
                        });
                        launched.push_back(wanted);
                    }
                    Action::PassOver => {
                        posts.pass_over();
                        launched.push_back(None);
                    }
                    Action::Fail { launched: ran } => {
                        let posted = posts.advance().unwrap();
                        if posted {
                            record += 1;
                            posts.post(numbered(record), record);
                        }
                        prop_assert_eq!(posts.cancel(), posted.then_some(record));
                        prop_assert_eq!(posts.cancel(), None);
                        if ran {
                            launched.push_back(None);
                        } else {
                            // What `Mailbox::retract` does, behind what was launched before.
                            while let Some(wanted) = launched.pop_front() {
                                prop_assert_eq!(device.replay(), wanted);
                            }
                            device.taken = posts.replays();
                        }
                    }
                    Action::Replay => {
                        if let Some(wanted) = launched.pop_front() {
                            prop_assert_eq!(device.replay(), wanted);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_cpu_that_is_too_far_ahead_posts_nothing_and_cancels_nothing() {
        let (mut posts, mut device) = both();
        for number in 1..=FEW as u64 {
            assert!(posts.advance().unwrap());
            posts.post(numbered(number), number);
        }
        assert!(!posts.advance().unwrap());
        assert_eq!(posts.cancel(), None);
        for number in 1..=FEW as u64 {
            assert_eq!(device.replay(), Some(numbered(number)));
        }
        assert_eq!(device.replay(), None);
        assert!(posts.advance().unwrap());
    }

    #[test]
    fn replays_that_passed_by_are_noticed() {
        let (mut posts, mut device) = both();
        posts.pass_over();
        device.replay();
        device.replay();
        assert!(posts.advance().unwrap_err().to_string().contains("replayed 2 times, of which 1 passed by"));
    }

    #[test]
    fn a_replay_that_passed_by_is_noticed_once_all_have_begun() {
        let (mut posts, mut device) = both();
        assert!(posts.advance().unwrap());
        device.replay(); // the one that passes by, ahead of the first
        for _ in 0..10 {
            assert!(posts.advance().unwrap(), "one that was launched has not begun yet");
            device.replay();
        }
        device.replay();
        assert!(posts.advance().unwrap_err().to_string().contains("replayed 12 times, of which 1 passed by"));
    }
}
