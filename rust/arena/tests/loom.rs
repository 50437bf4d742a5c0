//! Models of the handoff: every order in which the accesses of a writer and a reader can take effect, over rings of a few
//! words; in the largest models, every one with up to four preemptions (without a bound they take minutes, and hold too).
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p expert-lens-arena --test loom --release -- --include-ignored`

#[cfg(not(loom))]
#[test]
#[ignore = "the models need RUSTFLAGS=\"--cfg loom\""]
fn models() {
    panic!("no model ran: set RUSTFLAGS=\"--cfg loom\"");
}

#[cfg(loom)]
mod models {
    use expert_lens_arena::model::{header, len, ordered_words, reader, writer};
    use expert_lens_arena::posts::{ENTRY_WORDS, Post, Posts, entry, words};
    use expert_lens_arena::{End, Memory, Mode, Outcome, Reader, Record, Rows, Writer};
    use loom::sync::atomic::{AtomicU64, fence};
    use loom::thread;
    use std::sync::Arc;
    use std::sync::atomic::{self as plain, AtomicUsize, Ordering};

    /// Words of which loom explores the accesses, and words that are figures only.
    struct Words {
        explored: Vec<Option<AtomicU64>>,
        figures: Vec<plain::AtomicU64>,
    }

    impl Words {
        fn zeroed(len: usize, ordered: &[usize]) -> Self {
            let mut explored: Vec<_> = (0..len).map(|_| None).collect();
            ordered.iter().for_each(|&word| explored[word] = Some(AtomicU64::new(0)));
            Self { explored, figures: (0..len).map(|_| plain::AtomicU64::new(0)).collect() }
        }
    }

    impl Memory for Words {
        fn len(&self) -> usize {
            self.figures.len()
        }

        fn load(&self, word: usize, order: Ordering) -> u64 {
            match &self.explored[word] {
                Some(atomic) => atomic.load(order),
                None => self.figures[word].load(Ordering::SeqCst),
            }
        }

        fn store(&self, word: usize, value: u64, order: Ordering) {
            match &self.explored[word] {
                Some(atomic) => atomic.store(value, order),
                None => self.figures[word].store(value, Ordering::SeqCst),
            }
        }

        fn compare_exchange(&self, word: usize, current: u64, new: u64) -> bool {
            match &self.explored[word] {
                Some(atomic) => atomic.compare_exchange(current, new, Ordering::AcqRel, Ordering::Relaxed).is_ok(),
                None => self.figures[word].compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst).is_ok(),
            }
        }

        fn fence(&self, order: Ordering) {
            fence(order);
        }
    }

    /// Run `model` in every order; an error if these are suspiciously few.
    fn explore(preemptions: Option<usize>, least: usize, model: impl Fn() + Send + Sync + 'static) {
        let executions = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&executions);
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = preemptions;
        builder.check(move || {
            count.fetch_add(1, Ordering::Relaxed);
            model();
        });
        let executions = executions.load(Ordering::Relaxed);
        eprintln!("{executions} executions");
        assert!(executions >= least, "only {executions} executions");
    }

    /// Publish one row that says everywhere which step it is of.
    fn publish(writer: &mut Writer<Words>) -> usize {
        let step = writer.steps();
        let rows =
            Rows { experts: &[step as u8], token_ids: None, positions: &[step as u32], kv_slots: None, weights: None };
        writer.publish(&rows).unwrap().rows
    }

    /// The step read next, whole or not at all.
    fn poll(reader: &mut Reader<Words>) -> Option<u64> {
        match reader.poll().expect("no record contradicts itself")? {
            Record::Step(step) => {
                assert_eq!((step.experts, step.positions), (&[step.step as u8][..], &[step.step as u32][..]));
                Some(step.step)
            }
            other => panic!("{other:?} where only steps are published"),
        }
    }

    /// Four records of three words fill both rings: the next one takes the first one's descriptor and payload.
    const DESCRIPTORS: usize = 4;
    const RING_WORDS: usize = 12;

    #[test]
    fn a_lossy_reader_never_gets_a_torn_record() {
        explore(None, 50_000, || {
            let header = header(DESCRIPTORS, RING_WORDS);
            let memory = Arc::new(Words::zeroed(len(&header), &ordered_words(&header, 1)));
            let mut writer = writer(&memory, &header);
            (0..4).for_each(|_| assert_eq!(publish(&mut writer), 1));
            let mut reader = reader(&memory, &header, Mode::Lossy).unwrap();
            let reading = thread::spawn(move || {
                let mut last = None;
                for _ in 0..2 {
                    if let Some(step) = poll(&mut reader) {
                        assert!(last < Some(step), "in order");
                        last = Some(step);
                        assert_eq!(step + 1, reader.cursor());
                    }
                }
            });
            assert_eq!(publish(&mut writer), 1, "a lossy reader holds nothing back");
            reading.join().unwrap();
        });
    }

    #[test]
    fn a_record_is_seen_whole_as_soon_as_its_number_is() {
        explore(None, 100, || {
            let header = header(DESCRIPTORS, RING_WORDS);
            let memory = Arc::new(Words::zeroed(len(&header), &ordered_words(&header, 1)));
            let mut writer = writer(&memory, &header);
            let mut reader = reader(&memory, &header, Mode::Lossy).unwrap();
            let reading = thread::spawn(move || {
                let seen: Vec<u64> = (0..5).filter_map(|_| poll(&mut reader)).collect();
                assert_eq!(seen, (0..seen.len() as u64).collect::<Vec<_>>());
            });
            (0..3).for_each(|_| assert_eq!(publish(&mut writer), 1));
            reading.join().unwrap();
        });
    }

    #[test]
    fn a_lossless_reader_that_comes_while_space_is_given_away_loses_nothing() {
        explore(Some(4), 10_000, || {
            let header = header(DESCRIPTORS, RING_WORDS);
            let memory = Arc::new(Words::zeroed(len(&header), &ordered_words(&header, 1)));
            let mut writer = writer(&memory, &header);
            (0..4).for_each(|_| assert_eq!(publish(&mut writer), 1));
            let reading = thread::spawn(move || {
                let mut reader = reader(&memory, &header, Mode::Lossless).unwrap();
                let first = reader.cursor();
                // Nothing is released: from the first record on, all are there, one after the other.
                for expected in first..first + 2 {
                    assert_eq!(poll(&mut reader), Some(expected));
                }
                assert_eq!(reader.lost_records(), 0);
            });
            publish(&mut writer);
            publish(&mut writer);
            reading.join().unwrap();
        });
    }

    #[test]
    fn space_is_reused_only_when_a_lossless_reader_has_released_it() {
        explore(None, 300, || {
            let header = header(DESCRIPTORS, RING_WORDS);
            let memory = Arc::new(Words::zeroed(len(&header), &ordered_words(&header, 1)));
            let mut writer = writer(&memory, &header);
            let mut reader = reader(&memory, &header, Mode::Lossless).unwrap();
            (0..4).for_each(|_| assert_eq!(publish(&mut writer), 1));
            let reading = thread::spawn(move || {
                for expected in 0..2 {
                    assert_eq!(poll(&mut reader), Some(expected));
                    reader.release(reader.cursor());
                }
                assert_eq!(reader.lost_records(), 0);
                reader
            });
            let published = publish(&mut writer) + publish(&mut writer);
            let reader = reading.join().unwrap();
            assert_eq!(writer.dropped_rows() as usize, 2 - published);
            assert!(reader.tail() <= reader.cursor());
        });
    }

    #[test]
    fn a_reader_that_lags_never_sees_a_tail_past_the_head() {
        explore(Some(4), 5_000, || {
            // Each record takes the descriptor of the one before it.
            let header = header(1, RING_WORDS);
            let memory = Arc::new(Words::zeroed(len(&header), &ordered_words(&header, 1)));
            let mut writer = writer(&memory, &header);
            let mut reader = reader(&memory, &header, Mode::Lossy).unwrap();
            let reading = thread::spawn(move || {
                for _ in 0..2 {
                    poll(&mut reader);
                }
            });
            (0..2).for_each(|_| assert_eq!(publish(&mut writer), 1));
            reading.join().unwrap();
        });
    }

    #[test]
    fn two_readers_that_come_at_once_get_an_entry_each() {
        explore(None, 30, || {
            let header = header(DESCRIPTORS, RING_WORDS);
            let memory = Arc::new(Words::zeroed(len(&header), &ordered_words(&header, 2)));
            let mut writer = writer(&memory, &header);
            (0..4).for_each(|_| assert_eq!(publish(&mut writer), 1));
            let (theirs, their_header) = (Arc::clone(&memory), header.clone());
            let coming = thread::spawn(move || reader(&theirs, &their_header, Mode::Lossless).unwrap());
            let ours = reader(&memory, &header, Mode::Lossless).unwrap();
            let theirs = coming.join().unwrap();
            // Each of them holds everything by itself.
            drop(ours);
            assert_eq!(publish(&mut writer), 0);
            drop(theirs);
            assert_eq!(publish(&mut writer), 1);
        });
    }

    #[test]
    fn who_sees_the_end_sees_everything_before_it() {
        explore(None, 5, || {
            let header = header(DESCRIPTORS, RING_WORDS);
            let memory = Arc::new(Words::zeroed(len(&header), &ordered_words(&header, 1)));
            let mut writer = writer(&memory, &header);
            let mut reader = reader(&memory, &header, Mode::Lossless).unwrap();
            let reading = thread::spawn(move || {
                let early = poll(&mut reader);
                if !reader.ended() {
                    return;
                }
                assert!(early.is_some() || poll(&mut reader) == Some(0));
                let end = reader.poll().unwrap().expect("the end of the request");
                assert!(matches!(end, Record::End(End { number: 7, num_positions: 1, .. })), "{end:?}");
                assert!(reader.poll().unwrap().is_none());
            });
            publish(&mut writer);
            let request = "r".to_owned();
            writer.finish(&End { number: 7, request, num_positions: 1, outcome: Outcome::Finished }).unwrap();
            writer.close();
            reading.join().unwrap();
        });
    }

    /// A device takes posts while the CPU refills their entries and cancels one: each replay finds its own, whole, or none.
    #[test]
    fn a_post_is_taken_whole_by_its_own_replay() {
        const FEW: usize = 2;
        const REPLAYS: u64 = 4;
        explore(Some(3), 100, || {
            let ordered: Vec<usize> = (0..words(FEW)).collect();
            let memory = Arc::new(Words::zeroed(words(FEW), &ordered));
            // The launch: a release by the CPU, an acquire by the device.
            let launched = loom::sync::Arc::new(AtomicU64::new(0));
            let device = {
                let (memory, launched) = (Arc::clone(&memory), launched.clone());
                thread::spawn(move || {
                    let mut taken = 0;
                    for _ in 0..REPLAYS {
                        while launched.load(Ordering::Acquire) <= taken {
                            thread::yield_now();
                        }
                        taken += 1;
                        let word =
                            |at| memory.load((taken % FEW as u64) as usize * ENTRY_WORDS + at, Ordering::Relaxed);
                        let found = [entry::REPLAY, entry::ROWS, entry::VALUE].map(word);
                        let (there, skipped) = (found[0] == taken, taken == 2);
                        assert!(if there { found[1..] == [taken; 2] && !skipped } else { taken != 1 }, "{found:?}");
                        memory.store(FEW * ENTRY_WORDS, taken, Ordering::Release);
                    }
                })
            };
            let mut posts = Posts::new(Arc::clone(&memory), FEW);
            for replay in 1..=REPLAYS {
                let posted = if replay == 2 {
                    posts.pass_over();
                    false
                } else {
                    posts.advance().unwrap()
                };
                if posted {
                    posts.post(Post { rows: replay, payload: 0, sequence: 0, value: replay }, replay);
                }
                launched.store(replay, Ordering::Release);
                if replay == 3 {
                    // The launch has raised although the replay runs: the device takes the post, whole, or finds none.
                    assert_eq!(posts.cancel(), posted.then_some(replay));
                }
            }
            device.join().unwrap();
        });
    }
}
